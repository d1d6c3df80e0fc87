"""Predictions that fail or meet another one: what is left, and how the next one goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.stream import predict
from fastdiffclip.scene.store import Scene

from .streams import raw_probabilities, write_scene


def test_a_failure_half_way_leaves_no_output_and_can_be_taken_up(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, small_tiles: None
) -> None:
    predict(small_scene, classifier, tmp_path / "map.tif", probabilities=tmp_path / "p.tif")
    out = tmp_path / "out"
    begun: list[int] = []

    def interrupt(task: str, done: int, total: int, note: str = "") -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(small_scene, classifier, out / "map.tif", probabilities=out / "p.tif", progress=interrupt)
    assert os.listdir(out) == [".map.tif.partial"]
    predict(
        small_scene, classifier, out / "map.tif", probabilities=out / "p.tif", resume=True, memory=1 << 40,
        progress=lambda task, done, total, note: begun.append(done),
    )  # fmt: skip
    assert begun[0] >= 360
    for name in ("map.tif", "p.tif"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()
    assert sorted(os.listdir(out)) == ["map.tif", "map.tif.aux.xml", "p.tif"]


def test_damage_to_the_scene_ends_the_run_with_its_own_error(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdiffclip.scene.writer.chunk_shape", lambda height, width, *_: (4, width))
    scene = write_scene(tmp_path / "s.zarr", small_scene)
    chunk = tmp_path / "s.zarr" / "hsi" / "c" / "4" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[9] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(InputDataError, match="array 'hsi', chunk 4/0/0 is damaged"):
        raw_probabilities(classifier, scene, tmp_path)
    assert not (tmp_path / "map.tif").exists()


def test_a_failure_to_write_ends_the_run_with_its_own_error(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(ResourceError, match=r"cannot write .*map\.tif: No space left on device"):
        predict(small_scene, classifier, tmp_path / "map.tif")
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_written(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        predict(small_scene, classifier, tmp_path / "file" / "map.tif")
    assert os.listdir(tmp_path) == ["file"]


def test_a_second_run_on_one_output_is_refused(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(task: str, done: int, total: int, note: str = "") -> None:
        if not refused:
            refused.append("")
            with pytest.raises(UsageError, match="another process is predicting into") as found:
                predict(small_scene, classifier, tmp_path / "map.tif", resume=True)
            refused[0] = str(found.value)

    predict(small_scene, classifier, tmp_path / "map.tif", progress=second)
    assert "give another --out" in refused[0]
    assert sorted(os.listdir(tmp_path)) == ["map.tif", "map.tif.aux.xml"]
