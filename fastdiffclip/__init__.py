"""fastdiffclip: few-shot, language-driven classification of multimodal remote-sensing scenes.

The Python API is a handful of names, imported on first use so that ``import fastdiffclip`` stays instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_API = {
    "open_scene": "fastdiffclip.scene.store",
    "train_umd": "fastdiffclip.train.umd",
    "train_flc": "fastdiffclip.train.flc",
    "predict": "fastdiffclip.infer.stream",
    "evaluate": "fastdiffclip.evaluate.runner",
}
__all__ = ["__version__", "evaluate", "open_scene", "predict", "train_flc", "train_umd"]

if TYPE_CHECKING:
    from fastdiffclip.evaluate.runner import evaluate
    from fastdiffclip.infer.stream import predict
    from fastdiffclip.scene.store import open_scene
    from fastdiffclip.train.flc import train_flc
    from fastdiffclip.train.umd import train_umd


def __getattr__(name: str) -> Any:
    if name in _API:
        import importlib

        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module 'fastdiffclip' has no attribute {name!r}")
