"""The policy under training: Megatron's model, schedule and optimizer behind a few verbs.

In: rows of tokens (`types.Row`). Out: log-probs (`score`), rows that know the batch's first policy
(`annotate`), gradients and their statistics (`forward_backward`), updated weights (`optim_step`).
One forward pass serves scoring and training.

How the loss is scaled, once: row i returns `sum_t weight_t * loss_t` and the integer `num_items`;
Megatron adds both over rows and over data- and context-parallel ranks (`calculate_per_token_loss`)
and divides the gradients by the total of `num_items` once. So the loss is one sum over one global
denominator, whatever the number of rows or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.config import Config
from megatron_drpo.context_parallel import sequence_bounds, share_row
from megatron_drpo.device import Device
from megatron_drpo.mcore import precision
from megatron_drpo.mcore.attention import row_layout
from megatron_drpo.mcore.model import (
    PolicyModel,
    build_model,
    use_batch_invariant_kernels,
    use_transformer_engine,
)
from megatron_drpo.mcore.optimizer import build_optimizer, clip_gradients
from megatron_drpo.mcore.parallel import Layout
from megatron_drpo.mcore.routing import Routing
from megatron_drpo.mcore.weights import load
from megatron_drpo.metrics import TokenDiagnostics
from megatron_drpo.objectives import build_objective
from megatron_drpo.packing import pack
from megatron_drpo.plan.flops import attention_cost
from megatron_drpo.plan.layouts import Shape
from megatron_drpo.row_loss import (
    OutputLayer,
    check_finite,
    fused_loss,
    plain_loss,
    score,
    to_device,
)
from megatron_drpo.types import Row, Trajectory
from megatron_drpo.vocab_parallel import TokenScores


@dataclass(frozen=True)
class Update:
    """One optimizer update. Example: Update(grad_norm=0.8, lr=1e-6, skipped=False)."""

    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate that this update used."""
    skipped: bool
    """True if the gradients were not finite: weights and optimizer stay as they were."""


