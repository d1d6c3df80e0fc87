"""Contrastive losses with Triton kernels that others publish on the package index, called as their pages say.

None of them is a dependency: install ``inf-cl`` or ``memeff`` beside torch to see them in the table. Both know CUDA and
pairs only, an image and a text each. ``inf-cl`` (Cheng et al. 2024, "Breaking the Memory Barrier") multiplies float32
copies in TF32. ``memeff`` takes the temperature as a number and gives no gradient for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiffclip.bench.setups import SkipCase

PUBLISHED = ("inf-cl", "memeff")
Loss = Callable[..., Tensor]


def published_loss(impl: str, device: torch.device, logit_scale: float) -> Loss:
    """Eq. 16 over pairs: a function of images and texts, of ``inf-cl`` also of the logit scale.

    Raises:
        SkipCase: it cannot run on ``device``. ModuleNotFoundError: the package is not installed.
    """
    if device.type != "cuda":
        raise SkipCase(f"the kernels of {impl} need a CUDA device")
    if impl == "inf-cl":
        return _inf_cl()
    from memeff import MemoryEfficientCLIPLoss

    # stable=False: the gradient as the equations have it, not rescaled.
    loss: Loss = MemoryEfficientCLIPLoss(temperature=1 / logit_scale, stable=False)
    return loss


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        z, t = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        width = min(256, z.shape[1])  # of the pieces that the width is cut into, a power of two
        both = (cal_flash_loss(a, b, scale=logit_scale, head_dim=width) for a, b in ((z, t), (t, z)))
        return sum((half.mean() for half in both), torch.zeros((), device=image.device)) / 2

    return loss


def leaves_of(impl: str, image: Tensor, text: Tensor, logit_scale: Tensor) -> list[Tensor]:
    """The arguments of :func:`published_loss`, those that it is differentiated by."""
    return [image, text, logit_scale] if impl == "inf-cl" else [image, text]
