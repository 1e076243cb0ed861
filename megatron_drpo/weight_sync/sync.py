"""The trainer's side: new weights into every server, or the names of the servers without them.

In: the policy's chunks on all ranks, and on rank 0 the servers' clients. Out: `Synced`, the same on
every rank. A server goes through pause, update, flush (its prefix cache holds keys and values of
the old weights), a look at its version, and resume; one that fails on the way is named, is not
used, and costs the others nothing. It is tried again at the next sync, when it may be back.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.checkpoint.manifest import dtype_name
from megatron_drpo.checkpoint.model_weights import FullTensors
from megatron_drpo.config import WeightSyncConfig
from megatron_drpo.errors import CheckpointError, RolloutError
from megatron_drpo.rollout.servers import Client, DiskUpdate, GroupClose, GroupOpen, GroupUpdate
from megatron_drpo.weight_sync.group import Meeting, TransferGroup, listen

if TYPE_CHECKING:
    from megatron_drpo.mcore.parallel import Layout
from megatron_drpo.mcore.weights import export, places_of

BUCKET_BYTES = 256 << 20
"""Of tensors under way at a time."""
_GRACE_SECONDS = 10.0
"""For servers to report what happened, once a transfer has broken."""


@dataclass(frozen=True)
class Synced:
    """What a sync came to; the same on every rank.

    Example: Synced(8, ("http://10.0.0.7:8000",), {"http://10.0.0.8:8000": "cannot be reached"})
    """

    version: int
    servers: tuple[str, ...]
    """Addresses of those that hold this version; at least one, where there are servers."""
    failures: Mapping[str, str]
    """Why each of the others does not: they must not be used until a later sync."""


class WeightSync(Protocol):
    """Brings the servers to the trainer's weights; all methods are collective over all ranks."""

    def sync(self, version: int) -> Synced:
        """Give every server the present weights, and call them `version`.

        Raises:
            RolloutError: on all ranks, if no server could be brought to this version.
            CheckpointError: on all ranks, if the weights could not be written.
        """
        ...

    def close(self) -> None:
        """Leave the servers as they are."""
        ...


@dataclass(frozen=True, eq=False)
class Model:
    """This rank's part of the weights to send."""

    architecture: Architecture
    chunks: Sequence[nn.Module]
    """Bare or wrapped, as `export_hf` takes them."""
    layout: Layout
    device: torch.device


class DiskSync:
    """`--weight-sync disk`: a Hugging Face directory per version, which the servers load."""

    def __init__(
        self,
        model: Model,
        servers: Sequence[Client],
        directory: Path,
        settings: Path,
        *,
        timeout_seconds: float,
    ) -> None:
        """Nothing is written yet.

        Args:
            servers: on rank 0, all of them; ignored elsewhere.
            directory: receives `version-N`, on storage that all ranks and servers see; the version
                before is kept, for a server that still reads it.
            settings: where config.json and the tokenizer are copied from.
            timeout_seconds: of one server's whole update.
        """
        self._model, self._directory, self._settings = model, directory.absolute(), settings
        self._fleet = _Fleet(servers, timeout_seconds) if model.layout.rank == 0 else None

    def sync(self, version: int) -> Synced:
        """As `WeightSync`."""
        model, layout = self._model, self._model.layout
        path = self._directory / f"version-{version}"
        try:
            export(
                path,
                self._settings,
                model.architecture,
                model.chunks,
                layout,
                run=f"weight sync, version {version}",
            )
        except CheckpointError as error:
            raise CheckpointError(f"--weight-sync disk: {error}") from error
        failures = None
        if self._fleet:
            update = DiskUpdate(str(path), version)
            failures = self._fleet.failures(lambda server: _update(server, update))
            self._tidy(version)
        return _agree(layout, version, self._fleet, failures)

    def close(self) -> None:
        """Directories stay, for servers that restart."""
        if self._fleet:
            self._fleet.close()

    def _tidy(self, version: int) -> None:
        """Remove all versions but this one and the newest before it."""
        found = {}
        for path in self._directory.glob("version-*"):
            number = path.name.removeprefix("version-")
            if number.isdecimal() and int(number) != version:
                found[int(number)] = path
        before = max((number for number in found if number < version), default=None)
        for number, path in found.items():
            if number != before:
                shutil.rmtree(path, ignore_errors=True)


