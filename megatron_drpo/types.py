"""The records that travel along the data flow, one per arrow; frozen, and never changed downstream.

    Prompt -> Rollout -> Trajectory -> Row

Dims: P prompt tokens, R response tokens, S tokens of a row, N sequences of a row, T the row's loss
tokens (response tokens that the policy is trained on), K the behaviour policy's likeliest ids, H
the hidden size. Token ids are int64, log-probs fp32 and natural.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # reward workers import this module, and need no torch
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
"""`stop`: a stop id or a stop string ended the response; `length`: its limit did; `abort`: it was
broken off, and can be continued."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question, as read from one line of a prompts file.

    Example:
        Prompt(id="train.jsonl:7", text="12+30=", token_ids=tensor([5, 6, 14, 7, 4, 15]),
               answer="42", metadata={"level": 2})
    """

    id: str
    """Unique within its file: the line's own `id`, else `FILE:LINE`."""
    text: str
    """What the model sees, after the chat template if one is applied."""
    token_ids: Tensor
    """int64 [P]."""
    answer: str | None
    """The reference answer that a reward compares with, if the line has one."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The line's remaining fields, handed to the user's reward as they are."""


@dataclass(frozen=True, eq=False)
class KeptIds:
    """The ids that top-k and top-p left each of R tokens to be drawn from, laid end to end.

    Example: KeptIds(ids=tensor([8, 3, 6]), counts=tensor([2, 1])): the first token was 8 or 3, the
    second could only be 6.
    """

    ids: Tensor
    """int32 [sum of counts], those of one token next to each other, the likeliest first."""
    counts: Tensor
    """int64 [R]; 0 where nothing was cut: the law covers the whole vocabulary."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response, with the log-probs of the law it was really drawn from.

    Example:
        Rollout(prompt=Prompt(...), sample=3, response_ids=tensor([8, 6, 2]),
                behaviour_logprobs=tensor([-0.21, -0.05, -0.01]), finish_reason="stop",
                policy_version=4, response_text="42")
    """

    prompt: Prompt
    sample: int
    """Number of this sample within its group, 0 to samples-per-prompt - 1."""
    response_ids: Tensor
    """int64 [R], the stop id included when there was one; R >= 1."""
    behaviour_logprobs: Tensor
    """fp32 [R], log mu of each response token after temperature, top-k and top-p; <= 0."""
    finish_reason: FinishReason
    policy_version: int
    """Number of optimizer updates that the weights which drew the first token had received; no
    later token is older."""
    response_text: str
    """The response decoded without special tokens."""
    topk_ids: Tensor | None = None
    """int64 [R, K]: at each token, the ids that mu found likeliest (`--rollout-topk`)."""
    topk_logprobs: Tensor | None = None
    """fp32 [R, K], their log-probs under mu."""
    kept_ids: KeptIds | None = None
    """Of R tokens, where sampling was truncated; training renormalises over the same ids."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """(tokens, policy version), in order, where the weights changed on the way; () if they did
    not."""
    loss_mask: Tensor | None = None
    """bool [R]; False where the policy did not write the token (a tool's answer, say): it is seen
    but not trained on, and whatever `behaviour_logprobs` holds there is not looked at."""
    experts: Tensor | None = None
    """uint8 or int16 [P + R - 1, layers, k]: the experts that every token of prompt and response
    but the last was routed to, with `--moe-routing-replay rollout`."""

    @property
    def name(self) -> str:
        """What errors and rows call it; unique within a batch."""
        return f"sample {self.sample} of prompt {self.prompt.id}"

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """`version_spans` of any rollout: (tokens, policy version), all tokens covered."""
        return self.version_spans or ((self.response_ids.numel(), self.policy_version),)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt.token_ids.numel() + self.response_ids.numel()

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that the policy is trained on."""
        mask = self.loss_mask
        return self.response_ids.numel() if mask is None else int(mask.sum())


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A rollout with its reward and its advantage over the other samples of the same prompt.

    Example: Trajectory(rollout=Rollout(...), reward=1.0, advantage=0.625)
    """

    rollout: Rollout
    reward: float
    """NaN where the reward failed on this sample, which then has advantage 0."""
    advantage: float
    """Constant over the response's tokens."""


@dataclass(frozen=True, eq=False)
class RowShare:
    """Which part of a row a context-parallel rank holds (`context_parallel.share_row`).

    Each sequence, padded to a multiple of 2 * cp_size, is cut into as many equal pieces, of which
    rank r has number r and number 2 * cp_size - 1 - r: attention then costs every rank the same.
    What follows the last sequence is cut like one.

    Example, the row of two sequences of 4 tokens, loss tokens at 1, 2 and 6, cp_size 2, rank 0:
        index              [0, 3, 4, 7]     # rank 1: [1, 2, 5, 6]
        loss_places        []               # rank 1: [0, 1, 2], at `loss_index` [0, 1, 3]
        whole_sequence     [0, 0, 1]
    """

    index: Tensor
    """int64 [S / cp], ascending: where this rank's tokens are in the whole row."""
    loss_places: Tensor
    """int64 [T]: number of each of this rank's loss tokens among those of the whole row."""
    whole_sequence: Tensor
    """int64 [all loss tokens of the row]: `Row.sequence` of the whole row."""


@dataclass(frozen=True, eq=False)
class Row:
    """Several sequences laid end to end: what one micro-batch's forward pass sees.

    Sequence n occupies `tokens[cu_seqlens[n] : cu_seqlens[n + 1]]`; what follows
    `cu_seqlens[N]` is padding that belongs to no sequence. A row without any sequence is allowed
    (a rank that has nothing left still takes part in the step) and contributes zero.

    Example, prompt [5, 6] with response [8, 2] and prompt [7] with response [2], padded to 8:
        tokens             [5, 6, 8, 2, 7, 2, 0, 0]
        positions          [0, 1, 2, 3, 0, 1, 0, 0]
        cu_seqlens         [0, 4, 6]
        loss_index         [1, 2, 4]        # the position whose output predicts ...
        targets            [8, 2, 2]        # ... this token
        sequence           [0, 0, 1]
        policy_versions    [4, 4, 4]
        num_items          3 for token-mean, 2 for the seq-mean aggregations
    """

    tokens: Tensor
    """int64 [S]; 0 at padding."""
    positions: Tensor
    """int64 [S], from 0 within each sequence; 0 at padding."""
    cu_seqlens: Tensor
    """int32 [N + 1], from 0."""
    loss_index: Tensor
    """int64 [T], ascending indices into the row."""
    targets: Tensor
    """int64 [T]."""
    behaviour_logprobs: Tensor
    """fp32 [T]."""
    advantages: Tensor
    """fp32 [T]."""
    weights: Tensor
    """fp32 [T], the aggregation's weight of each token; the loss is
    `sum(weights * token_loss) / sum over all rows and ranks of num_items`."""
    sequence: Tensor
    """int64 [T], the sequence of each loss token, 0 to N - 1."""
    num_items: int
    """This row's share of the global denominator."""
    policy_versions: Tensor
    """int64 [T], of the weights that drew each token."""
    names: tuple[str, ...]
    """[N]: what an error calls each sequence."""
    topk_ids: Tensor | None = None
    """int64 [T, K], if the rollouts carry them."""
    behaviour_topk_logprobs: Tensor | None = None
    """fp32 [T, K]."""
    kept_ids: KeptIds | None = None
    """Of T tokens, if the rollouts carry them: the policy's law is renormalised over these."""
    experts: Tensor | None = None
    """int16 [S, layers, k]: the experts that each token is to be routed to; -1 where the router
    decides."""
    share: RowShare | None = None
    """Set where this is one context-parallel rank's part of a row: all fields are then of that part
    alone, but `cu_seqlens` and `names`, and `num_items` counts on the first of these ranks."""

    # What scoring adds on the last stage, before the first update of the batch.
    old_logprobs: Tensor | None = None
    """fp32 [T], of the trainer's weights then."""
    reference_logprobs: Tensor | None = None
    """fp32 [T], of the frozen reference model."""
    behaviour_hidden: Tensor | None = None
    """[T, H]: the output layer's input under the weights that generated."""
    reference_hidden: Tensor | None = None
    """[T, H]: the same of the reference model."""
