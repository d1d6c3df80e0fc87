"""MRNet: a folder of exams becomes one scene per exam, each of them one window."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.config import Config
from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.evaluate.runner import Plan, evaluate
from fastdiffclip.infer.stream import predict
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.mrnet import (
    PLANES,
    STORED_SCALE,
    MrnetLayout,
    area_weights,
    ingest_mrnet,
    read_volume,
    space_to_depth,
)
from fastdiffclip.scene.store import ClassInfo, Scene, open_scene, verify_scene
from fastdiffclip.scene.windows import require_whole_windows
from fastdiffclip.scene.writer import SceneWriter
from fastdiffclip.train.data import umd_data
from fastdiffclip.train.flc import Shots, class_prompts, train_flc
from fastdiffclip.train.umd import train_umd

CLASSES = {"acl": (ClassInfo(1, "intact", "a dark band"), ClassInfo(2, "torn", "a bright gap"))}
SMALL = MrnetLayout(window=3, slices=2, block=4)


def exam(torn: bool, rng: np.random.Generator, slices: int = 5, side: int = 24) -> np.ndarray:
    """A volume whose middle is bright where something is torn."""
    volume = rng.integers(20, 90, (slices, side, side))
    if torn:
        volume[:, side // 3 : 2 * side // 3, side // 3 : 2 * side // 3] += 120
    return volume.astype(np.uint8)


def write_exams(folder: Path, train: str = "0101", valid: str | None = "10", slices: int = 5) -> Path:
    """Exams in the layout of MRNet; ``train`` and ``valid`` are their labels."""
    rng, number = np.random.default_rng(0), 0
    for part, labels in (("train", train), ("valid", valid)):
        lines = []
        for label in labels or "":
            for plane in PLANES:
                (folder / part / plane).mkdir(parents=True, exist_ok=True)
                np.save(folder / part / plane / f"{number:04}.npy", exam(label == "1", rng, slices + number % 3))
            lines.append(f"{number:04},{label}\n")
            number += 1
        if labels is not None:
            (folder / f"{part}-acl.csv").write_text("".join(lines))
    return folder


def ingested(folder: Path, out: Path, layout: MrnetLayout = SMALL) -> list[Scene]:
    return [open_scene(path) for path in ingest_mrnet(folder, out, "acl", CLASSES, layout)[0]]


@given(inputs=st.integers(1, 70), outputs=st.integers(1, 70))
def test_area_weights_by_definition(inputs: int, outputs: int) -> None:
    weights = area_weights(inputs, outputs)
    assert weights.shape == (outputs, inputs) and weights.dtype == np.float32 and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=0), outputs / inputs, rtol=1e-5)  # no input counts more than another
    np.testing.assert_array_equal(weights[::-1, ::-1] > 1e-6, weights > 1e-6)  # centred
    if inputs % outputs == 0:
        values = np.random.default_rng(1).random(inputs).astype(np.float32)
        np.testing.assert_allclose(weights @ values, values.reshape(outputs, -1).mean(axis=1), rtol=1e-5)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_space_to_depth_by_definition(slices: int, window: int, block: int) -> None:
    volume = np.arange(slices * (window * block) ** 2).reshape(slices, window * block, window * block)
    tokens = space_to_depth(volume, block)
    assert tokens.shape == (window, window, slices * block * block)
    for n, i, j in np.ndindex(slices, window * block, window * block):
        channel = (n * block + i % block) * block + j % block
        assert tokens[i // block, j // block, channel] == volume[n, i, j]


@settings(max_examples=20, deadline=None)
@given(slices=st.integers(1, 40), side=st.sampled_from([24, 31, 256]), dtype=st.sampled_from(["uint8", "float32"]))
def test_a_volume_keeps_its_mean_and_is_read_in_parts(
    tmp_path_factory: pytest.TempPathFactory, slices: int, side: int, dtype: str
) -> None:
    path = tmp_path_factory.mktemp("volume") / "0000.npy"
    volume = np.random.default_rng(slices).integers(0, 256, (slices, side, side)).astype(dtype)
    np.save(path, volume)
    layout = MrnetLayout(window=3, slices=7, block=4)
    tokens = read_volume(path, layout)
    assert tokens.dtype == np.uint16 and tokens.shape == (3, 3, layout.channels)
    # Rounding to 1/256 of a grey level, and float32 sums of numbers up to 255.
    assert tokens.mean() * STORED_SCALE == pytest.approx(volume.mean(), abs=STORED_SCALE)
    depth, plane = area_weights(slices, 7), area_weights(side, 12)
    whole = np.tensordot(depth, plane @ volume.astype(np.float64) @ plane.T, axes=1)
    np.testing.assert_allclose(tokens * STORED_SCALE, space_to_depth(whole, 4), atol=0.6 * STORED_SCALE)


def test_scenes_of_a_folder(tmp_path: Path) -> None:
    folder = write_exams(tmp_path / "MRNet-v1.0")
    paths, warnings, lines = ingest_mrnet(tmp_path, tmp_path / "out", "acl", CLASSES, SMALL)  # found one level down
    assert [path.name for path in paths] == [
        *[f"train-{n:04}.zarr" for n in range(4)], "valid-0004.zarr", "valid-0005.zarr",
    ]  # fmt: skip
    assert warnings == []
    assert lines == [
        "train: 4 exams, 2 of them 'torn'",
        "test: 2 exams, 1 of them 'torn'",
        "every exam: 3 x 3 pixels of 3 x 32 channels (2 slices of 12 x 12 pixels)",
    ]
    scenes = [open_scene(path) for path in paths]
    for scene in scenes:
        assert verify_scene(scene.path).ok and scene.centre_only
        assert tuple(scene.modalities) == PLANES and (scene.height, scene.width) == (3, 3)
        assert {m.bands for m in scene.modalities.values()} == {32} and scene.label_maps == ("train", "test")
        assert [(c.value, c.name) for c in scene.classes] == [(1, "intact"), (2, "torn")]
    assert [int(scene.read_labels("train")[1, 1]) for scene in scenes] == [1, 2, 1, 2, 0, 0]
    assert [int(scene.read_labels("test")[1, 1]) for scene in scenes] == [0, 0, 0, 0, 2, 1]
    assert all(np.count_nonzero(scene.read_labels(name)) <= 1 for scene in scenes for name in ("train", "test"))
    for plane in PLANES:
        expected = read_volume(folder / "train" / plane / "0001.npy", SMALL)
        np.testing.assert_array_equal(scenes[1].read(plane), expected)
    assert scenes[1].modalities["axial"].mean[0] == pytest.approx(scenes[1].read("axial")[..., 0].mean() / 256)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5)])
def test_a_scene_that_is_one_window_is_an_odd_square(tmp_path: Path, height: int, width: int) -> None:
    with pytest.raises(UsageError, match="an odd square"):
        SceneWriter(tmp_path / "a.zarr", height=height, width=width, centre_only=True)


def test_official_split_of_exams(tmp_path: Path) -> None:
    scenes = ingested(write_exams(tmp_path / "exams"), tmp_path / "out")
    split = labelled_pixels(scenes).split("official", 1, 0, 3)
    assert len(split.train) == 2 and split.test[:, 0].tolist() == [4, 5] and split.test_labels.tolist() == [2, 1]
    assert (split.train[:, 0] < 4).all() and (split.train[:, 1:] == 1).all() and (split.test[:, 1:] == 1).all()
    disjoint = labelled_pixels(scenes).split("disjoint", 1, 0, 3)
    assert not set(disjoint.train[:, 0]) & set(disjoint.test[:, 0])


def test_without_valid_there_is_one_map(tmp_path: Path) -> None:
    folder = write_exams(tmp_path / "exams", valid=None)
    paths, warnings, _ = ingest_mrnet(folder, tmp_path / "out", "acl", CLASSES, SMALL)
    assert len(warnings) == 1 and "no folder 'valid'" in warnings[0]
    assert open_scene(paths[0]).label_maps == ("train",)


def test_pretraining_sees_whole_exams_only(tmp_path: Path, small_config: Config) -> None:
    import torch

    from fastdiffclip.scene.prepare import fit_front_end

    scenes = ingested(write_exams(tmp_path / "exams"), tmp_path / "out")
    front_end = fit_front_end("standard", scenes)
    centres = [umd_data(scenes, front_end, 99, 3, 0, budget, torch.device("cpu")) for budget in (2**30, 0)]
    np.testing.assert_array_equal(np.sort(centres[0].centres[:, 0].numpy()), np.arange(6))
    assert all((data.centres[:, 1:] == 1).all() and len(data.centres) == 6 for data in centres)
    with pytest.raises(InputDataError, match=r"one window of 3 x 3 pixels .* train with --set model\.window=3"):
        require_whole_windows(scenes, 5)
    wider = small_config.model_copy(update={"model": small_config.model.model_copy(update={"window": 5})})
    with pytest.raises(InputDataError, match="one window of 3 x 3"):
        train_umd(scenes, wider, device="cpu")


def test_training_evaluation_and_prediction(tmp_path: Path, small_config: Config) -> None:
    scenes = ingested(write_exams(tmp_path / "exams", train="01" * 8, valid="0101101"), tmp_path / "out")
    plan = Plan(shots=(4,), seeds=1, split="official", baselines=("svm", "1nn", "linear"))
    config = small_config.model_copy(update={"flc": small_config.flc.model_copy(update={"epochs": 40})})
    rows = evaluate(scenes, plan, config, device="cpu").rows()
    assert {row["method"] for row in rows} == {"fastdiffclip", "svm", "1nn", "linear"}
    for row in rows:
        assert 0 <= row["acc_mean"] <= 100 and 0 <= row["se_mean"] <= 100 and 0 <= row["sp_mean"] <= 100
        assert (row["auc_mean"] is None) == (row["method"] == "1nn")
    ours = rows[0]
    assert ours["auc_mean"] > 95 and ours["acc_mean"] > 80  # a bright middle is easy to see
    labelled = labelled_pixels(scenes)
    split = labelled.split("official", 4, 0, 3)
    shots = Shots(split.train, split.train_labels, labelled.classes, class_prompts(scenes, labelled, "p5"))
    model = train_flc(scenes, shots, small_config, out=tmp_path / "run", device="cpu")
    assert model.folder is not None
    found = predict(scenes[-1], model.folder, tmp_path / "map.tif", device="cpu")
    assert np.count_nonzero(found.class_map) == 1 and found.class_map[1, 1] in (1, 2) and found.nodata_pixels == 8


def hostile(path: Path) -> None:
    np.save(path, np.array([[{"a": 1}]], dtype=object), allow_pickle=True)


def declared(shape: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(100))

    return write


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "truncated, damaged or Python objects"),
        (lambda path: path.write_bytes(b""), r"0000\.npy"),
        (lambda path: path.write_bytes(b"not numpy at all"), "truncated, damaged"),
        (hostile, "Python objects"),
        (declared("(9999999999, 256, 256)"), "truncated, damaged"),
        (declared("(2, -5, 5)"), "0000.npy"),
        (lambda path: np.save(path, np.zeros((24, 24), np.uint8)), "expected a volume"),
        (lambda path: np.save(path, np.zeros((2, 24, 2000), np.uint8)), "expected a volume"),
        (lambda path: np.save(path, np.zeros((0, 24, 24), np.uint8)), r"shape \(0, 24, 24\)"),
        (lambda path: np.save(path, np.zeros((2, 2, 24, 24), np.uint8)), "expected"),
        (lambda path: np.save(path, np.full((2, 24, 24), np.nan)), "grey levels of 0 to 255"),
        (lambda path: np.save(path, np.full((2, 24, 24), 300, np.int16)), "values from 300 to 300"),
        (lambda path: np.save(path, np.full((2, 24, 24), -1, np.int8)), "grey levels"),
        (lambda path: np.save(path, np.zeros((2, 24, 24), complex)), "real numbers"),
        (lambda path: path.unlink(), "lacks 1 exams that other planes have .0000."),
    ],
)
def test_a_volume_that_is_none(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    folder = write_exams(tmp_path / "exams")
    damage(folder / "train" / "coronal" / "0000.npy")
    with pytest.raises(InputDataError, match=said) as raised:
        ingest_mrnet(folder, tmp_path / "out", "acl", CLASSES, SMALL)
    assert "\n" not in str(raised.value) and sorted(p.name for p in tmp_path.iterdir()) == ["exams"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no label"),
        ("0000,1\n0001,2\n", "line 2: expected 'exam,0' or 'exam,1', found '0001,2'"),
        ("0000\n", "line 1: expected"),
        ("0000,1\n0000,0\n", "line 2: exam 0000 stands in the table twice"),
        ("0000,1\n0001,0\n0002,1\n", "no label for 1 exams .*0003"),
        ("\ufffd", "expected 'exam,0'"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    folder = write_exams(tmp_path / "exams")
    (folder / "train-acl.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputDataError, match=said):
        ingest_mrnet(folder, tmp_path / "out", "acl", CLASSES, SMALL)


def test_folders_that_are_none(tmp_path: Path) -> None:
    folder = write_exams(tmp_path / "a" / "exams")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no MRNet task 'alc' .did you mean 'acl'"):
        ingest_mrnet(folder, out, "alc", CLASSES, SMALL)
    with pytest.raises(InputDataError, match="there is no folder"):
        ingest_mrnet(tmp_path / "none", out, "acl", CLASSES, SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputDataError, match="no folder of MRNet exams: expected train/axial/0000.npy .*nothing"):
        ingest_mrnet(tmp_path / "empty", out, "acl", CLASSES, SMALL)
    write_exams(tmp_path / "b")
    with pytest.raises(InputDataError, match="several folders of MRNet exams"):
        ingest_mrnet(tmp_path, out, "acl", CLASSES, SMALL)
    (folder / "valid-acl.csv").rename(folder / "other.csv")
    with pytest.raises(InputDataError, match=r"no file valid-acl\.csv: it has other\.csv, train-acl\.csv"):
        ingest_mrnet(folder, out, "acl", CLASSES, SMALL)
    (folder / "valid").rename(folder / "val")
    (folder / "other.csv").rename(folder / "val" / "val-acl.csv")
    (folder / "train-acl.csv").write_text((folder / "train-acl.csv").read_text() + "0099,1\n")
    _, warnings, _ = ingest_mrnet(folder, out, "acl", CLASSES, SMALL)
    assert warnings == [f"{folder}/train-acl.csv: 1 labels belong to no exam of {folder}/train (0099)"]
    with pytest.raises(UsageError, match="exists already"):
        ingest_mrnet(folder, out, "acl", CLASSES, SMALL)


@pytest.mark.parametrize("wrong", [{"window": 10}, {"window": 33}, {"slices": 0}, {"block": 65}])
def test_layouts_that_are_none(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"MRNet option {next(iter(wrong))}"):
        MrnetLayout(**wrong)
    assert MrnetLayout().channels == 1024 and MrnetLayout().side == 88 and math.isclose(STORED_SCALE * 256, 1)