class CollectiveSync:
    """`--weight-sync collective`: a broadcast from rank 0 to the workers of all servers."""

    def __init__(
        self,
        model: Model,
        servers: Sequence[Client],
        *,
        address: str,
        port: int,
        timeout_seconds: float,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Listen on rank 0; groups are made by the first sync. Collective.

        Args:
            servers: on rank 0, all of them; ignored elsewhere.
            address: rank 0's, as the servers see it.
            port: there; 0 takes a free one.
            timeout_seconds: of meeting the servers, and of each broadcast.
            bucket_bytes: of tensors that are under way at a time, on either side.

        Raises:
            RolloutError: on all ranks, if rank 0 cannot listen there.
        """
        self._model, self._bucket_bytes = model, bucket_bytes
        self._fleet = self._sender = None
        problems: list[str] = []
        if model.layout.rank == 0:
            backend = "nccl" if model.device.type == "cuda" else "gloo"
            try:
                self._sender = _Sender(address, port, backend, timeout_seconds)
                self._fleet = _Fleet(servers, timeout_seconds)
            except RolloutError as error:
                problems.append(str(error))
        model.layout.raise_together(problems, RolloutError)
        self._tensors = FullTensors(model.architecture, model.chunks, places_of(model.layout))

    def sync(self, version: int) -> Synced:
        """As `WeightSync`."""
        layout = self._model.layout
        layout.barrier()  # all replicas have stopped to generate, before the servers are touched
        failures: dict[str, str] | None = None
        while True:
            # A group is lost with any of its members, and then made anew without that one.
            again = False
            if self._fleet and self._sender:
                failures, again = self._attempt(self._fleet, self._sender, version, failures or {})
            else:
                for _ in self._tensors.stream():
                    pass
            if not layout.gather_objects(again if layout.rank == 0 else None)[0]:
                return _agree(layout, version, self._fleet, failures)

    def close(self) -> None:
        """Leave the group, and tell the servers to."""
        if self._fleet and self._sender:
            name = self._sender.leave()
            if name:
                self._fleet.failures(lambda server: server.update(GroupClose(name)))
            self._fleet.close()

    def _attempt(
        self, fleet: _Fleet, sender: _Sender, version: int, failures: dict[str, str]
    ) -> tuple[dict[str, str], bool]:
        """One transfer, which every rank takes part in: all failures, and whether to try again."""
        stream = self._tensors.stream()
        servers = [server for server in fleet.servers if server.url not in failures]
        failures = failures | fleet.failures(lambda server: server.ready(), servers)
        servers = [server for server in servers if server.url not in failures]
        found: dict[str, str] = {}
        if servers:
            found = sender.join(fleet, servers)
        if servers and not found:
            found = fleet.failures(lambda server: server.pause(), servers)
        if servers and not found:
            described = {
                name: (dtype_name(dtype), tuple(shape))
                for name, (dtype, shape) in self._tensors.described.items()
            }
            assert sender.group is not None, "join made it"
            transfer = _Transfer(
                fleet, sender.group, servers, described, version, self._bucket_bytes
            )
            for name, value in stream:
                transfer.send(name, value)
            found = transfer.finish()
            if not found:
                after = fleet.failures(lambda server: _after(server, version), servers)
                return failures | after, False
        for _ in stream:  # the other ranks send to the end, whatever happened here
            pass
        name = sender.leave()
        if name:  # so that no survivor waits in a group without a future; it may know already
            fleet.failures(lambda server: server.update(GroupClose(name)), servers)
        failures = failures | found
        return failures, any(server.url not in failures for server in servers)


async def _update(server: Client, update: DiskUpdate) -> None:
    await server.pause()
    await server.update(update)
    await _after(server, update.version)


async def _after(server: Client, version: int) -> None:
    """What follows new weights: nothing of the old ones remains, and the server says so."""
    await server.flush()
    held = await server.version()
    if held != str(version):
        raise RolloutError(
            f"{server.url}: says that it holds weights of version {held} after it was given "
            f"version {version}"
        )
    await server.resume()


class _Fleet:
    """Rank 0's connection to the servers: an event loop in a thread of its own."""

    def __init__(self, servers: Sequence[Client], timeout_seconds: float) -> None:
        # The limit of a whole verb ends first, which says what it is called.
        limit = timeout_seconds + 60
        self.servers = [replace(server, timeout_seconds=limit) for server in servers]
        self.timeout_seconds = timeout_seconds
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, verb: Callable[[Client], Awaitable[Any]], server: Client) -> Future[Any]:
        """Begin a verb; its result, a RolloutError that names the server, or its defect."""
        return asyncio.run_coroutine_threadsafe(self._bounded(verb, server), self._loop)

    def results(
        self, verb: Callable[[Client], Awaitable[Any]], servers: Sequence[Client] | None = None
    ) -> dict[str, Any]:
        """A verb on all servers at the same time: by address, the result or a RolloutError."""
        chosen = self.servers if servers is None else servers
        futures = {server.url: self.start(verb, server) for server in chosen}
        return {url: _outcome(future) for url, future in futures.items()}

    def failures(
        self, verb: Callable[[Client], Awaitable[Any]], servers: Sequence[Client] | None = None
    ) -> dict[str, str]:
        """A verb on all servers at the same time: by address, why it failed where it did."""
        results = self.results(verb, servers)
        return {url: str(each) for url, each in results.items() if isinstance(each, RolloutError)}

    def close(self) -> None:
        """End the loop; nothing may be under way."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _bounded(self, verb: Callable[[Client], Awaitable[Any]], server: Client) -> Any:
        try:
            return await asyncio.wait_for(verb(server), self.timeout_seconds)
        except TimeoutError:
            raise RolloutError(
                f"{server.url}: took longer than --weight-sync-timeout-seconds "
                f"{self.timeout_seconds:g}"
            ) from None


class _Sender:
    """Rank 0's end of the group, made anew whenever the servers in it change."""

    def __init__(self, address: str, port: int, backend: str, timeout_seconds: float) -> None:
        # Only listens: who meets connects anew, since a waiting connection serves nobody else.
        self._store, self._port = listen(address, port, timeout_seconds)
        self._address, self._backend, self._timeout = address, backend, timeout_seconds
        self._members: list[str] = []
        # Unique: a server may still know the group of a trainer that was killed.
        self._name, self._count = f"megatron-drpo-{uuid.uuid4().hex[:12]}", 0
        self.group: TransferGroup | None = None

    def join(self, fleet: _Fleet, servers: Sequence[Client]) -> dict[str, str]:
        """See that exactly these servers are in the group; returns those that did not come."""
        members = [server.url for server in servers]
        if self.group and members == self._members:
            return {}
        name = self.leave()
        if name:  # members that stay leave the old group before they meet in the new one
            fleet.failures(lambda server: server.update(GroupClose(name)), servers)
        counts = fleet.results(lambda server: server.world_size(), servers)
        failures = {url: str(each) for url, each in counts.items() if not isinstance(each, int)}
        if failures:
            return failures
        self._count += 1
        meeting = Meeting(
            self._address,
            self._port,
            1 + sum(counts.values()),
            f"{self._name}-{self._count}",
            self._backend,
            self._timeout,
        )
        offset, joining = 1, {}
        for server in servers:
            join = GroupOpen(
                meeting.address,
                meeting.port,
                offset,
                meeting.world_size,
                meeting.name,
                meeting.backend,
                meeting.timeout_seconds,
            )
            joining[server.url] = fleet.start(lambda each, join=join: each.update(join), server)
            offset += counts[server.url]
        met = _in_thread(lambda: TransferGroup(meeting, 0))
        while not met.done() and not _failed(joining):
            time.sleep(0.01)
        if _failed(joining):  # the thread gives up at its own time-out
            return _settle(fleet, servers, joining, "the group could not be made")
        group = _outcome(met)
        if isinstance(group, RolloutError):
            return _settle(fleet, servers, joining, str(group))
        self.group, self._members = group, members
        return _settle(fleet, servers, joining)

    def leave(self) -> str | None:
        """Give up the group; its name, if there was one."""
        group, self.group, self._members = self.group, None, []
        if group is None:
            return None
        group.close()
        return group.meeting.name


