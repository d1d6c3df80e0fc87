"""``visible_noise`` of every implementation against loops over plain arrays in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, visible_noise
from fastdiffclip.kernels.flat_scene import PIXEL_DTYPES, FlatScene
from fastdiffclip.kernels.philox import rng_state
from fastdiffclip.kernels.visible_noise import OUT_DTYPES, visible_count

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def few(impl: str, rows: int, interpreted: int = 2) -> int:
    """Windows of a test: an interpreted one takes some 30 ms."""
    return interpreted if impl == "triton" else rows


def rounding(out_dtype: torch.dtype, impl: str) -> float:
    """Largest relative error of a store; Triton's interpreter cuts bfloat16 off, a GPU rounds."""
    return 2.0**-7 if impl == "triton" and out_dtype == torch.bfloat16 else ROUNDING[out_dtype]


@pytest.fixture(params=tuple(dispatch.implementations("cpu")["visible_noise"]))
def impl(request) -> str:
    found = dispatch.implementations("cpu")["visible_noise"][request.param]
    if found != "ok":
        pytest.skip(f"{request.param}: {found}")
    return request.param


def schedule() -> torch.Tensor:
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1).float()


def expected(truth, philox_truth, centre, position, t, *, window, visible, modality, seed, step):
    """ids ``(V,)``, x_t ``(V, C)`` in float64, and the error that float32 arithmetic may add."""
    philox_words, normals = philox_truth
    tokens = np.arange(window * window)
    word = philox_words(0, tokens + 65536 * modality, position, 1, seed, step)[0]
    ids = np.sort(np.lexsort((tokens, word))[:visible])
    index, _ = truth.window(centre, window)
    x = truth.values(index[ids])
    size = np.abs(truth.stored[index[ids]] * truth.scale) + np.abs(truth.offset)
    if t is None:
        return ids, x, 2.0**-23 * size
    keep, noise = (float(v) for v in schedule()[t])
    eps = normals(ids, x.shape[1], position, modality, seed, step)
    allowed = 1e-6 * np.maximum(1, np.abs(eps)) + 2.0**-22 * (size + np.abs(eps))
    return ids, keep * x + noise * eps, allowed


def check(truth, philox_truth, impl, *, rows, window, visible, modality=0, out_dtype=torch.float32, noisy=True):
    seed, step, first = 9, 4, 77
    centres = truth.centres(rows)
    t = torch.tensor([(123 * i) % 1000 for i in range(len(centres))]) if noisy else None
    x, ids = visible_noise(
        truth.flat,
        centres,
        t,
        schedule() if noisy else None,
        rng_state(seed, step, first),
        window=window,
        visible=visible,
        modality=modality,
        out_dtype=out_dtype,
        impl=impl,
    )
    assert x.shape == (len(centres), visible, truth.flat.channels) and x.dtype == out_dtype
    assert ids.shape == (len(centres), visible) and ids.dtype == torch.int32
    for row, centre in enumerate(centres):
        want_ids, want, allowed = expected(
            truth,
            philox_truth,
            centre,
            first + row,
            None if t is None else int(t[row]),
            window=window,
            visible=visible,
            modality=modality,
            seed=seed,
            step=step,
        )
        assert ids[row].tolist() == want_ids.tolist()
        allowed = allowed + rounding(out_dtype, impl) * np.abs(want) + 2.0**-24
        excess = np.abs(x[row].double().numpy() - want) - allowed
        assert excess.max() <= 0, f"row {row}: {excess.max()} above the allowed error"


