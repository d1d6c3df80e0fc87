"""K-shot splits of labelled pixels: `random` (what papers do, and it leaks), `disjoint`, `official`.

Legend: n labelled pixels that are valid, S scenes. A split names pixels by (scene, row, col).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.scene.disjoint import Labelled, Region, find_labelled, plan_regions, within_reach
from fastdiffclip.scene.windows import window_radius

KINDS = ("disjoint", "random", "official")
_ATTEMPTS = 12
_SHOTS, _LIMIT, _PLAN = range(3)


@dataclass(frozen=True)
class Split:
    """Training and test pixels.

    ``train`` (n, 3) and ``test`` (m, 3) int64: scene, row, col; ``train_labels`` (n,) and ``test_labels``
    (m,) int64: class values. Training pixels stand by class, test pixels in scene order. ``report``:
    sentences that say how each class was separated and what it was left with.
    """

    kind: str
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    report: tuple[str, ...]


def make_split(
    kind: str,
    labels: Sequence[np.ndarray],
    valid: Sequence[np.ndarray],
    *,
    shots: int | None,
    seed: int,
    window: int,
    class_names: Mapping[int, str],
    on_short: str = "error",
    official_test: Sequence[np.ndarray] | None = None,
    test_limit: int | None = None,
) -> Split:
    """Draw ``shots`` training pixels per class (None: all of the pool), and the test pixels.

    ``labels`` (one (H, W) integer map per scene, 0 = unlabelled) count only where ``valid`` (H, W) bool. The
    same arguments give the same split. ``test_limit`` caps the test pixels of a class by a draw.

    - `random`: the shots are any pixels of the class, all others are test pixels. Their windows overlap.
    - `official`: shots come from ``labels`` (the published training map), test pixels are those of
      ``official_test`` that are not in the training map.
    - `disjoint`: every test pixel is further than ``2 * (window // 2)`` (Chebyshev) from every training pixel
      of its scene, so no test window overlaps a training window. Classes are separated by scene, connected
      components or blocks: see ``disjoint.plan_regions``. Shots are spread over the components of the pool.

    ``on_short``: a class with fewer pool pixels than shots is an error, or ("use-all") gives what it has.

    Raises UsageError for an unknown kind or ``on_short``, an even window, counts below 1, a missing official
    map; InputDataError where nothing is labelled or, listing all of them, classes are short; ValueError where
    maps and masks differ in number or shape.
    """
    _check_arguments(kind, shots, seed, on_short, official_test, test_limit)
    radius = window_radius(window)
    table = find_labelled(labels, valid)
    if len(table.values) == 0:
        raise InputDataError("no valid pixel of the scenes is labelled: a split needs labelled pixels")
    draw = _Draw(table, shots, seed, radius, class_names)
    if kind == "disjoint":
        chosen, test, regions = _disjoint(draw)
        notes = {c: f"separated by {region.how}" for c, region in regions.items()}
        notes |= {c: region.how for c, region in regions.items() if not region.separated}
        pools = {c: len(region.pool) for c, region in regions.items()}
    else:
        pool = {c: np.flatnonzero(table.values == c) for c in draw.classes}
        chosen = {c: draw.shots_of(c, pixels, 0, spread=False) for c, pixels in pool.items()}
        test = np.setdiff1d(np.arange(len(table.values)), np.concatenate(list(chosen.values())))
        notes, pools = dict.fromkeys(draw.classes, f"{kind} pixels"), {c: len(p) for c, p in pool.items()}
    if on_short == "error":
        _refuse_short(draw, pools)
    train = np.concatenate(list(chosen.values()))
    tested = table.take(test)
    general: list[str] = []
    if official_test is not None and kind == "official":
        tested, general = _official_test(draw, find_labelled(official_test, valid), train)
    elif kind == "random":
        general = ["Training and test windows of a random split overlap: its figures are too high."]
    tested = _limit(tested, test_limit, seed)
    report = (*general, *_sentences(draw, table.values[train], tested.values, notes))
    return Split(kind, table.pixels[train], table.values[train], tested.pixels, tested.values, report)


class _Draw:
    """The labelled pixels, and seeded draws from them that do not depend on each other."""

    def __init__(self, table: Labelled, shots: int | None, seed: int, radius: int, names: Mapping[int, str]) -> None:
        self.table, self.shots, self.seed, self.radius = table, shots, seed, radius
        self.classes = table.classes
        self.names = {c: names.get(c, f"class {c}") for c in table.classes}

    def shots_of(self, value: int, pool: np.ndarray, attempt: int, spread: bool = True) -> np.ndarray:
        """Return the shots (indices into the table) of class ``value``, round-robin over its components."""
        rng = _generator(self.seed, attempt, value, _SHOTS)
        order = rng.permutation(pool)
        if spread:
            _, component = np.unique(self.table.components[order], return_inverse=True)
            turn = rng.permutation(component.max(initial=0) + 1)[component]
            order = order[np.lexsort([turn, _occurrence(component)])]
        return order if self.shots is None else order[: self.shots]


def _disjoint(draw: _Draw) -> tuple[dict[int, np.ndarray], np.ndarray, dict[int, Region]]:
    """Return shots per class, test indices, regions: of some attempts, what leaves most classes testable."""
    table, best, most = draw.table, None, -1
    cut: set[int] = set()
    for attempt in range(_ATTEMPTS):
        rng = _generator(draw.seed, attempt, 0, _PLAN)
        regions = plan_regions(table, draw.shots, draw.radius, rng, cut)
        chosen = {c: draw.shots_of(c, regions[c].pool, attempt) for c in draw.classes}
        train = np.concatenate(list(chosen.values()))
        test = np.sort(np.concatenate([regions[c].test for c in draw.classes]))
        test = test[~within_reach(table.pixels[test], table.pixels[train], draw.radius)]
        testable = np.unique(table.values[test])
        if len(testable) > most:
            best, most = (chosen, test, regions), len(testable)
        if most == len(draw.classes):
            break
        # Windows of its own or other shots covered such a class: blocks hold together better.
        cut |= set(draw.classes) - set(testable.tolist())
    assert best is not None
    return best


def _official_test(draw: _Draw, given: Labelled, train: np.ndarray) -> tuple[Labelled, list[str]]:
    table = draw.table
    in_training = _rows_in(given.pixels, table.pixels)
    tested = given.take(np.flatnonzero(~in_training))
    report = []
    if in_training.any():
        report.append(f"{int(in_training.sum())} pixels of the test map are in the training map: left out.")
    near = int(within_reach(tested.pixels, table.pixels[train], draw.radius).sum())
    report.append(f"The windows of {near} of {len(tested.values)} official test pixels overlap training windows.")
    untrained = set(tested.values.tolist()) - set(table.values.tolist())
    for value in sorted(untrained):
        count = int((tested.values == value).sum())
        name = draw.names.get(value, f"class {value}")
        report.append(f"'{name}' has no training pixel: its {count} test pixels can only be guessed from its name.")
    return tested, report


def _limit(tested: Labelled, limit: int | None, seed: int) -> Labelled:
    if limit is None:
        return tested
    kept = []
    for value in tested.classes:
        pixels = np.flatnonzero(tested.values == value)
        kept.append(_generator(seed, 0, value, _LIMIT).permutation(pixels)[:limit])
    return tested.take(np.sort(np.concatenate([np.zeros(0, np.int64), *kept])))


def _sentences(draw: _Draw, train_values: np.ndarray, test_values: np.ndarray, notes: Mapping[int, str]) -> list[str]:
    sentences = []
    for value in draw.classes:
        train, test = int((train_values == value).sum()), int((test_values == value).sum())
        tail = "" if test else ": nothing is left to test it on"
        sentences.append(f"'{draw.names[value]}': {notes[value]}; {train} training and {test} test pixels{tail}.")
    return sentences


def _refuse_short(draw: _Draw, pools: Mapping[int, int]) -> None:
    short = [c for c in draw.classes if draw.shots is not None and pools[c] < draw.shots]
    if not short and all(pools.values()):
        return
    short = short or [c for c in draw.classes if pools[c] == 0]
    listed = ", ".join(f"'{draw.names[c]}' has {pools[c]}" for c in short)
    raise InputDataError(
        f"too few valid labelled pixels to draw {draw.shots or 'any'} training shots from: {listed}; "
        "label more, ask for fewer --shots, or take what there is with --on-short use-all"
    )


def _check_arguments(
    kind: str,
    shots: int | None,
    seed: int,
    on_short: str,
    official_test: Sequence[np.ndarray] | None,
    test_limit: int | None,
) -> None:
    if kind not in KINDS:
        raise UsageError(f"there is no split '{kind}'{nearest(kind, KINDS)}: choose {', '.join(KINDS)}")
    if on_short not in ("error", "use-all"):
        raise UsageError(f"--on-short is 'error' or 'use-all', not '{on_short}'")
    for name, value, least in (("shots", shots, 1), ("test limit", test_limit, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UsageError(f"the {name} must be at least {least}, not {value}")
    if kind == "official" and official_test is None:
        raise UsageError(
            "the official split needs a training and a test label map, and the scene has one map: ingest "
            "both with --labels train=... --labels test=..., or use --split disjoint"
        )


def _generator(seed: int, attempt: int, value: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, attempt, value, purpose])))


def _occurrence(groups: np.ndarray) -> np.ndarray:
    """Return for each element how many equal ones stand before it."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(groups) else np.zeros(0, np.int64)
    position = np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))
    result = np.empty(len(groups), np.int64)
    result[order] = position
    return result


def _rows_in(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return (n,) bool: which rows (n, 3) occur among ``others`` (m, 3)."""
    _, inverse = np.unique(np.concatenate([rows, others]), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return np.isin(inverse[: len(rows)], inverse[len(rows) :])
