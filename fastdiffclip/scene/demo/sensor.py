"""How the built-in suburb is seen: weathered surfaces, sun and sky, a push-broom sensor, a laser scanner."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import uniform_filter

from fastdiffclip.scene.demo import spectra as m
from fastdiffclip.scene.demo.canvas import Canvas, Draws

SUBPIXELS = 3
SUN_EAST, SUN_SOUTH, SUN_TAN = 0.55, 0.8352, 1.05

# Per material: p patches, p grain, gain patches, gain grain (standard deviations).
_DEFAULT_WEAR = (0.05, 0.03, 0.04, 0.04)
_WEAR = {
    m.GRASS: (0.07, 0.08, 0.05, 0.10),
    m.TREE: (0.10, 0.10, 0.06, 0.16),
    m.CONIFER: (0.08, 0.10, 0.06, 0.16),
    m.TILE: (0.06, 0.06, 0.05, 0.09),
    m.METAL: (0.05, 0.02, 0.05, 0.05),
    m.CONCRETE: (0.14, 0.05, 0.06, 0.05),
    m.ROAD: (0.12, 0.05, 0.05, 0.05),
    m.LOT: (0.12, 0.05, 0.06, 0.06),
    m.TRACK: (0.12, 0.04, 0.05, 0.04),
    m.TURF: (0.12, 0.04, 0.05, 0.05),
    m.SOIL: (0.15, 0.06, 0.07, 0.07),
    m.WATER: (0.14, 0.02, 0.05, 0.03),
    m.FLAT_ROOF: (0.12, 0.05, 0.07, 0.06),
    m.BALLAST: (0.15, 0.12, 0.07, 0.10),
}


def weather(canvas: Canvas, draws: Draws) -> None:
    """Vary every surface: metre-sized patches and grain in variation and gain, scaled by material."""
    wear = np.array([_WEAR.get(material, _DEFAULT_WEAR) for material in range(m.MATERIALS)])[canvas.material]
    shape = canvas.material.shape
    patches, blotches = canvas.field(draws, 9.0), canvas.field(draws, 5.0)
    canvas.p = canvas.p + wear[..., 0] * patches + wear[..., 1] * draws.normals(*shape)
    canvas.p = np.clip(canvas.p, 0.0, 1.0)
    canvas.q = np.clip(canvas.q + wear[..., 0] * blotches, 0.0, 1.0 - canvas.p)
    gain = 1.0 + wear[..., 2] * canvas.field(draws, 13.0) + wear[..., 3] * draws.normals(*shape)
    canvas.gain = canvas.gain * np.maximum(gain, 0.3)


def terrain(canvas: Canvas, draws: Draws) -> np.ndarray:
    """Ground level in metres: a slope of half a per cent and gentle waves, (rows, cols)."""
    slope = 0.003 * canvas.x[None, :] - 0.004 * canvas.y[:, None]
    return 24.0 + slope + 0.5 * canvas.field(draws, 170.0) + 0.15 * canvas.field(draws, 60.0)


def _slope(surface: np.ndarray, step: float, axis: int) -> np.ndarray:
    """Gradient that stays on one side of a jump: the smaller of forward and backward difference, else 0."""
    difference = np.diff(surface, axis=axis) / step
    edge = [(0, 0), (0, 0)]
    edge[axis] = (0, 1)
    ahead = np.pad(difference, edge)
    edge[axis] = (1, 0)
    behind = np.pad(difference, edge)
    smaller = np.where(np.abs(ahead) < np.abs(behind), ahead, behind)
    return np.clip(np.where(ahead * behind > 0.0, smaller, 0.0), -1.6, 1.6)


def cast_shadow(canvas: Canvas, surface: np.ndarray) -> np.ndarray:
    """(rows, cols) bool: the sun is hidden behind something higher. Marches towards the sun cell by cell."""
    dark = np.zeros(surface.shape, bool)
    stride = min(canvas.step_x / SUN_EAST, canvas.step_y / SUN_SOUTH)
    reach = float(canvas.height.max()) / SUN_TAN
    rows, cols = surface.shape
    for number in range(1, int(reach / stride) + 1):
        right = int(number * stride * SUN_EAST / canvas.step_x + 0.5)
        down = int(number * stride * SUN_SOUTH / canvas.step_y + 0.5)
        if right >= cols or down >= rows:
            break
        dx, dy = right * canvas.step_x, down * canvas.step_y
        rise = SUN_TAN * math.sqrt(dx * dx + dy * dy)
        here, there = surface[: rows - down, : cols - right], surface[down:, right:]
        dark[: rows - down, : cols - right] |= there > here + rise
    return dark


def _clouds(canvas: Canvas, draws: Draws) -> np.ndarray:
    """Transmission of the sunlight through thin cloud, 0.7 to 1, soft edges some 100 m wide."""
    cover = np.zeros((canvas.rows, canvas.cols))
    for east, size in ((draws.uniform(60.0, 240.0), 85.0), (draws.uniform(360.0, 560.0), 65.0)):
        dx = (canvas.x[None, :] - east) / (1.3 * size)
        dy = (canvas.y[:, None] - draws.uniform(60.0, 340.0)) / size
        distance = dx * dx + dy * dy
        cover += 1.0 / (1.0 + distance * distance)
    cover = np.minimum(cover * (1.0 + 0.15 * canvas.field(draws, 55.0)), 1.0)
    return 1.0 - 0.3 * cover


def illumination(canvas: Canvas, ground: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Direct sun and visible sky at every subpixel, both 1 on flat open ground under a clear sky."""
    surface = ground + canvas.height
    east, south = _slope(surface, canvas.step_x, 1), _slope(surface, canvas.step_y, 0)
    facing = SUN_TAN - east * SUN_EAST - south * SUN_SOUTH
    direct = np.maximum(facing, 0.0) / (SUN_TAN * np.sqrt(1.0 + east * east + south * south))
    direct[cast_shadow(canvas, surface)] = 0.0
    window = (max(int(9.0 / canvas.step_y), 1), max(int(9.0 / canvas.step_x), 1))
    walls = np.maximum(uniform_filter(canvas.height, window, mode="nearest") - canvas.height, 0.0)
    return direct * _clouds(canvas, draws), 1.0 / (1.0 + 0.12 * walls)


