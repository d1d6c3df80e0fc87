"""Writes ``tokenizer.json``, the byte-level BPE vocabulary of the text transformer.

Run by hand, never by the package; OUT is ``tokenizer.json`` beside this file unless given:

    python configs/make_tokenizer.py [OUT]

The vocabulary is fixed: trained once, on the words below and nothing else, so that a new prompt set does not
change it. It is small on purpose: a row of the token table that no prompt uses only decays under Adam's L2.
All 256 bytes are in it, so any text has an encoding; words that are missing here only cost more tokens.
The same `tokenizers` release (0.23.3) writes the same bytes. A change of WORDS or VOCABULARY changes token
ids: models carry the tokenizer they were trained with and keep working, golden losses are recorded anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

VOCABULARY = 4096
SPECIAL_TOKENS = ("<|start|>", "<|end|>", "<|pad|>")

WORDS = """
a about above absorb absorbed absorption absorptions across adjacent after again against all almost along
also although always among an and another any are area areas around as at away back band bands bare be
because before behind below belong belongs belonging beneath beside between beyond both broad but by can
centre center class classes clear close closed closely cluster clusters clustered coarse common compact
compared complete complex consist consists constant contain contains contained containing continuous
contrast corner corners cover covered covering covers cut deep deeper dense densely depth describe
description detail different dim dimmed dimmer dip direct distinct distinctive does down drop drops during
each edge edged edges either elongated else empty end ends enough even evenly ever every exposed face faces
faint faintly fall falling falls far feature features few fewer field fields fill filled fills fine finer
fitted flat flatter follow following follows for form formed forms found free from full further gap gaps
general given gradual gradually grow growing grown grows hardly has have heavily heavy height heights here
high higher highest horizontal how if image images in inside instead into irregular is isolated it its
itself just keep kind kinds label labelled laid large larger largest layer layers left length less let level
levels light like line linear lines little local located long longer low lower lowest made main make many
mark marked marks match mean medium middle missing mix mixed mixes mixing mixture moderate more most mostly
much narrow near nearby nearest nearly neighbour neighbouring neighbours never next no none nor normal north
not object objects observed of off often old on once one only onto open or other others out outer outline
over own pair parallel part partial partly parts patch patches patchy pattern patterns peak peaks per
perfectly photo photograph picture piece pieces pixel pixels place places plain point points position
present produce quite raise raised range rarely rather reach reaches really reduced reflect reflected
reflects region regions regular related remain remains return returns rise rises rising rose round rounded
row rows same scattered scene seen separate series set several shallow shallower shape shaped shapes sharp
sharply short shorter shortest show showing shown shows side sides similar simple since single size sized
sizes slight slightly slope slopes sloping slow slowly small smaller smallest smooth smoothly so some
sometimes south space spaced spaces sparse spread square squares stands start starts steadily steep steeper
still straight strip stripe striped stripes strong stronger strongly structure structures such surface
surfaces surround surrounded surrounding tall taller tallest text than that the their them then there these
they thick thin thinner this those three through thus to together top tops toward towards tower turn turns
two type types typical typically under uneven uniform unlike until up upper upright usually varied varies
vary varying vertical very view visible wall walls warm was way weak weaker well west east were when where
which while whole wide wider width will with within without yet zero half third quarter four five six seven
eight nine ten twenty hundred thousand first second last mid mostly hardly

