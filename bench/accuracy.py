"""How accurate the logistic head is, step by step: ``python -m bench.accuracy EXPERIMENT SCENE...``.

Features of all labelled pixels are computed once; each draw of shots then costs milliseconds to seconds. The draws and
the figures are those of ``fastdiffclip evaluate``.

    steps      every step of the head alone, on and off, paired with the recipe as it is
    text       prompt styles, shuffled prompts and other shares of the text prior
    zero-shot  every class in turn without a shot, predicted from its text
    add-class  every class in turn added to a trained head, with few shots or none, against training it at once
    active     shots chosen by ``suggest`` against shots drawn at random
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from fastdiffclip.bench.accuracy_classes import add_class
from fastdiffclip.commands.workflow import open_scenes
from fastdiffclip.config import Config, load_config
from fastdiffclip.errors import FastDiffCLIPError
from fastdiffclip.evaluate.baselines import predict_linear
from fastdiffclip.evaluate.contest import LINEAR_WINDOW, in_parts
from fastdiffclip.evaluate.metrics import expected_calibration_error
from fastdiffclip.infer.suggest import choose
from fastdiffclip.model.text_similarity import text_similarity
from fastdiffclip.runtime import Compute, memory_budget, set_threads
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.flc import class_prompts, window_source
from fastdiffclip.train.logistic import (
    Candidate,
    average,
    expected_texts,
    feature_statistics,
    fit_candidates,
    new_logistic,
    offset_for_share,
    shares_of,
    window_features,
)
from fastdiffclip.train.logistic_regression import log_softmax, prior_root, temperature_of
from fastdiffclip.train.umd import load_umd

APART = 1_000_000  # what pixels of two scenes are apart, at least


@dataclass(frozen=True)
class Draw:
    """Rows of the labelled pixels: ``train`` and ``test``."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """Average accuracy and expected calibration error of one draw, percent; the latter None without probabilities."""

    accuracy: float
    calibration: float | None = None


class Bench:
    """Scenes, draws, and the features of every labelled pixel."""

    def __init__(self, scenes: Sequence[Scene], config: Config, given: argparse.Namespace) -> None:
        self.scenes, self.config, self.given = scenes, config, given
        self.labelled = labelled_pixels(scenes, given.classes)
        self.centres, values = self.labelled.centres()
        position = {item.value: place for place, item in enumerate(self.labelled.classes)}
        self.labels = np.array([position[int(value)] for value in values])
        self.count = len(position)
        self.seeds = range(given.first, given.first + given.draws)
        row = {tuple(centre): place for place, centre in enumerate(self.centres.tolist())}
        self.gap = window = given.gap or config.model.window
        self.draws: dict[tuple[int, int], Draw] = {}
        for shots in given.shots:
            for seed in self.seeds:
                split = self.labelled.split(given.split, shots, seed, window, "use-all", given.test_limit)
                parts = (np.array([row[tuple(c)] for c in part.tolist()]) for part in (split.train, split.test))
                self.draws[shots, seed] = Draw(*parts)
        umd = None if given.umd is None else load_umd(given.umd)
        self.source = window_source(scenes, config, umd)
        where = Compute.choose("cpu", config.precision)
        network = None if umd is None else umd.network
        model = new_logistic(self.source.front_end, config, network, given.seed)
        self.statistics = feature_statistics(model, self.source, config, where)
        rows = [window_features(model, self.source.windows(part), where) for part in in_parts(self.centres)]
        self.features = np.concatenate(rows)
        self.known: dict[Any, list[Candidate]] = {}

    def prompts(self, style: str | None) -> tuple[str, ...]:
        """Texts of the classes."""
        return class_prompts(self.scenes, self.labelled, style)

    def root(self, texts: Sequence[str] | None = None, share: float | None = None) -> np.ndarray:
        """The text vectors of all classes."""
        similarity = text_similarity(texts or self.prompts(self.given.prompts))
        return prior_root(similarity, self.config.logistic.text if share is None else share)

    def candidates(self, key: tuple[int, int], root: np.ndarray) -> list[Candidate]:
        """All fits of a draw; remembered."""
        name = key, root.tobytes()
        if name not in self.known:
            rows = self.draws[key].train
            self.known[name] = self.fit(rows, self.labels[rows], root)
        return self.known[name]

    def fit(self, rows: np.ndarray, labels: np.ndarray, root: np.ndarray) -> list[Candidate]:
        """The fits to labelled pixels ``rows`` whose ``labels`` are positions in ``root``."""
        ridge = self.config.logistic.ridge
        return fit_candidates(self.features[rows], labels, self.centres[rows], root, self.statistics, ridge)

    def judge(self, key: tuple[int, int], logits: np.ndarray) -> Outcome:
        """Figures of logits of the test pixels of a draw."""
        truth = self.labels[self.draws[key].test]
        error = expected_calibration_error(np.exp(log_softmax(logits)), truth)
        return Outcome(average_accuracy(truth, logits.argmax(axis=1)), error)

    def head(
        self, root: np.ndarray | None = None, views: Collection[str] | None = None,
        equal: bool = False, calibrate: bool = True,
    ) -> list[Outcome]:  # fmt: skip
        """The head on every draw, from these ``views`` alone; ``equal`` leaves their weighting out."""
        root = self.root() if root is None else root
        found = []
        for key, draw in self.draws.items():
            labels = self.labels[draw.train]
            chosen = [c for c in self.candidates(key, root) if views is None or c.view in views]
            shares = np.full(len(chosen), 1 / len(chosen)) if equal else shares_of(chosen, labels)
            weight, bias, held = average(chosen, shares)
            logits = (self.features[draw.test] - self.statistics.centre) @ weight.T @ root.T + bias
            found.append(self.judge(key, logits / (temperature_of(held, labels) if calibrate else 1.0)))
        return found

    def logits(self, rows: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Calibrated logits of all labelled pixels and their embeddings, from those in ``rows``."""
        labels = self.labels[rows]
        candidates = self.fit(rows, labels, root)
        weight, bias, held = average(candidates, shares_of(candidates, labels))
        embeddings = (self.features - self.statistics.centre) @ weight.T
        return (embeddings @ root.T + bias) / temperature_of(held, labels), embeddings

    def away_from(self, rows: np.ndarray, window: int) -> np.ndarray:
        """Labelled pixels whose windows overlap none of ``rows``."""
        places = self.centres * [APART, 1, 1]
        distance, _ = cKDTree(places[rows]).query(places, p=np.inf)
        return np.flatnonzero(distance >= window)

    @cached_property
    def _plain(self) -> WindowSource:
        return WindowSource(self.scenes, self.source.front_end, LINEAR_WINDOW, memory_budget(0.0))

    def linear(self) -> list[Outcome]:
        """The baseline `linear`."""
        found, names = [], self.source.front_end.channels
        windows = dict(zip(names, self._plain.windows(self.centres), strict=True))
        for draw in self.draws.values():
            train, test = ({name: part[rows] for name, part in windows.items()} for rows in (draw.train, draw.test))
            values, probabilities, _ = predict_linear(train, self.labels[draw.train], test)
            truth = self.labels[draw.test]
            error = expected_calibration_error(probabilities, truth)
            found.append(Outcome(average_accuracy(truth, values), error))
        return found


