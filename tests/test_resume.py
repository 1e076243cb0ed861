"""Which checkpoint a run may continue from, without Megatron."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_drpo.checkpoint import resume
from megatron_drpo.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron_drpo.errors import CheckpointError


def config(**groups: object) -> Config:
    return Config(ModelConfig("model"), data=DataConfig(prompts="prompts"), **groups)  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint's frame: two files of state, and what describes them."""
    path = tmp_path / "step-000003"
    path.mkdir()
    (path / "a.distcp").write_bytes(bytes(range(256)) * 64)
    (path / "b.distcp").write_bytes(b"rest")
    state = {
        "progress": {"step": 3, "num_updates": 12, "skipped_updates": 0},
        "scheduler": {},
        "world_size": 2,
        "megatron_core": "0.16.1",
        "files": resume.digests(path, 0, 1),
        "config": config().flat(),
    }
    (path / resume.STATE).write_text(json.dumps(state))
    (tmp_path / resume.LATEST).write_text(path.name)
    return path


def check(path: Path, ranks: int = 1) -> None:
    """Raise what the ranks find together."""
    state = resume.read_state(path)
    found = [resume.damaged_files(path, state, rank, ranks) for rank in range(ranks)]
    if problems := [problem for each in found for problem in each]:
        raise CheckpointError("\n".join(problems))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_whole_checkpoint_passes(checkpoint: Path, ranks: int) -> None:
    assert resume.latest(checkpoint.parent) == checkpoint
    (checkpoint / ".notes").mkdir()  # what somebody else puts there does not matter
    check(checkpoint, ranks)


def test_one_flipped_bit_is_found_and_the_file_named(checkpoint: Path) -> None:
    file = checkpoint / "a.distcp"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.distcp: differs from what was saved"):
        check(checkpoint, 2)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "b.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"b\.distcp: is missing"):
        check(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": {}}'])
def test_a_state_without_its_fields_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / resume.STATE).write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json: .*; write the name of another"):
        resume.read_state(checkpoint)


def test_latest_must_name_a_checkpoint(tmp_path: Path) -> None:
    assert resume.latest(tmp_path) is None
    (tmp_path / resume.LATEST).write_text("step-000009")
    with pytest.raises(CheckpointError, match="step-000009, which is not a complete checkpoint"):
        resume.latest(tmp_path)


def test_what_changes_the_learning_may_not_change(checkpoint: Path) -> None:
    resume.check_same_run(checkpoint, config())
    resume.check_same_run(checkpoint, config(train=TrainConfig(train_iters=500)))
    other = config(train=TrainConfig(seed=7), optimizer=OptimizerConfig(lr=1e-3))
    with pytest.raises(CheckpointError) as refused:
        resume.check_same_run(checkpoint, other)
    assert "--lr: the checkpoint has 1e-06, this run 0.001" in str(refused.value)
    assert "--seed: the checkpoint has 1234, this run 7" in str(refused.value)


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(checkpoint: Path) -> None:
    state = json.loads((checkpoint / resume.STATE).read_text())
    del state["config"]["kl_coef"], state["config"]["rollout_stop_ids"]
    (checkpoint / resume.STATE).write_text(json.dumps(state))
    resume.check_same_run(checkpoint, config())
    other = config(objective=ObjectiveConfig(kl_coef=0.1))
    with pytest.raises(CheckpointError, match="--kl-coef: the checkpoint has 0.0, this run 0.1"):
        resume.check_same_run(checkpoint, other)


def test_the_length_of_a_decay_may_not_change(checkpoint: Path) -> None:
    decay = OptimizerConfig(lr_decay_style="linear")
    state = json.loads((checkpoint / resume.STATE).read_text())
    state["config"] = config(optimizer=decay).flat()
    (checkpoint / resume.STATE).write_text(json.dumps(state))
    longer = config(optimizer=decay, train=TrainConfig(train_iters=500))
    with pytest.raises(
        CheckpointError, match="--train-iters: the checkpoint has 100, this run 500"
    ):
        resume.check_same_run(checkpoint, longer)
