"""zarr v2 and v3 in the child process.

Metadata are read and judged here, as plain JSON, before the library sees them: data types are numbers, codecs are
those of a list, and every chunk that is read is a regular file of the store. A chunk that is missing is an error,
since the library would silently return the fill value, unless that value is declared as nodata.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from child_common import LARGEST_ATTRIBUTE, LARGEST_VECTOR, MOST_OBJECTS, Missing, Refused, Rows, alive, check_size
from child_common import vector as numbers
from child_stores import Archive, Folder, Store, metadata

_TYPES = {"bool", "float16", "float32", "float64"} | {f"{s}int{bits}" for s in ("", "u") for bits in (8, 16, 32, 64)}
_CODECS = {"bytes", "transpose", "gzip", "zstd", "blosc", "crc32c"}
_COMPRESSORS = {"blosc", "zlib", "gzip", "zstd", "lz4", "bz2", "lzma"}
_FILTERS = {"shuffle", "delta", "fixedscaleoffset"}
_INDEX_CODECS = [("bytes", {"endian": "little"}), ("crc32c", {})]
_ABSENT = 2**64 - 1

_open: dict[str, Store] = {}
_rows: dict[tuple[Any, ...], Rows] = {}


@dataclass(frozen=True)
class _Array:
    """What the metadata of an array say; ``shard`` is the shape of a chunk's pieces where it has any.

    ``blosc`` is the number of bytes that stand behind what blosc packed, None where it did not pack the chunks.
    """

    path: str
    version: int
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype | None
    kind: str
    fill: float | None
    separator: str
    prefix: str
    dims: tuple[str, ...]
    attributes: dict[str, Any]
    problem: str | None
    blosc: int | None = None
    shard: tuple[int, ...] | None = None
    index_at_end: bool = True

    def key(self, index: tuple[int, ...]) -> str:
        """Return the key of the chunk at a grid position."""
        parts = [self.prefix, *map(str, index)] if self.prefix else list(map(str, index)) or ["0"]
        return "/".join(part for part in (self.path, self.separator.join(parts)) if part)


def _store(path: str) -> Store:
    if path not in _open:
        _open[path] = Folder(path) if os.path.isdir(path) else Archive(path)
    return _open[path]


def close(path: str) -> dict[str, Any]:
    """Forget the store."""
    for key in [key for key in _rows if key[0] == path]:
        del _rows[key]
    store = _open.pop(path, None)
    if isinstance(store, Archive):
        store.archive.close()
    return {}


def describe(path: str) -> dict[str, Any]:
    """List arrays and attributes in the form of :func:`child_hdf5.describe`."""
    store = _store(path)
    found: dict[str, Any] = {"arrays": [], "groups": {}, "refused": store.refused}
    for node in store.nodes():
        if len(found["arrays"]) + len(found["groups"]) > MOST_OBJECTS:
            raise Refused(f"holds more than {MOST_OBJECTS} objects")
        try:
            described = _node(store, node)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error) if isinstance(error, Refused) else f"has metadata that are damaged ({error!r})"
            found["refused"][f"/{node}"] = f"{reason}: copy it again"
            continue
        if isinstance(described, _Array):
            found["arrays"].append(
                {
                    "name": f"/{node}",
                    "shape": list(described.shape),
                    "dtype": described.dtype.str if described.dtype else "",
                    "kind": described.kind,
                    "dims": list(described.dims),
                    "attributes": described.attributes,
                    "alias": False,
                }
            )
        elif described is not None:
            found["groups"][f"/{node}"] = described
        alive()
    if not found["arrays"] and not found["groups"] and not found["refused"]:
        raise Refused("is no zarr store: it holds neither zarr.json nor .zarray")
    return found


def open(path: str, name: str, nodata: float | None = None) -> dict[str, Any]:
    """Check that an array can be read."""
    _checked(path, name)
    return {}


def rows(
    path: str, name: str, axes: tuple[int, int, int | None], start: int, stop: int, nodata: float | None = None
) -> np.ndarray:
    """Return rows of an array as (rows, width, bands); ``axes`` are the places of y, x and band."""
    key = (path, name, (axes[0], axes[1], axes[2]), nodata)
    if key not in _rows:
        array = _checked(path, name)
        read = _reader(_store(path), array, nodata)
        assert array.dtype is not None
        _rows[key] = Rows(array.shape, array.dtype, key[2], read, array.shard or array.chunks)
    return _rows[key].rows(start, stop)


def vector(path: str, name: str) -> dict[str, Any]:
    """Return all numbers of a small array."""
    array = _checked(path, name)
    if math.prod(array.shape) > LARGEST_VECTOR:
        raise Refused(f"has {math.prod(array.shape)} values, expected at most {LARGEST_VECTOR}")
    whole = tuple(slice(0, size) for size in array.shape)
    return numbers(_reader(_store(path), array, None)(whole))


def _checked(path: str, name: str) -> _Array:
    store = _store(path)
    array = _node(store, name.strip("/"))
    if not isinstance(array, _Array):
        raise Missing("is no array")
    if array.problem is not None:
        raise Refused(array.problem)
    assert array.dtype is not None
    held = store.files(array.path) * math.prod(array.chunks) * array.dtype.itemsize
    check_size(array.shape, array.dtype.itemsize, held, array.shard or array.chunks)
    return array


def _reader(store: Store, array: _Array, nodata: float | None) -> Any:
    """Return a function from slices to values that refuses chunks that are not there."""
    import zarr

    zarr.config.set({"threading.max_workers": 2, "async.concurrency": 2})
    opened = zarr.open_array(store=store.store(), path=array.path, mode="r", zarr_format=2 if array.version == 2 else 3)
    same = array.fill is not None and (array.fill == nodata or math.isnan(array.fill))

    def read(selection: tuple[slice, ...]) -> np.ndarray:
        _require_chunks(store, array, selection, same)
        return np.asarray(opened[selection])

    return read


def _require_chunks(store: Store, array: _Array, selection: tuple[slice, ...], may_lack: bool) -> None:
    """Refuse chunks of a selection that are not there, lead out of the store or are shorter than they say."""
    for index in itertools.product(*_grid(selection, array.chunks)):
        key = array.key(index)
        size = store.size(key)
        if size is None and not may_lack:
            raise _absent(array, f"lacks the chunk {key}")
        if size is not None and array.shard is not None:
            origin = [i * length for i, length in zip(index, array.chunks, strict=True)]
            inside = tuple(
                slice(max(part.start - at, 0), min(part.stop - at, length))
                for part, at, length in zip(selection, origin, array.chunks, strict=True)
            )
            _require_pieces(store, array, key, size, inside, may_lack)
        elif size is not None:
            _require_whole(store, array, key, 0, size)


def _require_pieces(
    store: Store, array: _Array, key: str, size: int, selection: tuple[slice, ...], may_lack: bool
) -> None:
    """Look into the index of a shard: offset and length of each piece, all ones where it is missing."""
    assert array.shard is not None
    grid = tuple(whole // part for whole, part in zip(array.chunks, array.shard, strict=True))
    length = math.prod(grid) * 16
    index = store.read(key, -length - 4 if array.index_at_end else 0, length) if size >= length + 4 else None
    if index is None or len(index) != length:
        raise ValueError(f"the shard {key} is too short")
    places = np.frombuffer(index, "<u8").reshape(*grid, 2)
    for piece in itertools.product(*_grid(selection, array.shard)):
        at, held = (int(number) for number in places[piece])
        if at == _ABSENT and not may_lack:
            raise _absent(array, f"lacks the piece {'.'.join(map(str, piece))} of the shard {key}")
        if at != _ABSENT:
            if at + held > size:
                raise ValueError(f"the shard {key} is too short")
            _require_whole(store, array, key, at, held)


def _require_whole(store: Store, array: _Array, key: str, at: int, size: int) -> None:
    """Compare a chunk with the length that blosc notes: the library reads on behind the end of a shorter one."""
    if array.blosc is None:
        return
    head = store.read(key, at, 16) or b""
    if len(head) < 16 or int.from_bytes(head[12:16], "little") != size - array.blosc:
        raise ValueError(f"the chunk {key} has not the length that it notes")


def _absent(array: _Array, what: str) -> Refused:
    return Refused(
        f"{what}, and its fill value {array.fill} is not declared as nodata: copy the store completely, or write empty "
        "chunks, or name the value in an attribute _FillValue"
    )


def _grid(selection: tuple[slice, ...], chunks: tuple[int, ...]) -> list[range]:
    return [range(part.start // size, -(-part.stop // size)) for part, size in zip(selection, chunks, strict=True)]


def _node(store: Store, path: str) -> _Array | dict[str, Any] | None:
    """Return an array, the attributes of a group, or None where there is neither."""
    if ".." in path.split("/"):
        return None
    found = metadata(store, path, "zarr.json")
    if found:
        attributes = _small(found.get("attributes"))
        return _version_3(path, found, attributes) if found.get("node_type") == "array" else attributes
    found = metadata(store, path, ".zarray")
    if found:
        return _version_2(path, found, _small(metadata(store, path, ".zattrs")))
    return _small(metadata(store, path, ".zattrs")) if metadata(store, path, ".zgroup") else None


def _version_2(path: str, found: dict[str, Any], attributes: dict[str, Any]) -> _Array:
    spelt = found["dtype"]
    fits = isinstance(spelt, str) and re.fullmatch(r"[<>|][biuf][1248]", spelt)
    dtype = np.dtype(spelt) if fits else None
    compressor, filters = found.get("compressor") or {}, found.get("filters") or []
    codecs = [codec.get("id") for codec in (compressor, *filters) if codec]
    wrong = [name for name in codecs if name not in (_COMPRESSORS | _FILTERS)]
    dims = attributes.get("_ARRAY_DIMENSIONS", [])
    fill = _number(found.get("fill_value"), dtype)
    if dims and fill and "_FillValue" not in attributes:
        attributes["_FillValue"] = fill  # where xarray keeps it
    shape = _sizes(found["shape"], 0)
    kind = dtype.name if dtype else "Python objects" if "O" in str(spelt) else str(spelt)
    return _Array(
        path, 2, shape, _sizes(found["chunks"], len(shape)), dtype, kind, fill,
        str(found.get("dimension_separator", ".")), "", _names(dims, len(shape)), attributes,
        _problem(dtype, kind, wrong), 0 if compressor.get("id") == "blosc" else None,
    )  # fmt: skip


def _version_3(path: str, found: dict[str, Any], attributes: dict[str, Any]) -> _Array:
    name = found["data_type"] if isinstance(found["data_type"], str) else str(found["data_type"])
    dtype = np.dtype(name) if name in _TYPES else None
    shape = _sizes(found["shape"], 0)
    grid, keys = found["chunk_grid"], found.get("chunk_key_encoding", {"name": "default"})
    codecs = [_codec(codec) for codec in found["codecs"]]
    shard = None
    end = True
    if len(codecs) == 1 and codecs[0][0] == "sharding_indexed":
        options = codecs[0][1]
        shard = _sizes(options["chunk_shape"], len(shape))
        end = options.get("index_location", "end") == "end"
        codecs = [_codec(codec) for codec in options["codecs"]]
        if [_codec(codec) for codec in options["index_codecs"]] != _INDEX_CODECS:
            codecs.append(("another codec for the index of its shards", {}))
    names = [codec for codec, _ in codecs]
    wrong = [codec for codec in names if codec not in _CODECS]
    packed = [codec for codec in names if codec in _COMPRESSORS]
    wrong += ["one compressor in another"] if len(packed) > 1 else []
    blosc = names[::-1].index("blosc") * 4 if "blosc" in names else None  # behind it only checksums of 4 bytes
    wrong += [str(grid.get("name"))] if grid.get("name") != "regular" else []
    wrong += ["storage_transformers"] if found.get("storage_transformers") else []
    wrong += [str(keys["name"])] if keys["name"] not in ("default", "v2") else []
    chunks = _sizes(grid["configuration"]["chunk_shape"], len(shape))
    if shard is not None and any(whole % part for whole, part in zip(chunks, shard, strict=True)):
        raise ValueError(f"shards of {chunks} do not hold whole chunks of {shard}")
    plain = keys["name"] == "v2"
    separator = keys.get("configuration", {}).get("separator", "." if plain else "/")
    dims = found.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS", [])
    kind = dtype.name if dtype else name
    return _Array(
        path, 3, shape, chunks, dtype, kind, _number(found.get("fill_value"), dtype), str(separator),
        "" if plain else "c", _names(dims, len(shape)), attributes, _problem(dtype, kind, wrong), blosc, shard, end,
    )  # fmt: skip


def _problem(dtype: np.dtype | None, kind: str, codecs: list[Any]) -> str | None:
    if dtype is None:
        return f"holds {kind}, expected real numbers"
    if codecs:
        known = ", ".join(sorted(_CODECS | _COMPRESSORS | _FILTERS))
        return f"needs {', '.join(map(str, codecs))}, which is not read: expected codecs of {known}"
    return None


def _codec(found: Any) -> tuple[str, dict[str, Any]]:
    return (found, {}) if isinstance(found, str) else (str(found["name"]), found.get("configuration") or {})


def _sizes(found: Any, count: int) -> tuple[int, ...]:
    """Return whole numbers; chunks are at least 1 and as many as there are axes."""
    sizes = tuple(found)
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= (1 if count else 0) for size in sizes):
        raise ValueError(f"{found} is no shape")
    if count and len(sizes) != count:
        raise ValueError(f"{found} has not {count} axes")
    return sizes


def _names(found: Any, count: int) -> tuple[str, ...]:
    names = [name if isinstance(name, str) else "" for name in found] if isinstance(found, list) else []
    return tuple(names) if len(names) == count else ("",) * count


def _number(found: Any, dtype: np.dtype | None) -> float | None:
    """Return a fill value; floats may be spelt as text, as their bits in hexadecimal too."""
    if dtype is None or not isinstance(found, int | float | str):
        return None
    if isinstance(found, str) and found.startswith("0x"):
        return float(np.array([int(found, 16)], f"u{dtype.itemsize}").view(dtype.newbyteorder("="))[0])
    try:
        return float(found)
    except ValueError:
        return None


def _small(found: Any) -> dict[str, Any]:
    """Return the attributes that are not too long to hand on."""
    held = found if isinstance(found, dict) else {}
    return {name: value for name, value in held.items() if len(json.dumps(value)) <= LARGEST_ATTRIBUTE}
