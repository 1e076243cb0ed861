"""Environments: what answers the policy's turns in a conversation of several.

Where it fits: L2, beside the engines. In: the policy's turns, as text and as token ids. Out: what
it sees next, and optionally rewards. `--environment MODULE:FACTORY` names a function (or a class)
that is called with the prompt, once for each conversation; `examples/calculator` shows one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

from megatron_drpo.errors import RolloutError
from megatron_drpo.types import FinishReason, Prompt
from megatron_drpo.user_code import described, load_function

T = TypeVar("T")

_FLAG = "--reward-timeout-seconds"

_THREADS = 64
"""Environments that work at the same time."""


@dataclass(frozen=True)
class Turn:
    """What the policy has just said.

    Example: Turn(number=1, text="?47*85", token_ids=(36, 8, 11, 15, 12, 9, 2),
                  finish_reason="stop", last=False)
    """

    number: int
    """From 1."""
    text: str
    """Decoded without special tokens."""
    token_ids: tuple[int, ...]
    """The stop id included where there was one."""
    finish_reason: FinishReason
    """`length`: the conversation's limit of tokens cut the turn off."""
    last: bool
    """No further turn is possible, whatever the environment says."""


@dataclass(frozen=True)
class Observation:
    """What the policy sees next; it is not trained on these tokens.

    Example: Observation("3995 ")
    """

    content: str | Sequence[int] | Sequence[Mapping[str, str]] = ""
    """Text; or token ids; or chat messages, {"role": ..., "content": ...} each, which go through
    the tokenizer's chat template. Nothing is looked at once the conversation is done."""
    reward: float | None = None
    """Of this turn. The sum over the turns is the conversation's; where no turn has one, `--reward`
    judges the text of the whole response."""
    done: bool = False
    """The conversation ends here."""


class Environment(Protocol):
    """One conversation's other side. It works in a thread of its own, one turn at a time; what it
    raises, or taking too long, costs this conversation alone."""

    def step(self, turn: Turn) -> Observation:
        """Answer the policy; not called any more after `done`, or after a `last` turn."""
        ...


EnvironmentFactory = Callable[[Prompt], Environment]


def load_environment(name: str) -> EnvironmentFactory:
    """The factory behind `--environment`: MODULE:FACTORY, on PYTHONPATH or where we are.

    Raises:
        RolloutError: no such module or factory, or the module failed to import.
    """
    module_name, colon, factory_name = name.partition(":")
    if not (colon and module_name and factory_name):
        raise RolloutError(
            f"--environment {name}: give MODULE:FACTORY, a function that takes a prompt and "
            "returns an environment (examples.calculator.environment:Calculator is one)"
        )
    return cast(EnvironmentFactory, load_function(f"--environment {name}", name, RolloutError))


@dataclass(frozen=True)
class Failed:
    """Takes the place of a result. Example: Failed("raised KeyError: 'x' (mine.py:3)")."""

    why: str


def call_all(calls: Sequence[Callable[[], T]], seconds: float) -> list[T | Failed]:
    """What each call returns, in order; they run in threads, next to each other.

    A thread cannot be ended: one whose call takes too long is left behind and another one takes its
    place. A call that keeps Python's global lock holds up all the others, and the program.

    Args:
        calls: the user's code.
        seconds: how long each may take, by `--reward-timeout-seconds`.
    """
    return _Calls(calls, seconds).results()


class _Calls(Generic[T]):
    """`call_all` under way."""

    def __init__(self, calls: Sequence[Callable[[], T]], seconds: float) -> None:
        self._calls, self._seconds = calls, seconds
        self._changed = threading.Condition()  # guards what follows
        self._left = deque(range(len(calls)))
        self._started: dict[int, float] = {}
        self._results: dict[int, T | Failed] = {}

    def results(self) -> list[T | Failed]:
        with self._changed:
            for _ in range(min(_THREADS, len(self._calls))):
                self._hire()
            while len(self._results) < len(self._calls):
                now = time.monotonic()
                for index, start in list(self._started.items()):
                    if now - start >= self._seconds:
                        self._finish(index, Failed(f"took longer than {_FLAG} {self._seconds:g}"))
                        self._hire()
                self._changed.wait(min(self._started.values(), default=now) + self._seconds - now)
        return [self._results[index] for index in range(len(self._calls))]

    def _hire(self) -> None:
        # A daemon: one that hangs must not keep the program from ending.
        threading.Thread(target=self._work, name="environment", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._left:
                    return
                index = self._left.popleft()
                self._started[index] = time.monotonic()
            try:
                result = self._calls[index]()
            except (Exception, SystemExit) as error:
                result = Failed(f"raised {described(error)}")
            with self._changed:
                if index not in self._started:  # given up on; another thread goes on
                    return
                self._finish(index, result)

    def _finish(self, index: int, result: T | Failed) -> None:
        del self._started[index]
        self._results[index] = result
        self._changed.notify()
