"""The command line: how a run starts, and how it ends when the user has something to mend.

L3, the way in. In: arguments, RANK and WORLD_SIZE as torchrun sets them. Out: an exit status and,
where something is to be mended, messages on one rank.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_drpo import disk
from megatron_drpo.arguments import Options, parse
from megatron_drpo.config import Config
from megatron_drpo.errors import ConfigError, DrpoError

USAGE_ERROR = 2
"""Exit status when the user has something to mend."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

STOPPED = 138
"""Exit status of a run that was asked to stop (SIGUSR1) and can be continued: 128 + the signal, as
shells have it, which Kubeflow counts among the failures worth another try."""

_GRACE_SECONDS = 2.0

_RANK_0_SECONDS = 10.0
"""By how much rank 0 may be later than another rank to find the same problem; imports alone can
differ by seconds on a busy machine."""


def main() -> int:
    """Run the program on this process's arguments; the exit status."""
    return exit_status(lambda: start(sys.argv[1:]))


def exit_status(call: Callable[[], int | None]) -> int:
    """What `call` returned, or 0; `USAGE_ERROR`, after a message, if it raised an error of the
    user's; `INTERRUPTED` after Ctrl-C.

    Any other exception passes with its traceback: a defect of the program or, in a run of several
    ranks, the echo of a rank that is gone. An echo is cut short: torchrun ends this rank while it
    waits, so that what remains on the screen is what the first rank said.
    """
    try:
        return call() or 0
    except DrpoError as error:
        _report(error)
        return USAGE_ERROR
    except KeyboardInterrupt:  # all ranks got it
        if _rank() == 0:
            print("error: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            time.sleep(_GRACE_SECONDS)
        raise


def start(argv: Sequence[str]) -> int:
    """Parse, check and run (or, with `--dry-run`, describe the run on rank 0, and with
    `--verify-layout` compute one batch of it in two layouts); 0, or `STOPPED`.

    Raises:
        DrpoError: whatever the user has to mend, before any process group or during the run.
    """
    config, options = parse(argv)
    rank, world_size = _rank(), _world_size(config, options)
    # Imported here, since they take seconds: a mistyped flag is answered at once.
    from megatron_drpo.preflight import preflight

    inputs = preflight(config, world_size, rank)
    if options.dry_run:
        from megatron_drpo.dry_run import describe

        if rank == 0:
            print(describe(config, inputs, world_size))
    elif options.verify_layout:
        from megatron_drpo import verify_layout

        verify_layout.run(config, inputs, options)
    else:
        from megatron_drpo import train

        with disk.users_errors(
            f"--output-dir {config.output.output_dir}",
            "continue with --resume if there is a checkpoint",
        ):
            finished = train.run(config, inputs)
        return 0 if finished else STOPPED
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size(config: Config, options: Options) -> int:
    """The ranks that torchrun started; a dry run without torchrun supposes the fewest that fit."""
    parallel = config.parallel
    fewest = math.lcm(parallel.model_parallel_size, parallel.expert_parallel_ranks)
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if options.dry_run:
        return fewest
    raise ConfigError(
        "RANK and WORLD_SIZE are not set: start this with torchrun --nproc-per-node "
        f"{fewest} -m megatron_drpo [flags], or bash examples/train_drpo_gpt.sh [flags]"
    )


def _report(error: DrpoError) -> None:
    """Print each problem on standard error, once.

    Most problems are seen by all ranks alike. Rank 0 speaks at once and exits, whereupon torchrun
    ends the others while they wait; one that is still there afterwards has a problem of its own.
    """
    rank, where = _rank(), ""
    if rank:
        time.sleep(_RANK_0_SECONDS + int(os.environ.get("LOCAL_RANK", "0")))
        where = f" on rank {rank}"
    message = "\n".join(f"error{where}: {line}" for line in str(error).splitlines())
    print(message, file=sys.stderr, flush=True)
    _tell_torchrun(message)


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for it, so that its own last lines say it too.

    The format is that of torch.distributed.elastic's ErrorHandler, without importing torch.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": told}}
        Path(file).write_text(json.dumps(content), encoding="utf-8")
