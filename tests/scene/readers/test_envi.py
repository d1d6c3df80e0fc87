"""ENVI: every layout of the numbers, what the header says, and headers that lie."""

from __future__ import annotations

import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.convert import row_blocks
from fastdiffclip.scene.ingest import IngestReport, IngestRequest, ingest
from fastdiffclip.scene.readers import open_raster
from fastdiffclip.scene.readers.source import RasterSource
from fastdiffclip.scene.store import open_scene

from .envi_files import AXES, CODES, UTM, write_envi

WKT = rasterio.CRS.from_epsg(32617).to_wkt(version="WKT1_ESRI")


def small(dtype: str = "i2") -> np.ndarray:
    return np.arange(3 * 4 * 2).reshape(3, 4, 2).astype(dtype)


def opened(tmp_path: Path, *more: str, cube: np.ndarray | None = None) -> RasterSource:
    return open_raster(write_envi(tmp_path / "x.img", small() if cube is None else cube, *more))


def run(tmp_path: Path, spec: Path, **options: object) -> IngestReport:
    return ingest(IngestRequest([("hsi", str(spec))], tmp_path / "out.zarr", **options))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    cube=st.sampled_from(sorted(CODES)).flatmap(
        lambda code: hnp.arrays(code, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6))
    ),
    interleave=st.sampled_from(sorted(AXES)),
    order=st.integers(0, 1),
    offset=st.sampled_from([0, 1, 512]),
    rows=st.integers(1, 4),
)
def test_every_layout_gives_the_numbers_back(
    tmp_path_factory: pytest.TempPathFactory, cube: np.ndarray, interleave: str, order: int, offset: int, rows: int
) -> None:
    path = tmp_path_factory.mktemp("envi") / "x.dat"
    header = write_envi(path, cube, interleave=interleave, order=order, offset=offset)
    for file in (header, path):
        with open_raster(file) as source:
            assert source.dtype == cube.dtype and source.dtype.isnative and source.path == path
            blocks = [source.read_rows(slice(r, min(r + rows, source.height))) for r in range(0, source.height, rows)]
            assert all(block.dtype == cube.dtype for block in blocks)
            np.testing.assert_array_equal(np.concatenate(blocks), cube)


@pytest.mark.parametrize("interleave", sorted(AXES))
def test_agrees_with_gdal(tmp_path: Path, interleave: str) -> None:
    cube = np.random.default_rng(0).integers(0, 999, (5, 7, 3)).astype("u2")
    write_envi(tmp_path / "x.img", cube, UTM.replace("500000", "500000.5"), interleave=interleave, order=1)
    with open_raster(tmp_path / "x.img") as ours, rasterio.open(tmp_path / "x.img", driver="ENVI") as theirs:
        np.testing.assert_array_equal(ours.read_rows(slice(0, 5)), np.moveaxis(theirs.read(), 0, -1))
        assert ours.affine_transform == tuple(theirs.transform)[:6]
        assert rasterio.CRS.from_wkt(ours.crs_wkt) == theirs.crs


@pytest.mark.parametrize("name", ["x.img", "x.DAT", "x.raw", "x.bsq", "x.bil", "x.bip", "x.bin", "x", "x.y", "x.other"])
@pytest.mark.parametrize("beside", ["stem.hdr", "name.hdr", "name.HDR"])
def test_header_and_data_find_each_other(tmp_path: Path, name: str, beside: str) -> None:
    header = beside.replace("stem", Path(name).stem).replace("name", name)
    path = write_envi(tmp_path / name, small(), header=header)
    (tmp_path / "unrelated.img").write_bytes(b"0" * 99)
    with open_raster(tmp_path / name) as source:
        np.testing.assert_array_equal(source.read_rows(slice(0, 3)), small())
        assert source.companions == (path,)
    if name not in ("x.other", "x.y") or beside != "stem.hdr":
        with open_raster(path) as source:
            assert source.path == tmp_path / name


def test_a_header_without_its_data_or_with_too_many(tmp_path: Path) -> None:
    header = write_envi(tmp_path / "x.img", small())
    (tmp_path / "x.dat").write_bytes(b"0" * 99)
    with pytest.raises(InputDataError, match=r"several data files beside it \(x\.dat, x\.img\): give the data file"):
        open_raster(header)
    for name in ("x.img", "x.dat"):
        (tmp_path / name).unlink()
    with pytest.raises(InputDataError, match=r"no data file beside it: expected x with one of the suffixes \.img"):
        open_raster(header)
    (tmp_path / "y.img").write_bytes(b"0" * 99)
    with pytest.raises(InputDataError, match=r"y\.img has no ENVI header beside it: expected y\.hdr or y\.img\.hdr"):
        open_raster(tmp_path / "y.img")


