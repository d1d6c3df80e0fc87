"""Philox 4x32-10 and the normals drawn from it, as helpers of the kernels. Counter and key: ``kernels/philox.py``.

Suffixes: L tokens of a window; everything else here has whatever shape it is given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdiffclip.kernels.philox import MASK, NOISE

_MASK, _NOISE = tl.constexpr(MASK), tl.constexpr(NOISE)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words (uint32) of counters and keys (uint32); arguments broadcast.

    ``tl.philox`` gives the same words but takes the halves of a product apart: IMAD.HI and IMAD, where one 64-bit
    product is one IMAD.WIDE. The keys of all rounds are scalars and stay outside the caller's loop.
    """
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def mask_words(token, position, k0, k1):
    """Word that decides whether a token is visible; ``token`` (uint32) carries the modality in its upper half."""
    purpose = tl.full([], _MASK, tl.uint32)
    word, _, _, _ = philox(tl.zeros_like(token), token, position, purpose, k0, k1)
    return word


@triton.jit
def radius_of(word):
    """``sqrt(-2 ln u)`` for ``u = ((word >> 8) + 1) / 2**24`` in (0, 1].

    The hardware's logarithm has an absolute error of 2**-22 about u = 1, where the radius needs a relative one. So:
    u = 2**e (1 + z), 1 + z in [sqrt(1/2), sqrt(2)), which is exact, and ln(1 + z) = z - z**2 / 2 + z**3 p(z).
    Every product that is added to something is a written ``fma``: what the compiler may not contract, it cannot
    contract differently for another tile.
    """
    u = ((word >> 8) + 1).to(tl.int32, bitcast=True).to(tl.float32) * 5.9604644775390625e-08
    shifted = u.to(tl.uint32, bitcast=True) - 0x3F3504F3
    e = (shifted.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    z = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(z, -0.07634492963552475, 0.12761574983596802)
    p = tl.fma(p, z, -0.13160182535648346)
    p = tl.fma(p, z, 0.14201758801937103)
    p = tl.fma(p, z, -0.16623356938362122)
    p = tl.fma(p, z, 0.20001226663589478)
    p = tl.fma(p, z, -0.2500081956386566)
    p = tl.fma(p, z, 0.3333333134651184)
    p = tl.fma(p, z, -0.5)
    # ln 2 in two parts, the first of so few bits that its product with e is exact.
    ln = tl.fma(e, 0.693359375, z + tl.fma(e, -2.12194440e-4, z * z * p))
    return tl.sqrt(-2.0 * ln)  # approximate on a GPU: within 2**-23, which the error budget holds


@triton.jit
def turn_of(word):
    """Cosine and sine of ``2 pi k / 2**24`` for ``k = int32(word) >> 8``."""
    k = word.to(tl.int32, bitcast=True) >> 8
    quarter = (k + (1 << 21)) >> 22  # the nearest; the rest, in [-1/8, 1/8) turns, is exact
    y = (k - (quarter << 22)).to(tl.float32) * 5.9604644775390625e-08
    yy = y * y
    s = tl.fma(yy, -75.3938217163086, 81.59236145019531)
    s = tl.fma(s, yy, -41.3416633605957)
    s = tl.fma(y, 6.2831854820251465, y * yy * s)
    c = tl.fma(yy, 59.24617004394531, -85.4437484741211)
    c = tl.fma(c, yy, 64.93932342529297)
    c = tl.fma(c, yy, -19.739208221435547)
    c = tl.fma(c, yy, 1.0)
    odd = (quarter & 1) != 0
    cosine_sign = ((quarter + 1) & 2).to(tl.uint32, bitcast=True) << 30
    sine_sign = (quarter & 2).to(tl.uint32, bitcast=True) << 30
    cosine = (tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ cosine_sign).to(tl.float32, bitcast=True)
    sine = (tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ sine_sign).to(tl.float32, bitcast=True)
    return cosine, sine


@triton.jit
def normals(quad, token, position, k0, k1, WANTED: tl.constexpr):
    """The first ``WANTED`` (1, 2 or 4) of the four normals of channels ``4 quad ..``, on a new last axis."""
    purpose = tl.full([], _NOISE, tl.uint32)
    w0, w1, w2, w3 = philox(quad, token, position, purpose, k0, k1)
    radius = radius_of(w0)
    cosine, sine = turn_of(w1)
    if WANTED == 1:
        eps = tl.expand_dims(radius * cosine, -1)
    elif WANTED == 2:
        eps = tl.join(radius * cosine, radius * sine)
    else:
        other_radius = radius_of(w2)
        other_cosine, other_sine = turn_of(w3)
        cosines = tl.join(radius * cosine, other_radius * other_cosine)
        sines = tl.join(radius * sine, other_radius * other_sine)
        eps = tl.reshape(tl.join(cosines, sines), quad.shape + [4])
    return eps
