"""Rewards: what a response is worth.

In: a sampled response with its prompt's reference answer (`RewardRequest`). Out: one finite number
per response. A reward is a plain function of one request; `exact` and `math` are two such functions
of this package, `MODULE:FUNCTION` is one of the user's.

Score on one rank and send the numbers to the others: a user's function need not be deterministic,
and a time limit never is.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.types import FinishReason, Prompt, Rollout
from megatron_drpo.user_code import described, did_you_mean, load_function


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
            f"--reward {name}: unknown; use {', '.join(BUILT_IN)}, or MODULE:FUNCTION of your own"
            + did_you_mean(name, BUILT_IN)
        )
    return cast(Reward, load_function(f"--reward {name}", target, RewardError))


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


def score(
    reward: Reward, name: str, rollouts: Sequence[Rollout], timeout_seconds: float
) -> list[float]:
    """The reward of each response, in order. To be called in the main thread (`time_limit`).

    Args:
        reward: as `load_reward` gives it.
        name: its name, for messages.
        rollouts: the responses.
        timeout_seconds: how long one response may take.

    Raises:
        RewardError: the function raised, took too long, or returned no finite number; names the
            prompt and the sample.
    """
    return [_score_one(reward, name, rollout, timeout_seconds) for rollout in rollouts]


def _score_one(reward: Reward, name: str, rollout: Rollout, timeout_seconds: float) -> float:
    prompt = rollout.prompt
    where = f"--reward {name}, prompt {prompt.id!r}, sample {rollout.sample}"
    request = RewardRequest(
        prompt.text, rollout.response_text, prompt.answer, rollout.finish_reason, prompt.metadata
    )
    try:
        with time_limit(timeout_seconds):
            value = reward(request)
    except TimeLimitExpired as error:
        raise RewardError(
            f"{where}: took longer than --reward-timeout-seconds {timeout_seconds:g}; "
            "make the reward faster, or raise the limit"
        ) from error
    except (Exception, SystemExit) as error:  # an exit would look like the end of the run
        raise RewardError(f"{where}: raised {described(error)}") from error
    number = math.nan
    if isinstance(value, numbers.Real | np.bool_):
        with contextlib.suppress(OverflowError):  # an integer beyond fp64
            number = float(value)
    if not math.isfinite(number):
        raise RewardError(
            f"{where}: returned {value!r} ({type(value).__name__}); must be a finite number"
        )
    return number


class TimeLimitExpired(BaseException):
    """The time of `time_limit` is up; no Exception, so that code inside cannot swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitExpired` in the body after so many seconds; limits may be nested.

    By a signal, since a thread that hangs cannot be ended: it interrupts Python code and waiting,
    but only in the main thread. A timer found running (an outer limit, a test's) goes on after.
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
