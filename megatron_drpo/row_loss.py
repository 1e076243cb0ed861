"""What the last pipeline stage makes of a row: from hidden states to scores, or to the loss.

Where it fits: L1, between the pipeline's forward pass and its backward pass. In: a `types.Row`, the
decoder's hidden states at its positions and the output layer's weight. Out: log-probs and entropy
(`score`), or the row's loss with the diagnostics of its tokens (`loss`). It joins the objective,
which knows tokens only, to `vocab_parallel`, which knows logits only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.errors import RolloutError
from megatron_drpo.metrics import TokenDiagnostics
from megatron_drpo.objectives import Objective, Tokens
from megatron_drpo.types import Row, RowShare
from megatron_drpo.vocab_parallel import (
    Other,
    Scores,
    TokenScores,
    divergence,
    fused_linear_objective,
    kept_to,
    linear_scores,
    logprobs_and_entropy,
    outside,
    project,
)
from megatron_drpo.vocab_parallel.shard import gather_ranks, shard_of


@dataclass(frozen=True)
class OutputLayer:
    """How hidden states become probabilities; the same for scoring and training."""

    vocab_size: int
    temperature: float
    group: dist.ProcessGroup | None
    """The tensor-parallel group, None for one rank."""
    context_group: dist.ProcessGroup | None = None
    """The ranks that hold the other parts of each row, None where a rank has whole rows."""
    sequence_parallel: bool = False
    """Hidden states come split over `group`, by tokens."""
    chunk_bytes: int | None = None
    """Budget of the fused sweep, see `fused_linear_objective`."""

    def arguments(self) -> dict[str, Any]:
        """What every function of `vocab_parallel` takes."""
        return {
            "vocab_size": self.vocab_size,
            "temperature": self.temperature,
            "group": self.group,
        }

    def sweep_arguments(self) -> dict[str, Any]:
        """And what those take which begin with hidden states."""
        return {
            **self.arguments(),
            "sequence_parallel": self.sequence_parallel,
            "chunk_bytes": self.chunk_bytes,
        }

    def all_tokens(self, hidden: Tensor) -> Tensor:
        """[S, H] without gradient: `hidden` of every token, where sequence parallelism split it."""
        return gather_ranks(hidden, self.group).flatten(0, 1) if self.sequence_parallel else hidden


def to_device(row: Row, device: torch.device) -> Row:
    """The row with its tensors on `device`."""
    tensors = {name: value for name, value in vars(row).items() if isinstance(value, Tensor)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
    if row.kept_ids is not None:
        moved["kept_ids"] = kept_to(row.kept_ids, device)
    if row.share is not None:
        share = {name: value.to(device) for name, value in vars(row.share).items()}
        moved["share"] = RowShare(**share)
    return replace(row, **moved)


def score(row: Row, hidden: Tensor, weight: Tensor, layer: OutputLayer) -> TokenScores:
    """Log-probs and entropy of the row's loss tokens, without gradient.

    Args:
        hidden: [S, H], the decoder's output; [S/tp, H] of this rank's with `sequence_parallel`.
        weight: [V/tp, H].
    """
    return linear_scores(
        hidden,
        weight,
        row.targets,
        rows=row.loss_index,
        kept=row.kept_ids,
        **layer.sweep_arguments(),
    )


def fused_loss(
    row: Row,
    hidden: Tensor,
    weight: Tensor,
    layer: OutputLayer,
    objective: Objective,
    *,
    behaviour_weight: Tensor | None = None,
    reference_weight: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, TokenDiagnostics]:
    """`sum(row.weights * losses)`, 0-dim, and the diagnostics; no [T, V/tp] is ever held.

    Args:
        hidden: [S, H] or [S/tp, H] as for `score`, with gradient.
        weight: [V/tp, H] of the output layer, with gradient.
        behaviour_weight, reference_weight: [V/tp, H] of the other models' output layers, where the
            objective needs their whole distributions (`row` has their hidden states).
        weight_grad: fp32 [V/tp, H], see `fused_linear_objective`.

    Raises:
        RolloutError: a log-prob of the policy is not finite.
    """
    known = _known(row, objective, layer, lambda: score(row, hidden, weight, layer).logprobs)
    sources = _distributions(row, objective, behaviour_weight, reference_weight)

    def token_losses(part: slice, scores: Scores) -> Tensor:
        here = {name: value[part] for name, value in known.items()}
        return objective(_tokens(scores, here, list(sources))).losses * row.weights[part]

    result = fused_linear_objective(
        hidden,
        weight,
        _ids(row, objective),
        token_losses,
        rows=row.loss_index,
        kept=row.kept_ids,
        others=list(sources.values()),
        weight_grad=weight_grad,
        **layer.sweep_arguments(),
    )
    return result.loss, _diagnose(row, objective, result.scores, known, list(sources))


def plain_loss(
    row: Row,
    logits: Tensor,
    layer: OutputLayer,
    objective: Objective,
    *,
    behaviour_weight: Tensor | None = None,
    reference_weight: Tensor | None = None,
) -> tuple[Tensor, TokenDiagnostics]:
    """The same from logits [T, V/tp] that somebody else computed and autograd follows back.

    Holds the logits, and overwrites them by their gradient; the cross-check of `fused_loss`.
    """
    cut = None
    if row.kept_ids is not None:
        columns = logits.size(1)
        cut = outside(row.kept_ids, columns, shard_of(columns, layer.vocab_size, layer.group))
        logits = logits.masked_fill(cut, -torch.inf)
    scores = logprobs_and_entropy(
        logits, _ids(row, objective), overwrite_logits=True, **layer.arguments()
    )
    known = _known(row, objective, layer, lambda: _of_sampled(scores.logprobs).detach())
    sources = _distributions(row, objective, behaviour_weight, reference_weight)
    distances = []
    for q in sources.values():
        other = project(q.hidden, q.weight)
        other = other if cut is None else other.masked_fill(cut, -torch.inf)
        # A copy: the backward pass of the log-probs overwrites the logits.
        distances.append(divergence(logits.clone(), other, q.kind, **layer.arguments()))
    everything = Scores(scores.logprobs, scores.entropy, tuple(distances))
    losses = objective(_tokens(everything, known, list(sources))).losses
    detached = Scores(
        scores.logprobs.detach(), scores.entropy.detach(), tuple(d.detach() for d in distances)
    )
    diagnostics = _diagnose(row, objective, detached, known, list(sources))
    return (losses * row.weights).sum(), diagnostics


def check_finite(row: Row, logprobs: Tensor, whose: str, remedy: str) -> None:
    """Refuse a log-prob that is NaN or infinite: a ratio of it means nothing.

    Args:
        logprobs: [T], of the row's loss tokens.
        whose: what the log-probs are.
        remedy: what the user can do.

    Raises:
        RolloutError: names the sequence and the token's place in it.
    """
    bad = (~logprobs.isfinite()).nonzero().flatten()
    if bad.numel():
        first = int(bad[0])
        position = int(row.positions[row.loss_index[first]]) + 1
        raise RolloutError(
            f"{whose} log-prob of token {int(row.targets[first])} at position {position} of "
            f"{row.names[int(row.sequence[first])]} is {float(logprobs[first])} "
            f"({bad.numel()} of {logprobs.numel()} tokens of the row): {remedy}"
        )


def _ids(row: Row, objective: Objective) -> Tensor:
    """[T] the sampled ids, or [T, 1 + K] with the behaviour policy's likeliest after them."""
    if not objective.needs.topk:
        return row.targets
    assert row.topk_ids is not None, "preflight sees to it that rollouts carry them"
    return torch.cat([row.targets[:, None], row.topk_ids], 1)


