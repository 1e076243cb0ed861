"""The server's side of a weight sync: tensors in, handed on to whatever loads them.

Imports torch only. In: what the trainer announces (names, shapes, dtypes) and then broadcasts. Out:
an iterator of Hugging Face tensors, one in memory at a time, to the server's own loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_drpo.errors import RolloutError
from megatron_drpo.weight_sync.group import Meeting, TransferGroup, dtype_of

Load = Callable[[Iterator[tuple[str, Tensor]]], object]
"""Takes (name, full tensor) one by one, to the end; a tensor is not changed afterwards."""


class WeightReceiver:
    """What one worker of a server does when weights come over a group.

    Example:
        receiver = WeightReceiver(load, device=torch.device("cpu"))
        receiver.init_group(address, port, rank_offset=1, world_size=2, group_name="weights-1",
                            backend="gloo")
        receiver.receive(["model.norm.weight"], [[64]], ["float32"])
        receiver.destroy_group()
    """

    def __init__(self, load: Load, *, device: torch.device, worker: int = 0) -> None:
        """Nothing happens yet.

        Args:
            load: puts tensors into the server's model.
            device: where tensors are received, and given to `load`.
            worker: number of this worker among the server's, which the trainer counts alike.
        """
        self._load, self._device, self._worker = load, device, worker
        self._group: TransferGroup | None = None

    def init_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_seconds: float = 300.0,
    ) -> None:
        """Join the trainer's group in place of an earlier one; returns when all ranks have.

        Args:
            rank_offset: rank of the server's worker 0.

        Raises:
            RolloutError: as `TransferGroup`.
        """
        self.destroy_group()
        meeting = Meeting(
            master_address, int(master_port), world_size, group_name, backend, timeout_seconds
        )
        self._group = TransferGroup(meeting, rank_offset + self._worker)

    def receive(
        self, names: Sequence[str], shapes: Sequence[Sequence[int]], dtypes: Sequence[str]
    ) -> int:
        """Receive these tensors, in this order, and load them.

        Args:
            names: as in a Hugging Face checkpoint.
            shapes: of the full tensors.
            dtypes: such as `bfloat16`.

        Returns:
            The number of tensors.

        Raises:
            RolloutError: there is no group, the lists differ in length, or the transfer broke. The
                group is left then: its members no longer agree on what comes next.
        """
        if self._group is None:
            raise RolloutError("weight sync: weights were announced before a group was made")
        if not len(names) == len(shapes) == len(dtypes):
            raise RolloutError(
                f"weight sync: {len(names)} names, {len(shapes)} shapes, {len(dtypes)} dtypes"
            )
        tensors = self._tensors(self._group, names, shapes, dtypes)
        try:
            self._load(tensors)
            left = next(tensors, None)
            if left is not None:
                raise RolloutError(f"weight sync: the server did not take {left[0]}")
        except BaseException:
            self.destroy_group()
            raise
        return len(names)

    def destroy_group(self) -> None:
        """Leave the group, if there is one."""
        group, self._group = self._group, None
        if group:
            group.close()

    def _tensors(
        self,
        group: TransferGroup,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[str],
    ) -> Iterator[tuple[str, Tensor]]:
        for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
            value = torch.empty(tuple(shape), dtype=dtype_of(dtype), device=self._device)
            group.receive(value)
            yield name, value
