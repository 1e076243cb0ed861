"""Rewards: what a response is worth.

In: a sampled response with its prompt's reference answer (`RewardRequest`). Out: one finite number
per response. A reward is a plain function of one request; `exact` and `math` are two such functions
of this package, `MODULE:FUNCTION` is one of the user's, and an http:// or https:// address is that
of a service that computes it.

    __init__.py     what a reward is, and how the one that is asked for is found
    exact.py math_answer.py
    pool.py         `RewardPool`: the rewards of a batch, in processes of their own or by a service
    worker.py       what such a process runs
    service.py      the service's client

Workers import this module: it needs neither torch nor numpy. Score on one rank of a replica and
send the numbers to the others: a user's function need not be deterministic, and a time limit never
is.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat, cast

from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.types import FinishReason, Prompt
from megatron_drpo.user_code import did_you_mean, load_function


@dataclass(frozen=True)
class RewardRequest:
    """What a reward sees of one response.

    Example:
        RewardRequest(prompt="12+30=", response="42", answer="42", finish_reason="stop",
                      metadata={"level": 2})
    """

    prompt: str
    """What the model saw, after the chat template if one was applied."""
    response: str
    """The response decoded without special tokens."""
    answer: str | None
    """The reference answer of the prompt's line, if it has one."""
    finish_reason: FinishReason
    """`stop`: the model ended the response; `length`: it was cut off."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The remaining fields of the prompt's line."""


Reward = Callable[[RewardRequest], float]

BUILT_IN = {
    "exact": "megatron_drpo.rewards.exact:exact",
    "math": "megatron_drpo.rewards.math_answer:math_answer",
}
"""Rewards with a name of their own; both compare with the prompt's answer."""


def load_reward(name: str) -> Reward:
    """The function behind `--reward`: a built-in name or MODULE:FUNCTION.

    The user's module is looked up on PYTHONPATH and in the current directory.

    Raises:
        RewardError: unknown name, no such module or function, or the module failed to import.
    """
    target = BUILT_IN.get(name, name)
    module_name, colon, function_name = target.partition(":")
    if not (colon and module_name and function_name):
        raise RewardError(
            f"--reward {name}: unknown; use {', '.join(BUILT_IN)}, MODULE:FUNCTION of your own, or "
            "the http:// or https:// address of a service" + did_you_mean(name, BUILT_IN)
        )
    return cast(Reward, load_function(f"--reward {name}", target, RewardError))


def finite_number(value: object) -> float | None:
    """What a user's code gave as a number: any kind of one, numpy's too; None if it is no finite
    one."""
    if hasattr(type(value), "__float__"):  # text has none
        with contextlib.suppress(Exception):  # an integer beyond fp64, an array of two numbers
            number = float(cast(SupportsFloat, value))
            return number if math.isfinite(number) else None
    return None


def check_prompts(name: str, prompts: Sequence[Prompt]) -> None:
    """Check before any work that the reward can judge every prompt.

    Args:
        name: the reward's name, as given to `load_reward`.
        prompts: of the training or of the evaluation file.

    Raises:
        DataError: prompts without an answer that the reward compares with; names up to 10.
    """
    if name not in BUILT_IN:
        return
    lacking = [prompt.id for prompt in prompts if not (prompt.answer or "").strip()]
    if lacking:
        more = f" and {len(lacking) - 10} more" if len(lacking) > 10 else ""
        raise DataError(
            f"{', '.join(lacking[:10])}{more}: no `answer`, which --reward {name} compares with; "
            "add it to these lines, or use a reward of your own (MODULE:FUNCTION)"
        )


class TimeLimitExpired(BaseException):
    """The time of `time_limit` is up; no Exception, so that code inside cannot swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitExpired` in the body after so many seconds; limits may be nested.

    By a signal, so in the main thread only, as that of a reward worker is; it interrupts Python
    code and waiting. A timer found running (an outer limit, a test's) goes on after.
    """
    again = 0.5  # What is raised inside a __del__ or a gc callback is lost: repeat it.

    def expire(signum: int, frame: object) -> None:
        raise TimeLimitExpired

    start = time.monotonic()
    outer_handler = signal.signal(signal.SIGALRM, expire)
    outer_left, outer_interval = signal.setitimer(signal.ITIMER_REAL, seconds, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer_handler)
        if outer_left:
            left = outer_left - (time.monotonic() - start)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-6), outer_interval)
