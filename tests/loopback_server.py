"""A server that speaks vLLM's and SGLang's routes over an engine of this process, with faults.

`LoopbackServer` runs in a thread, over anything that has `start(sampling)` as `InProcessEngine`
does: `BigramEngine` here, whose law is a table, or the real one. As a program it serves a model:

    python -m tests.loopback_server MODEL_DIRECTORY [--port 0]

and prints its address. Faults are set through `fail`, or POST /loopback/fail {"fault": NAME,
"times": N or null}.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from safetensors.torch import save_file
from torch import Tensor

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.types import Prompt, Rollout, Trajectory
from megatron_drpo.weight_sync.receiver import WeightReceiver

Decode = Callable[[list[int]], str]

GENERATION_FAULTS = {
    "error": "status 500",
    "busy": "status 429",
    "hang": "no answer at all",
    "drop": "the connection is closed in the middle of the answer",
    "redirect": "to another address",
    "garbage": "an answer that is not JSON",
    "constant": "NaN as a log-prob, which is not JSON",
    "flood": "an answer without end",
    "raw": "log-probs at temperature 1, whatever was sampled",
    "positive": "a log-prob above 0",
    "fewer": "one response is missing",
    "unequal": "one log-prob is missing",
    "short": "a response that ends early for its length",
    "foreign": "a response that ends at a token which is no stop id",
    "text": "texts where ids should be",
    "break": "everything is broken off before its first token",
}
UPDATE_FAULTS = {"stale": "updates are acknowledged and not made", "broken": "updates fail"}
PAUSE_FAULTS = {"unpausable": "status 500 to every pause"}


_BODY = web.RequestKey("body", Any)


class BigramEngine:
    """A language model that is a table: the next token depends on the last one alone.

    Args:
        table: [V, V] logits of the next token, by the last one.
        decode: for stop strings.
        step_seconds: what one token of all running responses takes.
    """

    def __init__(
        self, table: Tensor, *, decode: Decode | None = None, step_seconds: float = 0.0
    ) -> None:
        self.table, self.decode, self.step_seconds = table, decode, step_seconds
        self.steps = 0

    def start(self, sampling: Sampling) -> BigramSession:
        return BigramSession(self, sampling)

    def logprobs(
        self, prompt: Sequence[int], ids: Sequence[int], temperature: float
    ) -> list[float]:
        """Of a response, in closed form."""
        before = [prompt[-1], *ids[:-1]]
        logits = self.table[list(before)].double() / temperature
        return torch.log_softmax(logits, -1)[range(len(ids)), list(ids)].tolist()


class BigramSession:
    """Responses under way, one token each in every step."""

    def __init__(self, engine: BigramEngine, sampling: Sampling) -> None:
        self._engine, self._sampling = engine, sampling
        self._running: dict[int, tuple[Request, list[int], torch.Generator]] = {}
        self._next = 0

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def add(self, requests: Sequence[Request]) -> list[int]:
        ids = list(range(self._next, self._next + len(requests)))
        self._next += len(requests)
        for number, request in zip(ids, requests, strict=True):
            generator = torch.Generator().manual_seed(request.stream)
            self._running[number] = (request, [], generator)
        return ids

    def step(self) -> list[tuple[int, Completion]]:
        time.sleep(self._engine.step_seconds)
        self._engine.steps += 1
        return [
            (number, done)
            for number in list(self._running)
            if (done := self._advance(number)) is not None
        ]

    def abort(self, ids: Sequence[int] | None = None) -> list[tuple[int, Completion]]:
        chosen = list(self._running) if ids is None else [i for i in ids if i in self._running]
        return [(number, self._end(number, "abort")) for number in chosen]

    def _advance(self, number: int) -> Completion | None:
        request, ids, generator = self._running[number]
        sampling, engine = self._sampling, self._engine
        last = ids[-1] if ids else int(request.prompt_ids[-1])
        logits = engine.table[last].double()
        if sampling.temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            law = torch.softmax(logits / sampling.temperature, -1)
            ids.append(int(torch.multinomial(law, 1, generator=generator)))
        if ids[-1] in sampling.stop_ids:
            return self._end(number, "stop")
        if sampling.stop_strings:
            assert engine.decode is not None
            text = engine.decode(ids)
            if any(string in text for string in sampling.stop_strings):
                return self._end(number, "stop")
        if len(ids) == request.max_response_length:
            return self._end(number, "length")
        return None

    def _end(self, number: int, reason: Any) -> Completion:
        request, ids, _ = self._running.pop(number)
        engine, sampling = self._engine, self._sampling
        temperature = sampling.temperature or 1.0
        prompt = request.prompt_ids.tolist()
        done = Completion(
            torch.tensor(ids, dtype=torch.long),
            torch.tensor(engine.logprobs(prompt, ids, temperature), dtype=torch.float32),
            reason,
        )
        if sampling.record_topk and ids:
            law = torch.log_softmax(engine.table[[prompt[-1], *ids[:-1]]] / temperature, -1)
            top = law.topk(sampling.record_topk, -1)
            done = replace(done, topk_ids=top.indices, topk_logprobs=top.values)
        return done


class LoopbackServer:
    """Both dialects, on 127.0.0.1; use as a context manager.

    Args:
        engine: its sessions are stepped in a thread of their own.
        decode: for the texts, which are there so that a client may go wrong with them.
        score: (prompt, response, temperature) -> log-probs, for the fault `raw`.
        weights: where updates go: `load_directory`, and a group's verbs as of `WeightReceiver`.
        world_size: what the server says of itself.
    """

    def __init__(
        self,
        engine: Any,
        *,
        decode: Decode | None = None,
        score: Callable[[list[int], list[int], float], list[float]] | None = None,
        weights: Any = None,
        world_size: int = 1,
        port: int = 0,
    ) -> None:
        self.engine, self.weights, self.world_size = engine, weights, world_size
        self.version = "default"
        self.url = ""
        self.requests: list[tuple[str, Any]] = []
        """(path, body) of every request so far."""
        self.flushed = 0
        self._decode = decode or (lambda ids: " ".join(map(str, ids)))
        self._score = score
        self._port = port
        self._faults: dict[str, int | None] = {}
        self._sessions: dict[Sampling, Any] = {}
        self._results: dict[tuple[Sampling, int], asyncio.Future[Completion]] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(1)
        self._admin = concurrent.futures.ThreadPoolExecutor(1)
        self._started: concurrent.futures.Future[str] = concurrent.futures.Future()

    def __enter__(self) -> LoopbackServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self.url = self._started.result(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._admin.shutdown(wait=False, cancel_futures=True)

    def fail(self, fault: str, times: int | None = 1) -> None:
        """The next `times` requests that it concerns go wrong; None: all from now on."""
        assert fault in GENERATION_FAULTS | UPDATE_FAULTS | PAUSE_FAULTS, fault
        self._faults[fault] = times

    def heal(self) -> None:
        self._faults.clear()

    def count(self, path: str) -> int:
        return sum(seen == path for seen, _ in self.requests)

    # The server.

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._wake, self._resumed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._resumed.set()
        self._stepping = asyncio.Lock()
        app = web.Application(middlewares=[self._record], client_max_size=1 << 26)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.post("/v1/completions", self._vllm_generate),
                web.post("/pause", self._pause),
                web.post("/resume", self._resume),
                web.post("/reset_prefix_cache", self._flush),
                web.post("/collective_rpc", self._vllm_rpc),
                web.post("/update_weight_version", self._vllm_set_version),
                web.get("/weight_info", self._get_version),
                web.get("/get_world_size", self._get_world_size),
                web.post("/generate", self._sglang_generate),
                web.post("/pause_generation", self._pause),
                web.post("/continue_generation", self._resume),
                web.post("/flush_cache", self._flush),
                web.post("/update_weights_from_disk", self._sglang_disk),
                web.post("/init_weights_update_group", self._sglang_open),
                web.post("/update_weights_from_distributed", self._sglang_receive),
                web.post("/destroy_weights_update_group", self._sglang_close),
                web.get("/get_model_info", self._get_version),
                web.get("/get_server_info", self._get_world_size),
                web.post("/loopback/fail", self._set_fault),
            ]
        )
        # As the real servers do, a request ends when its client goes away.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self._port)
        await site.start()
        driver = asyncio.create_task(self._drive())
        port = runner.addresses[0][1]
        self._started.set_result(f"http://127.0.0.1:{port}")
        await self._stop.wait()
        driver.cancel()
        await runner.cleanup()

    @web.middleware
    async def _record(self, request: web.Request, handler: Any) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.requests.append((request.path, body))
        request[_BODY] = body
        return await handler(request)

    def _fault(self, *among: str) -> str | None:
        """The one that this request shall suffer."""
        for fault in among:
            if fault in self._faults:
                left = self._faults[fault]
                if left is not None:
                    self._faults[fault] = left - 1
                    if left <= 1:
                        del self._faults[fault]
                return fault
        return None

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _set_fault(self, request: web.Request) -> web.Response:
        body = request[_BODY]
        if body["fault"] is None:
            self.heal()
        else:
            self.fail(body["fault"], body["times"])
        return web.json_response({})

    # Generation.

    async def _drive(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while any(session.busy for session in self._sessions.values()):
                for key, session in list(self._sessions.items()):
                    async with self._stepping:
                        if session.busy:
                            self._hand_over(key, await self._in_thread(session.step))
                await asyncio.sleep(0)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._loop.run_in_executor(self._threads, function, *arguments)

    def _hand_over(self, key: Sampling, finished: list[tuple[int, Completion]]) -> None:
        for number, done in finished:
            future = self._results.pop((key, number), None)
            if future is not None and not future.done():
                future.set_result(done)

    async def _complete(self, sampling: Sampling, requests: list[Request]) -> list[Completion]:
        key = replace(sampling, max_response_length=0)  # each request has a limit of its own
        await self._resumed.wait()
        if self._fault("break"):
            empty = torch.zeros(0, dtype=torch.long)
            return [Completion(empty, torch.zeros(0), "abort") for _ in requests]
        async with self._stepping:
            if key not in self._sessions:
                self._sessions[key] = self.engine.start(key)
            session = self._sessions[key]
            try:
                numbers = session.add(requests)
            except RolloutError as error:
                raise web.HTTPBadRequest(text=str(error)) from None
            futures = [self._loop.create_future() for _ in numbers]
            for number, future in zip(numbers, futures, strict=True):
                self._results[key, number] = future
        self._wake.set()
        try:
            return list(await asyncio.gather(*futures))
        except asyncio.CancelledError:
            self._loop.create_task(self._forget(key, numbers))
            raise

    async def _forget(self, key: Sampling, numbers: list[int]) -> None:
        async with self._stepping:
            self._hand_over(key, self._sessions[key].abort(numbers))

    async def _pause(self, _: web.Request) -> web.Response:
        if self._fault("unpausable"):
            return web.json_response({"error": "cannot"}, status=500)
        self._resumed.clear()
        async with self._stepping:
            for key, session in self._sessions.items():
                self._hand_over(key, session.abort(None))
        return web.json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        self._resumed.set()
        return web.json_response({"status": "resumed"})

    async def _flush(self, _: web.Request) -> web.Response:
        self.flushed += 1
        return web.json_response({"success": True})

    async def _misbehave(self, request: web.Request) -> web.StreamResponse | None:
        """What goes wrong before anything is generated."""
        fault = self._fault(
            "error", "busy", "hang", "drop", "redirect", "garbage", "constant", "flood"
        )
        match fault:
            case "error":
                return web.json_response({"error": {"message": "out of\x1b[31m luck"}}, status=500)
            case "busy":
                return web.json_response({"error": "too many requests"}, status=429)
            case "hang":
                await asyncio.sleep(3600)
            case "redirect":
                return web.Response(status=307, headers={"Location": self.url + "/health"})
            case "garbage":
                return web.Response(text="<html>", content_type="application/json")
            case "constant":
                text = '{"choices": [{"token_ids": [3], "logprobs": {"token_logprobs": [NaN]}}]}'
                return web.Response(text=text, content_type="application/json")
            case "drop" | "flood":
                answer = web.StreamResponse()
                await answer.prepare(request)
                await answer.write(b'{"choices": [')
                if fault == "flood":
                    while True:
                        await answer.write(b" " * (1 << 20))
                assert request.transport is not None
                request.transport.close()
                return answer
        return None

    def _distort(
        self, requests: list[Request], found: list[Completion], temperature: float
    ) -> list[Completion]:
        """What goes wrong with what was generated."""
        fault = self._fault("raw", "positive", "fewer", "unequal", "short", "foreign")
        first = found[0]
        match fault:
            case "raw":
                assert self._score is not None
                return [
                    replace(
                        done,
                        logprobs=torch.tensor(
                            self._score(
                                request.prompt_ids.tolist(), done.response_ids.tolist(), 1.0
                            )
                        ),
                    )
                    for request, done in zip(requests, found, strict=True)
                ]
            case "positive":
                return [replace(first, logprobs=first.logprobs + 50), *found[1:]]
            case "fewer":
                return found[1:]
            case "unequal":
                return [replace(first, logprobs=first.logprobs[1:]), *found[1:]]
            case "short":
                cut = {"response_ids": first.response_ids[:1], "logprobs": first.logprobs[:1]}
                return [replace(first, finish_reason="length", **cut), *found[1:]]
            case "foreign":
                return [replace(first, finish_reason="stop"), *found[1:]]
        return found

    # vLLM's routes.

    async def _vllm_generate(self, request: web.Request) -> web.StreamResponse:
        if (bad := await self._misbehave(request)) is not None:
            return bad
        body = request[_BODY]
        (prompt,) = body["prompt"]
        if body["temperature"] == 0 and body["n"] > 1:
            return web.json_response({"error": {"message": "n must be 1"}}, status=400)
        key = Sampling(
            body["temperature"],
            body["top_p"],
            max(body["top_k"], 0),
            body["max_tokens"],
            tuple(body["stop_token_ids"]),
            seed=0,
            record_topk=body["logprobs"],
            stop_strings=tuple(body["stop"]),
        )
        requests = _requests(prompt, [body["seed"] + i for i in range(body["n"])], key)
        found = await self._complete(key, requests)
        found = self._distort(requests, found, key.temperature)
        text = self._fault("text")
        choices = []
        for index, done in enumerate(found):
            ids = done.response_ids.tolist()
            names = [f"token_id:{i}" for i in ids]
            values = done.logprobs.tolist()
            top = [{name: value} for name, value in zip(names, values, strict=False)]
            if done.topk_ids is not None and done.topk_logprobs is not None:
                for entries, row, probs in zip(top, done.topk_ids, done.topk_logprobs, strict=True):
                    entries |= {
                        f"token_id:{i}": v
                        for i, v in zip(row.tolist(), probs.tolist(), strict=True)
                    }
            choices.append(
                {
                    "index": index,
                    "text": self._decode(ids),
                    "finish_reason": done.finish_reason,
                    "logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": top},
                    "token_ids": names if text else ids,
                }
            )
        return web.json_response({"object": "text_completion", "choices": choices})

    async def _vllm_rpc(self, request: web.Request) -> web.Response:
        body = request[_BODY]
        arguments = body["kwargs"]
        match body["method"]:
            case "reload_weights":
                done = await self._update("load_directory", arguments["weights_path"])
            case "drpo_worker":
                workers = [{"worker": i, "device": "cpu"} for i in range(self.world_size)]
                return web.json_response({"results": workers})
            case "drpo_init_group":
                done = await self._update("init_group", **arguments)
            case "drpo_receive":
                done = await self._update("receive", **arguments)
            case "drpo_destroy_group":
                done = await self._update("destroy_group")
            case other:
                done = f"no method {other}"
        if done:
            return web.json_response({"error": {"message": done}}, status=500)
        return web.json_response({"results": [{"worker": 0}]})

    async def _vllm_set_version(self, request: web.Request) -> web.Response:
        self.version = request[_BODY]["new_version"]
        return web.json_response({"success": True, "new_version": self.version})

    async def _get_version(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _get_world_size(self, _: web.Request) -> web.Response:
        return web.json_response({"world_size": self.world_size, "tp_size": self.world_size})

    async def _update(self, verb: str, *arguments: Any, **named: Any) -> str | None:
        """What went wrong, if anything."""
        if self._fault("broken"):
            return "the update failed"
        if self._fault("stale"):
            return None
        assert self.weights is not None
        call = getattr(self.weights, verb)
        try:
            # Not the thread of the engine: a broadcast may wait for long.
            await self._loop.run_in_executor(self._admin, lambda: call(*arguments, **named))
        except Exception as error:
            return str(error)
        return None

    # SGLang's routes.

    async def _sglang_generate(self, request: web.Request) -> web.StreamResponse:
        if (bad := await self._misbehave(request)) is not None:
            return bad
        body = request[_BODY]
        laws = body["sampling_params"]
        assert len(laws) == len(body["input_ids"])
        law = laws[0]
        stop_ids = () if law["ignore_eos"] else tuple(law["stop_token_ids"])
        key = Sampling(
            law["temperature"],
            law["top_p"],
            max(law["top_k"], 0),
            law["max_new_tokens"],
            stop_ids,
            seed=0,
            record_topk=body["top_logprobs_num"],
            stop_strings=tuple(law["stop"]),
        )
        requests = _requests(body["input_ids"][0], [one["sampling_seed"] for one in laws], key)
        found = await self._complete(key, requests)
        found = self._distort(requests, found, key.temperature)
        text = self._fault("text")
        answer = []
        for done in found:
            ids, values = done.response_ids.tolist(), done.logprobs.tolist()
            told: dict[str, Any] = {"finish_reason": {"type": done.finish_reason}}
            if ids:
                told["output_token_logprobs"] = [
                    [value, str(i) if text else i, None]
                    for value, i in zip(values, ids, strict=False)
                ]
            if done.topk_ids is not None and done.topk_logprobs is not None:
                told["output_top_logprobs"] = [
                    [[v, i, None] for v, i in zip(probs.tolist(), row.tolist(), strict=True)]
                    for probs, row in zip(done.topk_logprobs, done.topk_ids, strict=True)
                ]
            answer.append({"text": self._decode(ids), "output_ids": ids, "meta_info": told})
        return web.json_response(answer)

    async def _sglang_updated(self, request: web.Request, wrong: str | None) -> web.Response:
        body = request[_BODY]
        if wrong is None and "weight_version" in body:
            self.version = body["weight_version"]
        if wrong is None and body.get("flush_cache"):
            self.flushed += 1
        told = {"success": wrong is None, "message": wrong or ""}
        return web.json_response(told, status=400 if wrong else 200)

    async def _sglang_disk(self, request: web.Request) -> web.Response:
        wrong = await self._update("load_directory", request[_BODY]["model_path"])
        return await self._sglang_updated(request, wrong)

    async def _sglang_open(self, request: web.Request) -> web.Response:
        return await self._sglang_updated(
            request, await self._update("init_group", **request[_BODY])
        )

    async def _sglang_receive(self, request: web.Request) -> web.Response:
        lists = {name: request[_BODY][name] for name in ("names", "shapes", "dtypes")}
        return await self._sglang_updated(request, await self._update("receive", **lists))

    async def _sglang_close(self, request: web.Request) -> web.Response:
        return await self._sglang_updated(request, await self._update("destroy_group"))


def _requests(prompt: list[int], seeds: list[int], key: Sampling) -> list[Request]:
    ids = torch.tensor(prompt)
    return [Request(ids, seed, 0, key.max_response_length) for seed in seeds]


def serve_policy(model: Path, *, port: int = 0) -> LoopbackServer:
    """The server over the real engine, on the model in a Hugging Face directory; not yet started.

    This process becomes a Megatron rank of its own.
    """
    import torch.distributed as dist
    from transformers import AutoTokenizer

    from megatron_drpo.checkpoint.families import read_architecture
    from megatron_drpo.config import Config, DataConfig, ModelConfig, TrainConfig
    from megatron_drpo.device import Device
    from megatron_drpo.mcore import cpu

    cpu.install()
    from megatron_drpo.mcore import parallel
    from megatron_drpo.mcore.policy import Policy
    from megatron_drpo.rollout.inprocess import InProcessEngine

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = Config(
        ModelConfig(hf_model=str(model), transformer_impl="local"),
        data=DataConfig(prompts="unused"),
        train=TrainConfig(max_tokens_per_microbatch=4096),
    )
    device = Device("cpu", "gloo", 0, "test")
    layout = parallel.initialize(config.parallel, device, seed=1)
    policy = Policy.load(
        config, read_architecture(model), layout, device, weights=model, training=False
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    engine = InProcessEngine(policy, max_slots=64, decode=tokenizer.decode)
    return LoopbackServer(
        engine,
        decode=tokenizer.decode,
        score=_scorer(policy),
        weights=PolicyWeights(policy, model),
        port=port,
    )


def _scorer(policy: Any) -> Callable[[list[int], list[int], float], list[float]]:
    def score(prompt: list[int], response: list[int], temperature: float) -> list[float]:
        ids = torch.tensor(response)
        question = Prompt("p", "", torch.tensor(prompt), None)
        rollout = Rollout(question, 0, ids, torch.zeros(len(ids)), "length", 0, "")
        rows = policy.pack([Trajectory(rollout, 0.0, 0.0)])
        (scores,) = policy.score(rows, temperature=temperature)
        return scores.logprobs.tolist()

    return score


class PolicyWeights:
    """Updates of a policy, which take the way of a checkpoint through a scratch directory."""

    def __init__(self, policy: Any, settings: Path) -> None:
        self._policy, self._settings = policy, settings
        self._receiver = WeightReceiver(self._load, device=torch.device("cpu"))
        self.init_group, self.receive = self._receiver.init_group, self._receiver.receive
        self.destroy_group = self._receiver.destroy_group

    def load_directory(self, directory: str) -> None:
        from megatron_drpo.mcore.weights import load

        policy = self._policy
        load(Path(directory), policy.architecture, policy.models, policy.layout, verify=True)

    def _load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(self._settings / "config.json", scratch)
            save_file(dict(tensors), Path(scratch) / "model.safetensors")
            self.load_directory(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model to trainers under test.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with serve_policy(options.model, port=options.port) as server:
        print(server.url, flush=True)
        # Whoever started this holds the other end of its input, even if killed.
        sys.stdin.read()


if __name__ == "__main__":
    main()
