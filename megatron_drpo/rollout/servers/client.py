"""One server over HTTP: seven verbs, each bounded in time, in size and in how often it is sent.

In: an address that the user gave, and a dialect. Out: records, or a `ServerError` that names the
server and says what to do. A client holds no connection and belongs to no event loop. Connections
are not kept: a server that closes an idle one while a request is on its way would fail it.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import aiohttp

from megatron_drpo.errors import ConfigError, RolloutError
from megatron_drpo.rollout.servers.dialects import (
    BadAnswerError,
    Call,
    Dialect,
    Job,
    Response,
    Update,
)

_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 5.0
_POLL_SECONDS = 0.5
_ROUNDING = 1e-3
"""A log-prob may be above 0 by so much, from rounding in a server's low precision."""

Kind = Literal["busy", "failed", "late", "refused"]


class ServerError(RolloutError):
    """A request that a server did not fulfil. `str` names the server."""

    def __init__(self, url: str, kind: Kind, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url, self.kind, self.reason = url, kind, reason

    @property
    def again(self) -> bool:
        """Whether sending the request once more may help: the server was busy (429), failed (5xx,
        or the connection did) or was late; not if it refused, or answered with nonsense."""
        return self.kind != "refused"


def pause_before(attempt: int) -> float:
    """Seconds to wait before a request is sent again: 0.1, 0.2, 0.4, ... and at most 5."""
    return min(0.1 * 2.0**attempt, _LONGEST_PAUSE)


@dataclass(frozen=True)
class Client:
    """One server. Example: Client("http://10.0.0.7:8000", DIALECTS["vllm"])

    A request that may be sent twice is sent again, `retries` times, after a failed connection, 429
    or 5xx, waiting as `pause_before` says. All verbs raise ServerError.
    """

    url: str
    """http or https, host and port, and maybe a path that all routes are under."""
    dialect: Dialect
    timeout_seconds: float = 300.0
    """Of each request, connecting (at most 10 s) and reading included."""
    retries: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", checked_url(self.url))

    async def ready(self, wait_seconds: float = 0.0) -> None:
        """Return once the server is up.

        Args:
            wait_seconds: how long it may take to come up.
        """
        deadline = time.monotonic() + wait_seconds
        probe = replace(self, retries=0, timeout_seconds=min(self.timeout_seconds, 10.0))
        while True:
            try:
                await probe._send(self.dialect.ready())
                return
            except ServerError as error:
                if not error.again or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_POLL_SECONDS)

    async def generate(self, job: Job) -> list[Response]:
        """`job.samples` responses; after a failure the whole job is sent again.

        Log-probs are as the server tells them, but 0 at temperature 0, where the law has one token,
        and NaN where truncated: its law is not known without the kept ids, which no server returns.
        """
        answer = await self._send(replace(self.dialect.generate(job), repeatable=True))
        found = self._read(self.dialect.read_responses, job, answer)
        if len(found) != job.samples:
            self._refuse(f"{len(found)} responses in its answer where {job.samples} were wanted")
        return [self._checked(job, response) for response in found]

    async def pause(self) -> None:
        """Break off what runs, which its requests return as `abort`; hold what comes."""
        await self._send(self.dialect.pause())

    async def flush(self) -> None:
        """Forget the cached keys and values of prompts: those of other weights would be used."""
        await self._send(self.dialect.flush())

    async def update(self, update: Update) -> list[Any]:
        """New weights, or the group that they come over; returns the server's answers."""
        return [await self._send(call) for call in self.dialect.update(update)]

    async def version(self) -> str:
        """What `update` gave last as the weights' version; a server's own word before that."""
        return self._read(self.dialect.read_version, await self._send(self.dialect.version()))

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._send(self.dialect.resume())

    async def world_size(self) -> int:
        """Workers of this server that join a group of `GroupOpen`."""
        answer = await self._send(self.dialect.world_size())
        return self._read(self.dialect.read_world_size, answer)

    # One request.

    async def _send(self, call: Call) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return await self._send_once(call)
            except ServerError as error:
                last = attempt == self.retries
                if last or not (call.repeatable and error.again) or error.kind == "late":
                    raise
            await asyncio.sleep(pause_before(attempt))
        raise AssertionError("the last attempt returns or raises")

    async def _send_once(self, call: Call) -> Any:
        limit = aiohttp.ClientTimeout(
            total=self.timeout_seconds, connect=min(_CONNECT_SECONDS, self.timeout_seconds)
        )
        try:
            # The environment's proxies and ~/.netrc are not the user's word on where to connect.
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(force_close=True),
                    timeout=limit,
                    trust_env=False,
                    headers={"Accept-Encoding": "identity"},
                ) as session,
                session.request(
                    call.method, self.url + call.path, json=call.body, allow_redirects=False
                ) as answer,
            ):
                status = answer.status
                data = await self._bounded(answer.content, call.max_bytes)
        except (TimeoutError, aiohttp.ServerTimeoutError):
            raise ServerError(
                self.url,
                "late",
                f"no answer to {call.path} within {self.timeout_seconds:g} s "
                "(--rollout-server-timeout-seconds)",
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            text = str(error) or type(error).__name__
            raise ServerError(
                self.url, "failed", f"the connection failed at {call.path}: {printable(text)}"
            ) from None
        if not 200 <= status < 300:
            self._refuse_status(call, status, data)
        return self._parsed(call, data)

    async def _bounded(self, stream: aiohttp.StreamReader, limit: int) -> bytes:
        parts, size = [], 0
        async for part in stream.iter_chunked(1 << 16):
            size += len(part)
            if size > limit:
                self._refuse(f"an answer of more than {limit} bytes")
            parts.append(part)
        return b"".join(parts)

    def _refuse_status(self, call: Call, status: int, data: bytes) -> NoReturn:
        text = printable(data.decode("utf-8", "replace"))
        if 300 <= status < 400:
            self._refuse(
                f"{call.path} redirects ({status}), which is not followed; give the "
                "address that it leads to"
            )
        if status == 404:
            self._refuse(
                f"no route {call.path} (404): {self.dialect.hint}; is it {self.dialect.name}?"
            )
        kind: Kind = "busy" if status == 429 else "failed" if status >= 500 else "refused"
        raise ServerError(self.url, kind, f"status {status} at {call.path}: {text}")

    def _parsed(self, call: Call, data: bytes) -> Any:
        if call.plain:
            return None
        try:
            answer = json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            text = printable(data[:200].decode("utf-8", "replace"))
            self._refuse(f"the answer to {call.path} is not JSON: {text}")
        if call.accept is not None:
            name, wanted = call.accept
            found = answer.get(name) if isinstance(answer, dict) else None
            if found != wanted:
                text = printable(json.dumps(answer))
                raise ServerError(
                    self.url, "failed", f"{call.path} says {name} is not {wanted!r}: {text}"
                )
        return answer

    # What an answer must be.

    def _read(self, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except BadAnswerError as error:
            self._refuse(f"{error}; is it {self.dialect.name}?")

    def _checked(self, job: Job, response: Response) -> Response:
        sampling, count = job.sampling, len(response.ids)
        if len(response.logprobs) != count or (
            response.topk is not None and len(response.topk) != count
        ):
            self._refuse(f"{len(response.logprobs)} log-probs for {count} tokens")
        if count > job.max_tokens or (count == 0 and response.finish_reason != "abort"):
            self._refuse(f"a response of {count} tokens where {job.max_tokens} were the limit")
        if response.finish_reason == "length" and count < job.max_tokens:
            self._refuse(
                f"a response ended at {count} tokens where {job.max_tokens} were the limit: prompt "
                "and response do not fit into its context; raise that, or lower "
                "--rollout-max-response-length"
            )
        if response.finish_reason == "stop" and not sampling.stop_strings:
            last = response.ids[-1]
            if last not in sampling.stop_ids:
                self._refuse(
                    f"a response ended with token {last}, which is no stop id; add it to "
                    "--rollout-stop-ids"
                )
        if max(response.logprobs, default=0.0) > _ROUNDING:
            self._refuse(f"a log-prob of {max(response.logprobs)}, above 0")
        if sampling.temperature == 0:
            return replace(response, logprobs=[0.0] * count)
        if sampling.truncated:
            return replace(response, logprobs=[math.nan] * count)
        return replace(response, logprobs=[min(value, 0.0) for value in response.logprobs])

    def _refuse(self, reason: str) -> NoReturn:
        raise ServerError(self.url, "refused", reason)


def checked_url(url: str) -> str:
    """The address of a server, without a slash at the end.

    Raises:
        ConfigError: it is not http(s)://HOST[:PORT][/PATH].
    """
    try:
        parts = urlsplit(url)
        valid = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        valid, parts = False, urlsplit("")
    if not valid or parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"--rollout-servers {url}: must be http://HOST:PORT or https://HOST:PORT, with nothing "
            "after it but a path"
        )
    return url.rstrip("/")


def printable(text: str, limit: int = 300) -> str:
    """A server's text for a person's terminal: one line, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return line[:limit] + ("..." if len(line) > limit else "")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