@pytest.mark.parametrize(("lines", "expected"), [
    (["wavelength = {450.5, 851}", "wavelength units = Nanometers"], (450.5, 851.0)),
    (["wavelength = {0.4505, 0.851}", "wavelength units = Micrometers", "fwhm = {0.01, 0.02}"], (450.5, 851.0)),
    (["wavelength = {0.4505,", " 0.851}", "wavelength units = um"], (450.5, 851.0)),
    (["wavelength = {450.5, 851,}"], (450.5, 851.0)),
    (["wavelength = {0.4505, 0.851}", "wavelength units = Unknown"], (450.5, 851.0)),
    (["wavelength = {}"], None),
    ([], None),
])  # fmt: skip
def test_wavelengths(tmp_path: Path, lines: list[str], expected: tuple[float, ...] | None) -> None:
    with opened(tmp_path, *lines) as source:
        assert source.wavelengths == expected
        assert source.fwhm == ((10.0, 20.0) if "fwhm" in "".join(lines) else None)


@pytest.mark.parametrize("unit", ["Wavenumber", "cm-1", "Index", "GHz"])
def test_wavelengths_that_are_no_lengths_are_refused(tmp_path: Path, unit: str) -> None:
    with pytest.raises(InputDataError, match=rf"x\.hdr gives wavelengths in '{unit}', expected nanometers .* --wave"):
        opened(tmp_path, "wavelength = {450, 851}", f"wavelength units = {unit}")


def test_the_rest_of_the_header(tmp_path: Path) -> None:
    lines = ["bbl = {1, 0}", "data ignore value = -9999", "reflectance scale factor = 10000"]
    with opened(tmp_path, *lines) as source:
        assert (source.bad_bands, source.nodata, source.scale, source.offset) == ((False, True), -9999.0, 1e-4, 0.0)
    with opened(tmp_path, "data gain values = {0.5, 0.5}", "data offset values = {2, 2}") as source:
        assert (source.scale, source.offset, source.dtype) == (0.5, 2.0, np.int16)
    with opened(tmp_path, "data gain values = {0.5, 2}", "data offset values = {1, 0}") as source:
        assert (source.scale, source.offset, source.dtype) == (1.0, 0.0, np.float32)
        np.testing.assert_array_equal(source.read_rows(slice(1, 3)), small()[1:] * [0.5, 2] + [1, 0])
    with pytest.raises(InputDataError, match="data ignore value and bands with different gains"):
        opened(tmp_path, "data gain values = {0.5, 2}", "data ignore value = 0")


def test_a_classification_has_names_and_colours(tmp_path: Path) -> None:
    cube = np.array([[[0], [1], [2]]], "u1")
    lines = ["file type = ENVI Classification", "classes = 3", "class names = {Unclassified, oak, pine tree}",
             "class lookup = {0,0,0, 10,20,30, 40, 50, 300}"]  # fmt: skip
    hsi = write_envi(tmp_path / "hsi.img", small()[:1, :3])
    labels = write_envi(tmp_path / "gt.img", cube, *lines)
    report = run(tmp_path, hsi, labels=[("labels", str(labels))])
    classes = open_scene(report.scenes[0]).classes
    assert [(c.value, c.name, c.colour) for c in classes] == [
        (1, "oak", (10, 20, 30)), (2, "pine tree", (40, 50, 255))
    ]  # fmt: skip
    assert report.warnings == []


def corner(source: RasterSource, column: float, row: float) -> tuple[float, float]:
    assert source.affine_transform is not None
    a, b, c, d, e, f = source.affine_transform
    return a * column + b * row + c, d * column + e * row + f


