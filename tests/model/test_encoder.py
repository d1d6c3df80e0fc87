"""The shared encoder: what must not matter (masking order, batching, neighbours), and what it starts as."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastdiffclip.config import ModelConfig
from fastdiffclip.model.encoder import Block, ImageEncoder
from fastdiffclip.model.language_classifier import LanguageClassifier
from fastdiffclip.model.mask_diffusion import MaskDiffusion
from fastdiffclip.model.residual_norm import ResidualNorm
from fastdiffclip.model.stem import initialise, sincos_positions

CHANNELS = {"hsi": 6, "lidar": 1}
CONFIG = ModelConfig(
    window=5, width=16, depth=2, heads=2, decoder_width=24, decoder_depth=1, embedding=8, text_width=16, text_depth=1,
    text_heads=2,
)  # fmt: skip
BUILD: dict[str, Callable[[int], nn.Module]] = {
    "umd": lambda seed: MaskDiffusion(CHANNELS, CONFIG, seed),
    "flc": lambda seed: LanguageClassifier(CHANNELS, CONFIG, vocabulary=50, seed=seed),
}


def encoder(seed: int = 0, attention: str = "fastest") -> ImageEncoder:
    model = ImageEncoder(CHANNELS, CONFIG.model_copy(update={"attention": attention}))
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    with torch.no_grad():
        model.class_tokens.normal_(generator=generator)
        model.positions.add_(0.1 * torch.randn(model.positions.shape, generator=generator))
    return model


def batch(rows: int = 4, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Complete windows, visible ids of each modality, timesteps."""
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(rows, 25, c, generator=generator) for c in CHANNELS.values()]
    ids = [torch.rand(rows, 25, generator=generator).argsort(1)[:, :8].sort(1).values.int() for _ in x]
    return x, ids, torch.randint(0, 1000, (rows,), generator=generator)


def chosen(x: list[Tensor], ids: list[Tensor]) -> list[Tensor]:
    return [a.gather(1, i.long()[:, :, None].expand(-1, -1, a.shape[2])) for a, i in zip(x, ids, strict=True)]


def test_masking_first_is_masking_later() -> None:
    model, (x, ids, times) = encoder(), batch()
    first = model.embed(chosen(x, ids), ids, times).unflatten(0, (2, -1))
    later = model.embed(x, None, times).unflatten(0, (2, -1))
    for m in range(2):
        torch.testing.assert_close(first[m, :, 0], later[m, :, 0])
        torch.testing.assert_close(first[m, :, 1:], chosen([later[m, :, 1:]], [ids[m]])[0], rtol=1e-5, atol=1e-6)


def test_all_ids_in_order_are_no_ids() -> None:
    model, (x, _, times) = encoder(), batch()
    ids = [torch.arange(25, dtype=torch.int32).expand(4, 25) for _ in x]
    assert torch.equal(model(x, ids, times), model(x, None, times))


@pytest.mark.parametrize("attention", ["short", "sdpa"])
def test_modalities_together_are_modalities_one_by_one(attention: str) -> None:
    model, (x, ids, times) = encoder(attention=attention), batch()
    visible = chosen(x, ids)
    out = model(visible, ids, times)
    assert out.shape == (2, 4, 9, 16)
    tokens = model.embed(visible, ids, times)
    for m in range(2):
        one, added = tokens[4 * m : 4 * m + 4], None
        for block in model.blocks:
            one, added = block(one, added)
        torch.testing.assert_close(model.norm(one, added)[1], out[m], rtol=1e-5, atol=1e-5)


def test_weights_are_shared_between_modalities() -> None:
    names = [name for name, _ in encoder().named_parameters()]
    assert {name.split(".")[1] for name in names if name.startswith("stems.")} == {"hsi", "lidar"}
    assert {name.split(".")[0] for name in names} == {
        "stems",
        "class_tokens",
        "positions",
        "timestep",
        "blocks",
        "norm",
    }
    assert encoder().class_tokens.shape == (2, 16)


@pytest.mark.parametrize("attention", ["short", "sdpa"])
def test_class_features_are_the_class_tokens_of_the_whole(attention: str) -> None:
    model, (x, _, _) = encoder(attention=attention), batch()
    whole = model(x, None, torch.zeros(4, dtype=torch.int64))
    features = model.class_features(x)
    assert features.shape == (4, 32)
    torch.testing.assert_close(features, torch.cat([whole[0, :, 0], whole[1, :, 0]], dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_lean_block_keeps_less_and_gives_the_same_gradients(bf16: bool) -> None:
    """The hidden layer's GELU and the norm before it are not kept: 4 of the 13 rows of activations of a block."""
    block, x = Block(32, 2, 2.0, "fastest", "encoder"), torch.randn(3, 10, 32)
    results, kept = [], []
    for lean in (False, True):
        leaf, storages = x.clone().requires_grad_(), {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        block.zero_grad()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = torch.add(*block(leaf, lean=lean))
        kept.append(sum(storages.values()))
        out.float().square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in block.parameters())])
    assert all(map(torch.equal, *results))
    item = 2 if bf16 else 4
    assert kept[0] - kept[1] >= x[..., 0].numel() * (64 + 32) * item  # hidden layer after GELU, normed row


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_windows_in_parts_are_windows_at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    model, (x, _, _) = encoder(), batch(rows)
    results = []
    for part in (3, 100):
        monkeypatch.setattr("fastdiffclip.model.encoder.CPU_MICRO_BATCH", part)
        model.zero_grad()
        features = model.class_features(x)
        features.square().sum().backward()
        results.append([features.detach(), model.positions.grad, model.blocks[0].attention.qkv.weight.grad])
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)


