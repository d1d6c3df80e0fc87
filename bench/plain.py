"""Both stages and prediction as plain eager torch code does them: the yardstick of the bench.

Windows are built in a loop on the host, noise is added to whole windows, everything is projected before anything is
masked, one modality goes after the other, attention is materialised, every text is encoded for every sample. It uses
the parameters of the engine's models, so on the same masks and noise it gives the same loss.

Shape suffixes: B windows, P side of a window, L = P * P tokens, V visible tokens, C channels, D width, H heads,
E head width, N samples, T text tokens, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiffclip.kernels import FlatScene, philox

PREDICT_BATCH = 128
Draw = Callable[[int, int, int], tuple[Tensor, Tensor]]
"""``draw(modality, rows, channels)``: visible ids (B, V) int64 ascending, and noise (B, L, C) for whole windows."""


@dataclass(frozen=True)
class Cube:
    """One modality of one scene, normalised as a whole and padded by the radius of the window, edges repeated.

    Attributes:
        values: ``(H + 2 r, W + 2 r, C)`` float32. valid: ``(H + 2 r, W + 2 r)`` bool.
    """

    values: np.ndarray
    valid: np.ndarray
    window: int


def cubes(flat: FlatScene, window: int) -> list[Cube]:
    """The scenes of one flat modality as cubes, on the host."""
    stored = flat.pixels.cpu()
    pixels = (
        stored.view(torch.int16).numpy().view(np.uint16) if stored.dtype == torch.uint16 else stored.float().numpy()
    )
    scale, offset = flat.scale.cpu().numpy(), flat.offset.cpu().numpy()
    valid = np.ones(len(pixels), bool)
    if flat.valid is not None:
        valid = np.unpackbits(flat.valid.cpu().numpy(), count=len(pixels), bitorder="little").astype(bool)
    found, reach = [], ((window // 2,) * 2,) * 2
    for first, height, width in flat.extents.tolist():
        part = slice(first, first + height * width)
        values = (pixels[part].astype(np.float32) * scale + offset).reshape(height, width, -1)
        known = np.pad(valid[part].reshape(height, width), reach, mode="edge")
        found.append(Cube(np.pad(values, (*reach, (0, 0)), mode="edge"), known, window))
    return found


def build_windows(scenes: Sequence[Cube], centres: np.ndarray) -> tuple[Tensor, Tensor]:
    """Windows ``(B, L, C)`` float32 and their token validity ``(B, L)``, one at a time."""
    values, valid = [], []
    for number, row, col in centres.tolist():
        cube = scenes[number]
        area = (slice(row, row + cube.window), slice(col, col + cube.window))
        window, known, radius = cube.values[area], cube.valid[area], cube.window // 2
        if not known.all():
            window = np.where(known[:, :, None], window, window[radius, radius])
        values.append(torch.from_numpy(window.reshape(-1, window.shape[2]).copy()))
        valid.append(torch.from_numpy(known.reshape(-1).copy()))
    return torch.stack(values), torch.stack(valid)


def torch_draw(tokens: int, visible: int, device: torch.device) -> Draw:
    """Masks and noise from torch's own generator, as plain code takes them."""

    def draw(modality: int, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        order = torch.rand(rows, tokens, device=device).argsort(dim=1)[:, :visible]
        return order.sort(dim=1).values, torch.randn(rows, tokens, channels, device=device)

    return draw


def shared_draw(rng: Tensor, tokens: int, visible: int, device: torch.device) -> Draw:
    """The masks and noise that the engine draws at state ``rng`` (on the CPU)."""

    def draw(modality: int, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        ids = philox.visible_ids(rng, rows, tokens, visible, modality)
        every = torch.arange(tokens).expand(rows, tokens)
        return ids.to(device), philox.normals(rng, every, channels, modality).to(device)

    return draw


def add_noise(window_BLC: Tensor, eps_BLC: Tensor, mix_B2: Tensor) -> Tensor:
    """``x_t`` of whole windows, ``(B, L, C)``; ``mix``: sqrt(abar_t) and sqrt(1 - abar_t) of each."""
    return mix_B2[:, 0, None, None] * window_BLC + mix_B2[:, 1, None, None] * eps_BLC


def take_tokens(x_BLC: Tensor, ids_BV: Tensor) -> Tensor:
    """The tokens ``ids`` of each window, ``(B, V, C)``."""
    return torch.gather(x_BLC, 1, ids_BV[:, :, None].expand(-1, -1, x_BLC.shape[2]))


def attend(q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(E)) v with the scores in memory; (B, L, H, E) in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BLHE, v_BLHE))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def project(layer: Any, x: Tensor) -> Tensor:
    """A linear layer as torch computes it; the model's own has an implementation for some processors."""
    return F.linear(x, layer.weight, layer.bias)


