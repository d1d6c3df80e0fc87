"""Pictures of a study, and what stands in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.store import Scene
from fastdiffclip.study import pictures, plots, runner
from fastdiffclip.study.catalogue import STUDIES
from fastdiffclip.study.features import nearest_shot_agrees, plane_of
from fastdiffclip.study.output import table_of
from fastdiffclip.study.pictures import draw_features, draw_maps
from fastdiffclip.study.plots import plot_figures
from fastdiffclip.study.runner import StudyResult

Run = Callable[..., StudyResult]


def pixels_of(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def colours_in(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(np.rint(picture.reshape(-1, 3) * 255).astype(int), axis=0).tolist()}


def test_maps_side_by_side(study: Run, small_scene: Scene, tmp_path: Path) -> None:
    rows = STUDIES["fig3"].rows
    result = study(replace(STUDIES["fig3"], rows=(rows[0], *rows[3:5])), seeds=1)
    valid = small_scene.read_valid_everywhere()
    for cell in result.cells:
        values = result.arrays(cell)["map"]
        assert values.shape == (24, 30) and np.array_equal(values > 0, valid) and set(np.unique(values)) <= {0, 1, 2, 4}
    linear = next(cell for cell in result.cells if cell.row.label == "linear")
    truth = small_scene.read_labels()
    right = (result.arrays(linear)["map"] == truth)[(truth > 0) & valid].mean()
    assert 100 * right == pytest.approx(linear.scores[0].oa, abs=15)  # all labelled pixels against the test pixels
    draw_maps(result, tmp_path / "fig3.png")
    assert {(30, 160, 60), (200, 60, 40), (20, 40, 200)} <= colours_in(pixels_of(tmp_path / "fig3.png"))


def test_features_before_and_after(study: Run, tmp_path: Path) -> None:
    result = study("fig5", seeds=1, test_limit=12)
    assert [cell.row.label for cell in result.cells] == [
        "pixels, standardised", "front end of best", "encoder, random weights", "encoder, pretrained", "classifier"
    ]  # fmt: skip
    assert [cell.entries[0]["dimensions"] for cell in result.cells][2:4] == [32, 32]  # two modalities, width 16
    for cell in result.cells:
        arrays = result.arrays(cell)
        assert arrays["plane"].shape == (42, 2) and len(arrays["labels"]) == 42  # six shots, twelve pixels a class
        assert np.flatnonzero(arrays["shots"]).tolist() == list(range(6))
        assert 50 < cell.entries[0]["nearest"] <= 100 and cell.entries[0]["pixels"] == 36
    columns, rows = table_of(result)
    assert columns == ["features", "dimensions", "test pixels", "nearest shot %"] and rows[0][1] == "13"
    draw_features(result, tmp_path / "fig5.png")
    assert len(colours_in(pixels_of(tmp_path / "fig5.png"))) > 5


@pytest.mark.parametrize("name", ["table4", "fig4"])
def test_dots_and_curves(study: Run, tmp_path: Path, name: str) -> None:
    plot_figures(study(replace(STUDIES[name], rows=STUDIES[name].rows[-6:]), seeds=1), tmp_path / "x.png")
    picture = pixels_of(tmp_path / "x.png")
    assert picture.shape[1] > 300 and (0x24, 0x58, 0x7F) in colours_in(picture)


@pytest.mark.parametrize("name", ["table2", "fig4"])
def test_sweeps_show_the_differences_of_the_table(
    study: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Below the means, a line through the table's paired differences in a band of one of their standard errors."""
    from matplotlib.figure import Figure

    made: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: made.append(figure))
    rows = {"table2": STUDIES["table2"].rows[:3], "fig4": STUDIES["fig4"].rows[2:6]}[name]
    result = study(replace(STUDIES[name], rows=rows), seeds=3)
    for cell in result.cells:  # draws of unlike ease, differences that are all but the same
        shift = 0.01 * (cell.row.value or 0.0)
        cell.entries = [
            {**entry, "scores": {**entry["scores"], "aa": 60.0 + 12.0 * draw + shift * (1 + 0.1 * draw)}}
            for draw, entry in enumerate(cell.entries)
        ]
        cell.differences = {}
    runner._compare(result.cells, result.reference, result.study)
    plot_figures(result, tmp_path / "x.png")
    panels = np.array(made[0].axes).reshape(2, -1)
    for (panel, words), (above, below) in zip(result.study.axes, panels.T, strict=True):
        cells = sorted((c for c in result.cells if c.row.panel == panel and c.row.value), key=lambda c: c.row.value)
        expected = [c.differences.get("aa", {"mean": 0.0, "se": 0.0}) for c in cells]
        line = next(line for line in below.get_lines() if line.get_marker() == "o")
        assert below.get_xlabel() == words and line.get_xdata().tolist() == [c.row.value for c in cells]
        np.testing.assert_allclose(line.get_ydata(), [found["mean"] for found in expected], atol=1e-12)
        corners = below.collections[0].get_paths()[0].vertices
        for cell, found in zip(cells, expected, strict=True):
            band = corners[corners[:, 0] == cell.row.value, 1]
            ends = (found["mean"] - found["se"], found["mean"] + found["se"])
            np.testing.assert_allclose((band.min(), band.max()), ends, atol=1e-12)
        wide, narrow = (np.ptp(axes.collections[0].get_paths()[0].vertices[:, 1]) for axes in (above, below))
        assert narrow < 0.5 * wide
        means = next(line for line in above.get_lines() if line.get_marker() == "o").get_ydata()
        np.testing.assert_allclose(means, [c.summary()["aa_mean"] for c in cells])
    assert result.reference in panels[1, 0].get_ylabel().replace("\n", " ")


