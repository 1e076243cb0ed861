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
import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPE = CHECKOUT / "examples" / "recipes" / "arithmetic_cpu.yaml"
BASE_MODEL = Path("build/base-model")  # as the recipe names it


def with_recipe(argv: list[str], world_size: int) -> list[str]:
    """`argv` behind the default recipe, unless it brings a model or a recipe of its own."""
    given = {arg.partition("=")[0].replace("_", "-") for arg in argv}
    if given & {"--hf-model", "--config", "--load", "--help", "-h"}:
        return argv
    from megatron_drpo import arguments
    from tools.make_base_model import ensure_base_model

    recipe = ["--config", str(RECIPE)]
    if world_size % 2:
        # The recipe splits the model over two ranks; `torchrun FILE` alone starts one.
        recipe += ["--tensor-model-parallel-size", "1"]
    arguments.parse([*recipe, *argv])  # what is mistyped is answered before the model is made
    # One process makes the small base model while the others wait for it; rank 0 says so.
    quiet = os.environ.get("RANK", "0") != "0"
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
        ensure_base_model(BASE_MODEL)
    return [*recipe, *argv]


# dist_checkpointing starts processes that import this file again, and those must not train.
if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    from megatron_drpo import launch

    sys.exit(launch.main(program=[__file__], prepare=with_recipe))
# the end of the Python part
