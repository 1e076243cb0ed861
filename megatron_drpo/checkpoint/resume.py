"""Which training checkpoint a run continues from, and whether it may.

In: a run's `checkpoints` directory and the configuration. Out: the newest complete checkpoint, or
an error, before any long work and without Megatron; `mcore.state` writes and reads the state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_drpo.checkpoint.manifest import file_digest
from megatron_drpo.config import Config, flag
from megatron_drpo.errors import CheckpointError

MAY_CHANGE = frozenset(
    {
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "expert_model_parallel_size",
        "sequence_parallel",
        "context_parallel_size",
        "expert_tensor_parallel_size",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "fine_grained_activation_offloading",
        "offload_modules",
        "optimizer_cpu_offload",
        "optimizer_offload_fraction",
        "peak_tflops",
        "device",
        "verify_weights",
        "distributed_timeout_minutes",
        "transformer_impl",
        "max_tokens_per_microbatch",
        "fused_output",
        "output_chunk_mib",
        "log_ratio_limit",
        "rollout_max_slots",
        "rollout_kv_cache_gib",
        "rollout_servers",
        "rollout_server_timeout_seconds",
        "rollout_server_retries",
        "weight_sync",
        "weight_sync_dir",
        "weight_sync_address",
        "weight_sync_port",
        "weight_sync_timeout_seconds",
        "max_engine_gap",
        "reward_workers",
        "reward_timeout_seconds",
        "reward_memory_gib",
        "reward_max_failures",
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

LATEST, STATE = "latest", "state.json"
_FIELDS = frozenset({"progress", "scheduler", "world_size", "megatron_core", "files", "config"})
"""What `state.json` holds."""


def step_name(step: int) -> str:
    """What the checkpoint after so many steps is called."""
    return f"step-{step:06d}"


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
    if not (path / STATE).is_file():
        raise CheckpointError(
            f"{pointer}: names {path.name}, which is not a complete checkpoint; write the name of "
            f"one that is into {pointer}, or start again in another --output-dir"
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint; CheckpointError if it cannot be read or lacks a field."""
    file, remedy = path / STATE, f"write the name of another checkpoint into {path.parent / LATEST}"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {remedy}") from error
    missing = _FIELDS - set(state if isinstance(state, dict) else ())
    if missing:
        raise CheckpointError(f"{file}: lacks {', '.join(sorted(missing))}; {remedy}")
    return state


def digests(path: Path, rank: int, num_ranks: int) -> dict[str, str]:
    """SHA-256 of this rank's share of a checkpoint's files, all but `state.json`, by name."""
    names = sorted(file.name for file in path.iterdir() if file.name != STATE)
    return {name: file_digest(path / name) for name in names[rank::num_ranks]}


def damaged_files(path: Path, state: dict[str, Any], rank: int, num_ranks: int) -> list[str]:
    """Compare this rank's share of a checkpoint's files with what `state.json` says was written.

    Storage that flips a bit is not noticed by what reads the shards, and the run would go on with
    other weights.

    Returns:
        A sentence for each file that is missing or differs; the union over the ranks is the whole.
    """
    written, found = state["files"], []
    for name in sorted(written)[rank::num_ranks]:
        file = path / name
        if not file.is_file():
            found.append(f"{file}: is missing")
        elif file_digest(file) != written[name]:
            found.append(f"{file}: differs from what was saved")
    return found


def check_same_run(path: Path, config: Config) -> None:
    """Refuse to continue a run under a configuration that would make it another run.

    Raises:
        CheckpointError: lists each differing flag with both values.
    """
    # A setting that is newer than the checkpoint had its default's effect then.
    saved, now = config.flat_defaults() | read_state(path)["config"], config.flat()
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
