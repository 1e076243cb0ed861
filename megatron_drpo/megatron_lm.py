"""The objective alone, for a training script of one's own around `megatron.training.pretrain`.

Where it fits: L3, beside the training loop and not under it. In: a rollouts file and a model that
Megatron built. Out: what Megatron's schedules ask for: a data set, `forward_step`, `loss_func`
(docs/megatron_lm.md, examples/megatron_lm/). Nothing here imports megatron or reads its global
arguments; what is needed of it is read off the model.

A sample is one sequence, padded at its end to Megatron's `--seq-length`, where no token looks. A
micro-batch of B of them is a `types.Row` whose sequences take up S tokens each, so that losses,
diagnostics and context parallelism are those of the training loop itself.

The loss is one sum over one global denominator: `loss_func` returns `sum(weights * losses)` and
`num_items`; with `--calculate-per-token-loss` Megatron adds both over micro-batches and over data-
and context-parallel ranks, and divides the gradients once. Without that flag it would average the
micro-batches' means, which is another objective, and is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_drpo.advantages import make_trajectories
from megatron_drpo.config import AdvantageConfig, Aggregation, ObjectiveConfig
from megatron_drpo.context_parallel import share_row
from megatron_drpo.errors import ConfigError, DataError
from megatron_drpo.metrics import TokenDiagnostics, trust_region_statistics
from megatron_drpo.objectives import Objective
from megatron_drpo.packing import pack
from megatron_drpo.prompts import raise_problems
from megatron_drpo.rollout.files import read_header, read_rollouts
from megatron_drpo.row_loss import OutputLayer, check_finite, fused_loss, plain_loss, to_device
from megatron_drpo.types import Row, Trajectory

Report = dict[str, Tensor]
"""By name: fp32 [2], a sum and what it is to be divided by once both are added over micro-batches
and ranks, as Megatron does."""
LossFunc = Callable[[Tensor], tuple[Tensor, Tensor, Report]]

_BY_TOKEN = ("behaviour_logprobs", "advantages", "weights")
_OPTIONAL = ("old_logprobs", "reference_logprobs", "topk_ids", "behaviour_topk_logprobs")
_REPORTED = (
    "weight/mean",
    "weight/below_0",
    "weight/below_half",
    "ratio/mean",
    "ratio/beyond_limit_share",
    "divergence/binary_tv",
    "divergence/k3",
    "entropy/mean",
)
"""Of `trust_region_statistics`, those that are means over tokens, and so can be added up."""


class RolloutDataset(Dataset[dict[str, Any]]):
    """The responses of a rollouts file as Megatron's samples: one per response, in their order.

    Sample i is a dict that torch's default collation makes a micro-batch of; with S the length:
        tokens, labels        int64 [S]: the sequence but its last token, and but its first
        position_ids          int64 [S]
        loss_mask             fp32 [S]: 1 where the label is a token that the policy is trained on
        behaviour_logprobs    fp32 [S], of the label, where the mask is 1; 0 elsewhere
        advantages, weights   fp32 [S], the same
        num_items             int64 (), the sample's share of the global denominator
        name                  what an error calls it
    and where the file has them `topk_ids` (int64 [S, K]), `behaviour_topk_logprobs` (fp32 [S, K]).

    Samples of one prompt lie next to each other, so a global batch that is a multiple of
    `samples_per_prompt` holds whole groups.

    Args:
        path: a rollouts file or a directory of them (docs/rollouts.md), with rewards.
        seq_length: S, Megatron's `--seq-length`; a sequence has at most S + 1 tokens.
        vocab_size: number of token ids, without Megatron's padding.
        samples_per_prompt: size of a group.
        temperature: that `forward_step` is given; a header of the file must name the same.
        objective: its aggregation says what the weights are and what is counted.
        advantage: the estimator.

    Raises:
        DataError: the file cannot be read or used; names file, line and field.
        ConfigError: a divisor is needed that neither `objective` nor the file's header has.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seq_length: int,
        vocab_size: int,
        samples_per_prompt: int,
        temperature: float = 1.0,
        objective: ObjectiveConfig | None = None,
        advantage: AdvantageConfig | None = None,
    ) -> None:
        objective = ObjectiveConfig() if objective is None else objective
        header = read_header(path)
        if header is not None and header.temperature != temperature:
            raise DataError(
                f"{path}: was sampled with temperature {header.temperature}, but temperature is "
                f"{temperature}, and its log-probs would be of another law; use "
                f"{header.temperature}"
            )
        pairs = read_rollouts(
            path,
            vocab_size=vocab_size,
            max_length=seq_length + 1,
            samples_per_prompt=samples_per_prompt,
        )
        rollouts = [rollout for rollout, _ in pairs]
        rewards = [reward for _, reward in pairs if reward is not None]
        problems = []
        if len(rewards) < len(rollouts):
            problems.append(
                f"{path}: has no rewards; give each line a `reward` (tools/generate_rollouts.py "
                "with --reward does)"
            )
        if any(rollout.kept_ids is not None for rollout in rollouts):
            problems.append(
                f"{path}: was sampled with top-p or top-k (`kept_ids`), and the log-probs of a "
                "micro-batch are of the whole vocabulary; sample with top_p 1 and top_k 0, or "
                "train with megatron_drpo itself"
            )
        raise_problems(problems)
        self.trajectories: Sequence[Trajectory] = make_trajectories(
            rollouts,
            rewards,
            samples_per_prompt,
            AdvantageConfig() if advantage is None else advantage,
        )
        """What the samples are made of."""
        self.seq_length = seq_length
        self._aggregation: Aggregation = objective.loss_aggregation
        horizon = objective.loss_token_horizon
        if horizon is None and header is not None:
            horizon = header.max_response_length
        if horizon is None and self._aggregation == "seq-mean-token-sum-norm":
            raise ConfigError(
                "loss_token_horizon: is not set, and loss_aggregation seq-mean-token-sum-norm "
                f"divides by it; set it to the limit of tokens that responses had ({path} has no "
                "header that says so)"
            )
        self._horizon = horizon or 1  # of aggregations that do not read it

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = self.seq_length + 1
        ((row,),) = pack(
            [self.trajectories[index]],
            max_tokens=size,
            num_replicas=1,
            aggregation=self._aggregation,
            horizon=self._horizon,
            pad_multiple=size,
        )

        def dense(values: Tensor) -> Tensor:
            out = values.new_zeros((size - 1, *values.shape[1:]))
            out[row.loss_index] = values
            return out

        sample = {
            "tokens": row.tokens[:-1],
            "labels": row.tokens[1:],
            "position_ids": row.positions[:-1],
            "loss_mask": dense(torch.ones_like(row.weights)),
            "num_items": torch.tensor(row.num_items),
            "name": row.names[0],
        }
        found = {name: getattr(row, name) for name in (*_BY_TOKEN, *_OPTIONAL)}
        return sample | {name: dense(v) for name, v in found.items() if v is not None}


