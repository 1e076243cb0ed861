#!/usr/bin/env bash
""":"
# One file, two languages. torchrun runs its argument as Python, so
#     torchrun --nproc-per-node 2 examples/train_drpo_gpt.sh [flags]
# needs Python here, while
#     bash examples/train_drpo_gpt.sh [flags]
# needs a shell. To a shell the line above is the command `:`, which does nothing, and `exec` below
# ends the script; to Python all this, down to the closing quotes, is a docstring.
exec "${PYTHON:-python3}" "$0" "$@"
: <<'# the end of the Python part'
"""

import contextlib
import io
import logging
import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPE = CHECKOUT / "examples" / "recipes" / "arithmetic_cpu.yaml"
BASE_MODEL = Path("build/base-model")  # as the recipe names it


def torchrun_arguments(argv: list[str]) -> list[str]:
    """What to tell torchrun, by the environment: NPROC_PER_NODE, also GPUS_PER_NODE (this node's
    GPUs, or 2 without one); for several nodes NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT (29500).
    """
    env = os.environ
    ranks = env.get("NPROC_PER_NODE") or env.get("GPUS_PER_NODE")
    if not ranks:
        import torch

        ranks = str(torch.cuda.device_count() or 2)
    where = ["--standalone"]
    if env.get("NNODES", "1") != "1":
        where = ["--nnodes", env["NNODES"], "--node-rank", env["NODE_RANK"]]
        where += ["--master-addr", env["MASTER_ADDR"]]
        where += ["--master-port", env.get("MASTER_PORT", "29500")]
    return [*where, "--nproc-per-node", ranks, __file__, *argv]


def launch(argv: list[str]) -> int:
    """Start this file under torchrun; the exit status of the rank that failed first, or 0."""
    # On a CPU the threads of several ranks would wait for each other by spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main
    except ImportError:
        print(
            f"error: {sys.executable} has no torch; run: make env, then: . .venv/bin/activate",
            file=sys.stderr,
        )
        return 2
    # torchrun's log and traceback would bury what the failing rank has said.
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        main(torchrun_arguments(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            ended = f"error: rank {rank} was ended by {failure.signal_name()}"
            print(f"{ended} (SIGKILL often means: out of memory)", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as stop:  # Ctrl-C, or a scheduler's SIGTERM; the ranks have ended
        print(f"error: ended by {stop.sigval.name}", file=sys.stderr)
        return 128 + stop.sigval
    return 0


def with_recipe(argv: list[str]) -> list[str]:
    """`argv` behind the default recipe, unless it brings a model or a recipe of its own."""
    given = {arg.partition("=")[0].replace("_", "-") for arg in argv}
    if given & {"--hf-model", "--config", "--help", "-h"}:
        return argv
    from tools.make_base_model import ensure_base_model

    # One rank makes the small base model while the others wait for it; rank 0 says so.
    quiet = os.environ.get("RANK", "0") != "0"
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
        ensure_base_model(BASE_MODEL)
    recipe = ["--config", str(RECIPE)]
    if int(os.environ.get("WORLD_SIZE", "2")) % 2:
        # The recipe splits the model over two ranks; `torchrun FILE` alone starts one.
        recipe += ["--tensor-model-parallel-size", "1"]
    return [*recipe, *argv]


# dist_checkpointing starts processes that import this file again, and those must not train.
if __name__ == "__main__":
    if "RANK" not in os.environ and not {"--help", "-h"} & set(sys.argv):
        sys.exit(launch(sys.argv[1:]))
    sys.path.insert(0, str(CHECKOUT))
    from megatron_drpo import cli

    sys.exit(cli.exit_status(lambda: cli.start(with_recipe(sys.argv[1:]))))
# the end of the Python part
