"""Input at the edge of what a float32 holds, or with nothing in it: the loss of either stage stays a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiffclip.config import Config
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import ClassInfo, Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter
from fastdiffclip.train.flc import FlcResult, Shots, class_prompts, train_flc
from fastdiffclip.train.umd import UmdResult, train_umd

HEIGHT, WIDTH, BANDS = 9, 12, 16  # so many bands are a spectrum for the front end mnf
LARGEST, SMALLEST = np.finfo(np.float32).max, np.float32(1e-45)
CLASSES = (ClassInfo(1, "left"), ClassInfo(2, "middle"), ClassInfo(3, "right"))
PLACE = np.arange(WIDTH) // 4


def noise(seed: int = 0, bands: int = BANDS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((HEIGHT, WIDTH, bands)).astype(np.float32)


def spread(low: float, high: float) -> np.ndarray:
    """Values of either sign whose logarithms are even between two powers of ten."""
    power = np.random.default_rng(1).uniform(low, high, (HEIGHT, WIDTH, BANDS))
    return (np.sign(noise()) * 10.0**power).clip(-LARGEST, LARGEST).astype(np.float32)


def one_pixel(value: float, elsewhere: float | np.ndarray) -> np.ndarray:
    cube = np.broadcast_to(np.asarray(elsewhere, np.float32), (HEIGHT, WIDTH, BANDS)).copy()
    cube[4, 5] = value
    return cube


def constant_bands() -> np.ndarray:
    cube = noise()
    cube[:, :, ::2] = (0.0, 1e30, -7.5, SMALLEST, LARGEST, -LARGEST, 1.0, 0.1)
    return cube


CUBES = {
    "zeros": np.zeros((HEIGHT, WIDTH, BANDS), np.float32),
    "one number": np.full((HEIGHT, WIDTH, BANDS), 0.1, np.float32),
    "the largest number": np.full((HEIGHT, WIDTH, BANDS), LARGEST, np.float32),
    "constant bands": constant_bands(),
    "constant spectra": np.broadcast_to(np.linspace(1, 9, BANDS, dtype=np.float32), (HEIGHT, WIDTH, BANDS)),
    "1e30": 1e30 * noise(),
    "1e30 beside 1e-30": spread(-30, 30),
    "every power of ten": spread(-45, 38.5),
    "largest and smallest": LARGEST * np.sign(noise()),
    "denormal": (noise() * 1e-40).astype(np.float32),
    "smallest or zero": SMALLEST * (noise() > 0),
    "one pixel of 1e30": one_pixel(1e30, noise()),
    "one pixel that is not constant": one_pixel(2.0, 1.0),
    "one pixel of the largest number": one_pixel(LARGEST, -LARGEST),
    "hardly varying": (1e4 + 1e-3 * noise()).astype(np.float32),
    "black and white": (noise(0, 1) > 0) * np.ones(BANDS, np.float32),
}  # fmt: skip


def write(path: Path, cube: np.ndarray, heights: np.ndarray, valid: np.ndarray | None = None) -> Scene:
    labels = np.broadcast_to(1 + PLACE, (HEIGHT, WIDTH)).astype(np.uint16)
    with SceneWriter(path, height=HEIGHT, width=WIDTH, overwrite=True) as writer:
        writer.add_modality("hsi", cube.astype(np.float32), bands=cube.shape[2], dtype="float32", valid=valid)
        writer.add_modality("lidar", heights, bands=heights.shape[2], dtype="float32")
        writer.add_labels("labels", labels)
        writer.set_classes(CLASSES)
    return open_scene(path)


def shots_of(scene: Scene) -> Shots:
    """Two windows of each class, in the middle rows."""
    labelled = labelled_pixels([scene])
    centres = np.array([[0, row, col] for row in (4, 5) for col in (1, 5, 10)])
    labels = scene.read_labels()[centres[:, 1], centres[:, 2]].astype(np.int64)
    return Shots(centres, labels, labelled.classes, class_prompts([scene], labelled, "p1"))


def assert_finite(scene: Scene, config: Config) -> None:
    """Both stages, the second with what the first has learnt."""
    umd = train_umd([scene], config, device="cpu")
    check(umd)
    check(train_flc([scene], shots_of(scene), config, umd=umd, device="cpu"))


def check(result: UmdResult | FlcResult) -> None:
    assert len(result.losses) == 4 and np.isfinite(result.losses).all()
    assert all(bool(weight.isfinite().all()) for weight in result.model.parameters())


def config_of(small_config: Config, prepare: str) -> Config:
    umd = small_config.umd.model_copy(update={"epochs": 2, "samples": 20, "batch": 16})
    flc = small_config.flc.model_copy(update={"epochs": 2, "batch": 4})
    return small_config.model_copy(update={"prepare": prepare, "components": 4, "umd": umd, "flc": flc})


@pytest.mark.parametrize("prepare", ["standard", "mnf"])
@pytest.mark.parametrize("kind", CUBES)
def test_scenes_of_extremes(small_config: Config, tmp_path: Path, kind: str, prepare: str) -> None:
    cube = CUBES[kind]
    assert_finite(write(tmp_path / "s.zarr", cube, cube[:, :, :1]), config_of(small_config, prepare))


@pytest.mark.parametrize("prepare", ["standard", "mnf"])
def test_one_neighbourhood_that_is_valid(small_config: Config, tmp_path: Path, prepare: str) -> None:
    """Of the windows that are seen all but a corner lies outside, and every pixel that is not valid holds NaN."""
    valid = np.zeros((HEIGHT, WIDTH), bool)
    valid[4:6, 1:11] = True
    cube = np.where(valid[:, :, None], noise(), np.nan)
    assert_finite(write(tmp_path / "s.zarr", cube, noise(2, 1), valid), config_of(small_config, prepare))


@pytest.mark.parametrize("prepare", ["standard", "mnf"])
@pytest.mark.parametrize("kind", ["the largest number", "every power of ten", "largest and smallest", "zeros"])
def test_a_scene_unlike_the_one_of_the_pretraining(
    small_config: Config, tmp_path: Path, kind: str, prepare: str
) -> None:
    """What is in it is measured with the other one's mean and deviation."""
    config = config_of(small_config, prepare)
    umd = train_umd([write(tmp_path / "u.zarr", noise(), noise(1, 1))], config, device="cpu")
    scene = write(tmp_path / "f.zarr", CUBES[kind], CUBES[kind][:, :, :1])
    check(train_flc([scene], shots_of(scene), config, umd=umd, device="cpu"))


