"""A trained classifier as prediction uses it: from windows to class probabilities, nothing random."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiffclip import checkpoint
from fastdiffclip.config import Config
from fastdiffclip.model.language_classifier import LanguageClassifier
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.prepare import FrontEnd
from fastdiffclip.scene.store import ClassInfo

BATCH = 64


@dataclass(frozen=True)
class Classifier:
    """The class whose text embedding goes best with the window's image embedding.

    Every forward pass has the same number of windows (tails are padded), so a window's probabilities do not depend on
    the windows beside it.

    Attributes:
        text_embeddings: ``(K, E)`` float32; see :class:`fastdiffclip.train.flc.FlcResult`.
        classes: K classes in that order.
    """

    model: LanguageClassifier | LogisticClassifier
    text_embeddings: Tensor
    classes: tuple[ClassInfo, ...]
    front_end: FrontEnd
    config: Config
    where: Compute

    @classmethod
    def load(cls, folder: Path, device: str = "auto", precision: str | None = None) -> Classifier:
        """Read a finished run of ``train-flc``. Raises :class:`InputDataError`."""
        run = checkpoint.load_run(Path(folder), "flc")
        where = Compute.choose(device, precision or run.config.precision)
        front_end = FrontEnd.from_parts(*run.front_end_parts())
        weights, flc = run.part("model"), run.config.flc
        model: LanguageClassifier | LogisticClassifier
        if flc.head == "logistic":
            model = LogisticClassifier(front_end.channels, run.config)
            model.take(weights)
        else:
            vocabulary = weights["text.token_embedding.weight"].shape[0]
            model = LanguageClassifier(
                front_end.channels, run.config.model, vocabulary, flc.temperature, flc.max_logit_scale
            )
            model.load_state_dict(weights)
        model.to(where.device).eval()
        classes = tuple(
            ClassInfo(c["value"], c["name"], c["description"], None if c["colour"] is None else tuple(c["colour"]))
            for c in run.manifest["classes"]
        )
        return cls(model, run.tensors["text_embeddings"], classes, front_end, run.config, where)

    def probabilities(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """``(B, K)`` float32 softmax over classes of clean windows ``(B, L, C_m)`` per modality."""
        return self.look(windows)[0]

    @torch.inference_mode()
    def look(self, windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`probabilities` of windows and their embeddings ``(B, E)`` float32, compared with the class texts."""
        texts, parts = self.text_embeddings.to(self.where.device), []
        for block, rows in self._blocks(windows):
            with self.where.autocast():
                image = self.model.embed_features(self.model.features(block))
            found = torch.softmax(self.model.logits(image, texts), dim=1), image.float()
            parts.append((found[0][:rows].cpu().numpy(), found[1][:rows].cpu().numpy()))
        probabilities, embeddings = (np.concatenate(part) for part in zip(*parts, strict=True))
        return probabilities, embeddings

    @torch.inference_mode()
    def features(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """``(B, F)`` float32 of windows: what :meth:`probabilities` are a function of."""
        parts = []
        for block, rows in self._blocks(windows):
            with self.where.autocast():
                parts.append(self.model.features(block)[:rows].float().cpu().numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def probabilities_of(self, features: np.ndarray) -> np.ndarray:
        """:meth:`probabilities`, to the bit, of windows with these :meth:`features`."""
        texts = self.text_embeddings.to(self.where.device)
        found = [self.score(block[0], texts)[:rows].cpu().numpy() for block, rows in self._blocks([features])]
        return np.concatenate(found)

    def _blocks(self, arrays: Sequence[np.ndarray]) -> Iterator[tuple[list[Tensor], int]]:
        """``BATCH`` rows of the arrays at a time, on the device, and how many of them are real; at least one block."""
        for first in range(0, max(1, len(arrays[0])), BATCH):
            block = [torch.from_numpy(part[first : first + BATCH]).to(self.where.device) for part in arrays]
            rows = len(block[0])
            if rows < BATCH:
                block = [torch.cat([part, part.new_zeros(BATCH - rows, *part.shape[1:])]) for part in block]
            yield block, rows

    def score(self, features: Tensor, texts: Tensor) -> Tensor:
        """``(B, K)`` float32 softmax over classes of features ``(B, F)``; ``texts`` (K, E) on their device."""
        with self.where.autocast():
            image = self.model.embed_features(features)
        return torch.softmax(self.model.logits(image, texts), dim=1)

    def digest(self) -> str:
        """sha256 over all that a prediction follows from, but for precision and device."""
        found = hashlib.sha256()
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in self.model.state_dict().items()}
        arrays |= self.front_end.to_arrays() | {"texts": self.text_embeddings.cpu().numpy()}
        for name, array in arrays.items():
            found.update(f"{name} {array.dtype} {array.shape} ".encode())
            found.update(np.ascontiguousarray(array).data)
        settings = self.config.model.model_dump(), self.config.flc.head, self.config.logistic.model_dump()
        rest = (self.front_end.to_meta(), [item.value for item in self.classes], *settings)
        found.update(json.dumps(rest, sort_keys=True, default=str).encode())
        return found.hexdigest()

    def values(self, probabilities: np.ndarray) -> np.ndarray:
        """``(B,)`` int64 class values of the largest probabilities."""
        return np.array([item.value for item in self.classes], dtype=np.int64)[probabilities.argmax(axis=1)]
