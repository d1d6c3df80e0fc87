"""Polygons as labels: the pixel-centre rule, classes by number and by name, CRS, and files that are none."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.georeference import Grid, project, to_map
from fastdiffclip.scene.ingest import IngestReport, IngestRequest, ingest
from fastdiffclip.scene.labels import LabelMap
from fastdiffclip.scene.store import ClassInfo, open_scene
from fastdiffclip.scene.vectors import read_polygons

UTM = rasterio.CRS.from_epsg(32617)
TRANSFORM = (2.0, 0.0, 500000.0, 0.0, -2.0, 4100000.0)
GRID = Grid("hsi", Path("hsi.npy"), 20, 30, UTM.to_wkt(), TRANSFORM)


def box(left: float, top: float, right: float, bottom: float, transform: tuple[float, ...] = TRANSFORM) -> Any:
    """A rectangle given in pixels of the grid."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return shapely.Polygon([to_map(transform, *corner) for corner in corners])


def turned(degrees: float) -> tuple[float, ...]:
    """The transform of the grid, turned around its corner."""
    cos, sin = 2 * math.cos(math.radians(degrees)), 2 * math.sin(math.radians(degrees))
    return cos, sin, TRANSFORM[2], sin, -cos, TRANSFORM[5]


def write(path: Path, shapes: list[Any], crs: str | None = "EPSG:32617", layer: str = "plots", **columns: Any) -> str:
    """Write polygons with attributes; the suffix says the format."""
    driver = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".shp": "ESRI Shapefile"}[path.suffix]
    kind = shapes[0].geom_type if shapes and shapes[0] is not None else "Polygon"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file without CRS is legitimate
        pyogrio.raw.write(
            path, shapely.to_wkb(np.array(shapes, object)), [np.array(values) for values in columns.values()],
            list(columns), geometry_type=kind, crs=crs, driver=driver, layer=layer, append=path.exists(),
        )  # fmt: skip
    return str(path)


def read(path: str, variable: str | None = None, grid: Grid = GRID) -> LabelMap:
    return read_polygons(Path(path), variable, grid)


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp"])
def test_numbers_are_class_values_in_every_format(tmp_path: Path, suffix: str) -> None:
    shapes = [box(2, 3, 6, 5), box(10, 10, 12, 12), box(20, 1, 21, 2)]
    crs = "EPSG:4326" if suffix == ".geojson" else "EPSG:32617"
    if suffix == ".geojson":
        shapes = list(
            shapely.transform(
                shapes, lambda p: np.column_stack(project(UTM, rasterio.CRS.from_epsg(4326), p[:, 0], p[:, 1]))
            )
        )
    found = read(write(tmp_path / f"x{suffix}", shapes, crs, value=[7, 300, 0]), "value")
    expected = np.zeros((20, 30), np.uint16)
    expected[3:5, 2:6], expected[10:12, 10:12] = 7, 300
    np.testing.assert_array_equal(found.values, expected)
    assert found.values.dtype == np.uint16 and found.class_names == {} and found.warnings == ()
    assert len(found.companions) == (4 if suffix == ".shp" else 0)


@settings(max_examples=40, deadline=None)
@given(
    corners=st.lists(st.tuples(st.floats(-3, 33), st.floats(-3, 23)), min_size=3, max_size=6),
    angle=st.sampled_from([0.0, 25.0, 130.0]),
)
def test_a_pixel_belongs_to_the_polygon_that_holds_its_centre(
    tmp_path_factory: pytest.TempPathFactory, corners: list[tuple[float, float]], angle: float
) -> None:
    transform = turned(angle)
    polygon = shapely.MultiPoint([to_map(transform, *corner) for corner in corners]).convex_hull
    assume(polygon.area > 1e-3)
    grid = Grid("hsi", Path("hsi.npy"), 20, 30, UTM.to_wkt(), transform)
    path = write(tmp_path_factory.mktemp("v") / "x.gpkg", [polygon, box(0, 0, 1, 1, transform)], value=[2, 1])
    values = read(path, "value", grid).values
    rows, columns = np.mgrid[:20, :30]
    xs, ys = to_map(transform, columns + 0.5, rows + 0.5)
    clear = shapely.distance(polygon.boundary, shapely.points(xs, ys)) > 1e-4  # no tie at an edge
    clear[0, 0] = False  # the other polygon's
    np.testing.assert_array_equal((values == 2)[clear], shapely.contains_xy(polygon, xs, ys)[clear])


