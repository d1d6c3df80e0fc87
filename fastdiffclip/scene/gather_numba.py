"""The window gather for numba; imported only by ``windows`` and only when the first gather runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 16  # float32 of a cache line


@intrinsic  # type: ignore[misc]
def stream_line(typing_context: Any, target: Any, at: Any, source: Any, begin: Any) -> Any:
    """Copy ``LINE`` floats of ``source`` from ``begin`` on to ``target[at:]``, a line, without reading that first.

    An ordinary store fetches the line that it is about to overwrite; for windows larger than the caches that is a
    third of all traffic.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.FloatType(), LINE).as_pointer()

        def place(array: Any, kind: Any, index: Any) -> Any:
            data = context.make_array(kind)(context, builder, array).data
            return builder.bitcast(builder.gep(data, [index]), line)

        values = builder.load(place(arguments[2], signature.args[2], arguments[3]), align=4)
        stored = builder.store(values, place(arguments[0], signature.args[0], arguments[1]), align=4 * LINE)
        one = ir.Constant(ir.IntType(32), 1)
        stored.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), generate


@intrinsic  # type: ignore[misc]
def streams_done(typing_context: Any) -> Any:
    """Make streamed lines visible to other threads before whatever comes after."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def gather(
    pixels: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    valid: np.ndarray,
    extents: np.ndarray,
    centres: np.ndarray,
    radius: int,
    out: np.ndarray,
    lead: int,
) -> None:
    """Fill ``out`` (B, L, C) float32 with ``pixels * scale + offset`` of every window's pixels.

    ``lead`` below 0 writes it as usual. Otherwise it is the number of floats of ``out`` before a line begins, and whole
    lines are written past the caches.
    """
    side = 2 * radius + 1
    channels = pixels.shape[1]
    run = side * channels
    flat = out.reshape(-1)
    for b in prange(centres.shape[0]):
        scene = centres[b, 0]
        first = extents[scene, 0]
        height = extents[scene, 1]
        width = extents[scene, 2]
        centre = first + centres[b, 1] * width + centres[b, 2]
        line = np.empty((side, channels), np.float32)
        for i in range(side):
            row = min(max(centres[b, 1] + i - radius, 0), height - 1)
            for j in range(side):
                col = min(max(centres[b, 2] + j - radius, 0), width - 1)
                n = first + row * width + col
                if (valid[n >> 3] >> (n & 7)) & 1 == 0:
                    n = centre
                if lead < 0:
                    for c in range(channels):
                        out[b, i * side + j, c] = np.float32(pixels[n, c]) * scale[c] + offset[c]
                else:
                    for c in range(channels):
                        line[j, c] = np.float32(pixels[n, c]) * scale[c] + offset[c]
            if lead >= 0:
                begin = (b * side + i) * run
                head = min(run, (lead - begin) % LINE)
                whole = head + (run - head) // LINE * LINE
                for k in range(head):
                    flat[begin + k] = line.flat[k]
                for k in range(head, whole, LINE):
                    stream_line(flat, begin + k, line, k)
                for k in range(whole, run):
                    flat[begin + k] = line.flat[k]
        if lead >= 0:
            streams_done()
