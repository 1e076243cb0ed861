"""Every way to generate, in whole runs: truncation, dynamic sampling, environments, servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_drpo.rollout.files import read_header, read_rollouts
from tests.distributed import run_distributed
from tests.tiny_run import make_tiny_run

ROOT = Path(__file__).resolve().parent.parent
OWN = """
from megatron_drpo.rollout.environment import Observation

def rare(request):
    \"\"\"Most groups of a random model are all 0.\"\"\"
    return float(len(request.response) < 4)

def length(request):
    return -len(request.response) / 8

def breaking(request):
    \"\"\"In the second step all servers begin to return another law's log-probs.\"\"\"
    import json, urllib.request
    with open("calls", "a") as file:
        file.write("x")
        if file.tell() == 9:
            for url in json.load(open("urls.json")):
                body = json.dumps({"fault": "raw", "times": 4}).encode()
                headers = {"Content-Type": "application/json"}
                fail = urllib.request.Request(url + "/loopback/fail", body, headers)
                urllib.request.urlopen(fail).close()
    return -len(request.response) / 8

class Echo:
    def __init__(self, prompt):
        self.turns = 0

    def step(self, turn):
        self.turns += 1
        return Observation([5, 6], reward=len(turn.text) / 8, done=self.turns == 3)
"""


def _train(rank: int, world_size: int, root: Path, urls: list[str]) -> None:
    """Runs that share one start of the processes; each is a whole `train.run`."""
    from megatron.core import parallel_state

    from megatron_drpo import cli
    from megatron_drpo.errors import RolloutError, ServersError

    os.chdir(root)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    flags = [*make_flags(), "--lr", "1e-3", "--no-progress", "--no-export-hf"]
    tp2 = ["--tensor-model-parallel-size", "2"]
    pp2 = ["--pipeline-model-parallel-size", "2"]

    law = ["--rollout-top-p", "0.9", "--rollout-top-k", "12", "--rollout-temperature", "0.8"]
    cut = [*law, "--rollout-stop-strings", "7", "9"]
    cli.start([*flags, *tp2, *cut, "--save-rollouts", "--output-dir", "truncated"])
    at = flags.index("--prompts")
    recorded = [*flags[:at], *flags[at + 2 :], "--rollouts-file", "truncated/rollouts"]
    cli.start([*recorded, *pp2, *law, "--train-iters", "1", "--output-dir", "replayed"])
    varied = ["--dynamic-sampling", "--rollout-extra-prompts", "1", "--reward", "own:rare"]
    cli.start([*flags, *varied, "--rollout-prompts-per-step", "2", "--output-dir", "dynamic"])
    turns = ["--environment", "own:Echo", "--environment-max-turns", "4", "--save-rollouts"]
    turns += ["--rollout-max-response-length", "30"]
    cli.start([*flags, *pp2, *turns, "--output-dir", "turns"])

    served = ["--rollout-servers", *urls, "--rollout-temperature", "0.8"]
    disk = ["--rollout-engine", "vllm", "--weight-sync", "disk"]
    cli.start([*flags, *served, *disk, "--save-rollouts", "--output-dir", "disk"])
    group = ["--rollout-engine", "sglang", "--weight-sync", "collective", "--rollout-lag", "1"]
    cli.start([*flags, *tp2, *served, *group, "--train-iters", "4", "--output-dir", "collective"])
    mended = [*flags, *served, *disk, "--reward", "own:breaking", "--train-iters", "4"]
    with pytest.raises(ServersError) as failed:
        cli.start([*mended, "--output-dir", "mended"])
    Path(f"mended-{rank}").write_text(str(failed.value))
    parallel_state.destroy_model_parallel()
    cli.start([*mended, "--output-dir", "mended", "--resume"])
    if rank == 0:
        _fail(urls[0], "stale")  # and stay so
    torch.distributed.barrier()
    cli.start([*flags, *served, *disk, "--train-iters", "3", "--output-dir", "stale"])
    if rank == 0:
        for url in urls:
            _fail(url, "raw")
    torch.distributed.barrier()
    with pytest.raises(RolloutError) as refused:
        cli.start([*flags, *served, *disk, "--output-dir", "raw"])
    Path(f"raw-{rank}").write_text(str(refused.value))


def make_flags() -> list[str]:
    """Of a run in the current directory."""
    return json.loads(Path("flags.json").read_text())


def _fail(url: str, fault: str) -> None:
    import urllib.request

    body = json.dumps({"fault": fault, "times": None}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/loopback/fail", body, headers)).close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A run's directory, and two servers of its model."""
    root = tmp_path_factory.mktemp("generation")
    flags = make_tiny_run(root)
    (root / "own.py").write_text(OWN)
    (root / "flags.json").write_text(json.dumps([*flags, "--reward", "own:length"]))
    command = [sys.executable, "-m", "tests.loopback_server", str(root / "model")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        urls = []
        for process in processes:
            assert process.stdout
            urls.append(process.stdout.readline().strip())
            assert urls[-1].startswith("http://"), "the server did not start"
        (root / "urls.json").write_text(json.dumps(urls))
        yield root, urls
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def runs(servers: tuple[Path, list[str]]) -> Path:
    root, urls = servers
    run_distributed(_train, 2, root, urls, timeout=280)
    return root


def steps(run: Path) -> list[dict[str, Any]]:
    """What was logged of each training step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def rollouts_of(run: Path, samples: int = 2) -> list[Any]:
    found = read_rollouts(
        run / "rollouts", vocab_size=128, max_length=64, samples_per_prompt=samples
    )
    return [rollout for rollout, _ in found]


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_truncated_rollouts_are_trained_under_the_law_they_were_drawn_from(runs: Path) -> None:
    for step in steps(runs / "truncated"):
        assert step["engine_gap/exact_share"] == 1
    rollouts = rollouts_of(runs / "truncated")
    assert all(r.kept_ids is not None and r.kept_ids.counts.max() <= 12 for r in rollouts)
    stopped = [r for r in rollouts if r.response_ids[-1] != 2 and r.finish_reason == "stop"]
    assert stopped and all(r.response_text[-1] in "79" for r in stopped)
    (replayed,) = steps(runs / "replayed")
    first = steps(runs / "truncated")[0]
    assert replayed["engine_gap/max_abs"] < 1e-5, "under another layout"
    assert replayed["loss"] == pytest.approx(first["loss"], rel=1e-4)
    assert replayed["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    header = read_header(runs / "truncated/rollouts/step-000001.jsonl")
    assert header is not None
    assert (header.temperature, header.top_p, header.top_k) == (0.8, 0.9, 12)


@pytest.mark.distributed
def test_dynamic_sampling_fills_the_batch_with_groups_that_differ(runs: Path) -> None:
    logged = steps(runs / "dynamic")
    assert any(step["dynamic_sampling/rounds"] > 0 for step in logged)
    for step in logged:
        missing = step["dynamic_sampling/missing"]
        assert step["reward/groups_all_equal"] == pytest.approx(missing / 2)
        if missing:
            out_of_prompts = step["dynamic_sampling/prompts"] == 8
            assert out_of_prompts or step["dynamic_sampling/rounds"] == 3


@pytest.mark.distributed
def test_conversations_train_on_what_the_policy_wrote(runs: Path) -> None:
    for step in steps(runs / "turns"):
        assert step["engine_gap/exact_share"] == 1
    rollouts = rollouts_of(runs / "turns")
    talked = [r for r in rollouts if r.loss_mask is not None]
    assert talked
    for rollout in talked:
        assert rollout.response_ids[~rollout.loss_mask].view(-1, 2).eq(torch.tensor([5, 6])).all()
        assert rollout.response_ids.numel() <= 30


@pytest.mark.distributed
def test_servers_are_at_the_trainers_weights(runs: Path) -> None:
    for step in steps(runs / "disk"):
        assert step["servers/used"] == 2 and step["servers/canary_gap"] < 1e-5
        assert step["engine_gap/max_abs"] < 1e-5
    versions = {r.policy_version for r in rollouts_of(runs / "disk")}
    assert versions == {0, 2}, "two updates in each step"
    kept = sorted(path.name for path in (runs / "disk/weight_sync").iterdir())
    assert kept == ["version-2", "version-4"]
    tensors = load_file(runs / "disk/weight_sync/version-4/model.safetensors")
    start = load_file(runs / "model/model.safetensors")
    assert any(not tensors[name].equal(start[name]) for name in start), "the trained weights"


@pytest.mark.distributed
def test_generation_that_runs_ahead_is_at_most_so_many_steps_old(runs: Path) -> None:
    logged = steps(runs / "collective")
    assert [step["staleness/max"] for step in logged] == [0, 1, 1, 1]
    assert all(step["servers/canary_gap"] < 1e-5 for step in logged)
    assert logged[0]["engine_gap/max_abs"] < 1e-5


@pytest.mark.distributed
def test_what_was_trained_is_saved_when_all_servers_fail(runs: Path) -> None:
    texts = [(runs / f"mended-{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "the 2 steps done are saved" in texts[0] and "--resume" in texts[0]
    logged = steps(runs / "mended")
    assert [step["step"] for step in logged] == [1, 2, 3, 4]
    assert logged[-1]["policy_version"] == 8


@pytest.mark.distributed
def test_a_stale_server_is_not_used(runs: Path) -> None:
    used = [step["servers/used"] for step in steps(runs / "stale")]
    assert used == [1, 1, 1]
    assert all(step["engine_gap/max_abs"] < 1e-5 for step in steps(runs / "stale"))


@pytest.mark.distributed
def test_raw_logprobs_are_refused_before_training_on_every_rank(runs: Path) -> None:
    texts = [(runs / f"raw-{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "temperature 1" in texts[0] and "http://127.0.0.1" in texts[0]
    assert not (runs / "raw/metrics.jsonl").exists() or not steps(runs / "raw")
