"""EnMAP products, made small to the published layout: what the metadata say, quality masks, and products that lie."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestReport, IngestRequest, ingest
from fastdiffclip.scene.readers import open_raster
from fastdiffclip.scene.store import open_scene

SCENE = "ENMAP01-____L2A-DT0000001867_20220724T104526Z_008_V010302_20230628T165614Z"
BANDS, NODATA = 8, -32768
CENTRES = [418.42, 424.04, 902.25, 993.08, 911.57, 921.31, 1390.5, 2445.53]  # detectors overlap around 900 nm


def band(number: int, centre: str, gain: str = "0.0001", offset: str = "0") -> str:
    return (
        f'<bandID number="{number}"><wavelengthCenterOfBand>{centre}</wavelengthCenterOfBand><FWHMOfBand>'
        f"{6 + number * 0.25}</FWHMOfBand><GainOfBand>{gain}</GainOfBand><OffsetOfBand>{offset}</OffsetOfBand></bandID>"
    )


def metadata(**parts: str) -> str:
    """The parts of METADATA.XML that are read, and some that are not, where the published schema has them."""
    given = {
        "level": "L2A", "vnir": "1,2,3,4", "swir": "5,6,7,8", "before": "",
        "background": f"<backgroundValue>{NODATA}</backgroundValue>",
        "bands": "".join(band(i, str(centre)) for i, centre in enumerate(CENTRES, 1)), **parts,
    }  # fmt: skip
    return f"""<?xml version="1.0" encoding="UTF-8"?>{given["before"]}