def test_texts_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    names = ["pine", "oak ", None, "pine", "", "Birch"]
    shapes = [box(3 * i, 0, 3 * i + 2, 2) for i in range(6)]
    found = read(write(tmp_path / "x.gpkg", shapes, species=np.array(names, object)), "species")
    assert found.class_names == {1: "Birch", 2: "oak", 3: "pine"} and found.numbering == "sorted"
    assert found.values[0, ::3].tolist()[:6] == [3, 2, 0, 3, 0, 1]
    assert any("2 features have no 'species' and are left out" in warning for warning in found.warnings)
    digits = read(write(tmp_path / "y.gpkg", shapes[:2], code=np.array(["10", "9"], object)), "code")
    assert digits.values[0, 0] == 10 and digits.values[0, 3] == 9 and digits.class_names == {}


def test_the_last_polygon_wins_and_pixels_of_several_classes_are_counted(tmp_path: Path) -> None:
    shapes = [box(0, 0, 10, 10), box(5, 5, 15, 15), box(0, 0, 3, 3), box(6, 6, 8, 8)]
    found = read(write(tmp_path / "x.gpkg", shapes, value=[1, 2, 1, 1]), "value")
    assert found.values[7, 7] == 1 and found.values[9, 9] == 2 and found.values[1, 1] == 1
    assert found.warnings == (f"{tmp_path}/x.gpkg: 25 pixels lie in polygons of several classes, the last one counts",)


def test_another_crs_is_converted(tmp_path: Path) -> None:
    polygon = box(4, 6, 9, 12)
    for crs in ("EPSG:4326", "EPSG:32618", "EPSG:3857"):
        moved = shapely.transform(
            polygon,
            lambda p, crs=crs: np.column_stack(project(UTM, rasterio.CRS.from_string(crs), p[:, 0], p[:, 1])),
        )
        found = read(write(tmp_path / f"{crs[5:]}.gpkg", [moved], crs, value=[3]), "value")
        expected = np.zeros((20, 30))
        expected[6:12, 4:9] = 3
        np.testing.assert_array_equal(found.values, expected)


def test_a_file_without_crs_takes_that_of_the_scene(tmp_path: Path) -> None:
    path = write(tmp_path / "x.shp", [box(1, 1, 3, 3)], crs=None, value=[1])
    assert "it has no CRS, that of the scene is taken" in read(path, "value").warnings[0]
    plain = Grid("hsi", Path("hsi.npy"), 20, 30, None, TRANSFORM)
    assert read(path, "value", plain).warnings == ()
    with_crs = write(tmp_path / "y.gpkg", [box(1, 1, 3, 3)], value=[1])
    with pytest.raises(InputDataError, match=r"y\.gpkg has a CRS and hsi .* has none"):
        read(with_crs, "value", plain)
    nowhere = Grid("hsi", Path("hsi.npy"), 20, 30)
    with pytest.raises(InputDataError, match="has no transform, georeference it first"):
        read(path, "value", nowhere)


def test_polygons_outside_and_too_small_are_said(tmp_path: Path) -> None:
    shapes = [box(1, 1, 3, 3), box(-9, 1, -5, 3), box(500, 500, 510, 510), box(5.1, 5.1, 5.3, 5.9)]
    path = write(tmp_path / "x.gpkg", shapes, value=[1, 1, 1, 1])
    assert [warning.split(": ")[1] for warning in read(path, "value").warnings] == [
        "2 of 4 features lie outside of the scene",
        "1 polygons are so small that no pixel has its centre in them",
    ]
    far = Grid("hsi", Path("hsi.npy"), 20, 30, UTM.to_wkt(), (2.0, 0.0, 700000.0, 0.0, -2.0, 4100000.0))
    with pytest.raises(InputDataError, match=r"no labelled polygon or point among 4 features on hsi .*corner \(700000"):
        read(path, "value", far)
    assert read_polygons(Path(path), "value", far, shared=True).values.max() == 0


def test_holes_and_parts(tmp_path: Path) -> None:
    ring = box(2, 2, 10, 10).difference(box(4, 4, 8, 8))
    both = shapely.MultiPolygon([ring, box(20, 2, 22, 4)])
    values = read(write(tmp_path / "x.gpkg", [both], value=[5]), "value").values
    assert values[3, 3] == 5 and values[6, 6] == 0 and values[3, 21] == 5
    assert np.count_nonzero(values) == 64 - 16 + 4


def test_a_point_labels_the_pixel_that_it_lies_in(tmp_path: Path) -> None:
    places = [(5.5, 5.5), (7.01, 3.99), (29.9, 19.9), (31.0, 4.0)]
    points = [shapely.Point(*to_map(TRANSFORM, *place)) for place in places]
    found = read(write(tmp_path / "p.gpkg", points, value=[1, 2, 3, 4]), "value")
    expected = np.zeros((20, 30))
    expected[5, 5], expected[3, 7], expected[19, 29] = 1, 2, 3
    np.testing.assert_array_equal(found.values, expected)
    assert found.warnings == (f"{tmp_path}/p.gpkg: 1 of 4 features lie outside of the scene",)


