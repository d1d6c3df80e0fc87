"""What is timed, as data: suites, shapes, implementations. Row names are a promise; scripts read them.

Shape letters: B windows or sequences, P side of a window, L tokens, V visible tokens, C channels, H heads (or height),
E head width, N images, K texts, D embedding width, W width, R rows, I and O features in and out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastdiffclip.errors import UsageError, nearest

FP32, BF16 = "float32", "bfloat16"
SUITES = ("kernels", "io", "train", "infer")
CURVES = "curves"  # a suite of its own, see curves.py; no part of all


@dataclass(frozen=True)
class Case:
    """One question to the clock; every variant of it is timed in turns with the others.

    Attributes:
        variants: (implementation, dtype) pairs. eager: implementations of which the fastest is called eager.
        sizes: the shape, as the row names it. quick: the small shape that tests use.
        devices: where the case makes sense.
    """

    suite: str
    name: str
    mode: str
    variants: tuple[tuple[str, str], ...]
    eager: tuple[str, ...]
    sizes: Mapping[str, int] = field(hash=False)
    quick: Mapping[str, int] = field(hash=False)
    devices: tuple[str, ...] = ("cpu", "cuda")


def _op(name: str, mode: str, dtype: str, eager: tuple[str, ...], impls: tuple[str, ...], sizes: Mapping[str, int],
        quick: Mapping[str, int], devices: tuple[str, ...] = ("cpu", "cuda")) -> Case:  # fmt: skip
    return Case("kernels", name, mode, tuple((impl, dtype) for impl in impls), eager, sizes, quick, devices)


_OURS = ("reference", "native", "triton")
_ALL_ATTENTION = (*_OURS, "sdpa", "xformers")
_SCENE = {"B": 256, "P": 11, "V": 36, "H": 512, "W": 512}
_SMALL_SCENE = {"B": 8, "P": 5, "V": 8, "H": 16, "W": 16}
_STEP = (("plain", FP32), ("engine", FP32), ("engine", BF16))

CASES: tuple[Case, ...] = (
    *(
        _op("visible_noise", "fwd", dtype, ("plain",), ("plain", *_OURS), {**_SCENE, "C": c}, {**_SMALL_SCENE, "C": c})
        for c, dtype in ((144, FP32), (144, BF16), (1, FP32))
    ),
    *(
        _op("masked_mse", "fwd+bwd", dtype, ("reference",), _OURS, {**_SCENE, "C": 144}, {**_SMALL_SCENE, "C": 12})
        for dtype in (FP32, BF16)
    ),
    *(
        _op("contrastive", "fwd+bwd", FP32, ("plain",), ("plain", *_OURS), sizes, {"N": 8, "K": 3, "D": 16})
        for sizes in ({"N": 64, "K": 15, "D": 128}, {"N": 2048, "K": 2048, "D": 128})
    ),
    # What the batch of a training step takes as a part of its graph, where no host is waited for.
    _op("contrastive", "fwd+bwd graph", FP32, ("plain",), ("plain", "reference", "triton"),
        {"N": 64, "K": 15, "D": 128}, {"N": 8, "K": 3, "D": 16}, ("cuda",)),
    *(
        # At this size the reference would hold several N x N matrices; only fused kernels and a chunked loss run.
        _op("contrastive", mode, BF16, ("plain",), ("plain", "triton", "inf-cl", "memeff"),
            {"N": 65536, "K": 65536, "D": 512}, {"N": 8, "K": 8, "D": 16}, ("cuda",))
        for mode in ("fwd", "fwd+bwd")
    ),
    *(
        _op("short_attention", mode, dtype, ("reference", "sdpa"), _ALL_ATTENTION,
            {"B": batch, "L": length, "H": 8, "E": 16}, {"B": 2, "L": length, "H": 2, "E": 16}, (device,))
        for device, batch in (("cpu", 16), ("cuda", 4096))
        for length in (37, 122)
        for dtype in (FP32, BF16)
        for mode in ("fwd", "fwd+bwd")
    ),
    *(
        # float32: 256 windows' visible tokens with a class token, in the width of the model, and the band projection
        # of spectra; bfloat16: 32 windows of one modality in a decoder.
        _op("linear", mode, dtype, ("reference",), ("reference", "native"), {"R": rows, "I": inside, "O": outside},
            {"R": 20, "I": 16, "O": 24}, ("cpu",))
        for dtype, sizes in ((FP32, ((9472, 128, 128), (9472, 128, 384), (2048, 145, 128))),
                             (BF16, ((3904, 128, 128), (3904, 128, 384), (3904, 256, 128))))
        for rows, inside, outside in sizes
        for mode in ("fwd", "fwd+bwd")
    ),
    *(
        # 32 windows of one modality in a decoder: the hidden layer, and the residual stream before a layer.
        _op(name, mode, dtype, ("reference",), ("reference", "native"), {"R": 3904, "W": width}, {"R": 20, "W": 24},
            ("cpu",))
        for name, width in (("gelu", 256), ("residual_norm", 128))
        for dtype in (FP32, BF16)
        for mode in ("fwd", "fwd+bwd")
    ),
    Case("io", "scene_read", "fwd", (("plain", "uint16"), ("engine", "uint16")), ("plain",),
         {"H": 1024, "W": 1024, "C": 144}, {"H": 48, "W": 40, "C": 8}, ("cpu",)),
    Case("io", "window_gather", "fwd", (("plain", FP32), ("engine", FP32)), ("plain",),
         {"B": 4096, "P": 11, "C": 144, "H": 512, "W": 512}, {"B": 32, "P": 5, "C": 8, "H": 16, "W": 16}, ("cpu",)),
    Case("train", "umd_step", "fwd+bwd", _STEP, ("plain",), {"B": 256, "P": 11, "C": 145}, {"B": 12, "P": 5, "C": 10}),
    Case("train", "flc_step", "fwd+bwd", _STEP, ("plain",), {"B": 64, "P": 11, "C": 145, "K": 15},
         {"B": 10, "P": 5, "C": 10, "K": 4}),
    *(
        # The scene has eight times the bytes that its windows may take: every step reads all of it.
        Case("train", "umd_step_fed", "fwd+bwd", (("resident", dtype), ("disk", dtype)), ("resident",),
             {"B": 256, "P": 11, "C": 145, "H": 512, "W": 512}, {"B": 12, "P": 5, "C": 10, "H": 40, "W": 40})
        for dtype in (FP32, BF16)
    ),
    Case("infer", "predict", "fwd", _STEP, ("plain",), {"H": 32, "W": 32, "P": 11, "C": 145, "K": 15},
         {"H": 12, "W": 12, "P": 5, "C": 10, "K": 4}),
)  # fmt: skip


def select(suite: str, device: str, quick: bool = False) -> list[tuple[Case, Mapping[str, int]]]:
    """The cases of ``suite`` (or ``all``) for a device type, each with its shape. Raises :class:`UsageError`."""
    known = (*SUITES, CURVES, "all")
    if suite not in known:
        raise UsageError(f"there is no bench suite {suite!r}{nearest(suite, known)}; there is: {', '.join(known)}")
    chosen, seen = [], set()
    for case in CASES:
        sizes = case.quick if quick else case.sizes
        key = (case.name, case.mode, case.variants, tuple(sizes.items()))
        if suite in ("all", case.suite) and device in case.devices and key not in seen:
            seen.add(key)
            chosen.append((case, sizes))
    return chosen
