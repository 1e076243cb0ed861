"""Memory of a rank, by pipeline stage: what is held, and what each phase adds at its peak.

Held throughout: weights, fp32 gradients, the optimizer's state, frozen models. On top of that come,
one after the other, generation (the KV cache), training (activations) and the optimizer's update,
so that the peak is what is held and the largest of the three.

How activations are counted: `Activations.kept` lists what autograd keeps of a layer, by the part
whose input it is, in Megatron's names of the modules that can be recomputed or offloaded. A stage
keeps that for each layer of each micro-batch in flight; the backward pass of the last layer needs
`working` on top. What is kept and what works was read off the running program (saved tensors, and
what was alive at the peak) on the local layer spec; for Transformer Engine it follows from what its
modules save, and has not been measured.

Assumed: rows as long as they can become (`Job.rows`), experts that are routed to equally often.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_drpo.checkpoint.families import padded_vocab_size
from megatron_drpo.plan.job import Job
from megatron_drpo.plan.sizes import Parameters, parameters
from megatron_drpo.rollout.memory import kv_cache_bytes, planned_slots
from megatron_drpo.vocab_parallel.linear import BUDGET, BUDGET_MIXED

_FP32 = 4
_SHARE = 25  # of all logits, see `vocab_parallel.linear`


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage."""

    stage: int
    layers: int
    parameters: Parameters
    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments, and master weights where the weights are not fp32."""
    others: int
    """Frozen models, and what is kept of a batch for whole distributions."""
    in_flight: float
    """Micro-batches whose activations are kept at the same time; of a part of the layers each,
    where a stage has several chunks."""
    kept: int
    """Activations of those."""
    working: int
    """What training needs on top of that at its peak: a layer's backward pass or its recomputation,
    or the chunk of logits."""
    kv_cache: int
    update: int
    """What the optimizer's update needs for itself."""

    @property
    def held(self) -> int:
        """Throughout."""
        return self.weights + self.gradients + self.optimizer + self.others

    @property
    def training(self) -> int:
        """At the peak of the forward and backward passes."""
        return self.held + self.kept + self.working

    @property
    def peak(self) -> int:
        """The most that is there at any time."""
        return self.held + max(self.kept + self.working, self.kv_cache, self.update)


def memory(job: Job) -> tuple[StageMemory, ...]:
    """Of a rank of each pipeline stage."""
    sizes = parameters(job.architecture, job.shape, job.stage_layers)
    references: tuple[Parameters | None, ...] = (None,) * len(sizes)
    if job.reference is not None:
        layers = replace(job, architecture=job.reference).stage_layers
        references = parameters(job.reference, job.shape, layers)
    stages = []
    for stage, (layers, own) in enumerate(zip(job.stage_layers, sizes, strict=True)):
        acts = Activations(job, stage, own.largest)
        stages.append(
            StageMemory(
                stage=stage,
                layers=layers,
                parameters=own,
                weights=_weights(job, own),
                gradients=own.total * _FP32,
                optimizer=_optimizer(job, own),
                others=_others(job, stage, references[stage]),
                in_flight=acts.in_flight,
                kept=acts.all_kept,
                working=acts.working,
                kv_cache=_kv_cache(job, layers),
                update=_update(job, own),
            )
        )
    return tuple(stages)


def fullest(stages: tuple[StageMemory, ...]) -> StageMemory:
    """The stage whose ranks need most."""
    return max(stages, key=lambda stage: stage.peak)


# --- What is held -------------------------------------------------------------------------------


def _weights(job: Job, own: Parameters) -> int:
    size = own.total * job.width
    precision = job.config.precision
    if precision.fp32_output_layer and job.config.model.bf16:
        size += own.output * (_FP32 - job.width)
    if precision.fp8_format is not None and not precision.fp8_param_gather:
        # Transformer Engine keeps FP8 copies of each layer's weights, as they are and transposed.
        size += 2 * (own.total - own.embedding - own.output)
    return size


