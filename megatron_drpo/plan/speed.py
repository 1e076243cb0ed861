"""How long a training step takes on paper: floating-point operations, pipeline bubble, messages.

Operations are counted as Megatron-LM does: products of matrices alone, three times those of a
forward pass, attention at half of what it would be without the causal mask, nothing of what is
recomputed. Seconds are those at a stated share of the device's peak, and of messages at stated
rates, none of them hidden behind computation: an estimate to compare layouts by, no measurement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.plan.flops import attention_cost, linear_flops
from megatron_drpo.plan.job import Job
from megatron_drpo.plan.memory import fullest, memory
from megatron_drpo.plan.traffic import collectives

DENSE_EFFICIENCY, EXPERTS_EFFICIENCY = 0.5, 0.3
"""Shares of the peak that products of matrices reach by default; those of experts are small, and
tokens are sorted before and after them."""

BUSY_EXPERT = 256
"""Tokens below which an expert's products take as long as reading its weights: a GPU's operations
per byte read (989e12 / 3.35e12 = 295 on an H100), since a bf16 weight is read for 1 of them."""


@dataclass(frozen=True)
class Machines:
    """What the ranks run on.

    Example: Machines(peak_tflops=989.0) is an H100 in bf16, in machines of eight.
    """

    peak_tflops: float
    """Of one device, in the precision of the run, without sparsity."""
    gpus_per_node: int = 8
    node_gbytes: float = 300.0
    """10^9 bytes per second that a device sends within its machine, as reached by collectives."""
    network_gbytes: float = 40.0
    """The same to other machines."""
    efficiency: float | None = None
    """Share of the peak; None: `DENSE_EFFICIENCY`, or `EXPERTS_EFFICIENCY` with experts."""

    def efficiency_of(self, architecture: Architecture) -> float:
        """`efficiency` with its default resolved."""
        default = EXPERTS_EFFICIENCY if architecture.num_experts else DENSE_EFFICIENCY
        return default if self.efficiency is None else self.efficiency


@dataclass(frozen=True)
class Speed:
    """Of one training step, generation left out."""

    tokens: int
    """Prompts and responses of the batch, every response at its full length."""
    flops: float
    """Of its training, all ranks together."""
    compute: float
    """Seconds that a rank computes for training, recomputation included."""
    scoring: float
    """Seconds that it computes for scoring before the first update."""
    bubble: float
    """Share of the pipeline's time in which a rank waits for the others."""
    messages: float
    """Seconds of all collectives."""
    mfu: float
    """Share of the peak that training uses over the whole step."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return (self.compute + self.scoring) / (1 - self.bubble) + self.messages

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds


def training_flops(
    architecture: Architecture, lengths: Iterable[int], *, loss_tokens: int | None = None
) -> float:
    """Of a forward and backward pass over whole sequences, on all ranks together.

    Three times 2 operations for each token and each weight that it is multiplied with (of experts,
    those that it is routed to), and for each of the L^2 / 2 pairs of tokens that attention looks at
    4 for each channel of the queries.

    Args:
        lengths: tokens of each sequence, prompt and response.
        loss_tokens: how many of all tokens go through the output layer; None: all of them, as in
            Megatron-LM's count.
    """
    lengths = list(lengths)
    each, attention, tokens = linear_flops(architecture), attention_cost(architecture), sum(lengths)
    total = each * (tokens + sum(map(attention, lengths)))
    if loss_tokens is not None:
        total -= 2.0 * architecture.hidden_size * architecture.vocab_size * (tokens - loss_tokens)
    return 3.0 * total


def mfu(flops: float, seconds: float, world_size: int, peak_tflops: float) -> float:
    """Share of all devices' peak: model FLOP/s utilization (arXiv 2204.02311, appendix B)."""
    return flops / seconds / (world_size * peak_tflops * 1e12)


def bubble(job: Job) -> float:
    """Share of the pipeline's time in which a rank waits: (p - 1) / (v m + p - 1) with p stages of
    v chunks and m micro-batches (arXiv 2104.04473, section 2.2, as a share of the whole)."""
    shape, count = job.shape, job.rows.count
    return (shape.pp - 1) / (shape.vp * count + shape.pp - 1)


def speed(job: Job, machines: Machines) -> Speed:
    """What a step takes, every response at its full length."""
    rollout, shape = job.config.rollout, job.shape
    samples = rollout.rollout_prompts_per_step * rollout.rollout_samples_per_prompt
    response = rollout.rollout_max_response_length
    tokens = samples * job.longest
    flops = samples * training_flops(job.architecture, [job.longest], loss_tokens=response)
    rate = shape.world_size * machines.peak_tflops * 1e12
    rate *= machines.efficiency_of(job.architecture)
    # Rows are padded, and the fullest replica and stage set the pace.
    layers, rows = job.architecture.num_layers, job.rows
    padded = rows.length * rows.count * shape.dp / (job.samples_per_update * job.longest)
    pace = max(job.stage_layers) * shape.pp / layers * max(padded, 1.0) * _idle_experts(job)
    compute = flops * (1 + _made_again(job) / 3) / rate * pace
    scoring = flops / 3 / rate * pace
    if job.reference is not None:
        other = samples * training_flops(job.reference, [job.longest], loss_tokens=response)
        scoring += other / 3 / rate * pace
    waits = bubble(job)
    messages = 0.0
    for found in collectives(job):
        inside = found.extent <= machines.gpus_per_node
        each = machines.node_gbytes if inside else machines.network_gbytes
        messages += found.bytes / (each * 1e9)
    seconds = (compute + scoring) / (1 - waits) + messages
    used = mfu(flops, seconds, shape.world_size, machines.peak_tflops)
    return Speed(tokens, flops, compute, scoring, waits, messages, used)


def _idle_experts(job: Job) -> float:
    """By what factor computation takes longer where experts see few tokens."""
    met, architecture = job.tokens_per_expert, job.architecture
    if not 0 < met < BUSY_EXPERT:
        return 1.0
    active = 3 * architecture.hidden_size * architecture.ffn_hidden_size
    share = 2.0 * architecture.num_layers * architecture.num_experts_per_token * active
    share /= linear_flops(architecture) * (
        1 + attention_cost(architecture)(job.longest) / job.longest
    )
    return 1 + share * (BUSY_EXPERT / met - 1)


def _made_again(job: Job) -> float:
    """Forward passes that the backward pass repeats, as a share of one."""
    settings = job.config.memory
    if settings.recompute_granularity == "full":
        if settings.recompute_method == "uniform":
            return 1.0
        chunk = max(job.stage_layers) // job.shape.vp
        return min(settings.recompute_num_layers or 1, chunk) / chunk
    if settings.recompute_granularity != "selective":
        return 0.0
    architecture, modules = job.architecture, settings.recompute_modules
    layers = 2.0 * architecture.num_layers
    active = architecture.num_experts_per_token or 1
    inner = 3 * architecture.hidden_size * architecture.ffn_hidden_size * active
    whole = linear_flops(architecture)
    attention = attention_cost(architecture)(job.longest) / job.longest
    share = layers * inner / whole if {"mlp", "moe"} & set(modules) else 0.0
    if "core_attn" in modules and not job.transformer_engine:
        share += attention
    return share / (1 + attention)


def fits(job: Job, device_bytes: float) -> bool:
    """Whether the fullest rank's peak leaves a tenth of a device to others: the driver, NCCL's
    buffers, and memory between blocks that no tensor fits into."""
    return fullest(memory(job)).peak <= USABLE * device_bytes


USABLE = 0.9
