"""Presets: the well-known scenes are found in the layouts in which people have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.errors import UsageError
from fastdiffclip.model.prompts import load_preset as load_prompts
from fastdiffclip.model.text import CONTEXT, load_tokenizer
from fastdiffclip.scene.presets import PRESETS, ingest_preset, load_preset, preset_request

from .preset_files import RNG, mat, refused, run

HEIGHT, WIDTH = 12, 20
SCENES = [name for name in PRESETS if name != "mrnet"]
BANDS = {"houston2013": 144, "trento": 63, "muufl": 64}


def cube(bands: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return RNG.integers(1, 9000, (height, width, bands)).astype(np.uint16)


def heights(bands: int = 1) -> np.ndarray:
    shape = (HEIGHT, WIDTH, bands) if bands > 1 else (HEIGHT, WIDTH)
    return RNG.normal(5, 1, shape).astype(np.float32)


def labels(classes: int = 3) -> np.ndarray:
    return RNG.integers(0, classes + 1, (HEIGHT, WIDTH)).astype(np.uint8)


def split_files(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The layout that most papers' code loads: one .mat file and variable per part."""
    parts = {"HSI": cube(BANDS[name]), "LiDAR": heights(), "TRLabel": labels(), "TSLabel": labels()}
    for key, values in parts.items():
        mat(folder / f"{key}.mat", **{key: values})
    return parts


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("place", ["", "Data/2013"])
def test_the_usual_split_files(tmp_path: Path, name: str, place: str) -> None:
    parts = split_files(tmp_path / "data" / place, name)
    mat(tmp_path / "data" / "gt.mat", gt=labels())
    scene, report = run(name, tmp_path / "data")
    np.testing.assert_array_equal(scene.read("hsi"), parts["HSI"])
    np.testing.assert_array_equal(scene.read("lidar")[..., 0], parts["LiDAR"])
    assert scene.label_maps == ("train", "test") and tuple(scene.modalities) == ("hsi", "lidar")
    np.testing.assert_array_equal(scene.read_labels("train"), parts["TRLabel"])
    np.testing.assert_array_equal(scene.read_labels("test"), parts["TSLabel"])
    prompts = load_prompts(name)
    assert [(c.value, c.name, c.description) for c in scene.classes] == [
        (c.value, c.name, c.description) for c in prompts.classes
    ]
    assert tuple(c.colour for c in scene.classes) == prompts.colours
    unused, size = report.warnings
    assert unused.endswith("gt.mat is not used: there are train and test maps")
    assert "this scene 12 x 20: is it whole?" in size


