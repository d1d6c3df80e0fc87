"""The .npy header is read without numpy's parser: the same for what numpy writes, and an error for anything else."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError, ResourceError
from fastdiffclip.scene.readers import open_raster


@given(
    dtype=st.sampled_from(["u1", "<i2", ">f4", "<f8", "?", "<u8", "<f2"]),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_headers_of_numpy(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int], fortran: bool, version: tuple[int, int]
) -> None:
    path = tmp_path_factory.mktemp("npy") / "a.npy"
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype, order="F" if fortran else "C")
    with path.open("wb") as stream:
        np.lib.format.write_array(stream, array, version)
    with open_raster(path) as source:
        assert source.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(source.read_rows(slice(0, shape[0])), array.reshape(*shape[:2], -1))


def with_header(text: str, version: int = 1, length: int | None = None) -> bytes:
    form = "<H" if version == 1 else "<I"
    size = struct.pack(form, len(text) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode("latin-1") + bytes(64)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 4), }   \n",
        "{'shape': (2, 4), 'descr': '<f8', 'fortran_order': False}",
        "{'descr':'<f8','fortran_order':False,'shape':(2L, 4L)}\n",  # as Python 2 wrote it
    ],
)
def test_headers_of_others(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.npy").write_bytes(with_header(header))
    with open_raster(tmp_path / "a.npy") as source:
        assert (source.height, source.width, source.bands, source.dtype) == (2, 4, 1, np.float64)


GOOD = "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 4), }"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (with_header("{'descr': '<f8',('fortran_order': False, 'shape': (2, 4), }"), "its header is"),
        (with_header(GOOD + "+__import__('os').getcwd()"), "its header is"),
        (with_header(GOOD.replace("(2, 4)", "(2, -4)")), "its header is"),
        (with_header(GOOD.replace("(2, 4)", "(" * 3000)), "its header is"),
        (with_header(GOOD.replace("(2, 4)", "(2, 4), 'more': 'x'")), "its header is"),
        (with_header(GOOD.replace("(2, 4)", "'(2, 4)'")), "no array of numbers"),
        (with_header(GOOD.replace("'<f8'", "[('a', '<f8')]")), "no array of numbers"),
        (with_header(GOOD.replace("<f8", "|O")), "Python objects, which are never unpickled"),
        (with_header(GOOD.replace("<f8", "rubbish")), "type ''rubbish'' is unknown"),
        (with_header(GOOD.replace("<f8", "<U1")), "holds <U1, expected real numbers"),
        (with_header(GOOD.replace("<f8", "<M8[s]")), "holds datetime64"),
        (with_header(GOOD.replace("(2, 4)", "(2, 9999999999999)")), "declares 159999999999984 bytes and holds 64"),
        (with_header(GOOD.replace("(2, 4)", "(" + "9" * 5000 + ", 4)")), "cannot be read"),
        (with_header(GOOD.replace("(2, 4)", "(2, 5)")), "declares 80 bytes and holds 64"),
        (with_header(GOOD.replace("(2, 4)", "()")), r"has shape \(\)"),
        (with_header(GOOD, version=2, length=2**31), "its header has 2147483648 bytes"),
        (with_header(GOOD, version=9), "does not begin as a numpy array does"),
        (with_header(GOOD)[:30], "it ends within its header"),
        (b"\x93NUM", "it ends within its header"),
    ],
)
def test_headers_that_are_none(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(InputDataError, match=said):
        open_raster(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("cube.npy", data)
    with pytest.raises(InputDataError):
        open_raster(tmp_path / "a.npz", "cube")


def archived(path: Path, method: int, **arrays: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, array)
            archive.writestr(f"{name}.npy", stream.getvalue())


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_numpy_does_not_use(tmp_path: Path, method: int) -> None:
    archived(tmp_path / "a.npz", method, cube=np.ones((3, 4)))
    with pytest.raises(InputDataError, match="encrypted or not compressed as numpy does it"):
        open_raster(tmp_path / "a.npz")


def test_an_encrypted_archive(tmp_path: Path) -> None:
    archived(tmp_path / "a.npz", zipfile.ZIP_STORED, cube=np.ones((3, 4)))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(InputDataError, match="encrypted"):
        open_raster(tmp_path / "a.npz")


def test_other_arrays_of_an_archive_do_not_matter(tmp_path: Path) -> None:
    records = np.zeros(2, [("a", "f4")])
    np.savez(tmp_path / "a.npz", cube=np.ones((3, 4)), records=records, text=np.array("x"), vector=np.ones(3))
    with open_raster(tmp_path / "a.npz") as source:
        assert (source.height, source.width) == (3, 4)
    with pytest.raises(InputDataError, match="no array of numbers"):
        open_raster(tmp_path / "a.npz", "records")
    with pytest.raises(InputDataError, match=r"it holds cube \(3 x 4 float64\), records \( no numbers\), text"):
        open_raster(tmp_path / "a.npz", "none")


def test_an_array_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", cube=np.ones((300, 400)))

    class Little:
        available = 2**19

    monkeypatch.setattr("psutil.virtual_memory", Little)
    with pytest.raises(ResourceError, match=r"'cube' .* takes 0\.000894 GiB of memory and .* save it as \.npy"):
        open_raster(tmp_path / "a.npz")
