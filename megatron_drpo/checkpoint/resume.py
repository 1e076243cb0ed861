"""Which training checkpoint a run continues from, and whether it may.

In: a run's `checkpoints` directory and the configuration. Out: the newest complete checkpoint, or
an error, before any long work and without Megatron; `mcore.state` writes and reads the state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_drpo.config import Config, flag
from megatron_drpo.errors import CheckpointError

MAY_CHANGE = frozenset(
    {
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "device",
        "distributed_timeout_minutes",
        "transformer_impl",
        "max_tokens_per_microbatch",
        "rollout_max_slots",
        "max_engine_gap",
        "reward_timeout_seconds",
        "save_rollouts",
        "train_iters",
        "output_dir",
        "checkpoint_interval",
        "checkpoint_keep",
        "resume",
        "export_hf",
        "progress",
    }
)
"""Settings that a resume may change: they do not change what is learned, only where and how long.
(`train_iters` does with a decaying learning rate whose length it sets: see `check_same_run`.)"""

LATEST = "latest"


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Example: Progress(step=12, num_updates=48, skipped_updates=0)."""

    step: int
    """Training steps done: the next one's number, and the cursor into prompts and randomness."""
    num_updates: int
    skipped_updates: int


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint under `directory`, or None.

    Raises:
        CheckpointError: `latest` names a checkpoint that is not there.
    """
    pointer = directory / LATEST
    if not pointer.exists():
        return None
    path = directory / pointer.read_text(encoding="utf-8").strip()
    if not (path / "state.json").is_file():
        raise CheckpointError(
            f"{pointer}: names {path.name}, which is not a complete checkpoint; write the name of "
            f"one that is into {pointer}, or start again in another --output-dir"
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint; raises CheckpointError if it cannot be read."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'}: cannot be read: {error}") from error


def check_same_run(path: Path, config: Config) -> None:
    """Refuse to continue a run under a configuration that would make it another run.

    Raises:
        CheckpointError: lists each differing flag with both values.
    """
    saved, now = read_state(path)["config"], config.flat()
    decays = config.optimizer.lr_decay_style != "constant"
    fixed = MAY_CHANGE
    if decays and config.optimizer.lr_decay_iters is None:
        fixed = MAY_CHANGE - {"train_iters"}  # it sets the length of the decay
    differ = [
        f"{flag(name)}: the checkpoint has {saved.get(name)!r}, this run {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys())
        if name not in fixed and saved.get(name) != now.get(name)
    ]
    if differ:
        raise CheckpointError(
            f"--resume: {path} belongs to a run of another configuration; use its values, or "
            "another --output-dir\n" + "\n".join(differ)
        )
