"""The scene's layout on disk: chunk shapes, codecs, and the completion manifest.

A scene is a zarr v3 group. Every array has the codecs ``bytes`` (little-endian) and ``crc32c`` and nothing
else, so each chunk file has one known size. The manifest is the sub-group ``manifest``, whose attributes
list every array with its shape, chunk shape, dtype and the checksum of each chunk; it is written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from fastdiffclip.errors import InputDataError

FORMAT_NAME = "fastdiffclip-scene"
FORMAT_VERSION = 1
MANIFEST = "manifest"
ATTRIBUTE = "fastdiffclip"
MODALITY_DTYPES = ("uint16", "int16", "float16", "float32")
LABEL_MAPS = ("labels", "train", "test")
SPATIAL_REF = "spatial_ref"

_CHUNK_BYTES = 2 * 2**20
_BLOCK_BYTES = 128 * 2**20
_CRC_BYTES = 4
_READABLE_DTYPES = {*MODALITY_DTYPES, "bool", "int64"}


def chunk_shape(height: int, width: int, bands: int, itemsize: int) -> tuple[int, int]:
    """Return (rows, columns) of a chunk that holds all bands, about 2 MiB.

    It is 1 to 4 MiB where the scene is large enough. Chunks divide the scene evenly, so little is spent
    on padding, and one row of chunks across the scene stays near 128 MiB or below, which bounds the memory
    that writing in rows of chunks takes.
    """
    pixels = max(1, _CHUNK_BYTES // (bands * itemsize))
    tallest = max(1, _BLOCK_BYTES // (width * bands * itemsize))
    columns = _even(width, max(1, pixels // min(height, tallest, math.isqrt(pixels))))
    rows = _even(height, max(1, min(tallest, pixels // columns)))
    return rows, columns


def _even(length: int, wanted: int) -> int:
    return math.ceil(length / max(1, round(length / wanted)))


@dataclass(frozen=True)
class StoredArray:
    """One array as the manifest lists it; ``checksums`` holds the crc32c of each chunk in row-major order."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    metadata_sha256: str
    checksums: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def chunk_bytes(self) -> int:
        """Size of each chunk file in bytes, checksum included."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize + _CRC_BYTES

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(math.ceil(n / c) for n, c in zip(self.shape, self.chunks, strict=True))

    def indices(self, window: Sequence[slice] = ()) -> Iterator[tuple[int, ...]]:
        """Yield the grid positions of all chunks, or of those that a window (slices with bounds) touches."""
        ranges = [range(n) for n in self.grid]
        for axis, (part, size) in enumerate(zip(window, self.chunks, strict=False)):
            ranges[axis] = range(part.start // size, math.ceil(part.stop / size) if part.stop > part.start else 0)
        return itertools.product(*ranges)

    def chunk_file(self, root: Path, index: tuple[int, ...]) -> Path:
        """Return the file of the chunk at grid position ``index``."""
        return root.joinpath(self.name, "c", *map(str, index))

    def check_chunk_file(self, root: Path, index: tuple[int, ...]) -> None:
        """Raise InputDataError when a chunk file is missing or has the wrong size, without reading it."""
        file = self.chunk_file(root, index)
        try:
            size = file.stat().st_size
        except OSError as error:
            raise self._problem(index, f"is missing ({file}: {error.strerror})") from error
        if size != self.chunk_bytes:
            raise self._problem(index, f"has {size} bytes instead of {self.chunk_bytes} ({file})")

    def read_chunk(self, root: Path, index: tuple[int, ...]) -> np.ndarray:
        """Return one chunk in its full shape, read-only; raises InputDataError naming array and chunk."""
        self.check_chunk_file(root, index)
        file = self.chunk_file(root, index)
        try:
            with file.open("rb") as stream:  # in two pieces: to cut one off would copy the chunk
                data, stored = stream.read(self.chunk_bytes - _CRC_BYTES), stream.read()
        except OSError as error:
            raise self._problem(index, f"cannot be read ({file}: {error.strerror})") from error
        computed = int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")
        listed = self.checksums[int(np.ravel_multi_index(index, self.grid)) if index else 0]
        if computed != stored or stored.hex() != listed:
            raise self._problem(index, f"is damaged: its checksum does not match ({file})")
        little = np.dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(data, little).reshape(self.chunks)

    def read(self, root: Path, window: tuple[slice, slice]) -> np.ndarray:
        """Return the window (row slice, column slice, both with bounds) of a (y, x) or (y, x, band) array.

        Chunks are read straight from their files: zarr would return zeros for a missing one, could not name
        a damaged one, and was measured 2 to 7 times slower.
        """
        out = np.empty((*(part.stop - part.start for part in window), *self.shape[2:]), self.dtype)
        for index in self.indices(window):
            chunk = self.read_chunk(root, index)
            here, there = [], []
            for part, position, size in zip(window, index, self.chunks, strict=False):
                start, stop = max(part.start, position * size), min(part.stop, (position + 1) * size)
                here.append(slice(start - part.start, stop - part.start))
                there.append(slice(start - position * size, stop - position * size))
            out[tuple(here)] = chunk[tuple(there)]
        return out

    def _problem(self, index: tuple[int, ...], what: str) -> InputDataError:
        chunk = "/".join(map(str, index)) or "0"
        return InputDataError(f"array '{self.name}', chunk {chunk} {what}: ingest the scene again")


@dataclass(frozen=True)
class Manifest:
    """The completion manifest; ``sha256`` is that of its file and so identifies the content of the scene.

    ``attributes`` are those of the group, under our own name.
    """

    sha256: str
    attributes: dict[str, Any]
    arrays: dict[str, StoredArray]


def write_manifest(root: Path, names: Sequence[str]) -> None:
    """Write the manifest of the arrays ``names`` in the group at ``root``, whose chunks are there."""
    arrays = {name: _describe(root, name) for name in names}
    content = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "group_sha256": file_sha256(root / "zarr.json"),
            "arrays": arrays,
        },
    }
    (root / MANIFEST).mkdir()
    (root / MANIFEST / "zarr.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _describe(root: Path, name: str) -> dict[str, Any]:
    metadata_file = root / name / "zarr.json"
    metadata = json.loads(metadata_file.read_text(encoding="utf-8"))
    array = StoredArray(
        name,
        tuple(metadata["shape"]),
        tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
        metadata["data_type"],
        file_sha256(metadata_file),
        (),
    )
    checksums = [_stored_checksum(array.chunk_file(root, index)) for index in array.indices()]
    return {
        "shape": array.shape,
        "chunks": array.chunks,
        "dtype": array.dtype,
        "metadata_sha256": array.metadata_sha256,
        "crc32c": checksums,
    }


def _stored_checksum(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(-_CRC_BYTES, 2)
        return stream.read().hex()


def read_manifest(root: Path) -> Manifest:
    """Read the manifest and check that the scene agrees with it, without reading or allocating any array.

    Checked: format and version, the sha256 of all metadata, dtype and codec of every array against the few
    that a scene may have. Presence and sizes of chunks: :func:`chunk_problems`. Raises InputDataError.
    """
    file = root / MANIFEST / "zarr.json"
    data = _read_file(file)
    try:
        content = json.loads(data)["attributes"]
        if content["format"] != FORMAT_NAME:
            raise InputDataError(f"{root} is not a fastdiffclip scene (format '{content['format']}')")
        if content["version"] != FORMAT_VERSION:
            raise InputDataError(
                f"{root} has scene format {content['version']}, this version reads {FORMAT_VERSION}: ingest it again"
            )
        arrays = {name: _listed_array(name, entry) for name, entry in content["arrays"].items()}
        group_sha256 = content["group_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputDataError(f"the manifest of scene {root} is damaged ({file}): ingest it again") from error
    group = _read_file(root / "zarr.json")
    if hashlib.sha256(group).hexdigest() != group_sha256:
        raise InputDataError(f"the metadata of scene {root} was changed ({root / 'zarr.json'}): ingest it again")
    arrays = {name: _with_attributes(root, array) for name, array in arrays.items()}
    attributes = json.loads(group).get("attributes", {}).get(ATTRIBUTE, {})
    return Manifest(hashlib.sha256(data).hexdigest(), attributes, arrays)


def _listed_array(name: str, entry: dict[str, Any]) -> StoredArray:
    array = StoredArray(
        name,
        tuple(int(n) for n in entry["shape"]),
        tuple(int(n) for n in entry["chunks"]),
        str(entry["dtype"]),
        str(entry["metadata_sha256"]),
        tuple(entry["crc32c"]),
    )
    if array.dtype not in _READABLE_DTYPES or not name.isidentifier():
        raise ValueError(name)
    if min((*array.shape, *array.chunks, 1)) < 1 or math.prod(array.grid) != len(array.checksums):
        raise ValueError(name)
    return array


def _with_attributes(root: Path, array: StoredArray) -> StoredArray:
    """Check the metadata of one array against its manifest entry and the few forms it may have."""
    file = root / array.name / "zarr.json"
    data = _read_file(file)
    if hashlib.sha256(data).hexdigest() != array.metadata_sha256:
        raise InputDataError(f"the metadata of array '{array.name}' in scene {root} was changed ({file})")
    found = json.loads(data)
    endian = {"name": "bytes", "configuration": {"endian": "little"}}
    serializer = {"name": "bytes"} if np.dtype(array.dtype).itemsize == 1 else endian
    wanted = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [serializer, {"name": "crc32c"}],
    }
    for key, value in wanted.items():
        if found.get(key) != value:
            raise InputDataError(
                f"array '{array.name}' in scene {root} has {key} {found.get(key)}, a scene has {value} ({file})"
            )
    if found.get("storage_transformers"):
        raise InputDataError(f"array '{array.name}' in scene {root} has storage transformers, a scene has none")
    return dataclasses.replace(array, attributes=found.get("attributes", {}))


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputDataError(f"{file} cannot be read ({error.strerror}): ingest the scene again") from error


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file, or of the names and contents of a folder's files, as hex digits."""
    digest = hashlib.sha256()
    parts = sorted(part for part in file.rglob("*") if part.is_file()) if file.is_dir() else [file]
    for part in parts:
        if part != file:
            digest.update(f"{part.relative_to(file).as_posix()}\0{part.stat().st_size}\0".encode())
        with part.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()
