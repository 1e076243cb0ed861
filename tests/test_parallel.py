"""What ranks tell each other, under tensor and under data parallelism."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from megatron_drpo.config import ParallelConfig
from megatron_drpo.device import Device
from megatron_drpo.errors import RolloutError
from tests.distributed import run_distributed


def _ranks(rank: int, world_size: int) -> None:
    from megatron_drpo.mcore import parallel

    device = Device("cpu", "gloo", 0, "test")
    layout = parallel.initialize(ParallelConfig(tensor_model_parallel_size=2), device, seed=1)
    assert layout.share(f"from {rank}") == "from 0"
    parallel.destroy(layout)

    layout = parallel.initialize(ParallelConfig(expert_model_parallel_size=2), device, seed=1)
    assert layout.share(f"from {rank}") == f"from {rank}", "each rank is a replica of its own"
    assert layout.any_expert_peer(rank == 1, torch.device("cpu"))
    assert not layout.any_expert_peer(False, torch.device("cpu"))

    with ThreadPoolExecutor(1) as thread:
        started = time.monotonic()
        mine = thread.submit(time.sleep, 0.5) if rank else None
        layout.wait_for(mine, seconds=0.01)
        assert time.monotonic() - started >= 0.4, "rank 0 has waited for rank 1"
    # One failure ends the wait of all, though the other is not done.
    future: Future[Any] = Future()
    if rank == 1:
        future.set_exception(RolloutError("http://h:1 is gone"))
    with pytest.raises(RolloutError, match="http://h:1 is gone"):
        layout.wait_for(future, seconds=0.01)


@pytest.mark.distributed
def test_ranks_share_wait_and_fail_together() -> None:
    run_distributed(_ranks, 2)
