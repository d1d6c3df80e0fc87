"""GeoPackage, GeoJSON and Shapefile in the child process: what they hold, geometries, and one attribute of these."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyogrio
from child_common import Missing, Refused, alive

_MOST_LAYERS = 1000
_MOST_NAMES = 65535
_LONGEST_NAME = 1000
_NUMBERS = {"OFTInteger", "OFTInteger64", "OFTReal"}
_selected: dict[str, dict[str, np.ndarray]] = {}


def describe(path: str, driver: str) -> dict[str, Any]:
    """List the layers that have geometries: name, CRS, number of features, attributes (name; number, text or other)."""
    layers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = pyogrio.list_layers(path)
        if len(listed) > _MOST_LAYERS:
            raise Refused(f"has {len(listed)} layers, expected at most {_MOST_LAYERS}")
        for name, kind in listed:
            if kind is None:
                continue
            info = pyogrio.read_info(path, layer=name, force_feature_count=True)
            if info["driver"] != driver:
                raise Refused(f"is {info['driver']}, expected {driver}: rename or convert it")
            kinds = ["number" if t in _NUMBERS else "text" if t == "OFTString" else "other" for t in info["ogr_types"]]
            fields = list(zip(info["fields"].tolist(), kinds, strict=True))
            layers.append({"name": name, "crs": info["crs"], "features": int(info["features"]), "fields": fields})
            alive()
    return {"layers": layers}


def select(path: str, layer: str, attribute: str, box: list[float] | None) -> dict[str, Any]:
    """Read geometries and one attribute of the features that touch a box; sizes come back, :func:`take` hands over.

    ``codes`` are the numbers of a numeric attribute, or places in the sorted list of all texts of the layer; NaN
    where there is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, _, everything = pyogrio.raw.read(path, layer=layer, columns=[attribute], read_geometry=False)
        alive()
        meta, _, shapes, columns = pyogrio.raw.read(
            path, layer=layer, columns=[attribute], force_2d=True, bbox=None if box is None else tuple(box)
        )
    alive()
    if attribute not in meta["fields"]:
        raise Missing(attribute)
    wkb = [bytes(shape) if shape is not None else b"" for shape in shapes]
    names = _names(everything[0])
    codes = _codes(columns[0], names)
    offsets = np.zeros(len(wkb) + 1, np.int64)
    np.cumsum([len(shape) for shape in wkb], out=offsets[1:])
    _selected[path] = {"wkb": np.frombuffer(b"".join(wkb), np.uint8), "offsets": offsets, "codes": codes}
    return {"features": len(wkb), "bytes": int(offsets[-1]), "names": names}


def _text(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())[:_LONGEST_NAME]


def _names(column: np.ndarray) -> list[str] | None:
    """Return the texts of a column in order, None where it holds numbers."""
    if column.dtype.kind in "biuf":
        return None
    names = sorted({_text(value) for value in column.tolist()} - {""})
    if len(names) > _MOST_NAMES:
        raise Refused(f"has {len(names)} different texts in that attribute, expected one per class")
    return names


def _codes(column: np.ndarray, names: list[str] | None) -> np.ndarray:
    if names is None:
        return column.astype(np.float64)
    places = {name: place for place, name in enumerate(names)}
    return np.array([places.get(_text(value), np.nan) for value in column.tolist()], np.float64)


def take(path: str, part: str) -> np.ndarray:
    """Hand over ``wkb`` (uint8), ``offsets`` (int64, features + 1) or ``codes`` (float64) of what was selected."""
    return _selected[path][part]


def close(path: str) -> dict[str, Any]:
    """Forget what was selected."""
    _selected.pop(path, None)
    return {}
