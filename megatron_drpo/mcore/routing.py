"""Which experts a token goes to: recorded while it is generated or scored, replayed in training.

A router takes the experts with the highest scores, and the last bit of two scores can send a token
elsewhere: generation and training, or two updates of one batch, then compute with different
networks. Replaying the recorded choice keeps the network; the weights of the chosen experts still
come from the router's present scores, with their gradient (R3, arXiv 2510.11370).

Megatron's routers ask what stands in their `router_replay` which experts to take: here one
`_LayerRouting` each. `Routing` speaks to those of a chunk of the model, pass by pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_drpo.mcore.model import PolicyModel
from megatron_drpo.mcore.parallel import Layout

UNKNOWN = -1
"""Stands for the experts of a token that were not recorded: the router decides on it."""


class Routing:
    """The experts that the tokens of one chunk of the model are routed to, pass by pass.

    Under sequence parallelism a router sees its rank's part of the tokens; in and out go all of
    them, the same on every tensor-parallel rank.

    Args:
        model: a chunk whose layers are mixtures of experts.
    """

    def __init__(self, model: PolicyModel, layout: Layout) -> None:
        layers: Any = model.decoder.layers
        self.layers = [layer.layer_number - 1 for layer in layers]
        """Numbers of the chunk's layers in the whole model, from 0."""
        self._layout = layout
        self._routers = [_LayerRouting(layer.mlp.router) for layer in layers]

    def begin(
        self,
        experts: Tensor | None = None,
        *,
        counted: Tensor | None = None,
        record: bool = False,
    ) -> None:
        """Say what the next pass is to do.

        Args:
            experts: integers [S, layers, k] to replay, `UNKNOWN` where the router decides; None: it
                decides on all.
            counted: int64 [T], tokens that `take_counts` counts; needed with `experts`.
            record: keep what the routers take.
        """
        targets: list[_Target | None] = [None] * len(self._routers)
        if experts is not None:
            counts = torch.zeros(experts.size(0), dtype=torch.bool, device=experts.device)
            counts[counted] = True
            if self._layout.sequence_parallel:
                size, rank = self._layout.tp_size, self._layout.tp_rank
                experts, counts = experts.chunk(size)[rank], counts.chunk(size)[rank]
            targets = [_Target(part.long(), counts) for part in experts.unbind(1)]
        for router, target in zip(self._routers, targets, strict=True):
            router.target, router.recording = target, record

    def recorded(self) -> Tensor:
        """int16 [S, layers, k]: what the routers took in the pass that `begin` had recorded."""
        taken = torch.stack([router.take_recorded() for router in self._routers], 1)
        if self._layout.sequence_parallel:
            taken = gather_from_sequence_parallel_region(taken, False, self._layout.tp_group)
        return taken.short()

    def take_counts(self) -> tuple[int, int]:
        """Since the last call, over the layers' training passes: counted tokens for which the
        router would have taken other experts than those replayed, and counted tokens that had
        experts to replay."""
        pairs = [pair for router in self._routers for pair in router.counts]
        for router in self._routers:
            router.counts.clear()
        differing, total = torch.stack(pairs).sum(0).tolist() if pairs else (0, 0)
        return differing, total

    def forget(self) -> None:
        """Drop what passes left behind that no backward pass followed."""
        for router in self._routers:
            router.again.clear()


class _Target(NamedTuple):
    """What one layer is to do with the tokens of a pass."""

    experts: Tensor
    """int64 [n, k]."""
    counted: Tensor
    """bool [n]."""


class _LayerRouting:
    """The `router_replay` of one router."""

    def __init__(self, router: Any) -> None:
        self._router = router
        self.target: _Target | None = None
        """Of the next pass."""
        self.recording = False
        self.counts: list[Tensor] = []
        """Of each training pass, int64 [2]: see `Routing.take_counts`."""
        self._recorded: Tensor | None = None
        self.again: deque[_Target | None] = deque()
        """Targets of passes that the backward pass will compute again, first come first."""
        router.router_replay = self

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers [n, k] of each token's experts; called by Megatron.

        Args:
            scores: [n, experts].
            default_compute_topk: what a router does by itself, of the arguments before.
        """
        values, own = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        if self.recording:
            self._recorded = own.detach()
        again = torch.is_grad_enabled() and bool(self.again)
        target = self.again.popleft() if again else self.target
        if self._router.training and not torch.is_grad_enabled():
            self.again.append(target)  # a layer whose activations are not kept
        if target is None:
            return values, own
        known = target.experts[:, 0] != UNKNOWN
        chosen = torch.where(known[:, None], target.experts, own)
        if self._router.training and not again:
            differ = (chosen.sort(1).values != own.sort(1).values).any(1)
            counted = target.counted
            self.counts.append(torch.stack([(differ & counted).sum(), (known & counted).sum()]))
        return scores.gather(1, chosen), chosen

    def take_recorded(self) -> Tensor:
        taken, self._recorded = self._recorded, None
        assert taken is not None, "a pass was to be recorded, and none was made"
        return taken
