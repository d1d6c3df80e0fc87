"""Training of the contrastive head: image and text aligned by gradient steps on the shots (eqs. 10 to 16)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiffclip.config import Config, FlcConfig
from fastdiffclip.kernels import contrastive, contrastive_columns
from fastdiffclip.kernels.reference import unit
from fastdiffclip.model.language_classifier import LanguageClassifier
from fastdiffclip.model.text import load_tokenizer, trim_context
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.prepare import FrontEnd
from fastdiffclip.train.engine import Engine
from fastdiffclip.train.loop import EpochOrder
from fastdiffclip.train.umd import UmdResult

FEATURE_BATCH = 64


class FlcStep:
    """Loss and gradients of one optimiser step on a batch of shots.

    Args:
        images: what a shot is: ``(n, L, C_m)`` windows per modality, or the frozen encoder's ``(n, F)`` features.
        labels: ``(n,)`` positions in the prompts.
    """

    def __init__(
        self,
        images: list[Tensor] | Tensor,
        labels: Tensor,
        prompts: Sequence[str],
        config: Config,
        seed: int,
        where: Compute,
        engine: Engine,
    ) -> None:
        self.images, self.labels = images, labels.to(where.device)
        self.config, self.where, self.engine = config, where, engine
        self.tokens, self.end = (part.to(where.device) for part in encoded_prompts(prompts))
        self.batch = min(config.flc.batch, len(labels))
        self.order = EpochOrder(seed, len(labels), self.batch, where.device, engine.world)

    def __call__(self, step: Tensor) -> Tensor:
        """This process's part of the loss of ``step``, a scalar int64 tensor on the device; gradients are added up."""
        chosen, rows, _ = self.order(step)
        images = self.images[chosen] if isinstance(self.images, Tensor) else [part[chosen] for part in self.images]
        with self.engine.micro(last=True):
            with self.where.autocast():
                image, text, scale = self.engine.network(images, self.tokens, self.end)
            labels = self.labels[chosen]
            counts, columns = self._of_all(image, text, labels, scale, rows)
            loss = contrastive(
                image, text, labels, scale, targets=self.config.flc.targets, valid_rows=rows, counts=counts,
                column_logsumexp=columns,
            )  # fmt: skip
            self.engine.backward(loss, last=True)
        return loss.detach()

    @torch.no_grad()
    def _of_all(
        self, image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, rows: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the processes tell each other so that their losses add up to eq. 16 over the whole batch: K numbers."""
        world = self.engine.world
        if world.size == 1:
            return None, None
        real = (torch.arange(len(labels), device=labels.device) < rows).to(torch.float32)
        counts = torch.zeros(len(text), device=labels.device).index_add_(0, labels, real)
        columns = contrastive_columns(image, text, scale, rows)
        return world.sum(counts), torch.logsumexp(world.stack(columns), dim=0)


def encoded_prompts(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of the prompts, as wide as the longest needs, and the place of each one's end."""
    tokens, end = load_tokenizer().encode_batch(prompts)
    return trim_context(tokens, end), end


@torch.no_grad()
def text_embeddings(model: LanguageClassifier, prompts: Sequence[str], where: Compute) -> Tensor:
    """``(K, E)`` float32, L2-normalised."""
    tokens, end = (part.to(where.device) for part in encoded_prompts(prompts))
    with where.autocast():
        return unit(model.embed_text(tokens, end)).cpu()


@torch.no_grad()
def frozen_features(model: LanguageClassifier, windows: Sequence[np.ndarray], where: Compute) -> Tensor:
    """Class features ``(n, M * D)`` float32 of windows ``(n, L, C_m)``, in batches of one constant size."""
    parts = []
    for first in range(0, len(windows[0]), FEATURE_BATCH):
        block = [torch.from_numpy(part[first : first + FEATURE_BATCH]).to(where.device) for part in windows]
        rows = len(block[0])
        block = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, FEATURE_BATCH - rows)) for part in block]
        with where.autocast():
            parts.append(model.encoder.class_features(block)[:rows].float())
    return torch.cat(parts)


def new_classifier(front_end: FrontEnd, config: Config, umd: UmdResult | None, seed: int) -> LanguageClassifier:
    """A classifier with fresh weights, its encoder taken from ``umd`` where one is given."""
    flc = config.flc
    model = LanguageClassifier(
        front_end.channels,
        config.model,
        load_tokenizer().vocab_size,
        flc.temperature,
        flc.max_logit_scale,
        seed,
    )
    if umd is not None:
        model.encoder.load_state_dict(umd.network.state_dict())
    return model


def learning_rate(settings: FlcConfig, epoch: int) -> float:
    """Rate of an epoch: dropped by ``gamma`` at each milestone."""
    return settings.lr * settings.gamma ** sum(epoch / settings.epochs >= m for m in settings.milestones)


def images_of(
    model: LanguageClassifier, windows: Sequence[np.ndarray], config: Config, where: Compute
) -> list[Tensor] | Tensor:
    """What a step reads of the shots' windows ``(n, L, C_m)``, see :class:`FlcStep`."""
    if config.flc.encoder == "frozen":
        return frozen_features(model, windows, where)
    return [torch.from_numpy(part).to(where.device) for part in windows]