def pixel_sum(values: np.ndarray) -> np.ndarray:
    """Sum over the subpixels of each pixel, in a fixed order."""
    total = np.zeros((values.shape[0] // SUBPIXELS, values.shape[1] // SUBPIXELS), values.dtype)
    for row in range(SUBPIXELS):
        for col in range(SUBPIXELS):
            total += values[row::SUBPIXELS, col::SUBPIXELS]
    return total


def _mixture(canvas: Canvas, direct: np.ndarray, sky: np.ndarray) -> np.ndarray:
    """Amount of every (material, variation, light) in each pixel: (pixels, 20 * 3 * 2) float64."""
    height, width = canvas.rows // SUBPIXELS, canvas.cols // SUBPIXELS
    row, col = np.arange(canvas.rows) // SUBPIXELS, np.arange(canvas.cols) // SUBPIXELS
    pixel = row[:, None] * width + col[None, :]
    first = ((pixel * m.MATERIALS + canvas.material) * 6).ravel()
    amounts = np.zeros(height * width * m.MATERIALS * 6)
    scale = canvas.gain / SUBPIXELS**2
    for variation, share in enumerate((1.0 - canvas.p - canvas.q, canvas.p, canvas.q)):
        for light, strength in enumerate((direct, sky)):
            weight = (scale * share * strength).ravel()
            amounts += np.bincount(first + 2 * variation + light, weight, amounts.size)
    return amounts.reshape(height * width, m.MATERIALS * 6)


def _blur(cube: np.ndarray, axis: int) -> np.ndarray:
    """Point spread of the optics: 9 % of the light of each neighbour along ``axis``; edges repeat."""
    last = cube.shape[axis] - 1
    index = np.arange(last + 1)
    before, after = cube.take(np.maximum(index - 1, 0), axis), cube.take(np.minimum(index + 1, last), axis)
    return 0.82 * cube + 0.09 * (before + after)


def hyperspectral(canvas: Canvas, direct: np.ndarray, sky: np.ndarray, draws: Draws) -> np.ndarray:
    """Reflectance x 10,000 as the sensor reports it: (H, W, 144) uint16.

    Mixed pixels, point spread, residual atmosphere, haze, a brightness gradient across the swath, noise that
    grows with the signal and where the response is weak, faint stripes along the flight line (down the rows).
    """
    spectra, diffuse = m.material_spectra(), m.diffuse_share()
    basis = np.stack([spectra * (1.0 - diffuse), spectra * diffuse], axis=2).reshape(-1, m.BANDS)
    height, width = canvas.rows // SUBPIXELS, canvas.cols // SUBPIXELS
    cube = (_mixture(canvas, direct, sky) @ basis).reshape(height, width, m.BANDS)
    cube = _blur(_blur(cube, 0), 1)
    swath = (np.arange(width) + 0.5) / width - 0.5
    vapour = 1.0 + 0.5 * swath + 0.15 * draws.normals(height, 1)
    cube *= (1.0 + 0.06 * swath)[:, None] * (1.0 - m.residual_atmosphere() * vapour[..., None])
    cube += 0.004 * (380.0 / m.wavelengths()) ** 3
    response = m.sensor_response()
    noise = draws.normals(height, width, m.BANDS)
    noise *= np.sqrt(2.0e-6 + 1.0e-5 * cube)
    noise += 0.0008 * draws.normals(width, m.BANDS)
    cube += noise / response
    return np.clip(np.floor(cube * 10_000.0 + 0.5), 0.0, 65_535.0).astype(np.uint16)


def surface_model(canvas: Canvas, ground: np.ndarray, draws: Draws) -> np.ndarray:
    """First-return surface height in metres, in steps of 1 cm: (H, W, 1) float32.

    Pulses sink into crowns by some decimetres; ranging noise is 4 cm.
    """
    leafy = (canvas.material == m.TREE) | (canvas.material == m.CONIFER)
    depth = np.abs(draws.normals(*leafy.shape)) * np.where(leafy, 0.12, 0.0)
    seen = pixel_sum(ground + canvas.height * (1.0 - depth)) / SUBPIXELS**2
    seen += 0.04 * draws.normals(*seen.shape)
    return (np.floor(seen * 100.0 + 0.5) / 100.0).astype(np.float32)[..., None]
