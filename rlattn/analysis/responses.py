"""Responses to analyse: read from JSON lines, or made by the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlattn.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = (
    "each line needs `prompt` with `prompt_ids` and `token_ids`, `tokens` (pieces of text), `completion`, or `samples`"
)


@dataclass(frozen=True)
class Response:
    """One response as the model sees it.

    Attributes:
        id: of its problem.
        prompt: its text.
        prompt_ids: at least one.
        token_ids: the response's, with its end-of-sequence token where it has one; at least one.
    """

    id: str
    prompt: str
    prompt_ids: list[int]
    token_ids: list[int]

    @property
    def ids(self) -> list[int]:
        """Prompt and response."""
        return self.prompt_ids + self.token_ids


def read_responses(file: Path, tokenizer: PreTrainedTokenizerBase, n: int, max_tokens: int | None) -> list[Response]:
    """The first n responses of a file, each cut after `max_tokens`.

    Lines as runs write them (`completions.jsonl`: prompt, tokens), as evaluations do (`samples/NAME.jsonl`: a header,
    then prompt, samples), as analyses do (`responses.jsonl`: prompt_ids, token_ids), or plain (prompt, completion).
    Text is tokenised by `tokenizer`; of untruncated `samples`, whose text lacks it, the end-of-sequence token is added.

    Raises:
        ConfigError: no such file, no responses, a line without the fields needed, or a token the model does not know.
    """
    if not Path(file).is_file():
        raise ConfigError(f"no file of responses at {str(file)!r}")
    found: list[Response] = []
    for number, raw in enumerate(Path(file).read_bytes().splitlines(), 1):
        if len(found) >= n:
            break
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
            if number == 1 and "benchmark" in line and "prompt" not in line:  # the header of an evaluation's samples
                continue
            found += _responses(line, f"line-{number}", tokenizer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} line {number}: {_reason(error)}") from None
    if not found:
        raise ConfigError(f"{file} holds no responses; {FORMS}")
    return [Response(r.id, r.prompt, r.prompt_ids, r.token_ids[:max_tokens]) for r in found[:n]]


def _responses(line: dict[str, Any], name: str, tokenizer: PreTrainedTokenizerBase) -> list[Response]:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    name = str(line.get("problem_id") or line.get("id") or name)
    prompt = line["prompt"].encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair, no file can
    prompt_ids = line["prompt_ids"] if "prompt_ids" in line else encode(prompt)
    if "token_ids" in line:
        answers = [line["token_ids"]]
    elif "samples" in line:
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        answers = [encode(sample["text"]) + ([] if sample["truncated"] else end) for sample in line["samples"]]
    else:
        answers = [encode("".join(line["tokens"]) if "tokens" in line else line["completion"])]
    for ids in (prompt_ids, *answers):
        if not ids or not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
            raise ValueError(f"prompt and response must be tokens in 0..{len(tokenizer) - 1}, at least one each")
    return [Response(name, prompt, prompt_ids, ids) for ids in answers]


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "is not JSON"
    return f"lacks {error}; {FORMS}" if isinstance(error, KeyError) else str(error)
