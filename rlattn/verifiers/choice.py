r"""Judges multiple choice and short answers.

A completion's answer is, in this order: what its last `\boxed{...}` holds; what its last `<answer>...</answer>` holds;
what follows the last "answer is" or "answer:" (or "correct option is") of its last 4000 characters; its last line. The
first of these that is there decides: where that cannot be read, the completion has no answer.

Time is linear in the text, by `str.rfind`; no more than 4000 characters are looked at closely.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from rlattn.problem import Verdict
from rlattn.verifiers.extract import Span, stripped

TAIL = 4000
LONGEST = 1000
"""Longest answer that is read, characters."""

_WRAPPERS = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|sf|it|tt)|boldsymbol|bm)\s?\{")
_MARKUP = re.compile(r"\*\*|__|[`${}]|(?<!\\)\\[()\[\]]")
_BLANKS = re.compile(r"(?<!\\)\\[,;:! ]|(?<=\S)~")
_CUE = re.compile(
    r"(?<!incorrect )(?<!wrong )\b(?:answer|correct (?:option|choice))\**\s?(?:is|:|=|(?:should|must|would) be)(?!\w)"
    r"[\s*:]{0,9}(?=([^\n]{0,300}))",
    re.IGNORECASE,
)
_ALONE = re.compile(
    r"(?:(?:the )?(?:(?:final|correct|best) )?(?:option|choice|answer)(?: is)?:? )?[(\[]?([A-Z])[)\]]?[.:]?",
    re.IGNORECASE,
)
_LEADING = re.compile(r"(?:(?:option|choice) )?(?:\(([A-Z])\)|([A-Z])(?:\s?[.:)]| (?=\(.*\)\.?$))) ?(.+)")
_IN_PROSE = re.compile(
    r"(?:(?:option|choice) )?(?:\(([A-Z])\)|([A-Z])(?=[.:;)]?(?: |$)))[.:;)]?"
    r"(?=$|(?<=[.:;)]) (?!or\b|and\b)|,? (?:because|since|as|which)\b| [-–—] )"
)
_DOUBT = re.compile(r"\b(?:not|nor|isn't|wrong|incorrect|false)\b", re.IGNORECASE)
_LETTERS = re.compile(r"\b[A-Z]\b")
_NUMBER = r"(?<![\w.])[-+]?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)(?:e[-+]?[0-9]{1,2}(?![0-9]))?"
_TOKEN = re.compile(rf"({_NUMBER})|[^\W_]+|[-+*/^=<>%°€£]|(?<=[0-9])!")


def judge(answer: dict[str, Any], completion: str) -> Verdict:
    r"""Judge a completion; a text of 10 MB takes some 5 ms.

    `answer` is one of

    - `{"choice": "C", "choices": [texts]}`: right is C, however it is written (see `read_choice`);
    - `{"text": [accepted, ...]}`: right is a text that is equal to one of them after `normalise`.
    """
    span, where = _extract(completion)
    found = completion[slice(*span)]
    if "choice" in answer:
        gold, choices = answer["choice"], answer["choices"]
        letter, reason = read_choice(found, choices, prose=where in ("answer is", "last line"))
    else:
        accepted = [normalise(text) for text in answer["text"]]
        gold = next(filter(None, accepted), "")
        if where == "answer is":
            found = re.split(r"[.;] ", found)[0]
        letter = normalise(found) or None
        reason = "no text" if letter is None else f"{letter[:80]!a}, accepted {', '.join(accepted)[:200]!a}"
        gold = letter if letter in accepted else gold
    right = letter is not None and letter == gold
    return Verdict(right, found or None, letter, gold, f"{where}: {reason}" if found else where)


def read_choice(text: str, choices: list[str], prose: bool = False) -> tuple[str | None, str]:
    r"""The letter of the choice that `text` names, or None; and why.

    It may be a letter (`C`, `(C)`, `c.`, `\text{C}`, `Option C`), a choice's text, or both (`C. text`; another choice's
    text or letter there leaves it unread). Several letters are no answer. An upper-case letter is a letter even where
    it is some choice's text too; a lower-case one is that text. With `prose`, a letter may also begin a sentence, as in
    `C because ...`, but the article of `A gene` is none.
    """
    letters = {chr(ord("A") + index): choice for index, choice in enumerate(choices)}
    plain = _plain(text)
    named = _by_text(text, letters)
    alone = _ALONE.fullmatch(plain)
    if alone and alone[1].upper() in letters and not (alone[1].islower() and named):
        return alone[1].upper(), "a letter"
    if len(named) == 1:
        return named[0], f"the text of choice {named[0]}"
    if named:
        return None, f"the text of choices {' and '.join(named)}"
    if leading := _LEADING.fullmatch(plain):
        letter, rest = leading[1] or leading[2], re.sub(r"^\(([^()]*)\)\.?$", r"\1", leading[3])
        others = [other for other in _by_text(rest, letters) if other != letter]
        strangers = [other for other in _LETTERS.findall(rest) if other in letters and other != letter]
        if letter in letters and letter in _by_text(rest, letters):
            return letter, "a letter and its text"
        if letter in letters and not others and not strangers and not _DOUBT.search(rest) and not prose:
            return letter, "a letter and other words"
    if prose and (begin := _IN_PROSE.match(plain)):
        letter = begin[1] or begin[2]
        text_first = any(len(start) > 1 and plain.startswith(start) for start in map(_plain, choices))
        if letter in letters and not text_first:
            return letter, "a letter that begins a sentence"
    return None, f"{text[:80]!a} is not one of {', '.join(letters)}"


def normalise(text: str) -> str:
    r"""The form in which short answers are compared, after SQuAD's: lower case, no articles, no punctuation.

    Unlike there, hyphens and other marks between words count as spaces, articles stay where nothing else would, signs
    and operators stay, and numbers count by value: `1,000`, `1000.0` and `1e3` are equal, as are `0.5`, `1/2` and
    `\frac{1}{2}`. A percent is not a fraction, and a unit is part of the answer.
    """
    text = "".join(map(_spaced, text[:LONGEST].replace("^\\circ", "°").replace("^{\\circ}", "°")))
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-").replace("⁄", "/")
    text = re.sub(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"\1/\2", text)
    text = _plain(text).replace("_", "")
    text = re.sub(r"(?<=[^\W\d_])['’.](?=[^\W\d_])", "", text)  # don't, u.s.
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text)
    words = []
    for token in _TOKEN.finditer(text):
        number = token[1]
        words.append(str(Fraction(number.replace(",", ""))) if number else token[0].replace("percent", "%"))
    words = [word for word in words if word not in ("a", "an", "the")] or words
    if len(words) == 3 and words[1] == "/" and words[0].lstrip("-").isdecimal() and words[2].strip("0").isdecimal():
        return str(Fraction(int(words[0]), int(words[2])))
    return " ".join(words)


def answer_span(completion: str) -> Span | None:
    """The characters that `judge` reads as the answer; None where there are none."""
    span, _ = _extract(completion)
    return span if span[0] < span[1] else None


def _extract(completion: str) -> tuple[Span, str]:
    """The answer's characters and where it stands; or no characters, and why."""
    nothing = (0, 0)
    start = completion.rfind("\\boxed{")
    if start >= 0:
        start += len("\\boxed{")
        span = stripped(completion, start, start + _braced(completion[start : start - len("\\boxed{") + LONGEST]))
        if span[0] == span[1]:
            return nothing, "the last \\boxed{...} is empty, unfinished or too long"
        return span, "boxed"
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        if end - start > LONGEST:
            return nothing, "the last <answer> is too long"
        return stripped(completion, start + len("<answer>"), end), "<answer>"
    begin, end = stripped(completion, max(0, len(completion) - TAIL), len(completion))
    tail = completion[begin:end]
    cue = None
    for cue in _CUE.finditer(tail):  # noqa: B007 - the last one
        pass
    if cue:
        return stripped(completion, begin + cue.start(1), begin + cue.end(1)), "answer is"
    line = stripped(completion, begin + tail.rfind("\n") + 1, end)
    return (line, "last line") if 0 < line[1] - line[0] <= LONGEST else (nothing, "no answer")


def _braced(text: str) -> int:
    # How many characters are before the brace that closes, 0 where none does; escaped braces are characters.
    depth = 1
    for mark in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if not depth:
            return mark.start()
    return 0


def _by_text(text: str, letters: dict[str, str]) -> list[str]:
    """Letters of the choices that read as `text`, by the strictest reading that fits any."""
    for form in (_spaces, _plain, lambda written: _plain(written).casefold().rstrip(".")):
        wanted = form(text)
        found = [letter for letter, choice in letters.items() if wanted and form(choice) == wanted]
        if found:
            return found
    return []


def _spaced(character: str) -> str:
    # NFKC would make 52 of 5² and 31/2 of 3½.
    kind = "" if character.isascii() else unicodedata.decomposition(character).partition(" ")[0]
    return {"<super>": "^", "<fraction>": " "}.get(kind, "") + character


def _spaces(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    # Without LaTeX's and Markdown's ways to say how it looks.
    return _spaces(_MARKUP.sub("", _BLANKS.sub(" ", _WRAPPERS.sub("", text.replace("\\%", "%")))))