TRENTO = {
    "italy": {"Italy_hsi": {"data": 63}, "Italy_lidar": {"data": 2}, "allgrd": {"mask_test": 0}},
    "words": {"HSI_data": {"HSI_data": 63}, "LiDAR_data": {"LiDAR_data": 1}, "All_Label": {"All_Label": 0}},
    "case": {"hsi_trento": {"hsi_trento": 63}, "LIDAR1_TRENTO": {"lidar1_trento": 1}, "GT_Trento": {"gt_trento": 0}},
    "several variables": {
        "HSI": {"HSI": 63, "gt": 0, "info": "made by hand"}, "lidar": {"data": 1, "x": 1}, "gt": {"gt": 0, "rgb": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", TRENTO)
def test_trento_in_its_layouts(tmp_path: Path, layout: str) -> None:
    stored: list[np.ndarray] = []
    for file, variables in TRENTO[layout].items():
        made = {}
        for name, bands in variables.items():
            made[name] = labels() if bands == 0 else bands if isinstance(bands, str) else (
                cube(bands) if bands > 30 else heights(bands)
            )  # fmt: skip
        stored.append(next(iter(made.values())))
        mat(tmp_path / "data" / f"{file}.mat", **made)
    scene, _ = run("trento", tmp_path / "data")
    np.testing.assert_array_equal(scene.read("hsi"), stored[0])
    np.testing.assert_array_equal(scene.read("lidar").squeeze(), stored[1])
    np.testing.assert_array_equal(scene.read_labels("labels"), stored[2])
    assert scene.label_maps == ("labels",)


def muufl_struct(truth: np.ndarray, bands: int = 64, waves: int = 64) -> dict[str, object]:
    """The published struct, as far as it matters here: nested structs, a cell of structs, labels with -1."""
    flights = np.empty((1, 2), object)
    for i in range(2):
        flights[0, i] = {"x": heights(), "y": heights(), "z": heights(2) + i, "info": "flight"}
    return {
        "Data": cube(bands).astype(np.float64), "info": {"wavelength": np.linspace(375, 1050, waves), "sensor": "CASI"},
        "Lidar": flights, "RGB": heights(3), "Northing": heights(),
        "sceneLabels": {"labels": np.where(truth == 0, -1.0, truth), "Materials_Type": ["a", "b"]},
    }  # fmt: skip


@pytest.mark.parametrize("waves", [64, 72])
def test_muufl_as_published(tmp_path: Path, waves: int) -> None:
    truth = labels(11)
    stored = muufl_struct(truth, waves=waves)
    name = "MUUFLGulfportSceneLabels/muufl_gulfport_campus_1_hsi_220_label.mat"
    mat(tmp_path / "MUUFLGulfport" / name, hsi=stored)
    mat(tmp_path / "MUUFLGulfport" / "muufl_gulfport_campus_w_lidar_1.mat", hsi={"Data": cube(72)})
    scene, report = run("muufl", tmp_path / "MUUFLGulfport")
    np.testing.assert_array_equal(scene.read("hsi"), stored["Data"])
    np.testing.assert_allclose(scene.read("lidar"), stored["Lidar"][0, 0]["z"])  # type: ignore[index]
    np.testing.assert_array_equal(scene.read_labels(), truth)
    assert scene.modalities["lidar"].bands == 2
    found = scene.modalities["hsi"].wavelengths
    assert found is None if waves != 64 else found is not None and found[0] == 375.0
    assert [c.name for c in scene.classes][:2] == ["Trees", "Mostly grass"]


def test_a_struct_that_lacks_a_member(tmp_path: Path) -> None:
    stored = muufl_struct(labels())
    del stored["Lidar"]
    mat(tmp_path / "data" / "muufl_gulfport_campus_1_hsi_220_label.mat", hsi=stored)
    assert "hsi.Lidar{1}.z" in refused("muufl", tmp_path / "data")


def test_muufl_split_files_with_minus_one(tmp_path: Path) -> None:
    truth = labels(11).astype(np.int16)
    mat(tmp_path / "data" / "HSI.mat", HSI=cube(64))
    mat(tmp_path / "data" / "LiDAR.mat", LiDAR=heights(2))
    mat(tmp_path / "data" / "gt.mat", gt=np.where(truth == 0, -1, truth))
    scene, _ = run("muufl", tmp_path / "data")
    np.testing.assert_array_equal(scene.read_labels(), truth)
    assert scene.modalities["lidar"].bands == 2


REGIONS = (
    "grass_healthy", "grass_stressed", "grass_synthetic", "tree", "soil", "water", "residential", "commercial", "road",
    "highway", "railway", "parking_lot1", "parking_lot2", "tennis_court", "running_track",
)  # fmt: skip


def write_regions(path: Path, truth: np.ndarray) -> None:
    """Regions as the contest has them: all headers, then the points of all regions in that order."""
    height, width = truth.shape
    lines = [f"; ENVI Output of ROIs (4.8)\n; Number of ROIs: 15\n; File Dimension: {width} x {height}\n;"]
    points = [np.argwhere(truth == value) for value in range(1, 16)]
    for name, found in zip(REGIONS, points, strict=True):
        lines.append(f"; ROI name: {name}\n; ROI rgb value: {{0, 205, 0}}\n; ROI npts: {len(found)}\n;")
    lines.append(";    ID     X    Y")
    rows = np.concatenate(points)
    lines += [f"{number:7} {col + 1:5} {row + 1:4}" for number, (row, col) in enumerate(rows, 1)]
    path.write_text("\n".join(lines) + "\n")


def contest_files(folder: Path) -> dict[str, np.ndarray]:
    """The release of the 2013 contest: GeoTIFF with ENVI headers beside them, regions as text and ENVI's own file."""
    import rasterio

    place = {"crs": "EPSG:32615", "transform": rasterio.Affine(2.5, 0, 271460, 0, -2.5, 3290892)}
    parts = {"CASI": cube(144), "LiDAR": heights()[..., np.newaxis], "TR": labels(15), "VA": labels(15)}
    parts["TR"].flat[:15] = parts["VA"].flat[15:30] = range(1, 16)
    folder.mkdir(parents=True)
    for name in ("CASI", "LiDAR"):
        path, planes = folder / f"2013_IEEE_GRSS_DF_Contest_{name}.tif", np.moveaxis(parts[name], -1, 0)
        shape = {"height": HEIGHT, "width": WIDTH, "count": len(planes), "dtype": planes.dtype}
        with rasterio.open(path, "w", driver="GTiff", **shape, **place) as dataset:
            dataset.write(planes)
        waves = ", ".join(f"{364 + 4.8 * band:.1f}" for band in range(len(planes)))
        path.with_suffix(".hdr").write_text(
            f"ENVI\nsamples = {WIDTH}\nlines = {HEIGHT}\nbands = {len(planes)}\nheader offset = 0\ndata type = 12\n"
            f"file type = TIFF\ninterleave = bsq\nbyte order = 0\nwavelength units = Nanometers\n"
            + (f"wavelength = {{{waves}}}\n" if len(planes) > 1 else "")
        )
    for name in ("TR", "VA"):
        write_regions(folder / f"2013_IEEE_GRSS_DF_Contest_Samples_{name}.txt", parts[name])
        (folder / f"2013_IEEE_GRSS_DF_Contest_Samples_{name}.roi").write_bytes(b"\x01\x02binary")
    (folder / "copyright.txt").write_text("The University of Houston.")
    return parts


def test_houston_as_the_contest_released_it(tmp_path: Path) -> None:
    parts = contest_files(tmp_path / "Houston2013" / "2013_DFTC")
    scene, report = run("houston2013", tmp_path / "Houston2013")
    np.testing.assert_array_equal(scene.read("hsi"), parts["CASI"])
    np.testing.assert_array_equal(scene.read("lidar"), parts["LiDAR"])
    np.testing.assert_array_equal(scene.read_labels("train"), parts["TR"])
    np.testing.assert_array_equal(scene.read_labels("test"), parts["VA"])
    assert [c.name for c in scene.classes][3:5] == ["Trees", "Soil"]
    assert scene.crs_wkt is not None and scene.affine_transform is not None and scene.affine_transform[2] == 271460
    waves = scene.modalities["hsi"].wavelengths
    assert waves is not None and waves[0] == 364.0 and waves[1] == pytest.approx(368.8)
    assert any("tree = Trees" in warning for warning in report.warnings)
    for path in (tmp_path / "Houston2013").rglob("*VA.txt"):
        path.unlink()
    assert "Samples_VA.roi" in refused("houston2013", tmp_path / "Houston2013")


def test_recorded_sources_and_name(tmp_path: Path) -> None:
    split_files(tmp_path / "data", "trento")
    scene, _ = run("trento", tmp_path / "data", scene_name="valley")
    assert scene.name == "valley"
    assert {(role, name) for role, name, _ in scene.sources} == {
        ("modality hsi", "HSI.mat"), ("modality lidar", "LiDAR.mat"), ("labels train", "TRLabel.mat"),
        ("labels test", "TSLabel.mat"),
    }  # fmt: skip


def test_what_is_missing_and_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    split_files(folder, "trento")
    (folder / "LiDAR.mat").unlink()
    (folder / "readme.txt").write_text("x")
    said = refused("trento", folder)
    assert "lacks the lidar of Trento" in said and "lidar: Italy_lidar, LiDAR," in said
    assert "there is HSI.mat, TRLabel.mat, TSLabel.mat, readme.txt" in said
    (folder / "TSLabel.mat").unlink()
    said = refused("trento", folder)
    assert "lacks the lidar and test of Trento" in said and "; labels: allgrd, Trento_allgrd" in said
    (tmp_path / "empty").mkdir()
    said = refused("houston2013", tmp_path / "empty")
    assert "lacks the hsi and lidar and train and test of Houston 2013" in said and "there is nothing" in said
    assert "there is no folder" in refused("muufl", tmp_path / "none")


def test_several_files_of_one_role_are_listed(tmp_path: Path) -> None:
    split_files(tmp_path / "data", "houston2013")
    mat(tmp_path / "data" / "old" / "hsi.mat", HSI=cube(144))
    said = refused("houston2013", tmp_path / "data")
    assert "2 files that could be the hsi of Houston 2013: HSI.mat, old/hsi.mat; leave one" in said


def test_label_maps_that_are_not_needed_do_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    split_files(folder, "trento")
    (folder / "gt.mat").write_bytes(b"rubbish")
    mat(folder / "allgrd.mat", mask_test=labels())
    notes = preset_request("trento", folder, tmp_path / "out.zarr")[1]
    assert notes[:2] == [
        f"{folder / name} is not used: there are train and test maps" for name in ("allgrd.mat", "gt.mat")
    ]
    (folder / "TSLabel.mat").unlink()
    assert "2 files that could be the labels of Trento: allgrd.mat, gt.mat" in refused("trento", folder)
    (folder / "gt.mat").unlink()
    request, notes = preset_request("trento", folder, tmp_path / "out.zarr")
    assert [name for name, _ in request.labels] == ["labels"]
    assert notes[0] == f"{folder / 'TRLabel.mat'} is not used: the other of train and test is missing"


def test_cut_out_pixels_are_no_scene(tmp_path: Path) -> None:
    """The pixel sets of the MDL-RS code: the pixels' places in the scene are gone."""
    for key, shape in {"HSI_TrSet": (2832, 144), "LiDAR_TrSet": (2832, 21), "TrLabel": (2832, 1)}.items():
        mat(tmp_path / "data" / f"{key}.mat", **{key: np.ones(shape)})
    said = refused("houston2013", tmp_path / "data")
    assert "HSI_TrSet.mat, LiDAR_TrSet.mat hold pixels or patches cut out of a scene" in said
    split_files(tmp_path / "more", "houston2013")
    mat(tmp_path / "more" / "TRLabel.mat", TrLabel=np.ones((2832, 1)))
    assert "a list is no raster, the pixels that it belongs to are not known" in refused(
        "houston2013", tmp_path / "more"
    )


@pytest.mark.parametrize(("order", "back"), [((2, 0, 1), (1, 2, 0)), ((1, 0, 2), (1, 0, 2)), ((2, 1, 0), (2, 1, 0))])
def test_a_turned_cube_is_recognised(tmp_path: Path, order: tuple[int, ...], back: tuple[int, ...]) -> None:
    whole = split_files(tmp_path / "data", "houston2013")["HSI"]
    mat(tmp_path / "data" / "HSI.mat", HSI=whole.transpose(order))
    if order[0] == 2 and whole.transpose(order).shape[2] < 100:
        # Too few bands where they are looked for: the size is all that can be said.
        assert "expected the hsi of Houston 2013 with at least 100 bands" in refused("houston2013", tmp_path / "data")
        return
    said = refused("houston2013", tmp_path / "data")
    assert f"numpy.transpose(cube, {back})" in said
    np.testing.assert_array_equal(np.transpose(whole.transpose(order), back), whole)


def test_a_whole_scene_that_is_turned_goes_together(tmp_path: Path) -> None:
    for key, values in split_files(tmp_path / "data", "trento").items():
        mat(tmp_path / "data" / f"{key}.mat", **{key: values.swapaxes(0, 1)})
    assert run("trento", tmp_path / "data")[0].height == WIDTH


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: mat(f / "LiDAR.mat", LiDAR=np.ones((9, 9))), "one height and width"),
        (lambda f: mat(f / "HSI.mat", HSI=np.ones((HEIGHT, WIDTH, 5))), "expected the hsi of Trento with at least 40"),
        (lambda f: mat(f / "LiDAR.mat", LiDAR=cube(63)), "expected the lidar of Trento with at most 30 bands"),
        (lambda f: mat(f / "TRLabel.mat", TRLabel=cube(63)), "expected the train of Trento with one band"),
        (lambda f: mat(f / "TSLabel.mat", TSLabel=np.full((HEIGHT, WIDTH), 7)), "no row for the label values 7"),
        (lambda f: mat(f / "HSI.mat", HSI={"a": np.ones(3)}), "HSI.mat"),
        (lambda f: mat(f / "HSI.mat", one=cube(63), two=cube(63)), "the preset 'trento' looked for HSI, hsi"),
        (lambda f: (f / "HSI.mat").write_bytes(b"MATLAB 5.0"), "HSI.mat"),
        (lambda f: (f / "LiDAR.mat").write_bytes((f / "LiDAR.mat").read_bytes()[:300]), "LiDAR.mat"),
        (lambda f: (f / "TRLabel.mat").write_bytes(b""), "TRLabel.mat is empty"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    split_files(tmp_path / "data", "trento")
    damage(tmp_path / "data")
    assert said in refused("trento", tmp_path / "data")


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_files(tmp_path / "data", "trento")
    monkeypatch.setattr("fastdiffclip.scene.presets._MOST_FILES", 3)
    assert "more than 3 files" in refused("trento", tmp_path / "data")


def test_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no preset 'trent' \(did you mean 'trento'\?\)"):
        ingest_preset("trent", tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="takes no option, got task"):
        ingest_preset("trento", tmp_path, tmp_path / "out", options={"task": "acl"})
    with pytest.raises(UsageError, match=r"--option task=abnormal\|acl\|meniscus"):
        ingest_preset("mrnet", tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match=r"no option 'slice' \(did you mean 'slices'\?\)"):
        ingest_preset("mrnet", tmp_path, tmp_path / "out", options={"task": "acl", "slice": "3"})
    with pytest.raises(UsageError, match="whole number, for example block=8; got 'x'"):
        ingest_preset("mrnet", tmp_path, tmp_path / "out", options={"task": "acl", "block": "x"})
    with pytest.raises(UsageError, match="one per exam"):
        ingest_preset("mrnet", tmp_path, tmp_path / "out", options={"task": "acl"}, scene_name="knee")


@pytest.mark.parametrize("name", SCENES)
def test_shipped_data_is_sound(name: str) -> None:
    preset = load_preset(name)
    assert preset.size[0] > 0 and len(preset.classes) >= 6
    for role in preset.roles.values():
        stems = [stem.lower() for stem, _ in role.files]
        assert len(set(stems)) == len(stems) and role.least_bands <= role.most_bands
    # A file plays one part, unless a variable of it is named.
    everywhere = [stem.lower() for role in preset.roles.values() for stem, variable in role.files if variable is None]
    assert len(set(everywhere)) == len(everywhere)


def test_texts_of_the_tasks_fit_the_text_tower(tmp_path: Path) -> None:
    import yaml

    from fastdiffclip.files import config_text

    tokenizer = load_tokenizer()
    for rows in yaml.safe_load(config_text("presets/mrnet.yaml"))["tasks"].values():
        texts = [f"{row['name']}: {row['description']}" for row in rows]
        assert len(set(texts)) == 2
        assert all(length < CONTEXT - 1 for length in tokenizer.encode_batch(texts)[1].tolist())
