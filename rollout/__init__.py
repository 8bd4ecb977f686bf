"""vLLM engines in Ray actors: generation, weight transfer, and attention statistics out of any vLLM `LLM`.

Brings neither ray nor vllm nor torch: `rlattn.rollout.pool` brings ray, an engine's actor vllm, and
`attention_statistics` torch when it is first asked for, so that what is checked at the door starts quickly.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import attention_statistics

__all__ = ["attention_statistics"]


def __getattr__(name: str) -> Any:
    if name == "attention_statistics":
        from .attention import attention_statistics

        return attention_statistics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
