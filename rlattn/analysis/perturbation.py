"""The perturbation study: does another token change more of what follows where FAI is high? [Li 2026, Table 1].

At the positions of highest and of lowest FAI of each response the token is replaced by each of the model's top-k next
tokens there (end-of-sequence tokens aside), and the model goes on greedily. How alike the continuations of one position
are is the mean Jaccard similarity of their content words, over all pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlattn.analysis.bootstrap import Interval, ratio
from rlattn.analysis.config import PerturbationConfig
from rlattn.analysis.generate import Writer
from rlattn.analysis.measure import Array, Packed, hidden_states, pack
from rlattn.analysis.peaks import fai_length
from rlattn.analysis.responses import Response
from rlattn.evaluation.statistics import paired
from rlattn.kernels import register

WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?")
STOP_WORDS = frozenset(
    """
    a about after all also an and any are as at be because been but by can could did do does for from had has have he
    her his how i if in into is it its just let me more my no not now of on one only or other our out over she should
    since so some such than that the their them then there these they this those thus to too up us very was we were
    what when where which while who will with would yes you your
    """.split()  # noqa: SIM905 - a list of a hundred quoted words reads worse
)


@dataclass(frozen=True)
class Site:
    """One position of one response, and what the model wrote from each forced token on.

    Attributes:
        response: index.
        position: of the replaced token in the response.
        kind: top or bottom.
        forced: the k tokens, most likely first, as text.
        texts: k continuations, forced token included.
        similarity: mean Jaccard similarity over pairs.
    """

    response: int
    position: int
    kind: str
    forced: list[str]
    texts: list[str]
    similarity: float


@dataclass(frozen=True)
class PerturbationResult:
    """The study's numbers; a response's value is the mean over its positions.

    Attributes:
        top: mean similarity at positions of highest FAI.
        bottom: at those of lowest FAI.
        difference: top minus bottom, paired by response.
        p_value: two-sided, sign-flip permutation test of that difference.
        share: of responses with top < bottom; ties count as not.
        sign_p_value: two-sided sign test, ties left out.
        ties: responses with top == bottom.
        responses: how many were long enough to take part.
        place: mean relative position in the response, of top and of bottom positions: what stands earlier has more
            behind it, whatever its FAI.
        pairs: per response (index, top, bottom).
    """

    top: Interval
    bottom: Interval
    difference: Interval
    p_value: float
    share: Interval
    sign_p_value: float
    ties: int
    responses: int
    place: dict[str, float]
    pairs: list[tuple[int, float, float]]


def extremes(fai: Array, fai_low: int, count: int) -> dict[str, list[int]]:
    """Up to `count` positions of highest and as many of lowest FAI, ties to the lower index; never one in both.

    Only among positions where FAI is defined: the lowest would else be a response's last tokens, whose FAI is 0 because
    nothing comes after them.
    """
    own = np.asarray(fai)[: fai_length(len(fai), fai_low)]
    count = min(count, len(own) // 2)
    top = np.argsort(-own, kind="stable")[:count]
    rest = np.delete(np.arange(len(own)), top)
    bottom = rest[np.argsort(own[rest], kind="stable")[:count]]
    return {"top": sorted(top.tolist()), "bottom": sorted(bottom.tolist())}


def content_words(text: str) -> set[str]:
    """Lower-case words and numbers of a text that are no stop words."""
    return set(WORD.findall(text.lower())) - STOP_WORDS


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared over all; 1 where both are empty."""
    return len(a & b) / len(a | b) if a | b else 1.0


def similarity(texts: Sequence[str]) -> float:
    """Mean Jaccard similarity of content words over all pairs of texts."""
    words = [content_words(text) for text in texts]
    return float(np.mean([jaccard(a, b) for a, b in combinations(words, 2)]))


@torch.inference_mode()
def next_tokens(
    model: PreTrainedModel, batch: Packed, rows: Sequence[int], count: int, banned: Sequence[int]
) -> list[list[int]]:
    """The `count` most likely next tokens after each of the rows (indices in [T]) of a packed batch."""
    logits = model.get_output_embeddings()(hidden_states(model, batch)[list(rows)])  # [m, V]
    logits[:, list(banned)] = -torch.inf
    found: list[list[int]] = logits.topk(count).indices.tolist()
    return found


def perturb(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    writer: Writer,
    responses: Sequence[Response],
    fai: Sequence[Array],
    fai_low: int,
    config: PerturbationConfig,
    *,
    context: int,
    bar: Callable[[int], Callable[[], None]],
) -> list[Site]:
    """Every branch of the study; `bar` is told the number of steps ahead and gives what to call at each."""
    model.set_attn_implementation(register())
    sites: list[tuple[int, int, str]] = []
    forced: list[list[int]] = []
    for batch in pack(responses, writer.tokens_per_batch):
        own = [
            (place, position, kind, span.start + position - 1)
            for place, span in zip(batch.places, batch.spans, strict=True)
            for kind, positions in extremes(fai[place], fai_low, config.positions).items()
            for position in positions
        ]
        if own:
            sites += [site[:3] for site in own]
            forced += next_tokens(model, batch, [site[3] for site in own], config.top_k, writer.end)
    prefixes = [
        responses[place].prompt_ids + responses[place].token_ids[:position] + [token]
        for (place, position, _), tokens in zip(sites, forced, strict=True)
        for token in tokens
    ]
    if not prefixes:
        return []
    length = max(1, min(config.max_tokens, context - max(map(len, prefixes))))
    written = writer.write(prefixes, length, step=bar(length * len(writer.batches(prefixes, length))))
    heads = [token for tokens in forced for token in tokens]
    texts = tokenizer.batch_decode([[a, *b] for a, b in zip(heads, written, strict=True)], skip_special_tokens=True)
    pieces = tokenizer.batch_decode([[token] for token in heads])
    k = config.top_k
    return [
        Site(*site, pieces[i * k : (i + 1) * k], texts[i * k : (i + 1) * k], similarity(texts[i * k : (i + 1) * k]))
        for i, site in enumerate(sites)
    ]


def summarise(sites: Sequence[Site], responses: Sequence[Response], seed: int) -> PerturbationResult | None:
    """The study's numbers; None where no response was long enough."""
    values: dict[int, dict[str, list[float]]] = {}
    for site in sites:
        values.setdefault(site.response, {"top": [], "bottom": []})[site.kind].append(site.similarity)
    pairs = [(i, float(np.mean(v["top"])), float(np.mean(v["bottom"]))) for i, v in sorted(values.items())]
    if not pairs:
        return None
    top, bottom = np.array([p[1] for p in pairs]), np.array([p[2] for p in pairs])
    ones, lower, ties = np.ones(len(pairs)), int((top < bottom).sum()), int((top == bottom).sum())
    test = paired({str(p[0]): p[2] for p in pairs}, {str(p[0]): p[1] for p in pairs}, seed)
    untied = len(pairs) - ties
    return PerturbationResult(
        top=ratio(top, ones, seed),
        bottom=ratio(bottom, ones, seed),
        difference=ratio(top - bottom, ones, seed),
        p_value=test.p_value,
        share=ratio(top < bottom, ones, seed),
        sign_p_value=float(stats.binomtest(lower, untied).pvalue) if untied else 1.0,
        ties=ties,
        responses=len(pairs),
        place={
            kind: float(np.mean([s.position / len(responses[s.response].token_ids) for s in sites if s.kind == kind]))
            for kind in ("top", "bottom")
        },
        pairs=pairs,
    )
