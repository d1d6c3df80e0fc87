"""Where pretraining draws its windows: the first of a permutation of all pixels that are valid everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError
from fastdiffclip.kernels import philox
from fastdiffclip.train.data import unlabelled_centres


@dataclass
class Masked:
    """As much of a scene as drawing reads."""

    mask: np.ndarray
    centre_only: bool = False

    @property
    def height(self) -> int:
        return len(self.mask)

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    def read_valid_everywhere(self) -> np.ndarray:
        return self.mask.copy()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scenes=st.integers(1, 4), samples=st.integers(1, 400), share=st.floats(0, 1))
def test_centres_are_the_first_of_a_permutation(seed: int, scenes: int, samples: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    stored = [Masked(rng.random(rng.integers(1, 12, 2)) < share) for _ in range(scenes)]
    stored.append(Masked(np.ones((5, 5), bool), centre_only=True))
    every = [(n, *place) for n, scene in enumerate(stored[:-1]) for place in np.argwhere(scene.mask)] + [(scenes, 2, 2)]
    order = philox.permutation(philox.rng_state(seed), philox.CENTRE, len(every))[:samples]
    found = unlabelled_centres(stored, samples, 5, seed)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, np.array(every)[order.numpy()].reshape(-1, 3))
    assert found.dtype == np.int64


def test_no_valid_pixel_is_said() -> None:
    blank = [Masked(np.zeros((4, 3), bool)), Masked(np.zeros((5, 5), bool), centre_only=True)]
    with pytest.raises(InputDataError, match="no pixel of the scenes is valid"):
        unlabelled_centres(blank, 10, 5, 0)  # type: ignore[arg-type]


def test_a_scene_of_another_window_is_refused() -> None:
    alone = SimpleNamespace(centre_only=True, height=3, width=3, path="exam.zarr")
    with pytest.raises(InputDataError, match="one window of 3 x 3"):
        unlabelled_centres([alone], 10, 5, 0)  # type: ignore[list-item]
