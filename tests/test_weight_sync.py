"""Weights from trainer ranks into servers: bit for bit, or the server is named and left out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.checkpoint.hf import HfWeights
from megatron_drpo.checkpoint.model_weights import load_weights
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.servers import DIALECTS, Client
from megatron_drpo.weight_sync.group import Meeting, TransferGroup, dtype_of, listen
from megatron_drpo.weight_sync.receiver import WeightReceiver
from tests.distributed import renew_world, run_distributed
from tests.tiny_models import save_tiny
from tests.tiny_run import make_tiny_run

ROOT = Path(__file__).resolve().parent.parent
# Many updates of a few tensors each, for the smallest of models.
SMALL_BUCKETS = 4096
VLLM, SGLANG = "vllm", "sglang"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses: `pair` has two workers; `mortal` and `mortal2` will be killed; `engine` generates
    with the model that lies beside it, under `model`."""
    tool, model = (
        [sys.executable, ROOT / "tests" / "weight_server.py"],
        tmp_path_factory.mktemp("m"),
    )
    make_tiny_run(model)
    commands = {
        "pair": [*tool, "--workers", "2"],
        "one": tool,
        "mortal": tool,
        "mortal2": tool,
        "engine": [sys.executable, "-m", "tests.loopback_server", model / "model"],
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {
        name: subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
        for name, command in commands.items()
    }
    try:
        urls = {}
        for name, process in processes.items():
            assert process.stdout is not None
            urls[name] = process.stdout.readline().strip()
            assert urls[name].startswith("http://127.0.0.1:"), f"{name} did not start"
        yield urls | {"model": str(model / "model")}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def ask(url: str, **query: Any) -> dict[str, Any]:
    """The test's own route of a server."""
    text = "&".join(f"{key}={value}" for key, value in query.items())
    with urllib.request.urlopen(f"{url}/test?{text}", timeout=30) as answer:
        return json.loads(answer.read())


def client(kind: str, url: str) -> Client:
    return Client(url, DIALECTS[kind], timeout_seconds=60.0, retries=0)


def held(url: str, out: Path, workers: int = 1) -> list[dict[str, Tensor]]:
    """What each worker of a server has loaded."""
    ask(url, out=out)
    return [load_file(f"{out}-{rank}.safetensors") for rank in range(workers)]


def assert_holds(url: str, out: Path, expected: dict[str, Tensor], workers: int = 1) -> None:
    for tensors in held(url, out, workers):
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name


class Trainer:
    """One rank's chunks, filled from a directory."""

    def __init__(self, rank: int, sizes: tuple[int, ...], source: Path) -> None:
        from megatron_drpo.config import ModelConfig, ParallelConfig
        from megatron_drpo.device import Device
        from megatron_drpo.mcore import model, parallel
        from megatron_drpo.weight_sync.sync import Model

        device = Device("cpu", "gloo", rank, "test")
        config = ParallelConfig(*sizes[:4], expert_tensor_parallel_size=sizes[4])
        self.layout = parallel.initialize(config, device, seed=1)
        self.source, self.architecture = source, read_architecture(source)
        config = ModelConfig(hf_model="unused", transformer_impl="local")
        self.chunks = model.build_model(self.architecture, config, self.layout, device)
        self.fill(source)
        self.model = Model(self.architecture, self.chunks, self.layout, torch.device("cpu"))

    def fill(self, source: Path) -> None:
        from megatron_drpo.mcore.weights import places_of

        with HfWeights(source, self.architecture) as weights:
            load_weights(weights, self.architecture, self.chunks, places_of(self.layout))

    def change(self) -> None:
        """Other weights, exactly."""
        for parameter in (p for chunk in self.chunks for p in chunk.parameters()):
            parameter.data.mul_(2)

    def collective(self, *servers: Client, **how: Any) -> Any:
        from megatron_drpo.weight_sync.sync import CollectiveSync

        settings = {"address": "127.0.0.1", "port": 0, "timeout_seconds": 30.0}
        return CollectiveSync(self.model, servers, **settings | how)


def _ranks(rank: int, _: int, root: Path, urls: dict[str, str]) -> None:
    """One start of the processes, which is what costs time."""
    from megatron_drpo.mcore import parallel

    # tp, pp, chunks per stage, ep, expert tp
    for sizes, family in (
        ((2, 1, 1, 1, 2), "qwen3"),
        ((1, 2, 1, 1, 1), "qwen3"),
        ((1, 2, 2, 1, 1), "llama"),
        ((2, 1, 1, 2, 1), "qwen3_moe"),
    ):
        trainer = Trainer(rank, sizes, root / family)
        _bit_for_bit(rank, trainer, root, urls)
        if family == "qwen3":  # the second comes to a server that has not forgotten the first
            _sglang(rank, trainer, root, urls)
        if sizes == (2, 1, 1, 1, 2):
            _disk(rank, trainer, root, urls)
            _faults(rank, trainer, root, urls)
        if sizes == (1, 2, 1, 1, 1):
            _deaths(rank, trainer, root, urls)
        trainer.layout.barrier()
        parallel.destroy(trainer.layout)
        renew_world(root)
    _canary(rank, urls)


def _canary(rank: int, urls: dict[str, str]) -> None:
    """A pipeline of two ranks: it sees that a server's weights are old, until they are not."""
    from megatron_drpo.config import ParallelConfig
    from megatron_drpo.rollout.canary import Canary
    from megatron_drpo.weight_sync.sync import CollectiveSync, Model
    from tests.test_layouts import make_policy

    layout, policy = make_policy(Path(urls["model"]), rank, ParallelConfig(1, 2))
    servers = [client(VLLM, urls["engine"])] if rank == 0 else []
    prompts = [torch.tensor([5, 6, 14]), torch.tensor([7])]
    canary = Canary(policy, servers, prompts, bound=1e-4, rounding=1e-3)
    model = Model(policy.architecture, policy.models, layout, torch.device("cpu"))
    sync = CollectiveSync(model, servers, address="127.0.0.1", port=0, timeout_seconds=30.0)
    url = (urls["engine"],)
    assert canary.check(0, url).gaps[urls["engine"]] < 1e-5
    for parameter in (p for chunk in policy.models for p in chunk.parameters()):
        parameter.data.mul_(1.1)
    with pytest.raises(RolloutError, match="weights are stale: .* as under version 0"):
        canary.check(1, url)
    assert sync.sync(1).servers == url
    checked = canary.check(1, url)
    assert not checked.failures and checked.gaps[urls["engine"]] < 1e-5
    sync.close()


def _bit_for_bit(rank: int, trainer: Trainer, root: Path, urls: dict[str, str]) -> None:
    """Two servers of two and one workers; then other weights over the same group."""
    expected = load_file(trainer.source / "model.safetensors")
    sync = trainer.collective(client(VLLM, urls["pair"]), client(VLLM, urls["one"]))
    both = (urls["pair"], urls["one"])
    for version, factor in ((1, 1), (2, 2)):
        synced = sync.sync(version)
        assert (synced.version, synced.servers, synced.failures) == (version, both, {})
        if rank == 0:
            log = ask(urls["pair"])["log"]
            assert ("drpo_init_group" in log) == (version == 1)
            wanted = ["/pause", "drpo_receive", "/reset_prefix_cache", "/weight_info", "/resume"]
            assert [step for step in log if step in wanted] == wanted
            assert_holds(urls["one"], root / "a", {k: factor * v for k, v in expected.items()})
            assert_holds(urls["pair"], root / "b", {k: factor * v for k, v in expected.items()}, 2)
            assert ask(urls["pair"])["heavy"] == []
        trainer.layout.barrier()
        trainer.change()
    trainer.fill(trainer.source)
    sync.close()


def _sglang(rank: int, trainer: Trainer, root: Path, urls: dict[str, str]) -> None:
    """Its native routes, in several updates, of which the last names the version."""
    sync = trainer.collective(client(SGLANG, urls["one"]), bucket_bytes=SMALL_BUCKETS)
    trainer.change()
    assert sync.sync(7).servers == (urls["one"],)
    if rank == 0:
        expected = load_file(trainer.source / "model.safetensors")
        log = ask(urls["one"])["log"]
        assert log.count("/update_weights_from_distributed") > 5 and "/flush_cache" in log
        assert_holds(urls["one"], root / "c", {name: 2 * v for name, v in expected.items()})
    trainer.fill(trainer.source)
    sync.close()
    if rank == 0:
        assert "/destroy_weights_update_group" in ask(urls["one"])["log"]


def _disk(rank: int, trainer: Trainer, root: Path, urls: dict[str, str]) -> None:
    from megatron_drpo.weight_sync.sync import DiskSync

    directory = root / "disk"
    expected = load_file(trainer.source / "model.safetensors")
    servers = [client(VLLM, urls["one"])]
    sync = DiskSync(trainer.model, servers, directory, trainer.source, timeout_seconds=30)
    for version in (8, 9, 12):
        assert sync.sync(version).servers == (urls["one"],)
        if rank == 0:
            log = ask(urls["one"])["log"]
            wanted = ["/pause", "reload_weights", "/reset_prefix_cache", "/weight_info", "/resume"]
            assert [step for step in log if step in wanted] == wanted
    if rank == 0:
        assert sorted(path.name for path in directory.iterdir()) == ["version-12", "version-9"]
        assert_holds(urls["one"], root / "d", expected)
    sync.close()
    trainer.change()
    sglang = [client(SGLANG, urls["one"])]
    sync = DiskSync(trainer.model, sglang, directory, trainer.source, timeout_seconds=30)
    assert sync.sync(13).failures == {}
    if rank == 0:
        assert_holds(urls["one"], root / "e", {name: 2 * v for name, v in expected.items()})
    trainer.fill(trainer.source)
    sync.close()


def _faults(rank: int, trainer: Trainer, root: Path, urls: dict[str, str]) -> None:
    """A server that refuses the weights, or keeps its version, is named; the other has them."""
    expected = load_file(trainer.source / "model.safetensors")
    for fault, words in (("load", "other layers"), ("version", "of version 13 after")):
        if rank == 0:
            ask(urls["pair"], fault=fault)
        trainer.layout.barrier()
        started = time.monotonic()
        # The version that a server had before comes from the test above.
        if fault == "version" and rank == 0:
            import asyncio

            from megatron_drpo.rollout.servers import DiskUpdate

            ask(urls["pair"])
            update = DiskUpdate(str(root / "disk" / "version-13"), 13)
            asyncio.run(client(VLLM, urls["pair"]).update(update))
            ask(urls["pair"], fault=fault)
        sync = trainer.collective(client(VLLM, urls["pair"]), client(VLLM, urls["one"]))
        synced = sync.sync(14)
        assert synced.servers == (urls["one"],) and [*synced.failures] == [urls["pair"]]
        assert words in synced.failures[urls["pair"]]
        assert time.monotonic() - started < 25
        if rank == 0:
            ask(urls["pair"], fault="")
            assert_holds(urls["one"], root / "f", expected)
        trainer.layout.barrier()
        again = sync.sync(15)  # it is back, and joins
        assert again.servers == (urls["pair"], urls["one"]) and not again.failures
        if rank == 0:
            assert_holds(urls["pair"], root / "g", expected, 2)
        sync.close()


def _deaths(rank: int, trainer: Trainer, root: Path, urls: dict[str, str]) -> None:
    """A server that dies or freezes half way costs the others one more transfer, no hang."""
    for name, fault, limit in (("mortal", "die", 15), ("mortal2", "freeze", 45)):
        if rank == 0:
            ask(urls[name], fault=fault)
            ask(urls["one"], fault="")
        trainer.layout.barrier()
        started = time.monotonic()
        how = {"timeout_seconds": 8.0} if fault == "freeze" else {}
        sync = trainer.collective(client(VLLM, urls["one"]), client(VLLM, urls[name]), **how)
        synced = sync.sync(21)
        seconds = time.monotonic() - started
        assert synced.servers == (urls["one"],), synced
        assert [*synced.failures] == [urls[name]] and urls[name] in synced.failures[urls[name]]
        assert seconds < limit, seconds
        if rank == 0:
            assert_holds(urls["one"], root / "h", load_file(trainer.source / "model.safetensors"))
        sync.close()
    sync = trainer.collective(client(VLLM, urls["mortal"]), timeout_seconds=8.0)
    with pytest.raises(
        RolloutError,
        match=r"no server could be brought to version 22(.|\n)*mortal".replace(
            "mortal", urls["mortal"]
        ),
    ):
        sync.sync(22)
    sync.close()


def test_weights_arrive_bit_for_bit_or_the_server_is_named(
    tmp_path: Path, servers: dict[str, str]
) -> None:
    for family in ("qwen3", "llama", "qwen3_moe"):
        save_tiny(tmp_path / family, family)
    run_distributed(_ranks, 2, tmp_path, servers, timeout=300)


# --- The group, without a trainer -----------------------------------------------------------------


def meeting(port: int, size: int = 2, *, seconds: float = 1.0, **other: Any) -> Meeting:
    fields = {"address": "127.0.0.1", "name": "test", "backend": "gloo"} | other
    return Meeting(port=port, world_size=size, timeout_seconds=seconds, **fields)


def test_the_store_listens_on_the_given_address_alone() -> None:
    store, port = listen("127.0.0.1", 0, 5.0)
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    listening = [row[1] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"]
    assert listening == [f"0100007F:{port:04X}"]
    with pytest.raises(RolloutError, match=rf"--weight-sync-port {port}: cannot listen there"):
        listen("127.0.0.1", port, 5.0)
    del store
    with pytest.raises(RolloutError, match=r"--weight-sync-address 192\.0\.2\.1 .*rank 0's"):
        listen("192.0.2.1", 0, 5.0)  # kept for documentation: nobody has it


def test_a_group_that_cannot_be_says_why() -> None:
    store, port = listen("127.0.0.1", 0, 5.0)
    for rank, size in ((2, 2), (-1, 2), (0, 1)):
        with pytest.raises(RolloutError, match=f"rank {rank} of {size} cannot be"):
            TransferGroup(meeting(port, size), rank)
    with pytest.raises(RolloutError, match="no backend smoke"):
        TransferGroup(meeting(port, backend="smoke"), 0)
    started = time.monotonic()
    with pytest.raises(RolloutError, match=rf"rank 1 of 2 could not meet .*127\.0\.0\.1:{port} wi"):
        TransferGroup(meeting(port), 1)  # nobody else comes
    assert time.monotonic() - started < 5
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = free.getsockname()[1]
    with pytest.raises(RolloutError, match=f"could not meet .*:{nobody} within 1 s"):
        TransferGroup(meeting(nobody), 1)
    for name in ("int64", "cuda", "no_dtype"):
        with pytest.raises(RolloutError, match="not a dtype of weights"):
            dtype_of(name)
    del store


def receiver_of(loaded: dict[str, Tensor], **how: Any) -> WeightReceiver:
    return WeightReceiver(loaded.update, device=torch.device("cpu"), **how)


def join(receiver: WeightReceiver, where: Meeting) -> TransferGroup:
    """Both ends of a group of two."""
    with ThreadPoolExecutor(1) as threads:
        arguments = (where.address, where.port, 1, 2, where.name, "gloo", where.timeout_seconds)
        joined = threads.submit(receiver.init_group, *arguments)
        group = TransferGroup(where, 0)
        joined.result()
    return group


def test_a_receiver_takes_what_was_announced_and_nothing_else() -> None:
    loaded: dict[str, Tensor] = {}
    receiver = receiver_of(loaded)
    with pytest.raises(RolloutError, match="before a group was made"):
        receiver.receive(["a"], [[1]], ["float32"])
    store, port = listen("127.0.0.1", 0, 5.0)
    group = join(receiver, meeting(port, seconds=5.0))
    with pytest.raises(RolloutError, match="2 names, 1 shapes, 2 dtypes"):
        receiver.receive(["a", "b"], [[1]], ["float32"] * 2)
    sent = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.tensor(2.5).half()]
    works = [group.broadcast(value) for value in sent]
    dtypes = ["float32", "bfloat16", "float16"]
    assert receiver.receive(["a", "b", "c"], [[3, 5], [7], []], dtypes) == 3
    for work, value, name in zip(works, sent, "abc", strict=True):
        work.wait()
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)
    del store


