"""Regions of interest as ENVI exports them to text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.georeference import Grid
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.rois import read_rois
from fastdiffclip.scene.store import ClassInfo, Scene, open_scene

GRID = Grid("hsi", Path("hsi.npy"), 349, 1905)
Regions = list[tuple[str, tuple[int, int, int], list[tuple[int, int]]]]
COLUMNS = ";  ID    X     Y       MapX         MapY          Lat         Lon"
REGIONS: Regions = [
    ("grass_healthy", (0, 205, 0), [(2, 1), (3, 1), (1905, 349)]),
    ("railway", (0, 0, 0), [(10, 20)]),
    ("parking lot 1", (176, 48, 96), [(11, 20), (12, 20)]),
]


def contest(regions: Regions, size: str = "1905 x 349") -> str:
    """The text of the 2013 contest's files: each region's header before its points."""
    lines = [
        "; ENVI Output of ROIs (4.8) [Tue Mar 05 12:00:00 2013]", ";", ";", f"; Number of ROIs: {len(regions)}",
        f"; File Dimension: {size}", ";",
    ]  # fmt: skip
    for name, colour, points in regions:
        lines += [f"; ROI name: {name}", f"; ROI rgb value: {{{', '.join(map(str, colour))}}}"]
        lines += [f"; ROI npts: {len(points)}", COLUMNS]
        lines += [
            f"{i:6} {x:5} {y:5}   271460.50  3290891.50   29.72420900  -95.36372400"
            for i, (x, y) in enumerate(points, 1)
        ]
        lines += ["", ""]
    return "\r\n".join(lines)


def exported(regions: Regions) -> str:
    """The text of an export with band values: all headers first, then the points, blocks parted by empty lines."""
    lines = [
        "; ENVI Output of ROIs (5.0) [x]",
        f"; Number of ROIs: {len(regions)}",
        "; File Dimension: 1905 x 349",
        ";",
    ]
    for name, colour, points in regions:
        lines += [f"; ROI name: {name}", f"; ROI rgb value: {{{', '.join(map(str, colour))}}}"]
        lines += [f"; ROI npts: {len(points)}", ";"]
    lines.append(";    ID     X     Y     B1     B2")
    for _, _, points in regions:
        lines += [f"{i} {x} {y} {i * 0.25} 17" for i, (x, y) in enumerate(points, 1)] + [""]
    return "\n".join(lines)


def read(tmp_path: Path, text: str, grid: Grid = GRID) -> Any:
    (tmp_path / "roi.txt").write_bytes(text.encode())
    return read_rois(tmp_path / "roi.txt", None, grid)


@pytest.mark.parametrize("form", [contest, exported])
def test_both_forms_give_a_map_with_names_and_colours(tmp_path: Path, form: Any) -> None:
    found = read(tmp_path, form(REGIONS))
    assert found.class_names == {1: "grass_healthy", 2: "railway", 3: "parking lot 1"}
    assert found.class_colours == {1: (0, 205, 0), 2: (0, 0, 0), 3: (176, 48, 96)}
    assert found.numbering == "listed" and found.warnings == ()
    expected = np.zeros((349, 1905), np.uint16)
    expected[0, 1:3], expected[348, 1904], expected[19, 9], expected[19, 10:12] = 1, 1, 2, 3
    np.testing.assert_array_equal(found.values, expected)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text("abc _#1", min_size=1, max_size=5).map(str.strip).filter(bool),
            st.tuples(*[st.integers(0, 255)] * 3),
            st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), max_size=6),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([contest, exported]),
)
def test_any_regions_come_back(tmp_path_factory: pytest.TempPathFactory, regions: Regions, form: Any) -> None:
    grid = Grid("hsi", Path("h"), 7, 9)
    text = form(regions).replace("1905 x 349", "9 x 7")
    found = read(tmp_path_factory.mktemp("roi"), text, grid)
    expected = np.zeros((7, 9), int)
    names = list(dict.fromkeys(name for name, _, _ in regions))
    for name, _, points in regions:
        for x, y in points:
            expected[y - 1, x - 1] = names.index(name) + 1
    np.testing.assert_array_equal(found.values, expected)
    assert list(found.class_names.values()) == names


def test_a_pixel_of_two_regions_belongs_to_the_last(tmp_path: Path) -> None:
    regions: Regions = [("a", (1, 1, 1), [(1, 1), (2, 1)]), ("b", (2, 2, 2), [(2, 1)]), ("a", (1, 1, 1), [(1, 1)])]
    found = read(tmp_path, contest(regions))
    assert found.values[0, :2].tolist() == [1, 2]
    assert found.warnings == (f"{tmp_path}/roi.txt: 1 points lie in several regions, the last one counts",)


BROKEN = {
    "another image": ("1905 x 349", "100 x 349", r"is for an image of 349 x 100 pixels, expected hsi \(hsi"),
    "column": ("     2     1 ", "  1906     1 ", r"line 11: found '1  1906     1.*with X from 1 to 1905"),
    "row": ("     2     1 ", "     2     0 ", "line 11: found '1     2     0"),
    "half": ("     2     1 ", "   2.5     1 ", "expected a row ID X Y"),
    "text": ("     2     1 ", "     a     b ", "expected a row ID X Y"),
    "infinite": ("     2     1 ", "   inf     1 ", "expected a row ID X Y"),
    "too few": ("; ROI npts: 3", "; ROI npts: 4", "region 'parking lot 1' declares 2 points and has 1: is the file"),
    "too many": ("; ROI npts: 2", "; ROI npts: 1", "where no region has points left"),
    "no number": ("; ROI npts: 3", "; ROI npts: many", "'many' is no number of points"),
    "huge number": ("; ROI npts: 3", f"; ROI npts: {10**30}", "is no number of points"),
    "no count": ("; ROI npts: 3", ";", "region 'grass_healthy' has no '; ROI npts:' line"),
    "no name": ("; ROI name: railway", "; ROI name:", "a region has no name"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_files_are_named_with_the_line(tmp_path: Path, case: str) -> None:
    old, new, message = BROKEN[case]
    with pytest.raises(InputDataError, match=rf"roi\.txt.*{message}"):
        read(tmp_path, contest(REGIONS).replace(old, new))


@pytest.mark.parametrize("data", [
    b"some notes about the scene\n", b"1 2 3\n", b"; a comment\n", b"\0" * 99, b"x" * 2**21, b"\xff\xfe;\0R\0",
])  # fmt: skip
def test_texts_that_are_no_regions(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "roi.txt").write_bytes(data)
    with pytest.raises(InputDataError, match=r"roi\.txt"):
        read_rois(tmp_path / "roi.txt", None, GRID)


def test_a_truncated_file(tmp_path: Path) -> None:
    text = contest(REGIONS)
    with pytest.raises(InputDataError, match="declares 2 points and has 1: is the file truncated"):
        read(tmp_path, text[: text.rindex("    2 ")])


def test_regions_have_no_variables(tmp_path: Path) -> None:
    (tmp_path / "roi.txt").write_text(contest(REGIONS))
    with pytest.raises(InputDataError, match="leave out ':oak'"):
        read_rois(tmp_path / "roi.txt", "oak", GRID)


def ingested(tmp_path: Path, train: Regions, test: Regions, **options: Any) -> tuple[Scene, list[str]]:
    np.save(tmp_path / "hsi.npy", np.random.default_rng(0).integers(1, 99, (6, 8, 2)).astype(np.uint16))
    (tmp_path / "TR.txt").write_text(contest(train, "8 x 6"))
    (tmp_path / "VA.txt").write_text(contest(test, "8 x 6"))
    labels = [("train", f"{tmp_path}/TR.txt"), ("test", f"{tmp_path}/VA.txt")]
    report = ingest(
        IngestRequest([("hsi", f"{tmp_path}/hsi.npy")], tmp_path / "o.zarr", labels=labels, overwrite=True, **options)
    )
    return open_scene(report.scenes[0]), report.warnings


def test_train_and_test_regions_become_official_maps(tmp_path: Path) -> None:
    train: Regions = [("grass", (0, 205, 0), [(1, 1)]), ("rail", (0, 0, 0), [(2, 1)]), ("road", (9, 9, 9), [(3, 1)])]
    test: Regions = [("grass", (0, 205, 0), [(1, 2)]), ("road", (9, 9, 9), [(3, 2)]), ("water", (0, 0, 9), [(4, 2)])]
    scene, warnings = ingested(tmp_path, train, test)
    assert [(info.value, info.name) for info in scene.classes] == [(1, "grass"), (2, "rail"), (3, "road"), (4, "water")]
    assert scene.read_labels("train")[0].tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert scene.read_labels("test")[1].tolist() == [1, 0, 3, 4, 0, 0, 0, 0]
    assert scene.classes[0].colour == (0, 205, 0) and scene.classes[3].colour == (0, 0, 9)
    assert scene.classes[1].colour not in (None, (0, 0, 0))  # black is what maps use for nothing
    assert warnings == []


def test_a_class_table_says_the_values(tmp_path: Path) -> None:
    train: Regions = [("grass_healthy", (1, 1, 1), [(1, 1)]), ("Road", (2, 2, 2), [(2, 1)])]
    table = [ClassInfo(4, "Road"), ClassInfo(7, "Healthy grass", "green", (5, 6, 7))]
    scene, warnings = ingested(tmp_path, train, train[:1], classes=table)
    assert scene.read_labels("train")[0, :2].tolist() == [7, 4] and warnings == []
    assert [info.colour for info in scene.classes] == [(2, 2, 2), (5, 6, 7)]


def test_other_names_go_by_their_place_when_all_are_there(tmp_path: Path) -> None:
    train: Regions = [("grass_synthetis", (1, 1, 1), [(1, 1)]), ("tree", (2, 2, 2), [(2, 1)])]
    table = [ClassInfo(1, "Artificial turf"), ClassInfo(2, "Tree")]
    scene, warnings = ingested(tmp_path, train, train, classes=table)
    assert scene.read_labels("train")[0, :2].tolist() == [1, 2]
    assert warnings == [
        "the regions are taken in the order of the class table: grass_synthetis = Artificial turf, tree = Tree"
    ]
    for wrong in (table[::-1], table[:1], [*table, ClassInfo(3, "Road")]):
        with pytest.raises(InputDataError, match="no row for 'grass_synthetis'.*, as .*TR.txt calls its classes"):
            ingested(tmp_path, train, train, classes=wrong)


def test_numbers_and_names_need_a_table(tmp_path: Path) -> None:
    np.save(tmp_path / "hsi.npy", np.random.default_rng(0).integers(1, 99, (6, 8, 2)).astype(np.uint16))
    np.save(tmp_path / "gt.npy", np.eye(6, 8, dtype=np.uint8))
    (tmp_path / "VA.txt").write_text(contest([("oak", (1, 2, 3), [(1, 1)])], "8 x 6"))
    labels = [("train", f"{tmp_path}/gt.npy"), ("test", f"{tmp_path}/VA.txt")]
    request = IngestRequest([("hsi", f"{tmp_path}/hsi.npy")], tmp_path / "o.zarr", labels=labels)
    with pytest.raises(InputDataError, match=r"gt\.npy has numbers for classes and .*VA\.txt names: .*--classes FILE"):
        ingest(request)
    ingest(replace(request, classes=[ClassInfo(1, "oak")]))
    assert open_scene(tmp_path / "o.zarr").read_labels("test")[0, 0] == 1
