"""How results are shown in a terminal; each view returns the JSON object that ``--json`` prints."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiffclip.commands.terminal import facts, figure, say, size, table

if TYPE_CHECKING:
    from fastdiffclip.commands.workflow import Trained
    from fastdiffclip.evaluate.metrics import Scores
    from fastdiffclip.evaluate.runner import Evaluation
    from fastdiffclip.infer.stream import Prediction
    from fastdiffclip.train.umd import UmdResult

TRANSDUCTIVE = (
    "Pretraining saw the unlabelled pixels of the whole scene, test pixels included; no label of a test pixel was used."
)
CALIBRATION = "ECE is how far probabilities lie from accuracy on average; none: the method gives no probabilities."
RETRAIN = "The other classes stay as they were; train-flc on all labels fits them anew, which is a little better."
# A class of a split that needs no further word, as fastdiffclip.scene.splits says it.
_ORDINARY = re.compile(r"'.*': (?P<how>[^;(]*\w)( \([^;]*\))?; (?P<train>\d+) training and (?P<test>\d+) test pixels\.")


def show_scene(summary: Mapping[str, Any]) -> None:
    """Facts of a stored scene."""
    say(f"{summary['name']}  {summary['path']}")
    labelled = [f"{pixels} pixels in '{name}'" for name, pixels in summary["label_maps"].items()]
    facts(
        {
            "size": f"{summary['height']} x {summary['width']} pixels, {size(summary['bytes'])} on disk",
            "grid": _grid(summary["crs_wkt"], summary["affine_transform"]),
            "labelled": ", ".join(labelled) or "no label map",
            "made from": ", ".join(dict.fromkeys(source["file"] for source in summary["sources"])) or "no file",
            **_resampled(summary["resampled"]),
        }
    )
    say()
    rows = [
        [
            part["name"],
            part["dtype"],
            str(part["bands"]),
            str(part["bad_bands"]),
            str(part["constant_bands"]),
            f"{part['valid_percent']:.1f}",
            _spectrum(part),
        ]
        for part in summary["modalities"]
    ]
    table("Modalities", ["name", "stored as", "bands", "bad", "constant", "valid %", "wavelengths"], rows, right=2)
    maps = summary["label_maps"]
    if summary["classes"]:
        rows = [
            [str(c["value"]), c["name"], *[str(c["pixels"].get(name, 0)) for name in maps]] for c in summary["classes"]
        ]
        table("Classes", ["value", "name", *[f"pixels in '{name}'" for name in maps]], rows, right=2)


def _resampled(rasters: Mapping[str, Any]) -> dict[str, str]:
    """A line about the rasters that came on another grid, if any did."""
    texts = [
        f"{role} ({how['method']}, from {' x '.join(map(str, how['shape']))} pixels)" for role, how in rasters.items()
    ]
    return {"resampled": ", ".join(texts)} if texts else {}


def _grid(crs: str | None, transform: tuple[float, ...] | None) -> str:
    name = crs.split('"')[1] if crs and '"' in crs else "no CRS"
    if transform is None:
        return f"{name}, no transform: rows and columns only"
    a, b, c, d, e, f = transform[:6]
    turned = ", rotated" if b or d else ""
    return f"{name}, pixel {abs(a):.6g} x {abs(e):.6g}, upper-left corner ({c:.10g}, {f:.10g}){turned}"


def _spectrum(part: Mapping[str, Any]) -> str:
    waves = part["wavelength_range"]
    return f"{waves[0]:.0f} to {waves[1]:.0f} {part['wavelength_unit']}" if waves else ""


def show_plan(command: str, plan: Mapping[str, Any]) -> None:
    """What a training command is about to do."""
    side = plan["window"]
    how = "one convex fit" if plan["steps"] is None else f"{plan['steps']} steps"
    work = f"{plan['windows']} windows of {side} x {side} pixels, {how}"
    what = f"{plan['pixels']} pixels" if "pixels" in plan else f"{plan['classes']} classes"
    if "shots" in plan:
        what += f", {plan['shots']} shots per class, split {plan['split']}"
    settings = f"recipe {plan['recipe']}, front end {plan['prepare']}"
    if "encoder" in plan:
        network = f", encoder {plan['encoder']}" if plan["encoder"] else ""
        settings += f", {plan['head']} head{network or (', network over bands' if plan['bands'] else ', no network')}"
    say(f"{command} on {plan['scenes']}: {what}; {work}; {settings}")
    if added := plan.get("added"):
        say(f"From words alone, without a labelled pixel: {listed([entry['name'] for entry in added])}.")
    if names := [entry["name"] for entry in plan.get("unlabelled", ())]:
        hint = f" To map one from its description: --add-class {shlex.quote(names[0])}"
        say(left_out(names) + (hint if plan["head"] == "logistic" else ""))


def left_out(names: Sequence[str]) -> str:
    """A sentence on the classes of a class table that no usable pixel belongs to."""
    return f"Left out, for no usable pixel is labelled so: {listed(names)}."


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a row, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def likeness(entry: Mapping[str, Any]) -> str:
    """The classes whose texts an added class is most like; empty where no text has a word in common with its own."""
    alike = [item for item in sorted(entry["likeness"].items(), key=lambda item: -item[1])[:3] if item[1] > 0]
    return ", ".join(f"{other} ({share:.2f})" for other, share in alike)


def show_umd(result: UmdResult) -> dict[str, Any]:
    """The end of ``train-umd``."""
    first, last = result.losses[0], result.losses[-1]
    say(f"Restoration loss {first:.3f} at the start, {last:.3f} at the end of {len(result.losses)} steps.")
    seconds = None if result.seconds_to_first_step is None else round(result.seconds_to_first_step, 3)
    if seconds is not None:
        say(f"First step {seconds:.1f} s after the start of the command.")
    say(f"Model: {result.folder}")
    return {
        "out": str(result.folder), "loss_first": first, "loss_last": last, "steps": len(result.losses),
        "seconds_to_first_step": seconds,
    }  # fmt: skip


def show_trained(trained: Trained) -> dict[str, Any]:
    """The end of ``train-flc``: held-out figures, named by how they were found."""
    for line in condensed(trained.split.report):
        say(f"  {line}")
    summary = {
        "out": str(trained.result.folder), "split_report": trained.split.report, "steps": len(trained.result.losses),
        "added": list(trained.result.added), **trained.summary(),
    }  # fmt: skip
    if trained.scores is None:
        say(f"No held-out figures: judged by {trained.judged_by}.")
    else:
        say()
        names = {item.value: item.name for item in trained.result.classes}
        show_scores(trained.scores, f"Held-out figures ({trained.judged_by})", names)
    for entry in trained.result.added:
        taken = ""
        if (share := mistaken(trained.scores, entry["value"])) is not None:
            taken = f"; {share:.1f} % of the other classes' test pixels are taken for it"
        alike = f", most like {likeness(entry)}" if likeness(entry) else ""
        say(f"'{entry['name']}' (value {entry['value']}) from words alone{alike}{taken}.")
        _say_if_strange(entry)
    if trained.result.added:
        say(_unseen("it" if len(trained.result.added) == 1 else "them"))
    say(f"Trained on {len(trained.split.train)} labelled windows. Model: {trained.result.folder}")
    return summary


def show_added(entry: Mapping[str, Any], out: Path) -> None:
    """The end of ``add-class``."""
    shots = entry["shots"]
    say(f"The class {entry['name']!r} has the value {entry['value']}.")
    lines = {"learnt from": f"{shots} labelled pixels and its text" if shots else "its text alone"}
    if likeness(entry):
        lines["most like"] = likeness(entry)
    if shots and entry["found"] is not None:
        lines["found"] = f"{entry['found']:.1f} % of its {entry['found_of']} other labelled pixels, away from the shots"
    if shots and entry["taken"] is not None:
        lines["taken for it"] = f"{entry['taken']:.1f} % of {entry['taken_of']} labelled pixels of other classes"
    facts(lines | {"model": str(out)})
    if not shots:
        _say_if_strange(entry)
    say(RETRAIN if shots else _unseen("it"))


def _say_if_strange(entry: Mapping[str, Any]) -> None:
    if not likeness(entry):
        say(f"The text of '{entry['name']}' has no word of another class's: it takes what fits none of them.")


def _unseen(what: str) -> str:
    return f"No pixel of {what} was seen: look at the map before you rely on it, and label some where it matters."


def mistaken(scores: Scores | None, value: int) -> float | None:
    """Share in percent of the pixels of other classes that are taken for a class; None where none was judged."""
    if scores is None:
        return None
    column = list(scores.classes).index(value)
    others = scores.pixels - int(scores.confusion[column].sum())
    hits = int(scores.confusion[:, column].sum() - scores.confusion[column, column])
    return 100.0 * hits / others if others else None


def show_scores(scores: Scores, title: str, names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """OA, AA, kappa and accuracies per class."""
    rows = [
        [
            str(value),
            (names or {}).get(value, f"class {value}"),
            "no test pixels" if math.isnan(accuracy) else f"{accuracy:.1f}",
        ]
        for value, accuracy in scores.per_class.items()
    ]
    table(title, ["value", "class", "accuracy %"], rows, right=2)
    say(f"OA {scores.oa:.1f} %   AA {scores.aa:.1f} %   kappa {scores.kappa:.1f}")
    if medical := scores.binary():
        say("   ".join(f"{name.upper()} {_percent(value)}" for name, value in medical.items()))
    return scores.to_dict()


def _percent(figure: float) -> str:
    return "none" if math.isnan(figure) else f"{figure:.1f} %"


def condensed(report: Sequence[str]) -> list[str]:
    """The sentences of a split with those of classes that went alike drawn together, for a terminal."""
    alike: dict[str, list[tuple[int, int]]] = {}
    lines = []
    for sentence in report:
        if found := _ORDINARY.fullmatch(sentence):
            alike.setdefault(found["how"], []).append((int(found["train"]), int(found["test"])))
        else:
            lines.append(sentence)
    for how, counts in alike.items():
        train, test = (sum(part) for part in zip(*counts, strict=True))
        classes = f"{len(counts)} classes" if len(counts) > 1 else "1 class"
        lines.append(f"{classes}: {how}; {train} training and {test} test pixels.")
    return lines


def evaluation_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of an evaluation."""
    figures = {"oa": "OA %", "aa": "AA %", "kappa": "kappa"}
    if any(row["ece_mean"] is not None for row in rows):
        figures["ece"] = "ECE %"
    if rows and "auc_mean" in rows[0]:  # two classes
        figures |= {"auc": "AUC %", "se": "SE %", "sp": "SP %"}
    cells = [
        [
            str(row["shots"]),
            row["method"],
            row["features"],
            *["none" if row[f"{k}_mean"] is None else figure(row[f"{k}_mean"], row[f"{k}_sd"]) for k in figures],
        ]
        for row in rows
    ]
    return ["shots", "method", "features", *figures.values()], cells


