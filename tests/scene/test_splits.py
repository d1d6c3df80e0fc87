"""Splits: what they promise, on drawn label maps and on real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.scene.splits import Split, make_split

from .strategies import label_maps

Maps = tuple[list[np.ndarray], list[np.ndarray]]
SHOTS = st.sampled_from([1, 2, 5, 20, None])


def split(kind: str, labels: list[np.ndarray], valid: list[np.ndarray] | None = None, **more: object) -> Split:
    valid = [np.ones(a.shape, bool) for a in labels] if valid is None else valid
    arguments = {"shots": 2, "seed": 0, "window": 3, "class_names": {1: "water", 2: "grass"}} | more
    return make_split(kind, labels, valid, **arguments)


def counts(labels: list[np.ndarray], valid: list[np.ndarray]) -> dict[int, int]:
    """Valid labelled pixels of each class, 0 for a class whose pixels are all invalid."""
    values = np.concatenate([a.ravel() for a in labels])
    good = np.concatenate([v.ravel() for v in valid])
    return {int(c): int(((values == c) & good).sum()) for c in np.unique(values[values > 0])}


def check_pixels(s: Split, labels: list[np.ndarray], valid: list[np.ndarray]) -> None:
    """Every pixel is labelled as it says, valid, and named once."""
    for pixels, values in ((s.train, s.train_labels), (s.test, s.test_labels)):
        assert pixels.dtype == values.dtype == np.int64 and pixels.shape == (len(values), 3)
        for (scene, row, col), value in zip(pixels, values, strict=True):
            assert labels[scene][row, col] == value and valid[scene][row, col]
    everything = np.concatenate([s.train, s.test])
    assert len(np.unique(everything, axis=0)) == len(everything)


def closest(s: Split) -> float:
    """Smallest Chebyshev distance between a training and a test pixel of the same scene."""
    distance = np.abs(s.train[:, None, 1:] - s.test[None, :, 1:]).max(axis=2)
    same = s.train[:, None, 0] == s.test[None, :, 0]
    return float(np.where(same, distance, np.inf).min(initial=np.inf))


def any_labelled(maps: Maps) -> bool:
    return sum(counts(*maps).values()) > 0


@settings(deadline=None, max_examples=150)
@given(
    maps=label_maps().filter(any_labelled),
    shots=SHOTS,
    window=st.sampled_from([1, 3, 5, 11]),
    seed=st.integers(0, 99),
)
def test_disjoint_keeps_its_promise(maps: Maps, shots: int | None, window: int, seed: int) -> None:
    s = split("disjoint", *maps, shots=shots, window=window, seed=seed, on_short="use-all")
    check_pixels(s, *maps)
    assert closest(s) > 2 * (window // 2)
    for value, count in counts(*maps).items():
        drawn = int((s.train_labels == value).sum())
        assert min(count, 1) <= drawn <= (count if shots is None else min(count, shots))
        assert sum(f"'{ {1: 'water', 2: 'grass'}.get(value, f'class {value}') }'" in line for line in s.report) == 1
    again = split("disjoint", *maps, shots=shots, window=window, seed=seed, on_short="use-all")
    np.testing.assert_array_equal(again.train, s.train)
    np.testing.assert_array_equal(again.test, s.test)
    assert again.report == s.report


@settings(deadline=None, max_examples=60)
@given(maps=label_maps(scenes=1).filter(any_labelled), shots=st.sampled_from([1, 3, 8]), seed=st.integers(0, 99))
def test_disjoint_in_one_scene_gives_full_shots_wherever_there_are_pixels(maps: Maps, shots: int, seed: int) -> None:
    s = split("disjoint", *maps, shots=shots, seed=seed, on_short="use-all")
    for value, count in counts(*maps).items():
        if count >= shots:
            assert (s.train_labels == value).sum() == shots


@settings(deadline=None, max_examples=60)
@given(
    maps=label_maps().filter(any_labelled),
    shots=SHOTS,
    seed=st.integers(0, 99),
    limit=st.sampled_from([None, 1, 7]),
)
def test_random_tests_all_pixels_but_the_shots(maps: Maps, shots: int | None, seed: int, limit: int | None) -> None:
    s = split("random", *maps, shots=shots, seed=seed, on_short="use-all", test_limit=limit)
    check_pixels(s, *maps)
    for value, count in counts(*maps).items():
        drawn = count if shots is None else min(shots, count)
        assert (s.train_labels == value).sum() == drawn
        rest = count - drawn
        assert (s.test_labels == value).sum() == (rest if limit is None else min(rest, limit))


def test_random_says_that_it_leaks() -> None:
    assert "overlap" in split("random", [np.ones((5, 5), np.uint16)]).report[0]


@pytest.mark.parametrize("kind", ["random", "disjoint"])
def test_other_seeds_give_other_splits(kind: str) -> None:
    rng = np.random.default_rng(0)
    labels = [np.kron(rng.integers(0, 4, (6, 6)), np.ones((5, 5))).astype(np.uint16)]
    drawn = [split(kind, labels, seed=seed).train for seed in range(5)]
    assert len({d.tobytes() for d in drawn}) == 5


def test_scenes_are_wholly_training_or_test() -> None:
    rng = np.random.default_rng(1)
    labels = [np.kron(rng.integers(1, 4, (2, 2)), np.ones((6, 6))).astype(np.uint16) for _ in range(12)]
    s = split("disjoint", labels, shots=5)
    training, test = set(s.train[:, 0].tolist()), set(s.test[:, 0].tolist())
    assert not training & test and len(test) == 6
    assert set(s.test_labels.tolist()) == set(s.train_labels.tolist()) == {1, 2, 3}
    assert "separated by scene (" in s.report[0]


def test_class_of_one_scene_is_separated_within_it() -> None:
    labels = [np.ones((30, 30), np.uint16) for _ in range(4)]
    labels[2][:, 12:] = 2
    for seed in range(8):
        s = split("disjoint", labels, shots=3, seed=seed)
        assert "'water': separated by scene" in s.report[0] and "'grass': separated by blocks" in s.report[1]
        assert set(s.train[s.train_labels == 2, 0]) == set(s.test[s.test_labels == 2, 0]) == {2}
        assert 2 not in s.test[s.test_labels == 1, 0], "its scene is for training"


@pytest.mark.parametrize("lone", [8, 15, 16])
def test_scenes_of_lone_classes_are_for_training_where_others_can_be_tested(lone: int) -> None:
    labels = [np.ones((20, 20), np.uint16) for _ in range(16)]
    for value, a in enumerate(labels[:lone], start=2):
        a[:, 12:] = value
    for seed in range(4):
        s = split("disjoint", labels, shots=3, seed=seed)
        tested = set(s.test[s.test_labels == 1, 0].tolist())
        assert not tested & set(s.train[s.train_labels == 1, 0].tolist())
        assert tested == set(range(lone, 16)) if lone < 16 else len(tested) >= 1
        assert len(set(s.test_labels.tolist())) == lone + 1


def test_components_are_wholly_training_or_test_and_shots_are_spread_over_them() -> None:
    labels = np.zeros((60, 10), np.uint16)
    for top in range(0, 60, 10):
        labels[top : top + 4, 2:8] = 1
    s = split("disjoint", [labels], shots=9)
    parts = s.train[:, 1] // 10
    assert sorted(np.bincount(parts, minlength=6).tolist()) == [0, 0, 0, 3, 3, 3]
    assert not set(parts) & set(s.test[:, 1] // 10)
    assert len(s.test) == 3 * 24


def test_small_components_do_not_starve_the_pool() -> None:
    labels = np.zeros((40, 40), np.uint16)
    labels[::8, 0] = 1
    labels[5:35, 20:30] = 1
    for seed in range(20):
        s = split("disjoint", [labels], shots=20, seed=seed)
        assert len(s.train) == 20 and len(s.test) > 0


def test_as_many_components_are_for_training_as_the_shots_need() -> None:
    labels = np.zeros((100, 8), np.uint16)
    labels[::10, :3] = 1
    s = split("disjoint", [labels], shots=20)
    assert "connected component (7 for training, 3 for test)" in s.report[0]
    assert len(s.train) == 20 and len(s.test) == 9


def test_components_within_reach_of_each_other_are_cut_in_blocks() -> None:
    labels = np.zeros((80, 10), np.uint16)
    labels[::2] = 1
    s = split("disjoint", [labels], shots=40, window=11)
    assert "blocks of rows" in s.report[0] and len(s.test) > 100


def test_single_component_is_cut_along_its_longer_axis() -> None:
    labels = np.zeros((10, 50), np.uint16)
    labels[2:8, 5:45] = 1
    s = split("disjoint", [labels], shots=None, window=5)
    columns = sorted([set(s.train[:, 2].tolist()), set(s.test[:, 2].tolist())], key=min)
    assert columns == [set(range(5, 23)), set(range(27, 45))]
    assert "blocks of columns with a gap of 4 pixels" in s.report[0]


def test_inseparable_class_keeps_its_shots_and_is_named() -> None:
    labels = np.zeros((20, 20), np.uint16)
    labels[3:6, 3:6] = 1
    labels[:, 16] = 2
    s = split("disjoint", [labels], shots=2, window=5)
    assert (s.train_labels == 1).sum() == 2 and not (s.test_labels == 1).any()
    assert s.report[0].startswith("'water': too small or too compact to be separated; 2 training and 0 test pixels")
    assert (s.test_labels == 2).any()


@settings(deadline=None, max_examples=40)
@given(first=label_maps(scenes=2).filter(any_labelled), seed=st.integers(0, 99), shots=SHOTS)
def test_official_takes_shots_and_tests_from_their_maps(first: Maps, seed: int, shots: int | None) -> None:
    labels, valid = first
    rng = np.random.default_rng(seed)
    second = [rng.integers(0, 6, a.shape).astype(np.uint16) for a in labels]
    s = split("official", labels, valid, official_test=second, shots=shots, seed=seed, on_short="use-all")
    for value, count in counts(labels, valid).items():
        assert (s.train_labels == value).sum() == (count if shots is None else min(shots, count))
    expected = [
        (scene, row, col)
        for scene, (a, b, v) in enumerate(zip(labels, second, valid, strict=True))
        for row, col in np.argwhere(v & (b > 0) & (a == 0)).tolist()
    ]
    assert [tuple(p) for p in s.test.tolist()] == expected
    for (scene, row, col), value in zip(s.test, s.test_labels, strict=True):
        assert second[scene][row, col] == value


def test_official_says_what_the_maps_share() -> None:
    train, test = np.zeros((9, 9), np.uint16), np.zeros((9, 9), np.uint16)
    train[0, :4] = 1
    test[0, 3:8] = 1
    test[8, 8] = 7
    s = split("official", [train], official_test=[test], shots=None, window=3)
    assert s.report[0] == "1 pixels of the test map are in the training map: left out."
    assert s.report[1] == "The windows of 2 of 5 official test pixels overlap training windows."
    assert s.report[2].startswith("'class 7' has no training pixel: its 1 test pixels")


@pytest.mark.parametrize("kind", ["random", "disjoint", "official"])
def test_short_classes_are_all_named(kind: str) -> None:
    labels = np.zeros((20, 20), np.uint16)
    labels[0, :3], labels[5, :2], labels[10:] = 1, 2, 3
    valid = np.ones((20, 20), bool)
    valid[5, 1] = False
    other = [np.roll(labels, 3, axis=0)] if kind == "official" else None
    with pytest.raises(InputDataError, match=r"'water' has 3, 'grass' has 1; .*--on-short use-all"):
        split(kind, [labels], [valid], shots=5, official_test=other)
    s = split(kind, [labels], [valid], shots=5, on_short="use-all", official_test=other)
    assert np.bincount(s.train_labels, minlength=4)[3] == 5
    assert 1 <= np.bincount(s.train_labels)[1] <= 3


def test_class_without_a_valid_pixel_is_short() -> None:
    labels, valid = np.ones((9, 9), np.uint16), np.ones((9, 9), bool)
    labels[:2] = 2
    valid[:2] = False
    for shots in (1, None):
        with pytest.raises(InputDataError, match="'grass' has 0"):
            split("random", [labels], [valid], shots=shots)


def test_class_short_in_the_training_scenes_is_refused() -> None:
    labels = [np.zeros((9, 9), np.uint16) for _ in range(2)]
    for a in labels:
        a[0, :3] = 1
    with pytest.raises(InputDataError, match="'water' has 3"):
        split("disjoint", labels, shots=4)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("disjunct", {}, r"no split 'disjunct' \(did you mean 'disjoint'\?\)"),
        ("random", {"window": 4}, "window must be odd"),
        ("disjoint", {"window": 10}, "window must be odd"),
        ("random", {"on_short": "ignore"}, "'error' or 'use-all'"),
        ("random", {"shots": 0}, "shots must be at least 1"),
        ("random", {"test_limit": 0}, "test limit must be at least 1"),
        ("random", {"seed": -1}, "seed must be at least 0"),
        ("official", {}, "--labels test="),
    ],
)
def test_wrong_arguments_are_refused(kind: str, arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split(kind, [np.ones((5, 5), np.uint16)], **arguments)


def test_maps_and_masks_must_agree_and_something_must_be_labelled() -> None:
    with pytest.raises(ValueError, match="differ"):
        split("random", [np.ones((5, 5), np.uint16)], [np.ones((5, 4), bool)])
    with pytest.raises(InputDataError, match="no valid pixel"):
        split("random", [np.zeros((5, 5), np.uint16)])


def salinas(real_data: Path) -> list[np.ndarray]:
    import scipy.io

    return [scipy.io.loadmat(real_data / "salinas_a" / "salinasA_gt.mat")["salinasA_gt"].astype(np.uint16)]


def osbs(real_data: Path) -> list[np.ndarray]:
    import rasterio

    maps = []
    for path in sorted((real_data / "osbs" / "labels").glob("*.tif")):
        with rasterio.open(path) as raster:
            labels = raster.read(1).astype(np.uint16)
        maps.append(np.where(labels <= 3, labels, 0))  # the species of six plots or more
    return maps


def houston(real_data: Path) -> list[np.ndarray]:
    with np.load(real_data / "houston2013" / "houston2013_canvas.npz") as arrays:
        return [arrays["tr_label"].astype(np.uint16)]


@pytest.mark.parametrize("shots", [2, 5, 20])
@pytest.mark.parametrize(("read", "window", "classes"), [(salinas, 11, 6), (osbs, 11, 3), (houston, 3, 15)])
def test_real_scenes_leave_test_pixels_for_every_class(
    real_data: Path, read: object, window: int, classes: int, shots: int
) -> None:
    labels = read(real_data)  # type: ignore[operator]
    for seed in range(3):
        s = split("disjoint", labels, shots=shots, window=window, seed=seed)
        assert np.bincount(s.train_labels)[1:].tolist() == [shots] * classes
        assert (np.bincount(s.test_labels, minlength=classes + 1)[1:] >= 20).all(), s.report
        assert closest(s) > 2 * (window // 2)


def test_osbs_plots_are_not_shared(real_data: Path) -> None:
    s = split("disjoint", osbs(real_data), shots=20, window=11)
    assert not set(s.train[:, 0].tolist()) & set(s.test[:, 0].tolist())
