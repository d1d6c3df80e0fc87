"""Methods on equal terms: ours and the baselines, trained on the same shots, asked about the same pixels."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastdiffclip.config import Config
from fastdiffclip.evaluate.baselines import centre_and_mean_features, predict_baseline, predict_linear
from fastdiffclip.evaluate.kept_features import features_of_pixels
from fastdiffclip.evaluate.metrics import Scores, score
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.runtime import Compute, memory_budget
from fastdiffclip.scene.labelled import Labelled
from fastdiffclip.scene.prepare import FrontEnd, fit_front_end
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.splits import Split
from fastdiffclip.scene.store import Scene
from fastdiffclip.scene.windows import require_whole_windows
from fastdiffclip.train.flc import FlcResult, Shots, class_prompts, train_flc
from fastdiffclip.train.umd import UmdResult

CLASSICAL = ("svm", "extratrees", "1nn")
BASELINES = (*CLASSICAL, "linear", "clip")
OURS = "fastdiffclip"
LINEAR_WINDOW = 5
PART = 4096  # windows held at once, a multiple of every batch
SOURCES = 3  # prepared scenes held at once


class Predicted(NamedTuple):
    """What a method says of n pixels.

    ``values`` (n,) int64 class values. ``ranking`` (n,) float64 where there are two classes and the method can
    rank them: the larger, the more surely the larger class value. ``confidence`` (n,) float64 in 0 to 1, the
    probability that the method gives to ``values``; None for a method without probabilities.
    """

    values: np.ndarray
    ranking: np.ndarray | None = None
    confidence: np.ndarray | None = None

    def to_entry(self) -> dict[str, Any]:
        """JSON-able, for a journal."""
        named = {"ranking": self.ranking, "confidence": self.confidence}
        lists = {name: None if part is None else part.tolist() for name, part in named.items()}
        return {"predicted": self.values.tolist(), **lists}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Predicted:
        """Read :meth:`to_entry` back."""
        ranking, confidence = (
            None if entry.get(name) is None else np.array(entry[name], np.float64) for name in ("ranking", "confidence")
        )
        return cls(np.array(entry["predicted"], np.int64), ranking, confidence)


class WindowSources:
    """Windows of scenes by front end and side; the few that were asked for last are kept.

    Args:
        scenes: opened scenes.
        budget: bytes that the prepared scenes of one front end may take; see :class:`WindowSource`.
    """

    def __init__(self, scenes: Sequence[Scene], budget: int) -> None:
        self.scenes, self.budget = list(scenes), budget
        self._fitted: dict[tuple[str, int], FrontEnd] = {}
        self._made: OrderedDict[tuple[str, int], WindowSource] = OrderedDict()

    def fitted(self, kind: str, components: int, window: int) -> WindowSource:
        """Windows behind a front end that is fitted to the scenes."""
        key = (kind, components if kind == "mnf" else 0)
        if key not in self._fitted:
            self._fitted[key] = fit_front_end(kind, self.scenes, components)
        return self.behind(self._fitted[key], window)

    def behind(self, front_end: FrontEnd, window: int) -> WindowSource:
        """Windows behind a given front end."""
        key = (_digest(front_end), window)
        if key not in self._made:
            self._made[key] = WindowSource(self.scenes, front_end, window, self.budget)
            while len(self._made) > SOURCES:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]


def _digest(front_end: FrontEnd) -> str:
    found = hashlib.sha256(json.dumps(front_end.to_meta(), sort_keys=True, default=str).encode())
    for name, array in sorted(front_end.to_arrays().items()):
        found.update(f"{name} {array.shape} {array.dtype} ".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


class Contest:
    """Scenes, labels, front ends and pretrained weights that all runs of an evaluation share."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        labelled: Labelled,
        config: Config,
        umd: UmdResult | None,
        prompts: str | None,
        device: str,
        sources: WindowSources | None = None,
    ) -> None:
        self.scenes, self.labelled, self.umd = list(scenes), labelled, umd
        self.config, self.device = config, device
        self.sources = sources or WindowSources(scenes, memory_budget(config.memory_gib))
        self.prompts = class_prompts(scenes, labelled, prompts)
        self.plain_prompts = class_prompts(scenes, labelled, "p1")

    def run(self, method: str, features: str, split: Split, seed: int) -> Predicted:
        """What a method, trained on the split's shots, says of its test pixels."""
        if method == OURS:
            return self._ours(split, seed)
        if method == "clip":
            return self._clip(split, seed)
        if method == "linear":
            source = self.sources.fitted("mnf", self.config.components, LINEAR_WINDOW)
            train, found = self._named(source, split.train), []
            for part in in_parts(split.test):
                found.append(predict_linear(train, split.train_labels, self._named(source, part)))
            values, probabilities = (np.concatenate([part[place] for part in found]) for place in (0, 1))
            return Predicted(values, log_odds(probabilities, found[0][2].tolist()), winning(probabilities))
        rows = [self._rows(part, features) for part in (split.train, split.test)]
        return Predicted(*predict_baseline(method, rows[0], split.train_labels, rows[1], seed=seed))

    def windows(self) -> WindowSource:
        """Windows as our method sees them: through the front end of the pretrained model, or a newly fitted one."""
        config = self.config
        require_whole_windows(self.scenes, config.model.window)
        if self.umd is not None:
            return self.sources.behind(self.umd.front_end, config.model.window)
        return self.sources.fitted(config.prepare, config.components, config.model.window)

    def _rows(self, centres: np.ndarray, features: str) -> np.ndarray:
        source = self.sources.fitted("standard", self.config.components, self.config.model.window)
        return classical_features(source, centres, features)

    @staticmethod
    def _named(source: WindowSource, centres: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(source.front_end.channels, source.windows(centres), strict=True))

    def train(self, split: Split, seed: int) -> FlcResult:
        """Our classifier, trained on the split's shots."""
        return self._train(split, self.prompts, self.config, self.umd, seed)

    def _ours(self, split: Split, seed: int) -> Predicted:
        return classify_centres(self.train(split, seed), self.windows(), split.test, self.device)

    def _clip(self, split: Split, seed: int) -> Predicted:
        """Image and text towers from scratch, plain class names: what pretraining and prompts are compared with."""
        flc = self.config.flc.model_copy(update={"encoder": "finetune", "head": "contrastive"})
        config = self.config.model_copy(update={"flc": flc})
        result = self._train(split, self.plain_prompts, config, None, seed)
        return classify_centres(result, self.windows(), split.test, self.device)

    def _train(
        self, split: Split, prompts: Sequence[str], config: Config, umd: UmdResult | None, seed: int
    ) -> FlcResult:
        shots = Shots(split.train, split.train_labels, self.labelled.classes, tuple(prompts))
        return train_flc(self.scenes, shots, config, umd=umd, source=self.windows(), seed=seed, device=self.device)


