"""What is timed (as data), how, and the report; installed as ``fastdiffclip.bench``.

``python -m bench`` works from a bare checkout too, in any environment that has torch (see ``checkout.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ == "bench":  # started as `python -m bench...` beside the package, installed or not
    from bench.checkout import register

    register()

_API = {"run": "fastdiffclip.bench.runner", "render": "fastdiffclip.bench.report"}
__all__ = ["render", "run"]

if TYPE_CHECKING:
    from fastdiffclip.bench.report import render
    from fastdiffclip.bench.runner import run


def __getattr__(name: str) -> Any:
    if name in _API:
        import importlib

        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
