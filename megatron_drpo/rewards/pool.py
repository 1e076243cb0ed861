"""The rewards of a batch: computed by worker processes, or by a service.

In: rollouts. Out: `Scored`, a number for each and a word on each that has none. Where it fits:
`RewardPool` lives as long as the run, on one rank of each data-parallel replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from megatron_drpo.config import RewardConfig
from megatron_drpo.errors import RewardError
from megatron_drpo.rewards import RewardRequest
from megatron_drpo.rewards.service import Service
from megatron_drpo.types import Rollout

_START_SECONDS = 300.0
"""Time for a worker to import the user's module; network file systems are slow to import from."""

_NAMED = 3
"""Failures that an error names."""


@dataclass(frozen=True)
class Scored:
    """What became of a batch.

    Example: Scored(values=[1.0, nan], failures=["prompt 'a:7', sample 1: raised KeyError: 'x'"])
    """

    values: list[float]
    """One per rollout, in order; finite, or NaN where the reward failed."""
    failures: list[str]
    """One per NaN, in order: the prompt, the sample, and why."""


def check_failures(config: RewardConfig, failures: Sequence[str], batch_size: int) -> None:
    """A batch may lose a few samples to a reward that fails, but no more than a few.

    Args:
        config: says how many.
        failures: what `Scored` says of them.
        batch_size: responses that were judged.

    Raises:
        RewardError: there are more; names the first.
    """
    allowed = math.floor(config.reward_max_failures * batch_size)
    if len(failures) > allowed:
        more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
        raise RewardError(
            f"--reward-max-failures {config.reward_max_failures:g}: {len(failures)} of "
            f"{batch_size} responses have no reward and {allowed} may have none; mend what "
            "failed, or raise the limit: " + "; ".join(failures[:_NAMED]) + more
        )


def check_reward(config: RewardConfig) -> None:
    """Find out before any work whether the reward can be had; nothing is left running.

    Raises:
        RewardError: it is unknown, fails to import in a worker, or its service does not answer.
    """
    with RewardPool(dataclasses.replace(config, reward_workers=1)):
        pass


class Judge(Protocol):
    """One of the parties that a pool shares its work among: a worker, or a line to the service."""

    at_once: int
    """Responses that it takes at a time."""

    async def start(self) -> None:
        """Get ready, or raise a RewardError that says why not."""
        ...

    async def judge(self, requests: Sequence[RewardRequest]) -> list[float | str]:
        """For each of at most `at_once` requests a finite number, or why there is none."""
        ...

    async def stop(self) -> None:
        """End at once, whatever is under way."""
        ...


