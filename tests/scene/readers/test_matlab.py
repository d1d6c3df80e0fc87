"""MATLAB files of version 5 to 7.3: variables, members of structs and cells, and everything that is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.readers import expand, open_raster
from fastdiffclip.scene.store import open_scene

from .damage import Canary, assert_flips_are_survived, whole
from .matlab73_files import write_matlab73

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float32", "float64", "bool"]
CUBE = np.random.default_rng(2).integers(1, 999, (5, 4, 3)).astype(np.uint16)
WAVES = np.array([[450.0, 550.0, 650.0]])


def write_matlab5(path: Path, variables: dict[str, Any]) -> Path:
    def as_cells(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: as_cells(inner) for name, inner in value.items()}
        if isinstance(value, list) and all(isinstance(element, dict) for element in value):
            kind = [(name, object) for name in value[0]]
            return np.array([[tuple(map(as_cells, element.values())) for element in value]], kind)
        if isinstance(value, list):
            row = np.empty((1, len(value)), object)
            row[0, :] = [as_cells(element) for element in value]
            return row
        return value

    scipy.io.savemat(path, as_cells(variables), do_compression=True)
    return path


BOTH = pytest.mark.parametrize("write", [write_matlab5, write_matlab73], ids=["v7", "v7.3"])
Write = Callable[[Path, dict[str, Any]], Path]


def gulfport(**changes: Any) -> dict[str, Any]:
    """The layout of the MUUFL Gulfport scene: everything in one struct."""
    planes = [{"z": np.full((5, 4, 2), n, np.float64), "info": f"flight {n}"} for n in (1, 2)]
    scene = {
        "Data": CUBE,
        "info": {"wavelength": WAVES, "description": "campus"},
        "RGB": np.zeros((5, 4, 3), np.uint8),
        "valid_mask": np.ones((5, 4), bool),
        "Lidar": planes_in_cells(planes),
        "sceneLabels": {"labels": np.arange(20.0).reshape(5, 4), "Materials_Type": [f"class {n}" for n in range(3)]},
        "groundTruth": [{"Row": np.array([[n]]), "Image": np.full((5, 4), n)} for n in (3, 4)],
    }
    return {"hsi": {**scene, **changes}}


def planes_in_cells(planes: list[dict[str, Any]]) -> list[Any]:
    return [*planes, "and a word, so that this is a cell and no array of structs"]


@settings(max_examples=25, deadline=None)
@given(
    cube=st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6))
    ),
    newer=st.booleans(),
    chunked=st.booleans(),
)
def test_any_numeric_variable_round_trips(
    tmp_path_factory: pytest.TempPathFactory, cube: np.ndarray, newer: bool, chunked: bool
) -> None:
    path = tmp_path_factory.mktemp("mat") / "x.mat"
    if cube.ndim == 3 and cube.shape[2] == 1:
        cube = cube[:, :, 0]  # MATLAB has no trailing axis of length 1
    if newer:
        options = {"chunks": True, "compression": "gzip"} if chunked else {}
        write_matlab73(path, {"cube": cube, "other": np.ones((2, 2))}, **options)
    else:
        scipy.io.savemat(path, {"cube": cube, "other": np.ones((2, 2))}, do_compression=chunked)
    with open_raster(path, "cube") as source:
        np.testing.assert_array_equal(whole(source), cube.reshape(*cube.shape[:2], -1))


@BOTH
def test_members_of_structs_and_cells(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "muufl.mat", gulfport())
    for name, expected in {
        "hsi.Data": CUBE,
        "hsi.sceneLabels.labels": np.arange(20.0).reshape(5, 4),
        "hsi.Lidar{2}.z": np.full((5, 4, 2), 2.0),
        "hsi.Lidar{1}(1).z": np.full((5, 4, 2), 1.0),
        "hsi.groundTruth(2).Image": np.full((5, 4), 4),
        "hsi.valid_mask": np.ones((5, 4)),
    }.items():
        files, variable = expand(f"{path}:{name}")
        with open_raster(files[0], variable) as source:
            np.testing.assert_array_equal(whole(source), expected.reshape(5, 4, -1), err_msg=name)


@BOTH
def test_a_missing_member_lists_the_rasters(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "muufl.mat", gulfport())
    for name in ("hsi.HSI", "hsi.Lidar{9}.z", "hsi.Lidar(1).z", "hsi.groundTruth.Image", "hsi.", "hsi..Data", "Data"):
        with pytest.raises(InputDataError, match=r"muufl\.mat has no variable '\S+'; it holds hsi \(1 x 1 struct\)"):
            open_raster(path, name)
    with pytest.raises(InputDataError, match=r"hsi\.Data \(5 x 4 x 3 u?\w+\).*hsi\.Lidar\{1\}\.z \(5 x 4 x 2"):
        open_raster(path, "hsi.HSI")
    with pytest.raises(InputDataError, match=r"say which variable to read, as in muufl\.mat:hsi\.Data"):
        open_raster(path)


@BOTH
def test_what_is_no_numeric_array_is_refused(tmp_path: Path, write: Write) -> None:
    path = write(
        tmp_path / "x.mat",
        {"z": np.ones((2, 2)) * 1j, "s": {"a": np.ones((2, 2))}, "c": [np.ones((2, 2)), "b"], "t": "text",
         "four": np.ones((2, 2, 2, 2)), "none": np.ones((0, 3))},
    )  # fmt: skip
    for name, message in {
        "z": "is a MATLAB complex",
        "s": r"is a MATLAB struct, expected a numeric array: name one of its members, s\.a \(2 x 2",
        "c": r"is a MATLAB cell, expected a numeric array: name one of its members, c\{1\} \(2 x 2",
        "c{2}": "is a MATLAB char",
        "t": "is a MATLAB char",
        "four": r"has shape \(2, 2, 2, 2\), expected \(height, width\)",
        "none": r"has shape \(0, 3\)",
    }.items():
        with pytest.raises(InputDataError, match=rf"variable '.*' of .*x\.mat {message}"):
            open_raster(path, name)


def test_objects_functions_and_sparse_arrays_are_refused(tmp_path: Path) -> None:
    import scipy.sparse

    scipy.io.savemat(tmp_path / "x.mat", {"sparse": scipy.sparse.eye_array(3).tocsc(), "cube": CUBE})
    with pytest.raises(InputDataError, match="is a MATLAB sparse"):
        open_raster(tmp_path / "x.mat", "sparse")
    path = write_matlab73(tmp_path / "y.mat", {"table": CUBE, "handle": CUBE, "sparse": {"data": CUBE}})
    with h5py.File(path, "r+") as file:
        file["table"].attrs["MATLAB_object_decode"] = np.int32(3)
        file["handle"].attrs["MATLAB_class"] = np.bytes_("function_handle")
        file["sparse"].attrs["MATLAB_sparse"] = np.uint64(3)
    for name, kind in {"table": "object", "handle": "function_handle", "sparse": "sparse"}.items():
        with pytest.raises(InputDataError, match=f"is a MATLAB {kind}"):
            open_raster(path, name)


@BOTH
def test_the_only_raster_is_found(tmp_path: Path, write: Write) -> None:
    with open_raster(write(tmp_path / "a.mat", {"cube": CUBE, "note": "x", "k": 3.0, "waves": WAVES})) as source:
        assert source.bands == 3
    with open_raster(write(tmp_path / "b.mat", {"scene": {"inner": {"cube": CUBE}}, "note": "x"})) as source:
        np.testing.assert_array_equal(whole(source), CUBE)


@BOTH
@pytest.mark.parametrize(("variables", "name", "expected"), [
    (gulfport(), "hsi.Data", (450.0, 550.0, 650.0)),
    ({"cube": CUBE, "wavelengths": WAVES.T}, "cube", (450.0, 550.0, 650.0)),
    ({"cube": CUBE, "wavlength": WAVES / 1000}, "cube", (450.0, 550.0, 650.0)),
    ({"cube": CUBE, "info": {"wavelength": WAVES}}, "cube", (450.0, 550.0, 650.0)),
    ({"cube": CUBE, "wavelength": WAVES, "wl": WAVES + 1}, "cube", None),
    ({"cube": CUBE, "wavelength": WAVES, "wl": WAVES}, "cube", (450.0, 550.0, 650.0)),
    ({"cube": CUBE, "wavelength": np.ones((1, 4))}, "cube", None),
    ({"cube": CUBE, "wavelength": -WAVES}, "cube", None),
    ({"cube": CUBE[:, :, 0], "wavelength": np.ones((1, 1))}, "cube", None),
    ({"cube": CUBE, "other": {"wavelength": WAVES}}, "cube", None),
])  # fmt: skip
def test_wavelengths_beside_the_array(
    tmp_path: Path, write: Write, variables: dict[str, Any], name: str, expected: tuple[float, ...] | None
) -> None:
    with open_raster(write(tmp_path / "x.mat", variables), name) as source:
        assert source.wavelengths == expected


def test_a_vector_of_one_dimension_is_a_column(tmp_path: Path) -> None:
    """MATLAB writes none, h5py does."""
    with h5py.File(write_matlab73(tmp_path / "x.mat", {"cube": CUBE}), "r+") as file:
        file["wavelength"] = WAVES.ravel()
    with open_raster(tmp_path / "x.mat", "cube") as source:
        assert source.wavelengths == (450.0, 550.0, 650.0)
    with open_raster(tmp_path / "x.mat", "wavelength") as source:
        np.testing.assert_array_equal(whole(source)[:, :, 0], WAVES.T)


def test_fwhm_beside_the_array(tmp_path: Path) -> None:
    info = {"wavelength": WAVES / 1000, "fwhm": np.full((1, 3), 0.01)}
    with open_raster(write_matlab5(tmp_path / "x.mat", {"s": {"cube": CUBE, "info": info}}), "s.cube") as source:
        assert source.fwhm == (10.0, 10.0, 10.0)


def test_an_hdf5_file_that_matlab_did_not_write(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.mat", "w") as file:
        file["group/cube"] = CUBE
    with open_raster(tmp_path / "x.mat", "/group/cube") as source:
        np.testing.assert_array_equal(whole(source), CUBE)


@BOTH
def test_ingest_brings_everything_into_the_scene(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "muufl.mat", gulfport())
    ingest(
        IngestRequest(
            [("hsi", f"{path}:hsi.Data"), ("lidar", f"{path}:hsi.Lidar{{1}}.z")],
            tmp_path / "out.zarr",
            [("labels", f"{path}:hsi.sceneLabels.labels")],
            valid={"hsi": f"{path}:hsi.valid_mask"},
        )
    )
    scene = open_scene(tmp_path / "out.zarr")
    np.testing.assert_array_equal(scene.read("hsi"), CUBE)
    np.testing.assert_array_equal(scene.read_labels(), np.arange(20).reshape(5, 4))
    assert scene.modalities["hsi"].wavelengths == (450.0, 550.0, 650.0)
    assert scene.modalities["lidar"].bands == 2


@BOTH
def test_truncated_anywhere_is_refused(tmp_path: Path, write: Write) -> None:
    """At every 97th byte: never a crash, and never a cube from a file that lacks some of it."""
    path = write(tmp_path / "x.mat", {"cube": CUBE, "other": {"a": np.ones((3, 3))}})
    data = path.read_bytes()
    end = len(data) - 128 if write is write_matlab73 else len(data)
    for size in [*range(1, end, 97 if len(data) < 4000 else 997), end - 1]:
        (tmp_path / "cut.mat").write_bytes(data[:size])
        try:
            with open_raster(tmp_path / "cut.mat", "cube") as source:
                np.testing.assert_array_equal(whole(source), CUBE)
                assert write is write_matlab5  # its first variable is whole before the second one begins
        except InputDataError as error:
            assert "cut.mat" in str(error)


@BOTH
def test_flipped_bytes_are_survived(tmp_path: Path, write: Write) -> None:
    file = write(tmp_path / "x.mat", {"cube": CUBE, "s": {"a": np.ones((3, 3))}})
    assert_flips_are_survived(file, "cube", 60, places=8, seed=5)


def test_files_that_are_no_matlab(tmp_path: Path) -> None:
    (tmp_path / "text.mat").write_text("this is no raster\n" * 50)
    (tmp_path / "header.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"nothing")
    (tmp_path / "signature.mat").write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 99)
    for name in ("text", "header", "signature"):
        with pytest.raises(InputDataError, match=rf"{name}\.mat cannot be read as a MATLAB .*truncated or damaged"):
            open_raster(tmp_path / f"{name}.mat")


def test_shapes_of_exabytes_are_refused_before_allocation(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "x.mat", {"cube": CUBE.astype(np.float64)})
    data = bytearray((tmp_path / "x.mat").read_bytes())
    place = data.index(np.array([5, 4, 3], "<i4").tobytes())
    data[place : place + 12] = np.array([2**30, 2**30, 8], "<i4").tobytes()
    (tmp_path / "x.mat").write_bytes(data)
    with pytest.raises(InputDataError, match=r"x\.mat cannot be read"):
        open_raster(tmp_path / "x.mat", "cube")
    path = write_matlab73(tmp_path / "y.mat", {"s": {"a": CUBE}})
    with h5py.File(path, "r+") as file:
        cube = file.create_dataset("cube", (2**20, 2**20, 2**20), "f8", chunks=(64, 64, 64))
        cube.attrs["MATLAB_class"] = np.bytes_("double")
    with pytest.raises(InputDataError, match=r"'cube' of .*y\.mat declares \d{19} bytes and the file holds 0"):
        open_raster(path, "cube")


def test_pickles_are_never_run(tmp_path: Path) -> None:
    bird = tmp_path / "sang"
    song = pickle.dumps(Canary(bird))
    (tmp_path / "a.mat").write_bytes(song)
    scipy.io.savemat(tmp_path / "b.mat", {"cube": np.frombuffer(song, np.uint8), "cells": np.array([[song]], object)})
    for name, variable in (("a.mat", None), ("b.mat", "cells"), ("b.mat", "cells{1}")):
        with pytest.raises(InputDataError):
            open_raster(tmp_path / name, variable)
    with open_raster(tmp_path / "b.mat", "cube") as source:
        assert whole(source).tobytes() == song
    assert not bird.exists()


def test_real_crops_bring_their_wavelengths(real_data: Path) -> None:
    folder = real_data / "muufl_crops"
    for name, variable in (("an_hsi_image_sub_for_demo", "hsi_img_sub"), ("an_hsi_img_for_class_demo", "hsi_sub")):
        with open_raster(folder / f"{name}.mat", variable) as source:
            assert source.bands == 72 and source.wavelengths is not None
            assert 360 < source.wavelengths[0] < source.wavelengths[-1] < 1100
    with pytest.raises(InputDataError, match=r"train_data\(1\)\.\w+ \("):
        open_raster(folder / "an_hsi_img_for_class_demo.mat", "train_data")


def test_a_name_that_is_none_is_told_at_once(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"HSI": np.ones((2, 3))})
    for name in ("a" * 60 + "(", "a." * 40 + "{", "HSI{0}", "HSI..z"):  # a careless pattern tries 2**60 ways
        with pytest.raises(InputDataError, match="has no variable .* it holds HSI"):
            open_raster(tmp_path / "a.mat", name)
