"""Parametric reflectance spectra of the built-in scene's materials, 380 to 1050 nm.

Every material is three spectra: a typical one and two directions in which real samples differ (chlorophyll,
water content, soil moisture, paint, age). A surface point is ``gain * ((1 - p - q) * typical + p * first
+ q * second)``, so a whole scene stays linear in a small basis.
"""

from __future__ import annotations

import numpy as np

BANDS = 144

GRASS, TREE, CONIFER, TILE, METAL, CONCRETE, ROAD, LOT, TRACK, TURF, SOIL, WATER = range(12)
FLAT_ROOF, BALLAST, RAIL, PAINT, CAR_GREY, CAR_BLUE, CAR_RED, POOL = range(12, 20)
MATERIALS = 20


def wavelengths() -> np.ndarray:
    """Band centres in nm, (144,) float64, evenly spaced from 380 to 1050."""
    return 380.0 + (1050.0 - 380.0) * np.arange(BANDS) / (BANDS - 1)


def _bell(nm: np.ndarray, centre: float, width: float) -> np.ndarray:
    return np.exp(-0.5 * ((nm - centre) / width) ** 2)


def _step(nm: np.ndarray, centre: float, width: float) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-(nm - centre) / width))


def _ramp(nm: np.ndarray, low: float, high: float) -> np.ndarray:
    """Straight line from ``low`` at 380 nm to ``high`` at 1050 nm."""
    return low + (high - low) * (nm - 380.0) / 670.0


def _canopy(nm: np.ndarray, chlorophyll: float, water: float, brown: float, openness: float) -> np.ndarray:
    """Leaf canopy: Kubelka-Munk reflectance of an optically thick layer, absorption over scattering k/s.

    ``R = 1 + k/s - sqrt((k/s)**2 + 2 k/s)``. Chlorophyll absorbs at 430, 455, 640 and 672 nm with a wing that
    makes the red edge, carotenoids at 470 nm, brown pigments towards the blue, water at 970 nm.
    ``openness`` (0 to 1) is the share of dark gaps between the leaves.
    """
    pigment = (
        7.0 * (1.0 - _step(nm, 435, 12))
        + 4.0 * _bell(nm, 432, 18)
        + 6.5 * _bell(nm, 462, 24)
        + 2.6 * _bell(nm, 570, 60)
        + 4.5 * _bell(nm, 640, 24)
        + 10.0 * _bell(nm, 674, 15)
        + 1.6 * _bell(nm, 700, 12)
    )
    absorption = (
        0.20
        + chlorophyll * pigment
        + 2.0 * (0.4 + chlorophyll) * _bell(nm, 470, 35)
        + brown * 4.0 * np.exp(-(nm - 380.0) / 170.0)
        + water * (0.16 * _bell(nm, 975, 26) + 0.03 * _bell(nm, 840, 20))
        + water * 0.10 * _step(nm, 1040, 25)
    )
    reflectance = 1.0 + absorption - np.sqrt(absorption * absorption + 2.0 * absorption)
    return (1.0 - openness) * reflectance + openness * 0.02


def _soil(nm: np.ndarray, brightness: float, iron: float, moisture: float) -> np.ndarray:
    """Soil line with iron-oxide absorption at 480, 650 and 880 nm; moisture darkens, most in the blue."""
    line = brightness * (0.30 + 0.70 * _step(nm, 600, 75) + 0.22 * (nm - 700.0) / 350.0)
    absorbed = iron * (0.55 * _bell(nm, 470, 55) + 0.14 * _bell(nm, 655, 30) + 0.22 * _bell(nm, 885, 55))
    darkened = 1.0 - moisture * (0.55 - 0.1 * _step(nm, 600, 60)) - moisture * 0.06 * _bell(nm, 970, 24)
    return line * (1.0 - absorbed) * darkened


def _clay(nm: np.ndarray, floor: float, red: float, edge: float) -> np.ndarray:
    """Fired clay: iron oxide absorbs below ``edge`` nm, then a shoulder near 650 and a band near 870 nm."""
    curve = floor + 0.55 * red * _step(nm, edge, 22) + 0.65 * red * _step(nm, 690, 45)
    return curve * (1.0 - 0.16 * _bell(nm, 865, 55))


