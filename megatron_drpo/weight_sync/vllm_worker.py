"""What vLLM's workers need to receive weights: `--worker-extension-cls` of its server.

    PYTHONPATH=REPOSITORY VLLM_SERVER_DEV_MODE=1 vllm serve MODEL \
        --worker-extension-cls megatron_drpo.weight_sync.vllm_worker.WorkerExtension

Runs inside vLLM and imports torch only. vLLM makes its worker a subclass of `WorkerExtension` and
calls the methods by name through POST /collective_rpc, on every worker at the same time.
"""

from __future__ import annotations

from typing import Any

from megatron_drpo.weight_sync.receiver import WeightReceiver


class WorkerExtension:
    """Methods that vLLM's worker gains; the prefix keeps them apart from its own."""

    # Of vLLM's worker.
    rank: int
    device: Any
    model_runner: Any

    def drpo_init_group(self, **meeting: Any) -> dict[str, Any]:
        """Join the trainer's group; arguments as `WeightReceiver.init_group`."""
        # Not in a constructor: vLLM calls none of an extension's.
        self._drpo_receiver = WeightReceiver(self._drpo_load, device=self.device, worker=self.rank)
        self._drpo_receiver.init_group(**meeting)
        return {"worker": self.rank}

    def drpo_receive(
        self, names: list[str], shapes: list[list[int]], dtypes: list[str]
    ) -> dict[str, Any]:
        """Receive and load; arguments as `WeightReceiver.receive`, all tensors of the model."""
        return {"loaded": self._drpo_receiver.receive(names, shapes, dtypes)}

    def drpo_destroy_group(self) -> dict[str, Any]:
        """Leave the group, if there is one."""
        receiver = getattr(self, "_drpo_receiver", None)
        if receiver is not None:
            receiver.destroy_group()
        return {"worker": self.rank}

    def _drpo_load(self, tensors: Any) -> None:
        self.model_runner.reload_weights(weights_iterator=tensors)
