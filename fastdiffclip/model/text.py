"""The text tower: byte-level BPE tokens of a prompt; a causal transformer; its end-of-text feature projected.

Zhang et al., "DiffCLIP", eq. 10, without the L2 norm, which the contrastive op applies; the layout is CLIP's
(Radford et al. 2021): pre-norm blocks, MLP ratio 4, feature taken at <|end|>. The wording is in prompts.py.

Shape suffixes: K prompts, L tokens, D width, H heads, E head width (D / H), J joint embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiffclip.errors import InputDataError
from fastdiffclip.files import config_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 77
START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"

_log = logging.getLogger(__name__)


class PromptTokenizer:
    """Byte-level BPE: every text has an encoding, and decoding gives it back.

    ``text`` is the tokenizer's JSON, kept so that a model is saved with the vocabulary it was trained on.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, context: int = CONTEXT) -> None:
        self.text = text
        self.context = context
        self.vocab_size = tokenizer.get_vocab_size()
        self.start_id, self.end_id, self.pad_id = (_special_id(tokenizer, t) for t in (START, END, PAD))
        # A prompt that spells out "<|end|>" is ordinary text, not the end of the prompt.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    def encode_batch(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (K, context) int64, <|start|> text <|end|> <|pad|>..., and the index of <|end|>, (K,).

        A longer prompt is cut to fit, <|end|> kept, and logged as a warning. Raises InputDataError for a text
        that is not valid Unicode (a lone surrogate).
        """
        tokens_KL = torch.full((len(prompts), self.context), self.pad_id, dtype=torch.int64)
        end_K = torch.empty(len(prompts), dtype=torch.int64)
        for k, prompt in enumerate(prompts):
            ids = self._encode(prompt)
            if len(ids) > self.context:
                _log.warning("prompt of %d tokens is cut to %d: %s", len(ids), self.context, prompt)
                ids = [*ids[: self.context - 1], self.end_id]
            tokens_KL[k, : len(ids)] = torch.tensor(ids)
            end_K[k] = len(ids) - 1
        return tokens_KL, end_K

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputDataError(f"the prompt {prompt!r} is not valid Unicode text: {error}") from error
        return self._tokenizer.encode(prompt).ids


def load_tokenizer(text: str | None = None) -> PromptTokenizer:
    """The shipped tokenizer, or the one whose JSON is ``text`` (as stored with a model).

    Raises InputDataError if the text is no tokenizer or lacks a special token.
    """
    from tokenizers import Tokenizer

    text = config_text("tokenizer.json") if text is None else text
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for any fault in the JSON
        raise InputDataError(f"the tokenizer stored with the model is damaged: {error}") from error
    return PromptTokenizer(text, tokenizer)


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise InputDataError(f"the tokenizer stored with the model lacks the special token {token}")
    return number


def trim_context(tokens_KL: Tensor, end_K: Tensor) -> Tensor:
    """The tokens (K, L) up to the last <|end|>: (K, max(end) + 1).

    The transformer is causal, so its result is the same, for fewer tokens. Call it once, outside the training
    step: the new length is read on the host.
    """
    return tokens_KL[:, : int(end_K.max()) + 1].contiguous()


def causal_attention(q_KHLE: Tensor, k_KHLE: Tensor, v_KHLE: Tensor) -> Tensor:
    """Causal attention (K, H, L, E): SDPA on a GPU, written out on a CPU.

    For the few short prompts of a training step torch's CPU kernel is three times slower in bfloat16.
    """
    if q_KHLE.device.type != "cpu":
        return F.scaled_dot_product_attention(q_KHLE, k_KHLE, v_KHLE, is_causal=True)
    L, E = q_KHLE.shape[2:]
    future_LL = torch.ones(L, L, dtype=torch.bool).triu(1)
    scores_KHLL = (q_KHLE * E**-0.5 @ k_KHLE.transpose(2, 3)).masked_fill(future_LL, float("-inf"))
    return torch.softmax(scores_KHLL, dim=-1).to(v_KHLE.dtype) @ v_KHLE


class TextBlock(nn.Module):
    """One pre-norm block: causal self-attention, then an MLP of ratio 4 with GELU; (K, L, D) to (K, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_KLD: Tensor) -> Tensor:
        K, L, D = x_KLD.shape
        qkv_KL3HE = self.qkv(self.norm1(x_KLD)).view(K, L, 3, self.heads, D // self.heads)
        q_KHLE, k_KHLE, v_KHLE = qkv_KL3HE.permute(2, 0, 3, 1, 4).unbind(0)
        a_KHLE = causal_attention(q_KHLE, k_KHLE, v_KHLE)
        x_KLD = x_KLD + self.out(a_KHLE.transpose(1, 2).reshape(K, L, D))
        return x_KLD + self.fc2(F.gelu(self.fc1(self.norm2(x_KLD))))


class TextTransformer(nn.Module):
    """Prompts to embeddings, not normalised (eq. 10 before its norm).

    ``forward(tokens (K, L) int64, end (K,) int64) -> (K, embed_dim)``, L at most ``context``; ``end`` is
    the index of <|end|> in each row. Tokens after it have no influence.
    Raises ValueError if ``width`` is not a multiple of ``heads``, or for more tokens than ``context``.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 128,
        layers: int = 3,
        heads: int = 8,
        context: int = CONTEXT,
        embed_dim: int = 128,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"text width {width} is not a multiple of {heads} heads")
        self.context = context
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_LD = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """CLIP's initialisation. Standard deviations: tokens 0.02, positions 0.01; query, key, value and
        final projection D^-1/2; first MLP layer (2 D)^-1/2; the two layers of a block that write into the
        residual stream D^-1/2 / sqrt(2 layers). Biases 0, norms 1.

        ``generator`` is a CPU generator: the same state gives the same weights. Call it before moving the
        model to another device.
        """
        width = self.position_LD.shape[1]
        residual = width**-0.5 * (2 * max(1, len(self.blocks))) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02, generator=generator)
        nn.init.normal_(self.position_LD, std=0.01, generator=generator)
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            for layer, std in ((block.qkv, width**-0.5), (block.out, residual),
                               (block.fc1, (2 * width) ** -0.5), (block.fc2, residual)):  # fmt: skip
                nn.init.normal_(layer.weight, std=std, generator=generator)
                nn.init.zeros_(layer.bias)
        for norm in self.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()
        nn.init.normal_(self.projection.weight, std=width**-0.5, generator=generator)

    def forward(self, tokens_KL: Tensor, end_K: Tensor) -> Tensor:
        K, L = tokens_KL.shape
        if self.context < L:
            raise ValueError(f"{L} tokens do not fit a context of {self.context}")
        x_KLD = self.token_embedding(tokens_KL) + self.position_LD[:L]
        for block in self.blocks:
            x_KLD = block(x_KLD)
        x_KD = x_KLD[torch.arange(K, device=x_KLD.device), end_K]
        return self.projection(self.final_norm(x_KD))
