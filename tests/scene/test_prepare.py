"""The front ends against their equations, their bits, and their storage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.scene import mnf
from fastdiffclip.scene.prepare import (
    FrontEnd,
    PreparedScenes,
    fit_front_end,
    prepare_scenes,
    prepared_bytes,
    unpack_valid,
)

from .strategies import DTYPES, MemoryScene, random_scene


def values_of(prepared: PreparedScenes, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all values (N, C) and validity (N,) of a prepared modality."""
    m = prepared.modalities[modality]
    return m.pixels.astype(np.float32) * m.scale + m.offset, unpack_valid(m.valid, len(m.pixels))


def applied(front_end: FrontEnd, scene: MemoryScene, modality: str) -> np.ndarray:
    return front_end.apply(modality, scene._arrays[modality], scene._valid[modality])


def two_scenes(dtype: str = "uint16", **more: object) -> list[MemoryScene]:
    rng = np.random.default_rng(3)
    bands = {"hsi": 20, "lidar": 1, "features": 9}
    return [random_scene(rng, h, w, bands, dtype=dtype, **more) for h, w in ((31, 17), (12, 40))]


@pytest.mark.parametrize("kind", ["standard", "mnf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_scenes_hold_what_apply_gives(kind: str, dtype: str) -> None:
    scenes = two_scenes(dtype)
    front_end = fit_front_end(kind, scenes)
    prepared = prepare_scenes(scenes, front_end)
    assert prepared.extents.tolist() == [[0, 31, 17], [527, 12, 40]]
    for name, channels in front_end.channels.items():
        values, valid = values_of(prepared, name)
        expected = np.concatenate([applied(front_end, s, name).reshape(-1, channels) for s in scenes])
        masks = np.concatenate([s._valid[name].reshape(-1) for s in scenes])
        np.testing.assert_array_equal(valid, masks)
        np.testing.assert_array_equal(values[valid], expected[valid])
        assert (expected[~valid] == 0).all()
        assert np.abs(values[~valid]).max() < 0.1
        folded = kind == "standard" or name == "lidar"
        stored = dtype if folded and dtype != "float32" else "float32"
        assert prepared.modalities[name].pixels.dtype == stored


def test_standard_has_mean_0_and_std_1_over_the_valid_pixels_of_all_scenes() -> None:
    scenes = two_scenes()
    values, valid = values_of(prepare_scenes(scenes, fit_front_end("standard", scenes)), "hsi")
    np.testing.assert_allclose(values[valid].mean(axis=0, dtype=np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(values[valid].std(axis=0, dtype=np.float64), 1, atol=1e-5)


def test_standard_follows_scale_and_offset_of_the_stored_numbers() -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 1000, (9, 9, 2)).astype(np.uint16)
    plain = MemoryScene({"hsi": stored})
    scaled = MemoryScene({"hsi": stored}, hsi={"scale": 1e-4, "offset": -0.1})
    for kind in ("standard", "mnf"):
        a, b = (applied(fit_front_end(kind, [s]), s, "hsi") for s in (plain, scaled))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_constant_band_becomes_0_and_never_infinite() -> None:
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        array = rng.integers(0, 1000, (20, 20, 18)).astype(dtype)
        array[..., 3] = 7
        scene = MemoryScene({"hsi": array, "lidar": np.full((20, 20, 1), 5, dtype)})
        standard = fit_front_end("standard", [scene])
        assert (applied(standard, scene, "hsi")[..., 3] == 0).all()
        assert (applied(standard, scene, "lidar") == 0).all()
        projected = fit_front_end("mnf", [scene])
        assert projected.channels == {"hsi": 18, "lidar": 1}  # 17 bands and the log of the RMS
        assert np.isfinite(applied(projected, scene, "hsi")).all()


@pytest.mark.parametrize("kind", ["standard", "mnf"])
def test_bad_bands_are_dropped_and_their_nan_invalidates_nothing(kind: str) -> None:
    rng = np.random.default_rng(0)
    array = rng.random((15, 15, 20)).astype(np.float32)
    array[..., [2, 5]] = np.nan
    bad = tuple(i in (2, 5) for i in range(20))
    scene = MemoryScene({"hsi": array}, hsi={"bad_bands": bad})
    without = MemoryScene({"hsi": np.delete(array, [2, 5], axis=2)})
    values, valid = values_of(prepare_scenes([scene], fit_front_end(kind, [scene])), "hsi")
    expected, _ = values_of(prepare_scenes([without], fit_front_end(kind, [without])), "hsi")
    assert valid.all()
    np.testing.assert_array_equal(values, expected)


def test_bands_that_one_scene_calls_bad_are_dropped_from_all() -> None:
    rng = np.random.default_rng(0)
    scenes = [
        MemoryScene({"hsi": rng.random((8, 8, 3)).astype(np.float32)}, hsi={"bad_bands": bad})
        for bad in ((True, False, False), (False, False, True))
    ]
    assert fit_front_end("standard", scenes).channels == {"hsi": 1}


def test_nan_in_a_good_band_invalidates_the_pixel() -> None:
    scene = random_scene(np.random.default_rng(0), 9, 9, {"hsi": 17}, dtype="float32", invalid=0)
    front_ends = [fit_front_end(kind, [scene]) for kind in ("standard", "mnf")]
    scene._arrays["hsi"][4, 4, 2] = np.nan
    for front_end in front_ends:
        values, valid = values_of(prepare_scenes([scene], front_end), "hsi")
        assert np.flatnonzero(~valid).tolist() == [40]
        assert (values[40] == 0).all()


def test_which_modality_is_projected() -> None:
    rng = np.random.default_rng(0)

    def methods(first: int, second: int, **attributes: object) -> list[str]:
        scene = random_scene(rng, 20, 20, {"a": first, "b": second}, **attributes)
        return [m["method"] for m in fit_front_end("mnf", [scene]).to_meta()["modalities"]]

    assert methods(16, 21) == ["mnf", "pca"]
    assert methods(15, 7) == ["pca", "standard"]
    assert methods(1, 8, b={"wavelengths": tuple(range(400, 480, 10))}) == ["standard", "mnf"]
    assert methods(7, 8, a={"wavelengths": tuple(range(400, 470, 10))}) == ["standard", "pca"]


def mnf_by_hand(scene: MemoryScene, components: int) -> tuple[np.ndarray, np.ndarray]:
    """The equation of ``fit_projection`` in float64; returns components of valid pixels and eigenvalues."""
    x, valid = scene._arrays["hsi"].astype(np.float64), scene._valid["hsi"]
    rms = np.sqrt((x**2).mean(axis=2))
    features = np.concatenate([x / rms[..., None], np.log(rms)[..., None]], axis=2)
    z = (features - features[valid].mean(axis=0)) / features[valid].std(axis=0)
    across = (z[:, 1:] - z[:, :-1])[valid[:, 1:] & valid[:, :-1]]
    down = (z[1:] - z[:-1])[valid[1:] & valid[:-1]]
    pairs = np.concatenate([across, down])
    norms = np.linalg.norm(pairs, axis=1)
    kept = pairs[norms <= np.quantile(norms, 0.8, method="higher")]
    n = z.shape[2]
    noise = kept.T @ kept / (2 * len(kept))
    share = n / (n + len(kept))
    noise = (1 - share) * noise + share * np.trace(noise) / n * np.eye(n)
    eigenvalues, vectors = scipy.linalg.eigh(np.cov(z[valid].T, bias=True), noise)
    eigenvalues, vectors = eigenvalues[::-1][:components], vectors[:, ::-1][:, :components]
    y = z[valid] @ (vectors * eigenvalues**-0.25)
    return y / np.sqrt(y.var(axis=0).mean()), eigenvalues


def test_mnf_is_the_equation_of_its_docstring() -> None:
    scene = random_scene(np.random.default_rng(5), 40, 30, {"hsi": 24}, dtype="float32", chunk=7)
    front_end = fit_front_end("mnf", [scene], components=6)
    values = applied(front_end, scene, "hsi")[scene._valid["hsi"]].astype(np.float64)
    expected, eigenvalues = mnf_by_hand(scene, 6)
    signs = np.sign((values * expected).sum(axis=0))
    np.testing.assert_allclose(values, expected * signs, atol=2e-4)
    np.testing.assert_allclose(values.var(axis=0).mean(), 1, rtol=1e-5)
    share = values.var(axis=0) / np.sqrt(eigenvalues)
    np.testing.assert_allclose(share, share[0], rtol=1e-3)
    assert front_end.to_arrays()["hsi.matrix"].shape == (25, 6)


def test_largest_loading_is_positive_whatever_eigh_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = random_scene(np.random.default_rng(5), 30, 30, {"hsi": 24})
    expected = fit_front_end("mnf", [scene]).to_arrays()["hsi.matrix"]
    true_eigh = scipy.linalg.eigh

    def turned(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        eigenvalues, vectors = true_eigh(a, b)
        return eigenvalues, -vectors

    monkeypatch.setattr(scipy.linalg, "eigh", turned)
    np.testing.assert_array_equal(fit_front_end("mnf", [scene]).to_arrays()["hsi.matrix"], expected)


def test_mnf_puts_signal_before_noise() -> None:
    rng = np.random.default_rng(0)
    smooth = np.sin(np.arange(60) / 20)[:, None] * np.cos(np.arange(60) / 15)[None]
    spectrum, loud = np.linspace(1, 2, 20), rng.normal(size=20)
    noise = rng.normal(size=(60, 60, 1))
    cube = (
        100 + 5 * smooth[..., None] * spectrum[::-1] ** 2 + 8 * noise * loud + rng.normal(scale=0.1, size=(60, 60, 20))
    )
    scene = MemoryScene({"hsi": cube.astype(np.float32)})
    first = applied(fit_front_end("mnf", [scene], components=1), scene, "hsi")[..., 0]
    assert abs(np.corrcoef(first.ravel(), smooth.ravel())[0, 1]) > 0.95


def test_pca_components_are_half_whitened() -> None:
    scene = random_scene(np.random.default_rng(2), 30, 30, {"hsi": 1, "features": 12}, dtype="float32")
    values = applied(fit_front_end("mnf", [scene]), scene, "features")[scene._valid["features"]]
    x = scene._arrays["features"][scene._valid["features"]].astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(np.corrcoef(x.T))[::-1]
    covariance = np.cov(values.T.astype(np.float64), bias=True)
    expected = np.sqrt(eigenvalues) / np.mean(np.sqrt(eigenvalues))
    np.testing.assert_allclose(np.diag(covariance), expected, rtol=1e-3)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-4


@pytest.mark.parametrize("valid_pixels", [1, 2, 5, 12])
def test_few_scattered_valid_pixels_still_fit(valid_pixels: int) -> None:
    rng = np.random.default_rng(valid_pixels)
    array = rng.random((20, 20, 40)).astype(np.float32)
    valid = np.zeros((20, 20), bool)
    valid[::4, ::4].flat[:valid_pixels] = True
    scene = MemoryScene({"hsi": array}, {"hsi": valid})
    front_end = fit_front_end("mnf", [scene])
    values = applied(front_end, scene, "hsi")
    assert np.isfinite(values).all() and values.shape[2] == front_end.channels["hsi"] <= 40


def test_zero_spectra_stay_finite_and_near_the_others() -> None:
    scene = random_scene(np.random.default_rng(1), 20, 20, {"hsi": 20}, invalid=0)
    scene._arrays["hsi"][3, 3] = 0
    scene = MemoryScene(scene._arrays)
    values = applied(fit_front_end("mnf", [scene]), scene, "hsi")
    assert np.isfinite(values).all() and np.abs(values).max() < 100


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 999),
    top=st.integers(0, 49),
    height=st.integers(1, 50),
    kind=st.sampled_from(["standard", "mnf"]),
)
def test_bits_of_a_pixel_do_not_depend_on_its_block(seed: int, top: int, height: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, 50, 47, {"hsi": int(rng.integers(16, 60)), "features": 9}, dtype="float32")
    front_end = fit_front_end(kind, [scene])
    for name in front_end.channels:
        rows = slice(top, top + height)
        whole, block = scene._arrays[name], scene._arrays[name][rows, 5:]
        part = front_end.apply(name, block, scene._valid[name][rows, 5:])
        np.testing.assert_array_equal(part, front_end.apply(name, whole, scene._valid[name])[rows, 5:])


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    scene = random_scene(np.random.default_rng(0), 60, 60, {"hsi": 100})
    front_end = fit_front_end("mnf", [scene])
    results = []
    for threads in (1, 2, 3):
        with threadpoolctl.threadpool_limits(threads):
            results.append(applied(front_end, scene, "hsi"))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_fit_does_not_depend_on_chunks_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scene = random_scene(rng, 41, 13, {"hsi": 20})
    expected = fit_front_end("mnf", [scene]).to_arrays()["hsi.matrix"]
    monkeypatch.setattr(mnf, "_BLOCK_PIXELS", 50)
    other = MemoryScene(scene._arrays, scene._valid, chunk=4)
    np.testing.assert_allclose(fit_front_end("mnf", [other]).to_arrays()["hsi.matrix"], expected, rtol=1e-4, atol=1e-4)


def test_large_scenes_are_fitted_on_evenly_spaced_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = random_scene(np.random.default_rng(0), 60, 20, {"hsi": 20}, chunk=2)
    whole = applied(fit_front_end("mnf", [scene], components=3), scene, "hsi")
    monkeypatch.setattr(mnf, "_BLOCK_PIXELS", 40)
    monkeypatch.setattr(mnf, "_FIT_PIXELS", 400)
    scene.reads.clear()
    sampled = applied(fit_front_end("mnf", [scene], components=3), scene, "hsi")
    assert sorted({chunk for _, chunk in scene.reads}) == list(range(0, 30, 3))
    for k in range(3):
        assert abs(np.corrcoef(whole[..., k].ravel(), sampled[..., k].ravel())[0, 1]) > 0.9


@pytest.mark.parametrize("kind", ["standard", "mnf"])
def test_stored_and_rebuilt_it_is_the_same(kind: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    waves = tuple(400.1 + 3.3 * i for i in range(20))
    scenes = two_scenes(hsi={"wavelengths": waves, "bad_bands": (True,) + (False,) * 19})
    front_end = fit_front_end(kind, scenes)
    save_file(front_end.to_arrays(), tmp_path / "model.safetensors")
    arrays, meta = load_file(tmp_path / "model.safetensors"), json.loads(json.dumps(front_end.to_meta()))
    rebuilt = FrontEnd.from_parts(arrays, meta)
    assert rebuilt.to_meta() == front_end.to_meta() and rebuilt.channels == front_end.channels
    for name in front_end.channels:
        np.testing.assert_array_equal(applied(rebuilt, scenes[0], name), applied(front_end, scenes[0], name))
    arrays.pop("hsi.kept")
    with pytest.raises(InputDataError, match=r"lacks 'hsi.kept'"):
        FrontEnd.from_parts(arrays, meta)


def changed(**attributes: object) -> MemoryScene:
    waves = tuple(400.0 + 10 * i for i in range(4))
    array = np.random.default_rng(0).random((6, 6, 4)).astype(np.float32)
    return MemoryScene({"hsi": array}, name="plot", hsi={"wavelengths": waves} | attributes)


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (MemoryScene({"hs": np.ones((2, 2, 4), np.float32)}), r"no modality 'hsi' \(did you mean 'hs'\?\)"),
        (MemoryScene({"hsi": np.ones((2, 2, 5), np.float32)}), "5 bands, but the front end was fitted on 4"),
        (
            changed(wavelengths=(400.0, 410.9, 421.5, 430.0)),
            "band 3 at 421.5 nm, .* with that band at 420 nm",
        ),
        (changed(scale=1e-4), "scale 0.0001 and offset 0, but .* scale 1 and offset 0"),
        (changed(bad_bands=(False, True, False, False)), "marks band 2 as bad"),
    ],
)
def test_scene_that_does_not_fit_is_refused(scene: MemoryScene, message: str) -> None:
    front_end = fit_front_end("standard", [changed()])
    for call in (front_end.check, lambda s: prepare_scenes([s], front_end)):
        with pytest.raises(InputDataError, match=message):
            call(scene)


def test_scenes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputDataError, match="421.5 nm"):
        fit_front_end("mnf", [changed(), changed(wavelengths=(400.0, 410.9, 421.5, 430.0))])
    with pytest.raises(InputDataError, match="no modality 'hsi'"):
        fit_front_end("mnf", [changed(), MemoryScene({"lidar": np.ones((2, 2, 4), np.float32)})])


