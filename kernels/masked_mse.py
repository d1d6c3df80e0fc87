"""The restoration loss of UMD against windows read straight from the scene (DiffCLIP, eq. 9)."""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, reference
from fastdiffclip.kernels.flat_scene import FlatScene
from fastdiffclip.kernels.visible_noise import check_count, unsupported_window

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def masked_mse(
    prediction: Tensor,
    scene: FlatScene,
    centres: Tensor,
    ids: Tensor,
    *,
    window: int,
    masked_weight: float = 1.0,
    visible_weight: float = 1.0,
    valid_rows: Tensor | None = None,
    total_rows: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Weighted mean squared error of restored windows.

    Per window: ``w_m (|masked| / L) mean_masked + w_v (|visible| / L) mean_visible``, the means over tokens that are
    valid in the scene and over channels; then the sum over rows divided by ``total_rows``. Micro-batches and ranks
    that share ``total_rows`` therefore add up to the loss of the whole batch.

    Args:
        prediction: ``(B, L, C)`` restored clean windows, float.
        scene: one modality of the scenes; the target is read from it.
        centres: ``(B, 3)`` int64 (scene, row, column).
        ids: ``(B, V)`` int32 visible token ids, each at most once; checked on the CPU, where reading them is free.
        window: side P of the window, odd; L = P * P.
        masked_weight, visible_weight: w_m and w_v.
        valid_rows: scalar int64 tensor; rows from there on are padding and weigh nothing. None: all rows count.
        total_rows: scalar int64 tensor, the divisor; None for ``valid_rows``.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        Scalar float32 loss (float64 for a float64 prediction), differentiable with respect to ``prediction``.

    Raises:
        UsageError: an argument does not fit the others.
    """
    scene.check_centres(centres)
    expected = (len(centres), window * window, scene.channels)
    if tuple(prediction.shape) != expected or not prediction.is_floating_point():
        raise UsageError(
            f"prediction must be a floating tensor of shape {expected}; "
            f"got {prediction.dtype} {tuple(prediction.shape)}"
        )
    if ids.ndim != 2 or ids.shape[0] != len(centres) or ids.dtype != torch.int32 or ids.shape[1] > expected[1]:
        raise UsageError(f"ids must be a ({len(centres)}, V) int32 tensor, V <= L; got {tuple(ids.shape)} {ids.dtype}")
    for name, tensor in (("prediction", prediction), ("ids", ids)):
        if tensor.device != scene.device:
            raise UsageError(f"{name} must be on {scene.device} like the scene; it is on {tensor.device}")
    check_count("valid_rows", valid_rows, scene.device)
    check_count("total_rows", total_rows, scene.device)
    run = dispatch.pick("masked_mse", impl, scene.device, _unsupported(prediction, window))
    return run(
        prediction,
        scene,
        centres,
        ids,
        window=window,
        masked_weight=float(masked_weight),
        visible_weight=float(visible_weight),
        valid_rows=valid_rows,
        total_rows=total_rows,
    )


def _unsupported(prediction: Tensor, window: int) -> dict[str, str]:
    reasons = unsupported_window(window)
    if prediction.dtype not in NATIVE_DTYPES:
        reasons["native"] = f"it takes predictions in float32 and bfloat16, not {prediction.dtype}"
    if prediction.dtype == torch.float64:
        reasons["triton"] = "it computes in float32, the prediction is float64"
    return reasons


def _check_values(scene: FlatScene, centres: Tensor, ids: Tensor, window: int) -> None:
    """On the CPU, raise :class:`UsageError` for a centre outside the scenes or ids that are no choice of tokens."""
    scene.check_centres_inside(centres)
    if ids.device.type != "cpu" or not ids.numel():
        return
    ordered = ids.sort(dim=1).values
    wrong = (ordered[:, 0] < 0) | (ordered[:, -1] >= window**2) | (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if bool(wrong.any()):
        raise ids_wrong(int(wrong.nonzero()[0]), window)


def ids_wrong(row: int, window: int) -> UsageError:
    """The error that names a row of ids."""
    return UsageError(
        f"ids of row {row} must be different numbers in 0..{window**2 - 1}, "
        "as visible_noise returns them; one is out of range or stands there twice"
    )


def _reference(prediction: Tensor, scene: FlatScene, centres: Tensor, ids: Tensor, **settings: Any) -> Tensor:
    if not torch.compiler.is_compiling():
        _check_values(scene, centres, ids, settings["window"])
    return reference.masked_mse(prediction, scene, centres, ids, **settings)


def _run(impl: str, prediction: Tensor, scene: FlatScene, centres: Tensor, ids: Tensor, **settings: Any) -> Tensor:
    with_grad = torch.is_grad_enabled() and prediction.requires_grad
    if torch.compiler.is_compiling() or type(prediction) not in (Tensor, torch.nn.Parameter):
        return _op(prediction, *scene.tensors, centres, ids, **settings, with_grad=with_grad, impl=impl)[0]
    if with_grad:
        return _MaskedMse.apply(prediction, scene, centres, ids, settings, impl)
    return _launch(impl, prediction, scene, centres, ids, **settings, with_grad=False)[0]


def _launch(
    impl: str, prediction: Tensor, scene: FlatScene, centres: Tensor, ids: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient, which is empty unless asked for."""
    if impl == "triton":  # the native library itself looks at the values
        _check_values(scene, centres, ids, settings["window"])
    found: tuple[Tensor, Tensor] = _launcher(impl).masked_mse(prediction, scene, centres, ids, **settings)
    return found


@functools.cache
def _launcher(impl: str) -> ModuleType:
    return import_module(f"fastdiffclip.kernels.{impl}.masked_mse")


class _MaskedMse(torch.autograd.Function):
    """The op without the dispatcher, and without a product: a loss that is summed as it is has the factor 1.

    What multiplies by the factor of the loss (on a GPU a kernel, which finds it on the device) then leaves the gradient
    alone. A product in every case would move as many bytes again as the loss and the gradient together.
    """

    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        scene: FlatScene,
        centres: Tensor,
        ids: Tensor,
        settings: dict[str, Any],
        impl: str,
    ) -> Tensor:
        loss, ctx.gradient = _launch(impl, prediction, scene, centres, ids, **settings, with_grad=True)
        ctx.save_for_backward(prediction)
        ctx.arguments = scene, centres, ids, settings, impl
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (prediction,), (scene, centres, ids, settings, impl) = ctx.saved_tensors, ctx.arguments
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # once more through a kept graph: the first gradient belongs to whoever got it
            gradient = _launch(impl, prediction, scene, centres, ids, **settings, with_grad=True)[1]
        return _launcher(impl).scale_in_place(gradient, grad_loss), None, None, None, None, None


