"""Which implementation of an op runs: the one asked for, or the best that is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastdiffclip.errors import UsageError, nearest

logger = logging.getLogger(__name__)
IMPLEMENTATIONS = ("reference", "native", "triton")
_OPS: dict[str, Mapping[str, Callable[..., Any]]] = {}


def register(op: str, table: Mapping[str, Callable[..., Any]]) -> None:
    """Declare the implementations of ``op``, name to callable."""
    _OPS[op] = table


def unavailable(impl: str, device: torch.device) -> str:
    """Return why ``impl`` cannot run for tensors on ``device``, or ``""`` when it can."""
    if impl == "native":
        if device.type != "cpu":
            return f"the native library serves the CPU, the tensors are on {device}"
        from fastdiffclip.kernels import native

        present, reason, _ = native.status()
        return "" if present else reason
    if impl == "triton":
        from fastdiffclip.kernels import triton

        return triton.unavailable(device)
    return ""


def pick(
    op: str, impl: str | None, device: torch.device, unsupported: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """Return the callable for ``op``.

    Args:
        op: name of a registered op.
        impl: a name out of :data:`IMPLEMENTATIONS`, or None for the best one available on ``device``.
        device: where the arguments live.
        unsupported: implementation to reason, for arguments that it cannot take.

    Raises:
        UsageError: ``impl`` is unknown, not written for this op, or cannot run here; the reason is named.
    """
    return _OPS[op][_choose(op, impl, device, tuple((unsupported or {}).items()))]


def _choose(op: str, impl: str | None, device: torch.device, unsupported: tuple[tuple[str, str], ...]) -> str:
    table, reasons = _OPS[op], dict(unsupported)
    if impl is not None:
        if impl not in table:
            raise UsageError(
                f"{op} has no implementation {impl!r}{nearest(impl, tuple(table))}; there is: {', '.join(table)}"
            )
        reason = reasons.get(impl) or unavailable(impl, device)
        if reason:
            raise UsageError(f"{op}: implementation {impl!r} cannot be used: {reason}")
        return impl
    for name in ("triton", "native"):
        if name in table and not (name == "triton" and device.type == "cpu"):  # interpreted: only when asked for
            reason = reasons.get(name) or unavailable(name, device)
            if not reason:
                return name
            logger.debug("%s: %s not taken: %s", op, name, reason)
    return "reference"


# Looking for a library and logging are nothing that a graph can hold. This is all that
# torch.compiler.assume_constant_result does, which would import the compiler (2 s) into every process.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def implementations(device: torch.device | str = "cpu") -> dict[str, dict[str, str]]:
    """For every op and implementation: ``"ok"`` or the reason why it is not used on ``device``."""
    where = torch.device(device)
    return {op: {impl: unavailable(impl, where) or "ok" for impl in table} for op, table in sorted(_OPS.items())}
