"""Logistic regression in the text space: a linear map of window features, compared with one vector per class text.

    logits = (L W (x - c) + b) / T,    L L^T = 0.1 I + 0.9 K

x are the features of a window (``window_features``), c their mean over unlabelled windows, K the similarity of the
class texts (``text_similarity``), T the temperature that calibrates the probabilities. Neither side is normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdiffclip.errors import InputDataError
from fastdiffclip.model.encoder import ImageEncoder
from fastdiffclip.model.spectral_denoiser import SpectralDenoiser
from fastdiffclip.model.stem import initialise
from fastdiffclip.model.window_features import FeatureLayout, means_of_windows, unit_means

if TYPE_CHECKING:
    from fastdiffclip.config import Config


class LogisticClassifier(nn.Module):
    """The image side of the head and the frozen encoder or network over bands behind it, where one is read.

    Args:
        channels: name of each modality to its number of channels, in order.
        config: settings.
        seed: of the network's weights, drawn on the CPU; they are usually replaced by pretrained ones.

    Attributes:
        centre: ``(F,)`` mean of the features over unlabelled windows. weight: ``(E, F)``. bias: ``(K,)``.
        temperature: ``(1,)``.
    """

    centre: Tensor
    weight: Tensor
    bias: Tensor
    temperature: Tensor

    def __init__(self, channels: Mapping[str, int], config: Config, seed: int = 0) -> None:
        super().__init__()
        self.layout = FeatureLayout.of(channels, config)
        self.encoder: ImageEncoder | None = None
        if self.layout.reads_tokens:
            self.encoder = ImageEncoder(channels, config.model)
            generator = torch.Generator().manual_seed(seed)
            initialise(self.encoder, generator)
            with torch.no_grad():
                self.encoder.class_tokens.normal_(0.0, 0.02, generator=generator)
            self.encoder.requires_grad_(False)
        self.restorer: SpectralDenoiser | None = None
        if self.layout.restored_sizes:
            self.restorer = SpectralDenoiser(channels, seed).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(self.layout.total))
        self.register_buffer("weight", torch.zeros(0, self.layout.total))
        self.register_buffer("bias", torch.zeros(0))
        self.register_buffer("temperature", torch.ones(1))

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the named tensors over, of any number of classes and dimensions of the text space.

        Raises:
            InputDataError: they belong to other features than those of the settings.
        """
        device = self.centre.device
        if len(tensors["centre"]) != self.layout.total:
            raise InputDataError(
                f"the head was fitted to {len(tensors['centre'])} features and its settings ask for "
                f"{self.layout.total}: an earlier state of fastdiffclip wrote it; train it again"
            )
        for name in ("centre", "weight", "bias", "temperature"):
            setattr(self, name, tensors[name].to(device))
        for prefix, network in (("encoder.", self.encoder), ("restorer.", self.restorer)):
            found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if network is not None and found:
                network.load_state_dict(found)

    def features(self, windows_BLC: Sequence[Tensor]) -> Tensor:
        """``(B, F)`` float32 of clean windows ``(B, L, C_m)`` per modality."""
        means = means_of_windows(windows_BLC, self.layout.sizes)
        tokens = None
        if self.encoder is not None:
            names = self.encoder.names
            tokens = [self.encoder.stems[name](part) for name, part in zip(names, windows_BLC, strict=True)]
        return self.features_of(means, tokens)

    def features_of(self, means_BF: Tensor | None, tokens_BLD: Sequence[Tensor] | None) -> Tensor:
        """:meth:`features` from window means, and from pixels that went through the stems where the encoder is read."""
        assert means_BF is not None
        parts = [unit_means(means_BF, len(self.layout.sizes))]
        if self.encoder is not None:
            assert tokens_BLD is not None
            layers, mean = self.encoder.layer_features_of(tokens_BLD, self.layout.mean_token > 0)
            parts += [part.float() for part in (layers[:, : self.layout.class_tokens], mean)]
        if self.restorer is not None:
            sizes = self.layout.restored_sizes
            restored = [self.restorer.restored(means_BF[:, self.layout.mean_of(size)]) for size in sizes]
            parts.append(unit_means(torch.cat(restored, dim=1), len(sizes)))
        return torch.cat(parts, dim=1)

    def embed_features(self, features_BF: Tensor) -> Tensor:
        """``(B, E)`` in the text space, in float32 under autocast, too."""
        with torch.autocast(features_BF.device.type, enabled=False):
            return (features_BF - self.centre) @ self.weight.T

    def logits(self, image_BE: Tensor, text_KE: Tensor) -> Tensor:
        """``(B, K)``, calibrated."""
        return (image_BE @ text_KE.T + self.bias) / self.temperature
