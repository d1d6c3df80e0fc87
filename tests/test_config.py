"""Settings: sources and their order, messages for what is wrong, and the shipped files."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fastdiffclip.config import RECIPES, Config, build_config, dump_config, load_config
from fastdiffclip.errors import UsageError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_paper_is_what_the_paper_says() -> None:
    config = load_config("paper")
    assert (config.prepare, config.model.window, config.model.width) == ("standard", 11, 128)
    assert (config.model.depth, config.model.heads, config.model.mlp_ratio) == (4, 8, 2.0)
    assert (config.model.decoder_width, config.model.decoder_depth, config.model.embedding) == (128, 3, 128)
    assert (config.umd.epochs, config.umd.batch, config.umd.samples, config.umd.mask_ratio) == (100, 256, 700, 0.7)
    assert (config.umd.lr, config.umd.weight_decay, config.umd.timesteps) == (1e-4, 1e-5, 1000)
    assert (config.umd.beta_start, config.umd.beta_end) == (1e-4, 0.02)
    assert (config.flc.epochs, config.flc.batch, config.flc.lr, config.flc.weight_decay) == (150, 64, 1e-4, 1e-5)
    assert config.flc.milestones == (2 / 3, 7 / 8) and config.flc.gamma == 0.1
    assert (config.flc.temperature, config.flc.max_logit_scale) == (0.07, 100.0)
    assert (config.flc.targets, config.flc.encoder) == ("pairwise", "finetune")


def test_defaults_are_the_paper_under_another_label() -> None:
    assert Config() == load_config("paper").model_copy(update={"recipe": "custom"})
    assert load_config() == load_config("best") and load_config().prepare == "mnf"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path: Path) -> None:
    config = load_config("paper", path)
    assert build_config(config.model_dump()) == config
    if path.stem in RECIPES:
        assert config.recipe == path.stem and config == load_config(path.stem)


@pytest.mark.parametrize("name", ["houston2013", "trento", "muufl", "mrnet"])
def test_data_sets_have_the_settings_of_the_paper(name: str) -> None:
    config = load_config(name)
    assert config.recipe == name and config == load_config("paper").model_copy(update={"recipe": name})


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("umd: {epochs: 7, batch: 32}\nmodel: {window: 5}\n")
    config = load_config("paper", file, ["umd.batch=16", "umd.batch=8", "precision=fp32"])
    assert (config.umd.epochs, config.umd.batch, config.model.window) == (7, 8, 5)
    assert config.umd.samples == 700 and config.precision == "fp32"


def test_a_file_that_names_a_recipe_stands_on_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: paper\numd: {epochs: 7}\n")
    paper = load_config("paper", overrides=["umd.epochs=7"])
    assert load_config("best", file) == paper
    assert load_config("best", overrides=["umd.epochs=7", "recipe=paper"]) == paper


def test_round_trip(tmp_path: Path) -> None:
    config = load_config("demo", overrides=["flc.milestones=[0.25, 0.5]", "umd.lr=3e-4", "model.attention=sdpa"])
    assert config.umd.lr == 3e-4 and config.flc.milestones == (0.25, 0.5)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config("paper", file) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("umd.epoch=3", "umd.epochs"),
        ("windwo=5", "did you mean"),
        ("umd.epochs=many", "umd.epochs"),
        ("umd.epochs=0", "umd.epochs"),
        ("umd.epochs=1.5", "umd.epochs"),
        ("umd.mask_ratio=1.0", "umd.mask_ratio"),
        ("flc.targets=pairs", "flc.targets"),
        ("precision=fp8", "precision"),
        ("model.window=10", "odd"),
        ("model.heads=3", "multiple"),
        ("umd=5", "section"),
        ("umd.epochs.more=5", "umd.epochs"),
        ("umd.epochs", "key=value"),
        ("umd.epochs=[", "YAML"),
        ("umd.epochs=2001-13-45", "YAML"),
        ("umd.epochs=" + "[" * 5000, "YAML"),
        ("=5", "no setting ''"),
        ("modle.window=5", r"no setting 'modle.window' \(did you mean 'model.window'"),
        ("recipe=good", "recipe"),
    ],
)
def test_a_wrong_setting_is_named(override: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        load_config("paper", overrides=[override])
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


def test_the_nearest_key_is_offered() -> None:
    with pytest.raises(UsageError, match=r"no setting 'umd.epoch' \(did you mean 'umd.epochs'\?\)"):
        load_config(overrides=["umd.epoch=3"])
    with pytest.raises(UsageError, match=r"no recipe 'papre' \(did you mean 'paper'\?\)"):
        load_config("papre")


@pytest.mark.parametrize(
    ("text", "said"), [("umd: [", "YAML"), ("- 3", "keys and values"), ("umd: {lr: -1}", "umd.lr")]
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        load_config("paper", file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_config("paper", tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_config("paper", tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00umd")
    with pytest.raises(UsageError, match="cannot be read"):
        load_config("paper", tmp_path / "bytes.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config("paper", tmp_path / "empty.yaml") == load_config("paper")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_config("paper").umd.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_compile_is_a_word_that_yaml_takes_for_a_truth_value(word: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"compile: {word}\n")
    assert load_config("paper", tmp_path / "c.yaml").compile == word
    set_ = load_config("paper", overrides=[f"compile={word}"])
    assert set_.compile == word
    (tmp_path / "d.yaml").write_text(dump_config(set_))
    assert load_config("paper", tmp_path / "d.yaml").compile == word