def _mineral(nm: np.ndarray, low: float, high: float, knee: float, iron: float = 0.0) -> np.ndarray:
    """Asphalt, concrete, gravel: rises to a plateau near ``knee`` nm, then a weak slope."""
    curve = low + (high - low) * (0.85 * (1.0 - np.exp(-(nm - 360.0) / (knee - 360.0))) + 0.15 * (nm - 380.0) / 670.0)
    return curve * (1.0 - iron * (0.5 * _bell(nm, 490, 50) + 0.25 * _bell(nm, 880, 60)))


def _metal(nm: np.ndarray, level: float) -> np.ndarray:
    """Bare or galvanised sheet: almost flat, dark below 400 nm, the interband dip of aluminium at 840 nm."""
    return level * (0.82 + 0.18 * _step(nm, 420, 25)) * (1.0 - 0.07 * _bell(nm, 840, 60))


def _paint(nm: np.ndarray, floor: float, peak: float, centre: float, width: float, infrared: float) -> np.ndarray:
    """Coloured coat: a reflectance peak in the visible; in the near infrared the pigment is transparent."""
    return floor + peak * _bell(nm, centre, width) + infrared * _step(nm, 790, 38)


def _rubber(nm: np.ndarray, floor: float, red: float, edge: float) -> np.ndarray:
    """Red polyurethane: absorbs to the yellow, steps up near ``edge`` nm, weak iron-oxide dip at 870 nm."""
    return (floor + red * _step(nm, edge, 16) + 0.10 * _step(nm, 745, 45)) * (1.0 - 0.10 * _bell(nm, 870, 50))


def _water(nm: np.ndarray, sediment: float, algae: float, glint: float) -> np.ndarray:
    """Open water: a blue-green hump that falls with the absorption of water; sediment lifts the red."""
    clear = 0.030 * _bell(nm, 500, 75) + sediment * 0.06 * _bell(nm, 590, 70) + sediment * 0.012 * _bell(nm, 812, 26)
    green = algae * (0.025 * _bell(nm, 555, 30) + 0.020 * _bell(nm, 706, 13) - 0.008 * _bell(nm, 674, 12))
    return np.maximum(clear + green + 0.004 + glint + 0.01 * _bell(nm, 380, 90), 0.002)


def _basin(nm: np.ndarray, floor: float, peak: float, centre: float) -> np.ndarray:
    """Blue paint seen through a metre or two of water, which takes everything beyond 700 nm."""
    return (floor + peak * _bell(nm, centre, 75)) * (1.0 - 0.93 * _step(nm, 700, 22))


