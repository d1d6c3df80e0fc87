"""The model of few-shot language-driven classification: image tower, text tower, temperature (eqs. 10 and 11)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdiffclip.kernels.reference import unit
from fastdiffclip.model.encoder import ImageEncoder
from fastdiffclip.model.stem import initialise
from fastdiffclip.model.text import TextTransformer

if TYPE_CHECKING:
    from fastdiffclip.config import ModelConfig


class LanguageClassifier(nn.Module):
    """Image embedding of windows and text embedding of classes in one space.

    Args:
        channels: name of each modality to its number of channels, in order.
        config: sizes.
        vocabulary: number of tokens of the tokenizer.
        temperature: the logit scale starts at its reciprocal.
        max_logit_scale: upper bound of the logit scale.
        seed: of the initial weights, drawn on the CPU.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        config: ModelConfig,
        vocabulary: int,
        temperature: float = 0.07,
        max_logit_scale: float = 100.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = ImageEncoder(channels, config)
        self.head = nn.Linear(len(channels) * config.width, config.embedding, bias=False)
        self.max_log_scale = math.log(max_logit_scale)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1.0 / temperature)]))  # DeepSpeed takes no scalars
        generator = torch.Generator().manual_seed(seed)
        initialise(self, generator)
        with torch.no_grad():
            self.encoder.class_tokens.normal_(0.0, 0.02, generator=generator)
        self.text = TextTransformer(
            vocabulary,
            width=config.text_width,
            layers=config.text_depth,
            heads=config.text_heads,
            embed_dim=config.embedding,
        )
        self.text.init_weights(generator)

    @property
    def logit_scale(self) -> Tensor:
        """1 / temperature, at most its bound: scalar tensor."""
        return self.log_scale[0].clamp(max=self.max_log_scale).exp()

    def forward(
        self, images: Sequence[Tensor] | Tensor, tokens_KT: Tensor, end_K: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All that the loss needs: image embeddings, text embeddings, logit scale.

        Args:
            images: clean windows ``(B, L, C_m)`` per modality, or the encoder's class features ``(B, M * D)``.
        """
        image = self.embed_features(images) if isinstance(images, Tensor) else self.embed_image(images)
        return image, self.embed_text(tokens_KT, end_K), self.logit_scale

    def embed_image(self, x_BLC: Sequence[Tensor]) -> Tensor:
        """``(B, embedding)`` of clean windows ``(B, L, C_m)`` per modality, not yet normalised."""
        return self.embed_features(self.encoder.class_features(x_BLC))

    def features(self, x_BLC: Sequence[Tensor]) -> Tensor:
        """The encoder's class features ``(B, M * D)`` of clean windows ``(B, L, C_m)`` per modality."""
        return self.encoder.class_features(x_BLC)

    def features_of(self, means_BF: Tensor | None, tokens_BLD: Sequence[Tensor] | None) -> Tensor:
        """:meth:`features` of windows whose pixels went through the stems already; it reads no window means."""
        assert means_BF is None and tokens_BLD is not None
        return self.encoder.class_features_of(tokens_BLD)

    def embed_features(self, features: Tensor) -> Tensor:
        """``(B, embedding)`` of the encoder's class features ``(B, M * D)``, not yet normalised."""
        embedded: Tensor = self.head(features)
        return embedded

    def logits(self, image_BE: Tensor, text_KE: Tensor) -> Tensor:
        """``(B, K)``: scaled cosine between image embeddings and L2-normalised text embeddings."""
        return self.logit_scale * unit(image_BE) @ text_KE.T

    def embed_text(self, tokens_KT: Tensor, end_K: Tensor) -> Tensor:
        """``(K, embedding)`` of tokenised prompts, not yet normalised."""
        embedded: Tensor = self.text(tokens_KT, end_K)
        return embedded
