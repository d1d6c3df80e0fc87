"""Tokenizer and text transformer."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError
from fastdiffclip.model.text import CONTEXT, TextBlock, TextTransformer, load_tokenizer, trim_context

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZER = load_tokenizer()
PROMPTS = ["Trees", "A photo of Water.", "Soil: bare earth without red edge, rising to the infrared."]


def small(seed: int = 0, **sizes: int) -> TextTransformer:
    chosen = {"width": 32, "layers": 2, "heads": 4, "embed_dim": 16, **sizes}
    model = TextTransformer(TOKENIZER.vocab_size, **chosen)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@pytest.mark.skipif(tokenizers.__version__ != "0.23.3", reason="another release may write other bytes")
def test_script_writes_the_shipped_vocabulary(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer.json"
    command = [sys.executable, str(CONFIGS / "make_tokenizer.py"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    shipped = hashlib.sha256((CONFIGS / "tokenizer.json").read_bytes()).hexdigest()
    assert hashlib.sha256(out.read_bytes()).hexdigest() == shipped


def test_special_tokens_and_size() -> None:
    assert (TOKENIZER.start_id, TOKENIZER.end_id, TOKENIZER.pad_id) == (0, 1, 2)
    assert TOKENIZER.vocab_size == 4096
    vocabulary = json.loads(TOKENIZER.text)["model"]["vocab"]
    assert sum(len(token) == 1 for token in vocabulary) == 256  # every byte, so nothing is unknown


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    tokens_KL, end_K = TOKENIZER.encode_batch([text])
    row, end = tokens_KL[0].tolist(), int(end_K[0])
    assert tokens_KL.shape == (1, CONTEXT) and tokens_KL.dtype == end_K.dtype == torch.int64
    assert row[0] == TOKENIZER.start_id and row[end] == TOKENIZER.end_id
    assert set(row[end + 1 :]) <= {TOKENIZER.pad_id}
    assert not {TOKENIZER.start_id, TOKENIZER.end_id, TOKENIZER.pad_id} & set(row[1:end])
    assert TOKENIZER.decode(row) == text


def test_special_token_spelt_in_a_prompt_is_text() -> None:
    tokens_KL, end_K = TOKENIZER.encode_batch(["roof<|end|>pond"])
    assert tokens_KL[0].tolist().count(TOKENIZER.end_id) == 1
    assert TOKENIZER.decode(tokens_KL[0].tolist()) == "roof<|end|>pond"


def test_known_words_are_one_token() -> None:
    _, end_K = TOKENIZER.encode_batch(["A hyperspectral reflectance of asphalt", "A torn coronal meniscus"])
    assert end_K.tolist() == [6, 5]


def test_long_prompt_is_cut_before_end(caplog: pytest.LogCaptureFixture) -> None:
    fitting = " grass" * (CONTEXT - 2)
    with caplog.at_level(logging.WARNING):
        tokens_KL, end_K = TOKENIZER.encode_batch([fitting])
        assert not caplog.records
        longer_KL, longer_K = TOKENIZER.encode_batch([fitting + " water"])
    assert "cut to 77" in caplog.text
    assert torch.equal(tokens_KL, longer_KL)
    assert end_K.tolist() == longer_K.tolist() == [CONTEXT - 1]
    assert longer_KL[0, -1] == TOKENIZER.end_id


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(InputDataError, match="not valid Unicode"):
        TOKENIZER.encode_batch(["\ud800"])


def test_stored_tokenizer_is_used_and_checked() -> None:
    stored = load_tokenizer(TOKENIZER.text)
    assert torch.equal(stored.encode_batch(PROMPTS)[0], TOKENIZER.encode_batch(PROMPTS)[0])
    with pytest.raises(InputDataError, match="damaged"):
        load_tokenizer(TOKENIZER.text[:1000])
    document = json.loads(TOKENIZER.text)
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<|pad|>"]
    del document["model"]["vocab"]["<|pad|>"]
    with pytest.raises(InputDataError, match=r"<\|pad\|>"):
        load_tokenizer(json.dumps(document))


def test_importing_does_not_load_tokenizers() -> None:
    code = "import sys, fastdiffclip.model.text; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_shape_dtype_and_trimmed_context() -> None:
    model = small().eval()
    tokens_KL, end_K = TOKENIZER.encode_batch(PROMPTS)
    trimmed_KL = trim_context(tokens_KL, end_K)
    assert trimmed_KL.shape == (3, int(end_K.max()) + 1)
    full_KJ, trimmed_KJ = model(tokens_KL, end_K), model(trimmed_KL, end_K)
    assert full_KJ.shape == (3, 16) and full_KJ.dtype == torch.float32
    torch.testing.assert_close(trimmed_KJ, full_KJ, rtol=1e-5, atol=1e-6)


def test_agrees_with_one_prompt_at_a_time_in_plain_attention() -> None:
    """Against a separate forward: float64, softmax over an explicit causal mask, no batch, no padding."""
    model = small().double()
    tokens_KL, end_K = TOKENIZER.encode_batch(PROMPTS)
    together_KJ = model(tokens_KL, end_K)
    for k, prompt_J in enumerate(together_KJ):
        L = int(end_K[k]) + 1
        x_LD = model.token_embedding.weight[tokens_KL[k, :L]] + model.position_LD[:L]
        for block in model.blocks:
            assert isinstance(block, TextBlock)
            q_LD, k_LD, v_LD = block.qkv(block.norm1(x_LD)).chunk(3, dim=-1)
            heads = []
            for h in range(4):
                part = slice(8 * h, 8 * h + 8)
                scores_LL = q_LD[:, part] @ k_LD[:, part].T / 8**0.5
                scores_LL = scores_LL.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
                heads.append(scores_LL.softmax(-1) @ v_LD[:, part])
            x_LD = x_LD + block.out(torch.cat(heads, -1))
            x_LD = x_LD + block.fc2(torch.nn.functional.gelu(block.fc1(block.norm2(x_LD))))
        alone_J = model.projection(model.final_norm(x_LD[-1]))
        torch.testing.assert_close(alone_J, prompt_J, rtol=1e-10, atol=1e-10)


def test_only_tokens_up_to_end_matter() -> None:
    model = small().eval()
    tokens_KL, end_K = TOKENIZER.encode_batch(PROMPTS)
    after_KL = torch.arange(CONTEXT) > end_K[:, None]
    generator = torch.Generator().manual_seed(1)
    noise_KL = torch.randint(TOKENIZER.vocab_size, tokens_KL.shape, generator=generator)
    before_KJ = model(tokens_KL, end_K)
    assert torch.equal(model(torch.where(after_KL, noise_KL, tokens_KL), end_K), before_KJ)
    changed_KL = tokens_KL.clone()
    changed_KL[:, 1] = 300
    assert ((model(changed_KL, end_K) - before_KJ).abs().amax(1) > 1e-3).all()


def test_gradient_reaches_every_parameter_and_no_unused_row() -> None:
    model = small()
    tokens_KL, end_K = TOKENIZER.encode_batch(PROMPTS)
    model(trim_context(tokens_KL, end_K), end_K).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    used = torch.zeros(TOKENIZER.vocab_size, dtype=torch.bool)
    for row_L, end in zip(tokens_KL, end_K, strict=True):
        used[row_L[: end + 1]] = True
    rows_VD = model.token_embedding.weight.grad
    assert rows_VD is not None and torch.equal(rows_VD.abs().sum(1) > 0, used)


def test_initial_weights_follow_the_generator() -> None:
    a, b, c = small(5).state_dict(), small(5).state_dict(), small(6).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["projection.weight"], c["projection.weight"])
    assert a["token_embedding.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert a["position_LD"].std() == pytest.approx(0.01, rel=0.1)
    assert a["blocks.0.out.weight"].std() == pytest.approx(32**-0.5 / 2, rel=0.1)
    assert a["blocks.1.fc2.weight"].std() == pytest.approx(32**-0.5 / 2, rel=0.1)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 3 heads"):
        small(heads=3)
    with pytest.raises(ValueError, match="context of 8"):
        small(context=8)(*TOKENIZER.encode_batch(PROMPTS))


def test_traces_as_one_graph() -> None:
    model = small().eval()
    tokens_KL, end_K = TOKENIZER.encode_batch(PROMPTS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens_KL, end_K), model(tokens_KL, end_K))
