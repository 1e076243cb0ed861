"""The whole program as a user runs it, on a tiny model: what a run leaves, and how it resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_drpo.checkpoint.convert import megatron_to_hf
from megatron_drpo.dashboard import is_measurement
from tests.distributed import run_distributed
from tests.tiny_run import make_tiny_run

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
def short(request):
    \"\"\"A reward that a random model varies in: the fewer characters the better.\"\"\"
    return -len(request.response) / 8
"""


def make_run(directory: Path) -> list[str]:
    """A tiny run whose rewards differ, so that its gradients are not zero."""
    flags = make_tiny_run(directory)
    (directory / "tiny_reward.py").write_text(REWARD)
    return [*flags, "--reward", "tiny_reward:short", "--eval-prompts", "prompts.jsonl"]


def _train(rank: int, world_size: int, root: Path, flags: list[str]) -> None:
    """Runs that share one start of the processes; each is a whole `train.run`."""
    from megatron.core import parallel_state

    from megatron_drpo import cli
    from megatron_drpo.checkpoint.convert import hf_to_megatron
    from megatron_drpo.errors import CheckpointError

    os.chdir(root)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    tp2 = [*flags, "--tensor-model-parallel-size", "2"]
    if rank == 0:  # of a run in the same directory that came further before it was killed
        Path("straight/rollouts").mkdir(parents=True)
        Path("straight/rollouts/step-000099.jsonl").write_text("{}\n")
    cli.start([*tp2, "--train-iters", "6", "--output-dir", "straight", "--save-rollouts"])
    cli.start([*tp2, "--train-iters", "3", "--output-dir", "resumed"])
    dist.barrier()
    if rank == 0:
        # As if it had been killed after logging more than its last checkpoint holds.
        with open("resumed/metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 4, "loss": 99.0}) + "\n")
        shutil.copytree("resumed", "other")
        shutil.copytree("resumed", "unreadable")
        (file,) = Path("unreadable/checkpoints").glob("*/__0_0.distcp")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    dist.barrier()
    cli.start([*tp2, "--train-iters", "6", "--output-dir", "resumed", "--resume"])
    # Another layout continues too, with the same numbers but for rounding.
    dp2 = [*flags, "--tensor-model-parallel-size", "1"]
    cli.start([*dp2, "--train-iters", "6", "--output-dir", "other", "--resume"])
    # The first step of the straight run again, from its rollouts.
    recorded = ["--rollouts-file", "straight/rollouts/step-000001.jsonl", "--train-iters", "1"]
    at = dp2.index("--prompts")
    cli.start([*dp2[:at], *dp2[at + 2 :], *recorded, "--output-dir", "replayed"])
    # From Megatron's checkpoints instead: one that was converted, and that of the straight run.
    at = tp2.index("--hf-model")
    loading = [*tp2[:at], *tp2[at + 2 :], "--train-iters", "1"]
    if rank == 0:
        hf_to_megatron("model", "megatron")
        shutil.copytree("megatron", "tampered")
        weight = load_file("model/model.safetensors")["model.norm.weight"].numpy().tobytes()
        (file,) = (f for f in Path("tampered").glob("*.distcp") if weight in f.read_bytes())
        file.write_bytes(file.read_bytes().replace(weight, b"\0" + weight[1:]))
    dist.barrier()
    cli.start([*loading, "--load", "megatron", "--output-dir", "loaded"])
    cli.start([*loading, "--load", "straight/checkpoints", "--output-dir", "continued"])
    # Last, because they leave their process groups behind.
    with pytest.raises(CheckpointError) as refused:
        cli.start([*loading, "--load", "tampered", "--output-dir", "never"])
    Path(f"tampered-{rank}").write_text(str(refused.value))
    parallel_state.destroy_model_parallel()
    with pytest.raises(CheckpointError) as refused:
        cli.start([*tp2, "--train-iters", "6", "--output-dir", "unreadable", "--resume"])
    Path(f"unreadable-{rank}").write_text(str(refused.value))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    flags = [*make_run(root), "--lr", "1e-3", "--no-progress", "--eval-interval", "3", "--bf16"]
    # A learning rate that moves, a frozen reference model and whole distributions: more that a
    # resume must find again.
    flags += ["--lr-warmup-iters", "2", "--lr-decay-style", "cosine", "--lr-decay-iters", "12"]
    flags += ["--kl-coef", "0.05", "--kl-estimator", "full"]
    flags += ["--eval-samples-per-prompt", "2", "--eval-top-p", "0.9"]
    run_distributed(_train, 2, root, flags)
    return root


def logged(run: Path) -> dict[int, dict[str, float]]:
    """Every number of metrics.jsonl by step and name, clocks left out."""
    steps: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        values = {name: v for name, v in line.items() if not is_measurement(name)}
        steps.setdefault(values.pop("step"), {}).update(values)
    return steps


@pytest.mark.distributed
def test_saved_rollouts_are_those_of_the_run(runs: Path) -> None:
    names = sorted(path.name for path in (runs / "straight/rollouts").iterdir())
    assert names == [f"step-{number:06d}.jsonl" for number in range(1, 7)]


@pytest.mark.distributed
def test_three_steps_and_three_resumed_are_six(runs: Path) -> None:
    straight, resumed = logged(runs / "straight"), logged(runs / "resumed")
    assert sorted(straight) == list(range(7))
    assert straight[6]["policy_version"] == 12
    assert any(step.get("grad_norm", 0) > 0 for step in straight.values())
    assert straight == resumed  # every logged number, to the last bit
    ours = load_file(runs / "straight/hf/model.safetensors")
    theirs = load_file(runs / "resumed/hf/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.distributed
def test_a_checkpoint_continues_in_another_layout(runs: Path) -> None:
    straight, other = logged(runs / "straight"), logged(runs / "other")
    assert sorted(other) == list(range(7))
    # The first step after the change starts from the same weights and so draws the same responses,
    # unless rounding in bf16 moves a draw across the edge of two ids.
    assert other[4]["response_length/mean"] == pytest.approx(
        straight[4]["response_length/mean"], rel=0.25
    )
    assert other[6]["policy_version"] == 12


@pytest.mark.distributed
def test_a_damaged_checkpoint_is_refused_on_all_ranks(runs: Path) -> None:
    for rank in (0, 1):
        message = (runs / f"unreadable-{rank}").read_text()
        assert "step-000003/__0_0.distcp: differs from what was saved" in message


@pytest.mark.distributed
def test_a_megatron_checkpoint_starts_the_same_run(runs: Path) -> None:
    straight, loaded = logged(runs / "straight"), logged(runs / "loaded")
    assert loaded[0] == straight[0] and loaded[1] == straight[1] | loaded[1]
    assert load_file(runs / "loaded/hf/model.safetensors")  # no --hf-model was there to copy from


@pytest.mark.distributed
def test_a_training_checkpoint_starts_another_run_where_it_ended(runs: Path) -> None:
    last, first = logged(runs / "straight")[6], logged(runs / "continued")[0]
    assert {name: last[name] for name in first} == first
    megatron_to_hf(runs / "straight/checkpoints", runs / "converted")
    ours = load_file(runs / "straight/hf/model.safetensors")
    theirs = load_file(runs / "converted/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.distributed
def test_weights_that_are_not_those_of_the_manifest_are_refused_on_all_ranks(runs: Path) -> None:
    for rank in (0, 1):
        message = (runs / f"tampered-{rank}").read_text()
        assert "tampered: " in message and "manifest.json says" in message
        assert "--no-verify-weights" in message
    assert not (runs / "never").exists()


@pytest.mark.distributed
def test_recorded_rollouts_replay_the_step_that_wrote_them(runs: Path) -> None:
    straight, replayed = logged(runs / "straight")[1], logged(runs / "replayed")[1]
    for name in ("reward/mean", "response_length/mean", "advantage/std"):
        assert replayed[name] == straight[name]
    assert replayed["loss"] == pytest.approx(straight["loss"], rel=0.05, abs=1e-4)  # bf16


@pytest.mark.distributed
def test_the_program_as_torchrun_starts_it(tmp_path: Path) -> None:
    flags = [*make_run(tmp_path), "--tensor-model-parallel-size", "2", "--lr", "1e-2"]
    flags += ["--checkpoint-interval", "1"]
    script = ROOT / "examples" / "train_drpo_gpt.sh"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("device: cpu (gloo)") == 1  # said by one rank
    for noise in ("warning:", "deprecated"):  # of megatron-core, about what users cannot mend
        assert noise not in done.stderr.lower()
    assert "held-out" in done.stdout and "report:" in done.stdout
    out = tmp_path / "out"
    assert (out / "report.html").stat().st_size > 10_000
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))
    assert (out / "checkpoints" / "latest").read_text() == "step-000002"
    assert not list((out / "checkpoints").glob(".*tmp"))
    for step in (1, 2):
        assert logged(out)[step]["engine_gap/max_abs"] <= 1e-4
        assert logged(out)[step]["skipped_updates"] == 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(out / "hf")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    changed = [
        not torch.equal(new, old)
        for new, old in zip(trained.parameters(), start.parameters(), strict=True)
    ]
    assert all(changed)
    assert AutoTokenizer.from_pretrained(out / "hf")("1+1=").input_ids == [4, 13, 4, 14]