def _two_classes(result: Evaluation) -> list[str]:
    """What the figures of a task with two classes are about."""
    if len(result.classes) != 2:
        return []
    negative, positive = sorted(result.classes, key=lambda item: item.value)
    return [
        f"ACC is OA; SE (sensitivity) is the accuracy of '{positive.name}', SP (specificity) that of "
        f"'{negative.name}', AUC the area under the ROC curve of '{positive.name}'; none: the method ranks nothing."
    ]


def show_evaluation(result: Evaluation, out: Path | None) -> dict[str, Any]:
    """The table of an evaluation; with ``out`` also as Markdown, CSV and JSON."""
    from fastdiffclip.evaluate.tables import write_tables

    rows, draws = result.rows(), result.plan.seeds
    title = f"{result.scene}, split {result.plan.split}, " + (
        f"{draws} draws (mean ± sd, percent)" if draws > 1 else "one draw (percent)"
    )
    table(title, *evaluation_table(rows), right=3)
    notes = [*result.split_report, *_two_classes(result), TRANSDUCTIVE]
    for note in condensed(notes):
        say(f"  {note}")
    if any(row["ece_mean"] is not None for row in rows):
        say(f"  {CALIBRATION}")
    summary = {"rows": rows, "notes": notes, "seconds": round(result.seconds, 1)}
    if out is not None:
        say()
        for path in write_tables(out, title, *evaluation_table(rows), summary):
            say(f"Written: {path}")
        summary["out"] = str(out)
    say(f"Evaluated in {result.seconds:.0f} s.")
    return summary