def material_spectra() -> np.ndarray:
    """Reflectance (0 to 1) of every material and its two directions of variation: (20, 3, 144) float64."""
    nm = wavelengths()
    lawn = 0.92 * _canopy(nm, 0.80, 1.0, 0.1, 0.06) + 0.08 * _soil(nm, 0.30, 0.6, 0.4)
    dry = 0.62 * _canopy(nm, 0.16, 0.25, 1.0, 0.08) + 0.38 * _soil(nm, 0.36, 0.6, 0.1)
    table: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {
        GRASS: (lawn, dry, _canopy(nm, 1.25, 1.3, 0.0, 0.10)),
        TREE: (
            _canopy(nm, 1.15, 1.2, 0.1, 0.22),
            _canopy(nm, 0.75, 0.9, 0.4, 0.20),
            _canopy(nm, 1.8, 1.5, 0.1, 0.35),
        ),
        CONIFER: (
            _canopy(nm, 1.5, 1.0, 0.5, 0.42),
            _canopy(nm, 0.9, 0.8, 0.9, 0.35),
            _canopy(nm, 2.0, 1.2, 0.4, 0.5),
        ),
        TILE: (_clay(nm, 0.055, 0.22, 588), _clay(nm, 0.065, 0.12, 605), _mineral(nm, 0.08, 0.17, 560, 0.25)),
        METAL: (_metal(nm, 0.44), _paint(nm, 0.10, 0.22, 470, 55, 0.24), _mineral(nm, 0.10, 0.40, 640, 0.35)),
        CONCRETE: (
            _mineral(nm, 0.13, 0.36, 520, 0.08),
            _mineral(nm, 0.20, 0.47, 480),
            _mineral(nm, 0.08, 0.26, 580, 0.2),
        ),
        ROAD: (_ramp(nm, 0.070, 0.115), _mineral(nm, 0.07, 0.165, 640, 0.12), _ramp(nm, 0.050, 0.062)),
        LOT: (
            _mineral(nm, 0.095, 0.170, 560, 0.05),
            _mineral(nm, 0.115, 0.225, 540, 0.05),
            _ramp(nm, 0.070, 0.100),
        ),
        TRACK: (_rubber(nm, 0.045, 0.21, 596), _rubber(nm, 0.085, 0.17, 588), _rubber(nm, 0.035, 0.13, 604)),
        TURF: (
            _paint(nm, 0.030, 0.055, 532, 38, 0.20) + _ramp(nm, 0.0, 0.06),
            _paint(nm, 0.055, 0.055, 538, 50, 0.17) + _ramp(nm, 0.0, 0.10),
            _paint(nm, 0.025, 0.035, 525, 34, 0.26),
        ),
        SOIL: (_soil(nm, 0.35, 0.42, 0.10), _soil(nm, 0.31, 0.50, 0.70), _soil(nm, 0.44, 0.22, 0.0)),
        WATER: (_water(nm, 0.35, 0.3, 0.0), _water(nm, 1.1, 0.5, 0.0), _water(nm, 0.2, 1.2, 0.01)),
        FLAT_ROOF: (
            _mineral(nm, 0.085, 0.165, 500, 0.04),
            _mineral(nm, 0.15, 0.29, 600, 0.14),
            _ramp(nm, 0.05, 0.075),
        ),
        BALLAST: (
            _mineral(nm, 0.07, 0.200, 640, 0.45),
            _mineral(nm, 0.10, 0.22, 560, 0.12),
            _soil(nm, 0.20, 0.8, 0.3),
        ),
        RAIL: (_metal(nm, 0.30), _soil(nm, 0.20, 1.0, 0.1), _metal(nm, 0.20)),
        PAINT: (_mineral(nm, 0.30, 0.66, 430), _mineral(nm, 0.22, 0.48, 460), _mineral(nm, 0.10, 0.55, 540)),
        CAR_GREY: (_metal(nm, 0.22), _metal(nm, 0.62), _ramp(nm, 0.035, 0.05)),
        CAR_BLUE: (
            _paint(nm, 0.04, 0.16, 455, 45, 0.10),
            _paint(nm, 0.05, 0.08, 470, 60, 0.2),
            _metal(nm, 0.3),
        ),
        CAR_RED: (_rubber(nm, 0.04, 0.33, 612), _rubber(nm, 0.03, 0.2, 620), _metal(nm, 0.3)),
        POOL: (_basin(nm, 0.08, 0.32, 465), _basin(nm, 0.05, 0.20, 480), _basin(nm, 0.10, 0.30, 490)),
    }
    return np.stack([np.stack(table[material]) for material in range(MATERIALS)])


def diffuse_share() -> np.ndarray:
    """Share of blue skylight in the light on a flat open surface, per band: (144,) float64."""
    return 0.07 + 0.33 * (380.0 / wavelengths()) ** 3


def residual_atmosphere() -> np.ndarray:
    """Depth (0 to 1) of what atmospheric correction left: oxygen 687, 761 nm; vapour 722, 820, 940 nm."""
    nm = wavelengths()
    return (
        0.04 * _bell(nm, 687, 4)
        + 0.03 * _bell(nm, 722, 7)
        + 0.12 * _bell(nm, 761, 5)
        + 0.03 * _bell(nm, 820, 9)
        + 0.09 * _bell(nm, 940, 16)
    )


def sensor_response() -> np.ndarray:
    """Relative signal of the sensor per band, 1 near 650 nm and weak at both ends: (144,) float64."""
    nm = wavelengths()
    return np.maximum(np.minimum(_step(nm, 405, 16), 1.0 - _step(nm, 985, 28)), 0.02) * (
        0.75 + 0.25 * _bell(nm, 650, 140)
    )
