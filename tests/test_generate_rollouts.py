"""`tools/generate_rollouts.py`: what it writes, how it continues, and training on the result."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_drpo.errors import ConfigError, DataError
from megatron_drpo.rollout.engine import Completion, Sampling
from megatron_drpo.rollout.files import RolloutWriter, read_header, read_rollouts
from tests.distributed import run_distributed
from tests.loopback_server import BigramEngine, BigramSession, LoopbackServer
from tests.tiny_run import NUM_PROMPTS, make_tiny_run
from tools.generate_rollouts import run

SAMPLES = 3
REWARD = """
def some(request):
    if request.response.startswith("1"):
        raise KeyError("one")
    return -len(request.response) / 8
"""


class CountedTable(BigramEngine):
    """Knows how many responses it had at the same time at most."""

    most = 0

    def start(self, sampling: Sampling) -> BigramSession:
        session = super().start(sampling)
        step = session.step

        def counted() -> list[tuple[int, Completion]]:
            self.most = max(self.most, len(session._running))
            return step()

        session.step = counted  # type: ignore[method-assign]
        return session


TABLE = CountedTable(
    torch.randn(61, 61, generator=torch.Generator().manual_seed(0)), step_seconds=0.005
)


def flags(out: str, **changes: Any) -> list[str]:
    given = {
        "hf_model": "model",
        "prompts": "prompts.jsonl",
        "out": out,
        "rollout_prompts_per_step": 4,
        "rollout_samples_per_prompt": SAMPLES,
        "rollout_max_response_length": 8,
        "reward": "none",
        "transformer_impl": "local",
    } | changes
    argv: list[str] = []
    for name, value in given.items():
        dashed = "--" + name.replace("_", "-")
        argv += [dashed] if value is True else [dashed, str(value)]
    return argv


class BrokenOffError(Exception):
    """Stands for whatever ends the tool."""


def fails(error: type[Exception], message: str, argv: list[str]) -> None:
    from megatron.core import parallel_state

    with pytest.raises(error, match=message):
        run(argv)
    parallel_state.destroy_model_parallel()  # else the end of the process would


def _ranks(rank: int, world_size: int, root: Path, server: str) -> None:
    """Several starts of the tool, and of training, in one start of the processes."""
    from megatron_drpo import cli

    os.chdir(root)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    run(flags("dp2"))
    run(flags("tp2", tensor_model_parallel_size=2, rollout_prompts_per_step=3))
    judged = {"reward": "some_reward:some", "reward_max_failures": 0.9}
    cut = {"rollout_top_p": 0.9, "rollout_temperature": 0.8, "compress": True}
    run(flags("pp2", pipeline_model_parallel_size=2, **judged, **cut))
    slots = {"rollout_max_slots": SAMPLES, "rollout_prompts_per_step": NUM_PROMPTS}
    served = {"rollout_engine": "vllm", "rollout_servers": server, "rollout_temperature": 0.8}
    run(flags("served", **served, **slots))

    write, calls = RolloutWriter.write, []

    def breaks(self: RolloutWriter, rollouts: Any) -> None:
        calls.append(rollouts)
        if len(calls) == 2:
            raise BrokenOffError
        write(self, rollouts)

    RolloutWriter.write = breaks  # type: ignore[method-assign]
    fails(BrokenOffError, "", flags("resumed"))
    RolloutWriter.write = write  # type: ignore[method-assign]
    dist.barrier()
    if rank == 0:
        shutil.copytree("resumed", "broken_off")
        with Path("resumed/rollouts-00000-of-00002.jsonl.partial").open("ab") as file:
            file.write(b'{"id": "prompts.jsonl:5", "torn')
        # The second replica comes back with more to do than the first.
        second = Path("resumed/rollouts-00001-of-00002.jsonl.partial")
        second.write_bytes(second.read_bytes()[:2000])
    dist.barrier()
    # Other samples per call than before: what a response is does not hang on it.
    run(flags("resumed", resume=True, rollout_prompts_per_step=2))
    run(flags("resumed", resume=True))
    cli.start(
        [
            *("--hf-model", "model", "--rollouts-file", "pp2", "--output-dir", "trained"),
            *("--rollout-top-p", "0.9", "--rollout-temperature", "0.8"),
            *("--tensor-model-parallel-size", "2", "--transformer-impl", "local"),
            *("--rollout-prompts-per-step", "4", "--rollout-samples-per-prompt", str(SAMPLES)),
            *("--rollout-max-response-length", "8", "--train-iters", "2"),
        ]
    )
    fails(DataError, "-of-00002.jsonl: is there already; continue it with --resume", flags("dp2"))
    fails(DataError, "seed 1234, this run has 5", flags("dp2", resume=True, seed=5))
    other = "--out dp2: holds rollouts-00000-of-00002.jsonl, which is no shard of this run"
    fails(DataError, other, flags("dp2", resume=True, compress=True))
    dist.barrier()
    if rank == 0:
        text = Path("prompts.jsonl").read_text()
        Path("prompts.jsonl").write_text(text.replace("0+0", "0+1").replace("1+1", "1+2"))
    dist.barrier()
    strange = r"rollouts-0000(\d)-of-00002.jsonl holds prompt 'prompts.jsonl:\d', which --prompts"
    fails(DataError, strange, flags("dp2", resume=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    make_tiny_run(root)
    (root / "some_reward.py").write_text(REWARD)
    with LoopbackServer(TABLE) as server:
        run_distributed(_ranks, 2, root, server.url)
        (root / "requests.json").write_text(json.dumps(server.requests))
    return root


def read(path: Path) -> list:
    return read_rollouts(path, vocab_size=61, max_length=64, samples_per_prompt=SAMPLES)


def by_place(path: Path) -> dict[tuple[str, int], Any]:
    return {(rollout.prompt.id, rollout.sample): rollout for rollout, _ in read(path)}


@pytest.mark.distributed
def test_every_prompt_has_its_group_in_the_shard_of_its_replica(root: Path) -> None:
    names = sorted(path.name for path in (root / "dp2").iterdir())
    assert names == [f"rollouts-0000{number}-of-00002.jsonl" for number in (0, 1)]
    for number, name in enumerate(names):
        ids = [rollout.prompt.id for rollout, _ in read(root / "dp2" / name)]
        places = range(number, NUM_PROMPTS, 2)
        assert ids == [f"prompts.jsonl:{place + 1}" for place in places for _ in range(SAMPLES)]
    header = read_header(root / "dp2")
    assert header is not None and (header.temperature, header.seed) == (1.0, 1234)
    assert header.max_response_length == 8 and 2 in header.stop_ids
    assert len(header.tokenizer_sha256) == len(header.weights_sha256 or "") == 64
    for rollout, reward in read(root / "dp2"):
        assert reward is None
        stopped = int(rollout.response_ids[-1]) in header.stop_ids
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert rollout.prompt.answer is not None


@pytest.mark.distributed
def test_a_response_depends_on_neither_replicas_nor_batches(root: Path) -> None:
    one, other = by_place(root / "dp2"), by_place(root / "tp2")
    assert [path.name for path in (root / "tp2").iterdir()] == ["rollouts-00000-of-00001.jsonl"]
    assert one.keys() == other.keys() and len(one) == NUM_PROMPTS * SAMPLES
    for key, rollout in one.items():
        assert rollout.response_ids.equal(other[key].response_ids)
        torch.testing.assert_close(
            rollout.behaviour_logprobs, other[key].behaviour_logprobs, rtol=0, atol=1e-5
        )
    assert len({tuple(rollout.response_ids.tolist()) for rollout in one.values()}) > 15


@pytest.mark.distributed
def test_what_was_broken_off_continues_to_the_same_bytes(root: Path) -> None:
    names = sorted(path.name for path in (root / "broken_off").iterdir())
    assert names == [f"rollouts-0000{number}-of-00002.jsonl.partial" for number in (0, 1)]
    for name in names:
        begun = (root / "broken_off" / name).read_bytes()
        whole = (root / "dp2" / name).with_suffix("").read_bytes()
        assert whole.startswith(begun) and len(begun.splitlines()) == 1 + 2 * SAMPLES
        assert (root / "resumed" / name).with_suffix("").read_bytes() == whole
    assert len([*(root / "resumed").iterdir()]) == 2


@pytest.mark.distributed
def test_rewards_failures_kept_ids_and_compression(root: Path) -> None:
    (path,) = (root / "pp2").iterdir()
    assert path.name == "rollouts-00000-of-00001.jsonl.gz"
    header = read_header(path)
    assert header is not None and (header.temperature, header.top_p) == (0.8, 0.9)
    failed = 0
    for rollout, reward in read(path):
        assert rollout.kept_ids is not None
        assert rollout.kept_ids.counts.numel() == rollout.response_ids.numel()
        if rollout.response_text.startswith("1"):
            failed += 1
            assert reward != reward
        else:
            assert reward == -len(rollout.response_text) / 8
    assert 0 < failed < NUM_PROMPTS * SAMPLES / 2


@pytest.mark.distributed
def test_training_on_them_in_another_layout_has_no_mismatch(root: Path) -> None:
    """Generated under PP 2 and trained under TP 2: the first step's gap is rounding."""
    lines = (root / "trained" / "metrics.jsonl").read_text().splitlines()
    first = next(line for line in map(json.loads, lines) if "loss" in line)
    assert first["engine_gap/mean_abs"] < 1e-5
    assert first["grad_norm"] > 0


