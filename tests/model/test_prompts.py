"""Prompt styles, shipped sets and prompt files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.model.prompts import (
    PRESETS,
    STYLES,
    ClassText,
    build_prompts,
    load_preset,
    resolve_prompts,
)
from fastdiffclip.model.text import CONTEXT, load_tokenizer
from fastdiffclip.scene.demo import demo_classes

TREES = ClassText(1, "Trees", "tall crowns  with a\nsteep red edge.")
WATER = ClassText(2, "Water", "dark beyond 750 nm.")
PLAIN = ClassText(3, "Soil")
BOTH = ["hsi", "lidar"]

NAMES = {
    "houston2013": "Healthy grass, Stressed grass, Synthetic grass, Trees, Soil, Water, Residential, "
    "Commercial, Road, Highway, Railway, Parking lot 1, Parking lot 2, Tennis court, Running track",
    "trento": "Apple trees, Buildings, Ground, Woods, Vineyard, Roads",
    "muufl": "Trees, Mostly grass, Mixed ground surface, Dirt and sand, Road, Water, Building shadow, "
    "Buildings, Sidewalk, Yellow curb, Cloth panels",
}


def test_styles_from_plain_to_rich() -> None:
    assert [build_prompts([TREES], style, BOTH)[0] for style in STYLES] == [
        "Trees",
        "A photo of Trees.",
        "A hyperspectral and LiDAR patch of Trees.",
        "A hyperspectral and LiDAR image patch, seen from above; the centre pixel belongs to the class Trees.",
        "Trees: tall crowns with a steep red edge.",
    ]


@pytest.mark.parametrize(
    ("modalities", "phrase"),
    [
        (["hsi"], "A hyperspectral patch"),
        (["hsi", "lidar", "SAR"], "A hyperspectral, LiDAR and SAR patch"),
        (["axial_t2", "sagittal"], "An axial t2 and sagittal patch"),
        ([], "A remote sensing patch"),
    ],
)
def test_modalities_in_words(modalities: list[str], phrase: str) -> None:
    assert build_prompts([WATER], "p3", modalities) == [f"{phrase} of Water."]


def test_default_needs_every_description() -> None:
    assert build_prompts([TREES, WATER], None, BOTH) == build_prompts([TREES, WATER], "p5", BOTH)
    assert build_prompts([TREES, PLAIN], None, BOTH) == build_prompts([TREES, PLAIN], "p4", BOTH)
    with pytest.raises(InputDataError, match=r"description of every class, but 3 \('Soil'\) has none"):
        build_prompts([TREES, PLAIN], "p5", BOTH)


def test_unknown_style_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'p4'"):
        build_prompts([TREES], "p44", BOTH)
    with pytest.raises(UsageError, match="did you mean 'houston2013'"):
        resolve_prompts("houston13", [TREES], BOTH)


def test_classes_that_read_the_same_or_have_no_name() -> None:
    with pytest.raises(InputDataError, match=r"1 \('Trees'\) and 4 \('Trees'\) have the same prompt"):
        build_prompts([TREES, ClassText(4, "Trees")], "p1", BOTH)
    with pytest.raises(InputDataError, match="class value 7 has no name"):
        build_prompts([ClassText(7, " ")], None, BOTH)


def test_file_by_name_and_value(tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("trees: Green and\n  tall.\n2: Wet.\nother: Not here.\n", encoding="utf-8")
    assert resolve_prompts(str(file), [WATER, TREES], BOTH) == ["Wet.", "Green and tall."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Trees: green\nWatr: wet\n", r"class 2 \('Water'\) \(did you mean 'watr'\?\), 3 \('Soil'\) in"),
        ("Trees: [green]\n", "entry 'Trees' is no text"),
        ("Trees: {\n", "not valid YAML"),
        ("Trees: " + "[" * 5000, "not valid YAML"),
        ("Trees: 2001-13-45\n", "not valid YAML"),
        ("just words\n", "holds no mapping"),
        ("", "holds no mapping"),
        ("classes: [{name: Trees}]\n", "a number 'value' and a text 'name'"),
        ("classes: [{value: 1, name: Trees}]\n", r"no text for class 1 \('Trees'\)"),
        ("Trees: same\nWater: same\nSoil: other\n", "have the same prompt 'same'"),
    ],
)
def test_faulty_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputDataError, match=message):
        resolve_prompts(str(file), [TREES, WATER, PLAIN], BOTH)


def test_file_that_is_missing_or_binary(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nor a file that exists"):
        resolve_prompts(str(tmp_path / "none.yaml"), [TREES], BOTH)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InputDataError, match="UTF-8"):
        resolve_prompts(str(tmp_path / "binary.yaml"), [TREES], BOTH)


@pytest.mark.parametrize("name", PRESETS)
def test_shipped_set(name: str) -> None:
    preset = load_preset(name)
    assert [c.value for c in preset.classes] == list(range(1, len(preset.classes) + 1))
    assert ", ".join(c.name for c in preset.classes) == NAMES[name]
    assert preset.modalities == ("hsi", "lidar")
    assert len(set(preset.colours)) == len(preset.classes)
    assert all(len(colour) == 3 for colour in preset.colours)
    tokenizer = load_tokenizer()
    _, end_K = tokenizer.encode_batch([c.description for c in preset.classes])
    assert int(end_K.max()) - 1 < 70 and int(end_K.min()) > 15
    for style in (None, *STYLES):
        _, end_K = tokenizer.encode_batch(build_prompts(preset.classes, style, preset.modalities))
        assert int(end_K.max()) < CONTEXT - 1


def test_shipped_set_lends_its_descriptions_by_name() -> None:
    classes = [ClassText(3, "tennis  COURT"), ClassText(9, "soil")]
    court, soil = resolve_prompts("houston2013", classes, ["hsi"])
    assert court.startswith("tennis COURT: hard court coated") and soil.startswith("soil: bare earth")
    with pytest.raises(InputDataError, match=r"class 5 \('Lava'\) in the prompt set 'houston2013'"):
        resolve_prompts("houston2013", [ClassText(5, "Lava")], ["hsi"])


def test_built_in_scene_is_described_within_the_context() -> None:
    classes = [ClassText(c.value, c.name, c.description) for c in demo_classes()]
    prompts = build_prompts(classes, None, BOTH)
    assert all(prompt.startswith(f"{c.name}: ") for prompt, c in zip(prompts, classes, strict=True))
    _, end_K = load_tokenizer().encode_batch(prompts)
    assert int(end_K.max()) < CONTEXT - 1


def test_no_other_file_passes_for_a_set() -> None:
    folder = Path(__file__).parents[2] / "configs" / "prompts"
    assert sorted(p.stem for p in folder.glob("*.yaml")) == sorted(PRESETS)
    for path in folder.glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == {"modalities", "classes"}
