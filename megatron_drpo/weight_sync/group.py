"""The process group that carries weights from one trainer rank to the workers of the servers.

It lives beside the default group of either side, which may be another's own. Rank 0 sends. The keys
of its store are those that a group gets which torch makes as a default group named `name`, as
SGLang's workers do, so that both meet. In: an address. Out: a group with one verb, `broadcast`.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, Store

from megatron_drpo.errors import RolloutError

_LEFT = "left"
"""Key of the store, under the group's name: rank 0 has left."""
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Meeting:
    """Where and how a group meets: the same on every rank.

    Example: Meeting("127.0.0.1", 29600, world_size=3, name="weights-1", backend="gloo",
                     timeout_seconds=300.0)
    """

    address: str
    """Of rank 0's machine, as the others see it."""
    port: int
    world_size: int
    name: str
    """Unique among the groups that meet at this port."""
    backend: str
    """gloo, for tensors on the CPU, or nccl."""
    timeout_seconds: float
    """Limit of the meeting, and of each broadcast."""


def listen(address: str, port: int, timeout_seconds: float) -> tuple[TCPStore, int]:
    """The store at which groups meet, on this address alone; and its port.

    Args:
        address: of this machine.
        port: 0 takes a free one.

    Raises:
        RolloutError: the address is not this machine's, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise RolloutError(
            f"--weight-sync-address {address} --weight-sync-port {port}: cannot listen there "
            f"({error.strerror or error}); give an address of rank 0's machine that the servers "
            "reach, and a port that is free (0 takes one)"
        ) from None
    port = listener.getsockname()[1]
    store = TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


class TransferGroup:
    """A group that broadcasts from rank 0; a broken one stays broken and is to be dropped."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        """Join at the store of `listen`; returns when all have.

        Args:
            rank: 0 for the trainer, else 1 to `world_size` - 1.

        Raises:
            RolloutError: rank or world size are impossible, the backend is not there, or not all
                ranks came within `timeout_seconds`.
        """
        self.meeting, self.rank = meeting, rank
        if not 0 <= rank < meeting.world_size or meeting.world_size < 2:
            raise RolloutError(
                f"weight sync: rank {rank} of {meeting.world_size} cannot be: trainer and workers "
                "are at least 2 ranks, counted from 0"
            )
        available = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
        if meeting.backend not in available or not available[meeting.backend]():
            raise RolloutError(
                f"weight sync: torch has no backend {meeting.backend} here; trainer and servers "
                "must both have gloo (CPU) or nccl (GPU)"
            )
        timeout = timedelta(seconds=meeting.timeout_seconds)
        try:
            store = TCPStore(meeting.address, meeting.port, is_master=False, timeout=timeout)
            self._store = PrefixStore(meeting.name, store)
            self._group: Any = _build(self._store, meeting, rank, timeout)
        except (RuntimeError, OSError) as error:
            raise RolloutError(
                f"weight sync: rank {rank} of {meeting.world_size} could not meet the others at "
                f"{meeting.address}:{meeting.port} within {meeting.timeout_seconds:g} s "
                f"(--weight-sync-address, --weight-sync-timeout-seconds): {_first_line(error)}"
            ) from None

    def broadcast(self, tensor: Tensor) -> Any:
        """Begin to send (rank 0) or to fill a contiguous tensor, in the order of calls.

        Returns:
            The work: `is_completed()` and `wait()`, which raises RuntimeError where a rank died or
            the time-out passed.
        """
        group = self._group
        if group is None:
            raise RuntimeError("the group was left")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=self.meeting.timeout_seconds)
        return group.broadcast([tensor], options)

    def receive(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor with rank 0's.

        Raises:
            RolloutError: rank 0 died or left the group, or the time-out passed.
        """
        try:
            work = self.broadcast(tensor)
            pause, looked = 2e-5, time.monotonic()
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 5e-4)
                # A receiver does not always notice that the sender has closed the connection.
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    if self._group is None or self._store.check([_LEFT]):
                        raise RuntimeError("the group was left")
            work.wait()
        except RuntimeError as error:
            raise RolloutError(f"weight sync: the transfer broke: {_first_line(error)}") from None

    def close(self) -> None:
        """Leave, from any thread; rank 0 also tells the others that nothing more will come."""
        last, self._group = [self._group], None
        if last[0] is None:
            return
        if self.rank == 0:
            self._store.set(_LEFT, "1")
        if self.meeting.backend == "nccl":
            last[0].abort()
        # Its destructor waits for what is under way, up to the time-out: not in this thread.
        threading.Thread(target=last.clear, daemon=True).start()


def _build(store: Store, meeting: Meeting, rank: int, timeout: timedelta) -> Any:
    """The backend itself: torch.distributed's own registry, which names one world, stays as is."""
    device = "cuda" if meeting.backend == "nccl" else "cpu"
    for prefix in (f"{meeting.name}/", f"{device}/"):
        store = PrefixStore(prefix, store)
    kind: Any
    if meeting.backend == "nccl":
        kind = dist.ProcessGroupNCCL
        options = kind.Options()
    else:
        kind = dist.ProcessGroupGloo
        options = kind._Options()
        # By default gloo listens where the host's name leads, which need not be reachable.
        host = _own_address(meeting.address, meeting.port)
        options._devices = [kind.create_device(hostname=host)]
    options._timeout = timeout
    return kind(store, rank, meeting.world_size, options)


def _own_address(address: str, port: int) -> str:
    """This machine's address on the way to another one; nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return probe.getsockname()[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def dtype_of(name: str) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16.

    Raises:
        RolloutError: it is no dtype of weights.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise RolloutError(f"weight sync: {name!r} is not a dtype of weights")
    return dtype