def test_methods_without_the_figure_have_no_row_and_no_spread_passes_100(
    study: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    rows = {row.label: row for row in STUDIES["table1"].rows}
    chosen = replace(STUDIES["table1"], rows=(rows["linear"], rows["1nn, pixel"]), judged_by="ece")
    made: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: made.append(figure))
    plot_figures(study(chosen, seeds=1), tmp_path / "x.png")
    monkeypatch.setattr(plots, "_values", lambda cell, judged: np.array([98.0, 99.9, 100.0]))
    plot_figures(study(chosen, "two"), tmp_path / "y.png")
    labels = [[text.get_text() for text in figure.axes[0].get_yticklabels()] for figure in made]
    assert labels == [["linear"], ["linear", "1nn, pixel"]]
    ends = [line.get_xdata() for line in made[1].axes[0].get_lines() if len(set(line.get_ydata())) == 1]
    assert len(ends) == 2 and all(max(x) == 100.0 and min(x) < 98.3 for x in ends)


def test_nearest_shot_by_hand() -> None:
    features = np.array([[1.0, 0.0], [0.0, 9.0], [2.0, 0.1], [0.0, 3.0], [0.1, 1.0], [3.0, 1.0], [1.0, 5.0]])
    assert nearest_shot_agrees(features, np.array([1, 2, 1, 2, 2, 1, 1]), 2) == pytest.approx(80)
    with pytest.raises(InputDataError, match="at least 5 test pixels, and the split left 4"):
        nearest_shot_agrees(features[:6], np.array([1, 2, 1, 2, 2, 1]), 2)


def test_the_plane_keeps_groups_apart() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1, 2], 20)
    plane = plane_of(np.eye(3)[labels] + 0.01 * rng.standard_normal((60, 3)), seed=0)
    assert plane.shape == (60, 2)
    within = max(np.ptp(plane[labels == value], axis=0).max() for value in range(3))
    between = min(np.linalg.norm(plane[labels == a].mean(0) - plane[labels == b].mean(0)) for a, b in ((0, 1), (1, 2)))
    assert between > 0 and within < 3 * between


@pytest.mark.parametrize("length", [3, 12, 40])
def test_the_legend_fits(study: Run, tmp_path: Path, length: int) -> None:
    rows = STUDIES["fig3"].rows[3:4]
    result = study(replace(STUDIES["fig3"], rows=rows), seeds=1)
    result.classes = tuple(replace(item, name="m" * length) for item in result.classes)
    draw_maps(result, tmp_path / "x.png")
    picture = pixels_of(tmp_path / "x.png")
    assert (picture[-30:, -4:] > 0.99).all()  # nothing runs over the edge on the right


def test_sparse_maps_are_drawn_larger() -> None:
    values = np.zeros((40, 900), np.uint16)
    values[20, 450], values[20, 460] = 3, 5
    dot = pictures._dot_size(values)
    assert dot == 5 and pictures._dot_size(np.ones((4, 4))) == 1
    spread = pictures._enlarged(values, dot)
    assert (spread == 3).sum() == 25 and (spread == 5).sum() == 25 and spread[18, 448] == 3
    rows, cols = pictures._window_of(values[None])
    assert (rows.start, rows.stop, cols.start, cols.stop) == (18, 23, 432, 479)
