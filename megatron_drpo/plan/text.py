"""A plan as lines for people: what `--dry-run` and the doctor both print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.plan import sizes
from megatron_drpo.plan.job import Job
from megatron_drpo.plan.memory import StageMemory, fullest, memory, slots
from megatron_drpo.plan.speed import Machines, Speed, bubble
from megatron_drpo.plan.traffic import collectives

GIB = 1 << 30
_UNITS = {"GiB": GIB, "MiB": 1 << 20, "KiB": 1 << 10}


def page(sections: Mapping[str, Sequence[str]]) -> str:
    """Titles with their lines under them; a section without lines is left out."""
    blocks = (
        "\n".join([title, *(f"  {line}" for line in lines)])
        for title, lines in sections.items()
        if lines
    )
    return "\n\n".join(blocks)


def model_lines(job: Job) -> list[str]:
    """What the model is."""
    architecture = job.architecture
    inner = f"MLP of {architecture.ffn_hidden_size}"
    if architecture.num_experts:
        inner = (
            f"{architecture.num_experts} experts of {architecture.ffn_hidden_size}, "
            f"{architecture.num_experts_per_token} for each token"
        )
    whole, active = sizes.count(architecture), sizes.count(architecture, active=True)
    used = f", {active:,} of them active in a token" if active < whole else ""
    return [
        f"{architecture.family}: {architecture.num_layers} layers, hidden "
        f"{architecture.hidden_size}, {architecture.num_attention_heads} heads in "
        f"{architecture.num_query_groups} groups, {inner}, {architecture.vocab_size:,} token ids",
        f"{whole:,} parameters{used}",
    ]


def layout_lines(job: Job) -> list[str]:
    """Who holds what."""
    shape, layers, experts = job.shape, job.stage_layers, job.architecture.num_experts
    chunk = f"{shape.vp} chunk(s) of {layers[0] // shape.vp} layer(s) on each rank"
    if len(set(layers)) > 1:
        chunk = f"layers of each stage: {', '.join(map(str, layers))}"
        chunk += f", in {shape.vp} chunks" if shape.vp > 1 else ""
    lines = [f"{shape.world_size} rank(s) = {shape}", chunk]
    if experts:
        parts = f", each split over {shape.etp} ranks" if shape.etp > 1 else ""
        lines.append(
            f"EP {shape.ep}: {experts // shape.ep} of {experts} experts on each rank{parts}, held "
            f"by {shape.edp} rank(s)"
        )
    rows, train = job.rows, job.config.train
    lines.append(
        f"{train.updates_per_rollout} update(s) in a step, each of at most {rows.count} "
        f"micro-batch(es) on each of {shape.dp} replica(s)"
    )
    lines.append(
        f"a micro-batch: {rows.length} tokens, {rows.sequences} sequence(s) of up to "
        f"{job.longest} tokens"
    )
    if shape.pp > 1:
        lines.append(
            f"pipeline bubble {bubble(job):.1%}: (p - 1) / (v m + p - 1) with p = {shape.pp} "
            f"stages, v = {shape.vp} chunks, m = {rows.count} micro-batches"
        )
    return lines


def memory_lines(job: Job, device_bytes: float | None = None) -> list[str]:
    """A table by pipeline stage, and what its columns are."""
    stages = memory(job)
    worst = fullest(stages)
    name, unit = _unit(worst.peak)
    others, caches = any(s.others for s in stages), any(s.kv_cache for s in stages)
    updates = any(s.update for s in stages)
    head = ["stage", "layers", "parameters", "weights", "gradients", "optimizer"]
    head += ["frozen"] * others + ["activations", "at work"]
    head += ["KV cache"] * caches + ["update"] * updates + ["peak"]

    def cells(stage: StageMemory) -> list[str]:
        sized = [stage.weights, stage.gradients, stage.optimizer]
        sized += [stage.others] * others + [stage.kept, stage.working]
        sized += [stage.kv_cache] * caches + [stage.update] * updates + [stage.peak]
        texts = [f"{size / unit:,.1f}" for size in sized]
        return [str(stage.stage), str(stage.layers), f"{stage.parameters.total:,}", *texts]

    state = "Adam's moments" + (" and fp32 masters" if job.config.model.bf16 else "")
    if job.config.optimizer.use_distributed_optimizer:
        state += f", shared out over {job.shape.num_replicas} rank(s)"
        if job.architecture.num_experts:
            state += f", of experts over {job.shape.edp}"
    lines = [
        *_table(head, [cells(stage) for stage in stages]),
        f"in {name}, of one rank; gradients are fp32; optimizer: {state}",
        "peak: weights, gradients, optimizer, and the largest of what training, generation and "
        "update add",
        f"activations: of {worst.in_flight:g} micro-batch(es) in flight on stage {worst.stage}; "
        f"{_recomputed(job)}",
        f"at work: the backward pass of a layer, or {_output(job)}",
    ]
    if caches:
        lines.append(f"KV cache, {slots(job)} slots of {job.longest} tokens")
    if job.transformer_engine:
        lines.append("activations of Transformer Engine's layers are counted, not measured")
    if device_bytes is not None:
        share = worst.peak / device_bytes
        lines.append(
            f"stage {worst.stage} takes {worst.peak / GIB:.1f} of {device_bytes / GIB:.1f} GiB "
            f"({share:.0%})"
        )
    return lines


def _recomputed(job: Job) -> str:
    settings = job.config.memory
    kept = "everything is kept"
    if settings.recompute_granularity == "full":
        kept = (
            f"layers are recomputed ({settings.recompute_method}, {settings.recompute_num_layers})"
        )
    elif settings.recompute_granularity == "selective":
        kept = f"{', '.join(settings.recompute_modules)} recomputed"
    if settings.fine_grained_activation_offloading:
        kept += f", inputs of {', '.join(settings.offload_modules)} on the host"
    if not job.transformer_engine and settings.recompute_granularity is None:
        kept += ", scores of attention included"
    return kept


def _output(job: Job) -> str:
    if job.config.train.fused_output:
        return "a chunk of logits (a row's never exist)"
    return "a row's logits"


def traffic_lines(job: Job, machines: Machines | None = None) -> list[str]:
    """A table of collectives."""
    found = collectives(job)
    if not found:
        return ["none: one rank"]
    name, unit = _unit(max(c.bytes for c in found))
    head = ["", "ranks", "times", f"{name} sent by a rank", "what"]
    rows = [
        [f"{c.kind} {c.group}", str(c.size), f"{c.count:,}", f"{c.bytes / unit:,.1f}", c.what]
        for c in found
    ]
    if machines is not None:
        head.insert(2, "where")
        for row, c in zip(rows, found, strict=True):
            row.insert(2, "machine" if c.extent <= machines.gpus_per_node else "network")
    return [
        *_table(head, rows),
        "of a training step: scoring and all updates; generation is not counted",
    ]


def speed_lines(job: Job, machines: Machines, found: Speed) -> list[str]:
    """What a step takes, and from what that follows."""
    tokens, each = found.tokens, found.tokens_per_second / job.world_size
    waiting = (found.compute + found.scoring) * found.bubble / (1 - found.bubble)
    return [
        f"at most {tokens:,} tokens in a step, {found.flops:.3g} operations of training "
        f"({found.flops / tokens:.3g} per token)",
        f"{found.seconds:.3g} s: training {found.compute:.1f}, scoring {found.scoring:.1f}, "
        f"pipeline bubble {waiting:.1f}, messages {found.messages:.1f}; without generation",
        f"{found.tokens_per_second:,.0f} tokens/s, {each:,.0f} per rank; MFU {found.mfu:.1%}",
        assumed(job.architecture, machines),
    ]


def assumed(architecture: Architecture, machines: Machines) -> str:
    """What estimates of time take for granted."""
    share = machines.efficiency_of(architecture)
    return (
        f"assumed: products of matrices at {share:.0%} of {machines.peak_tflops:g} TFLOP/s, "
        f"messages at {machines.node_gbytes:g} GB/s among the {machines.gpus_per_node} GPUs of a "
        f"machine and {machines.network_gbytes:g} GB/s beyond, none hidden: an estimate, not run"
    )


def suggestion_lines(found: Sequence[tuple[Job, Speed]]) -> list[str]:
    """A table of layouts with what each comes to."""
    head = ["layout", "micro-batches", "recomputed", "GiB", "bubble", "messages", "MFU", "tokens/s"]
    rows = [
        [
            str(job.shape) + _uneven(job),
            f"{job.rows.count}",
            "all" if job.config.memory.recompute_granularity == "full" else "-",
            f"{fullest(memory(job)).peak / GIB:.1f}",
            f"{speed.bubble:.0%}",
            f"{speed.messages / speed.seconds:.0%}",
            f"{speed.mfu:.1%}",
            f"{speed.tokens_per_second:,.0f}",
        ]
        for job, speed in found
    ]
    return _table(head, rows)


def _uneven(job: Job) -> str:
    layers = job.stage_layers
    return "" if len(set(layers)) == 1 else f", layers {layers[0]}/{layers[1]}/{layers[-1]}"


def _unit(largest: int) -> tuple[str, int]:
    """The largest unit of which there are ten at least; KiB if of none."""
    fitting = [(name, unit) for name, unit in _UNITS.items() if largest >= 10 * unit]
    return (fitting or [("KiB", _UNITS["KiB"])])[0]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of numbers to the right, the last one to the left if it holds words."""
    every = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    words = [all(not cell[:1].isdigit() for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in every
    ]