def average_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of the classes' accuracies, percent."""
    return float(100 * np.mean([(predicted[truth == value] == value).mean() for value in np.unique(truth)]))


def steps(bench: Bench) -> Iterable[tuple[str, list[Outcome]]]:
    """The head, and the head with one step left out or put in."""
    yield "the head", bench.head()
    yield "`linear`", bench.linear()
    views = list(bench.statistics.views)
    for view in views:
        yield f"without the view {view}", bench.head(views=[name for name in views if name != view])
    for view in views:
        yield f"the view {view} alone", bench.head(views=[view])
    yield "views weighted alike", bench.head(equal=True)
    yield "without text", bench.head(bench.root(share=0.0))
    yield "not calibrated", bench.head(calibrate=False)


def text(bench: Bench) -> Iterable[tuple[str, list[Outcome]]]:
    """Prompt styles and controls of the text prior."""
    yield "the head", bench.head()
    yield "without text", bench.head(bench.root(share=0.0))
    yield "text share 0.5", bench.head(bench.root(share=0.5))
    for style in ("p1", "p2", "p3", "p4", "p5"):
        yield style, bench.head(bench.root(bench.prompts(style)))
    for seed in range(3):
        texts = bench.prompts(bench.given.prompts)
        order = np.random.default_rng(seed).permutation(len(texts))
        yield f"texts of other classes, {seed + 1}", bench.head(bench.root([texts[place] for place in order]))


