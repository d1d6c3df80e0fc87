"""The choice of visible tokens in Triton, word by word, and what the launcher asks of the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastdiffclip.kernels import masked_mse, visible_noise
from fastdiffclip.kernels.philox import rng_state
from fastdiffclip.kernels.triton import masked_mse as mse_file
from fastdiffclip.kernels.triton import visible_noise as noise_file
from fastdiffclip.kernels.triton.launch import Launch
from fastdiffclip.kernels.triton.visible_noise import chosen_tokens, ids_of

LAST = 2**32 - 1


@triton.jit
def _choose(words, ids, VISIBLE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr):
    token_L, slot_V = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_V)
    word_L = tl.load(words + token_L, mask=token_L < TOKENS, other=0)
    id_V = ids_of(chosen_tokens(word_L, VISIBLE, TOKENS, BLOCK_L), BLOCK_L, BLOCK_V)
    tl.store(ids + slot_V, id_V, mask=slot_V < VISIBLE)


def choose(words: list[int], visible: int) -> list[int]:
    ids = torch.full((visible,), -1, dtype=torch.int32)
    block_l, block_v = max(16, triton.next_power_of_2(len(words))), triton.next_power_of_2(visible)
    _choose[(1,)](torch.tensor(words).to(torch.uint32), ids, visible, len(words), block_l, block_v)
    return ids.tolist()


def smallest(words: list[int], visible: int) -> list[int]:
    order = np.lexsort((np.arange(len(words)), np.array(words, dtype=np.uint64)))
    return sorted(order[:visible].tolist())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_smallest_words_ties_by_id(data):
    """Few different words, so that most choices end inside a tie; the largest also stands behind the last token."""
    alphabet = st.sampled_from([0, 1, 5, 2**28, 2**28 + 1, 2**31, LAST - 1, LAST]) | st.integers(0, LAST)
    words = data.draw(st.lists(alphabet, min_size=2, max_size=130))
    visible = data.draw(st.integers(1, len(words) - 1))
    assert choose(words, visible) == smallest(words, visible)


@pytest.mark.parametrize("visible", [1, 287, 959, 960])
def test_the_largest_window(visible):
    words = np.random.default_rng(visible).integers(0, LAST, 961).tolist()
    assert choose(words, visible) == smallest(words, visible)
    assert choose([LAST] * 961, visible) == list(range(visible))


@pytest.mark.parametrize("claimed", [300, 10**6])
def test_launch_settings_change_no_bit(monkeypatch, scene_truth, claimed):
    """As launched for 2, 300 and a million rows: other tiles and splits give the same x_t, ids and gradients."""
    truth = scene_truth(torch.uint16, channels=60, invalid=0.3)
    centres, times = truth.centres(2), torch.tensor([5, 900])
    schedule = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    prediction = torch.randn(2, 81, 60, generator=torch.Generator().manual_seed(1))

    def run(rows: int) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        used = []
        with monkeypatch.context() as patch:
            for file in (noise_file, mse_file):

                def claim(_, *args, chosen=file.settings, **sizes):
                    launch, splits = chosen(rows, *args, **sizes)
                    used.append((splits, launch.constants["BLOCK_Q"]))
                    return launch, splits

                patch.setattr(file, "settings", claim)
            x, ids = visible_noise(
                truth.flat, centres, times, schedule, rng_state(3, 1), window=9, visible=70, impl="triton"
            )
            leaf = prediction.clone().requires_grad_()
            loss = masked_mse(leaf, truth.flat, centres, ids, window=9, impl="triton")
            loss.backward()
        return [x, ids, leaf.grad, loss.detach()], used

    (*bits, loss), used = run(claimed)
    (*plain_bits, plain_loss), plain_used = run(2)
    assert all(a != b for a, b in zip(used, plain_used, strict=True))
    assert all(map(torch.equal, bits, plain_bits))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)


def test_rows_are_on_the_axis_that_holds_two_billion(monkeypatch, scene_truth):
    """Axes 1 and 2 of a grid end at 65,535. Only the grid is looked at: so many programs would take an hour here."""
    grids = []
    monkeypatch.setattr(Launch, "__call__", lambda self, grid, *arguments: grids.append(grid))
    truth = scene_truth(channels=2)
    centres = truth.centres(1).expand(70_000, 3)
    _, ids = visible_noise(truth.flat, centres, None, None, rng_state(0), window=3, visible=2, impl="triton")
    ids[:] = torch.tensor([0, 1])
    masked_mse(torch.zeros(70_000, 9, 2), truth.flat, centres, ids, window=3, impl="triton")
    assert grids == [(70_000, 1), (70_000, 1)]


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in (out,) if isinstance(out, torch.Tensor) else ():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and storage.nbytes():
                self.bytes[storage.data_ptr()] = storage.nbytes()
                self.kept.append(tensor)
        return out


def test_nothing_but_the_results_is_allocated(scene_truth):
    """No window, noise, mask or target tensor: x_t and ids, and for the loss one number per program."""
    truth = scene_truth(torch.uint16, channels=16)
    centres, times, schedule = truth.centres(3), torch.tensor([1, 2, 3]), torch.rand(10, 2)
    call = dict(window=5, visible=8, modality=0, valid_rows=torch.tensor(2), out_dtype=torch.float32)
    with Allocations() as made:
        x, ids = noise_file.visible_noise(truth.flat, centres, times, schedule, rng_state(0), **call)
    assert sorted(made.bytes.values()) == sorted([x.nbytes, ids.nbytes, *small(made)])
    prediction = torch.randn(3, 25, 16)
    weights = dict(masked_weight=1.0, visible_weight=1.0, valid_rows=None, total_rows=None)
    with Allocations() as made:
        _, grad = mse_file.masked_mse(prediction, truth.flat, centres, ids, window=5, with_grad=True, **weights)
    assert sorted(made.bytes.values()) == sorted([grad.nbytes, *small(made)])


def small(made: Allocations) -> list[int]:
    return [size for size in made.bytes.values() if size <= 64]


def test_offline_cases_are_what_is_launched():
    """All stored dtypes, both result dtypes, windows 3 to 31, and the channels that have a code of their own."""
    cases = [case.name for case in noise_file.offline_cases() + mse_file.offline_cases()]
    assert len(set(cases)) == len(cases)
    for part in ("uint16", "int16", "float16", "bfloat16", "float32", "3 x 3", "15 x 15", "31 x 31", "x 1,", "x 31,"):
        assert any(part in name for name in cases)
