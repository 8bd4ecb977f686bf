"""The long tail of a batch: of more groups than are needed, those that end soonest are kept, and the others cut short.

Which these are is a matter of tokens, not of time: the same seeds keep the same groups on any number of engines.
"""

from __future__ import annotations

from collections.abc import Mapping


class Shortest:
    """The `keep` groups of a batch whose longest completion has fewest tokens; of equals, those asked first.

    Requests are numbered, `size` of them in a row to a group.
    """

    def __init__(self, size: int, keep: int) -> None:
        self.size, self.keep = size, keep
        self._lengths: dict[int, list[int]] = {}

    def add(self, done: Mapping[int, int]) -> None:
        """Some completions are finished: tokens of each, by number."""
        for number, tokens in done.items():
            self._lengths.setdefault(number // self.size, []).append(tokens)

    def groups(self) -> list[int]:
        """The shortest `keep` of the groups that are finished so far, in the order they were asked."""
        return sorted(group for _, group in self._ranked()[: self.keep])

    def longest(self) -> int | None:
        """Tokens beyond which no completion can be in a kept group; None while too few groups are finished."""
        ranked = self._ranked()
        return ranked[self.keep - 1][0] if len(ranked) >= self.keep else None

    def _ranked(self) -> list[tuple[int, int]]:
        return sorted((max(lengths), group) for group, lengths in self._lengths.items() if len(lengths) == self.size)
