"""Compute one step of a run again, and compare it with what the run logged.

    torchrun --nproc-per-node 2 tools/replay_step.py RUN --step 12 [flags that are to differ]

takes the checkpoint before the step (for step 1 the model that the run started from) and the
rollouts that the run saved of it (`--save-rollouts`), and prints every number of the step beside
the logged one. In the run's own layout on a CPU they are equal bit for bit, in another to rounding.
Flags of training say what is to differ: another objective shows what that would have made of the
same step. `--tokens FILE` writes log pi, log mu, ratio, weight and advantage of every token
(docs/debugging.md). Nothing in RUN is changed.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from megatron_drpo import disk
from megatron_drpo.cli import exit_status
from megatron_drpo.errors import ConfigError

if TYPE_CHECKING:
    from megatron_drpo.replay import Replayed, Source


@dataclass(frozen=True)
class Replay:
    """Compute one step of a run again, and compare it with what the run logged. Start it by
    torchrun. Flags of training that say how a step is computed (objective, advantages, layout,
    memory) are understood as well, and replace the run's."""

    run: tyro.conf.Positional[str]
    """The run's --output-dir."""
    step: int
    """Which step, from 1."""
    tokens: str | None = None
    """Write every token of every update to this file (JSONL)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Replay; the exit status."""
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Parse, check, compute, print.

    Raises:
        DrpoError: whatever the user has to mend.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "0"))
    asked, rest = tyro.cli(
        Replay,
        args=argv,
        prog="replay_step.py",
        console_outputs=rank == 0,
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    # Imported here and below, since they take seconds: a mistyped flag is answered at once.
    from megatron_drpo import replay

    directory = Path(asked.run)
    values = replay.read_config(directory)
    source = replay.find(directory, asked.step, values)
    config = replay.configure(values, source, rest)
    logged = replay.logged_step(directory, asked.step)
    _check_file(directory, asked.tokens)
    if not world_size:
        ranks = config.parallel.model_parallel_size
        raise ConfigError(
            f"RANK and WORLD_SIZE are not set: start this with torchrun --nproc-per-node {ranks} "
            "tools/replay_step.py RUN --step N [flags]"
        )
    from megatron_drpo.preflight import preflight

    inputs = preflight(config, world_size, rank, replay=source.rollouts)
    done = replay.replay(config, inputs, source, with_tokens=asked.tokens is not None)
    if rank == 0:
        print("\n".join(_lines(source, rest, logged, done)), flush=True)
        if asked.tokens is not None:
            _write(Path(asked.tokens), done.tokens)


def _check_file(directory: Path, file: str | None) -> None:
    if file is None:
        return
    parent = Path(file).absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"--tokens {file}: there is no such directory; create it")
    if parent.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(
            f"--tokens {file}: lies in the run {directory}, which a replay leaves as it is; choose "
            "another directory"
        )


def _lines(
    source: Source, flags: Sequence[str], logged: Mapping[str, float], done: Replayed
) -> list[str]:
    """What the replay found, for people."""
    from megatron_drpo.replay import compare

    numbers = compare(logged, done.scalars)
    start = source.checkpoint or "the model that the run started from"
    lines = [f"step {source.step}, from {start} and {source.rollouts}"]
    if flags:
        lines.append(f"with {' '.join(flags)}")
    lines += ["", f"{'':36}{'logged':>18}{'replayed':>18}   difference"]
    for number in numbers:
        if number.equal:
            difference = "="
        elif number.logged is None:
            difference = "not logged"
        else:
            difference = f"{number.difference:.1e}"
        shown = "" if number.logged is None else f"{number.logged:.10g}"
        lines.append(f"{number.name:36}{shown:>18}{number.replayed:>18.10g}   {difference}")
    lines.append("")
    compared = [number for number in numbers if number.logged is not None]
    equal = sum(number.equal for number in compared)
    told = f"{equal} of {len(compared)} numbers are equal bit for bit"
    if equal < len(compared):
        named = [
            f"{number.name} {number.difference:.1e}"
            for number in compared
            if number.name in ("loss", "grad_norm") and not number.equal
        ]
        if named:
            told += f"; relative difference of {', of '.join(named)}"
    lines.append(told if compared else "the run has not logged this step")
    others = sorted(logged.keys() - done.scalars.keys())
    if others:
        lines.append(f"not computed here: {', '.join(others)}")
    return lines


def _write(file: Path, tokens: Sequence[Mapping[str, Any]]) -> None:
    finite = (
        # JSON has no number for a ratio of more than 709 nats, nor for one that is undefined.
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        for row in tokens
    )
    lines = (json.dumps(row, allow_nan=False) + "\n" for row in finite)
    with disk.users_errors(f"--tokens {file}", "replay again"):
        disk.write_atomically(file, "".join(lines))
    print(f"{len(tokens)} tokens: {file}")


if __name__ == "__main__":
    sys.exit(main())