@pytest.mark.parametrize(("info", "epsg"), [
    ("UTM, 1, 1, 500000, 4100000, 2, 2, 17, North, WGS-84", 32617),
    ("UTM, 1, 1, 500000, 4100000, 2, 2, 17, South, WGS-84, units=Meters", 32717),
    ("UTM, 1, 1, 500000, 4100000, 2, 2, 17, North, North America 1983, units=Meters", 26917),
    ("Geographic Lat/Lon, 1, 1, 7.5, 47.5, 0.001, 0.001, WGS-84, units=Degrees", 4326),
    ("UTM, 1, 1, 500000, 4100000, 2, 2, 99, North, WGS-84", None),
    ("UTM, 1, 1, 500000, 4100000, 2, 2, 60, North, European 1950", None),
    ("UTM, 1, 1, 500000, 4100000, 2, 2, 17, North, WGS-84, units=Feet", None),
    ("Mercury, 1, 1, 5, 4, 2, 2", None),
])  # fmt: skip
def test_the_crs_of_map_info(tmp_path: Path, info: str, epsg: int | None) -> None:
    with opened(tmp_path, f"map info = {{{info}}}") as source:
        assert (source.crs_wkt and rasterio.CRS.from_wkt(source.crs_wkt).to_epsg()) == epsg
        assert source.affine_transform is not None
        assert [("not known and left out" in warning) for warning in source.warnings] == [True] * (epsg is None)


def test_the_coordinate_system_string_comes_first_and_may_be_esri_s(tmp_path: Path) -> None:
    with opened(tmp_path, UTM.replace("17,", "18,"), f"coordinate system string = {{{WKT}}}") as source:
        assert rasterio.CRS.from_wkt(source.crs_wkt).to_epsg() == 32617 and source.crs_wkt.startswith("PROJCRS")
    with pytest.raises(InputDataError, match="'coordinate system string' is no WKT"):
        opened(tmp_path, UTM, "coordinate system string = {PROJCS[nonsense}")


def test_the_reference_pixel_may_be_anywhere(tmp_path: Path) -> None:
    with opened(tmp_path, "map info = {UTM, 1.5, 2.5, 500000, 4100000, 2, 4, 17, North, WGS-84}") as source:
        assert source.affine_transform == (2, 0, 499999, 0, -4, 4100006)
        assert corner(source, 0.5, 1.5) == (500000, 4100000)


def test_rotation_turns_around_the_reference_pixel(tmp_path: Path) -> None:
    info = "map info = {UTM, 3, 2, 500000, 4100000, 2, 2, 17, North, WGS-84, rotation=30}"
    with opened(tmp_path, info) as source:
        assert corner(source, 2, 1) == pytest.approx((500000, 4100000))
        east, north = np.subtract(corner(source, 3, 1), corner(source, 2, 1))
        assert (east, north) == pytest.approx((2 * math.cos(math.radians(30)), 2 * math.sin(math.radians(30))))
    turned = info.replace("3, 2,", "1, 1,")
    with opened(tmp_path, turned) as ours, rasterio.open(tmp_path / "x.img", driver="ENVI") as theirs:
        assert ours.affine_transform == pytest.approx(tuple(theirs.transform)[:6])
    with opened(tmp_path, turned.replace("30", "90")) as source:
        assert source.affine_transform == (0, 2, 500000, 2, 0, 4100000)
    with opened(tmp_path, turned.replace("30", "180")) as source:
        assert source.affine_transform == (-2, 0, 500000, 0, 2, 4100000) and "rotation=180" in source.warnings[0]


def test_arbitrary_places(tmp_path: Path) -> None:
    with opened(tmp_path, "map info = {Arbitrary, 1, 1, 0, 0, 1, 1, 0, North}") as source:
        assert source.affine_transform is None and source.crs_wkt is None
    with opened(tmp_path, "map info = {Arbitrary, 1, 1, 100, 200, 0.5, 0.5, 0, North}") as source:
        assert source.affine_transform == (0.5, 0, 100, 0, -0.5, 200) and source.crs_wkt is None
        assert source.warnings == ()


def test_everything_arrives_in_the_scene(tmp_path: Path) -> None:
    cube = np.random.default_rng(0).integers(1, 9999, (9, 8, 4)).astype("i2")
    cube[0, 0] = -1
    cube[1, 1, [0, 1, 3]] = -1  # band 3 is bad, so this pixel is empty as well
    header = write_envi(
        tmp_path / "x.img", cube, UTM, "wavelength = {450, 550, 650, 851}", "wavelength units = nm",
        "fwhm = {5, 5, 6, 7}", "bbl = {1, 1, 0, 1}", "data ignore value = -1", "reflectance scale factor = 10000",
        interleave="bil", order=1, offset=7,
    )  # fmt: skip
    report = run(tmp_path, header)
    scene = open_scene(report.scenes[0])
    hsi = scene.modalities["hsi"]
    np.testing.assert_array_equal(scene.read("hsi"), cube)
    assert (hsi.wavelengths, hsi.fwhm) == ((450, 550, 650, 851), (5, 5, 6, 7))
    assert (hsi.bad_bands, hsi.nodata, hsi.scale) == ((False, False, True, False), -1.0, 1e-4)
    assert rasterio.CRS.from_wkt(scene.crs_wkt).to_epsg() == 32617
    assert scene.affine_transform == (2, 0, 500000, 0, -2, 4100000)
    assert np.argwhere(~scene.read_valid("hsi")).tolist() == [[0, 0], [1, 1]]
    assert {name for _, name, _ in scene.sources} == {"x.img", "x.hdr"}


