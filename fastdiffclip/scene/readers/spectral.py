"""Wavelengths in files: which units are lengths, and how they become nanometres."""

from __future__ import annotations

from collections.abc import Sequence

# Where every value is smaller and nobody names a unit, it is micrometres.
LARGEST_UM = 100.0

_TO_NM = {
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micrometer", "micrometers", "micrometre", "micrometres"), 1e3),
    **dict.fromkeys(("micron", "microns"), 1e3),
}


def nanometres_per_unit(unit: str) -> float | None:
    """Return the factor from nanometres or micrometres, by any of their names, to nm; None for every other unit."""
    return _TO_NM.get(unit.strip().lower())


def in_nanometres(values: Sequence[float], factor: float) -> tuple[float, ...]:
    """Return ``values`` times ``factor`` without the noise that decimal micrometres leave behind."""
    return tuple(round(value * factor, 6) for value in values)


def guessed_factor(values: Sequence[float]) -> float:
    """Return the factor to nm of wavelengths without a unit: micrometres where all are below 100, else nm."""
    return 1e3 if max(values) < LARGEST_UM else 1.0