def normalise(layer: Any, x: Tensor) -> Tensor:
    """A LayerNorm as torch computes it; the model's own adds to the residual stream in the same pass."""
    return F.layer_norm(x, layer.weight.shape, layer.weight, layer.bias, layer.eps)


def run_stem(stem: Any, x_BLC: Tensor) -> Tensor:
    """Pixels of one modality to tokens, ``(B, L, D)``."""
    projected = project(stem.token, F.gelu(project(stem.second, F.gelu(project(stem.first, x_BLC)))))
    normed: Tensor = stem.norm(projected)
    return normed


def run_block(block: Any, x_BLD: Tensor) -> Tensor:
    """One transformer block of the image side."""
    attention, (batch, length, width) = block.attention, x_BLD.shape
    qkv = project(attention.qkv, normalise(block.norm1, x_BLD))
    q, k, v = qkv.view(batch, length, 3, attention.heads, width // attention.heads).unbind(2)
    x_BLD = x_BLD + project(attention.out, attend(q, k, v).flatten(2))
    return x_BLD + project(block.contract, F.gelu(project(block.expand, normalise(block.norm2, x_BLD))))


def encode(encoder: Any, m: int, x_BLC: Tensor, ids_BV: Tensor | None, timestep_B: Tensor) -> Tensor:
    """One modality through the encoder, ``(B, 1 + V, D)``: all tokens are projected, then the visible ones taken."""
    tokens = run_stem(encoder.stems[encoder.names[m]], x_BLC) + encoder.positions[1:]
    if ids_BV is not None:
        tokens = take_tokens(tokens, ids_BV)
    head_BD = encoder.class_tokens[m] + encoder.timestep(timestep_B) + encoder.positions[0]
    x = torch.cat([head_BD[:, None], tokens], dim=1)
    for block in encoder.blocks:
        x = run_block(block, x)
    return normalise(encoder.norm, x)


def decode(decoder: Any, encoded_BVD: Tensor, ids_BV: Tensor) -> Tensor:
    """Restored windows ``(B, L, C)``."""
    tokens = project(decoder.embed, encoded_BVD)
    full = decoder.mask_token.to(tokens.dtype).expand(len(tokens), len(decoder.positions) - 1, -1)
    full = full.scatter(1, ids_BV[:, :, None].expand(-1, -1, tokens.shape[2]), tokens[:, 1:])
    x = torch.cat([tokens[:, :1], full], dim=1) + decoder.positions
    for block in decoder.blocks:
        x = run_block(block, x)
    return project(decoder.restore, normalise(decoder.norm, x[:, 1:]))


def restoration_loss(
    restored_BLC: Tensor, window_BLC: Tensor, valid_BL: Tensor, ids_BV: Tensor, weights: tuple[float, float]
) -> Tensor:
    """Eq. 9 of one modality, averaged over windows; ``weights`` of the masked and of the visible tokens."""
    error_BL = (restored_BLC - window_BLC).square().mean(dim=2)
    seen_BL = torch.zeros_like(valid_BL).scatter(1, ids_BV, True)
    share = ids_BV.shape[1] / valid_BL.shape[1]
    loss_B = torch.zeros_like(error_BL[:, 0])
    for weight, part, chosen_BL in (
        (weights[0], 1 - share, ~seen_BL & valid_BL),
        (weights[1], share, seen_BL & valid_BL),
    ):
        mean_B = (error_BL * chosen_BL).sum(1) / chosen_BL.sum(1).clamp(min=1)
        loss_B = loss_B + weight * part * mean_B
    return loss_B.mean()


@dataclass(frozen=True)
class PlainUmd:
    """UMD's loss on a batch of centres.

    Attributes:
        model: :class:`fastdiffclip.model.mask_diffusion.MaskDiffusion`, whose parameters are used.
        scenes: per modality the cubes of all scenes. schedule: ``(T, 2)``, sqrt(abar) and sqrt(1 - abar).
        weights: of the masked and of the visible tokens.
    """

    model: nn.Module
    scenes: Sequence[Sequence[Cube]]
    schedule: Tensor
    weights: tuple[float, float] = (1.0, 1.0)

    def loss(self, centres: np.ndarray, timestep_B: Tensor, draw: Draw) -> Tensor:
        """Scalar loss of windows at ``centres`` (B, 3) and ``timestep`` (B,), on the model's device."""
        model: Any = self.model
        device, losses = self.schedule.device, []
        for m, name in enumerate(model.encoder.names):
            window, valid = (part.to(device) for part in build_windows(self.scenes[m], centres))
            ids, eps = draw(m, len(centres), window.shape[2])
            noisy = add_noise(window, eps, self.schedule[timestep_B])
            encoded = encode(model.encoder, m, noisy, ids, timestep_B)
            restored = decode(model.decoders[name], encoded, ids)
            losses.append(restoration_loss(restored, window, valid, ids, self.weights))
        return torch.stack(losses).sum()


def embed_images(model: Any, scenes: Sequence[Sequence[Cube]], centres: np.ndarray, device: torch.device) -> Tensor:
    """``(B, embedding)`` of clean windows, not normalised: every token through every block."""
    zero_B = torch.zeros(len(centres), dtype=torch.int64, device=device)
    features = []
    for m in range(len(scenes)):
        window = build_windows(scenes[m], centres)[0].to(device)
        features.append(encode(model.encoder, m, window, None, zero_B)[:, 0])
    embedded: Tensor = model.head(torch.cat(features, dim=1))
    return embedded


def embed_texts(text: Any, tokens_NT: Tensor, end_N: Tensor) -> Tensor:
    """``(N, embedding)`` of tokenised prompts over the whole context, not normalised."""
    x = text.token_embedding(tokens_NT) + text.position_LD[: tokens_NT.shape[1]]
    for block in text.blocks:
        count, length, width = x.shape
        qkv = block.qkv(block.norm1(x)).view(count, length, 3, block.heads, width // block.heads)
        q, k, v = qkv.unbind(2)
        x = x + block.out(attend(q, k, v, causal=True).flatten(2))
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
    x = x[torch.arange(len(x), device=x.device), end_N]
    embedded: Tensor = text.projection(text.final_norm(x))
    return embedded


def pairwise_loss(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Eq. 16 as written: N images, N texts, the N x N logits in memory, both directions."""
    scores_NN = logit_scale * F.normalize(image_ND, dim=1) @ F.normalize(text_ND, dim=1).T
    own_N = torch.arange(len(scores_NN), device=scores_NN.device)
    return 0.5 * (F.cross_entropy(scores_NN, own_N) + F.cross_entropy(scores_NN.T, own_N))


@dataclass(frozen=True)
class PlainFlc:
    """FLC's loss on a batch of labelled windows, and prediction; parameters of a ``LanguageClassifier``.

    Attributes:
        tokens: ``(K, context)`` prompts of the classes, not trimmed. end: ``(K,)``.
    """

    model: nn.Module
    scenes: Sequence[Sequence[Cube]]
    tokens: Tensor
    end: Tensor

    def loss(self, centres: np.ndarray, labels_N: Tensor) -> Tensor:
        """Scalar loss (eq. 16) of windows at ``centres`` (N, 3) with class numbers ``labels`` (N,)."""
        model: Any = self.model
        image = embed_images(model, self.scenes, centres, self.tokens.device)
        text = embed_texts(model.text, self.tokens[labels_N], self.end[labels_N])
        return pairwise_loss(image, text, model.logit_scale)

    @torch.no_grad()
    def predict(self, centres: np.ndarray) -> np.ndarray:
        """``(n, K)`` float32 class probabilities of the windows at ``centres``, 128 at a time."""
        model: Any = self.model
        parts = []
        for first in range(0, len(centres), PREDICT_BATCH):
            image = embed_images(model, self.scenes, centres[first : first + PREDICT_BATCH], self.tokens.device)
            text = embed_texts(model.text, self.tokens, self.end)
            scores = model.logit_scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
            parts.append(torch.softmax(scores, dim=1).cpu().numpy())
        return np.concatenate(parts)
