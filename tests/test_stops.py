"""The search for stop strings, against the text of every beginning of the response."""

from __future__ import annotations

import codecs
from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_drpo.rollout.stops import StopSearch

PIECES = [b"", b"a", b"b", b"ab", b" ", b" a", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98", b"\x80"]
PIECES += [b"ba" * 9]
"""Of each token id: nothing, parts of characters, and more than the longest stop string."""
ACCENT, SMILE = "\xe9", "\N{GRINNING FACE}"


def lossy(ids: list[int]) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")


def stripped(ids: list[int]) -> str:
    """As of tokenizers that drop a space at the beginning."""
    return lossy(ids).removeprefix(" ")


def bytewise(ids: list[int]) -> str:
    """As of tokenizers that write a mark for each byte of half a character."""
    return b"".join(PIECES[i] for i in ids).decode("utf-8", "mark_each_byte")


def _marks(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mark_each_byte", _marks)

TOKENS = st.lists(st.integers(0, len(PIECES) - 1), max_size=60)
TEXTS = st.lists(st.sampled_from(["a", "b", " ", ACCENT, SMILE]), min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    TOKENS,
    st.lists(TEXTS.map("".join), min_size=1, max_size=3),
    st.lists(st.integers(0, 60), max_size=6),
    st.booleans(),
    st.sampled_from([lossy, stripped, bytewise]),
)
@example([8, 9, 10], [SMILE], [1, 2], False, bytewise)
@example([2, *[1] * 14], [ACCENT, "b" + 14 * "a"], list(range(15)), False, lossy)
@example([6, 7, *[0] * 40, 1], [ACCENT + "a"], list(range(42)), False, lossy)
@example([5, 1, 2] * 12 + [4, 11, 3], [" " + "ba" * 3 + "a", "b a"], [20, 37], False, stripped)
def test_the_token_that_completes_a_stop_string_is_found(ids, strings, cuts, later, decode) -> None:
    """However the response is cut up, one token at a time included."""

    def holds(count: int) -> bool:
        return any(string in decode(ids[:count]) for string in strings)

    expected = next((count for count in range(1, len(ids) + 1) if holds(count)), None)
    bounds = sorted({0, len(ids), *(min(cut, len(ids)) for cut in cuts)})
    search = StopSearch(strings, decode)
    if later:  # continued in the middle
        begun = bounds[len(bounds) // 2]
        if expected is not None and expected <= begun:
            begun = 0
        search = StopSearch(strings, decode, ids[:begun])
        bounds = [begun, *(bound for bound in bounds if bound > begun)]
    found = None
    for start, end in pairwise(bounds):
        kept = search.push(ids[start:end])
        if kept is not None:
            found = start + kept
            break
    assert found == expected


def test_what_ended_before_does_not_count() -> None:
    search = StopSearch(["ab", "ba "], lossy, before=[3, 1])
    assert search.push([1]) is None  # ab a a
    assert search.push([2, 4]) == 1
    search = StopSearch(["ba "], lossy, before=[3, 1, 2, 1])
    assert search.push([0, 4, 1]) == 2


def test_a_token_costs_the_same_at_every_length() -> None:
    sizes: list[int] = []

    def decode(ids: list[int]) -> str:
        sizes.append(len(ids))
        return lossy(ids)

    search = StopSearch(["bbbb", "b b"], decode, before=[1] * 500)
    for _ in range(2000):
        assert search.push([1]) is None
    assert max(sizes[2:]) < 20 and len(sizes) < 2000 * 1.3
    assert search.push([2, 4, 2, 2]) == 3