@pytest.mark.distributed
def test_servers_generate_under_the_flags_of_the_engine(root: Path) -> None:
    for number in (0, 1):
        found = read(root / "served" / f"rollouts-0000{number}-of-00002.jsonl")
        ids = [rollout.prompt.id for rollout, _ in found]
        places = range(number, NUM_PROMPTS, 2)
        assert ids == [f"prompts.jsonl:{place + 1}" for place in places for _ in range(SAMPLES)]
        for rollout, _ in found:
            prompt, response = rollout.prompt.token_ids.tolist(), rollout.response_ids.tolist()
            expected = TABLE.logprobs(prompt, response, 0.8)
            assert rollout.behaviour_logprobs.tolist() == pytest.approx(expected, abs=1e-5)
    header = read_header(root / "served")
    assert header is not None and (header.engine, header.temperature) == ("vllm", 0.8)
    bodies = [body for _, body in json.loads((root / "requests.json").read_text()) if body]
    assert len(bodies) == NUM_PROMPTS and len({body["seed"] for body in bodies}) == NUM_PROMPTS
    assert {(body["n"], body["max_tokens"]) for body in bodies} == {(SAMPLES, 8)}
    # Of --rollout-max-slots, for each of the two replicas; not all that are wanted.
    assert SAMPLES <= TABLE.most <= 2 * SAMPLES < NUM_PROMPTS * SAMPLES


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rollout-lag", "1"], "--rollout-lag: is read in training only"),
        (["--eval-prompts", "x"], "--eval-prompts: is read in training only"),
        (
            [
                *("--rollout-engine", "vllm", "--rollout-servers", "http://127.0.0.1:1"),
                *("--rollout-top-k", "5", "--tensor-model-parallel-size", "2"),
            ],
            "--tensor-model-parallel-size 2: the layout of --rollout-engine vllm is the servers'",
        ),
        (
            [
                *("--rollout-engine", "vllm", "--rollout-servers", "http://127.0.0.1:1"),
                *("--rollout-top-k", "5"),
            ],
            "--rollout-top-k 5: training on a truncated distribution needs the kept ids",
        ),
        (
            ["--rollout-servers", "http://127.0.0.1:1", "--rollout-server-retries", "7"],
            "--rollout-servers http://127.0.0.1:1: are not used by --rollout-engine inprocess",
        ),
        (["--rollout-engine", "sglang"], "--rollout-servers: --rollout-engine sglang needs the"),
        (["--rollout-server-retries", "2"], "--rollout-server-retries: is read with"),
        (
            [
                *("--rollout-engine", "vllm", "--rollout-servers", "http://127.0.0.1:1"),
                *("--rollout-kv-cache-gib", "2", "--rollout-exact", "on"),
            ],
            "--rollout-kv-cache-gib: is the server's own affair with --rollout-engine vllm and "
            "sglang; drop it\n--rollout-exact: is the server's own affair",
        ),
        (["--no-shuffle-prompts"], "--shuffle-prompts: is read in training only"),
        (["--rollout-max-slot", "3"], "--rollout-max-slot: unknown flag; did you mean --rollout-m"),
        ([], "RANK and WORLD_SIZE are not set: start this with torchrun"),
    ],
)
def test_what_cannot_work_is_said_at_once(monkeypatch, argv: list[str], message: str) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError) as caught:
        run(["--hf-model", "m", "--prompts", "p", "--out", "o", *argv])
    assert message in str(caught.value)