def zero_shot(bench: Bench) -> dict[str, Any]:
    """Every class in turn without a shot: how often it is found, how often others are taken for it, and its ranking.

    As ``add-class`` does, its bias is raised until it wins 1 / K of all pixels.

    ``ranking`` is the share of pairs, one pixel of the class and one of another class, whose logits of the class stand
    in the right order; chance is 50. ``found`` by chance is 100 / K.
    """
    prompts, settings = bench.prompts(bench.given.prompts), bench.config.logistic
    similarity = text_similarity(prompts)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for draw in bench.draws.values():
        for unseen, item in enumerate(bench.labelled.classes):
            seen = np.delete(np.arange(bench.count), unseen)
            root = prior_root(similarity[np.ix_(seen, seen)], settings.text)
            kept = draw.train[bench.labels[draw.train] != unseen]
            labels = np.searchsorted(seen, bench.labels[kept])
            candidates = bench.fit(kept, labels, root)
            weight, bias, _ = average(candidates, shares_of(candidates, labels))
            texts, biases = np.zeros((bench.count, len(seen))), np.full(bench.count, bias.mean())
            texts[seen], biases[seen] = root, bias
            texts[unseen] = expected_texts(root, settings.text * similarity[[unseen]][:, seen])[0]
            everywhere = (bench.features - bench.statistics.centre) @ weight.T @ texts.T + biases
            biases[unseen] += offset_for_share(everywhere[:, seen], everywhere[:, unseen], 1 / bench.count)
            logits = (bench.features[draw.test] - bench.statistics.centre) @ weight.T @ texts.T + biases
            own = bench.labels[draw.test] == unseen
            said, order = logits.argmax(axis=1) == unseen, logits[own][:, [unseen]] > logits[~own][:, unseen]
            figures = 100 * said[own].mean(), 100 * said[~own].mean(), 100 * order.mean()
            found.setdefault(item.name, []).append((float(figures[0]), float(figures[1]), float(figures[2])))
    print("| class | found | others taken for it | ranking |")
    rows = {name: np.mean(figures, axis=0).tolist() for name, figures in found.items()}
    rows["mean"] = np.mean(list(rows.values()), axis=0).tolist()
    for name, row in rows.items():
        print(f"| {name} | {row[0]:.1f} | {row[1]:.1f} | {row[2]:.1f} |")
    return {"chance": 100 / bench.count, "classes": rows}