def test_a_receiver_is_free_as_soon_as_the_trainer_leaves() -> None:
    store, port = listen("127.0.0.1", 0, 60.0)
    receiver = receiver_of({})
    group = join(receiver, meeting(port, seconds=60.0))
    with ThreadPoolExecutor(1) as threads:
        started = time.monotonic()
        waiting = threads.submit(receiver.receive, ["a"], [[4]], ["float32"])
        time.sleep(0.2)
        group.close()
        with pytest.raises(RolloutError, match="the transfer broke"):
            waiting.result()
        assert time.monotonic() - started < 5
    with pytest.raises(RolloutError, match="before a group was made"):
        receiver.receive(["a"], [[4]], ["float32"])
    del store


def test_a_loader_that_stops_early_or_raises_fails_the_update() -> None:
    store, port = listen("127.0.0.1", 0, 5.0)
    for number, (load, error) in enumerate(((next, "did not take b"), (_raise, "other layers"))):
        receiver = WeightReceiver(load, device=torch.device("cpu"))
        group = join(receiver, meeting(port, seconds=5.0, name=f"group-{number}"))
        works = [group.broadcast(torch.ones(1)) for _ in range(2)]
        with pytest.raises((RolloutError, ValueError), match=error):
            receiver.receive(["a", "b"], [[1]] * 2, ["float32"] * 2)
        group.close()
        del works
    del store


def _raise(_: Any) -> None:
    raise ValueError("this model has other layers")


def test_the_extension_of_vllm_needs_torch_alone() -> None:
    code = (
        "import sys, megatron_drpo.weight_sync.vllm_worker\n"
        "heavy = {'megatron', 'transformers', 'aiohttp', 'safetensors', 'tyro', 'tensorboard'}\n"
        "found = sorted(heavy & set(sys.modules))\n"
        "mine = sorted(name for name in sys.modules if name.startswith('megatron_drpo'))\n"
        "print(found, mine)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    package = "megatron_drpo"
    names = ["", ".errors", *(f".weight_sync{n}" for n in ("", ".group", ".receiver"))]
    mine = [f"{package}{name}" for name in [*names, ".weight_sync.vllm_worker"]]
    assert done.stdout.strip() == f"[] {mine}"
