"""The device that this process computes on: chosen once, printed with its reason.

L0: nothing else names a device except `mcore.cpu`. GPU and CPU run the same lines: NCCL and CUDA on
one, gloo on the other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from megatron_drpo.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """Example: Device(kind="cpu", backend="gloo", index=0, reason="torch sees no GPU")."""

    kind: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    index: int
    reason: str

    @property
    def torch(self) -> torch.device:
        """Where tensors go."""
        return torch.device("cuda", self.index) if self.kind == "cuda" else torch.device("cpu")

    def synchronize(self) -> None:
        """Wait for the device's queue, so that a clock read next to it is true."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.index)

    def take_memory(self) -> int:
        """Bytes that this process used: on a GPU the most that its tensors took since the last
        call; on a CPU, which keeps no such record, what is resident now."""
        if self.kind == "cpu":
            return psutil.Process().memory_info().rss
        peak = torch.cuda.max_memory_allocated(self.index)
        torch.cuda.reset_peak_memory_stats(self.index)
        return peak


def choose_device(requested: Literal["auto", "cpu", "cuda"]) -> Device:
    """Resolve `--device`; must come before the first use of CUDA and the first megatron import.

    Raises:
        ConfigError: `--device cuda` without a usable GPU, or more local ranks than GPUs.
    """
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if requested == "cpu":
        # Hidden from every library of this process, so that none of them mixes devices.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return Device("cpu", "gloo", index, "--device cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        if requested == "cuda":
            raise ConfigError("--device cuda: torch sees no GPU; use --device cpu or auto")
        return Device("cpu", "gloo", index, "torch sees no GPU")
    if index >= gpus:
        raise ConfigError(
            f"--device {requested}: local rank {index} has no GPU of its own, torch sees {gpus}; "
            f"start at most {gpus} ranks on this node, or use --device cpu"
        )
    torch.cuda.set_device(index)
    name = torch.cuda.get_device_name(index)
    return Device("cuda", "nccl", index, f"torch sees {gpus} GPU(s), {name}")