class _Transfer:
    """One version of the weights over a group, in buckets; stops at the first thing that fails."""

    def __init__(
        self,
        fleet: _Fleet,
        group: TransferGroup,
        servers: Sequence[Client],
        described: Mapping[str, tuple[str, tuple[int, ...]]],
        version: int,
        bucket_bytes: int,
    ) -> None:
        """Announce everything to servers that take the model as a whole.

        Args:
            servers: of one kind.
            described: dtype and shape of every tensor, in the order of `send`.
        """
        self._fleet, self._group, self._servers = fleet, group, servers
        self._described, self._version, self._limit = described, version, bucket_bytes
        # SGLang holds all tensors of an update at a time; vLLM takes the model as a whole, and
        # loads a tensor before it receives the next.
        self._whole = servers[0].dialect.name == "vllm"
        self._bucket: list[tuple[str, Tensor]] = []
        self._bytes = 0
        self._requests: dict[str, Future[Any]] = {}
        self._failures: dict[str, str] = {}
        if self._whole:
            self._announce(described)

    def send(self, name: str, value: Tensor) -> None:
        """The next tensor, contiguous; nothing more is sent once a server has failed."""
        if not self._failures:
            self._bucket.append((name, value))
            self._bytes += value.nbytes
            if self._bytes >= self._limit:
                self._flush()

    def finish(self) -> dict[str, str]:
        """Wait for the servers; by address, why they failed, or nothing."""
        if self._bucket and not self._failures:
            self._flush()
        if self._whole and not self._failures:
            self._failures = self._settle()
        return self._failures

    def _announce(self, names: Iterable[str]) -> None:
        described = {name: self._described[name] for name in names}
        receive = GroupUpdate(
            group_name=self._group.meeting.name,
            names=[*described],
            shapes=[shape for _, shape in described.values()],
            dtypes=[dtype for dtype, _ in described.values()],
            version=self._version if [*self._described][-1] in described else None,
        )
        self._requests = {
            server.url: self._fleet.start(lambda each: each.update(receive), server)
            for server in self._servers
        }

    def _flush(self) -> None:
        """Send the bucket, and wait until it has gone."""
        if not self._whole:
            self._announce(name for name, _ in self._bucket)
        try:
            works = [self._group.broadcast(value) for _, value in self._bucket]
            for work in works:
                pause = 1e-4
                while not work.is_completed() and not _failed(self._requests):
                    time.sleep(pause)
                    pause = min(2 * pause, 5e-3)
                if not work.is_completed():
                    break  # a server has left, and the rest would wait for it
                work.wait()
        except RuntimeError as error:
            self._failures = self._settle(_first_line(error))
        else:
            if not self._whole or _failed(self._requests):
                self._failures = self._settle()
        self._bucket, self._bytes = [], 0

    def _settle(self, broken: str | None = None) -> dict[str, str]:
        return _settle(self._fleet, self._servers, self._requests, broken)