def show_prediction(result: Prediction, model: Path) -> dict[str, Any]:
    """The end of ``predict``: areas per class and files."""
    placed = any(row["hectares"] is not None for row in result.areas)
    rows = [
        [row["name"], str(row["pixels"]), f"{row['share']:.1f}", *([f"{row['hectares']:.2f}"] if placed else [])]
        for row in result.areas
    ]
    table(f"Predicted with {model}", ["class", "pixels", "share %", *(["hectares"] if placed else [])], rows)
    pixels = result.pixels
    say(
        f"{pixels} pixels in {result.seconds:.1f} s ({pixels / result.seconds:.0f} a second), "
        f"{result.nodata_pixels} of them nodata"
    )
    for path in result.files:
        say(f"Written: {path}")
    return {
        "model": str(model),
        "files": [str(path) for path in result.files],
        "areas": result.areas,
        "pixels": pixels,
        "nodata_pixels": result.nodata_pixels,
        "seconds": round(result.seconds, 2),
    }


def show_doctor() -> dict[str, Any]:
    """What this machine offers, what is used, and why the rest is not."""
    found = examine()
    machine, versions = found["machine"], found["versions"]
    say("Machine")
    facts(
        {
            "system": machine["system"],
            "processor": machine["processor"],
            "cores": f"{machine['cores']} for this process",
            "memory": f"{machine['memory_gib']} GiB",
            "bfloat16": "in hardware" if machine["cpu_bf16"] else "not on this processor",
            "CUDA": ", ".join(machine["cuda_devices"]) or "no device",
        }
    )
    say()
    say("What runs")
    facts(
        {
            "device": f"{found['device']}, matrix products in {found['precision']}",
            **{
                f"{role} attention": f"{part['backend']}: {part['reason']}" for role, part in found["attention"].items()
            },
            "window gather": _state(found["window_gather"], "backend"),
            "native library": _state(found["native_library"], "code"),
            "xformers": found["xformers"],
        }
    )
    say()
    rows = [[op, impl, state] for op, states in found["kernels"].items() for impl, state in states.items()]
    table("Ops", ["op", "implementation", "state"], rows, right=3)
    say("Versions")
    facts(versions)
    return found


