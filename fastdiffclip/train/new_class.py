"""A class more for a fitted head, the others untouched: from its text alone, or from its text and a few windows of it.

The prior of the head says what to expect of the weights of a class, given those of the others (``expected_texts``), and
how far from that they may lie. Without windows the expectation is all there is. With some, the weights and the bias of
the new class minimise the objective of the whole head (``logistic_regression``) in which all others stand still: a
convex fit of one class,

    w = l W + d u,   sum_i w_i [ log(sum_k e^{logit_ik} + e^{w x_i + b}) - logit_i,y(i) ] + ridge / (2 K) ||u||^2,

where l are the similarities that the others explain, d^2 = 1 - |l|^2 what is left, and K counts the new class.

Shape suffixes: N windows, F features, E dimensions of the text space, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastdiffclip.config import Config
from fastdiffclip.errors import UsageError
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.model.text_similarity import text_similarity
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import ClassInfo
from fastdiffclip.train.data import unlabelled_centres
from fastdiffclip.train.logistic import expected_texts, offset_for_share, window_features
from fastdiffclip.train.logistic_regression import GRADIENT, MAX_ITERATIONS, span
from fastdiffclip.train.loop import weights_digest
from fastdiffclip.train.views import FeatureStatistics

FULL_LENGTH = 1.0 - 1e-4  # of the text vectors of classes that had shots
ROUNDS = 200  # in which the biases of classes without shots settle


@dataclass(frozen=True)
class NewClass:
    """A class to add: how it is called, what its text is, and how much of the scenes it is expected to cover.

    ``share`` is above 0 and below 1; None: as much as the average class, or with shots what they say.
    """

    info: ClassInfo
    prompt: str
    share: float | None = None


@dataclass(frozen=True)
class KnownClasses:
    """A fitted head as numbers, float64; one that knows a class more is a new one.

    Attributes:
        classes, prompts: K each. texts: ``(K, E)``, rows of length 1 for classes that had shots. bias: ``(K,)``.
        centre: ``(F,)``. weight: ``(E, F)``.
        added: what a manifest says of each class that was added.
    """

    classes: tuple[ClassInfo, ...]
    prompts: tuple[str, ...]
    texts: np.ndarray
    bias: np.ndarray
    centre: np.ndarray
    weight: np.ndarray
    added: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(
        cls, model: LogisticClassifier, texts: torch.Tensor, classes: Sequence[ClassInfo], prompts: Sequence[str],
        added: Sequence[Mapping[str, Any]] = (),
    ) -> KnownClasses:  # fmt: skip
        """The head of a model whose text embeddings are ``texts`` (K, E)."""
        parts = (texts, model.bias, model.centre, model.weight)
        rows, bias, centre, weight = (part.detach().cpu().double().numpy() for part in parts)
        return cls(tuple(classes), tuple(prompts), rows, bias, centre, weight, tuple(dict(entry) for entry in added))

    def put_into(self, model: LogisticClassifier) -> torch.Tensor:
        """Give the numbers to the model that they came from; returns the text embeddings ``(K, E)`` float32."""
        named = {"centre": self.centre, "weight": self.weight, "bias": self.bias}
        tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in named.items()}
        model.take(tensors | {"temperature": model.temperature})
        return torch.from_numpy(self.texts.astype(np.float32))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """``(N, K)`` of features ``(N, F)``, not calibrated."""
        return self.embed(features) @ self.texts.T + self.bias

    def embed(self, features: np.ndarray) -> np.ndarray:
        """``(N, E)`` in the text space of features ``(N, F)``."""
        return (features - self.centre) @ self.weight.T

    def expected(self, prompt: str, text: float) -> tuple[np.ndarray, dict[str, float]]:
        """Where the prior expects a class with this text, ``(E,)``, and its likeness to each class that had shots.

        ``text`` is the share of the similarity in the prior. Raises :class:`UsageError` for a text that is known.
        """
        if prompt in self.prompts:
            raise UsageError(f"the model knows a class with the text {prompt!r}; describe the new one otherwise")
        places = np.flatnonzero(np.linalg.norm(self.texts, axis=1) > FULL_LENGTH)
        likeness = text_similarity([self.prompts[place] for place in places], [prompt])
        names = [self.classes[place].name for place in places]
        row = expected_texts(self.texts[places], text * likeness)[0]
        return row, dict(zip(names, likeness[0].round(4).tolist(), strict=True))

    def without(self, place: int) -> KnownClasses:
        """The head without a class that no window is known of; the others do not notice."""
        value = self.classes[place].value
        return replace(
            self,
            classes=self.classes[:place] + self.classes[place + 1 :],
            prompts=self.prompts[:place] + self.prompts[place + 1 :],
            texts=np.delete(self.texts, place, axis=0),
            bias=np.delete(self.bias, place),
            added=tuple(entry for entry in self.added if entry["value"] != value),
        )

    def with_described(self, new: Sequence[NewClass], unlabelled: np.ndarray, config: Config) -> KnownClasses:
        """The head with classes that no window is known of.

        What is expected of a class lies between those that it is like, and would never win: their biases are raised
        until each wins its share of the unlabelled windows, features ``(n, F)``.
        """
        rows, likenesses = zip(*(self.expected(item.prompt, config.logistic.text) for item in new), strict=True)
        embeddings, average = self.embed(unlabelled), 1.0 / (len(self.classes) + len(new))
        others = embeddings @ self.texts.T + self.bias
        shares = [average if item.share is None else item.share for item in new]
        biases = biases_for_shares(others, embeddings @ np.stack(rows).T, shares)
        found = self
        for item, row, bias, share, likeness in zip(new, rows, biases, shares, likenesses, strict=True):
            about = {"value": item.info.value, "name": item.info.name, "shots": 0, "share": share, "likeness": likeness}
            found = found._with(item, row, float(bias), about)
        return found

    def with_shots(
        self, new: NewClass, features: np.ndarray, labels: np.ndarray, statistics: FeatureStatistics,
        shares: Mapping[str, float], config: Config, unlabelled: np.ndarray | None = None,
    ) -> KnownClasses:  # fmt: skip
        """The head with a class that some windows are known of.

        Few shots say little of how frequent it is: where its share is known, its bias follows from that.

        Args:
            features: ``(N, F)`` of the shots of all classes. labels: ``(N,)`` positions in the classes, the new one's
                is K.
            statistics: of unlabelled windows. shares: weight of every view in the head.
            unlabelled: features ``(n, F)`` of unlabelled windows, needed where the new class has a share.
        """
        row, likeness = self.expected(new.prompt, config.logistic.text)
        spare = max(0.0, 1.0 - float(row @ row)) ** 0.5
        slope, bias = fit_one_class(
            features - self.centre, labels, self.logits(features), self.embed(features) @ row, spare, statistics,
            shares, config.logistic.ridge,
        )  # fmt: skip
        own = int((labels == len(self.classes)).sum())
        about = {"value": new.info.value, "name": new.info.name, "shots": own, "share": new.share, "likeness": likeness}
        wider = replace(
            self,
            weight=np.concatenate([self.weight, slope[None]]),
            texts=np.concatenate([self.texts, np.zeros((len(self.texts), 1))], axis=1),
        )
        row = np.append(row, spare)
        if new.share is not None and unlabelled is not None:
            bias = offset_for_share(wider.logits(unlabelled), wider.embed(unlabelled) @ row, new.share)
        return wider._with(new, row, bias, about)

    def _with(self, new: NewClass, row: np.ndarray, bias: float, about: dict[str, Any]) -> KnownClasses:
        return replace(
            self,
            classes=(*self.classes, new.info),
            prompts=(*self.prompts, new.prompt),
            texts=np.concatenate([self.texts, row[None]]),
            bias=np.append(self.bias, bias),
            added=(*self.added, about),
        )


def biases_for_shares(others: np.ndarray, own: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """What to add to the logits ``own`` (n, U) of classes for each to win its share against them and ``others`` (n, K).

    They are raised in turn until none changes: what one wins, another may have had.
    """
    bias = np.full(len(shares), -np.inf)
    for _ in range(ROUNDS):
        before = bias.copy()
        for place, share in enumerate(shares):
            rest = np.delete(own + bias, place, axis=1)
            bias[place] = offset_for_share(np.concatenate([others, rest], axis=1), own[:, place], share)
        if np.array_equal(np.round(before, 9), np.round(bias, 9)):
            break
    return bias


def fit_one_class(
    centred: np.ndarray, labels: np.ndarray, others: np.ndarray, expected: np.ndarray, spare: float,
    statistics: FeatureStatistics, shares: Mapping[str, float], ridge: float,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """What the weights ``(F,)`` of a new class are beyond the expected ones, in units of ``spare``, and its bias.

    Args:
        centred: ``(N, F)`` features of shots. labels: ``(N,)``, K for the new class.
        others: ``(N, K)`` logits of the classes that stand still. expected: ``(N,)`` of the new one, from its text.
        spare: standard deviation that the prior leaves it.
    """
    from scipy.optimize import minimize

    classes = others.shape[1] + 1
    counts = np.bincount(labels, minlength=classes)
    present = int((counts > 0).sum())
    share, new = 1.0 / counts[labels] / present, labels == classes - 1
    constant = ridge / (len(labels) / present) ** 0.5 / present
    against = np.logaddexp.reduce(others, axis=1)
    truth = np.where(new, 0.0, others[np.arange(len(labels)), np.where(new, 0, labels)])
    slope, offset = np.zeros(centred.shape[1]), 0.0
    for name, weight in shares.items():
        view = statistics.views[name]
        rows, basis = span(view.rows(centred))

        def objective(point: np.ndarray, rows: np.ndarray = rows) -> tuple[float, np.ndarray]:
            own = expected + spare * (rows @ point[:-1]) + point[-1]
            total = np.logaddexp(against, own)
            loss = float((share * (total - np.where(new, own, truth))).sum())
            down = share * (np.exp(own - total) - new)
            ridged = 0.5 * constant * float(point[:-1] @ point[:-1])
            return loss + ridged, np.append(spare * (down @ rows) + constant * point[:-1], down.sum())

        found = minimize(
            objective, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "maxfun": 4 * MAX_ITERATIONS, "gtol": GRADIENT, "ftol": 0.0,
                     "maxcor": 20},
        ).x  # fmt: skip
        slope += weight * view.pull((found[:-1] @ basis)[None], centred.shape[1])[0]
        offset += weight * float(found[-1])
    return slope, offset


def unlabelled_features(model: LogisticClassifier, source: WindowSource, config: Config, where: Compute) -> np.ndarray:
    """Features ``(n, F)`` of the windows that the statistics of a head are found from; remembered by ``source``."""
    networks = [weights_digest(part) for part in (model.encoder, model.restorer) if part is not None]
    key = f"unlabelled {config.logistic.samples} {model.layout} {where.device} {where.precision} {networks}"
    if key not in source.memo:
        drawn = unlabelled_centres(source.scenes, config.logistic.samples, source.window, seed=0)
        source.memo[key] = window_features(model, source.windows(drawn), where)
    found: np.ndarray = source.memo[key]
    return found


def require_text_space(config: Config, what: str) -> None:
    """Raise :class:`UsageError` for a head that no class can be added to."""
    if config.flc.head != "logistic":
        raise UsageError(
            f"{what} flc.head={config.flc.head}, which learns every class from pixels; train with flc.head=logistic "
            "to add classes"
        )
