"""The sequences that both layouts compute: those of a run's first update, recorded or made up."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_drpo.advantages import make_trajectories
from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.collect import Collector
from megatron_drpo.config import Config
from megatron_drpo.errors import ConfigError
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.metrics import PhaseTimer
from megatron_drpo.packing import pack, split_updates
from megatron_drpo.preflight import Inputs
from megatron_drpo.prompts import PromptSampler
from megatron_drpo.types import KeptIds, Rollout, Row, Trajectory
from megatron_drpo.vocab_parallel.gemm import round_up

BEHAVIOUR_NOISE, OLD_NOISE = 0.1, 0.05
"""Standard deviations in nats of what is made up from the trainer's log-probs."""

LARGEST_LOGPROB = -1e-4
"""Of those that are made up, as a law has others to give probability to."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of one update. Their tokens are numbered, one sequence after the other."""

    config: Config
    trajectories: Sequence[Trajectory]
    old_logprobs: Tensor | None = None
    """fp32 [all tokens]: the trainer's before the update, where they are made up."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and response."""
        return [trajectory.rollout.num_tokens for trajectory in self.trajectories]

    @cached_property
    def one_by_one(self) -> list[Row]:
        """Every sequence in a row of its own, all padded to the longest."""
        config = self.config
        size = round_up(max(self.lengths), math.lcm(16, config.precision.row_multiple))
        return [
            pack(
                [trajectory],
                max_tokens=size,
                num_replicas=1,
                aggregation=config.objective.loss_aggregation,
                horizon=config.loss_token_horizon,
                pad_multiple=size,
            )[0][0]
            for trajectory in self.trajectories
        ]

    @cached_property
    def starts(self) -> dict[str, int]:
        """Number of the first token of each sequence, by the name that rows give it."""
        starts = itertools.accumulate(self.lengths, initial=0)
        return dict(zip((row.names[0] for row in self.one_by_one), starts, strict=False))

    @property
    def num_tokens(self) -> int:
        """Prompts included."""
        return sum(self.lengths)

    def numbers(self, row: Row) -> Tensor:
        """int64 [T]: which tokens the loss tokens of a row are."""
        starts = torch.tensor([self.starts[name] for name in row.names], dtype=torch.int64)
        return starts[row.sequence] + row.positions[row.loss_index] + 1


def make_batch(config: Config, inputs: Inputs, policy: Policy) -> Batch:
    """The sequences of the run's first update; the same on every rank, collective.

    Raises:
        ConfigError: the recorded ones teach nothing.
    """
    if inputs.rollouts is None:
        return _with_logprobs(Batch(config, _sequences(config, inputs)), policy)
    rollout = config.rollout
    with contextlib.ExitStack() as background:
        timer = PhaseTimer(inputs.device.synchronize)
        collector = Collector(config, inputs, policy.layout, None, lambda: 0, timer)
        background.callback(collector.close)
        read = collector.collect(0)
    samples = rollout.rollout_samples_per_prompt
    trajectories = make_trajectories(read.rollouts, read.rewards, samples, config.advantage)
    updates, seed = config.train.updates_per_rollout, (config.train.seed, 0)
    batch = Batch(config, split_updates(trajectories, samples, updates, seed)[0])
    if not any(trajectory.advantage for trajectory in batch.trajectories):
        raise ConfigError(
            f"--rollouts-file {rollout.rollouts_file}: in the first update all advantages are 0, "
            "so that there are no gradients to compare; use another file, or --prompts"
        )
    return batch