def examine() -> dict[str, Any]:
    """What ``doctor`` reports, JSON-able."""
    from fastdiffclip import __version__, kernels
    from fastdiffclip.kernels.native.loader import best_isa
    from fastdiffclip.model.attention import choose, xformers_unavailable
    from fastdiffclip.runtime import Compute, machine, versions
    from fastdiffclip.scene.windows import gather_backend

    where, installed = Compute.choose(), versions()
    attention = {role: choose("fastest", role, where.device) for role in ("encoder", "decoder")}
    backend, why_not = gather_backend()
    present, absent, path = kernels.native.status()
    xformers = xformers_unavailable(where.device.type) or "ok"
    return {
        "machine": machine(),
        "versions": {"fastdiffclip": __version__, **installed},
        "device": str(where.device),
        "precision": str(where.precision).removeprefix("torch."),
        "kernels": kernels.implementations(where.device),
        "attention": {role: {"backend": name, "reason": reason} for role, (name, reason) in attention.items()},
        "xformers": "not installed" if installed["xformers"] == "absent" else xformers,
        "window_gather": {"backend": backend, "reason": why_not},
        "native_library": {
            "code": best_isa() if present else None,
            "path": None if path is None else str(path),
            "reason": absent,
        },
    }


def _state(part: Mapping[str, Any], key: str) -> str:
    return ": ".join(str(text) for text in (part[key] or "absent", part["reason"]) if text)