def micro_batch(
    batch: Mapping[str, Any], *, device: torch.device, cp_rank: int = 0, cp_size: int = 1
) -> Row:
    """The row that a micro-batch is, or this context-parallel rank's part of it.

    `row.tokens.view(B, -1)` and `row.positions.view(B, -1)` are what the model takes, B being
    `len(row.names)`; loss token t is predicted at place `row.loss_index[t]` of them, laid end to
    end.

    Args:
        batch: the tensors of `RolloutDataset`, [B, S] each and [B] for `num_items`; whole, the same
            on the tensor- and context-parallel ranks of a replica. `old_logprobs` and
            `reference_logprobs`, fp32 [B, S], may be added: the label's log-prob under the trainer
            before the batch's first update, and under a frozen reference model.
        device: where the row's tensors go.
        cp_rank, cp_size: place in the context-parallel group, which shares a sequence out as
            Megatron does.

    Raises:
        ConfigError: the batch holds packed sequences, lacks a tensor, or cannot be shared out.
        RolloutError: a behaviour log-prob is not finite.
    """
    if batch.get("cu_seqlens") is not None:
        raise ConfigError(
            "the batch has cu_seqlens: packed sequences are not supported here, where each of the "
            "B samples is one sequence; leave them apart, or train with megatron_drpo itself"
        )
    needed = ("tokens", "labels", "position_ids", "loss_mask", "num_items", *_BY_TOKEN)
    if missing := [name for name in needed if name not in batch]:
        raise ConfigError(
            f"the batch has no {', '.join(missing)}: must hold {', '.join(needed)} "
            "(megatron_drpo.megatron_lm.RolloutDataset makes them)"
        )
    count, length = batch["tokens"].shape
    if cp_size > 1 and length % (2 * cp_size):
        raise ConfigError(
            f"--seq-length {length}: must be a multiple of {2 * cp_size} with "
            f"--context-parallel-size {cp_size}"
        )
    place = batch["loss_mask"].flatten().nonzero().flatten()

    def at(name: str) -> Tensor:
        return batch[name].flatten(0, 1)[place]

    fields: dict[str, Any] = {name: at(name) for name in (*_BY_TOKEN, *_OPTIONAL) if name in batch}
    row = Row(
        tokens=batch["tokens"].flatten(),
        positions=batch["position_ids"].flatten(),
        cu_seqlens=torch.arange(0, count * length + 1, length, dtype=torch.int32),
        loss_index=place,
        targets=at("labels"),
        sequence=place // length,
        num_items=int(batch["num_items"].sum()),
        policy_versions=torch.zeros_like(place),  # which nothing reads here
        names=tuple(batch.get("name", (f"sample {number}" for number in range(count)))),
        **fields,
    )
    check_finite(
        row,
        row.behaviour_logprobs,
        "the behaviour policy's",
        "the sampler gave it no probability; look at what made the batch",
    )
    return to_device(share_row(row, cp_rank, cp_size), device)


