"""The reverse process with a trained model."""

from __future__ import annotations

import numpy as np
import torch

from fastdiffclip.config import Config
from fastdiffclip.infer.restore import restore_windows
from fastdiffclip.scene.prepare import prepare_scenes
from fastdiffclip.scene.store import Scene
from fastdiffclip.scene.windows import gather_windows
from fastdiffclip.train.data import flatten
from fastdiffclip.train.umd import train_umd


def test_a_trained_model_restores_better_than_the_mean(small_scene: Scene, small_config: Config) -> None:
    """In the masked tokens, from a moderately noised window; the mean of a standardised band is 0."""
    umd = small_config.umd.model_copy(update={"epochs": 120, "samples": 64, "batch": 32, "lr": 5e-3, "micro_batch": 32})
    config = small_config.model_copy(update={"umd": umd})
    trained = train_umd([small_scene], config, device="cpu")
    prepared = prepare_scenes([small_scene], trained.front_end)
    flat = flatten(prepared, torch.device("cpu"))
    rows_cols = np.argwhere(small_scene.read_valid_everywhere())[::11]
    centres = torch.from_numpy(np.pad(rows_cols, ((0, 0), (1, 0))))
    result = restore_windows(trained.model, flat, centres, config, start=200, steps=20)
    again = restore_windows(trained.model, flat, centres, config, start=200, steps=20)
    for m, modality in enumerate(prepared.modalities.values()):
        truth = torch.from_numpy(gather_windows(modality, prepared.extents, centres.numpy(), 3))
        assert torch.equal(result.clean[m], truth) and torch.equal(result.restored[m], again.restored[m])
        masked = result.noised[m].isnan().all(2)
        assert masked.sum() == len(centres) * 6 and torch.isfinite(result.restored[m]).all()
        error = (result.restored[m] - truth).square()[masked].mean()
        mean = (truth - truth.mean((0, 1))).square()[masked].mean()
        assert error < 0.6 * mean, (m, float(error), float(mean))
        seen = (result.noised[m] - truth)[~masked]
        assert 0.1 < seen.std() < 1.0  # noise of timestep 200
