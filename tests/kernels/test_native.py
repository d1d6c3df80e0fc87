"""The native library against a small NumPy implementation of its own, bit by bit where that is promised."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.kernels import FlatScene, native
from fastdiffclip.kernels.native import loader

pytestmark = pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
DTYPES = (torch.uint16, torch.int16, torch.float16, torch.bfloat16, torch.float32)
MASK, NOISE = 1, 2


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10 of (..., 4) counters, uint64 arrays of 32-bit words."""
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & np.uint64(0xFFFFFFFF)
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & np.uint64(0xFFFFFFFF)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def words(quads: np.ndarray, tokens: np.ndarray, position: int, purpose: int, rng: torch.Tensor) -> np.ndarray:
    fixed = (np.array(position & 0xFFFFFFFF), np.array(purpose))
    return philox(np.stack(np.broadcast_arrays(quads, tokens, *fixed), -1), (int(rng[0]), int(rng[1])))


def expected_ids(tokens: int, visible: int, modality: int, position: int, rng: torch.Tensor) -> np.ndarray:
    token = np.arange(tokens)
    word = words(np.array(0), token + (modality << 16), position, MASK, rng)[:, 0]
    return np.sort(np.lexsort((token, word))[:visible])


def expected_normals(ids: np.ndarray, channels: int, modality: int, position: int, rng: torch.Tensor) -> np.ndarray:
    quads = np.arange((channels + 3) // 4)
    w = words(quads, (ids + (modality << 16))[:, None], position, NOISE, rng).astype(np.int64)
    u = ((w[..., ::2] >> 8) + 1) / 2.0**24
    turn = ((w[..., 1::2] ^ (1 << 31)) - (1 << 31) >> 8) / 2.0**24
    wave = np.stack([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)], -1)
    return (np.sqrt(-2 * np.log(u))[..., None] * wave).reshape(len(ids), -1)[:, :channels]