def output_layer(model: Any, *, vocab_size: int, temperature: float = 1.0) -> OutputLayer:
    """How the model's hidden states become probabilities: its groups, its vocabulary.

    Args:
        model: Megatron's GPTModel (0.16 to 0.19), wrapped or not.
        vocab_size: number of token ids; Megatron's padding above receives no probability.
        temperature: that responses were sampled at.

    Raises:
        ConfigError: the model is trained in a way under which the loss would be another one.
    """
    model = _unwrapped(model)
    config, groups = model.config, model.pg_collection
    problems = []
    if not config.calculate_per_token_loss:
        problems.append(
            "--calculate-per-token-loss: is off, so Megatron would take the mean of the "
            "micro-batches' means, which depends on how the batch is split; add it"
        )
    if config.mtp_num_layers:
        problems.append(
            f"--mtp-num-layers {config.mtp_num_layers}: multi-token prediction has a loss of its "
            "own, which is not the objective; drop it"
        )
    if vocab_size > model.vocab_size:
        problems.append(
            f"vocab_size {vocab_size}: the model has {model.vocab_size} ids, padding included; "
            "give the tokenizer's number"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return OutputLayer(
        vocab_size=vocab_size,
        temperature=temperature,
        group=groups.tp if groups.tp.size() > 1 else None,
        context_group=groups.cp if groups.cp.size() > 1 else None,
        sequence_parallel=config.sequence_parallel,
    )


def loss_func(
    row: Row, layer: OutputLayer, objective: Objective, output_tensor: Tensor
) -> tuple[Tensor, Tensor, Report]:
    """What Megatron's schedules call on the last stage, the first three arguments being bound.

    Args:
        row: of `micro_batch`.
        layer: of `output_layer`.
        objective: of `objectives.build_objective`.
        output_tensor: [B, S, V/tp] logits of the row, this tensor-parallel rank's columns of the
            vocabulary (`runtime_gather_output=False`), of any float type.

    Returns:
        `sum(weights * losses)`, 0-dim; `num_items`, int; and the means over all loss tokens of what
        the objective did, by the names of docs/dashboard.md, beside `NAME loss`.

    Raises:
        ConfigError: the objective reads what the batch does not hold.
        RolloutError: a log-prob is not finite.
    """
    row = _ready(row, objective)
    logits = output_tensor.flatten(0, 1)[row.loss_index]
    loss, diagnostics = plain_loss(row, logits, layer, objective)
    return loss, _count(row, loss), _report(row, objective, loss, diagnostics)


def forward_step(
    data_iterator: Iterator[Mapping[str, Any]],
    model: Any,
    *,
    objective: Objective,
    vocab_size: int,
    temperature: float = 1.0,
    fused: bool = False,
) -> tuple[Tensor, LossFunc]:
    """`forward_step_func` of `pretrain` and of the schedules, its keywords bound by `partial`.

    Every rank reads the micro-batch itself (`is_distributed = True` on the function that makes the
    data sets); stages but the last use its shape alone.

    Args:
        data_iterator: of micro-batches, see `micro_batch`.
        model: the chunk, as Megatron hands it over; its attention is causal without a mask.
        objective: of `objectives.build_objective`.
        vocab_size, temperature: see `output_layer`.
        fused: compute the loss in the output layer, chunk by chunk, so that no logits are held;
            megatron-core 0.18 and later.

    Returns:
        Logits [B, S, V/tp] (hidden states on other stages; the loss, where fused), and their
        `loss_func`.

    Raises:
        ConfigError: as `micro_batch`, `output_layer` and `loss_func`; `fused`, which this
            megatron-core or model has no place for.
    """
    inner = _unwrapped(model)
    layer = output_layer(inner, vocab_size=vocab_size, temperature=temperature)
    cp = inner.pg_collection.cp
    device = next(inner.parameters()).device
    row = micro_batch(next(data_iterator), device=device, cp_rank=cp.rank(), cp_size=cp.size())
    count = len(row.names)
    inputs = (row.tokens.view(count, -1), row.positions.view(count, -1), None)
    if not fused:
        logits = model(*inputs, runtime_gather_output=False)
        return logits, partial(loss_func, row, layer, objective)
    _check_fusible(inner)
    row, said = _ready(row, objective), []
    process = partial(_fused_output, row=row, layer=layer, objective=objective, said=said)
    return model(*inputs, output_processor=process), partial(_fused_loss_func, row, objective, said)


def _fused_output(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    row: Row,
    layer: OutputLayer,
    objective: Objective,
    said: list[TokenDiagnostics],
    **_: Any,
) -> Tensor:
    """`output_processor` of GPTModel: from hidden states [S, B, H], [S/tp, B, H] under sequence
    parallelism, to the loss; `said` receives the diagnostics."""
    weight = output_layer.weight if output_weight is None else output_weight
    # Autograd carries the weight's gradient, so that whatever Megatron hooks to it sees it.
    loss, diagnostics = fused_loss(
        _sequence_first(row), hidden_states.flatten(0, 1), weight, layer, objective
    )
    said.append(diagnostics)
    return loss


def _sequence_first(row: Row) -> Row:
    """The row with its places numbered as Megatron lays out hidden states: the samples' first
    tokens next to each other, then the second ones. Its loss tokens stay in their order."""
    count = len(row.names)
    length = row.tokens.numel() // count

    def turned(values: Tensor) -> Tensor:
        return values.view(count, length).T.flatten()

    index = row.loss_index % length * count + row.loss_index // length
    return replace(
        row, tokens=turned(row.tokens), positions=turned(row.positions), loss_index=index
    )


def _fused_loss_func(
    row: Row, objective: Objective, said: Sequence[TokenDiagnostics], output_tensor: Tensor
) -> tuple[Tensor, Tensor, Report]:
    report = _report(row, objective, output_tensor, said[0])
    return output_tensor, _count(row, output_tensor), report


def _ready(row: Row, objective: Objective) -> Row:
    """The row as `row_loss` takes it; ConfigError if the objective reads what is not there."""
    needs, name = objective.needs, objective.name
    if needs.behaviour_l2 or needs.reference_kl:
        what = "behaviour policy" if needs.behaviour_l2 else "reference model"
        raise ConfigError(
            f"objective {name}: reads the whole distribution of the {what} "
            f"({'drpo_penalty' if needs.behaviour_l2 else 'kl_estimator'} full), which takes its "
            "hidden states; choose another, or train with megatron_drpo itself"
        )
    read = {
        "old_logprobs": objective.decoupled or needs.sequence_weights,
        "reference_logprobs": needs.reference_logprobs,
        "topk_ids": needs.topk,
        "behaviour_topk_logprobs": needs.topk,
    }
    if missing := [field for field, used in read.items() if used and getattr(row, field) is None]:
        raise ConfigError(
            f"objective {name}: reads {', '.join(missing)}, and the batch has none; add them to "
            "it, or choose settings that do without"
        )
    if row.old_logprobs is None:  # then nothing reads them but `drift/*`, which is not reported
        return replace(row, old_logprobs=row.behaviour_logprobs)
    return row


def _report(row: Row, objective: Objective, loss: Tensor, diagnostics: TokenDiagnostics) -> Report:
    """The same names for every micro-batch, one without tokens included, as Megatron needs."""
    count = diagnostics.logprobs.numel()
    means = trust_region_statistics(diagnostics, ObjectiveConfig.log_ratio_limit)
    names = [*_REPORTED, *(f"objective/{name}" for name in diagnostics.objective)]
    sums = loss.new_tensor([[means.get(name, 0.0) * count, count] for name in names])
    items = loss.new_tensor(row.num_items)
    total = torch.stack([loss.detach(), items])
    return {f"{objective.name} loss": total} | dict(zip(names, sums, strict=True))


def _count(row: Row, like: Tensor) -> Tensor:
    return torch.tensor(row.num_items, dtype=torch.int, device=like.device)


def _check_fusible(model: Any) -> None:
    if "output_processor" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            "fused: this model's forward has no output_processor, which megatron-core has from "
            "0.18 on; use fused=False"
        )
    if getattr(model.config, "use_mup", False):
        raise ConfigError("fused: with --use-mup Megatron scales the logits; use fused=False")


def _unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and Float16Module."""
    while hasattr(model, "module"):
        model = model.module
    return model