def test_scene_that_fits_is_accepted() -> None:
    front_end = fit_front_end("standard", [changed()])
    front_end.check(changed(wavelengths=(400.9, 410.0, 420.0, 429.1)))
    front_end.check(changed(wavelengths=(0.4, 0.41, 0.42, 0.43), wavelength_unit="um"))
    front_end.check(changed(wavelengths=None))
    with pytest.raises(InputDataError, match="3 bands"):
        front_end.apply("hsi", np.ones((2, 2, 3), np.float32), np.ones((2, 2), bool))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no front end 'mfn' \(did you mean 'mnf'\?\)"):
        fit_front_end("mfn", [changed()])
    with pytest.raises(UsageError, match="at least one scene"):
        fit_front_end("mnf", [])
    with pytest.raises(UsageError, match="one component"):
        fit_front_end("mnf", [changed()], components=0)
    with pytest.raises(InputDataError, match="no valid pixel"):
        fit_front_end("mnf", [MemoryScene({"hsi": np.ones((3, 3, 2))}, {"hsi": np.zeros((3, 3), bool)})])
    with pytest.raises(InputDataError, match="no good band"):
        fit_front_end("mnf", [changed(bad_bands=(True,) * 4)])


def test_memory_budget() -> None:
    scenes = two_scenes()
    front_end = fit_front_end("standard", scenes)
    needed = prepared_bytes(scenes, front_end)
    prepared = prepare_scenes(scenes, front_end, memory_bytes=needed)
    assert needed == sum(m.pixels.nbytes + m.valid.nbytes for m in prepared.modalities.values())
    with pytest.raises(ResourceError, match="raise the budget"):
        prepare_scenes(scenes, front_end, memory_bytes=needed - 1)