def _of_sampled(logprobs: Tensor) -> Tensor:
    return logprobs if logprobs.dim() == 1 else logprobs[:, 0]


def _known(
    row: Row, objective: Objective, layer: OutputLayer, logprobs: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """The fields of `Tokens` that are known before the losses; `logprobs` is a sweep of its own."""
    known: dict[str, Tensor | None] = {
        "behaviour_logprobs": row.behaviour_logprobs,
        "advantages": row.advantages,
        "old_logprobs": row.old_logprobs,
        "reference_logprobs": row.reference_logprobs,
    }
    if objective.needs.topk:
        assert row.topk_ids is not None
        known["behaviour_topk_logprobs"] = row.behaviour_topk_logprobs
        known["sampled_in_topk"] = row.topk_ids == row.targets[:, None]
    needs, old = objective.needs, row.old_logprobs
    assert old is not None, "rows are scored before they are trained on"
    if needs.sequences or needs.sequence_weights:
        known["sequence_length"] = _sequence_lengths(row)[row.sequence]
    if needs.sequences:
        anchor = old if objective.decoupled else row.behaviour_logprobs
        known["sequence_log_ratio"] = _mean_of_sequences(row, layer, logprobs() - anchor)
    if needs.sequence_weights:
        log_weight = old - row.behaviour_logprobs
        known["sequence_log_weight"] = _mean_of_sequences(row, layer, log_weight)
    return {name: value for name, value in known.items() if value is not None}


def _sequence_lengths(row: Row) -> Tensor:
    """fp32 [N]: loss tokens of each sequence; a sequence lies in one row, whole."""
    count = row.cu_seqlens.numel() - 1
    sequence = row.sequence if row.share is None else row.share.whole_sequence
    return torch.bincount(sequence, minlength=count).to(row.advantages.dtype)


def _mean_of_sequences(row: Row, layer: OutputLayer, values: Tensor) -> Tensor:
    """fp32 [T]: for each token the mean of `values` [T] over its sequence.

    Summed in the order of the tokens: scattered additions would come out differently on each
    tensor-parallel rank, and a mask at its edge with them. So the values of a row that is shared
    out are put together first, each at its place: the others add zeros to it.
    """
    if row.share is not None:
        whole = values.new_zeros(row.share.whole_sequence.numel())
        whole[row.share.loss_places] = values
        dist.all_reduce(whole, group=layer.context_group)
        values = whole
    if not values.numel():
        return values
    lengths = _sequence_lengths(row)
    means = torch.segment_reduce(values, "mean", lengths=lengths.long())
    return means[row.sequence]


def _distributions(
    row: Row,
    objective: Objective,
    behaviour_weight: Tensor | None,
    reference_weight: Tensor | None,
) -> dict[str, Other]:
    """By field of `Tokens`: the distribution that the policy's is compared with."""
    sources = {}
    if objective.needs.behaviour_l2:
        assert row.behaviour_hidden is not None and behaviour_weight is not None
        sources["behaviour_l2"] = Other(row.behaviour_hidden, behaviour_weight, "l2")
    if objective.needs.reference_kl:
        assert row.reference_hidden is not None and reference_weight is not None
        sources["reference_kl"] = Other(row.reference_hidden, reference_weight, "kl_pq")
    return sources


def _tokens(scores: Scores, known: dict[str, Tensor], distances: list[str]) -> Tokens:
    fields = dict(zip(distances, scores.divergences, strict=True))
    if scores.logprobs.dim() == 2:
        fields["topk_logprobs"] = scores.logprobs[:, 1:]
    return Tokens(logprobs=_of_sampled(scores.logprobs), entropy=scores.entropy, **known, **fields)


@torch.enable_grad()
def _diagnose(
    row: Row, objective: Objective, scores: Scores, known: dict[str, Tensor], distances: list[str]
) -> TokenDiagnostics:
    """The objective once more, on all tokens at once: for what it says, not for its losses."""
    logprobs = _of_sampled(scores.logprobs)
    check_finite(
        row,
        logprobs,
        "the policy's",
        "the model's weights or logits are not finite; lower --lr or resume from an earlier "
        "checkpoint",
    )
    result = objective(_tokens(scores, known, distances))
    return TokenDiagnostics(
        logprobs=logprobs,
        behaviour_logprobs=row.behaviour_logprobs,
        old_logprobs=known["old_logprobs"],
        advantages=row.advantages,
        gradient_weight=result.gradient_weights.detach(),
        entropy=scores.entropy,
        objective={name: value.detach() for name, value in result.diagnostics.items()},
    )
