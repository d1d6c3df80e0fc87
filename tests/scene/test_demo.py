"""The built-in scene: the same bytes everywhere, physically sensible, worth solving."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label, minimum_filter

from fastdiffclip.errors import UsageError
from fastdiffclip.scene.demo import CRS_WKT, DemoScene, demo_classes, make_demo, write_demo
from fastdiffclip.scene.demo.canvas import Canvas, Draws
from fastdiffclip.scene.demo.objects import Kind
from fastdiffclip.scene.demo.sensor import SUN_EAST, SUN_SOUTH, SUN_TAN, cast_shadow
from fastdiffclip.scene.demo.spectra import MATERIALS, TURF, material_spectra, wavelengths

GOLDEN = "c4e9dab30361ac8bc979b9ed3b7130e43cb0c2b2f551c4c1e737d59c8c1989ba"


@pytest.fixture(scope="module")
def scene() -> DemoScene:
    return make_demo(0)


def _digest(scene: DemoScene) -> str:
    digest = hashlib.sha256()
    for array in (scene.hsi, scene.lidar, scene.labels):
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _spectrum(scene: DemoScene, kind: Kind, nm: float) -> float:
    band = int(np.argmin(np.abs(np.array(scene.wavelengths) - nm)))
    return float(np.median(scene.hsi[scene.labels == kind, band])) / 10_000.0


def test_the_same_bytes_on_every_machine(scene: DemoScene) -> None:
    assert _digest(scene) == GOLDEN


def test_a_seed_fixes_the_scene_and_another_changes_it() -> None:
    first, again, other = (make_demo(seed, 50, 75) for seed in (3, 3, 4))
    assert _digest(first) == _digest(again)
    for name in ("hsi", "lidar", "labels"):
        assert not np.array_equal(getattr(first, name), getattr(other, name)), name


def test_draws_are_the_documented_words() -> None:
    words = np.random.PCG64([7, 2]).random_raw(3)
    assert Draws(7, 2).uniforms(3).tolist() == [(int(word) >> 11) / 2**53 for word in words]
    parts = [[(int(word) >> shift) & 0xFFFF for shift in (0, 16, 32, 48)] for word in words]
    expected = [(sum(four) - 2 * 65535) / np.sqrt(4 * (65536**2 - 1) / 12) for four in parts]
    np.testing.assert_allclose(Draws(7, 2).normals(3), expected, rtol=1e-9)
    many = Draws(0, 0).normals(200_000)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1.0) < 0.01
    assert sorted(Draws(1, 1).order(50)) == list(range(50))


def test_shapes_types_and_georeference(scene: DemoScene) -> None:
    assert scene.hsi.shape == (200, 300, 144) and scene.hsi.dtype == np.uint16
    assert scene.lidar.shape == (200, 300, 1) and scene.lidar.dtype == np.float32
    assert scene.labels.shape == (200, 300) and scene.labels.dtype == np.uint16
    assert len(scene.wavelengths) == len(scene.fwhm) == 144
    assert scene.wavelengths[0] == 380.0 and scene.wavelengths[-1] == 1050.0
    a, b, c, d, e, f = scene.affine_transform
    assert (a, b, d, e) == (2.0, 0.0, 0.0, -2.0) and 2e5 < c < 8e5 and 3e6 < f < 4e6
    crs = pytest.importorskip("rasterio.crs").CRS.from_wkt(CRS_WKT)
    assert crs.to_epsg() == 32615
    assert scene.hsi.max() < 15_000 and np.isfinite(scene.lidar).all()
    centimetres = scene.lidar.astype(np.float64) * 100.0
    assert np.abs(centimetres - np.round(centimetres)).max() < 1e-3


def test_class_table_is_complete(scene: DemoScene) -> None:
    classes = demo_classes()
    assert [info.value for info in classes] == list(range(1, 15)) == sorted(Kind)
    assert len({info.name for info in classes}) == len({info.colour for info in classes}) == 14
    assert all(1 <= info.description.count(".") <= 3 for info in classes)
    assert set(np.unique(scene.labels)) == {0, *range(1, 15)}


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_are_separate_patches(scene: DemoScene, seed: int) -> None:
    labels = scene.labels if seed == 0 else make_demo(seed).labels
    assert 0.10 <= (labels > 0).mean() <= 0.20
    for kind in Kind:
        patches, count = label(labels == kind, np.ones((3, 3)))
        assert count >= 8, kind.name
        centres = np.array([np.argwhere(patches == number).mean(0) for number in range(1, count + 1)])
        gaps = np.abs(centres[:, None] - centres[None]).max(-1)
        assert (gaps.max(1) > 60).all(), f"{kind.name} lies in one corner"


def test_other_sizes_show_every_class() -> None:
    small = make_demo(0, 100, 150)
    assert small.hsi.shape == (100, 150, 144)
    assert small.affine_transform[0] == 4.0 and small.affine_transform[4] == -4.0
    assert set(np.unique(small.labels)) == {0, *range(1, 15)}


@pytest.mark.parametrize("arguments", [(-1, 200, 300), (0, 39, 300), (0, 200, 59)])
def test_what_cannot_be_made_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="at least 40 rows and 60 columns"):
        make_demo(*arguments)


def test_spectra_look_like_the_real_ones(scene: DemoScene) -> None:
    def step(kind: Kind) -> float:
        red, infrared = _spectrum(scene, kind, 672), _spectrum(scene, kind, 800)
        return (infrared - red) / (infrared + red)

    assert step(Kind.HEALTHY) > 0.6 and step(Kind.TREES) > 0.6
    assert 0.2 < step(Kind.STRESSED) < step(Kind.HEALTHY) - 0.15
    for kind in (Kind.HEALTHY, Kind.TREES):
        assert _spectrum(scene, kind, 740) > 3.0 * _spectrum(scene, kind, 690), "red edge between 700 and 740"
        assert _spectrum(scene, kind, 550) > 1.3 * _spectrum(scene, kind, 672), "green peak"
    assert _spectrum(scene, Kind.TURF, 740) < 1.8 * _spectrum(scene, Kind.TURF, 690), "turf has no red edge"
    assert _spectrum(scene, Kind.TURF, 900) > 2.0 * _spectrum(scene, Kind.TURF, 740)
    assert _spectrum(scene, Kind.WATER, 860) < 0.03
    for kind in (Kind.TILE_ROOF, Kind.TRACK, Kind.SOIL):
        assert _spectrum(scene, kind, 660) > 1.8 * _spectrum(scene, kind, 480), "iron oxide"
    for kind in (Kind.CONCRETE, Kind.ROAD):
        beside = 0.5 * (_spectrum(scene, kind, 745) + _spectrum(scene, kind, 780))
        assert _spectrum(scene, kind, 761) < 0.95 * beside, "oxygen is left over"


def test_materials_are_reflectances_with_distinct_variations() -> None:
    spectra = material_spectra()
    assert spectra.shape == (MATERIALS, 3, 144) and wavelengths().shape == (144,)
    assert spectra.min() > 0.0 and spectra.max() < 0.9
    assert (np.abs(np.diff(spectra, axis=1)).max(-1) > 0.005).all()
    assert spectra[TURF, 0, -1] > spectra[TURF, 0, 60]


def test_heights_fit_the_classes(scene: DemoScene) -> None:
    height = scene.lidar[..., 0]
    above = height - minimum_filter(height, 31)
    median = {kind: float(np.median(above[scene.labels == kind])) for kind in Kind}
    assert median[Kind.METAL_ROOF] > 6.0 and median[Kind.FLAT_ROOF] > 4.5
    assert 3.0 < median[Kind.TILE_ROOF] < 9.0 and median[Kind.TREES] > 2.0
    for kind in (Kind.HEALTHY, Kind.STRESSED, Kind.ROAD, Kind.TURF, Kind.TRACK, Kind.SOIL, Kind.CONCRETE):
        assert median[kind] < 1.3, kind.name
    assert median[Kind.WATER] < 0.4


def test_noise_grows_towards_both_ends(scene: DemoScene) -> None:
    pitch = scene.hsi[55:85, 75:115].astype(np.float64)
    assert (scene.labels[55:85, 75:115] == Kind.TURF).mean() > 0.1
    grain = np.diff(pitch, 2, axis=2).std((0, 1)) / 10_000.0
    middle = np.median(grain[40:80])
    assert grain[:4].mean() > 2.0 * middle and grain[-4:].mean() > 2.0 * middle


def test_a_tower_casts_its_shadow_away_from_the_sun() -> None:
    canvas = Canvas(60.0, 60.0, 120, 120)
    tower = canvas.box(40.0, 40.0, 4.0, 4.0)
    canvas.height[tower.at][tower.mask] = 10.0
    dark = cast_shadow(canvas, canvas.height)
    reach = 10.0 / SUN_TAN

    def shadow_at(distance: float) -> bool:
        row, col = (int((40.0 - distance * side) / 0.5) for side in (SUN_SOUTH, SUN_EAST))
        return bool(dark[row, col])

    assert shadow_at(4.0) and shadow_at(reach - 1.0)
    assert not shadow_at(reach + 4.0) and not shadow_at(-4.0)
    assert 20 < dark.sum() * 0.25 < 80


def test_shadows_are_dark_and_blue(scene: DemoScene) -> None:
    hall = scene.hsi[:, :, [17, 103]].astype(np.float64)
    shaded, lit = hall[47:49, 207:243].mean((0, 1)), hall[80:90, 207:243].mean((0, 1))
    assert (shaded < 0.7 * lit).all(), "north of the shop's roof lies its shadow"
    assert shaded[0] / lit[0] > 1.3 * shaded[1] / lit[1], "skylight is blue"


def test_written_scene_reads_back(tmp_path: Path, scene: DemoScene) -> None:
    from fastdiffclip.scene.store import open_scene, verify_scene

    path = write_demo(tmp_path / "suburb.zarr")
    assert path == tmp_path / "suburb.zarr"
    assert verify_scene(path).ok
    stored = open_scene(path)
    assert (stored.name, stored.height, stored.width) == ("suburb", 200, 300)
    assert stored.affine_transform == scene.affine_transform and stored.crs_wkt == CRS_WKT
    np.testing.assert_array_equal(stored.read("hsi"), scene.hsi)
    np.testing.assert_array_equal(stored.read("lidar"), scene.lidar)
    np.testing.assert_array_equal(stored.read_labels(), scene.labels)
    assert stored.classes == scene.classes
    hsi = stored.modalities["hsi"]
    assert hsi.wavelengths == scene.wavelengths and hsi.scale == 1e-4 and hsi.valid_pixels == 60_000
    with pytest.raises(UsageError):
        write_demo(path)


def test_nearest_neighbour_on_spectra_is_neither_hopeless_nor_enough(scene: DemoScene) -> None:
    """1-NN on spectra standardised per band, two shots, disjoint split: 45 to 75 % over ten draws."""
    from fastdiffclip.scene.splits import make_split

    spectra = scene.hsi.astype(np.float64)
    spectra = (spectra - spectra.mean((0, 1))) / spectra.std((0, 1))
    names = {info.value: info.name for info in scene.classes}
    accuracy = []
    for seed in range(10):
        split = make_split(
            "disjoint",
            [scene.labels],
            [np.ones(scene.labels.shape, bool)],
            shots=2,
            seed=seed,
            window=11,
            class_names=names,
        )
        assert set(split.test_labels.tolist()) == set(range(1, 15))
        gaps = np.abs(split.test[:, None, 1:] - split.train[None, :, 1:]).max(-1)
        assert gaps.min() > 10
        known, asked = (spectra[part[:, 1], part[:, 2]] for part in (split.train, split.test))
        distance = (known * known).sum(1)[None] - 2.0 * asked @ known.T
        accuracy.append((split.train_labels[distance.argmin(1)] == split.test_labels).mean())
    assert 0.45 < np.mean(accuracy) < 0.75, accuracy
