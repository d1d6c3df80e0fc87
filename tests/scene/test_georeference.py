"""Places on the map and in pixels, points that a projection has no answer for among them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS

from fastdiffclip.scene import georeference
from fastdiffclip.scene.georeference import project, to_map, to_pixels

UTM, DEGREES = CRS.from_epsg(32617), CRS.from_epsg(4326)
NOWHERE = 1e30


@given(st.integers(1, 40), st.data())
def test_places_and_pixels(count: int, data: st.DataObject) -> None:
    transform = data.draw(st.sampled_from([(2.0, 0.0, 5e5, 0.0, -2.0, 4e6), (1.5, 0.5, 10.0, -0.5, 1.5, -3.0)]))
    columns, rows = np.random.default_rng(count).uniform(-50, 50, (2, count))
    back = to_pixels(transform, *to_map(transform, columns, rows))
    np.testing.assert_allclose(back, (columns, rows), rtol=0, atol=1e-8)  # 4e6 in float64 leaves nine digits behind
    assert not np.isfinite(to_pixels(transform, np.array([np.inf]), np.array([np.inf]))).any()


@pytest.mark.parametrize("bad", [[], [0], [7], [3, 4, 90]])
def test_points_without_an_answer_cost_no_other(bad: list[int]) -> None:
    xs, ys = np.linspace(4e5, 6e5, 100), np.linspace(4.0e6, 4.2e6, 100)
    whole = project(UTM, DEGREES, xs, ys)
    xs[bad] = NOWHERE
    found = np.array(project(UTM, DEGREES, xs, ys))
    good = np.setdiff1d(np.arange(100), bad)
    np.testing.assert_array_equal(found[:, good], np.array(whole)[:, good])
    assert np.isinf(found[:, bad]).all() and np.isfinite(whole).all()


def test_a_cloud_without_an_answer_takes_a_bounded_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from rasterio import warp

    calls = 0
    plain = warp.transform

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return plain(*arguments)

    monkeypatch.setattr(warp, "transform", counted)
    nowhere = np.full(20_000, NOWHERE)
    assert np.isinf(project(UTM, DEGREES, nowhere, nowhere)).all()
    assert calls <= 2 * georeference._FAILURES + 1
