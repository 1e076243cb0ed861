"""A real vLLM on the CPU, started here: its log-probs, its pauses, and the trainer's weights in it.

`make test-vllm` installs it, into an environment of its own, and runs these tests; no others do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.rollout.servers import DIALECTS, Client, ServerEngine
from tests import tiny_models
from tests.distributed import run_distributed
from tests.test_servers import gap, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
TEMPERATURE, STOP, LENGTH, CONTEXT = 0.7, 2, 20, 512
LONG = 400
# fp32 on both sides, other kernels: 5e-6 was seen.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Address of the server, and its model's directory."""
    if "vllm" not in request.config.getoption("markexpr"):
        pytest.skip("make test-vllm runs it")
    from tests.tiny_run import make_tiny_run

    root = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "CHANNELS", 32)  # the least that vLLM's attention does on CPUs
        make_tiny_run(root)
    settings = root / "model" / "config.json"
    longer = json.loads(settings.read_text()) | {"max_position_embeddings": CONTEXT}
    settings.write_text(json.dumps(longer))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(root / "model")),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", str(CONTEXT), "--block-size", "32", "--max-num-seqs", "64"),
        *("--logprobs-mode", "processed_logprobs"),
        *("--worker-extension-cls", "megatron_drpo.weight_sync.vllm_worker.WorkerExtension"),
    ]
    log = root / "log"
    with log.open("w") as out:
        # Its workers are in its session, and end with it.
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                run(Client(url, DIALECTS["vllm"]).ready())
                break
            except RolloutError:
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
        yield url, root / "model"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def engine(served: tuple[str, Path]) -> Iterator[ServerEngine]:
    from transformers import AutoTokenizer

    url, model = served
    tokenizer = AutoTokenizer.from_pretrained(model)
    built = ServerEngine("vllm", [url], timeout_seconds=60, decode=tokenizer.decode)
    yield built
    built.close()


