"""The switches that ablations need: pretraining without noise, classes without words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiffclip.config import Config, UmdConfig
from fastdiffclip.model.prompts import ClassText, resolve_prompts
from fastdiffclip.scene.store import Scene
from fastdiffclip.train import umd
from fastdiffclip.train.umd import train_umd


@pytest.mark.parametrize("noise", [True, False])
def test_without_noise_visible_tokens_are_those_of_the_scene(
    small_scene: Scene, small_config: Config, noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, farthest, latest = umd.visible_noise, 0.0, 0

    def spy(scene: Any, centres: Any, times: Any, schedule: Any, rng: Any, **settings: Any) -> Any:
        nonlocal farthest, latest
        x, ids = plain(scene, centres, times, schedule, rng, **settings)
        clean, same = plain(scene, centres, None, None, rng, **settings)
        assert torch.equal(ids, same)
        rows = int(settings["valid_rows"])
        farthest = max(farthest, float((x - clean)[:rows].abs().max()))
        latest = max(latest, int(times.max()))
        return x, ids

    monkeypatch.setattr(umd, "visible_noise", spy)
    settings = small_config.umd.model_dump() | {"noise": noise, "epochs": 1}
    train_umd([small_scene], small_config.model_copy(update={"umd": UmdConfig(**settings)}), device="cpu")
    assert (farthest > 1 and latest > 100) if noise else (farthest == 0 and latest == 0)


def test_classes_without_words() -> None:
    classes = [ClassText(4, "Trees", "leafy"), ClassText(11, "Roof", "")]
    assert resolve_prompts("none", classes, ("hsi",)) == ["4", "11"]
