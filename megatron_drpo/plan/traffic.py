"""What ranks say to each other in one training step: collectives by kind and group, with bytes.

A step is one rollout batch: scoring (a forward pass of every update's rows, and of the reference
model's, where there is one) and `updates_per_rollout` updates. Generation is left out. Bytes are
those that a rank sends by the ring algorithms, of n bytes over g ranks: n (g - 1) / g for
all-gather, reduce-scatter and all-to-all, where n is the whole; twice that for all-reduce; n for a
message to the next pipeline stage. Counted on a rank of the stage that says most; rare and small
messages (loss, norms, statistics of tokens, gradients of norms) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_drpo.plan.job import Job
from megatron_drpo.plan.sizes import parameters

_FP32 = 4


@dataclass(frozen=True)
class Collective:
    """Messages of one kind in a step.

    Example: Collective("all-reduce", "TP", size=4, extent=4, count=192, bytes=..., what="...")
    """

    kind: str
    group: str
    """TP, CP, PP, EP, ETP (expert tensor), DP (with CP) or EDP (of the same experts)."""
    size: int
    """Ranks of the group."""
    extent: int
    """Consecutive ranks of the world that the group lies within: up to those of a machine, it does
    not leave the machine."""
    count: int
    bytes: int
    """Sent by a rank, all of them together."""
    what: str


def collectives(job: Job) -> list[Collective]:
    """Those of a step, in groups that have more than one rank."""
    return [found for found in _Step(job).all() if found.size > 1 and found.count]


class _Step:
    def __init__(self, job: Job) -> None:
        self.job, self.shape, rows = job, job.shape, job.rows
        updates = job.config.train.updates_per_rollout
        references = 0 if job.reference is None else 1
        self.updates = updates
        self.trained = updates * rows.count
        """Micro-batches of training, on this replica."""
        self.scored = self.trained * (1 + references)
        self.layers = max(job.stage_layers)
        hidden = job.architecture.hidden_size
        self.whole = rows.length // self.shape.cp * hidden * job.width
        """Hidden states of a micro-batch on a rank, all that tensor parallelism shares."""
        self.between = rows.length // self.shape.split_rows * hidden * job.width
        self.again = self._forwards_again()

    def all(self) -> Iterator[Collective]:
        yield from self._tensor()
        yield from self._context()
        yield from self._experts()
        yield from self._pipeline()
        yield from self._data()

    def _forwards_again(self) -> float:
        """Share of the layers whose forward pass is computed twice."""
        settings, chunk = self.job.config.memory, self.layers // self.shape.vp
        if settings.recompute_granularity != "full":
            return 0.0
        if settings.recompute_method == "uniform":
            return 1.0
        return min(settings.recompute_num_layers or 1, chunk) / chunk

    @property
    def _forwards(self) -> float:
        """Forward passes through the layers of a stage, in micro-batches."""
        return self.scored + self.trained * (1 + self.again)

    def _ring(self, kind: str, group: str, count: float, size: int, what: str) -> Collective:
        """`size` bytes each time."""
        ranks, extent = self._ranks(group)
        share = {"all-reduce": 2.0, "send": 0.0}.get(kind, 1.0) * (ranks - 1) / ranks
        sent = size if kind == "send" else size * share
        return Collective(kind, group, ranks, extent, round(count), round(count * sent), what)

    def _ranks(self, group: str) -> tuple[int, int]:
        """(ranks, extent), in Megatron's order of ranks: tp, cp, dp, pp; experts: etp, ep, edp."""
        shape = self.shape
        stage = shape.world_size // shape.pp
        return {
            "TP": (shape.tp, shape.tp),
            "CP": (shape.cp, shape.tp * shape.cp),
            "DP": (shape.num_replicas, stage),
            "ETP": (shape.etp, shape.etp),
            "EP": (shape.ep, shape.etp * shape.ep),
            "EDP": (shape.edp, stage),
            "PP": (shape.pp, shape.world_size),
        }[group]

    def _tensor(self) -> Iterator[Collective]:
        """Around attention and, in a dense model, around the MLP; embedding and output layer."""
        job, layers = self.job, self.layers
        blocks = 1 if job.architecture.num_experts else 2
        forward, backward = layers * blocks * self._forwards, layers * blocks * self.trained
        if not self.shape.sequence_parallel:
            yield self._ring(
                "all-reduce", "TP", forward + backward, self.whole, "sums of attention and MLP"
            )
            yield self._ring(
                "all-reduce",
                "TP",
                self.scored + 2 * self.trained,
                self.whole,
                "embedding, and the output layer's gradient",
            )
            return
        # The backward pass gathers a linear layer's input once more, for its weight's gradient.
        yield self._ring(
            "all-gather", "TP", forward + 2 * backward, self.whole, "inputs of attention and MLP"
        )
        yield self._ring(
            "reduce-scatter", "TP", forward + backward, self.whole, "sums of attention and MLP"
        )
        yield self._ring(
            "all-gather",
            "TP",
            self.scored + 2 * self.trained,
            self.whole,
            "output layer, and the embedding's gradient",
        )
        yield self._ring(
            "reduce-scatter",
            "TP",
            self.scored + 2 * self.trained,
            self.whole,
            "embedding, and the output layer's gradient",
        )

    def _context(self) -> Iterator[Collective]:
        job, shape = self.job, self.shape
        keys = job.rows.length * 2 * job.architecture.key_value_size // shape.tp * job.width
        again = self.again
        settings = job.config.memory
        if settings.recompute_granularity == "selective" and "core_attn" in (
            settings.recompute_modules
        ):
            again = 1.0
        forward = self.layers * (self.scored + self.trained * (1 + again))
        yield self._ring("all-gather", "CP", forward, keys, "keys and values")
        yield self._ring(
            "reduce-scatter", "CP", self.layers * self.trained, keys, "gradients of these"
        )

    def _experts(self) -> Iterator[Collective]:
        job = self.job
        chosen = job.architecture.num_experts_per_token
        if not chosen:
            return
        settings, again = job.config.memory, self.again
        if settings.recompute_granularity == "selective" and "moe" in settings.recompute_modules:
            again = 1.0
        forward = self.layers * (self.scored + self.trained * (1 + again))
        passes = forward + self.layers * self.trained
        routed = self.between * chosen
        yield self._ring("all-to-all", "EP", 2 * passes, routed, "tokens to experts and back")
        gathered = routed * self.shape.etp
        yield self._ring("all-gather", "ETP", passes, gathered, "tokens of split experts")
        yield self._ring("reduce-scatter", "ETP", passes, gathered, "their sums")

    def _pipeline(self) -> Iterator[Collective]:
        """Of a stage in the middle: hidden states on, and their gradients back."""
        count = self.shape.vp * (self.scored + 2 * self.trained)
        yield self._ring("send", "PP", count, self.between, "hidden states and their gradients")

    def _data(self) -> Iterator[Collective]:
        """Once for each update: gradients in fp32, and weights after it."""
        job, updates = self.job, self.updates
        own = max(parameters(job.architecture, self.shape, job.stage_layers), key=lambda p: p.total)
        for group, size, whose in (("DP", own.dense, "weights"), ("EDP", own.experts, "experts")):
            if not size:
                continue
            gradients = f"gradients of {whose}"
            if not job.config.optimizer.use_distributed_optimizer:
                yield self._ring("all-reduce", group, updates, size * _FP32, gradients)
                continue
            yield self._ring("reduce-scatter", group, updates, size * _FP32, gradients)
            yield self._ring("all-gather", group, updates, size * job.width, f"updated {whose}")