@torch.library.custom_op("fastdiffclip::masked_mse", mutates_args=())
def _op(
    prediction: Tensor,
    pixels: Tensor,
    scale: Tensor,
    offset: Tensor,
    valid: Tensor | None,
    extents: Tensor,
    centres: Tensor,
    ids: Tensor,
    window: int,
    masked_weight: float,
    visible_weight: float,
    valid_rows: Tensor | None,
    total_rows: Tensor | None,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """What a graph holds: loss and its gradient, which is empty unless asked for."""
    return _launch(
        impl,
        prediction,
        FlatScene(pixels, scale, offset, valid, extents),
        centres,
        ids,
        window=window,
        masked_weight=masked_weight,
        visible_weight=visible_weight,
        valid_rows=valid_rows,
        total_rows=total_rows,
        with_grad=with_grad,
    )


@_op.register_fake
def _(
    prediction: Tensor,
    pixels: Tensor,
    scale: Tensor,
    offset: Tensor,
    valid: Tensor | None,
    extents: Tensor,
    centres: Tensor,
    ids: Tensor,
    window: int,
    masked_weight: float,
    visible_weight: float,
    valid_rows: Tensor | None,
    total_rows: Tensor | None,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    loss = prediction.new_empty((), dtype=torch.float32)
    return loss, prediction.new_empty(prediction.shape if with_grad else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return gradient * grad_loss, *(None,) * 14


_op.register_autograd(_differentiate, setup_context=_save)

dispatch.register(
    "masked_mse",
    {
        "reference": _reference,
        "native": functools.partial(_run, "native"),
        "triton": functools.partial(_run, "triton"),
    },
)
