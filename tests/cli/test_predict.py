"""The options of ``predict``: what it says before it begins, parts of a scene, files without a conversion."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

from fastdiffclip.commands.prediction import memory_size
from fastdiffclip.errors import UsageError

from .console import HEIGHT, WIDTH, Result, leftovers, tiny

Call = Callable[..., Result]
PREDICT = ["predict", "scene.zarr", "--model", "m", "--out", "map.tif"]


@pytest.fixture(scope="module")
def trained(ingested: Path, tmp_path_factory: pytest.TempPathFactory, real: Call) -> Path:
    """A folder with scene.zarr, its files, and the model m; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "files"
    shutil.copytree(ingested, folder)
    result = real(["train-flc", "scene.zarr", "--shots", "3", "--umd", "none", "--out", "m", *tiny()], folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A folder of its own with the files of ``trained``."""
    return Path(shutil.copytree(trained, tmp_path / "work"))


def test_the_plan_comes_first_and_a_dry_run_stops_there(work: Path, call: Call) -> None:
    before = sorted(work.rglob("*"))
    result = call([*PREDICT, "--dry-run", "--json"], work)
    assert result.code == 0 and sorted(work.rglob("*")) == before
    for word in (
        "1200 of 30 x 40",
        "1 of 30 x 40 pixels, 2048 windows at a time",
        "cpu, float32",
        "memory",
        "expected",
    ):
        assert word in result.out
    plan = result.json
    assert plan["dry_run"] is True and plan["blocks"] == 1 and plan["expected_seconds"] >= 0
    assert plan["memory"]["sum"] > plan["memory"]["process"] > 0
    done = call([*PREDICT, "--json"], work)
    assert done.out.index("2048 windows at a time") < done.out.index("Written")
    assert done.json["plan"]["batch"] == 2048 and done.json["areas"][0]["hectares"] is not None


def test_memory_is_a_limit_or_a_refusal(work: Path, call: Call) -> None:
    call([*PREDICT, "--memory", "20MiB"], work).one_sentence(4, "--memory 20MiB", "the smallest that works is")
    call([*PREDICT, "--memory", "much"], work).one_sentence(2, "--memory", "2GiB")
    assert leftovers(work) == [] and not (work / "map.tif").exists()
    assert call([*PREDICT, "--memory", "16GiB"], work).code == 0


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("512 MiB", 512 << 20), ("1.5g", 3 << 29), ("7", 7), ("3KB", 3 << 10)]
)
def test_sizes(text: str, size: int) -> None:
    assert memory_size(text, "--memory") == size and memory_size(None, "--memory") is None


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "2XiB", "1e9", "2GiB!"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--memory takes a size"):
        memory_size(text, "--memory")


def test_a_part_of_the_scene(work: Path, call: Call) -> None:
    assert call([*PREDICT, "--confidence", "c.tif"], work).code == 0
    with rasterio.open(work / "map.tif") as file:
        whole = file.read(1)
    np.save(work / "mask.npy", np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 7 == 0)
    box = ["--bbox", "300010,3999970,300050,3999990", "--mask", "mask.npy"]
    part = call([*PREDICT[:4], "--out", "part.tif", *box, "--json"], work)
    assert part.code == 0 and part.json["pixels"] == 200
    with rasterio.open(work / "part.tif") as file:
        found = file.read(1)
        assert tuple(file.transform)[:6] == (2, 0, 300010, 0, -2, 3999990)
    wanted = np.load(work / "mask.npy")[5:15, 5:25]
    np.testing.assert_array_equal(found, np.where(wanted, whole[5:15, 5:25], 0))
    assert part.json["nodata_pixels"] == (~wanted).sum()
    call([*PREDICT, "--bbox", "1,2,3"], work).one_sentence(2, "--bbox", "XMIN,YMIN,XMAX,YMAX")
    call([*PREDICT, "--mask", "none.tif"], work).one_sentence(3, "none.tif")
    with rasterio.open(work / "c.tif") as file:
        assert file.count == 1 and 1 / 3 <= np.nanmin(file.read(1)) <= 1


def test_files_are_predicted_without_a_conversion(work: Path, call: Call) -> None:
    assert call([*PREDICT, "--probabilities", "p.tif"], work).code == 0
    files = ["predict", "cube.mat:HSI", "--modality", "lidar=dsm.tif", "--model", "m"]
    assert call([*files, "--out", "direct.tif", "--probabilities", "direct_p.tif"], work).code == 0
    assert (work / "direct.tif").read_bytes() == (work / "map.tif").read_bytes()
    assert (work / "direct_p.tif").read_bytes() == (work / "p.tif").read_bytes()


def test_envi_without_a_conversion(work: Path, call: Call) -> None:
    assert call(PREDICT, work).code == 0
    cube = np.load(work / "cube.npy")
    cube.astype("<u2").tofile(work / "line.bip")
    fields = {"samples": WIDTH, "lines": HEIGHT, "bands": cube.shape[2], "data type": 12, "interleave": "bip"}
    (work / "line.hdr").write_text("\n".join(["ENVI", *(f"{key} = {value}" for key, value in fields.items())]))
    direct = call(["predict", "line.hdr", "--modality", "lidar=dsm.tif", "--model", "m", "--out", "direct.tif"], work)
    assert direct.code == 0, direct.err
    assert (work / "direct.tif").read_bytes() == (work / "map.tif").read_bytes()


def test_files_that_do_not_fit_the_model(work: Path, call: Call) -> None:
    out = ["--model", "m", "--out", "map.tif"]
    call(["predict", "cube.npy", *out], work).one_sentence(3, "no modality 'lidar'", "hsi, lidar")
    call(["predict", "dsm.tif", "--modality", "lidar=dsm.tif", *out], work).one_sentence(3, "hsi", "1 bands", "8")
    call(["predict", "cube.npy", "--out", "map.tif"], work).one_sentence(2, "cube.npy", "--model")
    call(["predict", "none.tif", *out], work).one_sentence(3, "none.tif")
    call([*PREDICT, "--modality", "lidar=dsm.tif"], work).one_sentence(2, "scene.zarr", "leave out")
    scaled = ["predict", "cube.npy", "--modality", "lidar=dsm.tif", "--scale", "2", *out]
    call(scaled, work).one_sentence(3, "scale 2", "scale 1")
    assert not (work / "map.tif").exists() and leftovers(work) == []


def test_what_was_begun_otherwise_is_not_resumed(work: Path, call: Call) -> None:
    folder = work / ".map.tif.partial"
    folder.mkdir()
    (folder / "run.json").write_text('{"scene": "another"}')
    call([*PREDICT, "--resume"], work).one_sentence(2, "map.tif", "another scene", "leave out --resume")
    assert folder.exists()
    assert call(PREDICT, work).code == 0 and not folder.exists()
