"""Which implementation runs, and what is said where one does not."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from fastdiffclip import kernels
from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, native, short_attention, triton, visible_noise
from fastdiffclip.kernels.philox import rng_state

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = {
    "visible_noise",
    "masked_mse",
    "contrastive",
    "contrastive_columns",
    "short_attention",
    "linear",
    "gelu",
    "residual_norm",
}


@pytest.fixture
def made_up(monkeypatch):
    """An op of its own table, with all three implementations."""
    table = {name: (lambda name=name: name) for name in dispatch.IMPLEMENTATIONS}
    monkeypatch.setitem(dispatch._OPS, "made_up", table)


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: (False, "the library is switched off here", None))


def test_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match=r"no implementation 'nativ' \(did you mean 'native'\?\); there is: reference"):
        dispatch.pick("visible_noise", "nativ", CPU)


def test_implementation_that_the_op_lacks_is_named(monkeypatch):
    monkeypatch.setitem(dispatch._OPS, "plain", {"reference": lambda: None})
    with pytest.raises(UsageError, match="plain has no implementation 'native'"):
        dispatch.pick("plain", "native", CPU)


def test_forced_but_unavailable_says_why(made_up, no_native, monkeypatch):
    with pytest.raises(
        UsageError, match="made_up: implementation 'native' cannot be used: the library is switched off"
    ):
        dispatch.pick("made_up", "native", CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UsageError, match="'triton' cannot be used: Triton kernels need a CUDA device"):
        dispatch.pick("made_up", "triton", CPU)
    with pytest.raises(UsageError, match="'native' cannot be used: the native library serves the CPU"):
        dispatch.pick("made_up", "native", CUDA)


def test_best_that_is_there(made_up, monkeypatch):
    monkeypatch.setattr(native, "status", lambda: (True, "", Path("here")))
    assert dispatch.pick("made_up", None, CPU)() == "native"
    assert dispatch.pick("made_up", None, CUDA)() == "triton"
    assert dispatch.pick("made_up", "reference", CUDA)() == "reference"


def test_without_triton_a_gpu_gets_the_reference(made_up, monkeypatch, caplog):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.DEBUG, logger="fastdiffclip.kernels.dispatch"):
        assert dispatch.pick("made_up", None, CUDA)() == "reference"
    assert "made_up: triton not taken: the package triton is not installed" in caplog.text


def test_the_interpreter_runs_on_request_only(made_up, no_native, monkeypatch):
    """It is a thousand times slower than the reference: nobody who set the switch for a test wants it elsewhere."""
    assert dispatch.pick("made_up", None, CPU)() == "reference"
    assert dispatch.pick("made_up", "triton", CPU)() == "triton"
    assert "need a CUDA device" in triton.unavailable(torch.device("meta"))


def test_switched_off_falls_back_and_says_so(made_up, no_native, caplog):
    with caplog.at_level(logging.DEBUG, logger="fastdiffclip.kernels.dispatch"):
        assert dispatch.pick("made_up", None, CPU)() == "reference"
    assert "made_up: native not taken: the library is switched off here" in caplog.text


def test_arguments_that_an_implementation_does_not_take(made_up, monkeypatch, caplog):
    monkeypatch.setattr(native, "status", lambda: (True, "", None))
    unsupported = {"native": "head dimension 7 is not a multiple of 8"}
    with caplog.at_level(logging.DEBUG, logger="fastdiffclip.kernels.dispatch"):
        assert dispatch.pick("made_up", None, CPU, unsupported)() == "reference"
    assert "head dimension 7" in caplog.text
    with pytest.raises(UsageError, match="head dimension 7"):
        dispatch.pick("made_up", "native", CPU, unsupported)


def test_ops_run_with_the_library_switched_off(no_native, scene_truth):
    truth = scene_truth()
    call = dict(window=5, visible=6)
    centres = truth.centres(4)
    ours = visible_noise(truth.flat, centres, None, None, rng_state(0), **call)
    oracle = visible_noise(truth.flat, centres, None, None, rng_state(0), impl="reference", **call)
    assert all(map(torch.equal, ours, oracle))
    q = torch.randn(2, 5, 2, 8)
    assert torch.equal(short_attention(q, q, q), short_attention(q, q, q, impl="reference"))


def test_overview(no_native):
    found = dispatch.implementations("cpu")
    assert set(found) == OPS
    assert all(table["reference"] == "ok" for table in found.values())
    assert found["visible_noise"]["native"] == "the library is switched off here"
    assert "serves the CPU" in dispatch.implementations("cuda")["visible_noise"]["native"]


def test_kernels_refuse_another_name():
    spec = importlib.util.spec_from_file_location("kernels", Path(kernels.__file__))
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match="import it under that name"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
