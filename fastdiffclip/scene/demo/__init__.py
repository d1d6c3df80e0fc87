"""The built-in scene: a suburb of 400 m by 600 m as an imaging spectrometer and a laser scanner see it.

Nothing is downloaded. Spectra are parametric (`spectra`), the plan is drawn from a seed (`layout`,
`objects`), light and instruments are modelled (`sensor`). The same seed gives the same bytes on any
machine: random numbers are raw PCG64 words, decisions are plain arithmetic, results are rounded at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdiffclip.errors import UsageError
from fastdiffclip.scene.demo import layout as plan
from fastdiffclip.scene.demo import sensor, spectra
from fastdiffclip.scene.demo.canvas import Canvas, Draws
from fastdiffclip.scene.demo.objects import Kind
from fastdiffclip.scene.store import ClassInfo
from fastdiffclip.scene.writer import SceneWriter

NAME = "suburb"
SCALE = 1.0e-4

CRS_WKT = (
    'PROJCRS["WGS 84 / UTM zone 15N",BASEGEOGCRS["WGS 84",DATUM["World Geodetic System 1984",'
    'ELLIPSOID["WGS 84",6378137,298.257223563,LENGTHUNIT["metre",1]]],PRIMEM["Greenwich",0,'
    'ANGLEUNIT["degree",0.0174532925199433]],ID["EPSG",4326]],CONVERSION["UTM zone 15N",'
    'METHOD["Transverse Mercator",ID["EPSG",9807]],PARAMETER["Latitude of natural origin",0,'
    'ANGLEUNIT["degree",0.0174532925199433],ID["EPSG",8801]],PARAMETER["Longitude of natural origin",-93,'
    'ANGLEUNIT["degree",0.0174532925199433],ID["EPSG",8802]],PARAMETER["Scale factor at natural origin",'
    '0.9996,SCALEUNIT["unity",1],ID["EPSG",8805]],PARAMETER["False easting",500000,LENGTHUNIT["metre",1],'
    'ID["EPSG",8806]],PARAMETER["False northing",0,LENGTHUNIT["metre",1],ID["EPSG",8807]]],CS[Cartesian,2],'
    'AXIS["(E)",east,ORDER[1],LENGTHUNIT["metre",1]],AXIS["(N)",north,ORDER[2],LENGTHUNIT["metre",1]],'
    'ID["EPSG",32615]]'
)
WEST, NORTH = 271_600.0, 3_289_800.0

# Value, name, colour, and what a prompt says of it: spectrum, shape and surroundings, height.
_CLASSES: tuple[tuple[int, str, tuple[int, int, int], str], ...] = (
    (
        Kind.HEALTHY,
        "healthy grass",
        (76, 187, 23),
        "Well-watered lawn at ground level, smooth and even. Strong chlorophyll absorption in blue "
        "and red, a steep red edge and a high near-infrared plateau with a water dip near 970 nm.",
    ),
    (
        Kind.STRESSED,
        "stressed grass",
        (189, 183, 88),
        "Dry, yellowing lawn at ground level, often beside healthy grass. Weak chlorophyll "
        "absorption, a shallow red edge and a bright red that rises steadily into the near infrared.",
    ),
    (
        Kind.TURF,
        "synthetic turf",
        (0, 250, 154),
        "Artificial green pitch, flat and rectangular, often inside a running track. A small green "
        "peak but no chlorophyll red edge; the near infrared rises late, beyond 750 nm.",
    ),
    (
        Kind.TREES,
        "trees",
        (0, 100, 0),
        "Rounded, rough crowns 3 to 14 m high that cast shadows. Dark in the visible, deep red "
        "absorption, a steep red edge and a strong but shaded near infrared.",
    ),
    (
        Kind.SOIL,
        "bare soil",
        (160, 100, 50),
        "Open earth at ground level: building site, empty plot or dirt track. Reflectance climbs "
        "steadily from blue to near infrared with weak iron absorption, darker where moist.",
    ),
    (
        Kind.WATER,
        "water",
        (30, 90, 220),
        "Pond or drain, smooth, about a metre below its surroundings. Very dark with a weak green "
        "hump and almost no near-infrared reflectance.",
    ),
    (
        Kind.TILE_ROOF,
        "residential tile roof",
        (214, 69, 56),
        "Gabled house roof, a small rectangle 4 to 8 m high in rows between gardens, one side "
        "brighter. Red clay that absorbs blue and green and steps up near 600 nm.",
    ),
    (
        Kind.METAL_ROOF,
        "metal roof",
        (150, 200, 230),
        "Large sheet-metal hall roof 7 to 12 m high, smooth, with rows of skylights. Bright, nearly "
        "flat spectrum, sometimes with blue paint or a film of rust.",
    ),
    (
        Kind.FLAT_ROOF,
        "flat commercial roof",
        (170, 130, 220),
        "Flat gravel or bitumen roof of a shop or school, 5 to 9 m high, with parapet and plant "
        "boxes. Grey spectrum like asphalt, told from the street by its height.",
    ),
    (
        Kind.CONCRETE,
        "concrete",
        (205, 205, 205),
        "Light slabs at ground level: yards, pavements and drives. Bright grey spectrum that rises "
        "through the blue and stays level in the near infrared.",
    ),
    (
        Kind.ROAD,
        "asphalt road",
        (110, 110, 120),
        "Long narrow street at ground level with few cars. Dark grey spectrum with a slow, almost "
        "straight rise towards the near infrared.",
    ),
    (
        Kind.CAR_PARK,
        "car park",
        (240, 160, 60),
        "Wide asphalt area at ground level with rows of parked cars 1.5 m high and pale stall lines. "
        "Dark grey spectrum, speckled by bright paint and car bodies.",
    ),
    (
        Kind.TRACK,
        "running track",
        (190, 30, 110),
        "Red polyurethane oval ring at ground level round a green pitch. Sharp step near 600 nm like "
        "roof tiles, but flat and smooth.",
    ),
    (
        Kind.RAILWAY,
        "railway",
        (95, 60, 40),
        "Straight gravel bed with rails, less than a metre above the ground. Brown-grey stone with "
        "weak iron absorption and a coarse texture.",
    ),
)


@dataclass(frozen=True)
class DemoScene:
    """The arrays of the built-in scene.

    ``hsi`` (H, W, 144) uint16, reflectance x 10,000; ``lidar`` (H, W, 1) float32, surface height in metres;
    ``labels`` (H, W) uint16, 0 = unlabelled; ``wavelengths`` and ``fwhm`` in nm; ``affine_transform`` six
    numbers (a, b, c, d, e, f), north up, in the metres of ``crs_wkt`` (the place itself is made up).
    """

    hsi: np.ndarray
    lidar: np.ndarray
    labels: np.ndarray
    wavelengths: tuple[float, ...]
    fwhm: tuple[float, ...]
    classes: tuple[ClassInfo, ...]
    crs_wkt: str
    affine_transform: tuple[float, ...]


def demo_classes() -> tuple[ClassInfo, ...]:
    """The class table: value, name, description, colour of the 14 classes."""
    return tuple(ClassInfo(int(value), name, text, colour) for value, name, colour, text in _CLASSES)


def make_demo(seed: int = 0, height: int = 200, width: int = 300) -> DemoScene:
    """Make the built-in scene. Other sizes show the same 400 m by 600 m in coarser or finer pixels.

    Raises:
        UsageError: seed below 0, or fewer than 40 rows or 60 columns.
    """
    if seed < 0 or height < 40 or width < 60:
        raise UsageError(
            f"the built-in scene cannot be made with seed {seed} at {height} x {width} pixels: "
            "give a seed of 0 or more and at least 40 rows and 60 columns"
        )
    rows, cols = height * sensor.SUBPIXELS, width * sensor.SUBPIXELS
    canvas = Canvas(plan.EXTENT_Y, plan.EXTENT_X, rows, cols)
    plan.build_suburb(canvas, Draws(seed, 0))
    labels = _draw_labels(canvas, Draws(seed, 1))
    surroundings = Draws(seed, 2)
    ground = sensor.terrain(canvas, surroundings)
    direct, sky = sensor.illumination(canvas, ground, surroundings)
    sensor.weather(canvas, Draws(seed, 3))
    nm = spectra.wavelengths()
    return DemoScene(
        hsi=sensor.hyperspectral(canvas, direct, sky, Draws(seed, 4)),
        lidar=sensor.surface_model(canvas, ground, Draws(seed, 5)),
        labels=labels,
        wavelengths=tuple(round(float(centre), 3) for centre in nm),
        fwhm=(5.1,) * spectra.BANDS,
        classes=demo_classes(),
        crs_wkt=CRS_WKT,
        affine_transform=(plan.EXTENT_X / width, 0.0, WEST, 0.0, -plan.EXTENT_Y / height, NORTH),
    )


def write_demo(path: str | Path, seed: int = 0) -> Path:
    """Write the built-in scene as a scene folder at ``path`` and return the path.

    Raises what `SceneWriter` raises: the folder exists already, the disk is full.
    """
    scene = make_demo(seed)
    height, width = scene.labels.shape
    with SceneWriter(
        path,
        height=height,
        width=width,
        crs_wkt=scene.crs_wkt,
        affine_transform=scene.affine_transform,
        name=NAME,
    ) as writer:
        writer.add_modality(
            "hsi",
            scene.hsi,
            bands=scene.hsi.shape[2],
            dtype="uint16",
            wavelengths=scene.wavelengths,
            fwhm=scene.fwhm,
            scale=SCALE,
        )
        writer.add_modality("lidar", scene.lidar, bands=1, dtype="float32")
        writer.add_labels("labels", scene.labels)
        writer.set_classes(list(scene.classes))
    return Path(path)


def _graded(canvas: Canvas) -> np.ndarray:
    """Class of every subpixel; grass between healthy and stressed belongs to neither."""
    kind = canvas.kind.copy()
    grass = canvas.material == spectra.GRASS
    kind[grass & (kind == Kind.HEALTHY) & (canvas.p > 0.30)] = 0
    kind[grass & (canvas.p > 0.68)] = Kind.STRESSED
    return kind


def _box_count(mask: np.ndarray, half: int) -> np.ndarray:
    """Number of True in the (2 half + 1)-square about each pixel."""
    total = np.pad(mask.astype(np.int64), half + 1).cumsum(0).cumsum(1)
    span = 2 * half + 1
    counts = total[span:, span:] - total[:-span, span:] - total[span:, :-span] + total[:-span, :-span]
    return counts[: mask.shape[0], : mask.shape[1]]


def _draw_labels(canvas: Canvas, draws: Draws) -> np.ndarray:
    """Ground truth as people make it: some patches per class, inside objects, with a few mixed pixels.

    A patch is what one object shows in a square of 5 to 9 pixels; patches of a class keep their distance.
    """
    kind = _graded(canvas)
    height, width = canvas.rows // sensor.SUBPIXELS, canvas.cols // sensor.SUBPIXELS
    labels = np.zeros((height, width), np.uint16)
    for value in range(1, len(_CLASSES) + 1):
        inside = sensor.pixel_sum((kind == value).astype(np.uint8)) >= 6
        count = _box_count(inside, 2)
        free = inside & (count >= 9)
        free[:3], free[-3:], free[:, :3], free[:, -3:] = False, False, False, False
        patches = 0
        for pixel in draws.order(height * width):
            row, col = divmod(int(pixel), width)
            if patches < 26 and free[row, col]:
                half_row, half_col = 2 + int(pixel) % 3, 2 + int(pixel) % 2
                square = (
                    slice(max(row - half_row, 0), row + half_row + 1),
                    slice(max(col - half_col, 0), col + half_col + 1),
                )
                labels[square][inside[square] & (labels[square] == 0)] = value
                free[max(row - 11, 0) : row + 12, max(col - 11, 0) : col + 12] = False
                patches += 1
    return labels
