"""HDF5 by data-set path: axes, what lies outside of the file, what declares too much, what is damaged."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.readers import guard, open_raster
from fastdiffclip.scene.store import open_scene

from .damage import Canary, assert_flips_are_survived, whole

CUBE = np.random.default_rng(3).integers(1, 9999, (7, 6, 5)).astype(np.int16)
DTYPES = ["uint8", "int8", ">u2", "int16", "uint32", ">i4", "int64", "float16", "float32", ">f8", "bool"]


def hdf5(path: Path, **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(list(itertools.permutations("byx"))),
    chunks=st.one_of(st.none(), st.tuples(*[st.integers(1, 9)] * 3)),
    step=st.integers(1, 9),
    filters=st.sampled_from([{}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf", "fletcher32": True}]),
)
def test_any_dtype_axis_order_and_chunking(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    dtype: str,
    order: tuple[str, str, str],
    chunks: tuple[int, int, int] | None,
    step: int,
    filters: dict[str, object],
) -> None:
    cube = (np.arange(np.prod(shape)) % 100).reshape(shape).astype(dtype)
    stored = cube.transpose(["yxb".index(axis) for axis in order])
    options = {"chunks": tuple(map(min, chunks, stored.shape)), **filters} if chunks else {}
    path = tmp_path_factory.mktemp("h5") / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("g/cube", data=stored, **options)
    with open_raster(path, f"/g/cube@{''.join(order)}") as source:
        assert source.dtype == cube.dtype.newbyteorder("=")
        np.testing.assert_array_equal(whole(source, step), cube)


@pytest.mark.parametrize(("names", "order"), [
    (("y", "x", "band"), "yxb"), (("band", "y", "x"), "byx"), (("lines", "bands", "samples"), "ybx"),
    (("lon", "lat", "wavelength"), "xyb"), (("", "", "Wavelength"), "yxb"), (("wl", "", ""), "byx"),
    (("", "spectral_band", ""), "ybx"), (("North", "y", "x"), "byx"), (("crosstrack", "downtrack", ""), "xyb"),
])  # fmt: skip
def test_axes_by_the_names_of_dimensions(tmp_path: Path, names: tuple[str, str, str], order: str) -> None:
    stored = CUBE.transpose(["yxb".index(axis) for axis in order])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["cube"] = stored
        for axis, name in enumerate(names):
            file["cube"].dims[axis].label = name
    with open_raster(tmp_path / "x.h5") as source:
        np.testing.assert_array_equal(whole(source), CUBE)


def test_a_plane_may_be_stored_column_by_column(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["dsm"] = CUBE[:, :, 0].T
        file["dsm"].dims[0].label, file["dsm"].dims[1].label = "easting", "northing"
    with open_raster(tmp_path / "x.h5") as source:
        np.testing.assert_array_equal(whole(source)[..., 0], CUBE[:, :, 0])


@pytest.mark.parametrize("order", ["byx", "ybx", "yxb"])
def test_axes_by_the_length_of_the_wavelengths(tmp_path: Path, order: str) -> None:
    path = hdf5(tmp_path / "x.h5", cube=CUBE.transpose(["yxb".index(axis) for axis in order]))
    with h5py.File(path, "r+") as file:
        file["Metadata/Spectral_Data/Wavelength"] = np.linspace(400, 800, 5)
        file["Metadata/Spectral_Data/FWHM"] = np.full(5, 9.5)
    with open_raster(path, "cube") as source:
        np.testing.assert_array_equal(whole(source), CUBE)
        assert source.wavelengths == (400.0, 500.0, 600.0, 700.0, 800.0) and source.fwhm == (9.5,) * 5


def test_wavelengths_and_bad_bands_from_attributes(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", cube=np.moveaxis(CUBE, 2, 0))
    with h5py.File(path, "r+") as file:
        file["cube"].attrs.update(
            {"wavelengths": np.linspace(0.4, 0.8, 5), "wavelength_units": "um", "fwhm": [0.01] * 5,
             "good_wavelengths": [1, 1, 0, 1, 1]}
        )  # fmt: skip
    with open_raster(path) as source:
        np.testing.assert_array_equal(whole(source), CUBE)
        assert source.wavelengths == (400.0, 500.0, 600.0, 700.0, 800.0) and source.fwhm == (10.0,) * 5
        assert source.bad_bands == (False, False, True, False, False)


def test_wavelengths_in_a_unit_that_is_no_length_are_left_out_aloud(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", cube=CUBE)
    with h5py.File(path, "r+") as file:
        file["wavelength"] = np.linspace(1e4, 2e4, 5)
        file["wavelength"].attrs["units"] = "cm-1"
    with open_raster(path, "cube") as source:
        assert source.wavelengths is None
        assert "wavelengths of /cube are left out, they are given in 'cm-1'" in source.warnings[0]


def test_axes_without_a_word(tmp_path: Path) -> None:
    path = hdf5(
        tmp_path / "x.h5", last=CUBE, first=np.moveaxis(CUBE, 2, 0), middle=np.moveaxis(CUBE, 2, 1),
        one=CUBE[np.newaxis, :, :, 0], four=CUBE[np.newaxis], five=np.ones((2, 2, 2, 2, 2)),
    )  # fmt: skip
    for name, expected in {"last": CUBE, "one": CUBE[:, :, :1], "four": CUBE, "first@byx": CUBE}.items():
        with open_raster(path, name) as source:
            np.testing.assert_array_equal(whole(source), expected)
    for name in ("first", "middle"):
        with pytest.raises(InputDataError, match=rf"x\.h5:/{name} has the shape .* which axis holds the bands.*@byx"):
            open_raster(path, name)
    with pytest.raises(InputDataError, match=r"has shape \(2, 2, 2, 2, 2\), expected \(height, width\)"):
        open_raster(path, "five")
    with pytest.raises(InputDataError, match="has 3 axes, expected '@' and each of y, x, b once"):
        open_raster(path, "last@bxx")


def test_names_of_arrays(tmp_path: Path) -> None:
    arrays = {"a/cube": CUBE, "b/cube": CUBE + 1, "b/gt": CUBE[:, :, 0], "a/text": np.bytes_("x")}
    path = hdf5(tmp_path / "x.h5", **arrays)
    for name, expected in {"/a/cube": CUBE, "b/cube": CUBE + 1, "gt": CUBE[:, :, :1], "/gt": CUBE[:, :, :1]}.items():
        with open_raster(path, name) as source:
            np.testing.assert_array_equal(whole(source), expected)
    for name, message in {
        "cube": r"has no array 'cube'.*it holds /a/cube \(7 x 6 x 5 int16\), /b/cube \(7 x 6 x 5 int16\), /b/gt \(",
        "a": "has no array 'a'",
        "/b/gtt": r"has no array '/b/gtt' \(did you mean '/b/gt'\?\)",
        "a/text": "holds text, expected real numbers",
    }.items():
        with pytest.raises(InputDataError, match=message):
            open_raster(path, name)
    with pytest.raises(InputDataError, match=r"say which variable to read, as in x\.h5:/a/cube"):
        open_raster(path)


def test_types_that_are_no_numbers(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["complex"] = np.ones((2, 2), complex)
        file["compound"] = np.zeros((2, 2), "f4,f4")
        file["text"] = [["a", "b"]]
        file["reference"] = np.array([[file["text"].ref]], h5py.ref_dtype)
        file["empty"] = h5py.Empty("f4")
        file["none"] = np.ones((0, 3))
        file["vector"] = np.ones(4)
    for name in ("complex", "compound", "text", "reference"):
        with pytest.raises(InputDataError, match=rf"x\.h5:/{name} holds {name}, expected real numbers"):
            open_raster(tmp_path / "x.h5", name)
    for name in ("empty", "none", "vector"):
        with pytest.raises(InputDataError, match=rf"x\.h5:/{name} has shape \(.*\), expected"):
            open_raster(tmp_path / "x.h5", name)


def test_an_array_that_was_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("cube", (4, 4), "f4")
    with pytest.raises(InputDataError, match=r"x\.h5:/cube was declared and never written"):
        open_raster(tmp_path / "x.h5")


def test_nothing_outside_of_the_file_is_opened(tmp_path: Path) -> None:
    hdf5(tmp_path / "secret.h5", cube=CUBE)
    (tmp_path / "raw.bin").write_bytes(CUBE.tobytes())
    layout = h5py.VirtualLayout(CUBE.shape, CUBE.dtype)
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "cube", CUBE.shape)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["g/cube"] = CUBE
        file["soft"] = h5py.SoftLink("/g/cube")
        file["g/relative"] = h5py.SoftLink("cube")
        file["external"] = h5py.ExternalLink("secret.h5", "/cube")
        file["outward"] = h5py.SoftLink("/external")
        file["folder"] = h5py.ExternalLink("secret.h5", "/")
        file["through"] = h5py.SoftLink("/folder/cube")
        file["circle"] = h5py.SoftLink("/circle")
        file["dangling"] = h5py.SoftLink("/nowhere")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("outside", CUBE.shape, CUBE.dtype, external=[(str(tmp_path / "raw.bin"), 0, CUBE.nbytes)])
    for name in ("/g/cube", "/soft", "/g/relative"):
        with open_raster(tmp_path / "x.h5", name) as source:
            np.testing.assert_array_equal(whole(source), CUBE)
    for name, message in {
        "/external": "is a link to another file, which is not followed",
        "/outward": "is a link to another file",
        "/folder/cube": "is a link to another file",
        "/through": "is a link to another file",
        "/virtual": "is a virtual data set, made of other files",
        "/outside": "keeps its values in other files",
        "/circle": "leads round in a circle",
        "/dangling": "is not there",
    }.items():
        with pytest.raises(InputDataError, match=message):
            open_raster(tmp_path / "x.h5", name)


def test_groups_that_hold_themselves(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", **{"a/cube": CUBE})
    with h5py.File(path, "r+") as file:
        file["a/again"] = file["a"]
        file["a/root"] = file["/"]
        file["same"] = file["a/cube"]
    with open_raster(path) as source:  # second names of the one array do not count
        np.testing.assert_array_equal(whole(source), CUBE)


def test_shapes_of_exabytes_are_refused_before_allocation(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("wide", (2**20, 2**20, 2**20), "f8", chunks=(64, 64, 64))
        file.create_dataset("tall", (2**60, 1, 1), "u1", chunks=(64, 1, 1))
    for name in ("wide@yxb", "tall@yxb"):
        with pytest.raises(InputDataError, match=r"declares \d{19} bytes and the file holds 0 for it"):
            open_raster(tmp_path / "x.h5", name)


def test_chunks_beyond_memory_are_refused_before_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("cube", data=np.ones((4096, 10240), np.uint8), chunks=(4096, 10240))
    monkeypatch.setattr(guard, "MEMORY_LIMIT", 120 * 2**20)
    with pytest.raises(InputDataError, match=r"x\.h5:/cube has chunks of 41943040 bytes.* store it in smaller ones"):
        open_raster(tmp_path / "x.h5")


def test_unknown_filters_are_named(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        file.create_dataset("cube", CUBE.shape, CUBE.dtype, chunks=CUBE.shape, compression="gzip")
    data = path.read_bytes()
    deflate = b"\x01\x00\x08\x00\x01\x00\x01\x00deflate\x00"
    assert data.count(deflate) == 1
    path.write_bytes(data.replace(deflate, b"\x0f\x7d\x08\x00\x01\x00\x01\x00zstd\x00\x00\x00\x00"))
    with pytest.raises(InputDataError, match=r"is compressed with the HDF5 filter 32015 zstd, .* use 'h5repack"):
        open_raster(path, "cube@yxb")


def test_pickles_are_never_run(tmp_path: Path) -> None:
    song = pickle.dumps(Canary(tmp_path / "sang"))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["cube"] = CUBE
        file["cube"].attrs["pickle"] = np.void(song)
        file["opaque"] = np.array([[np.void(song)]])
        file["text"] = np.array([[song]])
    with open_raster(tmp_path / "x.h5", "cube") as source:
        np.testing.assert_array_equal(whole(source), CUBE)
    for name in ("opaque", "text"):
        with pytest.raises(InputDataError, match="expected real numbers"):
            open_raster(tmp_path / "x.h5", name)
    (tmp_path / "y.h5").write_bytes(song)
    with pytest.raises(InputDataError, match="cannot be read"):
        open_raster(tmp_path / "y.h5")
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("head", [
    b"this is no raster\n" * 50, b"\x89HDF\r\n\x1a\n" + b"0" * 99, b"\x89HDF", b"CDF\x01\x00\x00", b"\0" * 600,
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".h5", ".he5", ".nc", ".hdf"])
def test_garbage_is_refused(tmp_path: Path, suffix: str, head: bytes) -> None:
    (tmp_path / f"x{suffix}").write_bytes(head)
    with pytest.raises(InputDataError, match=rf"x{suffix} cannot be read as .*(truncated or )?damaged.*convert it"):
        open_raster(tmp_path / f"x{suffix}")


@pytest.mark.parametrize(("head", "message"), [
    (b"\x0e\x03\x13\x01" + b"0" * 99, "is HDF4, expected HDF5: convert it"),
    (b"CDF\x05" + b"0" * 99, "is NetCDF of the CDF-5 kind, expected NetCDF-4: convert it"),
    (b"", "is empty"),
])  # fmt: skip
def test_relatives_that_are_not_read_say_what_to_do(tmp_path: Path, head: bytes, message: str) -> None:
    (tmp_path / "x.hdf").write_bytes(head)
    with pytest.raises(InputDataError, match=message):
        open_raster(tmp_path / "x.hdf")


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_truncated_anywhere_is_refused(tmp_path: Path, libver: str) -> None:
    with h5py.File(tmp_path / "x.h5", "w", libver=libver) as file:
        file.create_dataset("g/cube", data=CUBE, chunks=(3, 3, 3), compression="gzip")
        file["g/cube"].attrs["units"] = "1"
    data = (tmp_path / "x.h5").read_bytes()
    for size in [*range(1, len(data) - 1, 131), len(data) - 1]:
        (tmp_path / "cut.h5").write_bytes(data[:size])
        with (
            pytest.raises(InputDataError, match=r"cut\.h5.* (damaged|truncated)"),
            open_raster(tmp_path / "cut.h5", "g/cube") as source,
        ):
            whole(source)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_flipped_bytes_are_survived(tmp_path: Path, libver: str) -> None:
    with h5py.File(tmp_path / "x.h5", "w", libver=libver) as file:
        file.create_dataset("g/cube", data=CUBE, chunks=(3, 3, 3), compression="gzip")
        file["g/cube"].attrs["units"] = "1"
        file["soft"] = h5py.SoftLink("/g/cube")
    assert_flips_are_survived(tmp_path / "x.h5", "/g/cube", 120, places=6, seed=7)


def test_ingest_brings_everything_into_the_scene(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", **{"r/cube": np.moveaxis(CUBE, 2, 0), "r/gt": (CUBE[:, :, 0] % 3).astype(np.uint8)})
    with h5py.File(path, "r+") as file:
        file["r/wavelength"] = np.linspace(0.4, 0.8, 5)
        file["r/cube"].attrs["_FillValue"] = np.int16(-9999)
        file["r/cube"].attrs["scale_factor"] = 1e-4
        file["r/cube"][:, 0, 0] = -9999
    ingest(IngestRequest([("hsi", f"{path}:/r/cube")], tmp_path / "out.zarr", [("labels", f"{path}:/r/gt")]))
    scene = open_scene(tmp_path / "out.zarr")
    hsi = scene.modalities["hsi"]
    assert hsi.wavelengths == (400.0, 500.0, 600.0, 700.0, 800.0)
    assert (hsi.nodata, hsi.scale, hsi.valid_pixels) == (-9999.0, 1e-4, 41)
    np.testing.assert_array_equal(scene.read("hsi")[1:], CUBE[1:])
    np.testing.assert_array_equal(scene.read_labels(), CUBE[:, :, 0] % 3)
