"""Scenes as a training stage reads them: prepared, flat, on the device of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiffclip.errors import InputDataError
from fastdiffclip.kernels import FlatScene, philox
from fastdiffclip.scene.prepare import FrontEnd, PreparedScenes, prepare_scenes, prepared_bytes, storage_dtypes
from fastdiffclip.scene.store import Scene
from fastdiffclip.scene.windows import centre_mask, crop_centres, read_windows, require_whole_windows
from fastdiffclip.train.loop import EpochOrder
from fastdiffclip.train.steps import Feed


@dataclass(frozen=True)
class UmdData:
    """Windows of UMD, drawn once and kept: where they are and what they are read from.

    Attributes:
        flat: one flat scene per modality, in the order of the front end.
        centres: ``(S, 3)`` int64 on the device.
    """

    flat: list[FlatScene]
    centres: Tensor

    def batch(self, order: EpochOrder, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``order`` says of ``step``, with centres in :attr:`flat`, ``(rows, 3)``, in place of samples."""
        chosen, rows, total = order(step)
        return self.centres[chosen], rows, total

    @contextmanager
    def feed(self, first: int, total: int) -> Iterator[Feed | None]:
        """Around the steps ``first`` to ``total``: what brings the data of each of them; nothing here."""
        yield None


def device_room(device: torch.device) -> int | None:
    """Bytes that windows may take on a GPU, half of what is free; None on a CPU, where the memory budget says it."""
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 2


def window_bytes(scenes: Sequence[Scene], front_end: FrontEnd, window: int) -> int:
    """Bytes of one window as it is stored, over all modalities; a byte for the validity of a token."""
    dtypes = storage_dtypes(scenes, front_end)
    return window**2 * sum(count * dtypes[name].itemsize + 1 for name, count in front_end.channels.items())


def flatten(prepared: PreparedScenes, device: torch.device) -> list[FlatScene]:
    """Prepared arrays as kernels read them."""
    return [
        FlatScene.from_numpy(part.pixels, part.scale, part.offset, part.valid, prepared.extents, device)
        for part in prepared.modalities.values()
    ]


def umd_data(
    scenes: Sequence[Scene],
    front_end: FrontEnd,
    samples: int,
    window: int,
    seed: int,
    budget: int,
    device: torch.device,
) -> UmdData:
    """Draw ``samples`` windows whose centre is valid in every modality; purpose ``CENTRE`` of the random numbers.

    Scenes within ``budget`` bytes are held whole. Beyond it only the drawn windows are read, in chunk order; both
    give the same numbers.

    Raises:
        InputDataError: no pixel is valid in all modalities.
    """
    centres = unlabelled_centres(scenes, samples, window, seed)
    if prepared_bytes(scenes, front_end) <= budget:
        prepared = prepare_scenes(scenes, front_end)
        return UmdData(flatten(prepared, device), torch.from_numpy(centres).to(device))
    prepared = read_windows(scenes, front_end, centres, window)
    own = crop_centres(len(centres), window)
    return UmdData(flatten(prepared, device), torch.from_numpy(own).to(device))


def unlabelled_centres(scenes: Sequence[Scene], samples: int, window: int, seed: int) -> np.ndarray:
    """Centres ``(n, 3)`` int64 of at most ``samples`` windows, drawn from the masks of the scenes; as :func:`umd_data`.

    Raises:
        InputDataError: no pixel is valid in all modalities.
    """
    require_whole_windows(scenes, window)
    masks = [centre_mask(scene) for scene in scenes]
    begin = np.cumsum([0, *(count for mask in masks for count in np.count_nonzero(mask, axis=1).tolist())])
    if begin[-1] == 0:
        raise InputDataError(
            "no pixel of the scenes is valid in every modality; see 'fastdiffclip scene info' for the shares"
        )
    drawn = philox.first_of_permutation(philox.rng_state(seed), philox.CENTRE, int(begin[-1]), samples).numpy()
    # The drawn ones of all valid pixels, counted row by row and scene by scene: only their rows are looked at again.
    line = np.searchsorted(begin, drawn, side="right") - 1
    first_line = np.cumsum([0, *(len(mask) for mask in masks)])
    number = np.searchsorted(first_line, line, side="right") - 1
    centres = np.stack([number, line - first_line[number], np.empty_like(drawn)], axis=1)
    by_line = np.argsort(line, kind="stable")
    lines, starts = np.unique(line[by_line], return_index=True)
    for one, here in zip(lines.tolist(), np.split(by_line, starts[1:]), strict=True):
        scene, row = centres[here[0], :2]
        centres[here, 2] = np.flatnonzero(masks[scene][row])[drawn[here] - begin[one]]
    return centres


def scene_records(scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """What a manifest says of the scenes of a run."""
    return [{"name": scene.name, "path": str(scene.path), "sha256": scene.sha256} for scene in scenes]
