"""The logistic head: its equation, what it reads, and how it takes numbers over."""

from __future__ import annotations

import pytest
import torch

from fastdiffclip.config import Config, LogisticConfig, ModelConfig
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.model.window_features import means_of_windows

CHANNELS = {"hsi": 4, "lidar": 1}
MODEL = ModelConfig(window=5, width=16, depth=2, heads=2)


def build(*views: str, seed: int = 0, **settings: float) -> LogisticClassifier:
    logistic = LogisticConfig(views=views, **settings)  # type: ignore[arg-type]
    return LogisticClassifier(CHANNELS, Config(model=MODEL, logistic=logistic), seed).eval()


def filled(model: LogisticClassifier, classes: int = 3, dimensions: int = 2) -> LogisticClassifier:
    generator = torch.Generator().manual_seed(3)
    total = model.layout.total
    shapes = {"centre": (total,), "weight": (dimensions, total), "bias": (classes,), "temperature": (1,)}
    model.take({name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()})
    return model


@pytest.fixture
def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 25, count, generator=generator) for count in CHANNELS.values()]


def test_the_equation(windows: list[torch.Tensor]) -> None:
    model, texts = filled(build("means")), torch.randn(3, 2)
    features = model.features(windows)
    assert features.shape == (6, 10) and model.encoder is None
    expected = ((features - model.centre) @ model.weight.T @ texts.T + model.bias) / model.temperature
    torch.testing.assert_close(model.logits(model.embed_features(features), texts), expected)
    image = model.embed_features(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embed_features(features), image)


@pytest.mark.parametrize(("class_tokens", "mean_token"), [(0.5, 0.2), (0.5, 0.0), (0.0, 0.2)])
def test_pixels_through_the_stems_before_or_after(
    windows: list[torch.Tensor], class_tokens: float, mean_token: float
) -> None:
    model = build("means", "tokens", class_tokens=class_tokens, mean_token=mean_token)
    assert model.encoder is not None
    tokens = [model.encoder.stems[name](part) for name, part in zip(CHANNELS, windows, strict=True)]
    given = model.features_of(means_of_windows(windows, (3, 5)), tokens)
    whole = model.encoder(windows, None, torch.zeros(6, dtype=torch.int64))
    assert given.shape == (6, 10 + 64 * (class_tokens > 0) + 32 * (mean_token > 0))
    torch.testing.assert_close(given, model.features(windows))
    last = [whole[m, :, 0] if class_tokens else whole[m, :, 1:].mean(1) for m in range(2)]
    place = slice(10 + 32, 10 + 64) if class_tokens else slice(10, None)
    torch.testing.assert_close(given[:, place], torch.cat(last, 1))
    if class_tokens and mean_token:
        torch.testing.assert_close(given[:, -32:], torch.cat([whole[m, :, 1:].mean(1) for m in range(2)], 1))


def test_the_encoder_is_frozen_and_follows_from_the_seed() -> None:
    one, same, other = (build("tokens", seed=seed) for seed in (0, 0, 1))
    assert one.encoder is not None and same.encoder is not None and other.encoder is not None
    assert not any(parameter.requires_grad for parameter in one.parameters())
    assert torch.equal(one.encoder.class_tokens, same.encoder.class_tokens)
    assert not torch.equal(one.encoder.class_tokens, other.encoder.class_tokens)


def test_numbers_of_any_size_are_taken_over() -> None:
    first = filled(build("tokens", seed=1), classes=5, dimensions=4)
    second = build("tokens")
    second.take(first.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert second.bias.shape == (5,) and second.weight.shape == (4, first.layout.total)