def _sequences(config: Config, inputs: Inputs) -> list[Trajectory]:
    """The run's first prompts, with responses that nobody gave and no behaviour log-probs yet."""
    rollout, train, parallelism = config.rollout, config.train, config.parallel
    generator = torch.Generator().manual_seed(train.seed)
    per_step, shuffle = rollout.rollout_prompts_per_step, config.data.shuffle_prompts
    sampler = PromptSampler(len(inputs.prompts), per_step, train.seed, shuffle)
    picked = sampler.indices(0)[: per_step // train.updates_per_rollout]
    text = torch.cat([prompt.token_ids for prompt in inputs.prompts])
    unit = 2 * parallelism.context_parallel_size
    budget = train.max_tokens_per_microbatch // unit * unit
    budget = min(budget, inputs.architecture.max_position_embeddings)
    made = []
    for prompt in [inputs.prompts[i] for i in picked]:
        most = min(rollout.rollout_max_response_length, budget - prompt.token_ids.numel())
        for sample in range(rollout.rollout_samples_per_prompt):
            drawn = float(torch.randn((), generator=generator))
            length = min(max(round(most / 4 * math.exp(drawn)), 1), most)
            start = int(torch.randint(text.numel(), (), generator=generator))
            ids = text[(start + torch.arange(length)) % text.numel()]
            anything = torch.randint(inputs.architecture.vocab_size, (length,), generator=generator)
            ids = torch.where(torch.rand(length, generator=generator) < 0.25, anything, ids)
            size = 0.1 + abs(float(torch.randn((), generator=generator)))
            response = Rollout(
                prompt=prompt,
                sample=sample,
                response_ids=ids,
                behaviour_logprobs=torch.zeros(length),
                finish_reason="length",
                policy_version=0,
                response_text="",
                kept_ids=_kept(config, ids, inputs.architecture.vocab_size),
                experts=_experts(config, inputs.architecture, prompt.token_ids, ids),
            )
            made.append(Trajectory(response, 0.0, -size if len(made) % 2 else size))
    return made


def _kept(config: Config, ids: Tensor, vocab_size: int) -> KeptIds | None:
    """Ids that sampling is said to have left, under a truncated law: the token's own and others."""
    rollout = config.rollout
    if not rollout.truncated:
        return None
    count = min(rollout.rollout_top_k or 64, vocab_size)
    kept = _spread(ids, count, vocab_size)
    return KeptIds(kept.flatten().int(), torch.full((ids.numel(),), count))


def _experts(
    config: Config, architecture: Architecture, prompt: Tensor, response: Tensor
) -> Tensor | None:
    """Experts that tokens are said to have been routed to, other ones in every layer."""
    if config.moe.moe_routing_replay != "rollout":
        return None
    ids = torch.cat([prompt, response])[:-1, None, None]
    layers = torch.arange(architecture.num_layers)[:, None]
    ranks = torch.arange(architecture.num_experts_per_token)
    return ((ids + layers + ranks) % architecture.num_experts).short()


def _spread(ids: Tensor, count: int, vocab_size: int) -> Tensor:
    """int64 [T, count]: different ids all over the vocabulary, those of `ids` [T] first."""
    return (ids[:, None] + torch.arange(count) * (vocab_size // count)) % vocab_size


def _with_logprobs(batch: Batch, policy: Policy) -> Batch:
    """The batch with log-probs of behaviour policy and trainer: this policy's, moved at random."""
    layout, config = policy.layout, batch.config
    rows = policy.pack(batch.trajectories)
    scores = policy.score(rows)
    own = None
    if layout.is_last_stage and layout.tp_rank == 0:
        pairs = zip(rows, scores, strict=True)
        own = [(batch.numbers(row), score.logprobs.cpu()) for row, score in pairs]
    known = torch.full((batch.num_tokens,), torch.nan)
    for numbers, logprobs in itertools.chain.from_iterable(layout.gather_objects(own)):
        known[numbers] = logprobs
    generator = torch.Generator().manual_seed(config.train.seed)

    def moved(nats: float) -> Tensor:
        noise = nats * torch.randn(known.shape, generator=generator)
        return (known + noise).clamp(max=LARGEST_LOGPROB)

    behaviour, old = moved(BEHAVIOUR_NOISE), moved(OLD_NOISE)
    trajectories = []
    for trajectory, start in zip(batch.trajectories, batch.starts.values(), strict=True):
        rollout = trajectory.rollout
        first = start + rollout.prompt.token_ids.numel()
        changed = replace(
            rollout, behaviour_logprobs=behaviour[first : first + rollout.response_ids.numel()]
        )
        if policy.objective.needs.topk:
            changed = _with_topk(
                changed, config.rollout.rollout_topk, policy.architecture.vocab_size, generator
            )
        trajectories.append(replace(trajectory, rollout=changed))
    return replace(batch, trajectories=trajectories, old_logprobs=old)


def _with_topk(rollout: Rollout, count: int, vocab_size: int, generator: torch.Generator):
    """The rollout with K ids of a law that nobody has; the sampled id is among them every other
    time."""
    ids, behaviour = rollout.response_ids, rollout.behaviour_logprobs
    among = torch.arange(ids.numel()) % 2 == 0
    if count > vocab_size // 2:
        among[:] = True
    rest = torch.log1p(-behaviour.exp())[:, None]
    shares = torch.randn(ids.numel(), count + 1, generator=generator).log_softmax(-1)
    logprobs = (rest + shares)[:, :count]
    logprobs[:, 0] = torch.where(among, behaviour, logprobs[:, 0])
    spread = _spread(torch.where(among, ids, ids + 1), count, vocab_size)
    return replace(rollout, topk_ids=spread, topk_logprobs=logprobs)
