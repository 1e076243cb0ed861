"""A checkpoint's weights into this rank's chunks of a model, after all ranks have verified them.

In: a directory of either kind (`checkpoint.torch_dist.open_weights`). Out: filled parameters, or
one error on every rank: none goes on into a collective where another has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from torch import nn

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.checkpoint.manifest import FILE, Weights, check_manifest, read_manifest
from megatron_drpo.checkpoint.model_weights import Places, export_hf, load_weights
from megatron_drpo.checkpoint.resume import STATE, damaged_files, read_state
from megatron_drpo.checkpoint.torch_dist import open_weights
from megatron_drpo.errors import CheckpointError
from megatron_drpo.mcore.parallel import Layout


def load(
    source: Path,
    architecture: Architecture,
    models: Sequence[nn.Module],
    layout: Layout,
    *,
    verify: bool,
) -> str:
    """Fill every parameter of the chunks. Collective over all ranks.

    Args:
        source: a Hugging Face directory, or a Megatron checkpoint.
        verify: hash everything first and compare it with what was written down when the checkpoint
            was made, where that is there. The ranks share the work, so it is one copy of the
            checkpoint that is verified: storage that all of them see.

    Returns:
        What the weights were compared with, for people.

    Raises:
        CheckpointError: on all ranks, with what any of them found.
    """
    found = "not compared with anything"
    # One for all ranks: a run that goes on moves its newest checkpoint.
    source = Path(layout.gather_objects(str(source))[0])

    def check() -> list[str]:
        nonlocal found
        if verify:
            with open_weights(source, architecture) as weights:
                problems, found = _verify(weights, layout)
                return problems
        return []

    def fill() -> list[str]:
        with open_weights(source, architecture) as weights:
            load_weights(weights, architecture, models, places_of(layout))
        return []

    raise_everywhere(layout, check, "or use --no-verify-weights if you know why")
    raise_everywhere(layout, fill)
    return found


def export(
    path: Path,
    settings: Path,
    architecture: Architecture,
    models: Sequence[nn.Module],
    layout: Layout,
    *,
    run: str | None = None,
) -> None:
    """`model_weights.export_hf` of chunks in this layout; collective over all ranks."""
    export_hf(path, settings, architecture, models, places_of(layout), run=run)


def places_of(layout: Layout) -> Places:
    """What `checkpoint.model_weights` needs of a layout, which has it under the same names."""
    return Places(**{field.name: getattr(layout, field.name) for field in fields(Places)})


def raise_everywhere(
    layout: Layout, find: Callable[[], Sequence[str]], remedy: str | None = None
) -> None:
    """Raise the problems that any rank finds on every rank; collective.

    Args:
        find: returns problems of this rank, or raises CheckpointError or OSError.
        remedy: a last line of the message.
    """
    try:
        problems = [*find()]
    except (CheckpointError, OSError) as error:
        problems = [str(error)]
    layout.raise_together(problems, CheckpointError, remedy)


def _verify(weights: Weights, layout: Layout) -> tuple[list[str], str]:
    """This rank's share: the problems, and what was compared with (manifest.json or state.json)."""
    path = weights.directory
    share = (layout.rank, layout.world_size)
    if (path / STATE).is_file():
        return damaged_files(path, read_state(path), *share), f"as {STATE} says"
    manifest = read_manifest(path)
    if manifest is None:
        return [], f"there is no {FILE} to compare with"
    rank, num_ranks = share
    problems = check_manifest(weights, manifest, rank=rank, num_ranks=num_ranks)
    return problems, f"as {FILE} says"
