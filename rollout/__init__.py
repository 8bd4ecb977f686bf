"""vLLM engines in Ray actors: generation, weight transfer, and attention statistics out of any vLLM `LLM`.

Brings neither ray nor vllm: `rlattn.rollout.pool` brings the one, an engine's actor the other.
"""

from .attention import attention_statistics

__all__ = ["attention_statistics"]
