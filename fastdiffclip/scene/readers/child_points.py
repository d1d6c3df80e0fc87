"""LAS and LAZ point clouds in the child process: the header, and the points a chunk at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import laspy
import numpy as np
from child_common import Refused

_HEADER_BYTES = 375
_RECORD_BYTES = 54  # header of a variable length record
_NOISE = (7, 18)  # classes of the ASPRS: low point, high noise
_WKT, _GEO_KEYS = 2112, 34735
_PROJECTED, _GEOGRAPHIC = 3072, 2048

_open: dict[str, laspy.LasReader] = {}


def describe(path: str) -> dict[str, Any]:
    """Return the number of points, the extent that the header declares, and the CRS as WKT or EPSG code, or None."""
    _check_header(path)
    with laspy.open(path, read_evlrs=False) as reader:
        header = reader.header
        compressed = bool(header.are_points_compressed)
        held = Path(path).stat().st_size - header.offset_to_point_data
        if not compressed and header.point_count * header.point_format.size > held:
            raise Refused(f"declares {header.point_count} points and holds {max(0, held) // header.point_format.size}")
        return {
            "points": int(header.point_count),
            "low": [float(value) for value in header.mins],
            "high": [float(value) for value in header.maxs],
            "crs": _crs(header),
        }


def _check_header(path: str) -> None:
    """Refuse a header whose counts do not fit the file, before the library loops over them."""
    size = Path(path).stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(_HEADER_BYTES)
    if len(head) < 227 or head[:4] != b"LASF":
        raise Refused("is no LAS or LAZ file: expected one that begins with LASF")
    start, points_at, records = (int.from_bytes(head[at : at + n], "little") for at, n in ((94, 2), (96, 4), (100, 4)))
    if not 227 <= start <= points_at <= size or records * _RECORD_BYTES > points_at - start:
        raise Refused("has a header that does not fit its size: it is truncated or damaged, copy it again")


def _crs(header: laspy.LasHeader) -> str | None:
    for record in header.vlrs:
        if record.record_id == _WKT and isinstance(record, laspy.vlrs.known.WktCoordinateSystemVlr):
            return str(record.string).rstrip("\0") or None
    for record in header.vlrs:
        if record.record_id == _GEO_KEYS and isinstance(record, laspy.vlrs.known.GeoKeyDirectoryVlr):
            keys = {key.id: key.value_offset for key in record.geo_keys if key.tiff_tag_location == 0}
            code = keys.get(_PROJECTED, keys.get(_GEOGRAPHIC))
            if code and code < 32767:  # above: user-defined
                return f"EPSG:{code}"
    return None


def chunk(path: str, count: int) -> np.ndarray:
    """Return the next ``count`` points as (count, 5) float64: x, y, z, intensity, and 0 where a point is noise, 1
    where it counts, 2 where it is also a first return.
    """
    if path not in _open:
        _open[path] = laspy.open(path, read_evlrs=False)
    points = _open[path].read_points(count)
    if len(points) != count:
        raise Refused("ends before the last of the points that it declares: it is truncated, copy it again")
    classes = np.asarray(points.classification)
    good = ~np.isin(classes, _NOISE) & ~np.asarray(points.withheld, bool)
    first = good & (np.asarray(points.return_number) <= 1)
    columns = (points.x, points.y, points.z, points.intensity, good.astype(float) + first)
    return np.column_stack([np.asarray(column, np.float64) for column in columns])


def close(path: str) -> dict[str, Any]:
    """Forget the file."""
    if path in _open:
        _open.pop(path).close()
    return {}
