"""Which pixels to label next: where the classifier is unsure, and unlike what is labelled or chosen already.

One pixel after the other is chosen, the one with the largest product of uncertainty, 1 minus the lead of the likeliest
class over the next, and distance to the nearest labelled or chosen pixel in the space where windows meet the class
texts. Windows of chosen pixels do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiffclip.errors import InputDataError
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.kernels import philox
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.scene.windows import require_whole_windows

CANDIDATES = 8192  # pixels that are looked at, spread over the scene
PART = 4096


@dataclass(frozen=True)
class Suggestion:
    """A pixel to label: ``row``, ``col``, what the classifier takes it for, and how sure it is of that."""

    row: int
    col: int
    value: int
    name: str
    confidence: float
    margin: float


def suggest(
    scene: Scene, classifier: Classifier, count: int, labelled: np.ndarray, budget: int, candidates: int = CANDIDATES
) -> list[Suggestion]:
    """At most ``count`` pixels of a scene that are worth a label, best first.

    Args:
        labelled: ``(n, 2)`` rows and columns of pixels of this scene that are labelled already.
        budget: bytes that the prepared scene may take.
        candidates: of so many valid pixels, spread over the scene.

    Raises:
        InputDataError: no pixel is valid, or the scene does not fit the model.
    """
    window = classifier.config.model.window
    require_whole_windows([scene], window)
    source = WindowSource([scene], classifier.front_end, window, budget)
    rows, cols = np.nonzero(scene.read_valid_everywhere())
    if len(rows) == 0:
        raise InputDataError(
            f"no pixel of {scene.path} is valid in every modality of the model; nothing can be suggested"
        )
    drawn = philox.first_of_permutation(philox.rng_state(0), philox.CENTRE, len(rows), candidates).numpy()
    places = np.stack([rows[drawn], cols[drawn]], axis=1).astype(np.int64)
    labelled = np.asarray(labelled, np.int64).reshape(-1, 2)
    probabilities, embeddings = _looked_at(classifier, source, np.concatenate([places, labelled]))
    embeddings, known = np.split(embeddings, [len(places)])
    probabilities = probabilities[: len(places)]
    chosen = choose(probabilities, embeddings, places, known, labelled, count, window)
    order = np.sort(probabilities, axis=1)
    found = []
    for place in chosen:
        best = classifier.classes[int(probabilities[place].argmax())]
        margin = float(order[place, -1] - order[place, -2]) if order.shape[1] > 1 else 1.0
        row, col = places[place].tolist()
        found.append(Suggestion(row, col, best.value, best.name, float(order[place, -1]), margin))
    return found


def choose(
    probabilities: np.ndarray, embeddings: np.ndarray, places: np.ndarray, known: np.ndarray, known_places: np.ndarray,
    count: int, window: int,
) -> list[int]:  # fmt: skip
    """Indices of the pixels to label, best first.

    Args:
        probabilities: ``(n, K)``. embeddings: ``(n, E)``. places: ``(n, 2)`` row and column.
        known: ``(m, E)`` embeddings of labelled pixels, and where they are, ``(m, 2)``.
        count: how many at most. window: chosen pixels are at least that far apart in rows or columns.
    """
    order = np.sort(probabilities, axis=1)
    unsure = 1.0 - (order[:, -1] - order[:, -2]) if order.shape[1] > 1 else np.ones(len(order))
    distance, free = np.ones(len(places)), np.ones(len(places), bool)
    if len(known):
        distance = np.min([np.linalg.norm(embeddings - other, axis=1) for other in known], axis=0)
        for place in known_places:
            free &= np.abs(places - place).max(axis=1) >= window
    chosen: list[int] = []
    while len(chosen) < count and free.any():
        best = int(np.where(free, unsure * distance, -1.0).argmax())
        apart = np.linalg.norm(embeddings - embeddings[best], axis=1)
        distance = np.minimum(distance, apart) if chosen or len(known) else apart
        free &= np.abs(places - places[best]).max(axis=1) >= window
        free[best] = False
        chosen.append(best)
    return chosen


def geojson(scene: Scene, suggestions: Sequence[Suggestion]) -> dict[str, Any]:
    """The suggestions as a GeoJSON FeatureCollection (RFC 7946): longitude and latitude where the scene has a CRS.

    Without one, coordinates are column and row of the pixel's centre, y counted downwards; the member ``coordinates``
    of every property list says which.
    """
    x = np.array([item.col + 0.5 for item in suggestions])
    y = np.array([item.row + 0.5 for item in suggestions])
    kind = "pixels"
    if scene.crs_wkt is not None and scene.affine_transform is not None:
        from rasterio.warp import transform

        a, b, c, d, e, f = scene.affine_transform[:6]
        across, up = a * x + b * y + c, d * x + e * y + f
        if len(suggestions):
            x, y = (np.array(part) for part in transform(scene.crs_wkt, "EPSG:4326", across, up))
        kind = "WGS 84"
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [round(float(east), 8), round(float(north), 8)]},
            "properties": {
                "rank": rank, "row": item.row, "col": item.col, "class": item.name, "value": item.value,
                "confidence": round(item.confidence, 4), "margin": round(item.margin, 4), "coordinates": kind,
            },
        }
        for rank, (item, east, north) in enumerate(zip(suggestions, x, y, strict=True), 1)
    ]  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


@torch.inference_mode()
def _looked_at(classifier: Classifier, source: WindowSource, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``(n, K)`` and embeddings ``(n, E)`` float64 of pixels ``(n, 2)``."""
    centres = np.column_stack([np.zeros(len(places), np.int64), places])
    parts = [classifier.look(source.windows(centres[first : first + PART])) for first in range(0, len(centres), PART)]
    return tuple(np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))  # type: ignore[return-value]
