"""Answer-targeted flow over the mean attention map of a sequence [Dong 2026, FlowTracer], arXiv 2606.10646.

The map A is the mean over the recorded layers and all their heads. Tokens are nodes; edge i -> k (i < k) weighs
W_ik = A[k, i]; every answer token has an edge of weight 1 to a virtual sink. How much of token i reaches the answer is

    h(i) = [i is an answer token] + sum over k > i of W_ik h(k).

Edges are reweighted to W'_ik = W_ik h(k) / h(i), so that what leaves a token adds up to what entered it; unit flow
enters at the question and f(k) = s(k) + sum over i < k of f(i) W'_ik passes through token k.

Two triangular solves with the raw map: with L the part of A below the diagonal, h = c + L^T h, and u = f / h obeys
u(k) = s(k) / h(k) + sum over i < k of A[k, i] u(i), which is u = s / h + L u. All terms are positive: nothing cancels.

We choose, where the paper is open:

- Self edges A[i, i] are dropped and rows are not renormalised: the paper's edges have i < k.
- All edges count, those within the prompt too. Prompt tokens share the unit flow evenly (`s` is 1 / prompt tokens), so
  that f is the share of all flow that passes a token. The ranking is that of one unit each.
- A prompt token from which no edge leads to the answer injects nothing: the flow that reaches the sink is the share of
  prompt tokens that are connected. Tokens that cannot reach the answer, those after it among them, have flow 0.
- An empty answer or an empty prompt gives flow 0 everywhere.
- `threshold` is 0 by default: no edge is cut. A dense solve costs the same, and any fixed threshold means another thing
  at another length.

Range: h(i) is the sum over answer tokens of the probability that a walk from there back along the rows (which add up to
at most 1) visits i. So h never exceeds the number of answer tokens, but it can shrink geometrically where only near
edges lead on (a sliding window, a threshold). So every tile of h has its own power of two, and the solves are exact in
fp32 as long as h spans less than 2^100 within one tile of 128 tokens; what is smaller counts as unable to reach.

Cost: the map of n tokens takes n^2 bytes in bf16 (2 bytes an element, only tiles on or below the diagonal), from the
first recorded layer to the last; beside it a workspace of `WORKSPACE` elements, twice, in fp32. Measured on an
H100: 8192 tokens, 32 heads, 5 layers take 0.20 s (map 0.12, solves 0.08) and 414 MiB (`benchmarks/results/flow.json`).

Shape legend: [T] tokens of the packed batch, [B] sequences, [b, n] a group of b sequences padded to n tokens, [N] tiles
of m x m, strip i being the i + 1 tiles of rows i m to (i + 1) m, [Hq] query heads, [Hkv] key heads, [G] = Hq / Hkv,
[D] head channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

from .bounds import check_starts
from .ragged import Layout, Offsets, as_ints, layout_of

TILE = 128
WORKSPACE = {"cpu": 1 << 21, "cuda": 1 << 25}  # elements of the logits that are held at once
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_LEAST = 2.0**-100  # of a tile's h beside its largest: 1 / h must stay finite in fp32
_EMPTY = -(1 << 24)  # exponent of a tile of zeros
_WIDEST = 126  # largest power of two that fp32 has on either side


@dataclass(frozen=True)
class FlowOptions:
    """How the flow is computed.

    Attributes:
        threshold: edges of the mean map that weigh this or less are cut; 0 cuts none.
        storage: type of the stored map. Each layer that is added rounds to it once: 2^-9 relative in `bfloat16`.
        tile: tokens of a tile's side.

    Raises:
        ValueError: a bound is not met.
    """

    threshold: float = 0.0
    storage: str = "bfloat16"
    tile: int = TILE

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must be at least 0 and below 1, the most an edge can weigh")
        if self.storage not in TYPES:
            raise ValueError(f"storage={self.storage!r} must be one of {', '.join(TYPES)}")
        if self.tile < 1:
            raise ValueError(f"tile={self.tile} must be at least 1")


class FlowMap:
    """The mean attention map of each sequence of a packed batch, gathered layer by layer, and at last the flow over it.

    Attributes:
        flow: [T] fp32 on the device of q, through every token, prompts too; None until the last layer was added. The
            map is let go then.
    """

    def __init__(
        self,
        cu_seqlens: Offsets,
        response_starts: Offsets,
        answers: Sequence[tuple[int, int]],
        layers: int,
        options: FlowOptions | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            cu_seqlens: [B+1] integers on the CPU, sequence b is tokens cu_seqlens[b] to cu_seqlens[b+1].
            response_starts: [B] integers on the CPU, index in the packed batch of each first response token.
            answers: B pairs, index in the packed batch of an answer's first token and the one after its last; twice the
                same where there is no answer.
            layers: how many `add` will be called for.
            options: how it is computed.

        Raises:
            ValueError: fewer than one layer, or an answer that lies outside its response.
        """
        if layers < 1:
            raise ValueError(f"layers={layers} must be at least 1")
        self.cu_seqlens, starts = as_ints(cu_seqlens), as_ints(response_starts)
        check_starts(self.cu_seqlens, starts)
        self.places = list(zip(pairwise(self.cu_seqlens), starts, answers, strict=True))
        for b, ((_, end), start, (first, last)) in enumerate(self.places):
            if not start <= first <= last <= end:
                raise ValueError(f"the answer of sequence {b}, tokens {first} to {last}, is not in {start} to {end}")
        self.layers, self.options = layers, options or FlowOptions()
        self.flow: Tensor | None = None
        self._added = 0
        self._tiles: list[Tensor] = []  # a group each: [N, b, m, m]

    @torch.no_grad()
    def add(self, q: Tensor, k: Tensor, *, scale: float, sliding_window: int | None = None) -> None:
        """Add a layer from its q [T, Hq, D] and k [T, Hkv, D] after RoPE; arguments as in `attention_statistics`.

        Raises:
            ValueError: all layers were added, or q and the offsets do not fit together.
        """
        if self._added == self.layers:
            raise ValueError(f"all {self.layers} layers of this map were added")
        layout = layout_of(self.cu_seqlens, len(q), q.device)
        if not self._tiles:
            self._tiles = [self._empty(len(g), layout.lengths[g[0]], q.device) for g in layout.groups]
        share = 1 / (self.layers * q.shape[1])
        for tiles, q_group, k_group in zip(self._tiles, layout.pad(q), layout.pad(k), strict=True):
            _add_layer(tiles, q_group, k_group, scale, sliding_window, share)
        self._added += 1
        if self._added == self.layers:
            self.flow = self._solve(layout)

    def _empty(self, b: int, n: int, device: torch.device) -> Tensor:
        m = min(self.options.tile, n)
        rows = -(-n // m)
        return torch.zeros(rows * (rows + 1) // 2, b, m, m, dtype=TYPES[self.options.storage], device=device)

    def _solve(self, layout: Layout) -> Tensor:
        """Flow through every token [T], group by group, whose maps are let go one by one."""
        flows = []
        for group in layout.groups:
            tiles = self._tiles.pop(0)
            if self.options.threshold:
                threshold(tiles, self.options.threshold, 0.0, inplace=True)
            source, target = torch.zeros(2, len(group), layout.lengths[group[0]])
            for row, b in enumerate(group):
                (begin, _), start, (first, last) = self.places[b]
                source[row, : start - begin] = 1 / max(start - begin, 1)
                target[row, first - begin : last - begin] = 1.0
            flows.append(_flow(tiles, source.to(tiles.device), target.to(tiles.device)))
        return layout.unpad(flows)


def _strip(i: int) -> slice:
    """The tiles of strip i, from the first key to the diagonal."""
    return slice(i * (i + 1) // 2, (i + 1) * (i + 2) // 2)


def _add_layer(tiles: Tensor, q: Tensor, k: Tensor, scale: float, sliding_window: int | None, share: float) -> None:
    """Add `share` times the sum over heads of the maps of q [b, n, Hq, D], k [b, n, Hkv, D] to tiles [N, b, m, m]."""
    b, n, kv_heads, _ = k.shape
    heads, m = q.shape[2] // kv_heads, tiles.shape[-1]
    limit = WORKSPACE.get(q.device.type, WORKSPACE["cpu"])
    q = q.unflatten(2, (kv_heads, heads)).permute(0, 2, 3, 1, 4)  # [b, Hkv, G, n, D]
    k = k.transpose(1, 2)  # [b, Hkv, n, D]
    for i, row in enumerate(range(0, n, m)):
        end = min(row + m, n)
        first = 0 if sliding_window is None else max(0, row - sliding_window + 1) // m  # tile of the first visible key
        key = first * m
        t, s = torch.arange(row, end, device=q.device), torch.arange(key, end, device=q.device)
        hidden = t[:, None] < s
        if sliding_window is not None:
            hidden |= t[:, None] - s >= sliding_window
        masked = slice(row - key if sliding_window is None else 0, None)  # keys that some row must not see
        one = heads * (end - row) * (end - key)  # elements of a key head
        sequences = max(1, limit // (one * kv_heads))
        at_once = max(1, min(kv_heads, limit // one))
        for part in (slice(c, c + sequences) for c in range(0, b, sequences)):
            total = torch.zeros(len(range(b)[part]), end - row, end - key, device=q.device)
            for some in (slice(c, c + at_once) for c in range(0, kv_heads, at_once)):
                logits = _logits(q[part, some, :, row:end], k[part, some, key:end], scale)  # [b, *, G, r, j]
                logits[..., masked].masked_fill_(hidden[:, masked], -torch.inf)
                total += torch.softmax(logits, -1).sum((1, 2))
                del logits
            strip = pad(total.mul_(share), (0, m * (i + 1) - end)).unflatten(2, (-1, m))  # [b, r, j/m, m]
            tiles[_strip(i)][first:, part, : end - row].add_(strip.permute(2, 0, 1, 3))


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[b, H, G, r, j] fp32 from q [b, H, G, r, D] and k [b, H, j, D]."""
    shape = (*q.shape[:4], k.shape[2])
    q, k = q.flatten(0, 1).flatten(1, 2), k.flatten(0, 1).transpose(1, 2)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):  # tensor cores, fp32 sums that are not rounded back
        return torch.bmm(q, k, out_dtype=torch.float32).mul_(scale).view(shape)
    return torch.bmm(q.float() * scale, k.float()).view(shape)


def _flow(tiles: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """f [b, n] fp32 from the map, what enters at each token and the answer's tokens, [b, n] each."""
    n, m = source.shape[1], tiles.shape[-1]
    source, target = (pad(x, (0, -n % m)).unflatten(1, (-1, m)).transpose(0, 1) for x in (source, target))
    h, exponent = _reach(tiles, target)
    return _throughput(tiles, source, h, exponent).transpose(0, 1).flatten(1)[:, :n]


def _reach(tiles: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """h = c + L^T h from the last strip to the first: h [n/m, b, m] times 2 to the power of exponent [n/m, b]."""
    h, exponent = _scaled(target, torch.zeros_like(target[..., 0], dtype=torch.int64))
    for i in reversed(range(len(h))):
        strip = tiles[_strip(i)].float()  # [i+1, b, m, m]
        own = torch.linalg.solve_triangular(-strip[i].mT, h[i, ..., None], upper=True, unitriangular=True)[..., 0]
        h[i], exponent[i] = _scaled(own, exponent[i])
        h[i] *= h[i] >= _LEAST
        if i == 0:
            break
        earlier, power = _scaled((strip[:i].mT @ h[i, ..., None])[..., 0], exponent[i].expand(i, -1))
        top = torch.maximum(exponent[:i], power)
        earlier = _times(h[:i], exponent[:i] - top) + _times(earlier, power - top)
        h[:i], exponent[:i] = _scaled(earlier, top)
    return h, exponent


def _throughput(tiles: Tensor, source: Tensor, h: Tensor, exponent: Tensor) -> Tensor:
    """f = u h [n/m, b, m] from u = s / h + L u, first strip to last; a tile's u is kept times the power of its h."""
    u = torch.where(h > 0, source / h, 0.0)
    for i in range(len(u)):
        strip = tiles[_strip(i)].float()
        inflow = (strip[:i] @ u[:i, ..., None])[..., 0]  # [i, b, m]
        # Where the power is large, the edges are at least as small: A[k, i] h(k) is part of h(i).
        own = u[i] + _times(inflow, (exponent[i] - exponent[:i]).clamp(max=_WIDEST)).sum(0)
        own = torch.where(h[i] > 0, own, 0.0)  # what leads nowhere knows no such bound
        own = torch.linalg.solve_triangular(-strip[i], own[..., None], upper=False, unitriangular=True)[..., 0]
        u[i] = torch.where(h[i] > 0, own, 0.0)
    return u * h


def _scaled(values: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The same values [..., m] with their largest in [0.5, 1): [..., m] and exponent [...]."""
    largest = values.amax(-1)
    power = torch.frexp(largest).exponent.long().clamp(min=-_WIDEST)
    return _times(values, -power), torch.where(largest > 0, exponent + power, _EMPTY)


def _times(values: Tensor, power: Tensor) -> Tensor:
    """values [..., m] times 2 to the power [...]; 0 where that is below fp32's range."""
    return values * torch.exp2(power.clamp(min=-2 * _WIDEST).float())[..., None]