<level_X><metadata><schema><processingLevel>{given["level"]}</processingLevel></schema><name>x-METADATA.XML</name></metadata>
<processing><productFormat>GeoTIFF+Metadata</productFormat></processing>
<base><format>ENMAP_L2A</format><level>{given["level"]}</level></base>
<specific><code>L2A</code><numberOfVNIRBands>4</numberOfVNIRBands>{given["background"]}
<vnirProductQuality><numChannelsExpected>4</numChannelsExpected><expectedChannelsList>{given["vnir"]}</expectedChannelsList>
</vnirProductQuality><swirProductQuality><expectedChannelsList>{given["swir"]}</expectedChannelsList></swirProductQuality>
<bandCharacterisation>{given["bands"]}</bandCharacterisation></specific>
<product><image><merge><channels>{BANDS}</channels><name>../../../etc/passwd</name></merge></image></product></level_X>"""


def tiff(path: Path, values: np.ndarray, **more: Any) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=values.shape[2],
        dtype=values.dtype, crs="EPSG:32633", transform=Affine(30, 0, 4e5, 0, -30, 5.8e6), **more,
    ) as dataset:  # fmt: skip
        dataset.write(np.moveaxis(values, -1, 0))


def cube() -> np.ndarray:
    values = np.random.default_rng(0).integers(1, 9999, (12, 10, BANDS)).astype("int16")
    values[0] = NODATA  # outside of the swath
    values[..., 6] = NODATA  # absorbed by water vapour
    return values


def product(folder: Path, values: np.ndarray | None = None, end: str = "", **parts: str) -> Path:
    """Write metadata, image and quality classes; return the metadata file."""
    values = cube() if values is None else values
    tiff(folder / f"{SCENE}-SPECTRAL_IMAGE{end}.TIF", values, nodata=NODATA)
    classes = np.ones((*values.shape[:2], 1), "uint8")
    classes[0], classes[11, :3] = 3, 2
    tiff(folder / f"{SCENE}-QL_QUALITY_CLASSES{end}.TIF", classes)
    for i, name in enumerate(("CLOUD", "CLOUDSHADOW")):
        flags = np.zeros((*values.shape[:2], 1), "uint8")
        flags[5, i] = 1
        tiff(folder / f"{SCENE}-QL_QUALITY_{name}{end}.TIF", flags)
    path = folder / f"{SCENE}-METADATA.XML"
    path.write_text(metadata(**parts), encoding="utf-8")
    return path


def run(folder: Path, spec: str, **options: Any) -> IngestReport:
    return ingest(IngestRequest([("hsi", spec)], folder / "o.zarr", **options))


@pytest.mark.parametrize("end", ["", "_COG"])
def test_either_file_opens_the_product(tmp_path: Path, end: str) -> None:
    path = product(tmp_path, end=end)
    for file in (path, tmp_path / f"{SCENE}-SPECTRAL_IMAGE{end}.TIF"):
        with open_raster(file) as source:
            assert source.wavelengths == tuple(CENTRES) and source.fwhm == tuple(6.25 + 0.25 * i for i in range(BANDS))
            assert (source.scale, source.offset, source.nodata) == (1e-4, 0.0, NODATA)
            assert source.bad_bands == tuple(i == 6 for i in range(BANDS))
            assert source.affine_transform == (30, 0, 4e5, 0, -30, 5.8e6)
            np.testing.assert_array_equal(source.read_rows(slice(2, 5)), cube()[2:5])
            assert source.read_mask is not None
            np.testing.assert_array_equal(source.read_mask(slice(0, 12)).all(1), np.arange(12) > 0)


def test_everything_arrives_in_the_scene(tmp_path: Path) -> None:
    report = run(tmp_path, str(product(tmp_path)))
    scene = open_scene(report.scenes[0])
    hsi = scene.modalities["hsi"]
    np.testing.assert_array_equal(scene.read("hsi"), cube())
    np.testing.assert_array_equal(scene.read_valid("hsi").all(1), np.arange(12) > 0)
    assert rasterio.CRS.from_wkt(scene.crs_wkt).to_epsg() == 32633
    assert (hsi.wavelengths, hsi.scale, hsi.nodata) == (tuple(CENTRES), 1e-4, NODATA)
    assert hsi.bad_bands is not None and sum(hsi.bad_bands) == 1
    assert {name.removeprefix(SCENE) for _, name, _ in scene.sources} == {
        "-METADATA.XML", "-SPECTRAL_IMAGE.TIF", "-QL_QUALITY_CLASSES.TIF"
    }  # fmt: skip


def test_quality_masks_that_are_asked_for(tmp_path: Path) -> None:
    path = product(tmp_path)
    report = run(tmp_path, f"{path}:cloud,cloudshadow")
    invalid = ~open_scene(report.scenes[0]).read_valid("hsi")
    assert invalid[5].tolist() == [True, True] + [False] * 8 and invalid[0].all() and invalid.sum() == 12
    with pytest.raises(InputDataError, match=r"no quality mask 'clouds' \(did you mean 'cloud'\?\)"):
        open_raster(path, "clouds")
    with pytest.raises(InputDataError, match=r"has no QL_QUALITY_HAZE\.TIF beside it: leave out that mask"):
        open_raster(path, "haze")


def test_without_quality_rasters_the_background_value_counts(tmp_path: Path) -> None:
    path = product(tmp_path)
    for file in tmp_path.glob("*QL_*"):
        file.unlink()
    report = run(tmp_path, str(path))
    np.testing.assert_array_equal(open_scene(report.scenes[0]).read_valid("hsi").all(1), np.arange(12) > 0)


def test_channels_that_are_not_expected_are_bad(tmp_path: Path) -> None:
    with open_raster(product(tmp_path, swir="5,6,8", vnir=" 2, 3, 4 ")) as source:
        assert source.bad_bands == tuple(i in (0, 6) for i in range(BANDS))
    with open_raster(product(tmp_path, swir="", vnir="")) as source:
        assert source.bad_bands == tuple(i == 6 for i in range(BANDS))


def test_bands_of_different_gain_become_physical(tmp_path: Path) -> None:
    bands = "".join(band(i, str(centre), str(i / 2), str(i)) for i, centre in enumerate(CENTRES, 1))
    with open_raster(product(tmp_path, bands=bands, level="L1C")) as source:
        assert (source.dtype, source.scale, source.offset, source.nodata) == (np.float32, 1.0, 0.0, None)
        number = np.arange(1, BANDS + 1)
        np.testing.assert_allclose(source.read_rows(slice(3, 5)), cube()[3:5] * (number / 2) + number, rtol=1e-6)
        assert np.isnan(source.read_rows(slice(0, 1))).all()


BOMB = '<!DOCTYPE l [<!ENTITY a "xxxxxxxxxx"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
REACH = '<!DOCTYPE l [<!ENTITY secret SYSTEM "file:///etc/passwd">]>'
BROKEN: dict[str, tuple[dict[str, str], str]] = {
    "entities": ({"before": BOMB, "level": "&b;"}, r"METADATA\.XML has a document type definition"),
    "outside": ({"before": REACH, "level": "&secret;"}, r"METADATA\.XML has a document type definition"),
    "undefined": ({"level": "&b;"}, "is damaged XML"),
    "open": ({"level": "<level>"}, "is damaged XML"),
    "deep": ({"level": "<a>" * 500 + "</a>" * 500}, "nests its elements deeper than 64"),
    "level": ({"level": "L1B"}, "is of level 'L1B', expected an EnMAP product of level L2A"),
    "no level": ({"level": ""}, "is of level ''"),
    "fewer bands": ({"bands": band(1, "500")}, r"has 8 bands and .*METADATA\.XML describes 1"),
    "no bands": ({"bands": ""}, "describes 0: they do not belong together"),
    "wavelength": ({"bands": "".join(band(i, "abc") for i in range(8))}, "'abc' as wavelengthCenterOfBand, expected a"),
    "gain": ({"bands": "".join(band(i, "5", "nan") for i in range(8))}, "'nan' as GainOfBand, expected a number"),
    "no gain": ({"bands": "<bandID/>" * 8}, "'' as wavelengthCenterOfBand"),
    "background": ({"background": "<backgroundValue>x</backgroundValue>"}, "'x' as specific/backgroundValue"),
    "channels": ({"vnir": "1;2"}, "has channels '1;2', expected numbers"),
    "none expected": ({"vnir": "99"}, "has no band with data") ,
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_metadata_is_one_sentence_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    parts, message = BROKEN[case]
    path = product(tmp_path, **({"swir": ""} if case == "none expected" else {}), **parts)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputDataError, match=message):
        run(tmp_path, str(path))
    assert sorted(tmp_path.iterdir()) == before


def test_an_xml_file_larger_than_any_product_is_not_read(tmp_path: Path) -> None:
    path = product(tmp_path)
    with path.open("ab") as stream:
        stream.truncate(100 * 2**20)
    tracemalloc.start()
    with pytest.raises(InputDataError, match="expected an XML file of at most 64 MiB"):
        open_raster(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_parts_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    path = product(tmp_path)
    image = tmp_path / f"{SCENE}-SPECTRAL_IMAGE.TIF"
    tiff(tmp_path / f"{SCENE}-QL_QUALITY_CLASSES.TIF", np.ones((3, 4, 1), "uint8"))
    with pytest.raises(InputDataError, match=r"QUALITY_CLASSES\.TIF is 3 x 4 pixels with 1 bands, expected 12 x 10"):
        open_raster(path)
    whole = image.read_bytes()
    image.write_bytes(whole[:500])
    with pytest.raises(InputDataError, match=r"SPECTRAL_IMAGE\.TIF (cannot be read as GeoTIFF|is truncated)"):
        run(tmp_path, str(path))
    image.unlink()
    with pytest.raises(InputDataError, match=r"side by side, and there is no SPECTRAL_IMAGE"):
        open_raster(path)
    image.write_bytes(whole)
    path.unlink()
    with open_raster(image) as source:  # a GeoTIFF like any other
        assert source.wavelengths is None


def test_an_xml_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.xml").write_text("<a/>")
    with pytest.raises(InputDataError, match=r"notes\.xml is no EnMAP product: expected files called \.\.\.-METADATA"):
        open_raster(tmp_path / "notes.xml")


@pytest.mark.parametrize("fill", [NODATA, 0])
def test_an_image_without_a_valid_pixel(tmp_path: Path, fill: int) -> None:
    path = product(
        tmp_path, np.full((12, 10, BANDS), fill, "int16"), background=f"<backgroundValue>{fill}</backgroundValue>"
    )
    with pytest.raises(InputDataError, match="hsi has no valid pixel"):
        run(tmp_path, str(path))
