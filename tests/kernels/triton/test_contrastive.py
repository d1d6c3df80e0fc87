"""``contrastive`` in Triton beyond what holds for every implementation: tiles, blocks, memory, and what torch sees."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import contrastive, contrastive_columns, dispatch
from fastdiffclip.kernels.triton import contrastive as tiled
from fastdiffclip.kernels.triton import contrastive_ops, contrastive_tiles
from fastdiffclip.kernels.triton.contrastive_tiles import Tile

from ..contrastive_truth import assert_right, draw, results

TARGETS = ("pairwise", "class")
DTYPES = (torch.float32, torch.bfloat16)
SMALL_TILE = Tile(32, 16, 16, 4, 2)
pytestmark = pytest.mark.skipif(
    dispatch.implementations("cpu")["contrastive"]["triton"] != "ok", reason="Triton is not interpreted"
)


@pytest.fixture(params=["one program", "tiles"])
def regime(request, monkeypatch) -> str:
    if request.param == "tiles":
        monkeypatch.setattr(contrastive_ops, "ONE_PROGRAM", ())
    return request.param


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Tiles of 32 x 16 and blocks of 64 x 32, so that few images make many of both; TEXT_BLOCK stays what it is."""
    monkeypatch.setattr(contrastive_ops, "ONE_PROGRAM", ())
    for module in (tiled, contrastive_tiles):
        monkeypatch.setattr(module, "tile_of", lambda dtype, width: SMALL_TILE)
    monkeypatch.setattr(tiled, "BLOCK_SCORES", 64 * 32)
    monkeypatch.setattr(tiled, "LONGEST_BLOCK", 32)


def check(n, k, d, dtype=torch.float64, scale=14.3, seed=0, **options):
    """The kernels against float64, on random embeddings in ``dtype`` (float64: the reference's error in float32)."""
    image, text, labels, _ = draw(n, k, d, seed=seed)
    image, text = (x.detach().to(dtype) for x in (image, text))
    assert_right("triton", options.pop("targets", "pairwise"), image, text, labels, torch.tensor(scale), **options)


def single(n, k, d):
    """Images, texts and labels in float32."""
    image, text, labels, _ = draw(n, k, d, dtype=torch.float32)
    return image.detach(), text.detach(), labels


def triton_results(image, text, labels, scale, **options):
    """Loss and the three gradients in float64."""
    op = functools.partial(contrastive, impl="triton", **options)
    return results(lambda z, t, s: op(z, t, labels, s), (image, text, torch.tensor(scale)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("targets", TARGETS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 50),
    d=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.5, 14.3, 62.0, 63.0, 300.0]),
    real=st.none() | st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_any_number_of_tiles_and_blocks(targets, n, k, d, dtype, scale, real, seed):
    """Scales on both sides of where scores are no longer tame."""
    check(n, k, d, dtype, scale, seed, targets=targets, real=None if real is None else min(real, n))