def test_features_that_are_neither_polygons_nor_points(tmp_path: Path) -> None:
    line = shapely.LineString([to_map(TRANSFORM, 5, 5), to_map(TRANSFORM, 9, 9)])
    lines = write(tmp_path / "p.gpkg", [line], value=[1])
    with pytest.raises(InputDataError, match="no polygon or point among 1 features: expected those, not lines"):
        read(lines, "value")
    features = [
        {"type": "Feature", "properties": {"v": 1}, "geometry": geometry}
        for geometry in (None, {"type": "LineString", "coordinates": [[5, 5], [6, 6]]},
                         {"type": "Polygon", "coordinates": []},
                         {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]]]})
    ]  # fmt: skip
    document = {"type": "FeatureCollection", "features": features}
    (tmp_path / "m.geojson").write_text(json.dumps(document))
    grid = Grid("hsi", Path("h"), 20, 20, rasterio.CRS.from_epsg(4326).to_wkt(), (1, 0, 0, 0, -1, 20))
    found = read(str(tmp_path / "m.geojson"), "v", grid)
    assert np.count_nonzero(found.values) == 81
    assert "features are neither polygons nor points and are left out" in found.warnings[0]


def test_choosing_layer_and_attribute(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gpkg", [box(0, 0, 4, 4)], layer="trees", value=[1], other=[9])
    one = write(tmp_path / "one.gpkg", [box(0, 0, 4, 4)], layer="trees", value=[1])
    assert read(one).values.max() == 1  # the only attribute there is
    assert read(path, "trees/other").values.max() == 9
    with pytest.raises(InputDataError, match=r"needs an attribute, it holds layer trees with value, other: .*ATTR"):
        read(path)
    with pytest.raises(InputDataError, match=r"has no attribute 'valu' \(did you mean 'value'\?\), it holds"):
        read(path, "valu")
    with pytest.raises(InputDataError, match=r"has no layer 'tree' \(did you mean 'trees'\?\)"):
        read(path, "tree/value")
    write(Path(path), [box(0, 0, 4, 4)], layer="roads", value=[2])
    assert read(path, "other").values.max() == 9  # only one layer has it
    assert read(path, "roads/value").values.max() == 2
    with pytest.raises(InputDataError, match=r"layer trees with value, other; layer roads with value: .*trees/"):
        read(path, "value")


@pytest.mark.parametrize(("values", "message"), [
    ([-1, 2], r"holds 1 values that are no class \(such as -1\)"), ([1.5, 2.0], "such as 1.5"),
    ([70000, 1], "such as 70000"), ([math.inf, 1.0], "such as inf"),
])  # fmt: skip
def test_numbers_that_are_no_class(tmp_path: Path, values: list[float], message: str) -> None:
    path = write(tmp_path / "x.gpkg", [box(0, 0, 4, 4), box(5, 5, 6, 6)], value=values)
    with pytest.raises(InputDataError, match=message):
        read(path, "value")


def test_a_date_is_no_class(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gpkg", [box(0, 0, 4, 4)], when=np.array(["2024-01-01"], "datetime64[ms]"), v=[1])
    with pytest.raises(InputDataError, match="attribute 'when' of .* holds neither numbers nor text"):
        read(path, "when")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    good = Path(write(tmp_path / "good.gpkg", [box(0, 0, 4, 4)], value=[1])).read_bytes()
    cases: dict[str, tuple[bytes, str]] = {
        "text.gpkg": (b"hello " * 99, "is no GeoPackage, it begins differently"),
        "vrt.geojson": (b"<OGRVRTDataSource/>", "is no GeoJSON, it begins differently"),
        "list.geojson": (b"[1, 2]", "is no GeoJSON, it begins differently"),
        "x.shp": (b"\0" * 200, "is no Shapefile, it begins differently"),
        "cut.gpkg": (good[:3000], "cannot be read as GeoPackage, it may be truncated or damaged"),
        "cut.geojson": (b'{"type": "FeatureCollection", "features": [{"type": "Fea', "cannot be read as GeoJSON"),
        "bare.shp": (b"\0\0\x27\x0a" + b"\0" * 96, r"has no bare\.shx and no bare\.dbf beside it"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputDataError, match=message):
            read(str(tmp_path / name), "value")


def test_a_database_that_is_no_geopackage(tmp_path: Path) -> None:
    base = sqlite3.connect(tmp_path / "x.gpkg")
    base.execute("create table t (value integer)")
    base.commit()
    base.close()
    with pytest.raises(InputDataError, match=r"x\.gpkg"):
        read(str(tmp_path / "x.gpkg"), "value")


def test_a_shapefile_that_lost_its_end(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "x.shp", [box(i, 0, i + 1, 4) for i in range(9)], value=list(range(1, 10))))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputDataError, match=r"x\.shp"):
        read(str(path), "value")


def run(tmp_path: Path, **options: Any) -> IngestReport:
    with rasterio.open(
        tmp_path / "hsi.tif", "w", driver="GTiff", height=20, width=30, count=2, dtype="uint16", crs=UTM,
        transform=Affine(*TRANSFORM),
    ) as dataset:  # fmt: skip
        dataset.write(np.random.default_rng(0).integers(1, 99, (2, 20, 30)).astype("uint16"))
    options.setdefault("out", tmp_path / "out.zarr")
    return ingest(IngestRequest([("hsi", str(tmp_path / "hsi.tif"))], **options))


def test_train_and_test_polygons_share_one_numbering(tmp_path: Path) -> None:
    train = write(tmp_path / "a.gpkg", [box(0, 0, 4, 4), box(5, 0, 9, 4)], name=np.array(["oak", "pine"], object))
    test = write(tmp_path / "b.gpkg", [box(0, 8, 4, 12), box(5, 8, 9, 12)], name=np.array(["ash", "pine"], object))
    labels = [("train", f"{train}:name"), ("test", f"{test}:plots/name")]
    report = run(tmp_path, labels=labels)
    scene = open_scene(report.scenes[0])
    assert [(info.value, info.name) for info in scene.classes] == [(1, "ash"), (2, "oak"), (3, "pine")]
    assert scene.read_labels("train")[1, 1] == 2 and scene.read_labels("test")[9, 6] == 3
    assert report.warnings == []
    classes = [ClassInfo(9, "Pine"), ClassInfo(4, "oak"), ClassInfo(5, "ash")]
    scene = open_scene(run(tmp_path, labels=labels, classes=classes, overwrite=True).scenes[0])
    assert scene.read_labels("train")[1, 1] == 4 and scene.read_labels("test")[9, 6] == 9
    with pytest.raises(InputDataError, match="no row for 'ash', as .*b.gpkg calls its classes; it has Pine, oak"):
        run(tmp_path, labels=labels, classes=classes[:2], overwrite=True)


def test_one_file_of_polygons_serves_many_scenes(tmp_path: Path) -> None:
    for i in range(3):
        transform = Affine(2, 0, 500000 + 60 * i, 0, -2, 4100000)
        with rasterio.open(
            tmp_path / f"p{i}.tif", "w", driver="GTiff", height=20, width=30, count=2, dtype="uint16", crs=UTM,
            transform=transform,
        ) as dataset:  # fmt: skip
            dataset.write(np.random.default_rng(i).integers(1, 99, (2, 20, 30)).astype("uint16"))
    names = np.array(["oak", "pine"], object)
    crowns = write(tmp_path / "crowns.gpkg", [box(2, 2, 6, 6), box(62, 2, 66, 6)], species=names)
    report = ingest(
        IngestRequest([("hsi", f"{tmp_path}/p*.tif")], tmp_path / "out", labels=[("labels", f"{crowns}:species")])
    )
    scenes = [open_scene(path) for path in report.scenes]
    assert [int(scene.read_labels().max()) for scene in scenes] == [1, 0, 2] and report.warnings == []
    assert {info.name for info in scenes[1].classes} == {"oak", "pine"}


def test_a_polygon_file_that_is_no_such_thing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.gpkg").write_bytes(b"")
    with pytest.raises(InputDataError, match=r"x\.gpkg is empty \(0 bytes\)"):
        run(tmp_path, labels=[("labels", f"{tmp_path}/x.gpkg:a")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hsi.tif", "x.gpkg"]


def test_real_crowns_cover_the_real_labels(real_data: Path, tmp_path: Path) -> None:
    for suffix in ("shp", "shx", "dbf", "prj", "cpg"):
        shutil.copy(real_data / "osbs" / "crowns" / f"train_OSBS.{suffix}", tmp_path)
    report = ingest(
        IngestRequest(
            [("hsi", f"{real_data}/osbs/hsi/OSBS_1*.tif")], tmp_path / "out",
            labels=[("labels", f"{tmp_path}/train_OSBS.shp:id")],
        )
    )  # fmt: skip
    compared = 0
    edges = shapely.boundary(shapely.from_wkb(pyogrio.raw.read(tmp_path / "train_OSBS.shp")[2]))
    for path in report.scenes:
        scene = open_scene(path)
        with rasterio.open(real_data / "osbs" / "labels" / f"{path.stem}.tif") as dataset:
            labelled = dataset.read(1) > 0
        rows, columns = np.nonzero(labelled)
        centres = shapely.points(*to_map(scene.affine_transform, columns + 0.5, rows + 0.5))
        clear = shapely.distance(shapely.union_all(edges), centres) > 0  # a centre on an edge is nobody's for sure
        assert (scene.read_labels() > 0)[labelled][clear].all()
        compared += clear.sum()
    assert compared > 1000
