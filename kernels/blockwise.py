"""The torch path of the attention statistics: any device, blocks of query rows, many sequences at once.

Shape legend: [T] tokens of the packed batch, [b, n] a group of b sequences padded to n tokens, [m] query rows
of a block, [j] the keys they can see, [Hq] query heads, [Hkv] key heads, [G] = Hq / Hkv, [D] head channels, [F] fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ragged import Layout

if TYPE_CHECKING:
    from .statistics import AttentionVariant, StatisticsOptions

FIELDS = ("lse", "span", "waad", "fai", "entropy", "sink_mass")

# Logits held at once: 2 MiB of fp32 stays in a CPU's cache, a GPU wants longer runs. Few rows waste little above the
# diagonal.
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
BLOCK_ROWS = 32

# Logit of a hidden key: exp gives 0 exactly, and 0 * HIDDEN stays finite, which -inf would not.
HIDDEN = -1e30


def blockwise_statistics(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    prompts: list[int],
    options: StatisticsOptions,
    variant: AttentionVariant,
    lse: Tensor | None = None,
) -> dict[str, Any]:
    """Statistics by name, each [Hq, T] fp32; see `attention_statistics` for arguments and definitions.

    `prompts` are the B prompt lengths in tokens. Peak memory is a few times `BLOCK_ELEMENTS` beside O(T).
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    elements = BLOCK_ELEMENTS.get(q.device.type, BLOCK_ELEMENTS["cpu"])
    given = [None] * len(layout.groups) if lse is None else layout.pad(lse.T)  # [b, n, Hq] each
    # cuBLAS adds the products of a long fp32 row one after the other, and loses a digit that statistics should keep.
    precise = torch.float64 if q.is_cuda and q.dtype == torch.float32 else torch.float32
    padded = []
    for group, q_group, k_group, lse_group in zip(layout.groups, layout.pad(q), layout.pad(k), given, strict=True):
        b, n = q_group.shape[:2]
        reach = n if lse is None else min(n, _band(options, n) + BLOCK_ROWS)  # keys of a row
        m = max(1, min(BLOCK_ROWS, n, elements // (heads * reach)))
        at_once = max(1, elements // (heads * reach * m))
        lengths = torch.tensor([layout.lengths[i] for i in group], device=q.device)
        starts = torch.tensor([prompts[i] for i in group], device=q.device)
        out = torch.zeros(len(FIELDS), b, heads, n, device=q.device)
        for part in (slice(i, i + at_once) for i in range(0, b, at_once)):
            q_part = q_group[part].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [b, Hkv, G, n, D]
            k_part = k_group[part].transpose(1, 2).flatten(0, 1).to(precise)  # [b*Hkv, n, D]
            first = min(prompts[i] for i in group[part])  # rows before it are prompt in every sequence
            for row in range(first, layout.lengths[group[part][0]], m):
                block = Block(row, q_part[..., row : row + m, :].to(precise), k_part, starts[part], lengths[part])
                if lse_group is None:
                    _full_block(out[:, part], block, options, variant)
                else:
                    level = lse_group[part, row : row + m].transpose(1, 2).float()
                    _banded_block(out[:, part], block, options, variant, level)
        s = torch.arange(n, device=q.device)
        last = lengths[:, None] - 1  # [b, 1]
        if options.fai_high is not None:
            last = torch.minimum(last, s + options.fai_high)
        out[FIELDS.index("fai")] /= (last - (s + options.fai_low) + 1).clamp(min=1)[:, None]
        out *= (s >= starts[:, None])[None, :, None]
        padded.append(out.permute(1, 3, 0, 2))  # [b, n, F, Hq]
    fields = layout.unpad(padded).permute(1, 2, 0).contiguous()  # [F, Hq, T]
    found: dict[str, Any] = dict(zip(FIELDS, fields, strict=True))
    return found if lse is None else found | {"lse": lse, "span": None, "entropy": None}


@dataclass(frozen=True)
class Block:
    """Query rows from `row` of b sequences, q [b, Hkv, G, m, D], and all keys k [b*Hkv, n, D], fp32 or fp64.

    `starts` and `lengths` [b] say which rows are responses.
    """

    row: int
    q: Tensor
    k: Tensor
    starts: Tensor
    lengths: Tensor

    @property
    def rows(self) -> slice:
        """The block's rows in a sequence."""
        return slice(self.row, self.row + self.q.shape[3])

    def positions(self, key: int) -> tuple[Tensor, Tensor]:
        """Rows t [m] and keys s [j] from `key` to the diagonal."""
        end = self.rows.stop
        return torch.arange(self.row, end, device=self.q.device), torch.arange(key, end, device=self.q.device)

    def logits(self, key: int, variant: AttentionVariant) -> Tensor:
        """[b, Hq, m, j] fp32 against the keys from `key` to the diagonal, HIDDEN where a row may not see one."""
        b, kv_heads, group, m, _ = self.q.shape
        t, s = self.positions(key)
        distance = t[:, None] - s
        hidden = distance < 0
        if variant.sliding_window is not None:
            hidden |= distance >= variant.sliding_window
        bias = torch.zeros(hidden.shape, dtype=self.q.dtype, device=s.device).masked_fill_(hidden, HIDDEN)
        logits = torch.baddbmm(
            bias.repeat(group, 1).expand(b * kv_heads, -1, -1),
            self.q.reshape(b * kv_heads, group * m, -1),
            self.k[:, key : self.rows.stop].transpose(1, 2),
            alpha=variant.scale,
        )
        logits = logits.float().view(b, kv_heads * group, m, -1)
        if variant.softcap is not None:
            logits.div_(variant.softcap).tanh_().mul_(variant.softcap).masked_fill_(hidden, HIDDEN)
        return logits

    def first_logits(self, variant: AttentionVariant) -> Tensor:
        """[b, Hq, m] fp32 against the sequence's first key, HIDDEN where a row may not see it."""
        first = self.k[:, 0].view(*self.q.shape[:2], 1, 1, -1)
        logits = torch.linalg.vecdot(self.q, first).float().flatten(1, 2) * variant.scale
        if variant.softcap is not None:
            logits = (logits / variant.softcap).tanh() * variant.softcap
        if variant.sliding_window is not None:
            logits[..., max(0, variant.sliding_window - self.row) :] = HIDDEN
        return logits


def _full_block(out: Tensor, block: Block, options: StatisticsOptions, variant: AttentionVariant) -> None:
    """A block's statistics from nothing but q and k, into its part of out [F, b, Hq, n]."""
    key = 0 if variant.sliding_window is None else max(0, block.row - variant.sliding_window + 1)
    t, s = block.positions(key)
    logits = block.logits(key, variant)
    kept_logits = logits.masked_fill(s < options.sink_tokens, HIDDEN) if options.sink_tokens else None

    lse, span, waad, fai, entropy, sink_mass = out
    reach = (t[:, None] - s).float()
    shifted, peak, weight, keys_mass = _softmax(logits)
    mass = keys_mass
    if variant.sinks is not None:
        mass = mass + (variant.sinks.float()[:, None] - peak).exp()
    share = keys_mass / mass  # of the keys, less than 1 only with learned sinks
    lse[..., block.rows] = peak + mass.log()
    waad[..., block.rows] = torch.linalg.vecdot(weight, reach.clamp(max=options.waad_window)) / mass
    entropy[..., block.rows] = share * mass.log() - torch.linalg.vecdot(weight, shifted) / mass
    if key == 0:
        sink_mass[..., block.rows] = weight[..., 0] / mass

    if kept_logits is not None:
        _, _, weight, mass = _softmax(kept_logits)
    has_keys = t >= options.sink_tokens
    span[..., block.rows] = torch.linalg.vecdot(weight, reach) / mass * has_keys
    _add_fai(fai, block, weight, has_keys / mass, key, options)


def _banded_block(
    out: Tensor, block: Block, options: StatisticsOptions, variant: AttentionVariant, level: Tensor
) -> None:
    """WAAD, FAI and sink mass of a block whose lse is `level` [b, Hq, m], from the bands alone."""
    key = max(0, block.row - _band(options, block.rows.stop))
    t, s = block.positions(key)
    weight = (block.logits(key, variant) - level[..., None]).exp()
    _, _, waad, fai, _, sink_mass = out
    distance = t[:, None] - s
    near = weight * (distance < options.waad_window)
    # Rows sum to one, so what is not near lies W or further away; exactly nothing where no key is that far.
    far = 1 - near.sum(-1)
    if variant.sinks is not None:
        far = far - (variant.sinks.float()[:, None] - level).exp()
    furthest = t if variant.sliding_window is None else t.clamp(max=variant.sliding_window - 1)
    far = far * (furthest >= options.waad_window)
    waad[..., block.rows] = torch.linalg.vecdot(near, distance.float()) + options.waad_window * far
    _add_fai(fai, block, weight, torch.ones_like(level), key, options)
    sink_mass[..., block.rows] = (block.first_logits(variant) - level).exp()


def _band(options: StatisticsOptions, length: int) -> int:
    """Keys behind the diagonal that WAAD's and FAI's bands reach in a sequence of `length` tokens."""
    return max(options.waad_window - 1, length if options.fai_high is None else options.fai_high)


def _add_fai(fai: Tensor, block: Block, weight: Tensor, norm: Tensor, key: int, options: StatisticsOptions) -> None:
    """Add a block's rows to fai [b, Hq, n], where they look back: weight [b, Hq, m, j] times norm [b, Hq, m]."""
    t, s = block.positions(key)
    distance = t[:, None] - s
    low, high = options.fai_low, block.rows.stop if options.fai_high is None else options.fai_high
    # Only keys that some row of the block can reach across the band add to FAI.
    band_start = max(key, block.row - high)
    band_end = max(band_start, block.rows.stop - low)
    band = slice(band_start - key, band_end - key)
    in_band = (distance[:, band] >= low) & (distance[:, band] <= high)
    counts = (t >= block.starts[:, None]) & (t < block.lengths[:, None])  # [b, m]
    share = (weight[..., band] * in_band).mul_((counts[:, None] * norm)[..., None])
    fai[..., band_start:band_end] += share.sum(-2)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits less their maximum (in place), the maximum, exp of the former, and its sum over keys."""
    peak = logits.amax(-1, keepdim=True)
    shifted = logits.sub_(peak)
    weight = shifted.exp()
    return shifted, peak.squeeze(-1), weight, weight.sum(-1)