def classical_features(source: WindowSource, centres: np.ndarray, features: str) -> np.ndarray:
    """``pixel`` or ``window`` features (n, F) of :func:`centre_and_mean_features` of pixels (n, 3)."""
    names = source.front_end.channels
    parts = [
        centre_and_mean_features(dict(zip(names, source.windows(part), strict=True)))[features]
        for part in in_parts(centres)
    ]
    return np.concatenate(parts)


def as_classifier(result: FlcResult, device: str = "auto") -> Classifier:
    """A trained model as prediction uses it."""
    where = Compute.choose(device, result.config.precision)
    return Classifier(result.model, result.text_embeddings, result.classes, result.front_end, result.config, where)


def classify_centres(result: FlcResult, source: WindowSource, centres: np.ndarray, device: str = "auto") -> Predicted:
    """What a trained model says of pixels ``(n, 3)`` (scene, row, column), their windows taken from ``source``."""
    classifier = as_classifier(result, device)
    parts = (features_of_pixels(classifier, source, part) for part in in_parts(centres))
    probabilities = np.concatenate([classifier.probabilities_of(features) for features in parts])
    ranking = log_odds(probabilities, [item.value for item in result.classes])
    return Predicted(classifier.values(probabilities), ranking, winning(probabilities))


def winning(probabilities: np.ndarray) -> np.ndarray:
    """The largest probability (n,) float64 of each row (n, K), to the four digits that a journal keeps."""
    return np.round(probabilities.max(axis=1).astype(np.float64), 4)


def log_odds(probabilities: np.ndarray, values: Sequence[int]) -> np.ndarray | None:
    """Ranking (n,) float64 of (n, 2) probabilities of two class values; None for any other number of classes.

    The ratio still tells apart what is so sure that the larger probability is rounded to 1.
    """
    if len(values) != 2:
        return None
    logarithms = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float64).tiny))
    larger = int(np.argmax(values))
    return logarithms[:, larger] - logarithms[:, 1 - larger]


def predict_centres(result: FlcResult, source: WindowSource, centres: np.ndarray, device: str = "auto") -> np.ndarray:
    """The class values ``(n,)`` of :func:`classify_centres`."""
    return classify_centres(result, source, centres, device).values


def in_parts(centres: np.ndarray) -> list[np.ndarray]:
    """Centres in order, so many at a time that their windows fit in memory."""
    return [centres[first : first + PART] for first in range(0, max(1, len(centres)), PART)]


def held_out(result: FlcResult, source: WindowSource, split: Split, device: str = "auto") -> Scores:
    """Figures of a trained model on the test pixels of its split."""
    predicted = classify_centres(result, source, split.test, device)
    return scores_of(predicted, split, [item.value for item in result.classes])


def scores_of(predicted: Predicted, split: Split, values: Sequence[int]) -> Scores:
    """Figures of what a method said of the test pixels of a split; ``values`` are the class values."""
    return score(split.test_labels, predicted.values, values, predicted.ranking, predicted.confidence)
