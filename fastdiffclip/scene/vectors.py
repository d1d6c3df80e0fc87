"""Labels as polygons or points: GeoPackage, GeoJSON, Shapefile, burnt into a label map on the grid of a scene."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiffclip.errors import InputDataError, nearest
from fastdiffclip.scene.georeference import Grid, crs_pair, project, same_crs, to_map, to_pixels
from fastdiffclip.scene.labels import LARGEST_VALUE, LabelMap
from fastdiffclip.scene.readers.guard import DATA_TIME_S, HEADER_TIME_S
from fastdiffclip.scene.readers.guard_files import GuardedFile

if TYPE_CHECKING:
    from rasterio.crs import CRS

_DRIVERS = {
    ".gpkg": ("GPKG", "GeoPackage", b"SQLite format 3\0"),
    ".geojson": ("GeoJSON", "GeoJSON", b"{"),
    ".json": ("GeoJSON", "GeoJSON", b"{"),
    ".shp": ("ESRI Shapefile", "Shapefile", b"\0\0\x27\x0a"),
}
SUFFIXES = tuple(_DRIVERS)
_SHAPEFILE_PARTS = (".shx", ".dbf")
_POLYGONS, _POINTS = (3, 6), (0, 4)  # shapely's numbers of Polygon and MultiPolygon, Point and MultiPoint
_OUTSIDE = "lie outside of the scene"
_EDGE_POINTS = 33
_FAR = 1e8  # pixels; a corner beyond that is none of a scene


@dataclass
class _Shapes:
    """Polygons and points as (column, row) of the grid, the worth of each: a class value, or the number of a name."""

    shapes: np.ndarray
    codes: np.ndarray
    names: list[str] | None
    notes: list[str]


def read_polygons(path: Path, variable: str | None, grid: Grid, shared: bool = False) -> LabelMap:
    """Burn the polygons of a file into a label map on ``grid``.

    ``variable`` is ``ATTRIBUTE`` or ``LAYER/ATTRIBUTE``. Numbers are class values, 0 = unlabelled; texts are classes,
    numbered in alphabetical order, unless all are whole numbers. A pixel belongs to the polygon that its centre lies
    in, and to a point that lies in it, the last one where there are several; a warning counts those of different
    classes. All come from the CRS of the file to that of the grid. Raises InputDataError for another file, a missing or
    unfit attribute, a grid without a place, and where none of them lies on the grid, unless the file is ``shared`` by
    several scenes.
    """
    driver, kind, signature = _DRIVERS[path.suffix.lower()]
    companions = _check_file(path, kind, signature)
    if grid.affine_transform is None:
        raise InputDataError(f"{path} cannot be burnt into {grid}: it has no transform, georeference it first")
    file = GuardedFile(path, "vectors", kind)
    try:
        layers = file.call("describe", HEADER_TIME_S, str(path), driver=driver)["layers"]
        layer, attribute = _choose(path, layers, variable)
        found = _read(file, layer, attribute, grid)
    finally:
        file.close()
    values, overlaps = _burn(found, grid)
    if not len(found.shapes) and not shared:
        raise InputDataError(
            f"{path} has no labelled polygon or point among {layer['features']} features on {grid}: is it of the same "
            "place, and its CRS right?"
        )
    names = {} if found.names is None else dict(enumerate(found.names, 1))
    if shared:
        found.notes = [note for note in found.notes if not note.endswith(_OUTSIDE)]
    return LabelMap(
        path, values, names, {}, numbering="sorted" if names else "values",
        warnings=tuple(f"{path}: {text}" for text in found.notes + overlaps), companions=companions,
    )  # fmt: skip


def _check_file(path: Path, kind: str, signature: bytes) -> tuple[Path, ...]:
    """Refuse a file of another kind before any library opens it; return the files that belong to it."""
    with path.open("rb") as stream:
        head = stream.read(1024)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n") if signature == b"{" else head
    if not start.startswith(signature):
        raise InputDataError(f"{path} is no {kind}, it begins differently: is it damaged, or wrongly named?")
    if kind != "Shapefile":
        return ()
    beside = {entry.name.lower(): entry for entry in path.parent.iterdir()}
    missing = [part for part in _SHAPEFILE_PARTS if f"{path.stem}{part}".lower() not in beside]
    if missing:
        listed = " and no ".join(path.stem + part for part in missing)
        raise InputDataError(f"{path} has no {listed} beside it, a Shapefile needs both: copy them too")
    parts = (*_SHAPEFILE_PARTS, ".prj", ".cpg")
    return tuple(beside[name] for name in (f"{path.stem}{part}".lower() for part in parts) if name in beside)


def _choose(path: Path, layers: list[dict[str, Any]], variable: str | None) -> tuple[dict[str, Any], tuple[str, str]]:
    """Return the layer and its attribute (name, number or text) that ``variable`` names."""
    by_name = {layer["name"]: layer for layer in layers}
    head, slash, tail = (variable or "").rpartition("/")
    named = by_name.get(head) if slash else None
    wanted = tail if named else variable
    candidates = [named] if named else layers
    if slash and not named:
        raise InputDataError(f"{path} has no layer '{head}'{nearest(head, list(by_name))}; it holds {_listed(layers)}")
    fitting = [
        (layer, (name, kind))
        for layer in candidates
        for name, kind in layer["fields"]
        if (name == wanted if wanted else kind != "other")
    ]
    if len(fitting) != 1:
        fields = [name for layer in candidates for name, _ in layer["fields"]]
        what = (
            f"has no attribute '{wanted}'{nearest(wanted, fields)}" if wanted and not fitting else "needs an attribute"
        )
        example = f"{path.name}:{layers[0]['name'] + '/' if len(layers) > 1 else ''}ATTRIBUTE" if layers else path.name
        raise InputDataError(f"{path} {what}, it holds {_listed(layers)}: say which one is the class, as in {example}")
    if fitting[0][1][1] == "other":
        raise InputDataError(f"attribute '{wanted}' of {path} holds neither numbers nor text: name another one")
    return fitting[0]


def _listed(layers: list[dict[str, Any]]) -> str:
    if not layers:
        return "no layer with polygons"
    return "; ".join(
        f"layer {layer['name']} with {', '.join(name for name, _ in layer['fields']) or 'no attribute'}"
        for layer in layers[:10]
    )


def _read(file: GuardedFile, layer: dict[str, Any], attribute: tuple[str, str], grid: Grid) -> _Shapes:
    """Return the polygons that may touch the grid, in pixel coordinates."""
    import shapely

    crs, notes = _crs(file.path, layer, grid)
    what = f"{file.path}:{layer['name']}/{attribute[0]}"
    shapes, codes, texts = _select(file, what, layer["name"], attribute[0], _box(grid, crs))
    codes, names = _class_codes(what, codes, texts)
    taken = np.isin(shapely.get_type_id(shapes), _POLYGONS + _POINTS)
    if len(shapes) and not taken.any():
        raise InputDataError(f"{what} has no polygon or point among {len(shapes)} features: expected those, not lines")
    unnamed = np.isnan(codes)
    for count, text in (
        (np.count_nonzero(~taken), "are neither polygons nor points"),
        (np.count_nonzero(unnamed), f"have no '{attribute[0]}'"),
    ):  # fmt: skip
        if count:
            notes.append(f"{count} features {text} and are left out")
    keep = taken & ~unnamed & (codes != 0)
    shapes = shapely.transform(shapes[keep], lambda points: _on_grid(points, crs, grid))
    left, top, right, bottom = shapely.bounds(shapes).T.reshape(4, -1)
    near = np.abs([left, top, right, bottom]).max(0, initial=0) < _FAR
    inside = near & (right > 0) & (left < grid.width) & (bottom > 0) & (top < grid.height)
    outside = layer["features"] - len(keep) + np.count_nonzero(~inside)
    if outside and inside.any():
        notes.append(f"{outside} of {layer['features']} features {_OUTSIDE}")
    thin = np.ceil(left - 0.5) > np.floor(right - 0.5)
    thin |= np.ceil(top - 0.5) > np.floor(bottom - 0.5)
    thin &= np.isin(shapely.get_type_id(shapes), _POLYGONS)
    if missed := np.count_nonzero(thin & inside):
        notes.append(f"{missed} polygons are so small that no pixel has its centre in them")
    return _Shapes(shapes[inside], codes[keep][inside], names, notes)


def _select(
    file: GuardedFile, what: str, layer: str, attribute: str, box: list[float] | None
) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """Return geometries (None where one cannot be read), codes, and the texts that these count, or None."""
    import shapely

    selected = file.call("select", DATA_TIME_S, what, layer=layer, attribute=attribute, box=box)
    features = selected["features"]
    parts = {
        "wkb": np.empty(selected["bytes"], np.uint8),
        "offsets": np.empty(features + 1, np.int64),
        "codes": np.empty(features, np.float64),
    }
    for part, out in parts.items():
        if out.size:
            file.call("take", DATA_TIME_S, what, out, part=part)
    data, ends = parts["wkb"].tobytes(), parts["offsets"].tolist()
    wkb = np.array([data[a:b] or None for a, b in zip(ends[:-1], ends[1:], strict=True)], object)
    with np.errstate(invalid="ignore"):  # coordinates that are no numbers
        shapes = np.asarray(shapely.from_wkb(wkb, on_invalid="ignore"), object)
    return shapes, parts["codes"], selected["names"]


def _class_codes(what: str, codes: np.ndarray, texts: list[str] | None) -> tuple[np.ndarray, list[str] | None]:
    """Return class values, and the names that they number, None where they are the values of the file."""
    if texts is not None and not all(re.fullmatch(r"\d{1,5}", text) for text in texts):
        return codes + 1, texts
    if texts is not None:
        codes = np.array([np.nan if np.isnan(code) else float(texts[int(code)]) for code in codes])
    given = codes[~np.isnan(codes)]
    wrong = given[(given < 0) | (given > LARGEST_VALUE) | (given != np.floor(given))]
    if wrong.size:
        raise InputDataError(
            f"{what} holds {wrong.size} values that are no class (such as {wrong[0]:g}): expected whole numbers from "
            f"0, which means unlabelled, to {LARGEST_VALUE}, or names"
        )
    return codes, None


def _crs(path: Path, layer: dict[str, Any], grid: Grid) -> tuple[tuple[CRS, CRS] | None, list[str]]:
    """Return the CRS of the layer and that of the grid, None where they are the same; and a warning."""
    crs = crs_pair(path, layer["crs"], grid)
    if crs is None:
        return None, ["it has no CRS, that of the scene is taken"] if grid.crs_wkt else []
    return None if same_crs(crs[0].to_wkt(), crs[1].to_wkt()) else crs, []


def _box(grid: Grid, crs: tuple[CRS, CRS] | None) -> list[float] | None:
    """Return the extent of the grid in the CRS of the layer, a little widened; None where it has no end there."""
    across, down = np.meshgrid(np.linspace(0, grid.width, _EDGE_POINTS), np.linspace(0, grid.height, _EDGE_POINTS))
    xs, ys = to_map(grid.affine_transform or (), across.ravel(), down.ravel())
    if crs is not None:
        xs, ys = project(crs[1], crs[0], xs, ys)
    box = [xs.min(), ys.min(), xs.max(), ys.max()]
    if not np.isfinite(box).all():
        return None
    margin = 0.02 * max(box[2] - box[0], box[3] - box[1])
    return [float(v) for v in (box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)]


def _on_grid(points: np.ndarray, crs: tuple[CRS, CRS] | None, grid: Grid) -> np.ndarray:
    """Turn coordinates (n, 2) of the layer into (column, row); what has no place there becomes infinite."""
    xs, ys = points[:, 0], points[:, 1]
    if crs is not None:
        xs, ys = project(*crs, xs, ys)
    found = np.column_stack(to_pixels(grid.affine_transform or (), xs, ys))
    found[~np.isfinite(found).all(1)] = np.inf  # not NaN: a ring must close
    return found


def _burn(found: _Shapes, grid: Grid) -> tuple[np.ndarray, list[str]]:
    """Return the label map, and a warning that counts the pixels which polygons of several classes cover."""
    order = np.argsort(found.codes, kind="stable")
    values = _rasterised(found, np.arange(len(order)), grid)
    if len(set(found.codes.tolist())) < 2:
        return values, []
    # Burnt in the order of their classes and against it, a pixel differs exactly where two classes meet.
    several = np.count_nonzero(_rasterised(found, order, grid) != _rasterised(found, order[::-1], grid))
    return values, [f"{several} pixels lie in polygons of several classes, the last one counts"] if several else []


def _rasterised(found: _Shapes, order: np.ndarray, grid: Grid) -> np.ndarray:
    from affine import Affine
    from rasterio.features import rasterize

    size = (grid.height, grid.width)
    if not len(order):
        return np.zeros(size, np.uint16)
    shapes = ((found.shapes[i], int(found.codes[i])) for i in order.tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes without area
        values: np.ndarray = rasterize(shapes, size, fill=0, transform=Affine.identity(), dtype="uint16")
    return values
