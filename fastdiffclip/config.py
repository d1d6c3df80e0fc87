"""Settings of both stages: one frozen, validated tree, from a recipe, a YAML file and ``--set a.b=value``.

Later sources win. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastdiffclip.errors import UsageError, nearest
from fastdiffclip.files import config_text

RECIPES = ("best", "paper", "demo", "houston2013", "trento", "muufl", "mrnet")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfig(_Section):
    """Sizes of the image encoder, the decoders and the text transformer (DESIGN: widths in channels)."""

    window: int = Field(11, ge=1, le=31, description="side of the window in pixels, odd")
    width: int = Field(128, ge=8, le=1024)
    depth: int = Field(4, ge=1, le=48)
    heads: int = Field(8, ge=1)
    mlp_ratio: float = Field(2.0, gt=0)
    decoder_width: int = Field(128, ge=8, le=1024)
    decoder_depth: int = Field(3, ge=1, le=48)
    embedding: int = Field(128, ge=4, le=4096)
    text_width: int = Field(128, ge=8)
    text_depth: int = Field(3, ge=1)
    text_heads: int = Field(8, ge=1)
    attention: Literal["fastest", "xformers", "short", "sdpa"] = "fastest"

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.window % 2 == 0:
            raise ValueError(f"model.window must be odd, so that a window has a centre pixel; got {self.window}")
        for width, heads, name in (
            (self.width, self.heads, "width"),
            (self.decoder_width, self.heads, "decoder_width"),
            (self.text_width, self.text_heads, "text_width"),
        ):
            if width % heads or width % 4:
                raise ValueError(
                    f"model.{name} must be a multiple of 4 and of its heads; got {width} with {heads} heads"
                )
        return self

    @property
    def tokens(self) -> int:
        """Tokens of a window, L = P * P."""
        return self.window * self.window


class UmdConfig(_Section):
    """Unsupervised mask diffusion."""

    epochs: int = Field(100, ge=1)
    batch: int = Field(256, ge=1)
    samples: int = Field(700, ge=1, description="windows drawn once from the scenes and kept")
    mask_ratio: float = Field(0.7, ge=0.0, lt=1.0)
    noise: bool = Field(True, description="false: visible tokens stay clean, so that only masking is left")
    timesteps: int = Field(1000, ge=2)
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    masked_weight: float = Field(1.0, ge=0)
    visible_weight: float = Field(1.0, ge=0)
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    micro_batch: int = Field(0, ge=0, description="windows per forward pass; 0 chooses for the device")


class BandsConfig(_Section):
    """Mask diffusion over bands instead of pixels: what the view `restored` of the logistic head reads."""

    steps: int = Field(4000, ge=1)
    batch: int = Field(128, ge=1)
    samples: int = Field(65536, ge=1, description="windows whose means are the pool")
    mask_ratio: float = Field(0.3, ge=0.0, lt=1.0, description="share of the groups of channels that are masked")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no clipping")


class FlcConfig(_Section):
    """Few-shot language-driven classification."""

    epochs: int = Field(150, ge=1)
    batch: int = Field(64, ge=1)
    targets: Literal["pairwise", "class"] = "pairwise"
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    milestones: tuple[float, ...] = Field((2 / 3, 7 / 8), description="fractions of the epochs at which the rate drops")
    gamma: float = Field(0.1, gt=0, le=1)
    temperature: float = Field(0.07, gt=0, description="logit scale starts at 1 / temperature")
    max_logit_scale: float = Field(100.0, gt=0)
    encoder: Literal["finetune", "frozen"] = "finetune"
    head: Literal["contrastive", "logistic"] = Field(
        "contrastive", description="logistic: logistic regression in the text space, see docs/method.md"
    )


View = Literal["means", "neighbours", "components", "pixel", "tokens", "restored"]


class LogisticConfig(_Section):
    """The head ``flc.head=logistic``: what it sees of a window, and how it is fitted."""

    views: tuple[View, ...] = Field(("means", "neighbours", "components", "pixel"), min_length=1)
    sizes: tuple[int, ...] = Field((3, 5), min_length=1, description="sides of the window means")
    class_tokens: float = Field(0.5, ge=0, description="variance of the encoder's class tokens in `tokens`; means: 1")
    mean_token: float = Field(0.0, ge=0, description="variance of the encoder's mean token in `tokens`")
    ridge: float = Field(0.07, gt=0, description="ridge constant over mean loss, at one shot per class")
    text: float = Field(0.9, ge=0, lt=1, description="share of the texts' similarity in the prior of the classes")
    calibrate: bool = Field(True, description="temperature from leaving shots out")
    samples: int = Field(2048, ge=16, description="unlabelled windows that centre and scale the features")

    @model_validator(mode="after")
    def _possible(self) -> LogisticConfig:
        if any(size < 1 or size % 2 == 0 for size in self.sizes):
            raise ValueError(f"logistic.sizes must be odd and at least 1; got {list(self.sizes)}")
        if len(set(self.views)) < len(self.views):
            raise ValueError(f"logistic.views must not name one twice; got {list(self.views)}")
        if "tokens" in self.views and self.class_tokens + self.mean_token == 0:
            raise ValueError("the view `tokens` needs logistic.class_tokens or logistic.mean_token above 0")
        if {"tokens", "restored"} <= set(self.views):
            raise ValueError("logistic.views: `tokens` and `restored` read networks of two pretrainings; choose one")
        return self


class Config(_Section):
    """Everything that a run depends on besides its data and seed."""

    recipe: Literal["best", "paper", "demo", "houston2013", "trento", "muufl", "mrnet", "custom"] = "custom"
    prepare: Literal["standard", "mnf"] = "standard"
    components: int = Field(30, ge=1, le=512, description="components that `mnf` keeps")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    engine: Literal["auto", "single", "ddp", "deepspeed"] = Field(
        "auto", description="auto: ddp where there are several"
    )
    zero: int = Field(0, ge=0, le=3, description="ZeRO stage of DeepSpeed")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile; auto: where it was measured to pay"
    )
    memory_gib: float = Field(0.0, ge=0, description="memory budget for scenes; 0 takes half of what is free")
    model: ModelConfig = ModelConfig()
    umd: UmdConfig = UmdConfig()
    bands: BandsConfig = BandsConfig()
    flc: FlcConfig = FlcConfig()
    logistic: LogisticConfig = LogisticConfig()

    @field_validator("compile", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        """YAML reads `on` and `off` as truth values."""
        return ("off", "on")[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.flc.head == "logistic" and self.flc.encoder == "finetune":
            raise ValueError(
                "flc.head=logistic leaves the encoder frozen; give flc.encoder=frozen, or flc.head=contrastive"
            )
        return self

    @property
    def reads_encoder(self) -> bool:
        """Whether the classifier looks through the image encoder."""
        return self.flc.head == "contrastive" or "tokens" in self.logistic.views

    @property
    def reads_network(self) -> bool:
        """Whether the classifier looks through a network of any kind, so that pretraining it has a meaning."""
        return self.reads_encoder or self.tokens == "bands"

    @property
    def tokens(self) -> Literal["pixels", "bands"]:
        """What pretraining masks: bands where the head reads the view `restored`, else pixels."""
        return "bands" if self.flc.head == "logistic" and "restored" in self.logistic.views else "pixels"

    @property
    def pretraining(self) -> UmdConfig | BandsConfig:
        """The settings of pretraining: the section `bands` or `umd`, by :attr:`tokens`."""
        return self.bands if self.tokens == "bands" else self.umd

    @property
    def mean_sizes(self) -> tuple[int, ...]:
        """Sides of the window means that fit the window, ascending; (1,) where none does."""
        return tuple(sorted({size for size in self.logistic.sizes if size <= self.model.window})) or (1,)


def load_config(recipe: str = "best", file: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Build the configuration from a recipe, then a YAML file, then ``key=value`` texts.

    A file or text that sets ``recipe`` to a shipped one changes the recipe that the others are laid over.

    Raises:
        UsageError: an unknown recipe or key, or a value that does not fit; the message names the key.
    """
    if recipe not in RECIPES:
        raise UsageError(f"there is no recipe {recipe!r}{nearest(recipe, RECIPES)}; there is: {', '.join(RECIPES)}")
    changes: dict[str, Any] = {}
    if file is not None:
        _merge(changes, _read_file(Path(file)))
    for text in overrides:
        _merge(changes, _read_override(text))
    base = changes.get("recipe", recipe)
    base = base if base in RECIPES else recipe
    tree = _read_yaml(config_text(f"{base}.yaml"), f"{base}.yaml")
    _merge(tree, changes)
    return build_config(tree)