@pytest.mark.parametrize("kind", CUBES)
def test_the_head_that_is_fitted_at_once(small_config: Config, tmp_path: Path, kind: str) -> None:
    """The recipe ``best``, which takes no steps in its second stage."""
    config = config_of(small_config, "mnf")
    flc = config.flc.model_copy(update={"head": "logistic", "encoder": "frozen"})
    scene = write(tmp_path / "s.zarr", CUBES[kind], CUBES[kind][:, :, :1])
    result = train_flc([scene], shots_of(scene), config.model_copy(update={"flc": flc}), device="cpu")
    assert np.isfinite(result.losses).all()
    assert all(bool(tensor.isfinite().all()) for tensor in result.model.state_dict().values())


BAND = st.one_of(
    st.tuples(st.just("constant"), st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.tuples(st.just("noise"), st.integers(-44, 37)),
    st.tuples(st.just("two values"), st.floats(width=32, allow_nan=False, allow_infinity=False)),
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bands=st.lists(BAND, min_size=1, max_size=20), heights=st.lists(BAND, min_size=1, max_size=9),
    prepare=st.sampled_from(["standard", "mnf"]), share=st.floats(0.1, 1.0),
)  # fmt: skip
def test_any_bands(
    small_config: Config, tmp_path: Path, bands: list[tuple[str, float]], heights: list[tuple[str, float]],
    prepare: str, share: float,
) -> None:  # fmt: skip
    def cube(kinds: list[tuple[str, float]], seed: int) -> np.ndarray:
        drawn = noise(seed, len(kinds)).astype(np.float64)
        parts = {
            "constant": lambda n, v: 0 * n + v,
            "noise": lambda n, v: n * 10.0**v,
            "two values": lambda n, v: (n > 0) * v,
        }
        stacked = np.stack([parts[kind](drawn[:, :, b], value) for b, (kind, value) in enumerate(kinds)], axis=2)
        return stacked.clip(-LARGEST, LARGEST).astype(np.float32)

    valid = np.random.default_rng(3).random((HEIGHT, WIDTH)) < share
    valid[4:6] = True
    scene = write(tmp_path / "s.zarr", cube(bands, 0), cube(heights, 1), valid)
    assert_finite(scene, config_of(small_config, prepare))
