"""A reward of your own: a plain function of one request, named on the command line.

    bash examples/train_drpo_gpt.sh --reward examples.rewards:contains_ending [flags]

In: `RewardRequest` with the prompt, the response, the line's `answer` and its remaining fields,
and why the response ended. Out: a finite number; higher is better. Only differences between the
responses to one prompt count, so the scale is yours to choose. The module is looked up in the
current directory and on PYTHONPATH; what it raises costs the sample, and is named.
"""

from __future__ import annotations

from megatron_drpo.rewards import RewardRequest


def contains_ending(request: RewardRequest) -> float:
    """1 for a text that comes to its own end within the length and contains the wanted words.

    The words are the line's `answer`, such as {"prompt": "Once upon a time", "answer": "frog"};
    without an answer it is enough that the text ends.
    """
    ended = request.finish_reason == "stop"
    return float(ended and (request.answer or "").lower() in request.response.lower())
