"""Where a response that grows token by token first holds a stop string in its text.

Where it fits: under the engines, `scheduler` and `servers`. In: token ids, as they come. Out: how
many of them the response keeps. A token decodes to different text in different company (a character
of several tokens, a space at the beginning), so text is taken from tokens that stand together: from
the last few only, as many as a stop string may have begun in, which costs the same at every length.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

_HALF = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for a character of which tokens are missing."""


class StopSearch:
    """The search in one response.

    Example:
        search = StopSearch(("\\n\\n",), tokenizer.decode)
        search.push([5, 6, 7])  # None: no stop string so far
        search.push([8, 9, 3])  # 2: token 9 completes one

    Args:
        strings: any of them ends the response.
        decode: text of token ids; begins with the text of the first few, but for half a character
            at the end.
        before: token ids of what came earlier. A string may begin there; one that also ends there
            does not count.
    """

    def __init__(
        self,
        strings: Sequence[str],
        decode: Callable[[list[int]], str],
        before: Sequence[int] = (),
    ) -> None:
        self._strings, self._decode = strings, decode
        # A token stands for a byte at least, but for some that stand for nothing.
        self._longest = max(len(string.encode()) for string in strings)
        self._tokens = list(before)
        """The last ones: those of the whole response, or of more characters than `_longest`."""
        self._text = decode(self._tokens) if before else ""
        """Theirs."""

    def push(self, ids: Sequence[int]) -> int | None:
        """Append `ids`.

        Returns:
            Up to and with the one that completes a stop string, so many of `ids`; None without one.
        """
        known, seen = len(self._tokens), len(self._text.rstrip(_HALF))
        self._tokens += ids

        def holds(text: str) -> bool:
            return any(text.find(s, max(seen - len(s) + 1, 0)) >= 0 for s in self._strings)

        self._text = self._decode(self._tokens)
        if holds(self._text):
            counts = range(known + 1, len(self._tokens))
            return 1 + bisect_left(
                counts, True, key=lambda n: holds(self._decode(self._tokens[:n]))
            )
        self._forget()
        return None

    def _forget(self) -> None:
        """Drop tokens that no stop string can begin in any more; seldom, as it decodes again."""
        size = self._longest + 4
        while 2 * size < len(self._tokens):
            text = self._decode(self._tokens[-size:])
            if len(text) > self._longest:
                self._tokens, self._text = self._tokens[-size:], text
                return
            size *= 2