def active(bench: Bench) -> dict[str, Any]:
    """Average accuracy while shots are added to the first draw, K at a time, chosen by ``suggest`` or at random.

    Both choose from the labelled pixels that no test window overlaps, and start from the smallest number of shots.
    """
    start, window, root = min(bench.given.shots), bench.gap, bench.root()
    curves: dict[str, list[list[float]]] = {"suggested": [], "random": []}
    for (shots, seed), draw in bench.draws.items():
        if shots != start:
            continue
        pool = bench.away_from(draw.test, window)
        for name, curve in curves.items():
            rows, random, figures = draw.train, np.random.default_rng(seed), []
            for step in range(bench.given.rounds + 1):
                logits, embeddings = bench.logits(rows, root)
                figures.append(bench.judge((shots, seed), logits[draw.test]).accuracy)
                left = np.setdiff1d(pool, rows)
                if step == bench.given.rounds or len(left) == 0:
                    break
                if name == "random":
                    new = random.permutation(left)[: bench.count]
                else:
                    places = bench.centres[:, 1:] + bench.centres[:, :1] * APART
                    new = left[choose(np.exp(log_softmax(logits[left])), embeddings[left], places[left],
                                      embeddings[rows], places[rows], bench.count, window)]  # fmt: skip
                rows = np.concatenate([rows, new])
            curve.append(figures)
    print("| labels more than at the start | " + " | ".join(curves) + " | difference |")
    table = {name: np.array(curve) for name, curve in curves.items()}
    gain = table["suggested"] - table["random"]
    for step in range(gain.shape[1]):
        error = gain[:, step].std(ddof=1) / len(gain) ** 0.5
        means = " | ".join(f"{part[:, step].mean():.1f}" for part in table.values())
        print(f"| {step * bench.count} | {means} | {gain[:, step].mean():+.2f} ± {error:.2f} |")
    return {name: part.tolist() for name, part in table.items()}


EXPERIMENTS: dict[str, Callable[[Bench], Iterable[tuple[str, list[Outcome]]]]] = {"steps": steps, "text": text}


def table(bench: Bench, rows: Iterable[tuple[str, list[Outcome]]]) -> list[dict[str, Any]]:
    """Print every row as it comes: accuracy, difference to the first row with its standard error, calibration."""
    keys, made, first = list(bench.draws), [], None
    for name, outcomes in rows:
        first = first or outcomes
        entry: dict[str, Any] = {"name": name, "shots": {}}
        cells = []
        for shots in bench.given.shots:
            here = [place for place, key in enumerate(keys) if key[0] == shots]
            accuracy = np.array([outcomes[place].accuracy for place in here])
            change = accuracy - np.array([first[place].accuracy for place in here])
            error = float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else 0.0
            calibration = 100 * float(np.mean([outcomes[place].calibration for place in here]))
            entry["shots"][shots] = {"aa": float(accuracy.mean()), "change": float(change.mean()), "error": error,
                                     "ece": calibration}  # fmt: skip
            difference = "" if outcomes is first else f" ({change.mean():+.2f} ± {error:.2f})"
            cells.append(f"{accuracy.mean():.1f}{difference} ece {calibration:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        made.append(entry)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "zero-shot", "add-class", "active"])
    parser.add_argument("scenes", nargs="+", type=Path, help="scenes, or folders of scenes")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--set", action="append", default=[], help="setting, as for fastdiffclip")
    parser.add_argument("--umd", type=Path, help="a run of train-umd; without one the network is random")
    parser.add_argument("--seed", type=int, default=0, help="of the random network")
    parser.add_argument("--shots", type=lambda text: [int(part) for part in text.split(",")], default=[2, 5, 10, 20])
    parser.add_argument("--first", type=int, default=100, help="first draw")
    parser.add_argument("--draws", type=int, default=15)
    parser.add_argument("--split", default="disjoint")
    parser.add_argument("--gap", type=int, help="window that the split keeps apart; default: the recipe's")
    parser.add_argument("--classes", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--prompts", help="p1 to p5, a set or a file")
    parser.add_argument("--rounds", type=int, default=4, help="of `active`, K labels each")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    set_threads(1)
    try:
        bench = Bench(open_scenes(given.scenes), load_config(given.recipe, None, given.set), given)
        if given.experiment in EXPERIMENTS:
            result: Any = table(bench, EXPERIMENTS[given.experiment](bench))
        else:
            others = {"zero-shot": zero_shot, "add-class": add_class, "active": active}
            result = others[given.experiment](bench)
    except FastDiffCLIPError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if given.out is not None:
        given.out.write_text(json.dumps({"experiment": given.experiment, "result": result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
