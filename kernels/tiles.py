"""What the Triton kernels share: where tiles lie in memory, and exponents from their products."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1e34)  # product of a row with a key it may not see; its exp2 is 0 and 0 * HIDDEN finite
UNSEEN = tl.constexpr(-1e20)  # running maximum before the first key: above every hidden exponent, below every other


@triton.jit
def load_tile(base, offsets, seen, DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr = True):
    """[M, BLOCK_D] vectors at `base` + `offsets` [M] int32, 0 in channels from DIM on and where not `seen` [M].

    A scalar base and small offsets, as 64-bit addresses of every vector would fill the registers. Unchecked tiles must
    lie inside the batch.
    """
    d = tl.arange(0, BLOCK_D)
    at = base + (offsets[:, None] + d[None, :])
    if CHECKED:
        return tl.load(at, mask=seen[:, None] if DIM == BLOCK_D else seen[:, None] & (d < DIM)[None, :], other=0.0)
    if DIM == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(d < DIM)[None, :], other=0.0)


@triton.jit
def advance(base, n, stride):
    """`base` moved on by `n` tokens."""
    return base + tl.cast(n, tl.int64) * stride


@triton.jit
def cap(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Products q·k to what `exponent` turns into exponents of 2: softcap * tanh(x * scale / softcap), or x itself."""
    if HAS_SOFTCAP:
        x = softcap * (1 - 2 / (tl.exp2(x * (2 * scale / softcap * LOG2E)) + 1))
    return x


@triton.jit
def exponent(scale, HAS_SOFTCAP: tl.constexpr):
    """The factor left to apply after `cap`: apart, as it then fuses with the subtraction of the row's maximum."""
    return LOG2E + 0 * scale if HAS_SOFTCAP else scale * LOG2E