class Policy:
    """This rank's part of the policy. Build with `Policy.load`; all methods are collective."""

    def __init__(
        self, config: Config, architecture: Architecture, layout: Layout, device: Device
    ) -> None:
        self.config, self.architecture = config, architecture
        self.layout, self.device = layout, device
        if device.kind == "cuda" and config.rollout.rollout_exact == "on":
            use_batch_invariant_kernels()
        self.models = self._build(architecture)
        self.reference: list[PolicyModel] = []
        """The frozen reference model's chunks; empty where the objective needs none."""
        self.num_updates = 0
        """Optimizer updates that the weights have received: the policy's version."""
        self.verified = ""
        """What the weights were compared with when they were loaded, for people."""
        replays = config.moe.moe_routing_replay != "off"
        self.routing = [Routing(model, layout) for model in self.models] if replays else []
        """Of each chunk: the experts that tokens are routed to, recorded and replayed."""
        # Transformer Engine's ring over the parts of a row has no sliding window.
        windowed_parts = layout.cp_size > 1 and architecture.sliding_window is not None
        self._thd = use_transformer_engine(config.model) and not windowed_parts
        self.objective = build_objective(config.objective)
        chunk_mib = config.train.output_chunk_mib
        self._output = OutputLayer(
            vocab_size=architecture.vocab_size,
            temperature=config.rollout.rollout_temperature,
            group=layout.tp_group,
            context_group=layout.cp_group if layout.cp_size > 1 else None,
            sequence_parallel=layout.sequence_parallel,
            chunk_bytes=None if chunk_mib is None else chunk_mib << 20,
        )
        self._offloading = precision.ActivationOffloading(config.memory)
        self._behaviour_weight: Tensor | None = None
        """The output layer's weight that generated the batch, where the objective needs it."""

    @classmethod
    def load(
        cls,
        config: Config,
        architecture: Architecture,
        layout: Layout,
        device: Device,
        *,
        weights: Path,
        reference: tuple[Architecture, Path] | None = None,
        training: bool = True,
    ) -> Policy:
        """The policy with the weights that training starts from, ready to train.

        Args:
            weights: directory of the checkpoint that holds them.
            reference: both of these of the frozen reference model, where the objective needs one.
            training: False builds neither gradient buffers nor optimizer, for generation and
                scoring alone.
        """
        policy = cls(config, architecture, layout, device)
        # What a resumed run loads here is replaced at once.
        verify, resumed = config.model.verify_weights, config.output.resume
        policy.verified = load(
            weights, architecture, policy.models, layout, verify=verify and not resumed
        )
        if not training:
            # Not frozen: Megatron multiplies frozen weights in another way, with other bits.
            policy.chunks = policy.models
            return policy
        needs = policy.objective.needs
        if needs.reference_logprobs or needs.reference_kl:
            assert reference is not None, "preflight finds it where it is needed"
            other, source = reference
            policy.reference = policy._build(other)
            load(source, other, policy.reference, layout, verify=verify)
            for model in policy.reference:
                model.eval().requires_grad_(False)
        policy._prepare_training()
        return policy

    def _build(self, architecture: Architecture) -> list[PolicyModel]:
        config = self.config
        return build_model(
            architecture,
            config.model,
            self.layout,
            self.device,
            numbers=config.precision,
            memory=config.memory,
        )

    def _prepare_training(self) -> None:
        """Gradient buffers and optimizer; master weights are copied from the loaded weights."""
        megatron_config: Any = self.models[0].config
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=self.config.optimizer.use_distributed_optimizer,
            **precision.of_gradients(self.config),
        )
        self.chunks = [
            DistributedDataParallel(
                config=megatron_config,
                ddp_config=ddp_config,
                module=model,
                disable_bucketing=number > 0,
            )
            for number, model in enumerate(self.models)
        ]
        self.optimizer, self.scheduler = build_optimizer(self.config, self.chunks, self.device)
        megatron_config.finalize_model_grads_func = finalize_model_grads
        megatron_config.grad_scale_func = self.optimizer.scale_loss
        megatron_config.no_sync_func = (
            [chunk.no_sync for chunk in self.chunks]
            if len(self.chunks) > 1
            else self.chunks[0].no_sync
        )

    def pack(self, trajectories: Sequence[Trajectory]) -> list[Row]:
        """This replica's rows of a batch, for `score` and `forward_backward`.

        Under context parallelism they are this rank's parts of its replica's rows.
        """
        return self.own_rows(self.pack_replicas(trajectories))

    def own_rows(self, replicas: Sequence[Sequence[Row]]) -> list[Row]:
        """This rank's part of what `pack_replicas` returned."""
        layout = self.layout
        rows = [share_row(row, layout.cp_rank, layout.cp_size) for row in replicas[layout.dp_rank]]
        if self.config.moe.moe_routing_replay != "rollout":
            return [replace(row, experts=None) for row in rows]
        own = [number for chunk in self.routing for number in chunk.layers]
        return [
            row if row.experts is None else replace(row, experts=row.experts[:, own])
            for row in rows
        ]

    def pack_replicas(self, trajectories: Sequence[Trajectory]) -> list[list[Row]]:
        """The rows of every replica, whole; the same on all ranks.

        All replicas have equally many, and in a pipeline all rows are of one length, as the
        schedule needs.
        """
        layout, config = self.layout, self.config
        return pack(
            trajectories,
            max_tokens=config.train.max_tokens_per_microbatch,
            num_replicas=layout.dp_size,
            # The interleaved schedule takes micro-batches in groups of the pipeline's size.
            rows_multiple=layout.pp_size if layout.vp_size > 1 else 1,
            aggregation=config.objective.loss_aggregation,
            horizon=config.loss_token_horizon,
            pad_multiple=self.row_multiple,
            sequence_multiple=self._shape.sequence_multiple,
            one_length=layout.pp_size > 1,
            attention=attention_cost(self.architecture),
        )

    @property
    def row_multiple(self) -> int:
        """What the tokens of a row are a multiple of.

        Context parallelism shares them out, and sequence parallelism those of a rank.
        """
        return self._shape.row_multiple(self.config.precision.row_multiple)

    @property
    def _shape(self) -> Shape:
        return Shape.of(self.config.parallel, self.layout.world_size)

    @torch.no_grad()
    def annotate(self, updates: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The rows of a batch's updates with what training needs of the policy as it is now.

        To be called before the first update of the batch. On the last stage every row receives the
        trainer's log-probs, the reference model's, and the hidden states of those whose whole
        distribution the objective compares with; on every stage, with `--moe-routing-replay score`,
        the experts that its tokens were routed to.

        Raises:
            RolloutError: a behaviour log-prob is not finite: the sampler gave the token it drew no
                probability.
        """
        needs = self.objective.needs
        if needs.behaviour_l2 and self.layout.is_last_stage:
            self._behaviour_weight = self.models[-1].output_weight().detach().clone()
        annotated = []
        for chunk in self.chunks:
            chunk.eval()
        for rows in updates:
            for row in rows:
                check_finite(
                    row,
                    row.behaviour_logprobs,
                    "the behaviour policy's",
                    "the sampler gave it no probability; look at the engine or the rollouts file",
                )
            taken: list[list[Tensor]] = []
            if self.config.moe.moe_routing_replay == "score":
                taken = [[] for _ in self.chunks]
            old = self._run_schedule(
                self.chunks, rows, self._score_old, forward_only=True, taken=taken
            )
            known = old or [{}] * len(rows)
            if taken:
                experts = [torch.cat(parts, 1) for parts in zip(*taken, strict=True)]
                known = [a | {"experts": b} for a, b in zip(known, experts, strict=True)]
            if self.reference:
                found = self._run_schedule(
                    self.reference, rows, self._score_reference, forward_only=True
                )
                known = [a | b for a, b in zip(known, found or known, strict=True)]
            annotated.append(
                [replace(row, **fields) for row, fields in zip(rows, known, strict=True)]
            )
        return annotated

    # The two verbs of a training step.

    def forward_backward(self, rows: Sequence[Row]) -> tuple[float, TokenDiagnostics | None]:
        """Gradients of the objective over this replica's rows, and all replicas' through Megatron.

        Returns:
            The global loss on every rank, and on the last stage the diagnostics of the rows' loss
            tokens (None elsewhere).
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for routing in self.routing:
            routing.forget()
        with self._offloading.step(len(rows)):
            outputs = self._run_schedule(self.chunks, rows, self._train_loss, forward_only=False)
        loss_sum = torch.zeros(2, dtype=torch.float64)
        diagnostics = None
        if self.layout.is_last_stage:
            loss_sum[0] = sum(float(loss) for loss, _ in outputs)
            loss_sum[1] = sum(row.num_items for row in rows)
            diagnostics = TokenDiagnostics.cat([tokens for _, tokens in outputs])
        if self.layout.tp_rank:
            loss_sum.zero_()
        dist.all_reduce(loss_sum, group=self.layout.control_group)
        return float(loss_sum[0] / loss_sum[1].clamp(min=1)), diagnostics

    @torch.no_grad()
    def optim_step(self) -> Update:
        """One update with the gradients of `forward_backward`, unless they are not finite."""
        lr = self.optimizer.param_groups[0]["lr"] if self.optimizer.param_groups else 0.0
        bad = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        # All ranks must decide alike: Megatron alone would let one rank's NaN destroy the others.
        finite = self.layout.all_agree(not bad and math.isfinite(grad_norm))
        if finite:
            clip = self.config.optimizer.clip_grad
            if clip > 0:
                clip_gradients(self.optimizer, clip, grad_norm)
            self.optimizer.step_with_ready_grads()
            self.num_updates += 1
        self.scheduler.step(increment=1)
        return Update(grad_norm, lr, skipped=not finite)

    def take_routing_differences(self) -> float | None:
        """Since the last call, the share of replayed choices of experts, one per layer and loss
        token, that the routers would have made otherwise; collective, None without replay."""
        if not self.routing:
            return None
        counts = [routing.take_counts() for routing in self.routing]
        totals = torch.tensor(counts, dtype=torch.float64).sum(0)
        dist.all_reduce(totals, group=self.layout.control_group)
        return float(totals[0] / totals[1].clamp(min=1))

    @torch.no_grad()
    def score(
        self, rows: Sequence[Row], *, temperature: float | None = None, untruncated: bool = False
    ) -> list[TokenScores]:
        """Log-probs and entropy of each row's loss tokens; on the last stage, else empty.

        Args:
            rows: as `pack` makes them.
            temperature: above 0; None is the one that responses are sampled at.
            untruncated: over the whole vocabulary, whatever ids the rows say were kept.
        """
        for chunk in self.chunks:
            chunk.eval()
        layer = self._output
        if temperature is not None:
            layer = replace(layer, temperature=temperature)
        if untruncated:
            rows = [replace(row, kept_ids=None) for row in rows]
        return self._run_schedule(self.chunks, rows, partial(self._score, layer), forward_only=True)

    # What the verbs share.

    def _run_schedule(
        self,
        chunks: Sequence[Any],
        rows: Sequence[Row],
        loss_func: Any,
        *,
        forward_only: bool,
        taken: Sequence[list[Tensor]] = (),
    ) -> list:
        """What `loss_func` makes of each row; on stages but the last, [].

        Args:
            taken: of each chunk; receives, row by row, the experts that tokens were routed to.
        """
        device = self.device.torch
        local = [to_device(row, device) for row in rows]
        # Each chunk of an interleaved schedule reads the same rows at its own pace.
        iterators = [iter(local) for _ in chunks]
        schedule: Any = get_forward_backward_func()
        return schedule(
            forward_step_func=partial(self._forward_step, loss_func, taken),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=[*chunks] if len(chunks) > 1 else chunks[0],
            num_microbatches=len(rows),
            # Megatron divides it by the sizes of CP, and TP under SP, for what travels.
            seq_length=rows[0].tokens.numel() * self.layout.cp_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward_step(self, loss_func, taken, rows: Iterator[Row], chunk, *_):
        row = next(rows)
        number = self.chunks.index(chunk) if self.routing and chunk in self.chunks else None
        if number is not None:
            before = sum(len(routing.layers) for routing in self.routing[:number])
            routing = self.routing[number]
            own = slice(before, before + len(routing.layers))
            experts = None if row.experts is None else row.experts[:, own]
            routing.begin(experts, counted=row.loss_index, record=bool(taken))
        hidden = chunk(row.tokens, row.positions, self._layout_of(row))
        if number is not None and taken:
            # As the rows: on the host until their turn comes.
            taken[number].append(self.routing[number].recorded().cpu())
        return hidden, partial(loss_func, row)

    def _layout_of(self, row: Row) -> PackedSeqParams:
        layout, count = self.layout, row.tokens.numel()
        # A row that is not shared out is computed by each context-parallel rank for itself.
        whole = layout.cp_size > 1 and row.share is None
        if not self._thd or whole:
            group = None if row.share is None else layout.cp_group
            return row_layout(row.cu_seqlens, count, group)
        # Transformer Engine must see every token in a sequence: padding becomes the last one.
        ends = sequence_bounds(row.cu_seqlens, count * layout.cp_size)
        bounds = torch.tensor(ends, dtype=torch.int32, device=row.tokens.device)
        longest = int((bounds[1:] - bounds[:-1]).max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    # What the last stage makes of its hidden states [S, 1, H], under SP [S / tp, 1, H].

    def _score(self, layer: OutputLayer, row: Row, hidden: Tensor):
        scores = score(row, hidden[:, 0], self.models[-1].output_weight(), layer)
        return hidden.new_zeros(()), row_count(row, hidden), scores

    def _score_old(self, row: Row, hidden: Tensor):
        loss, count, scores = self._score(self._output, row, hidden)
        known = {"old_logprobs": scores.logprobs}
        if self.objective.needs.behaviour_l2:
            known["behaviour_hidden"] = self._output.all_tokens(hidden[:, 0])[row.loss_index]
        return loss, count, known

    def _score_reference(self, row: Row, hidden: Tensor):
        weight, known = self.reference[-1].output_weight(), {}
        if self.objective.needs.reference_logprobs:
            known["reference_logprobs"] = score(row, hidden[:, 0], weight, self._output).logprobs
        if self.objective.needs.reference_kl:
            known["reference_hidden"] = self._output.all_tokens(hidden[:, 0])[row.loss_index]
        return hidden.new_zeros(()), row_count(row, hidden), known

    def _train_loss(self, row: Row, hidden: Tensor):
        model = self.models[-1]
        weight = model.output_weight()
        others = {
            "behaviour_weight": self._behaviour_weight,
            "reference_weight": self.reference[-1].output_weight() if self.reference else None,
        }
        if self.config.train.fused_output:
            # Into Megatron's gradient buffer, past autograd: one weight-sized fp32 buffer less.
            loss, diagnostics = fused_loss(
                row, hidden[:, 0], weight, self._output, self.objective,
                weight_grad=weight.main_grad, **others,
            )  # fmt: skip
        else:
            # fp32 as in `gemm.project`, or the ratio of a fresh token would not be 1 in bf16.
            rows = hidden[:, 0].float()
            if self.layout.sequence_parallel:
                rows = gather_from_sequence_parallel_region(rows)[row.loss_index]
            else:
                rows = copy_to_tensor_model_parallel_region(rows[row.loss_index])
            logits = torch.nn.functional.linear(rows, weight.float())
            loss, diagnostics = plain_loss(row, logits, self._output, self.objective, **others)
        return loss, row_count(row, hidden), (loss.detach(), diagnostics)


def row_count(row: Row, like: Tensor) -> Tensor:
    """`num_items` as Megatron adds it up: an integer on the model's device."""
    return torch.tensor(row.num_items, dtype=torch.int, device=like.device)
