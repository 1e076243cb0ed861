"""The reward `exact`: 1 for a response that is the answer's text, else 0.

In: a `RewardRequest` with an answer. Out: 0.0 or 1.0.
"""

from __future__ import annotations

from megatron_drpo.rewards import RewardRequest


def exact(request: RewardRequest) -> float:
    """1 if response and answer are the same text, white space around them aside."""
    return float(request.response.strip() == (request.answer or "").strip())
