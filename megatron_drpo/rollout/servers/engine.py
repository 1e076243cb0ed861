"""A `RolloutEngine` over servers: who gets which prompt, what is sent again, and pauses.

An event loop in a thread of its own does all the work; the verbs may be called from any thread, and
`generate` from several at once. Requests next to each other whose prompts are equal travel as one
job. A job goes to the server with the fewest tokens outstanding; jobs beyond `max_outstanding`
responses wait, so that a server which is done early gets more.

What fails, and then: a request is sent again `retries` times, to a server that has not failed it
where there is one. A server that was late, or failed more than `retries` times in a row, is out for
the rest of its batch; with none left the batch fails and each is named. A request that a server
refuses, or whose answer makes no sense, fails the batch at once.

`pause` breaks off what runs and keeps it; `resume` sends prompt and what exists again, under new
weights. `version_spans` says which tokens come from which version.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from megatron_drpo.errors import ConfigError, RolloutError
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.rollout.servers.client import Client, ServerError, pause_before
from megatron_drpo.rollout.servers.dialects import DIALECTS, Job, Response
from megatron_drpo.rollout.stops import StopSearch
from megatron_drpo.types import FinishReason

T = TypeVar("T")
OnDone = Callable[[int, Completion], None]

_CLOSED = "the engine was closed"
_GRACE_SECONDS = 2.0
"""After a pause: without an answer for so long, what still runs is held by its server."""


class ServerEngine:
    """A `RolloutEngine` over one or several servers of one kind.

    Example:
        engine = ServerEngine("vllm", ["http://10.0.0.7:8000"], timeout_seconds=300, retries=2)
        engine.ready(wait_seconds=120)
        completions = engine.generate(requests, sampling)
    """

    def __init__(
        self,
        dialect: str,
        urls: Sequence[str],
        *,
        timeout_seconds: float = 300.0,
        retries: int = 2,
        max_outstanding: int = 256,
        version: int = 0,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        """Nothing is contacted yet.

        Args:
            dialect: `vllm` or `sglang`.
            urls: as `--rollout-servers`.
            timeout_seconds: of one request.
            retries: how often a request is sent again.
            max_outstanding: responses that one server is asked for at the same time.
            version: of the weights that the servers hold.
            decode: text of token ids; stop strings need it.

        Raises:
            ConfigError: no address, one twice, or one that is not http(s); an unknown dialect.
        """
        if dialect not in DIALECTS:
            raise ConfigError(f"--rollout-engine {dialect}: must be one of {', '.join(DIALECTS)}")
        if not urls:
            raise ConfigError(f"--rollout-servers: give the addresses of the {dialect} servers")
        # Jobs are sent again by this class, which may choose another server.
        self._servers = [
            _Server(Client(url, DIALECTS[dialect], timeout_seconds, retries=0)) for url in urls
        ]
        self.clients = tuple(
            Client(url, DIALECTS[dialect], timeout_seconds, retries=retries) for url in urls
        )
        """For a single server's verbs, in the order of `urls`."""
        if len({client.url for client in self.clients}) < len(urls):
            raise ConfigError(f"--rollout-servers {' '.join(urls)}: an address is there twice")
        self._retries, self._max_outstanding = retries, max_outstanding
        self._version, self._decode = version, decode
        self._waiting: deque[_Unit] = deque()
        self._paused = False
        self._batches: set[_Batch] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._start = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def version(self) -> int:
        """Of the weights that the servers hold, as `resume` said."""
        return self._version

    def ready(self, wait_seconds: float = 0.0) -> None:
        """Return once all servers are up.

        Raises:
            RolloutError: some are not after `wait_seconds`; each is named.
        """
        failed = self._wait(lambda: _each(lambda client: client.ready(wait_seconds), self.clients))
        if failed:
            raise RolloutError("\n".join(["not all servers are up:", *map(_line, failed.items())]))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `RolloutEngine.generate`; to be called on one rank of each replica."""
        return self.submit(requests, sampling).result()

    def submit(
        self, requests: Sequence[Request], sampling: Sampling, on_done: OnDone | None = None
    ) -> Pending:
        """Begin to generate; returns at once.

        Args:
            on_done: called in the engine's thread with a request's index and its completion, in the
                order in which they finish; must be quick, and an exception in it fails the batch.

        Raises:
            ConfigError: stop strings without `decode`.
            RolloutError: the engine was closed.
        """
        if sampling.stop_strings and self._decode is None:
            raise ConfigError("--rollout-stop-strings: an engine over servers needs `decode`")
        batch = _Batch(requests, sampling, on_done)
        if requests:
            self._tell(self._begin, batch)
        else:
            batch.future.set_result([])
        return Pending(batch, self)

    def pause(self) -> None:
        """Break off what runs at the servers, keep it, and send nothing more.

        With several engines on the same servers: every one is to be paused before the weights
        change, and resumed afterwards.

        A server that fails to pause is excluded.

        Raises:
            RolloutError: all failed; each is named.
        """
        self._wait(self._pause)

    def resume(self, version: int) -> None:
        """Go on with weights of this version; also says which they are without a `pause` before.

        A server that fails to resume is excluded; otherwise as `pause`.
        """
        self._wait(lambda: self._resume(version))

    def exclude(self, reasons: Mapping[str, str]) -> None:
        """Send nothing new to these servers, by address, and why; all others are admitted again."""
        told = {
            url.rstrip("/"): reason.removeprefix(f"{url.rstrip('/')}: ")
            for url, reason in reasons.items()
        }
        assert told.keys() <= {server.client.url for server in self._servers}
        for server in self._servers:
            server.excluded = told.get(server.client.url)

    def close(self) -> None:
        """Give up all that is under way, and end the thread; no verb works afterwards."""
        with self._start:
            loop, self._loop, self._closed = self._loop, None, True
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._give_up(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    # Between threads.

    def _started(self) -> asyncio.AbstractEventLoop:
        """The loop, with `_start` held: what it is told then comes before `close`."""
        if self._closed:
            raise RolloutError(_CLOSED)
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run_loop, args=(self._loop,), daemon=True).start()
        return self._loop

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        with self._start:
            self._started().call_soon_threadsafe(function, *arguments)

    def _wait(self, verb: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._start:
            loop = self._started()
            future = asyncio.run_coroutine_threadsafe(verb(), loop)
        try:
            return future.result()
        except CancelledError:
            raise RolloutError(_CLOSED) from None

    # In the loop's thread.

    def _begin(self, batch: _Batch) -> None:
        self._batches.add(batch)
        batch.future.add_done_callback(lambda _: self._batches.discard(batch))
        try:
            self._enqueue(batch, batch.responses)
        except Exception as error:  # nobody else would hear of it
            batch.fail(error)

    def _enqueue(self, batch: _Batch, responses: Sequence[_Response]) -> None:
        """Jobs of responses, those next to each other with equal prompts and limits together."""
        sampling = batch.sampling
        self._waiting.extend(
            _Unit(batch, list(same))
            for _, same in itertools.groupby(responses, lambda r: (r.prompt, r.limit(sampling)))
        )
        self._pump()

    def _pump(self) -> None:
        """Send what waits, as long as there is room."""
        while self._waiting and not self._paused:
            unit = self._waiting[0]
            if not unit.batch.future.done():
                try:
                    server = self._choose(unit)
                except RolloutError as error:
                    unit.batch.fail(error)
                    continue
                if server is None:
                    return
                server.take(unit)
                task = asyncio.get_running_loop().create_task(self._run(unit, server))
                self._running.add(task)
                unit.batch.tasks.add(task)
                task.add_done_callback(self._running.discard)
                task.add_done_callback(unit.batch.tasks.discard)
            self._waiting.popleft()

    def _choose(self, unit: _Unit) -> _Server | None:
        """Of those left, the least loaded that has not failed this job; None while all are full."""
        batch = unit.batch
        left = self._left(batch)
        if not left:
            told = {s.client.url: s.excluded or batch.out[s] for s in self._servers}
            raise RolloutError(
                "\n".join(["no server is left to generate:", *map(_line, told.items())])
            )
        left = [server for server in left if server not in unit.failed_at] or left
        count = len(unit.responses)
        room = [s for s in left if not s.responses or s.responses + count <= self._max_outstanding]
        return min(room, key=lambda server: server.tokens, default=None)

    def _left(self, batch: _Batch) -> list[_Server]:
        return [s for s in self._servers if s.excluded is None and s not in batch.out]

    async def _run(self, unit: _Unit, server: _Server) -> None:
        try:
            try:
                found = await server.client.generate(unit.job())
            finally:
                server.release(unit)
            self._receive(unit, server, found)
        except ServerError as error:
            self._failed(unit, server, error)
        except asyncio.CancelledError:
            if not self._paused or unit.batch.future.done():
                raise
            # A paused server held it, and has nothing of it yet.
            self._waiting.append(_Unit(unit.batch, unit.responses))
        except Exception as error:
            unit.batch.fail(error)
        self._pump()

    def _receive(self, unit: _Unit, server: _Server, found: list[Response]) -> None:
        batch = unit.batch
        if len(found) < len(unit.responses):  # greedy: all are the same
            found = found * len(unit.responses)
        stuck = all(new.finish_reason == "abort" and not new.ids for new in found)
        if stuck and not self._paused:
            # Another engine may have paused it a moment ago.
            raise ServerError(server.client.url, "busy", "it breaks off what it is asked for")
        batch.failures.pop(server, None)
        unfinished = []
        for response, new in zip(unit.responses, found, strict=True):
            response.extend(new, self._version)
            finish = self._finish(batch.sampling, response, new, server)
            if finish == "abort":
                unfinished.append(response)
            else:
                batch.done(response, finish)
        if unfinished:
            self._enqueue(batch, unfinished)

    def _finish(
        self, sampling: Sampling, response: _Response, new: Response, server: _Server
    ) -> FinishReason:
        """How the response ended, which its own tokens decide where stop strings are given.

        A server looks for them in what it generates itself, and so misses one that began before a
        pause.
        """
        finish = new.finish_reason
        if sampling.stop_strings and self._decode is not None:
            earlier = len(response.ids) - len(new.ids)
            search = StopSearch(sampling.stop_strings, self._decode, response.ids[:earlier])
            kept = search.push(new.ids)
            if kept is not None:
                response.cut(earlier + kept)
                return "stop"
            if finish == "stop" and response.ids[-1] not in sampling.stop_ids:
                raise RolloutError(
                    f"{server.client.url}: a response ended at a stop string that the text of its "
                    "tokens does not hold; is its tokenizer that of --hf-model?"
                )
        if finish == "abort" and response.ids and response.ids[-1] in sampling.stop_ids:
            return "stop"
        if finish == "abort" and not response.limit(sampling):
            return "length"
        return finish

    def _failed(self, unit: _Unit, server: _Server, error: ServerError) -> None:
        """Send the job again, unless that is in vain."""
        batch = unit.batch
        unit.errors.append(str(error))
        unit.failed_at.add(server)
        if not error.again:
            batch.fail(RolloutError(str(error)))
            return
        if error.kind != "busy":
            batch.failures[server] = batch.failures.get(server, 0) + 1
            if error.kind == "late" or batch.failures[server] > self._retries:
                batch.out[server] = error.reason
        if len(unit.errors) > self._retries and self._left(batch):
            told = "\n".join(f"  {text}" for text in unit.errors)
            batch.fail(
                RolloutError(
                    f"a request failed {len(unit.errors)} times (--rollout-server-retries "
                    f"{self._retries}):\n{told}"
                )
            )
            return
        delay = pause_before(len(unit.errors) - 1) if self._left(batch) else 0.0
        asyncio.get_running_loop().call_later(delay, self._again, unit)

    def _again(self, unit: _Unit) -> None:
        self._waiting.appendleft(unit)
        self._pump()

    async def _pause(self) -> None:
        self._paused = True
        await self._admitted(lambda client: client.pause())
        # What a server broke off arrives now. What reached it after the pause, it holds.
        running = set(self._running)
        while running:
            done, running = await asyncio.wait(running, timeout=_GRACE_SECONDS)
            if not done:
                break
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _resume(self, version: int) -> None:
        if self._paused:
            await self._admitted(lambda client: client.resume())
        self._version, self._paused = version, False
        self._pump()

    async def _admitted(self, verb: Callable[[Client], Awaitable[None]]) -> None:
        """A verb of all servers that are not excluded; those that fail are from now on."""
        asked = [
            client
            for client, server in zip(self.clients, self._servers, strict=True)
            if server.excluded is None
        ]
        failed = await _each(verb, asked)
        for server in self._servers:
            server.excluded = failed.get(server.client.url, server.excluded)
        told = {s.client.url: s.excluded for s in self._servers if s.excluded is not None}
        if len(told) == len(self._servers):
            raise RolloutError("\n".join(["no server is left:", *map(_line, told.items())]))

    async def _give_up(self) -> None:
        for batch in list(self._batches):
            batch.fail(RolloutError(_CLOSED))
        self._waiting.clear()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@dataclass(eq=False)
class Pending:
    """Responses under way."""

    _batch: _Batch
    _engine: ServerEngine

    def result(self, timeout_seconds: float | None = None) -> list[Completion]:
        """All completions, in the order of the requests; waits for them.

        Raises:
            RolloutError: see the module.
            TimeoutError: `timeout_seconds` passed; they are still under way.
        """
        return self._batch.future.result(timeout_seconds)

    def done(self) -> bool:
        """Whether `result` returns, or raises, at once."""
        return self._batch.future.done()

    def cancel(self) -> None:
        """Give up; `result` raises."""
        if not self.done():
            with suppress(RolloutError):  # closed in the meantime, which gave it up
                self._engine._tell(self._batch.fail, RolloutError("the request was cancelled"))


class _Response:
    """A response so far."""

    def __init__(self, index: int, request: Request) -> None:
        self.index, self.request = index, request
        self.prompt: tuple[int, ...] = tuple(request.prompt_ids.tolist())
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.topk: list[list[tuple[int, float]]] = []
        self.spans: list[tuple[int, int]] = []
        self._start = self.prompt

    def total(self, sampling: Sampling) -> int:
        """Tokens that the response may have."""
        limit = self.request.max_response_length
        return sampling.max_response_length if limit is None else limit

    def limit(self, sampling: Sampling) -> int:
        """Tokens that it may still get."""
        return self.total(sampling) - len(self.ids)

    def extend(self, new: Response, version: int) -> None:
        """Append what a server made with weights of this version."""
        if not new.ids:
            return
        self.ids += new.ids
        self.logprobs += new.logprobs
        self.topk += new.topk or []
        count = len(new.ids)
        if self.spans and self.spans[-1][1] == version:
            count += self.spans.pop()[0]
        self.spans.append((count, version))
        self.prompt = self._start + tuple(self.ids)

    def cut(self, count: int) -> None:
        """Keep the first `count` tokens."""
        del self.ids[count:], self.logprobs[count:], self.topk[count:]
        while (over := sum(tokens for tokens, _ in self.spans) - count) > 0:
            tokens, version = self.spans.pop()
            if tokens > over:
                self.spans.append((tokens - over, version))


class _Batch:
    """The requests of one `submit`."""

    def __init__(
        self, requests: Sequence[Request], sampling: Sampling, on_done: OnDone | None
    ) -> None:
        self.sampling, self._on_done = sampling, on_done
        self.responses = [_Response(index, request) for index, request in enumerate(requests)]
        self.future: Future[list[Completion]] = Future()
        self.tasks: set[asyncio.Task[None]] = set()
        self.failures: dict[_Server, int] = {}
        """In a row."""
        self.out: dict[_Server, str] = {}
        """Servers that get nothing more of this batch, and why."""
        self._done: dict[int, Completion] = {}

    def done(self, response: _Response, finish: FinishReason) -> None:
        """A response is complete."""
        topk = self.sampling.record_topk
        completion = Completion(
            torch.tensor(response.ids, dtype=torch.int64),
            torch.tensor(response.logprobs, dtype=torch.float32),
            finish,
            topk_ids=torch.tensor([[i for i, _ in row] for row in response.topk]) if topk else None,
            topk_logprobs=(
                torch.tensor([[v for _, v in row] for row in response.topk]) if topk else None
            ),
            version_spans=tuple(response.spans),
        )
        self._done[response.index] = completion
        if self._on_done is not None:
            self._on_done(response.index, completion)
        if len(self._done) == len(self.responses) and not self.future.done():
            self.future.set_result([self._done[i] for i in range(len(self.responses))])

    def fail(self, error: Exception) -> None:
        """End it; what runs is given up."""
        if not self.future.done():
            self.future.set_exception(error)
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()


class _Unit:
    """Responses that one request asks for: equal prompts, equal limits."""

    def __init__(self, batch: _Batch, responses: list[_Response]) -> None:
        self.batch, self.responses = batch, responses
        self.errors: list[str] = []
        self.failed_at: set[_Server] = set()

    @property
    def tokens(self) -> int:
        """At most: what balancing counts."""
        first = self.responses[0]
        return len(first.prompt) + len(self.responses) * first.limit(self.batch.sampling)

    def job(self) -> Job:
        first, sampling = self.responses[0], self.batch.sampling
        return Job(
            prompt_ids=first.prompt,
            # Greedy responses to one prompt are all the same, and vLLM refuses several.
            samples=len(self.responses) if sampling.temperature > 0 else 1,
            seed=_seed(
                sampling.seed, first.request.stream, first.request.first_position + len(first.ids)
            ),
            max_tokens=first.limit(sampling),
            sampling=sampling,
        )


@dataclass(eq=False)
class _Server:
    """A server's load."""

    client: Client
    responses: int = 0
    tokens: int = 0
    excluded: str | None = None
    _taken: dict[_Unit, tuple[int, int]] = field(default_factory=dict)

    def take(self, unit: _Unit) -> None:
        load = self._taken[unit] = (len(unit.responses), unit.tokens)
        self.responses, self.tokens = self.responses + load[0], self.tokens + load[1]

    def release(self, unit: _Unit) -> None:
        load = self._taken.pop(unit)
        self.responses, self.tokens = self.responses - load[0], self.tokens - load[1]


def _seed(*numbers: int) -> int:
    """0 to 2^62 - 1, spread evenly."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


async def _each(
    verb: Callable[[Client], Awaitable[None]], clients: Sequence[Client]
) -> dict[str, str]:
    """A verb of several servers at once; the reasons of those that failed, by address."""
    found = await asyncio.gather(*map(verb, clients), return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, ServerError):
            raise error
    return {error.url: error.reason for error in found if isinstance(error, ServerError)}


def _line(told: tuple[str, str]) -> str:
    return f"  {told[0]}: {told[1]}"


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