spectral spectrum spectra reflectance reflection albedo radiance irradiance wavelength wavelengths nanometre
nanometres nm infrared near-infrared shortwave thermal ultraviolet violet panchromatic multispectral
hyperspectral spectroscopy red-edge edge plateau shoulder shoulders trough minimum maximum slope continuum
background signal noise noisy sensor sensors bright brighter brightest brightness brightly dark darker
darkest dull pale paler glint glints glare glossy matt matte gloss specular diffuse shade shaded shades
shadow shadows shadowed sunlit sun sunlight sky skylight illuminated illumination dimly chlorophyll
carotenoid anthocyanin pigment pigments pigmented lignin cellulose leaf leaves leafy moisture moist dry
drying dried wet water-logged iron oxide oxides clay clays carbonate quartz gypsum organic mineral minerals
LiDAR lidar laser radar SAR backscatter polarisation coherence elevation altitude terrain topography
topographic relief surface-height digital model canopy-height intensity first-return echo echoes pulse
pulses point-cloud metre metres meter meters m cm km centimetre centimetres kilometre storey storeys floor
floors tallness roughness texture textures textured remote sensing remotely sensed satellite airborne aerial
aircraft drone overhead nadir orbit orthophoto georeferenced modality modalities co-registered registered
registration resolution raster rasters grid window windows centre-pixel AVIRIS CASI AISA NEON HyMap Sentinel
Landsat Houston Trento Gulfport Salinas Pavia Augsburg Berlin Indian Pines Mississippi Florida Texas Italy
Italian California Germany campus university suburb suburban suburbs city cities town urban rural village
villages coast coastal inland mountain mountains hill hills hillside valley plain plains slope

land landscape land-cover land-use ground soil soils earth earthy dirt mud muddy sand sandy silt loam peat
gravel pebbles stone stones stony rock rocks rocky boulder boulders cliff dune dunes beach shore shoreline
bank banks bedrock outcrop ballast crushed chippings dust dusty litter mulch compost ploughed tilled fallow
furrow furrows crop crops cropland arable farm farms farmland farmyard farming agriculture agricultural
harvest harvested stubble straw hay pasture pastures meadow meadows grassland savanna steppe heath moor
moorland tundra wetland wetlands marsh marshes swamp bog reed reeds mangrove grass grasses grassy lawn lawns
turf mown mowed unmown watered irrigated irrigation healthy stressed unhealthy vigorous lush green greener
greenery yellowing wilted withered brown browned dead dormant weeds weedy weed vegetation vegetated
vegetative plant plants planted planting plantation plantations shrub shrubs shrubby bush bushes bushy hedge
hedges hedgerow scrub undergrowth understory understorey fern ferns moss lichen flower flowers flowerbed
garden gardens park parks parkland yard yards backyard playground tree trees treetop treetops crown crowns
canopy canopies foliage needle needles trunk trunks branch branches twigs bark stem stems root roots wood
woods wooded woodland woodlands forest forests forested deciduous evergreen conifer conifers coniferous
broadleaf broad-leaved pine pines oak oaks maple maples birch beech ash elm poplar willow spruce fir cedar
cypress larch juniper palm palms magnolia bay tupelo gum sweetgum hickory longleaf slash turkey sand-live
live laurel water-oak red-maple Pinus palustris elliottii taeda Quercus laevis geminata hemisphaerica nigra
laurifolia virginiana Acer rubrum Nyssa biflora Persea Gordonia lasianthus Lyonia lucida Magnolia orchard
orchards apple apples pear cherry olive olives citrus orange almond vineyard vineyards vine vines grape
grapes pruned trellis pergola wire wires corn maize wheat barley oats rye rice soybean soybeans cotton
potato potatoes sugar beet beets tomato tomatoes lettuce romaine celery broccoli broccoli-green cabbage
carrot onion onions alfalfa clover rapeseed sunflower sunflowers untrained seedling seedlings senesced ripe
ripening young mature week weeks

water waters river rivers stream streams creek canal canals channel channels ditch ditches pond ponds lake
lakes reservoir sea ocean bay lagoon harbour pool pools swimming puddle flood flooded turbid sediment algae
ice snow snowy glacier frozen cloud clouds cloudy fog haze smoke burnt burned ash scar fire