@pytest.fixture(scope="module")
def reference(served: tuple[str, Path]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(served[1], dtype=torch.float32).eval()


def wanted(samples: int = 4) -> list[Request]:
    """Prompts of a few tokens, and of more than the server keeps in its prefix cache."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 61, (size,), generator=generator) for size in (3, 40, 9, 35)]
    return [
        Request(prompt, n * samples + i) for n, prompt in enumerate(prompts) for i in range(samples)
    ]


def sampling(**changes: Any) -> Sampling:
    fields: dict[str, Any] = {"stop_ids": (STOP,), "max_response_length": LENGTH, "seed": 3}
    return Sampling(TEMPERATURE, 1.0, 0, **fields | changes)


def test_log_probs_of_the_sampled_law(engine: ServerEngine, reference: Any) -> None:
    found = engine.generate(wanted(8), sampling())
    worst = gap(reference, wanted(8), found, TEMPERATURE)
    print(f"\nlargest gap to transformers, {sum(map(length, found))} tokens: {worst:.2g}")
    assert worst < TOLERANCE
    assert gap(reference, wanted(8), found, 1.0) > 0.1
    for done in found:
        ends = (done.response_ids == STOP).nonzero().flatten().tolist()
        assert ends == ([length(done) - 1] if done.finish_reason == "stop" else [])
        assert done.finish_reason == "stop" or length(done) == LENGTH
    assert {done.finish_reason for done in found} == {"stop", "length"}
    again = engine.generate(wanted(8), sampling())
    assert [d.response_ids.tolist() for d in again] == [d.response_ids.tolist() for d in found]
    assert len({tuple(d.response_ids.tolist()) for d in found}) > 25


def length(done: Completion) -> int:
    return done.response_ids.numel()


def test_greedy_and_likeliest_ids(engine: ServerEngine, reference: Any) -> None:
    for done, request in zip(
        engine.generate(wanted(2), sampling(record_topk=5)), wanted(2), strict=True
    ):
        ids = torch.cat([request.prompt_ids, done.response_ids])
        with torch.no_grad():
            logits = reference(ids[None]).logits[0, request.prompt_ids.numel() - 1 : -1]
        best = torch.log_softmax(logits / TEMPERATURE, -1).topk(5)
        assert torch.equal(done.topk_ids, best.indices)
        assert torch.allclose(done.topk_logprobs, best.values, atol=TOLERANCE)
    greedy = Sampling(0.0, 1.0, 0, 6, (), 0)
    for done, request in zip(engine.generate(wanted(2), greedy), wanted(2), strict=True):
        ids = torch.cat([request.prompt_ids, done.response_ids])
        with torch.no_grad():
            best = reference(ids[None]).logits[0].argmax(-1)
        assert torch.equal(best[request.prompt_ids.numel() - 1 : -1], done.response_ids)
        assert not done.logprobs.any()


def test_stop_strings(engine: ServerEngine) -> None:
    """Ids 3 to 14 are the characters of `0123456789+=`, and decode with spaces between them."""
    found = engine.generate(wanted(16), sampling(stop_strings=("8", "+", "3"), stop_ids=()))
    ends = {3 + "0123456789+=".index(c) for c in "8+3"}
    assert {done.finish_reason for done in found} == {"stop", "length"}
    for done in found:
        ids = done.response_ids.tolist()
        assert not ends & set(ids[:-1])
        assert (ids[-1] in ends) == (done.finish_reason == "stop")


def test_pauses_keep_what_there_is(engine: ServerEngine, reference: Any) -> None:
    requests = [Request(torch.tensor([5, 6 + i // 8]), i) for i in range(32)]
    pending = engine.submit(requests, sampling(stop_ids=(), max_response_length=LONG))
    for version in range(1, 4):
        time.sleep(0.1)
        engine.pause()
        engine.resume(version)
    found = pending.result()
    spans = [len(done.version_spans) for done in found]
    print(f"\nspans of the responses after 3 pauses: {min(spans)} to {max(spans)}")
    assert max(spans) > 1 and all(length(done) == LONG for done in found)
    assert all(sum(n for n, _ in done.version_spans) == LONG for done in found)
    assert gap(reference, requests, found, TEMPERATURE) < TOLERANCE


def test_refusals(served: tuple[str, Path], engine: ServerEngine) -> None:
    with pytest.raises(RolloutError, match="--rollout-max-response-length"):
        engine.generate(wanted(1), sampling(stop_ids=(), max_response_length=CONTEXT - 10))
    with pytest.raises(RolloutError, match="out of vocabulary"):
        engine.generate([Request(torch.tensor([99]), 0)], sampling())
    with pytest.raises(RolloutError, match="is it sglang"):
        ServerEngine("sglang", [served[0]]).generate(wanted(1), sampling())


def test_the_trainers_weights(served: tuple[str, Path], tmp_path: Path) -> None:
    url, model = served
    run_distributed(_trainer, 2, url, model, tmp_path)


def _trainer(rank: int, world_size: int, url: str, model: Path, root: Path) -> None:
    """Two tensor-parallel ranks; rank 0 talks to the server."""
    import torch.distributed as dist

    from megatron_drpo.config import ParallelConfig
    from megatron_drpo.types import Prompt, Rollout, Trajectory
    from megatron_drpo.weight_sync.sync import CollectiveSync, DiskSync, Model
    from tests.test_layouts import make_policy

    layout, policy = make_policy(model, rank, ParallelConfig(2), budget=64)
    engine = ServerEngine("vllm", [url], timeout_seconds=60) if rank == 0 else None
    clients = engine.clients if engine else ()

    def mean_gap(version: int | None = None) -> tuple[float, float]:
        """Mean and largest gap of fresh responses to the trainer's log-probs, on all ranks."""
        completions = engine.generate(wanted(), sampling()) if engine else None
        box = [completions]
        dist.broadcast_object_list(box, 0)
        prompts = [Prompt(f"p{i}", "", r.prompt_ids, None) for i, r in enumerate(wanted())]
        assert box[0] is not None
        trajectories = [
            Trajectory(Rollout(p, 0, d.response_ids, d.logprobs, d.finish_reason, 0, ""), 0.0, 0.0)
            for p, d in zip(prompts, box[0], strict=True)
        ]
        rows = policy.pack(trajectories)
        scores = torch.cat(
            [scores.logprobs for scores in policy.score(rows, temperature=TEMPERATURE)]
        )
        gaps = (torch.cat([row.behaviour_logprobs for row in rows]) - scores).abs()
        if version is not None:
            assert all(d.version_spans == ((length(d), version),) for d in box[0])
        return float(gaps.mean()), float(gaps.max())

    def change(version: int) -> None:
        factor = 1.2 if version % 2 else 1 / 1.2
        for parameter in (p for chunk in policy.models for p in chunk.parameters()):
            parameter.data.mul_(factor)

    def synced(sync: Any, version: int) -> None:
        before = mean_gap()
        if engine:
            engine.pause()
        started = time.monotonic()
        assert sync.sync(version).servers == (url,)
        seconds = time.monotonic() - started
        if engine:
            engine.resume(version)
        after = mean_gap(version)
        if rank == 0:
            kind = type(sync).__name__
            print(f"{kind}: gap {before[0]:.2g} -> {after[0]:.2g} in {seconds:.2f} s", flush=True)
        assert after[1] < TOLERANCE < 0.01 < before[0], (before, after)

    assert mean_gap()[1] < TOLERANCE
    weights = Model(policy.architecture, policy.models, layout, torch.device("cpu"))
    disk = DiskSync(weights, clients, root / "disk", model, timeout_seconds=60)
    collective = CollectiveSync(weights, clients, address="127.0.0.1", port=0, timeout_seconds=60)
    for version, sync in enumerate((disk, collective, collective, disk, collective), start=1):
        change(version)
        synced(sync, version)
    # Responses under way go on under the new weights.
    pending = None
    if engine:
        requests = [Request(torch.tensor([5, 6 + i // 8]), i) for i in range(32)]
        pending = engine.submit(requests, sampling(stop_ids=(), max_response_length=LONG))
        time.sleep(0.1)
        engine.pause()
    change(6)
    collective.sync(6)
    if engine and pending:
        engine.resume(6)
        kinds = {tuple(v for _, v in done.version_spans) for done in pending.result()}
        assert (5, 6) in kinds and kinds <= {(5, 6), (6,)}
    collective.close()
    disk.close()
    if engine:
        engine.close()
