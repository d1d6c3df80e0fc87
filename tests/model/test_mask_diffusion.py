"""The decoders put tokens where they belong, one decoder per modality."""

from __future__ import annotations

import torch

from fastdiffclip.config import ModelConfig
from fastdiffclip.model.mask_diffusion import Decoder, MaskDiffusion

CONFIG = ModelConfig(
    window=3, width=16, depth=1, heads=2, decoder_width=24, decoder_depth=2, embedding=8, text_width=16, text_heads=2
)
CHANNELS = {"hsi": 6, "sar": 2, "lidar": 1}


def visible(rows: int = 4) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.rand(rows, 9, generator=generator).argsort(1)[:, :3].sort(1).values.int() for _ in CHANNELS]
    x = [torch.randn(rows, 3, c, generator=generator) for c in CHANNELS.values()]
    return x, ids, torch.randint(0, 1000, (rows,), generator=generator)


def test_shapes_for_three_modalities() -> None:
    model = MaskDiffusion(CHANNELS, CONFIG)
    restored = model(*visible())
    assert [tuple(part.shape) for part in restored] == [(4, 9, 6), (4, 9, 2), (4, 9, 1)]
    assert len(model.decoders) == 3 and all(len(decoder.blocks) == 2 for decoder in model.decoders.values())


def test_tokens_go_to_their_places() -> None:
    decoder = Decoder(6, CONFIG)
    torch.nn.init.constant_(decoder.mask_token, 0.7)
    seen: list[torch.Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    encoded, ids = torch.randn(2, 4, 16), torch.tensor([[0, 4, 8], [1, 2, 3]], dtype=torch.int32)
    decoder(encoded, ids)
    tokens = decoder.embed(encoded)
    for b in range(2):
        for token in range(9):
            place = ids[b].tolist().index(token) + 1 if token in ids[b].tolist() else None
            content = torch.full((24,), 0.7) if place is None else tokens[b, place]
            torch.testing.assert_close(seen[0][b, 1 + token], content + decoder.positions[1 + token])
        torch.testing.assert_close(seen[0][b, 0], tokens[b, 0] + decoder.positions[0])


def test_every_weight_gets_a_gradient() -> None:
    model = MaskDiffusion(CHANNELS, CONFIG)
    sum(part.square().sum() for part in model(*visible())).backward()  # type: ignore[union-attr]
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_decoder_reads_its_modality_only() -> None:
    model, (x, ids, times) = MaskDiffusion(CHANNELS, CONFIG), visible()
    before = model(x, ids, times)
    x[2] = x[2] + 1.0
    after = model(x, ids, times)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])


def test_all_tokens_visible() -> None:
    model = MaskDiffusion(CHANNELS, CONFIG)
    ids = [torch.arange(9, dtype=torch.int32).expand(2, 9) for _ in CHANNELS]
    x = [torch.randn(2, 9, c) for c in CHANNELS.values()]
    assert [part.shape[1] for part in model(x, ids, torch.tensor([0, 999]))] == [9, 9, 9]