building buildings house houses housing home homes residential apartment apartments block blocks tower
towers skyscraper commercial industrial industry office offices shop shops store stores mall market
warehouse warehouses hall halls factory factories hangar barn barns shed sheds garage garages greenhouse
greenhouses school hospital church stadium station depot silo tank tanks chimney roof roofs rooftop rooftops
roofing gable gabled pitched hipped ridge ridges eaves shingle shingles tile tiles tiled slate thatch
membrane bitumen tar metal metallic steel aluminium copper zinc galvanised rust rusty corrugated sheet
sheets panel panels solar photovoltaic glass glazed skylights concrete cement asphalt tarmac pavement paved
paving pavers unpaved brick bricks masonry plaster wooden timber plastic plastics polymer rubber synthetic
artificial fibre fibres fabric cloth canvas nylon polyester vinyl acrylic polyurethane paint painted paints
coating coated coat dye dyes dyed road roads roadway street streets lane lanes avenue alley highway highways
motorway freeway expressway carriageway junction crossing crossings roundabout ramp ramps bridge bridges
overpass viaduct tunnel embankment embankments kerb kerbs curb curbs kerbstone sidewalk sidewalks footpath
path paths pathway pathways track tracks trail trails driveway driveways railway railways railroad rail
rails sleepers platform tram runway runways taxiway airport apron parking park parked lot lots bay bays deck
decks car cars vehicle vehicles truck trucks bus van vans train trains boat boats ship ships container
containers crane traffic marking markings court courts tennis basketball football soccer baseball pitch goal
running athletics sports sport stadium oval field golf fairway bunker fence fences fenced fencing gate wall
pole poles pylon lamp cable cables bench pipe pipeline debris rubble waste landfill quarry mine mining
construction site excavation bare-soil impervious pervious permeable built-up developed infrastructure
background unlabelled unknown other others target targets rectangle rectangular circle circular ring loop
strip strips dot dots curve curved winding bend

red reddish orange yellow yellowish green greenish cyan blue bluish purple violet magenta pink brown
brownish beige tan ochre cream white whitish grey greyish gray grayish black blackish silver golden gold
colour coloured colours color colored vivid saturated muted hue tone tones tint tinted transparent
translucent opaque

medical magnetic resonance imaging MRI MR scan scans scanner slice slices volume sagittal coronal axial
plane planes weighted T1 T2 proton density fat-suppressed contrast knee joint joints femur femoral tibia
tibial fibula patella patellar tendon tendons ligament ligaments cruciate anterior posterior medial lateral
collateral ACL PCL MCL LCL meniscus menisci meniscal cartilage cartilages bone bones marrow muscle muscles
tissue tissues synovial fluid effusion oedema edema swelling cyst lesion lesions tear tears torn rupture
ruptured intact partial complete sprain fracture fractured injury injured degenerate degeneration arthritis
osteoarthritis abnormal abnormality abnormalities normal healthy patient disease diseased finding findings
diagnosis hyperintense hypointense isointense intensity horn root bucket-handle displaced fibres

0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 30 35 40 45 50 60 70 80 90 100 120 150
200 250 300 350 380 400 450 480 500 520 550 560 570 580 600 620 630 640 650 660 670 680 690 700 710 720 740
750 760 780 800 820 850 860 870 900 920 940 950 960 970 1000 1050 1100 1400 1450 1900 2000 2200 2300 2500
"""

SENTENCES = (
    "A photo of a class.",
    "A hyperspectral and LiDAR patch of trees.",
    "A hyperspectral patch of water.",
    "A hyperspectral and LiDAR image patch, seen from above; the centre pixel belongs to the class roads.",
    "Lawn: dense grass, chlorophyll absorption at 680 nm, a steep red edge, a bright near-infrared plateau.",
    "Roof: flat, 4 to 8 m high, with sharp edges; the LiDAR shows a block above the ground.",
)


def corpus() -> list[str]:
    """Every word as it stands in a sentence (twice the weight), alone, and at the start of a sentence."""
    lines = []
    for word in WORDS.split():
        lines += [f" {word}", f" {word}", word, word[:1].upper() + word[1:]]
    return lines + list(SENTENCES)


def build() -> str:
    """The tokenizer as JSON text; byte-level pre-tokens, no normalisation: decoding gives the text back."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer=trainer)
    start, end, _ = SPECIAL_TOKENS
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    return tokenizer.to_str() + "\n"


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("tokenizer.json")
    out.write_text(build(), encoding="utf-8", newline="\n")
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