@pytest.mark.parametrize("targets", TARGETS)
@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 64), st.integers(1, 64)) | st.tuples(st.integers(65, 128), st.integers(1, 32)),
    d=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    real=st.none() | st.integers(1, 128),
    seed=st.integers(0, 9),
)
def test_any_shape_of_one_program(targets, shape, d, dtype, real, seed):
    check(*shape, d, dtype, seed=seed, targets=targets, real=None if real is None else min(real, shape[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("targets", "scale"), [("pairwise", 14.3), ("class", 100.0)])
def test_the_tiles_of_the_table(monkeypatch, dtype, targets, scale):
    """Real tiles: two rows of them, two or three columns, four blocks; D is no multiple of a step."""
    monkeypatch.setattr(tiled, "BLOCK_SCORES", 1 << 14)
    monkeypatch.setattr(tiled, "LONGEST_BLOCK", 128)
    check(150, 140, 70, dtype, scale, targets=targets, real=141)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("programs", [1, 7, 512])
def test_texts_in_parts(monkeypatch, programs):
    monkeypatch.setattr(tiled, "PROGRAMS", programs)
    monkeypatch.setattr(contrastive_tiles, "MERGE_PARTS", 2)
    parts, in_part = tiled.parts_of_texts(90, 130, SMALL_TILE)
    assert (parts - 1) * in_part < 9 <= parts * in_part and parts == {1: 1, 7: 2, 512: 9}[programs]
    for scale in (14.3, 500.0):
        check(90, 130, 20, scale=scale, targets="class", real=80)


@pytest.mark.parametrize("width", [1, 16, 1025, 2500])
def test_widths_beyond_one_step_of_the_norms(width):
    check(9, 40, width, targets="class")  # 40 texts and 1024 channels fit one program


def test_launches_stay_within_what_a_grid_may_hold():
    """Axis 0 holds what is long; axis 1 holds at most 65,535 at any size, and a block at most what it should."""
    for images, texts in (
        (1, 1 << 28),
        (1 << 28, 1),
        (65536, 65536),
        (1000, 1 << 24),
        (1 << 20, 15),
        (1 << 20, 1 << 20),
    ):
        for dtype in DTYPES:
            tile = contrastive_tiles.tile_of(dtype, 512)
            rows, columns = tiled.block_of_scores(images, texts, tile)
            assert rows % tile.images == 0 == columns % tile.texts
            assert 0 < rows * columns <= tiled.BLOCK_SCORES and columns // tile.texts < 1 << 16
            assert tiled.parts_of_texts(images, texts, tile)[0] < 1 << 16
            assert contrastive_ops.TEXT_BLOCK % tile.texts == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(regime, dtype):
    image, text, labels = single(60, 50, 24)
    given = image.to(dtype), text.to(dtype), labels, 14.3
    once, again = (triton_results(*given, targets="class") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


class Live(TorchDispatchMode):
    """Bytes of all tensors made inside that live at the same time, at most; views of ``given`` are none."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given}
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.given:
                storage = tensor.untyped_storage()
                self.known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.known = {key: value for key, value in self.known.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return out


def test_memory_is_what_the_formula_says(monkeypatch):
    """Measured with the launches left out: they allocate nothing."""
    monkeypatch.setattr(contrastive_tiles.Launch, "__call__", lambda *_: None)
    image, text, labels = single(3000, 2500, 64)
    batch = tiled.Batch(image, text, labels, torch.tensor(14.3))
    allowed = tiled.workspace_bytes(3000, 2500, 64, torch.float32)
    with Live(*batch) as forward:
        _, *sums = tiled.loss_and_sums(batch, True, None, None, None)
    with Live(*batch, *sums) as backward:
        tiled.gradients(torch.tensor(1.0), batch, *sums, True, True)
    assert 0.9 * allowed[0] <= forward.peak <= allowed[0]
    assert 0.9 * allowed[1] <= backward.peak <= allowed[1]


def test_memory_at_full_size_is_under_two_percent_of_the_scores():
    scores = 4 * 65536**2
    forward, backward = tiled.workspace_bytes(65536, 65536, 512, torch.bfloat16)
    assert forward < 0.009 * scores and backward < 0.017 * scores


class Products(TorchDispatchMode):
    """How many matrix products run inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "addmm" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("needed", "products"), [((True, True), 2), ((True, False), 1), ((False, False), 0)])
def test_no_product_for_a_gradient_that_nobody_needs(needed, products):
    image, text, labels = single(20, 10, 8)
    batch = tiled.Batch(image, text, labels, torch.tensor(14.3))
    _, *sums = tiled.loss_and_sums(batch, True, None, None, None)
    with Products() as counted:
        found = tiled.gradients(torch.tensor(1.0), batch, *sums, *needed)
    assert counted.count == products
    assert [x.numel() > 0 for x in found] == [*needed, True]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_gradient_alone(regime, which):
    image, text, labels = single(20, 10, 8)
    every = triton_results(image, text, labels, 14.3)[1:]
    leaves = [image.clone(), text.clone(), torch.tensor(14.3)]
    leaves[which].requires_grad_()
    loss = contrastive(leaves[0], leaves[1], labels, leaves[2], impl="triton")
    (3 * loss).backward()
    tolerance = 1e-6 * float(every[which].abs().max())  # a block of scores that is three times as large
    torch.testing.assert_close(leaves[which].grad.double(), 3 * every[which], rtol=0, atol=3 * tolerance)
    assert [x.grad is None for x in leaves].count(True) == 2


@pytest.mark.parametrize("how", ["reference", "triton", "triton in tiles"])
@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_holds_it(monkeypatch, how, grad):
    if how == "triton in tiles":
        monkeypatch.setattr(contrastive_ops, "ONE_PROGRAM", ())
    impl = how.split()[0]
    image, text, labels = single(12, 5, 8)
    scale, rows = torch.tensor(14.3), torch.tensor(11)

    def both(z, t, s):
        sums = contrastive_columns(z, t, s, rows, impl=impl)
        counts = torch.ones(5)
        plain = contrastive(z, t, labels, s, valid_rows=rows, impl=impl)
        given = dict(valid_rows=rows, counts=counts, column_logsumexp=sums)
        return plain + contrastive(z, t, labels, s, targets="class", impl=impl, **given)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found = []
    for run in (both, compiled):
        leaves = [x.clone().requires_grad_(grad) for x in (image, text, scale)]
        loss = run(*leaves)
        found.append([loss.detach(), *(torch.autograd.grad(loss, leaves) if grad else ())])
    torch._dynamo.reset()
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(eager, traced)


def test_ops_are_what_torch_expects():
    image, text, labels = single(6, 4, 8)
    image.requires_grad_(), text.requires_grad_()
    scale, rows, counts = torch.tensor(14.3, requires_grad=True), torch.tensor(5), torch.ones(4)
    opcheck = torch.library.opcheck
    for optional in ((None, None, None), (rows, counts, counts)):
        opcheck(contrastive_ops._one_program, (image, text, labels, scale, *optional, True))
        opcheck(contrastive_ops._tiled, (image, text, labels, scale, *optional, False))
    detached = [x.detach() for x in (image, text)]
    opcheck(contrastive_ops._columns, (*detached, scale.detach(), rows))
    _, *sums = contrastive_ops._tiled(*detached, labels, scale.detach(), None, None, None, True)
    outer = torch.tensor(2.0)
    for needed in ((True, True), (False, True)):
        opcheck(contrastive_ops._tiled_backward, (outer, *detached, labels, scale.detach(), *sums, *needed))
    opcheck(contrastive_ops._scaled_gradients, (torch.ones(10 * 8 + 1), outer, 6, 4, torch.bfloat16))


def test_any_layout_and_half_precision(regime):
    """Strided, transposed and float16 arguments, and a logit scale of shape (1,)."""
    image, text, labels = single(20, 10, 8)
    known = triton_results(image, text, labels, 14.3)
    wide = torch.stack([image, image], dim=2)[..., 1].T.contiguous().T
    loss = contrastive(wide, text.T.contiguous().T, labels.repeat(2)[:20], torch.tensor([14.3]), impl="triton")
    assert loss.shape == () and loss.double() == known[0]
    half = image.half().requires_grad_()
    (gradient,) = torch.autograd.grad(contrastive(half, text, labels, torch.tensor(14.3), impl="triton"), half)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.double(), known[1], rtol=1e-2, atol=1e-2 * float(known[1].abs().max()))


def test_autocast_changes_nothing(regime):
    given = single(20, 10, 8)
    known = triton_results(*given, 14.3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = triton_results(*given, 14.3)
    assert all(torch.equal(a, b) for a, b in zip(known, inside, strict=True))


def test_labels_out_of_range_stay_inside_memory(regime):
    """On a GPU nobody looks at them first; what comes out is finite, what they mean is nobody's promise."""
    image, text, labels = single(20, 10, 8)
    labels[3], labels[5] = 10, -7
    op = contrastive_ops._one_program if regime == "one program" else contrastive_ops._tiled
    loss, *rest = op(image, text, labels, torch.tensor(14.3), None, None, None, True)
    assert bool(loss.isfinite()) and all(bool(x.isfinite().all()) for x in rest)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy, beneath the interpreter
def test_what_is_no_number_shows(regime):
    image, text, labels = single(20, 10, 8)
    image[7, 3] = float("nan")
    for scale in (14.3, 1000.0):
        with torch.no_grad():
            loss = contrastive(image, text, labels, torch.tensor(scale), impl="triton")
            sums = contrastive_columns(image, text, torch.tensor(scale), impl="triton")
        assert bool(loss.isnan()) and bool(sums.isnan().all())


@pytest.mark.parametrize("op", ["contrastive", "contrastive_columns"])
def test_what_the_kernels_do_not_take(op):
    double, empty = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(0, 3)
    for image, message in ((double, "not torch.float64"), (empty, "one image and one text or more")):
        given = (image, image, torch.zeros(len(image), dtype=torch.int64), torch.tensor(1.0))
        with pytest.raises(UsageError, match=message):
            if op == "contrastive":
                contrastive(*given, impl="triton")
            else:
                contrastive_columns(image, image, given[3], impl="triton")
