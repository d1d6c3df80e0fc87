"""How good a map is, beside what a user would have picked instead.

metrics.py    overall, average and per-class accuracy, kappa, confusion matrix, over one or many runs
baselines.py  classical classifiers and the `linear` control on the same shots
runner.py     many splits, our method and the baselines on the same pixels, one table
report.py     one self-contained HTML page of a run; report_parts.py makes its tables, report_figures.py its
              pictures, report.css is its looks
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Evaluate(ModuleType):
    """``fastdiffclip.evaluate`` is this package and, called, :func:`fastdiffclip.evaluate.runner.evaluate`."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from fastdiffclip.evaluate.runner import evaluate

        return evaluate(*args, **settings)


sys.modules[__name__].__class__ = _Evaluate
