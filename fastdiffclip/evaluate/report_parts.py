"""The parts of a report as HTML: figures in tables, bars, the confusion matrix, the legend of the maps."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from fastdiffclip.evaluate.metrics import Scores
from fastdiffclip.infer.raster import class_colours

if TYPE_CHECKING:
    from fastdiffclip.scene.store import ClassInfo

OURS = "fastdiffclip"
MEASURES = {"oa": "OA", "aa": "AA", "kappa": "κ"}


def image(png: bytes, words: str, css: str = "") -> str:
    """Embed a PNG; ``words`` stand in its place for those who cannot see it."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img class="{css}" alt="{escape(words)}" src="data:image/png;base64,{data}">'


def section(anchor: str, heading: str, body: str, lead: str = "") -> str:
    """A titled section, empty if its body is."""
    if not body:
        return ""
    text = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{anchor}"><h2>{escape(heading)}</h2>{text}{body}</section>'


def definitions(pairs: Mapping[str, Any], css: str = "") -> str:
    """Names and values side by side."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_plain(value))}</dd></div>" for name, value in pairs.items()
    )
    return f'<dl class="{css}">{items}</dl>' if items else ""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as ``a.b.c`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def headline(row: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> str:
    """Three large figures of one row, and how far it is from the best rival under the same conditions."""
    names = {"oa": "Overall accuracy", "aa": "Average accuracy", "kappa": "Kappa × 100"}
    tiles = []
    for measure, name in names.items():
        mean, sd = row[f"{measure}_mean"], row.get(f"{measure}_sd")
        spread = "" if sd is None else f'<span class="sd">± {sd:.1f}</span>'
        against = ""
        if rivals:
            best = max(rivals, key=lambda rival: rival[f"{measure}_mean"])
            gap = mean - best[f"{measure}_mean"]
            sign = "+" if gap >= 0 else "−"
            css = "ahead" if gap >= 0 else "behind"
            against = f'<p><b class="{css}">{sign}{abs(gap):.1f}</b> against {escape(best["label"])}</p>'
        tiles.append(f'<div class="tile"><h3>{name}</h3><p class="figure">{mean:.1f}{spread}</p>{against}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table of methods by shots for rows of one scene and one split; the best of a column is bold."""
    shots = list(dict.fromkeys(row["shots"] for row in rows))
    labels = {row["label"]: row["method"] for row in rows}
    by_place = {(row["label"], row["shots"]): row for row in rows}
    best = {
        (count, measure): max(round(row[f"{measure}_mean"], 1) for row in rows if row["shots"] == count)
        for count in shots
        for measure in MEASURES
    }
    groups = "".join(f'<th colspan="3" class="group">{shots_words(count)}</th>' for count in shots)
    heads = "".join(
        f'<th class="{"first" if measure == "oa" else ""}">{name}</th>'
        for _ in shots
        for measure, name in MEASURES.items()
    )
    body = []
    for label, method in labels.items():
        cells = []
        for count in shots:
            for measure in MEASURES:
                row = by_place.get((label, count))
                css = "first" if measure == "oa" else ""
                if row is not None and round(row[f"{measure}_mean"], 1) == best[count, measure]:
                    css += " best"
                cells.append(f'<td class="{css}">{_mean_sd(row, measure)}</td>')
        css = ' class="ours"' if method == OURS else ""
        body.append(f'<tr{css}><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="figures"><thead><tr><th></th>{groups}</tr>'
        f"<tr><th>Method</th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def class_bars(scores: Scores, classes: Sequence[ClassInfo], other: tuple[str, Mapping[int, float]] | None) -> str:
    """Accuracy of each class as a bar, with a tick where another method stands."""
    colours, names = class_colours(classes), {item.value: item.name for item in classes}
    lines = []
    for value in scores.classes:
        accuracy = scores.per_class[value]
        rival = math.nan if other is None else other[1].get(value, math.nan)
        tick = "" if math.isnan(rival) else f'<i style="left:{rival:.2f}%"></i>'
        label = swatch(colours.get(value), names.get(value, f"class {value}"))
        if math.isnan(accuracy):
            track, figure = '<div class="track"></div>', "no test pixel"
        else:
            track = f'<div class="track"><b style="width:{accuracy:.2f}%"></b>{tick}</div>'
            figure = f"{accuracy:.1f}"
        number = f'<span class="num">{figure}</span>'
        lines.append(f'<div class="bar">{label}{track}{number}</div>')
    key = "" if other is None else f'<p class="key"><i></i> {escape(other[0])}</p>'
    return f'<div class="bars">{"".join(lines)}</div>{key}'


def confusion_table(scores: Scores, classes: Sequence[ClassInfo]) -> str:
    """The confusion matrix with a tint for the share of the true class; columns are named by number."""
    colours, names = class_colours(classes), {item.value: item.name for item in classes}
    numbers = {value: place for place, value in enumerate(scores.classes, start=1)}
    dots = {value: f"{_dot(colours.get(value))}{number}" for value, number in numbers.items()}
    heads = "".join(
        f'<th scope="col" title="{escape(names.get(value, str(value)))}">{dot}</th>' for value, dot in dots.items()
    )
    body = []
    for value, counts in zip(scores.classes, scores.confusion.tolist(), strict=True):
        total = max(1, sum(counts))
        cells = "".join(
            _tinted(count, count / total, other == value) for other, count in zip(scores.classes, counts, strict=True)
        )
        name = escape(names.get(value, f"class {value}"))
        head = f'<th scope="row"><span class="name">{name}</span>{dots[value]}</th>'
        body.append(f"<tr>{head}{cells}</tr>")
    lost = ""
    if scores.unclassified:
        words = f"{scores.unclassified:,} test pixels were given no class; they count as wrong."
        lost = f'<p class="note">{words}</p>'
    return (
        '<div class="scroll"><table class="confusion"><thead><tr><th class="corner">true ↓ predicted →</th>'
        f"{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{lost}"
    )


def legend(classes: Sequence[ClassInfo], areas: Sequence[Mapping[str, Any]] | None) -> str:
    """Colours and names of the maps, with the share and area of each class where they are known."""
    colours = class_colours(classes)
    by_value = {} if areas is None else {area["value"]: area for area in areas}
    items = []
    for item in classes:
        area = by_value.get(item.value)
        words = "" if area is None else f"{area['share']:.1f} %"
        if area is not None and area["hectares"] is not None:
            words += f"<small>{_hectares(area['hectares'])}</small>"
        label = swatch(colours[item.value], item.name)
        items.append(f'<li title="{escape(item.description)}">{label}<span class="num">{words}</span></li>')
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def swatch(colour: tuple[int, int, int] | None, name: str) -> str:
    """A class's colour and name."""
    return f'<span class="swatch">{_dot(colour)}<span>{escape(name)}</span></span>'


def _dot(colour: tuple[int, int, int] | None) -> str:
    red, green, blue = colour or (128, 128, 128)
    return f'<span class="dot" style="background:rgb({red},{green},{blue})"></span>'


def _tinted(count: int, share: float, diagonal: bool) -> str:
    css = "hit" if diagonal else "miss"
    if share > 0.6:
        css += " deep"
    words = f"{count:,}" if count else ""
    return f'<td class="{css}" style="--share:{100 * share:.0f}%" title="{100 * share:.1f} %">{words}</td>'


def _mean_sd(row: Mapping[str, Any] | None, measure: str) -> str:
    if row is None:
        return "–"
    sd = row.get(f"{measure}_sd")
    spread = "" if sd is None else f"<small>±{sd:.1f}</small>"
    return f"{row[f'{measure}_mean']:.1f}{spread}"


def shots_words(count: Any) -> str:
    if isinstance(count, int):
        return f"{count} labelled pixel{'' if count == 1 else 's'} per class"
    return "all labelled pixels"


def _hectares(area: float) -> str:
    decimals = 0 if area >= 100 else 1 if area >= 10 else 2
    return f"{area:,.{decimals}f} ha"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return "–" if value is None else str(value)
