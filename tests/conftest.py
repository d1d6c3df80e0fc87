"""Fixtures of the whole suite: real scenes where they are present, a small scene and settings to train with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.config import Config, FlcConfig, ModelConfig, UmdConfig
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import ClassInfo, Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter
from fastdiffclip.train.flc import FlcResult, Shots, class_prompts, train_flc
from fastdiffclip.train.umd import UmdResult, train_umd

# Before anything imports Triton: its kernels then run interpreted on the CPU, and every test that sweeps the
# implementations of an op takes them in.
os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]
UTM_32N = (
    'PROJCS["WGS 84 / UTM zone 32N",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",9],PARAMETER["scale_factor",0.9996],'
    'PARAMETER["false_easting",500000],PARAMETER["false_northing",0],UNIT["metre",1],AUTHORITY["EPSG","32632"]]'
)
CLASSES = (
    ClassInfo(1, "grass", "low green vegetation", (30, 160, 60)),
    ClassInfo(2, "roof", "a red tile roof", (200, 60, 40)),
    ClassInfo(4, "water", "a dark pond", (20, 40, 200)),
)
PATCH = 6


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scenes, or a skip that says what to set."""
    folder = Path(os.environ.get("FASTDIFFCLIP_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip("no real scenes: FASTDIFFCLIP_REAL_DATA is unset and ../shared/data is not there")
    return folder


def write_small_scene(path: Path, seed: int = 0, height: int = 24, width: int = 30, bands: int = 12) -> Path:
    """Patches of three separable materials; labels stand back from the patches' edges; some pixels are invalid."""
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[:height, :width]
    patch = row // PATCH + col // PATCH + (row // PATCH) * 2
    material = patch % 3
    spectra = 2000.0 + 1500.0 * np.sin(np.arange(bands) * np.array([[0.3], [0.6], [0.9]]))
    cube = spectra[material] * (1.0 + 0.05 * rng.standard_normal((height, width, 1)))
    cube = np.clip(cube + 60.0 * rng.standard_normal(cube.shape), 1, 65535).astype(np.uint16)
    heights = (np.array([0.3, 6.0, 0.0])[material] + 0.1 * rng.standard_normal((height, width))).astype(np.float32)
    heights[rng.random((height, width)) < 0.02] = np.nan
    inner = (row % PATCH >= 1) & (row % PATCH < PATCH - 1) & (col % PATCH >= 1) & (col % PATCH < PATCH - 1)
    labels = np.where(inner, np.array([1, 2, 4])[material], 0).astype(np.uint16)
    transform = (2.0, 0.0, 500000.0, 0.0, -2.0, 5200000.0)
    with SceneWriter(path, height=height, width=width, crs_wkt=UTM_32N, affine_transform=transform) as writer:
        waves = tuple(400.0 + 40.0 * i for i in range(bands))
        writer.add_modality("hsi", cube, bands=bands, dtype="uint16", wavelengths=waves, scale=1e-4)
        writer.add_modality("lidar", heights[:, :, None], bands=1, dtype="float32")
        writer.add_labels("labels", labels)
        writer.set_classes(CLASSES)
    return path


@pytest.fixture(scope="session")
def small_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """24 x 30 pixels, 12 bands and a lidar raster, classes 1, 2 and 4."""
    return open_scene(write_small_scene(tmp_path_factory.mktemp("scenes") / "small.zarr"))


@pytest.fixture(scope="session")
def small_config() -> Config:
    """Both stages in about a second, in float32."""
    return Config(
        prepare="standard",
        precision="fp32",
        memory_gib=1.0,
        model=ModelConfig(
            window=3, width=16, depth=2, heads=2, decoder_width=16, decoder_depth=1, embedding=16, text_width=16,
            text_depth=1, text_heads=2,
        ),
        umd=UmdConfig(epochs=4, batch=16, samples=40, lr=1e-3, micro_batch=8),
        flc=FlcConfig(epochs=12, batch=8, lr=3e-3),
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_shots(small_scene: Scene) -> Shots:
    """Four labelled windows of each of the three classes."""
    labelled = labelled_pixels([small_scene])
    split = labelled.split("disjoint", 4, 0, 3)
    return Shots(split.train, split.train_labels, labelled.classes, class_prompts([small_scene], labelled, "p4"))


@pytest.fixture(scope="session")
def small_umd(small_scene: Scene, small_config: Config) -> UmdResult:
    """A pretrained model, not on disk."""
    return train_umd([small_scene], small_config, device="cpu")


@pytest.fixture(scope="session")
def flc_run(
    small_scene: Scene,
    small_config: Config,
    small_shots: Shots,
    small_umd: UmdResult,
    tmp_path_factory: pytest.TempPathFactory,
) -> FlcResult:
    """A finished run of ``train-flc`` in its folder; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "flc"
    return train_flc([small_scene], small_shots, small_config, umd=small_umd, out=out, device="cpu")
