"""The reward `math`: 1 for a response whose final answer equals the reference, else 0.

In: a `RewardRequest` with an answer. Out: 0.0 or 1.0. Extraction and comparison are the math-verify
library's: the last \\boxed{...} counts (several close to each other are one set), else what follows
words such as "final answer is", else the last mathematics between dollar signs or the last plain
number. LaTeX that is neither boxed nor between dollar signs is not found.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_drpo.rewards import RewardRequest, TimeLimitExpired, time_limit

SECONDS = 5.0
"""Time for one response, as in math-verify; policies do write 9^{9^{9^9}}. Longer is a 0."""

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_DELIMITED = re.compile(r"\\boxed|\$[^$]+\$|\\\(|\\\[")

# math-verify warns that its time limits are off; ours replaces them, since each of its parts would
# cancel the alarm of `score`.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_answer(request: RewardRequest) -> float:
    """1 if math-verify finds the response's final answer equal to the reference answer.

    The reference may be a number, LaTeX with or without dollar signs or \\boxed{}, or a GSM8K
    solution that ends in `#### ANSWER`.
    """
    try:
        with time_limit(SECONDS):
            gold = _parse_gold(request.answer or "")
            return float(verify(gold, _parse(request.response), timeout_seconds=None))
    except TimeLimitExpired:
        return 0.0


@functools.lru_cache(maxsize=1024)
def _parse_gold(answer: str) -> list[Any]:
    """Parsed once for all samples of a group."""
    answer = answer.rpartition("####")[2].strip()
    return _parse(answer if _DELIMITED.search(answer) else f"\\boxed{{{answer}}}")


def _parse(text: str) -> list[Any]:
    return parse(text, _EXTRACTION, parsing_timeout=0)
