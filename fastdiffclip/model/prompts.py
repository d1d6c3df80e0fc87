"""Prompts: what the text tower reads about each class.

Table 4 of Zhang et al., "DiffCLIP: Few-shot Language-driven Multimodal Classifier", compares five prompt
styles from plain to rich. This series keeps that order, in wording of its own:

    p1  the bare class name          Trees
    p2  the usual photo template     A photo of Trees.
    p3  names the modalities         A hyperspectral and LiDAR patch of Trees.
    p4  a full sentence              A hyperspectral and LiDAR image patch, seen from above; the centre pixel
                                     belongs to the class Trees.
    p5  name and description         Trees: leafy crowns with deep red absorption and a steep red edge, ...

The default is p5 where every class has a description, else p4. `none` says nothing: the text is the class's number,
the control that shows what words add.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.files import config_text

STYLES = ("p1", "p2", "p3", "p4", "p5")
WORDLESS = "none"
PRESETS = ("houston2013", "trento", "muufl")

_MODALITY_WORDS = {
    "hsi": "hyperspectral",
    "msi": "multispectral",
    "lidar": "LiDAR",
    "sar": "SAR",
    "rgb": "colour",
    "dsm": "surface height",
    "chm": "canopy height",
    "intensity": "LiDAR intensity",
}


@dataclass(frozen=True)
class ClassText:
    """One class as the text tower knows it: label value, name, and a description of a sentence or two."""

    value: int
    name: str
    description: str = ""


@dataclass(frozen=True)
class PromptPreset:
    """A shipped prompt set: modality names, classes in order of value, colours (R, G, B from 0 to 255)."""

    name: str
    modalities: tuple[str, ...]
    classes: tuple[ClassText, ...]
    colours: tuple[tuple[int, int, int], ...]


def build_prompts(classes: Sequence[ClassText], style: str | None, modalities: Sequence[str]) -> list[str]:
    """One prompt per class, in order; ``style`` None means p5 if every class is described, else p4.

    ``modalities`` are the scene's names ("hsi", "lidar", ...), in order; p3 and p4 mention them.
    Raises UsageError for an unknown style; InputDataError where p5 is asked for and descriptions are missing,
    a name is empty, or two classes would get the same text (the loss could not tell them apart).
    """
    if style is not None and style not in STYLES:
        raise UsageError(f"there is no prompt style '{style}'{nearest(style, STYLES)}; expected p1 to p5")
    nameless = [str(c.value) for c in classes if not c.name.strip()]
    if nameless:
        raise InputDataError(f"class value {', '.join(nameless)} has no name; give it one in the class table")
    undescribed = [c for c in classes if not c.description.strip()]
    if style == "p5" and undescribed:
        raise InputDataError(
            f"prompt style p5 needs a description of every class, but {_listing(undescribed)} has none; "
            "add it to the class table, or use p4"
        )
    chosen = style or ("p4" if undescribed else "p5")
    return _distinct(classes, [_prompt(c, chosen, modalities) for c in classes])


def resolve_prompts(choice: str | None, classes: Sequence[ClassText], modalities: Sequence[str]) -> list[str]:
    """The prompts that ``--prompts CHOICE`` means: None, a style, ``none``, the name of a shipped set, or a YAML file.

    Raises UsageError if it is none of these, and what ``build_prompts`` and ``prompts_from_yaml`` raise.
    """
    if choice is None or choice in STYLES:
        return build_prompts(classes, choice, modalities)
    if choice == WORDLESS:
        return [str(c.value) for c in classes]
    if choice in PRESETS:
        text = config_text(f"prompts/{choice}.yaml")
        return prompts_from_yaml(text, f"prompt set '{choice}'", classes, modalities)
    path = Path(choice)
    if not path.is_file():
        raise UsageError(
            f"the prompts '{choice}' are neither a style (p1 to p5, none) nor a shipped set ({', '.join(PRESETS)}) "
            f"nor a file that exists{nearest(choice, STYLES + PRESETS)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputDataError(f"the prompts file {path} cannot be read as UTF-8 text: {error}") from error
    return prompts_from_yaml(text, f"prompts file {path}", classes, modalities)


def prompts_from_yaml(text: str, where: str, classes: Sequence[ClassText], modalities: Sequence[str]) -> list[str]:
    """One prompt per class from YAML: a mapping of class name or value to the prompt, or the layout of a set.

    A mapping's texts are used as they stand. A set (a list ``classes`` of value, name, description) lends its
    descriptions to the classes of the same name, and style p5 writes the prompts. Names match without regard
    to case and spacing, and before values; further entries are ignored. ``where`` is the source in messages.
    Raises InputDataError for YAML that is neither, and for classes without an entry, all of them named.
    """
    document = _parse(text, where)
    if isinstance(document.get("classes"), list):
        entries = [(c.name, c.description) for c in _preset_classes(document["classes"], where)]
        matched = _matched(classes, entries, where, by_value=False)
        described = [ClassText(c.value, c.name, description) for c, description in matched]
        return build_prompts(described, "p5", modalities)
    entries = []
    for key, prompt in document.items():
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputDataError(f"in the {where} the entry '{key}' is no text; write {key}: \"a prompt\"")
        entries.append((str(key), " ".join(prompt.split())))
    return _distinct(classes, [t for _, t in _matched(classes, entries, where, by_value=True)])


def load_preset(name: str) -> PromptPreset:
    """A shipped prompt set (see PRESETS). Raises UsageError for an unknown name."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise UsageError(f"there is no prompt set '{name}'{nearest(name, PRESETS)}; expected one of {known}")
    where = f"prompt set '{name}'"
    document = _parse(config_text(f"prompts/{name}.yaml"), where)
    rows = document["classes"]
    colours = tuple(_rgb(row["colour"]) for row in rows)
    return PromptPreset(name, tuple(document["modalities"]), _preset_classes(rows, where), colours)


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def _prompt(c: ClassText, style: str, modalities: Sequence[str]) -> str:
    name = " ".join(c.name.split())
    kind = _modality_phrase(modalities)
    article = "An" if kind[0].lower() in "aeiou" else "A"
    if style == "p1":
        return name
    if style == "p2":
        return f"A photo of {name}."
    if style == "p3":
        return f"{article} {kind} patch of {name}."
    if style == "p4":
        return f"{article} {kind} image patch, seen from above; the centre pixel belongs to the class {name}."
    return f"{name}: {' '.join(c.description.split())}"


