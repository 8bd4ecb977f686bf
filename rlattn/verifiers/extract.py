r"""Finding the answer in a completion. Linear in time: plain searches in the last `WINDOW` characters.

Where a completion closes a `</think>`, the text after the last one is searched first, and the whole only if that text
holds no answer. In each, the first of these that is there wins:

1. the last `\boxed{...}` or `\fbox{...}` that is not empty; `\boxed 5` is its next word. Where the last one is never
   closed there is no answer: the completion was cut off in it, and earlier boxes were steps on the way.
2. the last line `#### 18` (GSM8K's style) that holds a number and nothing else, so that headings do not count.
3. the last `<answer>...</answer>`.
4. what follows the last "answer is", "answer:" or "answer =", up to the end of the formula, sentence or line.

A last number in running text is not an answer: models state many numbers, and some of them are the gold one by chance.
"""

from __future__ import annotations

import re

WINDOW = 100_000
"""Characters at the end of a completion that are searched."""
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,20}")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
WORD = re.compile(r"[^\s$]{1,300}")
HASHES = re.compile(
    r"^####[ \t]{0,9}((?:[-+]|\\?\$){0,2}\d[\d,]{0,99}(?:\.\d{1,99})?(?:/\d{1,99})?(?:\\?%)?)\.?[ \t]{0,9}$",
    re.MULTILINE,
)
PHRASE = re.compile(r"\banswer[*\s]{0,9}(?:is|:|=)[*\s:=]{0,20}", re.IGNORECASE)
PHRASE_LENGTH = 300
CLOSERS = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
UNCLOSED = r"no answer: the last \boxed{ is never closed"
SENTENCE_END = re.compile(r"(?<=\S)[.!](?=\s|$)|\n")


Span = tuple[int, int]  # of characters: the first, and the one after the last


def find_answer(completion: str) -> tuple[str | None, str]:
    """The answer as the completion writes it, or None; and where it stood, or why there is none."""
    span, how = find_span(completion)
    return (None if span is None else completion[slice(*span)]), how


def find_span(completion: str) -> tuple[Span | None, str]:
    """The characters of the completion that `find_answer` returns, or None; and the same reason."""
    offset = max(0, len(completion) - WINDOW)
    text = completion[offset:]
    head, closed, tail = text.rpartition("</think>")
    begin = len(head) + len(closed)
    found, how = _search(tail)
    if closed and found is None and how != UNCLOSED:
        begin = 0
        found, how = _search(text)
    return (None if found is None else (offset + begin + found[0], offset + begin + found[1])), how


def stripped(text: str, start: int, end: int, blanks: str | None = None) -> Span:
    """The span of `text[start:end].strip(blanks)`."""
    part = text[start:end]
    start += len(part) - len(part.lstrip(blanks))
    return start, start + len(part.strip(blanks))


def _search(text: str) -> tuple[Span | None, str]:
    for head in reversed(list(BOX.finditer(text))):
        found = _boxed(text, head.end())
        if found is None:
            return None, UNCLOSED
        if found[0] < found[1]:
            return found, "boxed"
    if lines := list(HASHES.finditer(text)):
        return lines[-1].span(1), "####"
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        found = stripped(text, start + len("<answer>"), end)
        if found[0] < found[1]:
            return found, "<answer>"
    for start in (match.end() for match in reversed(list(PHRASE.finditer(text)))):
        found = _phrase(text, start)
        if found[0] < found[1]:
            return found, "answer is"
    return None, r"no answer: no \boxed{}, no #### number, no <answer>, no 'answer is'"


def _boxed(text: str, start: int) -> Span | None:
    """What a box whose command ends at `start` holds, maybe nothing; None where it is never closed."""
    if not text.startswith("{", start):
        word = WORD.match(text, start)
        return (start, start + len(word[0].rstrip(".,;"))) if word else (start, start)
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return stripped(text, start + 1, brace.start())
    return None


def _phrase(text: str, start: int) -> Span:
    """The formula or the sentence that begins at `start`, maybe nothing."""
    rest = text[start : start + PHRASE_LENGTH]
    for opener, closer in CLOSERS.items():
        if rest.startswith(opener) and (end := rest.find(closer, len(opener))) > 0:
            return stripped(text, start + len(opener), start + end)
    stop = SENTENCE_END.search(rest)
    return stripped(text, start, start + (stop.start() if stop else len(rest)), " \t*.,;")
