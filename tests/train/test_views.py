"""Views of the features: scaled alike, found without labels, left out where the scenes do not allow them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.config import Config, LogisticConfig, ModelConfig
from fastdiffclip.errors import InputDataError
from fastdiffclip.model.window_features import FeatureLayout
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter
from fastdiffclip.train.views import FAR, NEAR, FeatureStatistics, View, make_views, sampled_windows

CHANNELS = {"hsi": 4, "lidar": 1}
VIEWS = ("means", "neighbours", "components", "pixel", "tokens")


def statistics(
    views: tuple[str, ...] = VIEWS, seed: int = 0, pairs: int = 60
) -> tuple[np.ndarray, np.ndarray, FeatureLayout, FeatureStatistics]:
    settings = LogisticConfig(views=views, class_tokens=0.5, mean_token=0.25)  # type: ignore[arg-type]
    config = Config(model=ModelConfig(window=5, width=8, depth=2, heads=2), logistic=settings)
    layout = FeatureLayout.of(CHANNELS, config)
    random = np.random.default_rng(seed)
    spread = np.geomspace(1, 30, layout.total)
    features = 3.0 + random.standard_normal((200, layout.total)) * spread
    differences = random.standard_normal((pairs, layout.means)) * np.geomspace(1, 0.1, layout.means)
    return features, differences, layout, make_views(features, differences, layout, config, 2)


def test_every_view_has_mean_squared_length_one() -> None:
    features, _, _, found = statistics()
    assert tuple(found.views) == VIEWS
    for view in found.views.values():
        assert ((view.rows(features - found.centre)) ** 2).sum(1).mean() == pytest.approx(1.0)


def test_weights_are_pulled_back_to_the_features() -> None:
    features, _, layout, found = statistics()
    centred = features - found.centre
    for view in found.views.values():
        rows = view.rows(centred)
        weight = np.random.default_rng(1).standard_normal((3, rows.shape[1]))
        np.testing.assert_allclose(centred @ view.pull(weight, layout.total).T, rows @ weight.T, atol=1e-10)


def test_shares_of_variance_beside_the_means() -> None:
    features, _, layout, found = statistics()
    view = found.views["tokens"]
    variance = view.rows(features - found.centre) ** 2
    count = 2 * layout.channels  # the means of both sizes
    means, tokens, mean = (
        float(variance[:, part].sum(1).mean())
        for part in (slice(count), slice(count, count + 32), slice(count + 32, None))
    )
    assert tokens / means == pytest.approx(0.5) and mean / means == pytest.approx(0.25)
    modality = (np.arange(32) // 8) % 2  # of the class tokens, layer by layer
    shares = [float(variance[:, count : count + 32][:, modality == m].sum(1).mean()) for m in (0, 1)]
    assert shares[0] == pytest.approx(shares[1])


def test_directions_in_which_neighbours_differ_weigh_less() -> None:
    _, differences, layout, found = statistics()
    view = found.views["neighbours"]
    whitened = np.linalg.norm(view.matrix, axis=1)  # of each feature, the neighbours differ most in the first
    assert whitened[: layout.channels].mean() < whitened[-layout.channels :].mean()
    assert len(differences) >= 2 * 10


def test_without_neighbours_their_view_is_left_out() -> None:
    assert tuple(statistics(pairs=3)[3].views) == ("means", "components", "pixel", "tokens")
    assert tuple(statistics(("neighbours",), pairs=3)[3].views) == ("means",)


def test_features_that_are_all_alike_stay_finite() -> None:
    config = Config(model=ModelConfig(window=5), logistic=LogisticConfig(views=("means", "components", "pixel")))
    layout = FeatureLayout.of(CHANNELS, config)
    found = make_views(np.ones((20, layout.total)), np.zeros((0, layout.means)), layout, config, 2)
    for view in found.views.values():
        assert np.isfinite(view.matrix).all()


def test_sampled_windows_and_their_neighbours(small_scene: Scene) -> None:
    drawn, ours, theirs = sampled_windows([small_scene, small_scene], 300, 3)
    again = sampled_windows([small_scene, small_scene], 300, 3)
    assert all(np.array_equal(a, b) for a, b in zip((drawn, ours, theirs), again, strict=True))
    valid = small_scene.read_valid_everywhere()
    for part in (drawn, ours, theirs):
        assert valid[part[:, 1], part[:, 2]].all()
    assert len(drawn) == 300 and len(ours) == len(theirs) > 250
    distance = np.abs(ours - theirs)
    assert (distance[:, 0] == 0).all()
    assert distance[:, 1:].max(1).min() >= NEAR and distance[:, 1:].max(1).max() <= FAR


def test_scenes_without_a_valid_pixel(tmp_path: Path) -> None:
    with SceneWriter(tmp_path / "empty.zarr", height=4, width=4) as writer:
        writer.add_modality("hsi", np.full((4, 4, 3), np.nan, np.float32), bands=3, dtype="float32")
    with pytest.raises(InputDataError, match="no pixel of the scenes is valid"):
        sampled_windows([open_scene(tmp_path / "empty.zarr")], 10, 3)


def test_a_diagonal_view_is_its_matrix() -> None:
    diagonal, whole = View(np.array([0, 2]), np.array([2.0, 3.0])), View(np.array([0, 2]), np.diag([2.0, 3.0]))
    rows = np.arange(9.0).reshape(3, 3)
    assert np.array_equal(diagonal.rows(rows), whole.rows(rows))
    assert np.array_equal(diagonal.pull(np.ones((1, 2)), 3), whole.pull(np.ones((1, 2)), 3))
