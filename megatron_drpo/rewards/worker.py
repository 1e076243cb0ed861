"""The process that computes rewards: one request per line in, one answer per line out.

In, from `pool.py`: a line that sets it up, then `RewardRequest` records as JSON. Out: {} once the
reward is loaded, or {"refused": TEXT}; then for each request {"value": NUMBER} or {"failed": TEXT}.
JSON, not pickle: whatever the user's function returns or raises can be told. The lines go through
descriptors of their own, so that what the function prints (it goes to standard error) or reads
(there is nothing) does not disturb them.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, TextIO

from megatron_drpo.errors import RewardError
from megatron_drpo.rewards import Reward, RewardRequest, finite_number, load_reward
from megatron_drpo.user_code import described

_LONGEST_TEXT = 1000
"""Characters of an error that are passed on."""


def main() -> None:
    """Serve until the trainer closes its end, or is gone."""
    requests, answers = _private_pipes()
    setup = json.loads(requests.readline())
    die_with_parent(setup["parent"])
    limit_memory(setup["memory_bytes"])
    try:
        reward = load_reward(setup["reward"])
    except RewardError as error:
        short = isinstance(error.__cause__, MemoryError)
        remedy = "; raise --reward-memory-gib" if short else ""
        _send(answers, {"refused": f"{error}{remedy}"})
        return
    _send(answers, {})
    for line in requests:
        _send(answers, judge(reward, RewardRequest(**json.loads(line))))


def judge(reward: Reward, request: RewardRequest) -> dict[str, Any]:
    """{"value": finite number}, or {"failed": why there is none}.

    After {"spent": true} the process is to be replaced: what fills its memory may stay.
    """
    try:
        value = reward(request)
    except MemoryError:
        return {"failed": "took more memory than --reward-memory-gib allows", "spent": True}
    except (Exception, SystemExit) as error:  # an exit would look like the end of the process
        return {"failed": f"raised {described(error)[:_LONGEST_TEXT]}"}
    number = finite_number(value)
    if number is not None:
        return {"value": number}
    kind = type(value).__name__
    return {"failed": f"returned {_shown(value)} ({kind}); must be a finite number"}


def _shown(value: object) -> str:
    try:
        return repr(value)[:100]
    except Exception as error:  # of the user's __repr__
        return f"what cannot be shown ({type(error).__name__})"


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process once the one that started it is gone, however it ended.

    Where there is no such service (it is Linux's), the end of the requests must do: a process that
    is busy notices it late.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            sys.exit(1)


def limit_memory(num_bytes: int) -> None:
    """Let allocations fail beyond so much private memory, which is what Linux counts as data."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _private_pipes() -> tuple[TextIO, TextIO]:
    """Standard input and output for ourselves; others find an empty input and standard error."""
    requests = os.fdopen(os.dup(0), encoding="ascii")
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return requests, answers


def _send(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