class RewardPool:
    """Computes rewards until it is closed: a context manager.

    A reward that raises, takes too much time or memory, ends its process or returns no finite
    number costs its sample, not the run, unless there are more of those than allowed.

        with RewardPool(config.reward) as pool:
            scored = pool.score(rollouts)

    At once the workers are started and load the reward, or the service is asked for a sign of life.
    Workers do not outlive the thread that started them.

    Raises:
        RewardError: the reward is unknown, fails to import, or its service does not answer.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        kind = Service if config.is_service else _Worker
        self._judges: list[Judge] = [kind(config) for _ in range(config.reward_workers)]
        self._runner = asyncio.Runner()
        try:
            self._runner.run(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        self._runner.run(self._stop())
        self._runner.close()

    def score(self, rollouts: Sequence[Rollout], batch_size: int | None = None) -> Scored:
        """The reward of each response.

        Args:
            rollouts: [N].
            batch_size: of the batch that these are a share of, over all data-parallel replicas (who
                then calls `check_failures` for the whole); N if left out.

        Raises:
            RewardError: more failures than `--reward-max-failures` allows for the batch (as soon as
                that is certain), or a worker or the service cannot go on.
        """
        return self._runner.run(self._score(rollouts, batch_size or len(rollouts)))

    async def _start(self) -> None:
        with _the_first():
            async with asyncio.TaskGroup() as tasks:
                for judge in self._judges:
                    tasks.create_task(judge.start())

    async def _stop(self) -> None:
        for judge in self._judges:
            await judge.stop()

    async def _score(self, rollouts: Sequence[Rollout], batch_size: int) -> Scored:
        values = [math.nan] * len(rollouts)
        failures: dict[int, str] = {}
        left = iter(range(len(rollouts)))

        async def work(judge: Judge) -> None:
            while share := list(itertools.islice(left, judge.at_once)):
                requests = [_request(rollouts[index]) for index in share]
                for index, value in zip(share, await judge.judge(requests), strict=True):
                    if isinstance(value, float):
                        values[index] = value
                    else:
                        rollout = rollouts[index]
                        where = f"prompt {rollout.prompt.id!r}, sample {rollout.sample}"
                        failures[index] = f"{where}: {value}"
                check_failures(self._config, list(failures.values()), batch_size)

        with _the_first():
            async with asyncio.TaskGroup() as tasks:
                for judge in self._judges:
                    tasks.create_task(work(judge))
        return Scored(values, [failures[index] for index in sorted(failures)])


@contextlib.contextmanager
def _the_first() -> Iterator[None]:
    """Of the errors that a group of tasks ended with, the first one alone."""
    try:
        yield
    except* Exception as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        first = error
    else:
        return
    raise first


def _request(rollout: Rollout) -> RewardRequest:
    prompt = rollout.prompt
    return RewardRequest(
        prompt.text, rollout.response_text, prompt.answer, rollout.finish_reason, prompt.metadata
    )


class _Worker:
    """A process that runs `worker.main`; started again after it was lost.

    It has a session of its own: Ctrl-C at the terminal is the trainer's to handle, and what the
    reward starts is ended with it.
    """

    at_once = 1

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        config = self._config
        program = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
            "from megatron_drpo.rewards.worker import main; main()"
        )
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, json.dumps(sys.path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        setup = {
            "reward": config.reward,
            "memory_bytes": int(config.reward_memory_gib * 2**30),
            "parent": os.getpid(),
        }
        answer = await self._ask(setup, _START_SECONDS)
        if isinstance(answer, str):
            problem = f"--reward {config.reward}: while it was imported, {answer}"
            if answer == _TOO_LATE:
                problem = f"--reward {config.reward}: importing it takes over {_START_SECONDS:g} s"
            raise RewardError(problem)
        if "refused" in answer:
            await self.stop()
            raise RewardError(answer["refused"])

    async def judge(self, requests: Sequence[RewardRequest]) -> list[float | str]:
        (request,) = requests
        if not self._alive():
            await self.stop()
            await self.start()
        answer = await self._ask(vars(request), self._config.reward_timeout_seconds)
        if answer == _TOO_LATE:
            seconds = self._config.reward_timeout_seconds
            return [f"took longer than --reward-timeout-seconds {seconds:g}"]
        if isinstance(answer, str):
            return [answer]
        if "spent" in answer:
            await self.stop()
        return [answer["value"] if "value" in answer else answer["failed"]]

    async def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            self._process = None

    def _alive(self) -> bool:
        """Asks the kernel: asyncio hears of an end only while its loop runs."""
        if self._process is None:
            return False
        try:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return ended is None

    async def _ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any] | str:
        """The answer, or what became of the process, which then is no more."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                process.stdin.write(json.dumps(question).encode() + b"\n")
                with contextlib.suppress(ConnectionError):  # it has ended: nothing to read
                    await process.stdin.drain()
                line = await process.stdout.readline()
                if line.endswith(b"\n"):
                    return json.loads(line)
                return _ended(await process.wait())
        except TimeoutError:
            await self.stop()
            return _TOO_LATE
        except BaseException:
            # Called off: its answer must not be taken for that to the next question.
            await asyncio.shield(self.stop())
            raise


_TOO_LATE = "the time limit passed"


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended its process (exit status {status})"
    hint = " (often: the machine is out of memory)" if status == -signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-status).name}{hint}"