def expected_values(scene: FlatScene, centre: list[int], ids: np.ndarray, window: int) -> np.ndarray:
    """Normalised values (V, C) float32 of the tokens of one window, by plain loops."""
    first, height, width = scene.extents[centre[0]].tolist()
    own = first + centre[1] * width + centre[2]
    bits = None if scene.valid is None else np.unpackbits(scene.valid.numpy(), bitorder="little")
    stored = scene.pixels.float().numpy()
    rows = []
    for token in ids.tolist():
        y = min(max(centre[1] + token // window - window // 2, 0), height - 1)
        x = min(max(centre[2] + token % window - window // 2, 0), width - 1)
        pixel = first + y * width + x
        rows.append(stored[own if bits is not None and not bits[pixel] else pixel])
    return np.stack(rows) * scene.scale.numpy() + scene.offset.numpy()


def make_scene(channels: int, dtype: torch.dtype = torch.float32, valid: bool = True, seed: int = 0) -> FlatScene:
    """Three scenes: 7 x 9, 1 x 1 and 4 x 3 pixels."""
    g = np.random.default_rng(seed)
    extents = torch.tensor([[0, 7, 9], [63, 1, 1], [64, 4, 3]])
    raw = torch.from_numpy(g.integers(0, 65536, (76, channels), dtype=np.uint16))
    integers = dtype in (torch.uint16, torch.int16)
    pixels = raw.view(dtype) if integers else torch.from_numpy(g.normal(0, 50, (76, channels))).to(dtype)
    scale = torch.from_numpy(g.uniform(0.5, 2, channels).astype(np.float32)) * (1e-4 if integers else 1)
    offset = torch.from_numpy(g.normal(size=channels).astype(np.float32))
    bitmap = torch.from_numpy(np.packbits(g.random(76) < 0.7, bitorder="little")) if valid else None
    return FlatScene(pixels, scale, offset, bitmap, extents)


def make_centres(rows: int, seed: int = 0) -> torch.Tensor:
    """Random centres, the corners of the first scene first."""
    g = np.random.default_rng(seed)
    corners = [[0, 0, 0], [0, 6, 8], [0, 0, 8], [0, 6, 0]]
    size = {0: (7, 9), 1: (1, 1), 2: (4, 3)}
    others = [[s, int(g.integers(size[s][0])), int(g.integers(size[s][1]))] for s in g.integers(0, 3, rows).tolist()]
    return torch.tensor((corners + others)[:rows], dtype=torch.int64).reshape(-1, 3)


def make_mix(rows: int) -> torch.Tensor:
    angle = torch.linspace(0.1, 1.4, max(rows, 1))[:rows]
    return torch.stack([angle.cos(), angle.sin()], 1)


RNG = torch.tensor([20240607, 41, 2**32 - 3])


def run(
    scene: FlatScene,
    centres: torch.Tensor,
    mix: torch.Tensor | None,
    rng: torch.Tensor = RNG,
    **changes: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments: dict[str, object] = dict(window=5, visible=8, modality=2, valid_rows=None, out_dtype=torch.float32)
    return native.visible_noise(scene, centres, mix, rng, **(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_oracle_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    c, k, e = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert philox(np.array(c), (k[0], k[1])).tolist() == e


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clean_windows_are_exact(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    scene, centres = make_scene(19, dtype), make_centres(12)
    x, ids = run(scene, centres, None, out_dtype=out_dtype)
    for b, centre in enumerate(centres.tolist()):
        wanted = expected_ids(25, 8, 2, int(RNG[2]) + b, RNG)
        assert ids[b].tolist() == wanted.tolist()
        values = torch.from_numpy(expected_values(scene, centre, wanted, 5)).to(out_dtype)
        assert torch.equal(x[b], values)


@settings(max_examples=25, deadline=None)
@given(
    radius=st.integers(0, 5),
    channels=st.integers(1, 70),
    share=st.floats(0, 1),
    modality=st.integers(0, 65535),
    rows=st.integers(0, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_noisy_windows(radius: int, channels: int, share: float, modality: int, rows: int, seed: int) -> None:
    window, tokens = 2 * radius + 1, (2 * radius + 1) ** 2
    visible = max(1, round(share * tokens))
    scene, centres, mix = make_scene(channels), make_centres(rows, seed), make_mix(rows)
    rng = torch.tensor([seed, 7, 11])
    x, ids = run(scene, centres, mix, rng, window=window, visible=visible, modality=modality)
    for b, centre in enumerate(centres.tolist()):
        wanted = expected_ids(tokens, visible, modality, 11 + b, rng)
        assert ids[b].tolist() == wanted.tolist()
        value = mix[b, 0].numpy() * expected_values(scene, centre, wanted, window).astype(np.float64)
        eps = expected_normals(wanted, channels, modality, 11 + b, rng)
        error = np.abs(x[b].numpy() - value - mix[b, 1].numpy().astype(np.float64) * eps)
        assert (error <= 4e-7 * np.maximum(1, np.abs(eps)) + 1.8e-7 * (np.abs(value) + np.abs(x[b].numpy()))).all()


def test_a_million_normals_are_within_the_promised_error() -> None:
    scene = FlatScene(torch.zeros(1, 512), torch.ones(512), torch.zeros(512), None, torch.tensor([[0, 1, 1]]))
    centres, rng = torch.zeros(24, 3, dtype=torch.int64), torch.tensor([5, 0, 0])
    x, ids = run(scene, centres, torch.tensor([[0.0, 1.0]]).repeat(24, 1), rng, window=9, visible=81, modality=0)
    truth = np.stack([expected_normals(ids[b].numpy(), 512, 0, b, rng) for b in range(24)])
    assert (np.abs(x.numpy() - truth) / np.maximum(1, np.abs(truth))).max() < 4e-7
    assert abs(truth.mean()) < 5e-3 and abs(truth.std() - 1) < 5e-3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_threads_instruction_sets_and_batch_splits_give_the_same_bits(
    two_threads: None, out_dtype: torch.dtype
) -> None:
    scene, centres, mix = make_scene(145, torch.uint16), make_centres(33), make_mix(33)
    x, ids = run(scene, centres, mix, out_dtype=out_dtype)
    torch.set_num_threads(1)
    best = loader.ISAS.index(loader.best_isa())
    for isa in loader.ISAS[: best + 1]:
        x_one, ids_one = run(scene, centres, mix, out_dtype=out_dtype, isa=isa)
        assert torch.equal(x, x_one) and torch.equal(ids, ids_one), isa
    for part in (slice(0, 1), slice(1, 20), slice(20, 33)):
        rng = RNG + torch.tensor([0, 0, part.start])
        x_part, ids_part = run(scene, centres[part], mix[part], rng, out_dtype=out_dtype)
        assert torch.equal(x[part], x_part) and torch.equal(ids[part], ids_part)


def test_channels_beyond_one_chunk_of_counters() -> None:
    scene, centres = make_scene(4500), make_centres(2)
    x, ids = run(scene, centres, torch.tensor([[0.0, 1.0]]).repeat(2, 1))
    eps = expected_normals(ids[1].numpy(), 4500, 2, int(RNG[2]) + 1, RNG)
    assert np.allclose(x[1].numpy(), eps, rtol=0, atol=3e-6)


def test_rows_of_padding_are_zero_and_are_not_read() -> None:
    scene, centres, mix = make_scene(6), make_centres(5), make_mix(5)
    x, ids = run(scene, centres, mix)
    centres[3:] = -99
    padded, padded_ids = run(scene, centres, mix, valid_rows=torch.tensor(3))
    assert torch.equal(padded[:3], x[:3]) and torch.equal(padded_ids[:3], ids[:3])
    assert not padded[3:].any()
    assert padded_ids[3:].tolist() == [list(range(8))] * 2


def test_all_tokens_visible_draws_no_mask() -> None:
    _, ids = run(make_scene(3), make_centres(3), None, visible=25)
    assert ids.tolist() == [list(range(25))] * 3


def test_special_numbers_survive_both_halves() -> None:
    values = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-24, -(2.0**-15), 65504.0]])
    scene = FlatScene(values.half(), torch.ones(8), torch.zeros(8), None, torch.tensor([[0, 1, 1]]))
    centre = torch.zeros(1, 3, dtype=torch.int64)
    for out_dtype in (torch.float16, torch.bfloat16, torch.float32):
        x, _ = run(scene, centre, None, window=1, visible=1, out_dtype=out_dtype)
        # -0 + 0 is +0: the offset takes the sign away.
        assert torch.equal(x[0, 0].nan_to_num(7.0), (values[0] + 0.0).to(out_dtype).nan_to_num(7.0))
        assert x[0, 0].isnan().tolist() == values[0].isnan().tolist()


@pytest.mark.parametrize("centre", [[3, 0, 0], [-1, 0, 0], [0, 7, 0], [0, 0, 9], [2, -1, 0]])
def test_centre_outside_is_named(centre: list[int]) -> None:
    with pytest.raises(UsageError, match=r"centre 1 is \(scene, row, column\) \("):
        run(make_scene(2), torch.tensor([[0, 0, 0], centre]), None)


def test_extents_beyond_the_pixels_are_refused() -> None:
    scene = make_scene(2)
    scene.extents[2, 1] = 2**62
    with pytest.raises(UsageError, match="centre 0"):
        run(scene, torch.tensor([[2, 0, 0]]), None)


def test_wrong_coefficients_are_refused() -> None:
    with pytest.raises(UsageError, match="mix must be"):
        run(make_scene(2), make_centres(3), make_mix(2))


@pytest.fixture
def fresh_loader() -> Iterator[None]:
    loader._find.cache_clear()
    yield
    loader._find.cache_clear()


def test_library_of_another_version_is_refused(fresh_loader: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "ABI_VERSION", loader.ABI_VERSION + 1)
    available, reason, path = native.status()
    assert not available and path is not None and "has ABI" in reason
    with pytest.raises(ResourceError, match="install fastdiffclip again"):
        native.load()


def test_missing_library_says_so(fresh_loader: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "_folders", lambda: [str(tmp_path)])
    assert native.status()[0] is False and native.status()[2] is None
    with pytest.raises(ResourceError, match="without a C\\+\\+ compiler"):
        native.load()


def test_foreign_file_says_so(fresh_loader: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / loader._file_name()).write_bytes(b"not a library")
    monkeypatch.setattr(loader, "_folders", lambda: [str(tmp_path)])
    available, reason, _ = native.status()
    assert not available and "cannot be loaded" in reason


def test_struct_has_the_layout_of_the_header() -> None:
    from fastdiffclip.kernels.native.visible_noise import _Args

    header = (Path(__file__).parents[2] / "kernels" / "native" / "abi.h").read_text(encoding="utf-8")
    assert f"#define FDC_ABI_VERSION {loader.ABI_VERSION}\n" in header
    body = header[header.index("struct fdc_visible_noise_args {") : header.index("};", header.index("struct fdc"))]
    declared = [name.strip(" *") for name in _declared_names(body)]
    assert declared == [name for name, *_ in _Args._fields_]
    assert ctypes.sizeof(_Args) == 10 * 8 + 8 * 8 + 4 * 4


def _declared_names(body: str) -> Iterator[str]:
    for line in body.splitlines()[1:]:
        declaration = line.split(";")[0].replace("const ", "").strip()
        if declaration:
            yield from declaration.split(" ", 1)[1].split(",")


def test_what_stops_every_function_is_one_sentence() -> None:
    loader.require_done(0, "gelu", None)
    loader.require_done(5, "visible_noise", None)  # a code of its own
    with pytest.raises(
        ResourceError, match=r"^the native gelu has no memory for its work space; close other programs$"
    ):
        loader.require_done(loader.NO_MEMORY, "gelu", None)
    with pytest.raises(ResourceError, match=rf"does not run 'avx512'; the best it runs is '{loader.best_isa()}'$"):
        loader.require_done(loader.NO_ISA, "gelu", "avx512")
