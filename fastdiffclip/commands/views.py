"""How results are shown in a terminal; each view returns the JSON object that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiffclip.commands.terminal import figure, say, table

if TYPE_CHECKING:
    from fastdiffclip.commands.workflow import Trained
    from fastdiffclip.evaluate.metrics import Scores
    from fastdiffclip.evaluate.runner import Evaluation
    from fastdiffclip.infer.stream import Prediction
    from fastdiffclip.train.umd import UmdResult

TRANSDUCTIVE = (
    "Pretraining saw the unlabelled pixels of the whole scene, test pixels included; no label of a test pixel was used."
)
LEAKS = "The random split leaks: windows of training and test pixels overlap. Compare with --split disjoint."


def show_scene(summary: Mapping[str, Any]) -> None:
    """Facts of a stored scene."""
    say(
        f"{summary['name']}: {summary['height']} x {summary['width']} pixels, "
        f"{summary['bytes_on_disk'] / 2**20:.1f} MiB, {summary['path']}"
    )
    crs = summary["crs_wkt"]
    say(
        f"CRS {crs.split(chr(34))[1] if crs and chr(34) in crs else 'none'}, "
        f"transform {summary['affine_transform'] or 'none'}"
    )
    rows = []
    for part in summary["modalities"]:
        waves = part.get("wavelength_range")
        spectrum = f"{waves[0]:.0f} to {waves[1]:.0f} nm" if waves else ""
        rows.append(
            [
                part["name"],
                str(part["bands"]),
                part["dtype"],
                f"{part['valid_percent']:.1f} %",
                str(part["bad_bands"] or 0),
                spectrum,
            ]
        )
    table("Modalities", ["name", "bands", "stored as", "valid", "bad bands", "wavelengths"], rows)
    maps = summary["label_maps"]
    if summary["classes"]:
        rows = [
            [str(c["value"]), c["name"], *[str(c["pixels"].get(name, 0)) for name in maps]] for c in summary["classes"]
        ]
        table("Classes", ["value", "name", *[f"pixels in {name}" for name in maps]], rows, right=2)


def show_plan(command: str, plan: Mapping[str, Any]) -> None:
    """One line of what a training command is about to do."""
    say(
        f"{command}: "
        + ", ".join(f"{key} {value}" for key, value in plan.items() if not isinstance(value, (list, dict)))
    )


def show_umd(result: UmdResult) -> dict[str, Any]:
    """The end of ``train-umd``."""
    first, last = result.losses[0], result.losses[-1]
    say(f"Restoration loss {first:.3f} at the start, {last:.3f} at the end of {len(result.losses)} steps.")
    say(f"Model: {result.folder}")
    return {"out": str(result.folder), "loss_first": first, "loss_last": last, "steps": len(result.losses)}


def show_trained(trained: Trained) -> dict[str, Any]:
    """The end of ``train-flc``: held-out figures, named by how they were found."""
    for line in trained.split.report:
        say(f"  {line}")
    summary = {"out": str(trained.result.folder), **trained.summary()}
    if trained.scores is None:
        say(f"No held-out figures: judged by {trained.judged_by}.")
    else:
        show_scores(trained.scores, f"Held-out figures ({trained.judged_by})", trained.labelled.names)
        if trained.split.kind == "random":
            say(LEAKS)
    say(f"Trained on {len(trained.split.train)} labelled windows. Model: {trained.result.folder}")
    return summary


def show_scores(scores: Scores, title: str, names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """OA, AA, kappa and accuracies per class."""
    rows = [
        [
            names.get(value, str(value)) if names else str(value),
            "no test pixels" if accuracy is None else f"{accuracy:.1f}",
        ]
        for value, accuracy in scores.per_class.items()
    ]
    table(title, ["class", "accuracy %"], rows)
    say(f"OA {scores.oa:.1f} %   AA {scores.aa:.1f} %   kappa {scores.kappa:.1f}")
    return scores.to_dict()


def evaluation_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of an evaluation."""
    columns = ["shots", "method", "features", "OA %", "AA %", "kappa"]
    cells = [
        [
            str(row["shots"]),
            row["method"],
            row["features"],
            *[figure(row[f"{k}_mean"], row[f"{k}_sd"]) for k in ("oa", "aa", "kappa")],
        ]
        for row in rows
    ]
    return columns, cells


def show_evaluation(result: Evaluation, out: Path | None) -> dict[str, Any]:
    """The table of an evaluation; with ``out`` also as Markdown, CSV and JSON."""
    from fastdiffclip.evaluate.tables import write_tables

    rows = result.rows()
    title = f"{result.scene}, split {result.plan.split}, {result.plan.seeds} draws (mean ± sd, percent)"
    table(title, *evaluation_table(rows), right=3)
    notes = [*result.split_report, TRANSDUCTIVE, *([LEAKS] if result.plan.split == "random" else [])]
    for note in notes:
        say(f"  {note}")
    say(f"{result.seconds:.0f} s")
    summary = {"rows": rows, "notes": notes, "seconds": round(result.seconds, 1)}
    if out is not None:
        for path in write_tables(out, title, *evaluation_table(rows), summary):
            say(f"Written: {path}")
    return summary


def show_prediction(result: Prediction, model: Path) -> dict[str, Any]:
    """The end of ``predict``: areas per class and files."""
    rows = [
        [
            row["name"],
            str(row["pixels"]),
            f"{row['share']:.1f}",
            "" if row["hectares"] is None else f"{row['hectares']:.2f}",
        ]
        for row in result.areas
    ]
    table(f"Predicted with {model}", ["class", "pixels", "share %", "hectares"], rows)
    pixels = result.class_map.size
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
    from fastdiffclip import kernels
    from fastdiffclip.model.attention import choose, xformers_unavailable
    from fastdiffclip.runtime import Compute, machine, versions
    from fastdiffclip.scene.windows import gather_backend

    where = Compute.choose()
    found: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "device": str(where.device),
        "precision": str(where.precision),
    }
    found["kernels"] = kernels.implementations(where.device)
    attention = {}
    for role in ("encoder", "decoder"):
        backend, reason = choose("fastest", role, where.device)
        attention[role] = {"backend": backend, "reason": reason}
    found["attention"] = attention
    found["xformers"] = xformers_unavailable(where.device.type) or "ok"
    found["window_gather"] = gather_backend()
    present, reason, path = kernels.native.status()
    found["native_library"] = str(path) if present else f"absent: {reason}"

    table("Machine", ["", ""], [[key, str(value)] for key, value in found["machine"].items()], right=2)
    table(
        "Versions",
        ["package", "version"],
        [[key, value] for key, value in found["versions"].items()],
        right=2,
    )
    rows = [[op, impl, state] for op, table_ in found["kernels"].items() for impl, state in table_.items()]
    table("Kernels", ["op", "implementation", "state"], rows, right=3)
    say(f"Runs on {found['device']} in {found['precision'].removeprefix('torch.')}.")
    for role, part in attention.items():
        say(f"Attention of the {role}: {part['backend']} ({part['reason']}).")
    say(f"xformers: {found['xformers']}")
    say(f"Native library: {found['native_library']}")
    say(f"Window gather: {found['window_gather']}")
    return found
