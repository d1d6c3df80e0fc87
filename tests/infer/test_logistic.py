"""Maps by the logistic head: equal to single windows, and to the last bit whatever the blocks, the box and threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiffclip.config import Config, LogisticConfig
from fastdiffclip.errors import UsageError
from fastdiffclip.infer import engine
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.finish import none_of
from fastdiffclip.infer.raster import read_class_map
from fastdiffclip.infer.stream import predict
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.model import spectral_denoiser
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import ClassInfo, Scene
from fastdiffclip.train.flc import Shots, train_flc

from .streams import SMALL, raw_probabilities

VIEWS = {
    "means": ("means", "neighbours", "pixel"),
    "tokens": ("means", "tokens"),
    "restored": ("means", "pixel", "restored"),
}


@pytest.fixture(scope="module", params=list(VIEWS))
def classifier(
    request: pytest.FixtureRequest, small_scene: Scene, small_config: Config, small_shots: Shots,
    tmp_path_factory: pytest.TempPathFactory,
) -> Classifier:  # fmt: skip
    logistic = LogisticConfig(views=VIEWS[request.param], sizes=(3, 5), mean_token=0.2, samples=100)  # type: ignore[arg-type]
    config = small_config.model_copy(
        update={
            "flc": small_config.flc.model_copy(update={"head": "logistic", "encoder": "frozen"}),
            "model": small_config.model.model_copy(update={"window": 5}),
            "logistic": logistic,
        }
    )
    out = tmp_path_factory.mktemp("logistic") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectral_denoiser, "READ_MASKS", 2)  # the passes take their time, and are alike
        train_flc([small_scene], small_shots, config, out=out, device="cpu")
        return Classifier.load(out, "cpu", "fp32")


def test_a_map_is_what_single_windows_give(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    predict(small_scene, classifier, tmp_path / "map.tif", probabilities=tmp_path / "p.tif")
    with rasterio.open(tmp_path / "p.tif") as file:
        written = np.moveaxis(file.read(), 0, 2)
    valid = small_scene.read_valid_everywhere()
    assert np.array_equal(np.isnan(written).any(2), ~valid)
    rows, cols = np.nonzero(valid)
    source = WindowSource([small_scene], classifier.front_end, 5, 1 << 30)
    centres = np.stack([np.zeros_like(rows), rows, cols], axis=1).astype(np.int64)
    np.testing.assert_allclose(written[rows, cols], classifier.probabilities(source.windows(centres)), atol=2e-5)


@given(st.integers(1, 24), st.integers(1, 3))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_do_not_show_in_a_bit(
    classifier: Classifier, small_scene: Scene, tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.BATCHES, "cpu", SMALL)
        whole = raw_probabilities(classifier, small_scene, tmp_path_factory.mktemp("whole"), 99, 99)
        assert np.array_equal(
            raw_probabilities(classifier, small_scene, tmp_path_factory.mktemp("cut"), rows, cols), whole
        )


def test_threads_and_boxes_do_not_show_in_a_bit(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    whole = raw_probabilities(classifier, small_scene, tmp_path, 99, 99)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert np.array_equal(raw_probabilities(classifier, small_scene, tmp_path, 1, 1), whole)
    finally:
        torch.set_num_threads(before)
    box = raw_probabilities(classifier, small_scene, tmp_path, 1, 1, bbox="pixels:7,3,19,20")
    assert np.array_equal(box, whole[:, 3:20, 7:19])


def test_without_the_encoder_no_token_is_kept(classifier: Classifier, small_scene: Scene) -> None:
    with engine.open_engine(classifier) as opened:
        region = opened.region(Rect(0, 4, 0, 6))
        assert len(region.pixels) == 2 and len(region.tokens) == (2 if opened.reads_tokens else 0)
        assert opened.pixel_bytes == sum(plane.nbytes for plane in region.planes) // 24
        assert opened.windows == (16 * 121 // 25 if opened.reads_tokens else opened.batches.tile // 4)


def test_other_numbers_have_another_digest(classifier: Classifier) -> None:
    before = classifier.digest()
    model = classifier.model
    with torch.no_grad():
        model.temperature.mul_(2)  # type: ignore[operator, union-attr]
        changed = classifier.digest()
        model.temperature.div_(2)  # type: ignore[operator, union-attr]
    assert before != changed and classifier.digest() == before


def test_pixels_below_a_probability_belong_to_none_of_the_classes(
    classifier: Classifier, small_scene: Scene, tmp_path: Path
) -> None:
    plain = predict(small_scene, classifier, tmp_path / "plain.tif", confidence=tmp_path / "c.tif")
    with rasterio.open(tmp_path / "c.tif") as file:
        sure = file.read(1)
    different = np.unique(sure[~np.isnan(sure)])
    threshold = float(different[len(different) // 2])
    found = predict(
        small_scene, classifier, tmp_path / "map.tif", probabilities=tmp_path / "p.tif", png=tmp_path / "map.png",
        reject=threshold,
    )  # fmt: skip
    expected = np.where(sure < np.float32(threshold), 5, plain.class_map)  # the classes are 1, 2 and 4
    assert np.array_equal(found.class_map, expected) and (expected == 5).any()
    row = found.areas[-1]
    assert (row["value"], row["name"], row["pixels"]) == (5, "none of these", int((expected == 5).sum()))
    assert row["share"] == pytest.approx(100 * row["pixels"] / (expected > 0).sum())
    assert row["hectares"] == pytest.approx(row["pixels"] * 4 / 1e4)
    assert found.nodata_pixels == plain.nodata_pixels and len(plain.areas) == 3
    with rasterio.open(tmp_path / "p.tif") as file:
        assert file.count == 3
    assert read_class_map(tmp_path / "map.tif").names[5] == "none of these"


@pytest.mark.parametrize("reject", [0.0, -0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, reject: float
) -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        predict(small_scene, classifier, tmp_path / "map.tif", reject=reject)


def test_the_value_of_none_of_these() -> None:
    assert none_of([ClassInfo(1, "a"), ClassInfo(7, "b")]).value == 8
    assert none_of([ClassInfo(65535, "a"), ClassInfo(1, "b")]).value == 2
