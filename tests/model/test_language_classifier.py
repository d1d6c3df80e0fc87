"""Both towers end in one space; the temperature starts and stops where it should."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiffclip.config import ModelConfig
from fastdiffclip.model.language_classifier import LanguageClassifier

CONFIG = ModelConfig(
    window=3, width=16, depth=2, heads=2, decoder_width=16, embedding=12, text_width=16, text_depth=1, text_heads=2
)
CHANNELS = {"hsi": 6, "lidar": 1}


def build(**settings: float) -> LanguageClassifier:
    return LanguageClassifier(CHANNELS, CONFIG, vocabulary=50, **settings)  # type: ignore[arg-type]


def test_one_linear_head_on_the_concatenated_class_tokens() -> None:
    model, x = build(), [torch.randn(5, 9, 6), torch.randn(5, 9, 1)]
    whole = model.encoder(x, None, torch.zeros(5, dtype=torch.int64))
    expected = torch.cat([whole[0, :, 0], whole[1, :, 0]], dim=1) @ model.head.weight.T
    torch.testing.assert_close(model.embed_image(x), expected, rtol=1e-4, atol=1e-5)
    assert model.head.weight.shape == (12, 32) and model.head.bias is None


def test_text_lands_in_the_same_space() -> None:
    tokens = torch.randint(0, 50, (3, 10))
    embedded = build().embed_text(tokens, torch.tensor([9, 4, 2]))
    assert embedded.shape == (3, 12)


def test_logit_scale() -> None:
    assert float(build().logit_scale.detach()) == pytest.approx(1 / 0.07)
    assert float(build(temperature=0.5, max_logit_scale=1.5).logit_scale.detach()) == pytest.approx(1.5)
    model = build()
    with torch.no_grad():
        model.log_scale.fill_(math.log(500.0))
    assert float(model.logit_scale.detach()) == pytest.approx(100.0)
    with torch.no_grad():
        model.log_scale.fill_(math.log(50.0))
    model.logit_scale.backward()
    assert float(model.log_scale.grad) == pytest.approx(50.0)  # type: ignore[arg-type]


def test_the_encoder_of_pretraining_fits() -> None:
    from fastdiffclip.model.mask_diffusion import MaskDiffusion

    umd, model = MaskDiffusion(CHANNELS, CONFIG, seed=7), build()
    model.encoder.load_state_dict(umd.encoder.state_dict())
    x = [torch.randn(5, 9, 6), torch.randn(5, 9, 1)]
    assert torch.equal(model.encoder.class_features(x), umd.encoder.class_features(x))