def test_more_bytes_than_declared_are_a_warning(tmp_path: Path) -> None:
    header = write_envi(tmp_path / "x.img", small())
    with (tmp_path / "x.img").open("ab") as stream:
        stream.write(b"123")
    assert any("3 bytes more than its header declares" in warning for warning in run(tmp_path, header).warnings)


BROKEN = {
    "header": ("ENVI", "ENVY", "is not an ENVI header: expected a text file whose first line is ENVI"),
    "no samples": ("samples = 4", "sample = 4", r"has no 'samples': expected a whole number of at least 1"),
    "no lines": ("Lines   = 3", "Lines = 0", "has 'lines = 0': expected a whole number of at least 1"),
    "negative bands": ("bands = 2", "bands = -2", "has 'bands = -2'"),
    "text": ("bands = 2", "bands = two", "has 'bands = two'"),
    "exabytes": ("samples = 4", f"samples = {10**18}", rf"has 48 bytes and its header x\.hdr declares {12 * 10**18}"),
    "many digits": ("samples = 4", f"samples = {'9' * 5000}", "has 'samples = 9999"),
    "offset": ("header offset = 0", "header offset = 1", "has 48 bytes and its header x.hdr declares 49"),
    "negative offset": ("header offset = 0", "header offset = -8", "has 'header offset = -8'"),
    "complex": ("data type = 2", "data type = 6", r"x\.img holds complex numbers \(ENVI data type 6\)"),
    "unknown type": ("data type = 2", "data type = 7", r"holds an unknown type \(ENVI data type 7\)"),
    "wider type": ("data type = 2", "data type = 3", "it is truncated, or the header belongs to another file"),
    "byte order": ("byte order = 0", "byte order = 3", "has byte order 3"),
    "interleave": ("interleave = BSQ", "interleave = bsp", "interleave 'bsp', expected 0 or 1 and bsq, bil or bip"),
    "compressed": ("byte order = 0", "file compression = 1", "compressed ENVI file: save it uncompressed"),
    "library": ("file type = ENVI Standard", "file type = ENVI Spectral Library", "type 'ENVI Spectral Library'"),
    "tiff": ("file type = ENVI Standard", "file type = TIFF", "type 'TIFF', expected .* give that file itself"),
    "frames": ("byte order = 0", "major frame offsets = {10, 20}", "frames with bytes between them"),
    "open list": ("byte order = 0", "wavelength = {1, 2", "list 'wavelength' has no closing brace"),
    "short list": ("byte order = 0", "wavelength = {1}", "'wavelength' has 1 entries, expected 2 numbers"),
    "no numbers": ("byte order = 0", "wavelength = {a, b}", "'wavelength' has 2 entries, expected 2 numbers"),
    "nan": ("byte order = 0", "wavelength = {nan, 1}", "'wavelength' has 2 entries, expected 2 numbers"),
    "all bad": ("byte order = 0", "bbl = {0, 0}", "marks all 2 bands as bad"),
    "map info": ("byte order = 0", "map info = {UTM, 1, 1}", "'map info' must give a projection, six numbers"),
    "pixel size": ("byte order = 0", "map info = {UTM, 1, 1, 0, 0, 0, 2, 17}", "'map info' must give"),
    "endless place": ("byte order = 0", "map info = {UTM, 1, 1, inf, 0, 2, 2, 17}", "'map info' must give"),
    "scale": ("byte order = 0", "reflectance scale factor = 0", "is 0.0, expected above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_headers_are_one_sentence_and_leave_nothing(tmp_path: Path, case: str) -> None:
    old, new, message = BROKEN[case]
    header = write_envi(tmp_path / "x.img", small())
    header.write_text(header.read_text().replace(old, new))
    with pytest.raises(InputDataError, match=message):
        run(tmp_path, header)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.hdr", "x.img"]


def test_paths_in_a_header_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 48)
    (tmp_path / "below").mkdir()
    lines = ("data file = ../secret", "file name = ../secret", "description = {../secret}")
    header = write_envi(tmp_path / "below" / "x.img", small(), *lines)
    (tmp_path / "below" / "x.img").unlink()
    with pytest.raises(InputDataError, match="has no data file beside it"):
        open_raster(header)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_truncated_data(tmp_path: Path, share: float) -> None:
    header = write_envi(tmp_path / "x.img", small())
    os.truncate(tmp_path / "x.img", int(48 * share))
    for spec in (header, tmp_path / "x.img"):
        with pytest.raises(InputDataError, match=r"x\.img (has \d+ bytes and its header|is empty \(0 bytes\))"):
            run(tmp_path, spec)


def test_data_that_shrink_while_they_are_read(tmp_path: Path) -> None:
    with open_raster(write_envi(tmp_path / "x.img", small())) as source:
        source.read_rows(slice(0, 1))
        os.truncate(tmp_path / "x.img", 30)
        with pytest.raises(InputDataError, match="ends within rows 0 to 3"):
            source.read_rows(slice(0, 3))


def test_other_files_called_hdr(tmp_path: Path) -> None:
    (tmp_path / "x.hdr").write_bytes(b"#?RADIANCE\n" * 9)
    with pytest.raises(InputDataError, match="is not an ENVI header"):
        open_raster(tmp_path / "x.hdr")
    (tmp_path / "y.hdr").write_bytes(b"ENVI" + b"\0\xff" * 500)
    with pytest.raises(InputDataError, match="y.hdr has no data file"):
        open_raster(tmp_path / "y.hdr")
    with pytest.raises(InputDataError, match="leave out ':HSI'"):
        open_raster(tmp_path / "x.hdr", "HSI")


@pytest.mark.parametrize("fill", [np.nan, -9999.0])
def test_files_without_a_valid_pixel(tmp_path: Path, fill: float) -> None:
    header = write_envi(tmp_path / "x.img", np.full((3, 4, 2), fill, "f4"), "data ignore value = -9999")
    with pytest.raises(InputDataError, match="hsi has no valid pixel"):
        run(tmp_path, header)
    assert not (tmp_path / "out.zarr").exists()


def test_a_geotiff_takes_wavelengths_from_the_envi_header_beside_it(tmp_path: Path) -> None:
    cube = small()
    header = write_envi(tmp_path / "x.img", cube, "wavelength = {450, 550}", "wavelength units = nm", "bbl = {1, 0}")
    (tmp_path / "x.img").unlink()
    header.write_text(header.read_text().replace("ENVI Standard", "TIFF"))
    profile = {"height": 3, "width": 4, "count": 2, "dtype": "int16", "crs": "EPSG:32617"}
    with rasterio.open(
        tmp_path / "x.tif", "w", driver="GTiff", transform=rasterio.Affine(2, 0, 5e5, 0, -2, 4e6), **profile
    ) as dataset:
        dataset.write(np.moveaxis(cube, -1, 0))
    with open_raster(tmp_path / "x.tif") as source:
        assert source.wavelengths == (450.0, 550.0) and source.bad_bands == (False, True)
        assert source.companions == (header,)
    header.write_text("not a header")
    with open_raster(tmp_path / "x.tif") as source:
        assert source.wavelengths is None


@pytest.mark.parametrize("interleave", sorted(AXES))
def test_memory_is_bounded_by_row_blocks(tmp_path: Path, interleave: str) -> None:
    header = write_envi(tmp_path / "x.img", np.zeros((1, 1, 1), "u2"), interleave=interleave)
    peaks = []
    for lines in (256, 768):  # 128 and 384 MiB, sparse
        text = header.read_text().replace("samples = 1\n", "samples = 1024\n").replace("bands = 1\n", "bands = 256\n")
        header.write_text("\n".join(f"lines = {lines}" if "ines " in row else row for row in text.splitlines()))
        os.truncate(tmp_path / "x.img", lines * 1024 * 256 * 2)
        tracemalloc.start()
        with open_raster(header) as source:
            for rows in row_blocks(source):
                source.read_rows(rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 160 * 2**20  # two blocks of 64 MiB and some, however long the file
    assert peaks[1] < peaks[0] * 1.1