def _shard(job: Job, own: Parameters) -> tuple[int, int]:
    """Parameters whose optimizer state is on a rank: all of them, and those of the output layer."""
    shape = job.shape
    if not job.config.optimizer.use_distributed_optimizer:
        return own.total, own.output
    dense = -(-own.dense // shape.num_replicas)
    return dense + -(-own.experts // shape.edp), -(-own.output // shape.num_replicas)


def _optimizer(job: Job, own: Parameters) -> int:
    mine, output = _shard(job, own)
    size = 2 * _FP32 * mine
    if job.config.model.bf16:
        fp32 = output if job.config.precision.fp32_output_layer else 0
        size += _FP32 * (mine - fp32)
    optimizer = job.config.optimizer
    if optimizer.optimizer_cpu_offload:
        size = round(size * (1 - optimizer.optimizer_offload_fraction))
    return size


def _update(job: Job, own: Parameters) -> int:
    """Torch's operations on lists hold the roots of the second moments; a fused kernel does not."""
    return 0 if job.gpu and job.transformer_engine else _FP32 * _shard(job, own)[0]


def _others(job: Job, stage: int, reference: Parameters | None) -> int:
    shape, needs, rollout = job.shape, job.needs, job.config.rollout
    size = 0 if reference is None else reference.total * job.width
    if stage < shape.pp - 1:
        return size
    states = job.architecture.hidden_size * needs.behaviour_l2
    if job.reference is not None:
        states += job.reference.hidden_size * needs.reference_kl
    tokens = rollout.rollout_prompts_per_step * rollout.rollout_samples_per_prompt
    tokens *= rollout.rollout_max_response_length
    size += tokens // shape.num_replicas * states * job.width
    if needs.behaviour_l2:  # the output layer of the weights that generated
        size += _vocab_rows(job) * job.architecture.hidden_size * job.width
    return size


def _vocab_rows(job: Job) -> int:
    return padded_vocab_size(job.architecture.vocab_size, job.shape.tp) // job.shape.tp


# --- Generation ---------------------------------------------------------------------------------


def slots(job: Job) -> int:
    """Responses that a rank's KV cache holds at the same time, at most; 0: it has none."""
    rollout, shape = job.config.rollout, job.shape
    if not job.generates or rollout.uses_servers:
        return 0
    most = job.eval_samples
    if rollout.rollouts_file is None:
        most = max(most, rollout.num_drawn_prompts * rollout.rollout_samples_per_prompt)
    wanted = min(rollout.rollout_max_slots, -(-most // shape.num_replicas))
    room = planned_slots(job.config, job.architecture, job.prompt_length)
    return wanted if room is None else min(wanted, shape.pp * room)


def _kv_cache(job: Job, layers: int) -> int:
    return kv_cache_bytes(
        replace(job.architecture, num_layers=layers),
        tp_size=job.shape.tp,
        pp_size=1,
        element_bytes=job.width,
        slots=slots(job),
        length=job.longest,
    )


# --- Training -----------------------------------------------------------------------------------


def chunk_bytes(job: Job) -> int:
    """Logits and their gradient that exist at a time on the last stage, at most."""
    train, row = job.config.train, job.rows.length // job.shape.cp
    logits = row * _vocab_rows(job) * _FP32
    if not train.fused_output:
        return 3 * logits  # with the log-probs' softmax and a gradient of its own
    mixed = job.config.model.bf16 and job.gpu
    budget = BUDGET_MIXED if mixed else BUDGET
    if train.output_chunk_mib is not None:
        return min(logits, train.output_chunk_mib << 20)
    least = budget.least_rows * _vocab_rows(job) * _FP32
    return min(logits, max(logits // _SHARE, least), budget.most_bytes)


class Activations:
    """What the forward pass of one stage keeps for the backward pass, on one rank."""

    def __init__(self, job: Job, stage: int, largest: int) -> None:
        """`largest`: parameters of the stage's biggest one."""
        self.job, self.stage, self.largest = job, stage, largest
        self.first, self.last = stage == 0, stage == job.shape.pp - 1

    @property
    def in_flight(self) -> float:
        """Micro-batches whose forward pass is done and whose backward pass is not, at most.

        1F1B: as many as stages are left, this one included. Interleaved: 2 * (stages after this
        one) + (chunks - 1) * stages + 1 chunks, of so many chunks per micro-batch.
        """
        shape, count = self.job.shape, self.job.rows.count
        after = shape.pp - self.stage - 1
        if shape.vp == 1:
            return min(after + 1, count)
        chunks = min(2 * after + (shape.vp - 1) * shape.pp + 1, count * shape.vp)
        return chunks / shape.vp

    @cached_property
    def layer(self) -> dict[str, int]:
        """Bytes of a layer and a micro-batch that autograd keeps, none of them recomputed."""
        return self._attention() | (self._experts() if self._has_experts else self._mlp())

    @property
    def kept(self) -> dict[str, int]:
        """Of `layer`, what is neither recomputed one by one nor moved to the host."""
        settings, parts = self.job.config.memory, dict(self.layer)
        again: set[str] = set()
        if settings.recompute_granularity == "selective":
            again = {name for module in settings.recompute_modules for name in _MADE_AGAIN[module]}
        if settings.fine_grained_activation_offloading:
            again |= set(settings.offload_modules)
        return {name: size for name, size in parts.items() if name not in again}

    @property
    def all_kept(self) -> int:
        """Of all layers of this stage and all micro-batches in flight."""
        return round(self._chunks * self._chunk_kept * self.in_flight) + self._ends

    @property
    def working(self) -> int:
        """What the backward pass of a chunk needs at its worst, beyond `all_kept`.

        It begins with the logits, goes on with the last layer's MLP and attention, whose forward
        pass is made again before that where it is recomputed, and ends with the gradient of the
        embedding, when all that was kept of the chunk is gone.
        """
        settings, whole = self.job.config.memory, sum(self.layer.values())
        output = self._output_at_work if self.last else 0
        end = self.largest * self.job.width - self._chunk_kept
        made, count = whole - sum(self.kept.values()), self._count
        if settings.recompute_granularity != "full":
            return max(output, made + self._layer_at_work, end)
        if settings.recompute_method == "uniform":
            return max(output, min(count, self._layers) * whole + self._layer_at_work, end)
        # The layers that are not recomputed come last, and so are first in the backward pass.
        freed = max(self._layers - count, 0) * whole
        plain = self._layer_at_work if freed else 0
        return max(output, plain, whole - freed + self._layer_at_work, end)

    @property
    def _chunks(self) -> int:
        return self.job.shape.vp

    @property
    def _layers(self) -> int:
        """Of a chunk."""
        return self.job.stage_layers[self.stage] // self._chunks

    @property
    def _count(self) -> int:
        """`--recompute-num-layers`."""
        return self.job.config.memory.recompute_num_layers or 1

    @property
    def _chunk_kept(self) -> int:
        """Of a chunk and one micro-batch."""
        settings, per_layer = self.job.config.memory, sum(self.kept.values())
        if settings.recompute_granularity != "full":
            return self._layers * per_layer
        if settings.recompute_method == "uniform":
            return -(-self._layers // self._count) * self._stream
        again = min(self._count, self._layers)
        return again * self._stream + (self._layers - again) * per_layer

    @property
    def _layer_at_work(self) -> int:
        """Gradients within a layer: of its MLP, or of its attention once the MLP's part is gone."""
        mlp = sum(size for name, size in self.layer.items() if name in _MLP_PARTS)
        return max(self._mlp_at_work, self._attention_at_work + self._scores_at_work - mlp)

    # Tokens of a row on this rank: where tensor parallelism splits heads and width (all tokens that
    # context parallelism leaves), and between those parts (fewer under sequence parallelism).

    @property
    def _tokens(self) -> int:
        return self.job.rows.length // self.job.shape.cp

    @property
    def _between(self) -> int:
        return self.job.rows.length // self.job.shape.split_rows

    @property
    def _stream(self) -> int:
        """Hidden states between two layers."""
        return self._between * self.job.architecture.hidden_size * self.job.width

    @property
    def _has_experts(self) -> bool:
        return bool(self.job.architecture.num_experts)

    def _norm(self, channels: int) -> int:
        """What a norm of as many channels (all tokens together) keeps of its input."""
        if self.job.gpu:
            return channels * self.job.width
        # On a CPU torch keeps the input and the normalised input, in fp32.
        return channels * 2 * _FP32

    def _attention(self) -> dict[str, int]:
        architecture, shape, width = self.job.architecture, self.job.shape, self.job.width
        query, key = architecture.query_size // shape.tp, architecture.key_value_size // shape.tp
        tokens, hidden = self._tokens, architecture.hidden_size
        parts = {
            "attn_norm": self._norm(self._between * hidden),
            "qkv_linear": self._between * hidden * width,
            "core_attn": tokens * (query + 2 * key * (1 if self._flash else shape.cp)) * width,
            "attn_proj": tokens * query * width,
            "rotary": 4 * tokens * architecture.kv_channels * width,
        }
        if architecture.qk_layernorm:
            # fp32 on a CPU needs no copy of the input, which is part of the projection.
            mixed = tokens * (query + 2 * key) * width
            copied = self.job.gpu or width == _FP32
            norms = tokens * (query + key) * (width if copied else 2 * _FP32)
            parts["qk_norm"] = norms + (mixed if copied else 0)
        if self._scores:
            # Probabilities in fp32, again in the values' type, and the mask.
            parts["scores"] = self._scores * (_FP32 + (0 if width == _FP32 else width))
            parts["mask"] = self._scores // (architecture.num_attention_heads // shape.tp)
        return parts

    def _mlp(self) -> dict[str, int]:
        architecture, width = self.job.architecture, self.job.width
        inner = self._tokens * architecture.ffn_hidden_size // self.job.shape.tp
        # gate and up; the activated gate and up again, where that is not fused; their product.
        copies = 3 if self.job.gpu else 5
        return {
            "mlp_norm": self._norm(self._between * architecture.hidden_size),
            "mlp_input": self._between * architecture.hidden_size * width,
            "mlp_act": copies * inner * width,
        }

    def _experts(self) -> dict[str, int]:
        architecture, shape, width = self.job.architecture, self.job.shape, self.job.width
        hidden, tokens = architecture.hidden_size, self._between
        # Expert tensor parallelism gathers the tokens of its ranks.
        routed = tokens * architecture.num_experts_per_token * shape.etp
        inner = routed * architecture.ffn_hidden_size // shape.etp
        copies = 3 if self.job.transformer_engine else 6 if width == _FP32 else 7
        return {
            "mlp_norm": self._norm(tokens * hidden),
            "mlp_input": tokens * hidden * width,
            # fp32 logits, their softmax, the chosen ones, and a mask.
            "router": tokens * (hidden * (0 if width == _FP32 else _FP32))
            + tokens * architecture.num_experts * (3 * _FP32 + 1),
            "expert_fc1": routed * hidden * width,
            "moe_act": copies * inner * width,
        }

    @property
    def _flash(self) -> bool:
        return self.job.transformer_engine

    @cached_property
    def _scores(self) -> int:
        """Scores of a layer that are held as a whole: none with flash attention.

        Under context parallelism a rank has two pieces of each sequence, which see L queries and as
        many keys as lie before their ends: (2 cp + 1) / 2 of the pieces together.
        """
        if self._flash:
            return 0
        rows, shape = self.job.rows, self.job.shape
        heads = self.job.architecture.num_attention_heads // shape.tp
        length, count = rows.sequence_length, rows.length / rows.sequence_length
        if shape.cp == 1:
            pairs = length**2
        else:
            piece = length / (2 * shape.cp)
            pairs = piece**2 * (2 * shape.cp + 1)
        return round(heads * count * pairs)

    @property
    def _scores_at_work(self) -> int:
        """Two gradients of the scores in fp32, once probabilities in another type are gone."""
        width = self.job.width
        return self._scores * (2 * _FP32 - (0 if width == _FP32 else width))

    @property
    def _attention_at_work(self) -> int:
        """Gradients of queries, keys, values and output."""
        parts = self.layer
        return 2 * (parts["core_attn"] + parts["attn_proj"])

    @property
    def _mlp_at_work(self) -> int:
        """Gradients between the two matrices, and of the hidden states on both sides."""
        parts, shape = self.layer, self.job.shape
        whole = self._stream * (shape.tp if self.job.shape.sequence_parallel else 1)
        inner = parts.get("mlp_act", 0) + parts.get("moe_act", 0) + parts.get("expert_fc1", 0)
        return inner + 2 * whole

    @property
    def _output_at_work(self) -> int:
        hidden = self._tokens * self.job.architecture.hidden_size
        return chunk_bytes(self.job) + 2 * hidden * self.job.width

    @property
    def _ends(self) -> int:
        """The embedding's output; the final norm."""
        if not self.last:
            return 0
        hidden = self._between * self.job.architecture.hidden_size
        return self._norm(hidden) + hidden * self.job.width


_MLP_PARTS = {"mlp_norm", "mlp_input", "mlp_act", "router", "expert_fc1", "moe_act"}
_MADE_AGAIN = {
    "core_attn": ("scores", "mask"),
    "moe_act": ("moe_act",),
    "layernorm": ("qkv_linear", "mlp_input"),
    "mlp": ("mlp_input", "mlp_act"),
    "moe": ("mlp_input", "router", "expert_fc1", "moe_act"),
}
"""By module of `--recompute-modules`: what is then made again rather than kept."""