def build_config(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping. Raises :class:`UsageError` naming the first key that is wrong."""
    _check_keys(tree, Config, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"the setting {where} is wrong: {reason} (got {first['input']!r})"
            if where not in ("", "model")
            else f"the settings do not go together: {reason}"
        ) from None


def dump_config(config: Config) -> str:
    """The configuration as YAML; :func:`load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none; a very deep nesting
        raise UsageError(f"the configuration {where} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"the configuration {where} must hold keys and values, for example 'umd: {{epochs: 20}}'")
    return tree


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return _read_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UsageError(f"the configuration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration file {path} cannot be read: {error}") from None


def _read_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set takes key=value, for example umd.epochs=20; got {text!r}")
    try:
        branch: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError(f"the value of --set {text!r} is not valid YAML") from None
    for part in reversed(key.strip().split(".")):
        branch = {part: branch}
    return dict(branch)


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _check_keys(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    known = {f"{prefix}{name}": field.annotation for name, field in section.model_fields.items()}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path not in known:
            while isinstance(value, Mapping) and value:  # the whole key says best what was meant
                key, value = next(iter(value.items()))
                path += f".{key}"
            raise UsageError(f"there is no setting {path!r}{nearest(path, _all_keys())}")
        annotation = known[path]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"the setting {path!r} is a section; give one of its keys, "
                    f"for example {path}.{next(iter(annotation.model_fields))}"
                )
            _check_keys(value, annotation, f"{path}.")


def _all_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += _all_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