@pytest.mark.parametrize("dtype", PIXEL_DTYPES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_all_dtypes(impl, scene_truth, philox_truth, dtype, out_dtype):
    truth = scene_truth(dtype, channels=7)
    check(truth, philox_truth, impl, rows=few(impl, 12), window=5, visible=8, out_dtype=out_dtype)


@pytest.mark.parametrize("modality", [0, 1, 65535])
def test_paper_shape_on_several_scenes_with_invalid_pixels(impl, scene_truth, philox_truth, modality):
    truth = scene_truth(torch.uint16, channels=144, invalid=0.4)
    check(truth, philox_truth, impl, rows=few(impl, 9), window=11, visible=36, modality=modality)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    radius=st.integers(0, 7),
    share=st.floats(0, 1),
    channels=st.integers(1, 40),
    invalid=st.sampled_from([0, 0.5]),
    noisy=st.booleans(),
    dtype=st.sampled_from(PIXEL_DTYPES),
    rows=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_any_shape(impl, scene_truth, philox_truth, radius, share, channels, invalid, noisy, dtype, rows, seed):
    window = 2 * radius + 1
    truth = scene_truth(dtype, channels, invalid, seed)
    visible = max(1, round(share * window * window))
    check(truth, philox_truth, impl, rows=min(rows, few(impl, rows)), window=window, visible=visible, noisy=noisy)


def test_clean_window_with_all_tokens_is_the_window(impl, scene_truth):
    truth = scene_truth(torch.float32, channels=3)
    centres = truth.centres(few(impl, 20, 6))
    x, ids = visible_noise(truth.flat, centres, None, None, rng_state(0), window=5, visible=25, impl=impl)
    assert torch.equal(ids, torch.arange(25, dtype=torch.int32).expand(len(centres), 25))
    want = np.stack([truth.values(truth.window(c, 5)[0]) for c in centres])
    np.testing.assert_allclose(x.numpy(), want, rtol=1e-6, atol=1e-6)


def test_padding_rows_are_zero_and_the_others_untouched(impl, scene_truth):
    truth = scene_truth()
    rows = few(impl, 10, 4)
    centres, t = truth.centres(rows), torch.arange(rows) * 50
    call = dict(window=5, visible=6, impl=impl)
    whole, whole_ids = visible_noise(truth.flat, centres, t, schedule(), rng_state(1), **call)
    for real in (0, 3, rows):
        count = torch.tensor(real)
        x, ids = visible_noise(truth.flat, centres, t, schedule(), rng_state(1), valid_rows=count, **call)
        assert torch.equal(x[:real], whole[:real]) and torch.equal(ids[:real], whole_ids[:real])
        assert not x[real:].any()
        assert torch.equal(ids[real:], torch.arange(6, dtype=torch.int32).expand(rows - real, 6))


@pytest.mark.parametrize("split", [1, 4, 9])
def test_micro_batches_equal_the_whole(impl, scene_truth, split):
    truth = scene_truth(channels=9)
    rows = 10 if impl != "triton" or split == 9 else split + 1
    centres, t = truth.centres(rows), torch.arange(rows) * 99
    parts = [
        visible_noise(
            truth.flat,
            centres[part],
            t[part],
            schedule(),
            rng_state(1, 2, 30 + part.start),
            window=7,
            visible=15,
            modality=1,
            impl=impl,
        )
        for part in (slice(0, split), slice(split, rows))
    ]
    whole = visible_noise(
        truth.flat, centres, t, schedule(), rng_state(1, 2, 30), window=7, visible=15, modality=1, impl=impl
    )
    for i in (0, 1):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize("invalid", [0.0, 0.4])
def test_implementations_choose_the_same_ids(impl, scene_truth, invalid):
    truth = scene_truth(torch.float16, channels=31, invalid=invalid)
    centres = truth.centres(few(impl, 40, 4))
    t = (torch.arange(len(centres)) * 37) % 1000
    call = dict(window=11, visible=36)
    x, ids = visible_noise(truth.flat, centres, t, schedule(), rng_state(5), impl=impl, **call)
    oracle, oracle_ids = visible_noise(truth.flat, centres, t, schedule(), rng_state(5), impl="reference", **call)
    assert torch.equal(ids, oracle_ids)
    torch.testing.assert_close(x, oracle, rtol=1e-6, atol=5e-6)


def test_normals_are_within_the_promised_bound(impl, philox_truth):
    """A scene of zeros and a schedule of (0, 1) leave the noise alone: |delta| <= 1e-6 max(1, |eps|)."""
    _, normals = philox_truth
    flat = FlatScene(torch.zeros(1, 146), torch.ones(146), torch.zeros(146), None, torch.tensor([[0, 1, 1]]))
    rows = few(impl, 12)
    noise_only, at = torch.tensor([[0.0, 1.0]]), torch.zeros(rows, dtype=torch.int64)
    centres, rng = torch.zeros(rows, 3, dtype=torch.int64), rng_state(2**32 - 1, 2**32 - 1, 2**32 - 1)
    x, ids = visible_noise(flat, centres, at, noise_only, rng, window=11, visible=121, modality=3, impl=impl)
    for row in range(rows):
        truth = normals(ids[row].numpy(), 146, (2**32 - 1 + row) % 2**32, 3, 2**32 - 1, 2**32 - 1)
        assert (np.abs(x[row].double().numpy() - truth) <= 1e-6 * np.maximum(1, np.abs(truth))).all()


def test_the_largest_windows_and_what_lies_beyond(impl, scene_truth, philox_truth):
    truth = scene_truth(torch.uint16, channels=2)
    check(truth, philox_truth, impl, rows=1, window=31, visible=288)
    if impl != "triton":
        return check(truth, philox_truth, impl, rows=1, window=33, visible=327)
    with pytest.raises(UsageError, match="'triton' cannot be used: it takes windows up to 31 x 31, not 33 x 33"):
        check(truth, philox_truth, impl, rows=1, window=33, visible=327)


def test_graphs_hold_the_op(impl, scene_truth):
    """Traced without a break, several modalities and padding rows in one graph, and the same bits come out."""
    truths = [scene_truth(torch.uint16, channels=3, seed=1), scene_truth(torch.float32, channels=1, invalid=0, seed=2)]
    centres, table = truths[0].centres(2), schedule()

    def step(times: torch.Tensor, rng: torch.Tensor, count: torch.Tensor) -> list[torch.Tensor]:
        out: list[torch.Tensor] = []
        for m, truth in enumerate(truths):
            out += visible_noise(
                truth.flat, centres, times, table, rng, window=3, visible=4, modality=m, valid_rows=count, impl=impl
            )
        return [*out, *visible_noise(truths[0].flat, centres, None, None, rng, window=3, visible=9, impl=impl)]

    arguments = torch.tensor([7, 8]), rng_state(3), torch.tensor(1)
    expected = step(*arguments)
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(traced(*arguments), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("noisy", [True, False])
def test_op_is_what_torch_expects(impl, scene_truth, noisy):
    if impl == "reference":
        pytest.skip("plain torch, no op of its own")
    flat = scene_truth(torch.float16, channels=2, invalid=0.3 if noisy else 0).flat
    noise = (torch.tensor([3, 9]), schedule()[:10]) if noisy else (None, None)
    centres, count = torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor(1) if noisy else None
    arguments = (*flat.tensors, centres, *noise, rng_state(0), 3, 4, 1, count, torch.bfloat16, impl)
    torch.library.opcheck(torch.ops.fastdiffclip.visible_noise.default, arguments)


@pytest.mark.parametrize("times", [[0, 1000], [-1, 5], [2**40, 0]])
def test_timestep_outside_the_schedule_is_named(impl, scene_truth, times):
    truth = scene_truth()
    with pytest.raises(
        UsageError, match=r"timestep must lie in 0\.\.999, the rows of schedule; got values -?\d+ to \d+"
    ):
        visible_noise(
            truth.flat,
            truth.centres(2),
            torch.tensor(times),
            schedule(),
            rng_state(0),
            window=3,
            visible=2,
            impl=impl,
        )


@pytest.mark.parametrize("centre", [[3, 0, 0], [-1, 0, 0], [0, 9, 0], [0, 0, -1], [1, 0, 2**40]])
def test_centre_outside_is_named(impl, scene_truth, centre):
    centres = torch.tensor([[0, 0, 0], centre])
    with pytest.raises(UsageError, match=r"centre 1 is \(scene, row, column\) \("):
        visible_noise(scene_truth().flat, centres, None, None, rng_state(0), window=3, visible=2, impl=impl)


def test_no_windows_at_all(impl, scene_truth):
    centres, times = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    x, ids = visible_noise(scene_truth().flat, centres, times, schedule(), rng_state(0), window=3, visible=2, impl=impl)
    assert x.shape == (0, 2, 5) and ids.shape == (0, 2)


@pytest.mark.parametrize(
    ("ratio", "tokens", "count"), [(0.7, 121, 36), (0.0, 9, 9), (1.0, 9, 1), (0.5, 9, 4), (0.75, 1, 1)]
)
def test_visible_count(ratio, tokens, count):
    assert visible_count(tokens, ratio) == count


MISUSE = [
    (dict(window=4), "window must be odd"),
    (dict(window=257), "window must be odd and between 1 and 255"),
    (dict(visible=0), r"visible must lie in 1\.\.9"),
    (dict(visible=10), r"visible must lie in 1\.\.9"),
    (dict(modality=-1), "modality must lie in"),
    (dict(out_dtype=torch.float64), "out_dtype must be"),
    (dict(centres=torch.zeros(2, 3)), "centres must be a"),
    (dict(timestep=None), "timestep and schedule go together"),
    (dict(timestep=torch.zeros(3, dtype=torch.int64)), "timestep must be an int64"),
    (dict(timestep=torch.zeros(2)), "timestep must be an int64"),
    (dict(schedule=torch.zeros(1000, 3)), "schedule must be a"),
    (dict(schedule=torch.zeros(1000, 2, dtype=torch.float64)), "schedule must be a"),
    (dict(rng=torch.zeros(2, dtype=torch.int64)), "rng must be the"),
    (dict(rng=torch.zeros(3)), "rng must be the"),
    (dict(valid_rows=torch.tensor(1.0)), "valid_rows must be a scalar int64"),
    (dict(valid_rows=torch.tensor([1])), "valid_rows must be a scalar int64"),
    (dict(centres=torch.zeros(2, 3, dtype=torch.int64, device="meta")), "centres must be on cpu like the scene"),
    (dict(timestep=torch.zeros(2, dtype=torch.int64, device="meta")), "timestep must be an int64 .* on cpu"),
    (dict(schedule=torch.zeros(9, 2, device="meta")), "schedule must be a .* on cpu"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_names_the_argument(scene_truth, change, message):
    call = dict(
        centres=torch.tensor([[0, 0, 0], [0, 1, 1]]),
        timestep=torch.zeros(2, dtype=torch.int64),
        schedule=schedule(),
        rng=rng_state(0),
        window=3,
        visible=2,
    )
    with pytest.raises(UsageError, match=message):
        visible_noise(scene_truth().flat, **{**call, **change})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("pixels", torch.zeros(4, 2, dtype=torch.float64)),
        ("pixels", torch.zeros(2, 4).T),
        ("scale", torch.ones(3)),
        ("offset", torch.ones(2, dtype=torch.float64)),
        ("valid", torch.zeros(2, dtype=torch.uint8)),
        ("extents", torch.zeros(1, 3)),
    ],
)
def test_flat_scene_names_the_wrong_tensor(field, wrong):
    good = dict(
        pixels=torch.zeros(4, 2),
        scale=torch.ones(2),
        offset=torch.zeros(2),
        valid=torch.full((1,), 15, dtype=torch.uint8),
        extents=torch.tensor([[0, 2, 2]]),
    )
    FlatScene(**good)
    with pytest.raises(UsageError, match=f"{field} must be"):
        FlatScene(**{**good, field: wrong})