def _modality_phrase(modalities: Sequence[str]) -> str:
    """The modalities in words, joined as in a sentence; unknown names as they are."""
    words = [_MODALITY_WORDS.get(m.lower(), m.replace("_", " ")) for m in modalities] or ["remote sensing"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _distinct(classes: Sequence[ClassText], prompts: list[str]) -> list[str]:
    seen: dict[str, ClassText] = {}
    for c, prompt in zip(classes, prompts, strict=True):
        other = seen.setdefault(prompt, c)
        if other is not c:
            raise InputDataError(
                f"classes {other.value} ('{other.name}') and {c.value} ('{c.name}') have the same prompt "
                f"'{prompt}'; give them different names or descriptions"
            )
    return prompts


def _listing(classes: Iterable[ClassText]) -> str:
    return ", ".join(f"{c.value} ('{c.name}')" for c in classes)


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _matched(
    classes: Sequence[ClassText], entries: Sequence[tuple[str, str]], where: str, by_value: bool
) -> list[tuple[ClassText, str]]:
    texts = {_key(name): text for name, text in entries}
    found, missing = [], []
    for c in classes:
        text = texts.get(_key(c.name)) or (texts.get(str(c.value)) if by_value else None)
        if text:
            found.append((c, text))
        else:
            missing.append(f"{c.value} ('{c.name}'){nearest(_key(c.name), list(texts))}")
    if missing:
        raise InputDataError(
            f"no text for class {', '.join(missing)} in the {where}; add an entry under the class's name"
            f"{' or value' if by_value else ''}"
        )
    return found


def _parse(text: str, where: str) -> dict[Any, Any]:
    import yaml

    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none; a very deep nesting
        raise InputDataError(f"the {where} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not document:
        raise InputDataError(
            f"the {where} holds no mapping; expected lines such as 'Trees: leafy crowns, steep red edge'"
        )
    return document


def _preset_classes(rows: list[Any], where: str) -> tuple[ClassText, ...]:
    classes = []
    for row in rows:
        fields = row if isinstance(row, dict) else {}
        value, name, description = (fields.get(key) for key in ("value", "name", "description"))
        if not isinstance(value, int) or not isinstance(name, str):
            raise InputDataError(
                f"in the {where} each entry of 'classes' needs a number 'value' and a text 'name'; got {row}"
            )
        classes.append(ClassText(value, name, " ".join(str(description or "").split())))
    return tuple(classes)
