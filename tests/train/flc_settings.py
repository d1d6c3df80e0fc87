"""Settings of few-shot training, changed."""

from __future__ import annotations

import torch

from fastdiffclip.config import Config
from fastdiffclip.runtime import Compute

CPU = Compute(torch.device("cpu"), torch.float32)


def with_flc(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"flc": config.flc.model_copy(update=changes)})
