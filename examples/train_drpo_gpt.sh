#!/usr/bin/env bash
""":"
# One file, two languages. torchrun runs its argument as Python, so
#     torchrun --nproc-per-node 2 examples/train_drpo_gpt.sh [flags]
# needs Python here, while
#     bash examples/train_drpo_gpt.sh [flags]
# needs a shell. To a shell the line above is the command `:`, which does nothing, and `exec` below
# ends the script; to Python all this, down to the closing quotes, is a docstring.
#
# Environment: PYTHON (python3); NPROC_PER_NODE, also GPUS_PER_NODE (this node's GPUs, or 2 without
# one); for several nodes NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (29500).
set -eu
PYTHON="${PYTHON:-python3}"
count="import torch; print(torch.cuda.device_count() or 2)"
ranks="${NPROC_PER_NODE:-${GPUS_PER_NODE:-$("$PYTHON" -c "$count")}}" || {
    echo "error: $PYTHON has no torch; run: make env, then: . .venv/bin/activate" >&2
    exit 2
}
if [ "${NNODES:-1}" = 1 ]; then
    nodes="--standalone"
else
    nodes="--nnodes $NNODES --node-rank $NODE_RANK --master-addr $MASTER_ADDR"
    nodes="$nodes --master-port ${MASTER_PORT:-29500}"
fi
# On a CPU the threads of several ranks would wait for each other by spinning.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck disable=SC2086  # $nodes is several words
exec "$PYTHON" -m torch.distributed.run $nodes --nproc-per-node "$ranks" "$0" "$@"
: <<'# the end of the Python part'
"""

import contextlib
import io
import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPE = CHECKOUT / "examples" / "recipes" / "arithmetic_cpu.yaml"
BASE_MODEL = Path("build/base-model")  # as the recipe names it


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
    sys.path.insert(0, str(CHECKOUT))
    from megatron_drpo import cli

    sys.exit(cli.exit_status(lambda: cli.start(with_recipe(sys.argv[1:]))))
# the end of the Python part