def _settle(
    fleet: _Fleet,
    servers: Sequence[Client],
    requests: Mapping[str, Future[Any]],
    broken: str | None = None,
) -> dict[str, str]:
    """Wait for requests that need each other; by address, why those failed that are to blame.

    To blame is a server that does not answer any more, else the first that reports an error (the
    others still wait for the group, and are given up here), else each that is not done.

    Args:
        broken: what this side saw, if anything.
    """
    seconds = _GRACE_SECONDS if broken else fleet.timeout_seconds
    wait([*requests.values()], seconds, FIRST_EXCEPTION)
    pending = [url for url, future in requests.items() if not future.done()]
    errors = {url: str(_outcome(requests[url])) for url in _failed(requests)}
    if not (pending or errors or broken):
        return {}
    for future in requests.values():
        future.cancel()
    gone = fleet.failures(lambda server: server.ready(), servers)
    reason = broken or "did not finish its part in time"
    named = {url: f"{url}: the weight sync broke off: {reason}" for url in pending or requests}
    return gone or errors or named


def _failed(requests: Mapping[str, Future[Any]]) -> list[str]:
    """Addresses whose request has ended with an error."""
    done = {url: future for url, future in requests.items() if future.done()}
    return [url for url, future in done.items() if not future.cancelled() and future.exception()]


def _outcome(future: Future[Any]) -> Any:
    """What a verb came to: its result, or its RolloutError; a defect is raised."""
    try:
        return future.result()
    except RolloutError as error:
        return error


def _in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run it in a thread that does not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _agree(
    layout: Layout, version: int, fleet: _Fleet | None, failures: Mapping[str, str] | None
) -> Synced:
    """Rank 0's result on every rank; collective."""
    message = None
    if fleet is not None and failures is not None:
        message = ([server.url for server in fleet.servers if server.url not in failures], failures)
    urls, why = layout.gather_objects(message)[0]
    if not urls:
        raise RolloutError(
            f"--weight-sync: no server could be brought to version {version}:\n"
            + "\n".join(f"  {text}" for text in why.values())
        )
    return Synced(version, tuple(urls), dict(why))


def build_weight_sync(
    config: WeightSyncConfig,
    model: Model,
    servers: Sequence[Client],
    *,
    directory: Path,
    settings: Path,
) -> WeightSync:
    """What `--weight-sync` names; collective.

    Args:
        servers: on rank 0, the clients of all servers; ignored elsewhere.
        directory: of the run; `--weight-sync-dir` is below it by default.
        settings: where config.json and the tokenizer are copied from.

    Raises:
        RolloutError: on all ranks, if rank 0 cannot listen at --weight-sync-address.
    """
    if config.weight_sync == "disk":
        return DiskSync(
            model,
            servers,
            Path(config.weight_sync_dir or directory / "weight_sync"),
            settings,
            timeout_seconds=config.weight_sync_timeout_seconds,
        )
    assert config.weight_sync == "collective", "servers without a weight sync are refused"
    return CollectiveSync(
        model,
        servers,
        address=config.weight_sync_address,
        port=config.weight_sync_port,
        timeout_seconds=config.weight_sync_timeout_seconds,
    )
