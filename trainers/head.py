"""Log-probs of response tokens from hidden states, by the fastest way that the language model's head allows.

[n] response tokens, [d] width, [V] vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from rlattn.logprobs import token_logps

VOCABULARY_CHUNK = 8192  # columns of a tile of logits, [4096 tokens, 8192] in bf16: 64 MiB


def response_logps(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, temperature: float, num_chunks: int, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [n] fp32 of `targets` [n] and entropy [n] fp32 in nats or None, from `hidden` [n, d]; differentiable.

    TRL's fused kernel where there is a GPU and the head is a whole linear layer, else chunks through the head as a
    module (see `token_logps`): on CPUs, and under ZeRO-3, which gathers the head inside its forward. Neither holds
    [n, V].
    """
    if type(head) is nn.Linear and head.weight.is_cuda and not hasattr(head.weight, "ds_id"):
        from trl.kernels import ChunkedLogProbFunction  # trl is loaded only where it is used

        outputs = ("entropy",) if with_entropy else ()
        logps, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, head.weight, head.bias, targets, temperature, VOCABULARY_CHUNK, None, 1.0, outputs
        )
        return logps, entropy
    return token_logps(hidden, head, targets, temperature=temperature, num_chunks=num_chunks, with_entropy=with_entropy)
