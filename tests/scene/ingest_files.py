"""Input files of one scene, and their ingest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio

from fastdiffclip.scene.ingest import IngestReport, IngestRequest, ingest

TRANSFORM = rasterio.Affine(1, 0, 404023, 0, -1, 3284961)


def tiff(path: Path, cube: np.ndarray, crs: str | None = "EPSG:32617", shift: float = 0.0, **profile: object) -> str:
    """Write (H, W[, bands]) as GeoTIFF, its origin shifted by pixels; return the path."""
    planes = np.moveaxis(cube[..., np.newaxis] if cube.ndim == 2 else cube, -1, 0)
    path.parent.mkdir(exist_ok=True, parents=True)
    transform = rasterio.Affine(*TRANSFORM[:2], TRANSFORM.c + shift * TRANSFORM.a, *TRANSFORM[3:6])
    options = {"transform": transform, "crs": crs, **profile}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(planes),
        height=cube.shape[0],
        width=cube.shape[1],
        dtype=cube.dtype,
        **options,
    ) as dataset:
        dataset.write(planes)
    return str(path)


def npy(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def cube(height: int = 6, width: int = 7, bands: int = 4, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(1).integers(1, 1000, (height, width, bands)).astype(dtype)


def run(tmp_path: Path, hsi: np.ndarray | str, **options: object) -> IngestReport:
    """Ingest one modality (an array or a spec) to out.zarr."""
    spec = hsi if isinstance(hsi, str) else npy(tmp_path / "hsi.npy", hsi)
    more = options.pop("more", [])
    return ingest(IngestRequest([("hsi", spec), *more], tmp_path / "out.zarr", **options))  # type: ignore[arg-type, misc]


def plots(tmp_path: Path, folder: str, names: list[str], bands: int = 2) -> str:
    for i, name in enumerate(names):
        tiff(
            tmp_path / folder / f"{name}.tif",
            np.full((3, 4, bands), i + 1, np.uint8) + np.arange(4)[:, None].astype("u1"),
        )
    return f"{tmp_path}/{folder}/*.tif"
