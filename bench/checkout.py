"""Makes kernels, bench and configs of a bare checkout importable under the names that they have when installed."""

from __future__ import annotations

from pathlib import Path


def register() -> None:
    """Let ``fastdiffclip.kernels``, ``.bench`` and ``.configs`` be found beside the package, where it is not installed.

    An installed package is left as it is: its own folders, and with them its native library, come first.
    """
    import fastdiffclip

    root = str(Path(__file__).resolve().parents[1])
    if root not in fastdiffclip.__path__:
        fastdiffclip.__path__.append(root)
