"""Where training shots and test pixels of each class may lie, so that their windows do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_COMPONENT_DRAWS = 8
_ASSIGNMENTS = 64
_FAIR_SHARE = 0.1


@dataclass(frozen=True)
class Labelled:
    """The valid labelled pixels of all scenes in scene, row, column order.

    ``pixels`` (n, 3) int64: scene, row, col; ``values`` (n,) int64; ``components`` (n,) int64: the
    8-connected component of the class; ``classes``: every value in the maps, also one with no valid pixel.
    """

    pixels: np.ndarray
    values: np.ndarray
    components: np.ndarray
    classes: tuple[int, ...]

    def take(self, index: np.ndarray) -> Labelled:
        """Return the pixels at ``index``, and their classes only."""
        values = self.values[index]
        classes = tuple(int(v) for v in np.unique(values))
        return Labelled(self.pixels[index], values, self.components[index], classes)


@dataclass(frozen=True)
class Region:
    """Of one class: indices that shots may come from, indices that may be tested, and how they were found."""

    pool: np.ndarray
    test: np.ndarray
    how: str
    separated: bool = True


def find_labelled(labels: Sequence[np.ndarray], valid: Sequence[np.ndarray]) -> Labelled:
    """Return the table of labelled pixels; ValueError where maps and masks differ in number or shape."""
    if [np.shape(a) for a in labels] != [np.shape(v) for v in valid]:
        raise ValueError(
            f"label maps {[np.shape(a) for a in labels]} and validity {[np.shape(v) for v in valid]} differ"
        )
    pixels, values, components, classes = [], [], [], set()
    count = 0
    for scene, (marked, usable) in enumerate(zip(labels, valid, strict=True)):
        classes |= set(np.unique(marked).tolist()) - {0}
        counted = np.where(usable, marked, 0)
        row, col = np.nonzero(counted)
        pixels.append(np.column_stack([np.full(len(row), scene), row, col]))
        values.append(counted[row, col].astype(np.int64))
        component = _components(counted)[row, col]
        components.append(component + count)
        count += int(component.max(initial=-1)) + 1
    return Labelled(
        pixels=np.concatenate([np.zeros((0, 3), np.int64), *pixels]).astype(np.int64),
        values=np.concatenate([np.zeros(0, np.int64), *values]),
        components=np.concatenate([np.zeros(0, np.int64), *components]),
        classes=tuple(sorted(int(c) for c in classes)),
    )


def within_reach(pixels: np.ndarray, others: np.ndarray, radius: int) -> np.ndarray:
    """Return (n,) bool: which ``pixels`` (n, 3) are within Chebyshev distance 2 * radius of ``others``."""
    import scipy.spatial

    near = np.zeros(len(pixels), bool)
    for scene in np.intersect1d(pixels[:, 0], others[:, 0]):
        here = np.flatnonzero(pixels[:, 0] == scene)
        tree = scipy.spatial.cKDTree(others[others[:, 0] == scene, 1:])
        distance, _ = tree.query(pixels[here, 1:], p=np.inf, distance_upper_bound=2 * radius + 0.5)
        near[here] = np.isfinite(distance)
    return near


def plan_regions(
    table: Labelled, shots: int | None, radius: int, rng: np.random.Generator, cut: set[int]
) -> dict[int, Region]:
    """Choose a training pool and a test region for every class.

    Where several scenes have labels, each is wholly for training or for test, about half of them each, so
    that a class of two or more scenes stands on both sides. Any other class gives half of its connected
    components to the pool; with one component, or if it is in ``cut``, it is cut in two blocks along its
    longer axis with a gap of 2 * radius. A class that cannot be cut keeps all its pixels as pool and as test
    region; what its shots' windows reach is then for the caller to drop, as everywhere.
    """
    scene_is_training = _assign_scenes(table, shots, rng)
    # One end for all classes that are cut: training blocks then lie beside each other, not beside tests.
    ends = rng.integers(2, size=2).astype(bool)
    regions = {}
    for value in table.classes:
        own = np.flatnonzero(table.values == value)
        need = 1 if shots is None or len(own) < shots else shots
        region = _by_scene(table, own, scene_is_training)
        if region is None:
            region = _within_scene(table, own, need, radius, ends, rng, value in cut)
        regions[value] = region
    return regions


def _by_scene(table: Labelled, own: np.ndarray, scene_is_training: np.ndarray | None) -> Region | None:
    if scene_is_training is None:
        return None
    training = scene_is_training[table.pixels[own, 0]]
    if training.all() or not training.any():
        return None
    scenes = np.unique(table.pixels[own, 0])
    count = int(scene_is_training[scenes].sum())
    how = f"scene ({count} for training, {len(scenes) - count} for test)"
    return Region(own[training], own[~training], how)


def _within_scene(
    table: Labelled,
    own: np.ndarray,
    need: int,
    radius: int,
    ends: np.ndarray,
    rng: np.random.Generator,
    prefer_blocks: bool,
) -> Region:
    """Return the region of a class that scenes do not separate; ``need`` is what the pool should hold."""
    by_component = _by_component(table, own, need, rng)
    by_block = None
    if by_component is None or prefer_blocks or _share(by_component, need, len(own)) < _FAIR_SHARE:
        by_block = _by_block(table, own, need, radius, ends)
    if by_block is not None and (prefer_blocks or by_component is None):
        return by_block
    options = [r for r in (by_component, by_block) if r is not None and len(r.pool) >= need]
    if options:
        return max(options, key=lambda r: _share(r, need, len(own)))
    return Region(own, own, "too small or too compact to be separated", separated=False)


def _share(region: Region, need: int, total: int) -> float:
    return 0.0 if len(region.pool) < need else min(len(region.pool), len(region.test)) / total


def _by_component(table: Labelled, own: np.ndarray, need: int, rng: np.random.Generator) -> Region | None:
    names, inverse, sizes = np.unique(table.components[own], return_inverse=True, return_counts=True)
    if len(names) < 2:
        return None
    best, best_share = None, -1.0
    for _ in range(_COMPONENT_DRAWS):
        order = rng.permutation(len(names))
        filled = np.cumsum(sizes[order])
        # Half of the components, more where the shots need them, but one is always left to test.
        count = min(max(len(names) // 2, int(np.searchsorted(filled, need)) + 1), len(names) - 1)
        training = np.isin(inverse, order[:count])
        how = f"connected component ({count} for training, {len(names) - count} for test)"
        region = Region(own[training], own[~training], how)
        share = _share(region, need, len(own))
        if share > best_share:
            best, best_share = region, share
        if share >= _FAIR_SHARE:
            break
    return best


def _by_block(table: Labelled, own: np.ndarray, need: int, radius: int, ends: np.ndarray) -> Region | None:
    """Cut the class, in the scene that has most of it, where the smaller of pool and test is largest."""
    scenes, counts = np.unique(table.pixels[own, 0], return_counts=True)
    here = table.pixels[own, 0] == scenes[counts.argmax()] if len(own) else np.zeros(0, bool)
    pixels = table.pixels[own[here], 1:]
    if len(pixels) == 0:
        return None
    extent = np.ptp(pixels, axis=0)
    for axis in (0, 1) if extent[0] >= extent[1] else (1, 0):
        along = pixels[:, axis] if ends[axis] else -pixels[:, axis]
        ordered = np.sort(along)
        limits = np.unique(ordered)
        pool = np.searchsorted(ordered, limits, side="right")
        test = len(ordered) - np.searchsorted(ordered, limits + 2 * radius, side="right")
        smaller = np.where((pool >= need) & (test > 0), np.minimum(pool, test), 0)
        if smaller.max() > 0:
            limit = limits[smaller.argmax()]
            tested = np.ones(len(own), bool)
            tested[here] = along > limit + 2 * radius
            how = f"blocks of {'rows' if axis == 0 else 'columns'} with a gap of {2 * radius} pixels"
            return Region(own[here][along <= limit], own[tested], how)
    return None


def _assign_scenes(table: Labelled, shots: int | None, rng: np.random.Generator) -> np.ndarray | None:
    """Return (scenes,) bool, True for training; None where fewer than two scenes have labels."""
    scenes = np.unique(table.pixels[:, 0])
    if len(scenes) < 2:
        return None
    present = [c for c in table.classes if (table.values == c).any()]
    counts = np.zeros((len(scenes), len(present)), np.int64)
    scene = np.searchsorted(scenes, table.pixels[:, 0])
    np.add.at(counts, (scene, np.searchsorted(present, table.values)), 1)
    need = np.minimum(1 if shots is None else shots, counts.sum(axis=0))
    tries = [_assign_once(counts, need, rng) for _ in range(_ASSIGNMENTS)]
    best = max(tries, key=lambda training: _merit(counts, need, training))
    result = np.zeros(int(scenes[-1]) + 1, bool)
    result[scenes] = best
    return result


def _merit(counts: np.ndarray, need: np.ndarray, training: np.ndarray) -> tuple[int, int, int]:
    """Rank an assignment: classes on both sides, classes with their shots, balance of the sides."""
    pool = counts[training].sum(axis=0)
    both = (pool > 0) & (counts[~training].sum(axis=0) > 0)
    balance = abs(2 * int(training.sum()) - len(training))
    return int(both.sum()), int((pool >= need).sum()), -balance


def _assign_once(counts: np.ndarray, need: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return one randomised greedy assignment (scenes,) bool: the rarest classes choose first."""
    scenes_of = (counts > 0).sum(axis=0)
    training, test = np.zeros(len(counts), bool), np.zeros(len(counts), bool)
    # A class of one scene takes its shots from there: as a test scene it would lose what they reach.
    lone = (counts[:, scenes_of == 1] > 0).sum(axis=1) > 0
    for k in np.lexsort([rng.random(len(need)), scenes_of]):
        if scenes_of[k] == 1:
            continue
        has = counts[:, k] > 0
        free = rng.permutation(np.flatnonzero(has & ~training & ~test))
        queue = free[np.argsort(lone[free], kind="stable")].tolist()
        if not (has & test).any() and queue and ((has & training).any() or len(queue) > 1):
            test[queue.pop(0)] = True
        while queue and counts[training, k].sum() < need[k]:
            training[queue.pop()] = True
    training |= lone & ~test
    for scene in rng.permutation(np.flatnonzero(~training & ~test)):
        to_training = training.sum() < test.sum() or (training.sum() == test.sum() and rng.random() < 0.5)
        (training if to_training else test)[scene] = True
    return training


def _components(values: np.ndarray) -> np.ndarray:
    """Return (H, W) int64: 8-connected components of equal non-zero values from 0 on; -1 elsewhere."""
    import scipy.ndimage

    result = np.full(values.shape, -1, np.int64)
    count = 0
    for number, box in enumerate(scipy.ndimage.find_objects(values.astype(np.int32)), start=1):
        if box is not None:
            found, amount = scipy.ndimage.label(values[box] == number, structure=np.ones((3, 3)))
            inside = found > 0
            result[box][inside] = found[inside] - 1 + count
            count += amount
    return result
