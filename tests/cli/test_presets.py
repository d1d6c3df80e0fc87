"""``ingest --preset`` and what goes on from there, as a user types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from .console import Result, tiny

RNG = np.random.default_rng(2)


@pytest.fixture
def trento(tmp_path: Path) -> Path:
    """The usual files of Trento, small."""
    (tmp_path / "downloads" / "Trento").mkdir(parents=True)
    parts = {"HSI": (9, 12, 63), "LiDAR": (9, 12), "TRLabel": (9, 12), "TSLabel": (9, 12)}
    for key, shape in parts.items():
        values = RNG.integers(0, 7, shape).astype(np.uint8) + (1 if key == "HSI" else 0)
        scipy.io.savemat(tmp_path / "downloads" / "Trento" / f"{key}.mat", {key: values})
    return tmp_path


@pytest.fixture
def exams(tmp_path: Path) -> Path:
    """Knee exams of which the torn ones are bright in the middle."""
    number = 0
    for part, count in (("train", 8), ("valid", 6)):
        lines = []
        for i in range(count):
            for plane in ("axial", "coronal", "sagittal"):
                folder = tmp_path / "MRNet-v1.0" / part / plane
                folder.mkdir(parents=True, exist_ok=True)
                volume = RNG.integers(0, 60, (4, 32, 32))
                volume[:, 8:24, 8:24] += 150 * (i % 2)
                np.save(folder / f"{number:04}.npy", volume.astype(np.uint8))
            lines.append(f"{number:04},{i % 2}")
            number += 1
        (tmp_path / "MRNet-v1.0" / f"{part}-acl.csv").write_text("\n".join(lines))
    return tmp_path


def test_a_scene_by_its_name(call: Callable[..., Result], trento: Path) -> None:
    done = call(["ingest", "--preset", "trento", "downloads", "--json"], trento)
    assert done.code == 0, done.err
    assert done.json["scenes"] == ["trento.zarr"] and "is it whole?" in done.json["warnings"][0]
    shown = call(["scene", "info", "trento.zarr", "--json"], trento)
    assert shown.json["label_maps"].keys() == {"train", "test"} and shown.json["classes"][4]["name"] == "Vineyard"
    plan = call(
        ["train-flc", "trento.zarr", "--split", "official", "--recipe", "trento", "--dry-run", "--json"], trento
    )
    assert plan.json["recipe"] == "trento" and plan.json["window"] == 11


def test_exams_are_ingested_and_evaluated(call: Callable[..., Result], exams: Path) -> None:
    options = ["--option", "task=acl", "--option", "window=3", "--option", "block=4", "--option", "slices=2"]
    done = call(["ingest", "--preset", "mrnet", "MRNet-v1.0", *options, "--out", "knees"], exams)
    assert done.code == 0, done.err
    assert "test: 6 exams, 3 of them 'Torn anterior cruciate ligament'" in done.out
    arguments = ["evaluate", "knees", "--split", "official", "--shots", "4", "--seeds", "1", "--umd", "none"]
    arguments += ["--baselines", "svm"]
    done = call([*arguments, "--recipe", "mrnet", "--out", "result", "--json", *tiny("flc.epochs=30")], exams)
    assert done.code == 0, done.err
    ours = done.json["rows"][0]
    assert {"acc_mean", "auc_mean", "se_mean", "sp_mean", "auc_sd"} <= set(ours) and ours["auc_mean"] > 80
    assert "AUC %" in done.out and "SE (sensitivity) is the accuracy of 'Torn anterior" in done.out
    wide = call([*arguments, "--recipe", "mrnet", "--out", "other", *tiny("model.window=5")], exams)
    wide.one_sentence(3, "one window of 3 x 3 pixels", "--set model.window=3")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--preset", "trento"], 2, "--preset trento needs the folder"),
        (["--preset", "trento", "downloads", "--hsi", "a.mat"], 2, "leave out --hsi"),
        (["--preset", "trent", "downloads"], 2, "did you mean 'trento'"),
        (["--preset", "trento", "downloads", "--option", "task"], 2, "--option takes KEY=VALUE"),
        (["--preset", "mrnet", "downloads", "--option", "task=acl"], 3, "no folder of MRNet exams"),
        (["--preset", "muufl", "downloads"], 3, "HSI.mat"),
        (["--preset", "houston2013", "nowhere"], 3, "there is no folder nowhere"),
        (["downloads", "--hsi", "a.mat", "--out", "a.zarr"], 2, "DIR and --option go with --preset"),
        (["--hsi", "a.mat"], 2, "ingest needs --out SCENE"),
    ],
)
def test_what_is_refused(call: Callable[..., Result], trento: Path, arguments: list[str], code: int, said: str) -> None:
    if "muufl" in arguments:
        scipy.io.savemat(trento / "downloads" / "Trento" / "HSI.mat", {"HSI": np.ones((9, 12, 5))})
    done = call(["ingest", *arguments], trento)
    done.one_sentence(code, said)
    assert sorted(path.name for path in trento.iterdir()) == ["downloads"]