def test_scenes_of_different_stored_types_go_together() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, 6, 6, {"hsi": 2}, dtype=d, invalid=0) for d in ("uint16", "float32")]
    front_end = fit_front_end("standard", scenes)
    values, _ = values_of(prepare_scenes(scenes, front_end), "hsi")
    np.testing.assert_array_equal(values[:36], applied(front_end, scenes[0], "hsi").reshape(36, 2))
    np.testing.assert_array_equal(values[36:], applied(front_end, scenes[1], "hsi").reshape(36, 2))


@pytest.mark.parametrize("kind", ["standard", "mnf"])
def test_scene_on_disk_is_prepared_as_in_memory(kind: str, tmp_path: Path) -> None:
    from fastdiffclip.scene.store import open_scene
    from fastdiffclip.scene.windows import gather_windows, read_windows
    from fastdiffclip.scene.writer import SceneWriter

    memory = random_scene(np.random.default_rng(0), 30, 25, {"hsi": 20, "lidar": 1})
    with SceneWriter(tmp_path / "scene.zarr", height=30, width=25) as writer:
        for name, array in memory._arrays.items():
            bands, dtype = array.shape[2], array.dtype.name
            writer.add_modality(name, array, bands=bands, dtype=dtype, valid=memory._valid[name])
    scene = open_scene(tmp_path / "scene.zarr")
    front_end = fit_front_end(kind, [scene])
    prepared = prepare_scenes([scene], front_end)
    centres = np.array([[0, 0, 0], [0, 29, 3], [0, 15, 24]])
    read = read_windows([scene], front_end, centres, 5)
    own = np.array([[b, 2, 2] for b in range(3)])
    for name in memory.modalities:
        values, valid = values_of(prepared, name)
        np.testing.assert_array_equal(valid, memory._valid[name].reshape(-1))
        expected = applied(fit_front_end(kind, [memory]), memory, name)
        np.testing.assert_allclose(values[valid], expected[memory._valid[name]], atol=1e-3)
        from_memory = gather_windows(prepared.modalities[name], prepared.extents, centres, 5)
        from_disk = gather_windows(read.modalities[name], read.extents, own, 5)
        np.testing.assert_array_equal(from_disk, from_memory)
