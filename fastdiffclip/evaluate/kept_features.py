"""Features of pixels, found once for all draws: they share most of their test pixels, and a frozen network."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.train.loop import weights_digest

KEPT = "features of pixels"  # in the memo of a source
SHARE = 8  # of the source's budget that they may take, as one part in so many


class KeptFeatures:
    """Features of the pixels of a source, the first ones that fit in ``limit`` bytes.

    ``key`` stands for all that they depend on besides the windows.
    """

    def __init__(self, key: tuple[Any, ...], limit: int) -> None:
        self.key, self.limit = key, limit
        self._rows: dict[tuple[int, ...], np.ndarray] = {}

    def of(self, classifier: Classifier, source: WindowSource, centres: np.ndarray) -> np.ndarray:
        """``(n, F)`` float32 of pixels ``(n, 3)``."""
        pixels = [tuple(pixel) for pixel in centres.tolist()]
        new = [place for place, pixel in enumerate(pixels) if pixel not in self._rows]
        if pixels and not new:
            return np.stack([self._rows[pixel] for pixel in pixels])
        computed = classifier.features(source.windows(centres[new]))
        found = dict(zip((pixels[place] for place in new), computed, strict=True))
        rows = [self._rows[pixel] if pixel in self._rows else found[pixel] for pixel in pixels]
        for pixel, row in found.items():
            if (len(self._rows) + 1) * row.nbytes > self.limit:
                break
            self._rows[pixel] = row.copy()
        return np.stack(rows) if rows else computed


def features_of_pixels(classifier: Classifier, source: WindowSource, centres: np.ndarray) -> np.ndarray:
    """:meth:`Classifier.features` ``(n, F)`` of the windows around pixels ``(n, 3)``, kept for the next classifier."""
    networks = [getattr(classifier.model, name, None) for name in ("encoder", "restorer")]
    config, where = classifier.config, classifier.where
    key = (
        config.model, config.flc.head, config.logistic, str(where.device), where.precision,
        *(weights_digest(network) for network in networks if network is not None),
    )  # fmt: skip
    kept: KeptFeatures | None = source.memo.get(KEPT)
    if kept is None or kept.key != key:
        kept = source.memo[KEPT] = KeptFeatures(key, source.budget // SHARE)
    return kept.of(classifier, source, centres)
