"""Where the tokens of a window lie on the flat pixel axis of the scenes, as helpers of the kernels.

Pixel indices are int64: a scene may have more than 2**31 pixels. All indices are clamped to what there is; on a GPU
nobody checks centres, since that would wait for the device, and a wrong one must not read beyond the scene.

Suffix: T tokens, or slots of tokens, in whatever number they are asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamp(value, high):
    """``value`` moved into [0, high]; 0 where ``high`` is negative."""
    return tl.maximum(tl.minimum(value, high), 0)


@triton.jit
def token_pixels(
    token_T,
    row,
    centres,
    extents,
    valid,
    scenes,
    pixel_count,
    WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Flat pixel (int64) that each token of window ``row`` reads, and whether the token is valid.

    Neighbours beyond the edge are clamped to it; an invalid neighbour reads as the centre pixel. A handful of
    operations per token, done once per program: never per channel.
    """
    scene = clamp(tl.load(centres + 3 * row), scenes - 1)
    centre_y, centre_x = tl.load(centres + 3 * row + 1), tl.load(centres + 3 * row + 2)
    first, height, width = (
        tl.load(extents + 3 * scene),
        tl.load(extents + 3 * scene + 1),
        tl.load(extents + 3 * scene + 2),
    )
    y_T = clamp(centre_y + token_T // WINDOW - WINDOW // 2, height - 1)
    x_T = clamp(centre_x + token_T % WINDOW - WINDOW // 2, width - 1)
    pixel_T = clamp(first + y_T * width + x_T, pixel_count - 1)
    valid_T = token_T >= 0
    if HAS_VALID:
        own = clamp(first + clamp(centre_y, height - 1) * width + clamp(centre_x, width - 1), pixel_count - 1)
        byte_T = tl.load(valid + (pixel_T >> 3)).to(tl.int32)
        valid_T = ((byte_T >> (pixel_T & 7).to(tl.int32)) & 1) != 0
        pixel_T = tl.where(valid_T, pixel_T, own)
    return pixel_T, valid_T


@triton.jit
def normalised(pixels, scale, offset, pixel, channel, live, CHANNELS: tl.constexpr):
    """Values ``stored * scale + offset`` (float32) of flat pixels and channels; 0, nothing read, where not ``live``."""
    stored = tl.load(pixels + pixel * CHANNELS + channel, mask=live, other=0).to(tl.float32)
    return tl.fma(
        stored, tl.load(scale + channel, mask=live, other=0.0), tl.load(offset + channel, mask=live, other=0.0)
    )