def test_a_window_does_not_see_its_neighbours() -> None:
    model, (x, ids, times) = encoder(), batch()
    changed = [a.clone() for a in x]
    for a in changed:
        a[1:] = 1e3
    assert torch.equal(model.class_features(x)[0], model.class_features(changed)[0])
    out = model(chosen(x, ids), ids, times)
    assert torch.equal(out[:, 0], model(chosen(changed, ids), ids, times)[:, 0])


def test_timestep_position_and_modality_matter() -> None:
    model, (x, _, times) = encoder(), batch()
    out = model(x, None, times)
    assert not torch.allclose(out, model(x, None, (times + 400) % 1000), atol=1e-3)
    order = torch.arange(24, -1, -1)
    assert not torch.allclose(out[:, :, 0], model([a[:, order] for a in x], None, times)[:, :, 0], atol=1e-3)
    with torch.no_grad():
        model.class_tokens[1] += 1.0
    assert torch.equal(model(x, None, times)[0], out[0]) and not torch.allclose(model(x, None, times)[1], out[1])


def test_block_is_pre_norm_with_residuals() -> None:
    block, x = Block(16, 2, 2.0, "sdpa", "encoder"), torch.randn(3, 7, 16)
    middle = x + block.attention(block.norm1(x)[1])
    expected = middle + block.contract(nn.functional.gelu(block.expand(block.norm2(middle)[1])))
    torch.testing.assert_close(torch.add(*block(x)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.add(*block(x, queries=2)), expected[:, :2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.add(*block(x - 1, torch.ones_like(x))), expected, rtol=1e-5, atol=1e-5)
    assert block.expand.out_features == 32


def test_norms_are_layer_norms_in_the_dtype_that_is_read_next() -> None:
    norm, x = ResidualNorm(16), torch.randn(3, 16)
    torch.nn.init.normal_(norm.weight)
    assert list(norm.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(norm(x, x)[1], nn.functional.layer_norm(2 * x, (16,), norm.weight, norm.bias))
    with torch.autocast("cpu", torch.bfloat16):
        stream, normed = norm(x, x.bfloat16())
        assert (stream.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
        assert norm(x, out_dtype=torch.float32)[1].dtype == torch.float32


@pytest.mark.parametrize("stage", sorted(BUILD))
def test_no_batch_statistics_and_no_dropout(stage: str) -> None:
    kinds = {type(part) for part in BUILD[stage](0).modules()}
    forbidden = (nn.modules.batchnorm._NormBase, nn.Dropout, nn.GroupNorm)
    assert not [kind for kind in kinds if issubclass(kind, forbidden)]


def digest(model: nn.Module) -> str:
    parts = [name.encode() + t.detach().numpy().tobytes() for name, t in model.state_dict().items()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("stage", sorted(BUILD))
def test_weights_depend_on_the_seed_alone(stage: str) -> None:
    torch.manual_seed(1)
    first = digest(BUILD[stage](3))
    torch.manual_seed(2)
    BUILD[stage](5)
    assert digest(BUILD[stage](3)) == first
    assert digest(BUILD[stage](4)) != first
    for name, parameter in BUILD[stage](3).named_parameters():
        assert parameter.device.type == "cpu" and torch.isfinite(parameter).all(), name


@pytest.mark.parametrize("stage", sorted(BUILD))
def test_what_it_starts_as(stage: str) -> None:
    model = BUILD[stage](0)
    assert isinstance(model.encoder, ImageEncoder)
    assert torch.equal(model.encoder.positions, sincos_positions(5, 16)) and model.encoder.positions.requires_grad
    assert 0 < model.encoder.class_tokens.abs().max() < 0.2
    assert not torch.equal(model.encoder.class_tokens[0], model.encoder.class_tokens[1])
    if isinstance(model, MaskDiffusion):
        for decoder in model.decoders.values():
            assert not decoder.mask_token.any() and decoder.mask_token.requires_grad
            assert torch.equal(decoder.positions, sincos_positions(5, 24)) and decoder.positions.requires_grad


def test_bf16_stays_close() -> None:
    model, (x, _, _) = encoder(), batch()
    exact = model.class_features(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.class_features(x).float()
    assert (exact - rounded).abs().max() < 0.1
