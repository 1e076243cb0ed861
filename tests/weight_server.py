"""A server that only receives weights, in a process of its own: vLLM's routes, or SGLang's.

vLLM's workers are threads with the real `WorkerExtension`. SGLang's worker makes its group by
torch's own means, as SGLang does, and shares no line with `megatron_drpo.weight_sync`. What a
worker has loaded is written to a safetensors file on demand. Prints its address once it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d, rendezvous  # type: ignore[attr-defined]

from megatron_drpo.weight_sync.vllm_worker import WorkerExtension


class Model:
    """What one worker holds, and the fault that it was told to have."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.fault = ""

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for count, (name, value) in enumerate(tensors):
            if self.fault == "load":
                raise ValueError("this model has other layers")
            if self.fault == "die" and count == 3:
                os._exit(9)
            if self.fault == "freeze" and count == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.fault != "keep":
                self.tensors[name] = value


class Worker(WorkerExtension):
    """As vLLM makes it: its own worker, extended."""

    def __init__(self, rank: int) -> None:
        self.rank, self.device, self.model = rank, torch.device("cpu"), Model()
        self.model_runner = SimpleNamespace(reload_weights=self.reload_weights)

    def reload_weights(self, weights_iterator: Any = None, weights_path: str | None = None) -> None:
        if weights_path is not None:
            weights_iterator = load_file(f"{weights_path}/model.safetensors").items()
        self.model.load(weights_iterator)


class Server:
    """Routes of both kinds over the workers."""

    def __init__(self, workers: int) -> None:
        self.workers = [Worker(rank) for rank in range(workers)]
        self.threads = ThreadPoolExecutor(workers + 2)
        self.version, self.log = "default", []
        self.groups: dict[str, Any] = {}

    async def in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    @web.middleware
    async def logged(self, request: web.Request, handler: Any) -> Any:
        if request.can_read_body:
            body = await request.json()
            self.log.append(body.get("method", request.path))
        else:
            self.log.append(request.path)
        return await handler(request)

    async def answer(self, request: web.Request) -> web.Response:
        status = {"/pause": "paused", "/resume": "resumed"}.get(request.path, "ok")
        return web.json_response({"success": True, "status": status})

    # vLLM.

    async def rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        calls = [
            self.in_thread(lambda w=worker: getattr(w, body["method"])(**body["kwargs"]))
            for worker in self.workers
        ]
        try:
            return web.json_response({"results": await asyncio.gather(*calls)})
        except Exception as error:
            return web.json_response({"error": str(error)}, status=500)

    async def set_version(self, request: web.Request) -> web.Response:
        if self.workers[0].model.fault != "version":
            self.version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"weight_version": self.version, "world_size": len(self.workers), "tp_size": 1}
        )

    # SGLang.

    async def init_group(self, request: web.Request) -> web.Response:
        await self.in_thread(self._init_group, await request.json())
        return web.json_response({"success": True, "message": ""})

    def _init_group(self, body: dict[str, Any]) -> None:
        if not dist.is_initialized():
            store: Any = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        limit = timedelta(seconds=60)
        where = f"tcp://{body['master_address']}:{body['master_port']}"
        size, rank, name = body["world_size"], body["rank_offset"], body["group_name"]
        store, rank, size = next(rendezvous(where, rank, size, timeout=limit))
        group, _ = distributed_c10d._new_process_group_helper(
            size,
            rank,
            [],
            distributed_c10d.Backend(body["backend"]),
            distributed_c10d.PrefixStore(name, store),
            group_name=name,
            timeout=limit,
        )
        distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
        self.groups[name] = group

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.json()
        try:
            await self.in_thread(self._receive, body)
        except Exception as error:
            return web.json_response({"success": False, "message": str(error)}, status=400)
        self.version = body.get("weight_version", self.version)
        return web.json_response({"success": True, "message": ""})

    def _receive(self, body: dict[str, Any]) -> None:
        values = [
            torch.empty(shape, dtype=getattr(torch, dtype))
            for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True)
        ]
        group = self.groups[body["group_name"]]
        works: list[Any] = [
            dist.broadcast(value, src=0, group=group, async_op=True) for value in values
        ]
        for work in works:
            work.wait()
        self.workers[0].model.load(zip(body["names"], values, strict=True))

    async def from_disk(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.workers[0].reload_weights(weights_path=body["model_path"])
        self.version = body["weight_version"]
        return web.json_response({"success": True, "message": ""})

    async def leave(self, request: web.Request) -> web.Response:
        group = self.groups.pop((await request.json())["group_name"], None)
        return web.json_response({"success": True, "message": str(group)})

    # The test's own.

    async def test(self, request: web.Request) -> web.Response:
        """Take a fault; write and forget what each worker holds; tell what was asked till now."""
        for worker in self.workers:
            worker.model.fault = request.query.get("fault", "")
            if out := request.query.get("out"):
                save_file(worker.model.tensors, f"{out}-{worker.rank}.safetensors")
                worker.model.tensors = {}
        log, self.log = self.log[:-1], []
        heavy = sorted({"megatron", "transformers"} & set(sys.modules))
        return web.json_response({"log": log, "heavy": heavy})


async def serve(workers: int) -> None:
    server = Server(workers)
    app = web.Application(middlewares=[server.logged], client_max_size=1 << 26)
    app.add_routes(
        [
            web.get("/health", server.answer),
            web.post("/pause", server.answer),
            web.post("/resume", server.answer),
            web.post("/reset_prefix_cache", server.answer),
            web.post("/collective_rpc", server.rpc),
            web.post("/update_weight_version", server.set_version),
            web.get("/weight_info", server.info),
            web.get("/get_world_size", server.info),
            web.post("/pause_generation", server.answer),
            web.post("/continue_generation", server.answer),
            web.post("/flush_cache", server.answer),
            web.post("/init_weights_update_group", server.init_group),
            web.post("/update_weights_from_distributed", server.receive),
            web.post("/update_weights_from_disk", server.from_disk),
            web.post("/destroy_weights_update_group", server.leave),
            web.get("/get_model_info", server.info),
            web.get("/get_server_info", server.info),
            web.get("/test", server.test),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1)
    torch.set_num_threads(1)
    asyncio.run(serve(parser.parse_args().workers))
