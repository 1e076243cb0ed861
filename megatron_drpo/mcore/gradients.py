"""The gradients that an update would use: their norm, and each as Hugging Face tensors.

In: a policy after `forward_backward`, whose gradients lie in Megatron's buffers. Out: numbers that
do not depend on the layout, if the layout is right (`verify_layout`). All functions are collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_drpo.checkpoint.model_weights import FullTensors
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.mcore.weights import places_of


def norm(policy: Policy) -> float:
    """Global norm before clipping, as the optimizer computes it."""
    policy.optimizer.prepare_grads()
    return float(policy.optimizer.get_grad_norm())


def complete(policy: Policy) -> None:
    """Give every rank the whole gradient of the parameters that it holds.

    The distributed optimizer leaves each data-parallel rank the sums of its own share of a bucket,
    and in the rest of it whatever that rank had added up by itself.
    """
    if not policy.config.optimizer.use_distributed_optimizer:
        return
    for chunk in policy.chunks:
        ddp: Any = chunk
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shares = bucket.grad_data.view(group.size(), -1)
                share = shares[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """After `complete`: name and gradient, in fp32, of each tensor of the checkpoint, on rank 0;
    elsewhere nothing. To be gone through to its end everywhere."""
    layout = policy.layout
    full = FullTensors(policy.architecture, policy.models, places_of(layout), value_of=_gradient)
    return full.stream()


def _gradient(parameter: Any) -> Tensor:
    return parameter.main_grad


_TIED = ("embedding.word_embeddings.weight", "output_layer.weight")
"""On the first and on the last pipeline stage, with the sum of both gradients."""


class Copies(NamedTuple):
    """A parameter that several ranks hold alike, and the norms of its gradient there."""

    name: str
    smallest: float
    largest: float


def copies(policy: Policy) -> list[Copies]:
    """After `complete`: how far the ranks that hold the same parameter agree on its gradient, on
    rank 0; [] elsewhere.

    `tensors` shows the gradient of one of them only, and so does the global norm.
    """
    layout, own = policy.layout, {}
    models: Sequence[nn.Module] = policy.models
    for number, model in enumerate(models):
        for name, parameter in model.named_parameters():
            split: Any = layout.tp_rank if getattr(parameter, "tensor_model_parallel", False) else 0
            if ".experts." in name:
                split = (layout.ep_rank, layout.etp_rank)
            place = (layout.pp_rank, number, split, name)
            if policy.architecture.tie_word_embeddings and name in _TIED:
                place = (0, 0, split, _TIED[0])
            own[place] = float(_gradient(parameter).norm())
    norms: dict[Any, list[float]] = {}
    for each in layout.gather_to_main(own):
        for place, value in each.items():
            norms.setdefault(place, []).append(value)
    return [
        Copies(f"{name} (stage {stage}, chunk {number})", *_extremes(values))
        for (stage, number, _, name), values in norms.items()
        if len(values) > 1
    ]


def _extremes(values: list[float]) -> tuple[float, float]:
    together = torch.tensor(values, dtype=torch.float64)  # whose extremes are NaN if one of them is
    return float(together.min()), float(together.max())
