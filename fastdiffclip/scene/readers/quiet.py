"""GDAL without a voice of its own: what matters comes as an exception, the rest goes to the debug log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_gdal() -> Iterator[None]:
    """Keep GDAL from writing to the terminal while files are read; with ``--debug`` its words are logged."""
    import rasterio

    logger = logging.getLogger("rasterio")
    level = logger.level
    if logging.getLogger("fastdiffclip").getEffectiveLevel() > logging.DEBUG:
        logger.setLevel(logging.CRITICAL)
    try:
        with rasterio.Env():  # outside of one, GDAL prints
            yield
    finally:
        logger.setLevel(level)
