"""Rollout batches, one per step: generated, judged, and the same on every rank.

    prompts -> generate (engine, or conversations with an environment) -> reward -> exchange

L3, between the loop and the engines. In: the number of the step. Out: a `Batch`. With servers, the
batches of later steps may be under way while the trainer works on this one (`--rollout-lag`), in
threads of the one rank of each replica that talks to the servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_drpo.config import Config
from megatron_drpo.mcore.parallel import Layout
from megatron_drpo.metrics import PhaseTimer
from megatron_drpo.preflight import Inputs
from megatron_drpo.prompts import PromptSampler
from megatron_drpo.rewards import check_prompts
from megatron_drpo.rewards.pool import RewardPool, check_failures
from megatron_drpo.rollout.engine import (
    Completion,
    Request,
    RolloutEngine,
    Sampling,
    sampling_of,
)
from megatron_drpo.rollout.environment import load_environment
from megatron_drpo.rollout.episodes import run_episodes
from megatron_drpo.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EVAL_STREAM = 1 << 40
"""Evaluation draws from streams of its own, the same ones each time."""


@dataclass(frozen=True)
class Batch:
    """A step's rollouts. Example: Batch(rollouts=[...], rewards=[1.0, 0.0, ...])."""

    rollouts: list[Rollout]
    """The samples of a prompt next to each other."""
    rewards: list[float]
    """One for each; NaN where the reward failed."""
    failures: list[str] = field(default_factory=list)
    """What a person should know of each failure."""
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """Responses wanted from all replicas together."""

    prompts: Sequence[Prompt]
    samples: int
    sampling: Sampling
    first_stream: int
    to_train: bool = True
    """False for an evaluation."""


@dataclass(frozen=True)
class _Produced:
    """What one replica has made of its share of a job."""

    rollouts: list[Rollout]
    rewards: list[float | None]
    """None where `--reward` is to judge, and not an environment."""
    failures: list[str]


@dataclass(frozen=True)
class _Started:
    """A job, and with servers what will come of it."""

    job: _Job
    future: Future[_Produced] | None


class Collector:
    """Makes the batches of a run. All methods are collective over all ranks.

    Args:
        engine: None on ranks that have no part in generation (servers are talked to by the source
            of each replica alone).
        version: number of optimizer updates that the training weights have received.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        layout: Layout,
        engine: RolloutEngine | None,
        version: Callable[[], int],
        timer: PhaseTimer,
    ) -> None:
        self.config, self.inputs, self.layout = config, inputs, layout
        self._engine, self._version, self._timer = engine, version, timer
        self._rewards = RewardPool(config.reward) if layout.is_replica_source else None
        name = config.rollout.environment
        self._environment = None if name is None else load_environment(name)
        self._sampler = None
        if inputs.rollouts is None:
            self._sampler = PromptSampler(
                len(inputs.prompts),
                config.rollout.rollout_prompts_per_step,
                config.train.seed,
                config.data.shuffle_prompts,
            )
        self._threads: ThreadPoolExecutor | None = None
        if config.rollout.uses_servers and engine is not None:
            self._threads = ThreadPoolExecutor(config.rollout.rollout_lag + 1, "rollout")
        self._ahead: dict[int, _Started] = {}

    @property
    def generates(self) -> bool:
        """False where the rollouts of a file are trained on."""
        return self._sampler is not None

    def close(self) -> None:
        """Give up what is under way, and end the reward processes."""
        if self._threads:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if self._rewards:
            self._rewards.close()

    def collect(self, step: int) -> Batch:
        """The batch of a step (from 0)."""
        if self._sampler is None:
            return self._from_file(step)
        last = min(step + self.config.rollout.rollout_lag, self.config.train.train_iters - 1)
        for number in range(step, last + 1):
            if number not in self._ahead:
                self._ahead[number] = self._start(self._job(number))
        batch = self._finish(self._ahead.pop(step))
        if self.config.rollout.dynamic_sampling:
            batch = self._replace_uninformative(step, batch)
        return batch

    def evaluate(self) -> Batch:
        """Responses to the held-out prompts and their rewards."""
        config = self.config.eval
        sampling = replace(
            self._sampling(self.config.train.seed),
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            top_k=config.eval_top_k,
            record_topk=0,
            record_experts=False,
        )
        job = _Job(
            self.inputs.eval_prompts,
            config.eval_samples_per_prompt,
            sampling,
            _EVAL_STREAM,
            to_train=False,
        )
        return self._finish(self._start(job))

    # What is wanted.

    def sampling(self, step: int) -> Sampling:
        """How the responses of a step (from 0) are drawn."""
        return self._sampling(self.config.train.seed + (step << 32))

    def _sampling(self, seed: int) -> Sampling:
        return sampling_of(
            self.config.rollout,
            self.inputs.stop_ids,
            seed,
            record_experts=self.config.moe.moe_routing_replay == "rollout",
        )

    def _job(self, step: int) -> _Job:
        """What a step draws at first."""
        return self._job_of(step, self._drawn(step), 0)

    def _drawn(self, step: int) -> list[int]:
        """The prompts of a step and, with dynamic sampling, the extra ones."""
        assert self._sampler is not None
        picked = self._sampler.indices(step)
        extra = self.config.rollout.num_drawn_prompts - len(picked)
        return picked + self._sampler.replacements(step, extra, picked)

    def _job_of(self, step: int, picked: Sequence[int], used: int) -> _Job:
        """Of some prompts; `used` others of the step came before them."""
        samples = self.config.rollout.rollout_samples_per_prompt
        return _Job(
            [self.inputs.prompts[i] for i in picked],
            samples,
            self.sampling(step),
            used * samples,
        )

    # From a job to its batch.

    def _start(self, job: _Job) -> _Started:
        """With servers, generation begins here, on the ranks that talk to them."""
        return _Started(job, self._threads.submit(self._produce, job) if self._threads else None)

    def _finish(self, started: _Started) -> Batch:
        """Wait for the responses, judge and exchange them."""
        to_train = started.job.to_train
        with self._timer.phase("generate" if to_train else "evaluate"):
            if self.config.rollout.uses_servers:
                # However long servers take, no rank waits in a collective for them.
                future = started.future
                self.layout.wait_for(future)
                produced = None if future is None else future.result()
            else:
                produced = self._produce(started.job)
        with self._timer.phase("reward" if to_train else "evaluate"):
            return self._exchange(produced, len(started.job.prompts) * started.job.samples)

    def _produce(self, job: _Job) -> _Produced:
        """This replica's share of the responses.

        Which random numbers a response takes depends on its place among all prompts, not on the
        replica that makes it.
        """
        engine, layout = self._engine, self.layout
        assert engine is not None
        mine = range(layout.replica_rank, len(job.prompts), layout.num_replicas)
        places = [(i, sample) for i in mine for sample in range(job.samples)]
        streams = [job.first_stream + i * job.samples + sample for i, sample in places]
        wanted = [(job.prompts[i], sample) for i, sample in places]
        version = self._version()
        if self._environment is not None:
            config = self.config.rollout
            episodes = run_episodes(
                engine,
                wanted,
                streams,
                job.sampling,
                self._environment,
                self.inputs.tokenizer,
                max_turns=config.environment_max_turns,
                policy_version=version,
                timeout_seconds=self.config.reward.reward_timeout_seconds,
                share=(lambda value: value) if config.uses_servers else layout.share,
                is_source=layout.is_replica_source,
                any_live=self._any_live,
            )
            return _Produced(episodes.rollouts, episodes.rewards, episodes.failures)
        rollouts = generate_rollouts(
            engine, wanted, streams, job.sampling, self.inputs.tokenizer, version
        )
        if not job.to_train:  # of no use then, and much to send around
            rollouts = [replace(rollout, kept_ids=None) for rollout in rollouts]
        return _Produced(rollouts, [None] * len(rollouts), [])

    def _any_live(self, here: bool) -> bool:
        """Whether conversations go on here, or where this rank's experts are needed for them."""
        if self.config.rollout.uses_servers:
            return here
        return self.layout.any_expert_peer(here, self.inputs.device.torch)

    def _from_file(self, step: int) -> Batch:
        """The next rollouts of `--rollouts-file`, from its start again after its end."""
        recorded, config = self.inputs.rollouts, self.config.rollout
        assert recorded is not None
        count = config.rollout_prompts_per_step * config.rollout_samples_per_prompt
        picked = [recorded[(step * count + i) % len(recorded)] for i in range(count)]
        rollouts = [rollout for rollout, _ in picked]
        values = [value for _, value in picked if value is not None]
        if len(values) == len(rollouts):
            return Batch(rollouts, values)
        with self._timer.phase("reward"):
            share = len(rollouts) // self.layout.num_replicas
            start = self.layout.replica_rank * share
            mine = rollouts[start : start + share]
            return self._exchange(_Produced(mine, [None] * share, []), len(rollouts))

    def _exchange(self, produced: _Produced | None, batch_size: int) -> Batch:
        """Rewards from one rank of each replica; then everybody's rollouts, on every rank."""
        message = None
        if self._rewards is not None:
            assert produced is not None
            message = self._judge(self._rewards, produced, batch_size)
        groups: dict[str, list[tuple[Rollout, float]]] = {}
        told: list[str] = []
        for rollouts, values, failures in self.layout.gather_objects(message):
            told += failures
            for rollout, value in zip(rollouts, values, strict=True):
                groups.setdefault(rollout.prompt.id, []).append((rollout, value))
        check_failures(self.config.reward, told, batch_size)
        # By prompt id: an order that does not depend on how prompts were dealt to replicas.
        return _batch([groups[name] for name in sorted(groups)], told)

    def _judge(
        self, pool: RewardPool, produced: _Produced, batch_size: int
    ) -> tuple[list[Rollout], list[float], list[str]]:
        """Rollouts, their rewards and what failed; the pool judges where no environment did."""
        values = list(produced.rewards)
        left = [i for i, value in enumerate(values) if value is None]
        if self._environment is not None:  # which gives none: only now is that known
            prompts = {produced.rollouts[i].prompt.id: produced.rollouts[i].prompt for i in left}
            check_prompts(self.config.reward.reward, [*prompts.values()])
        scored = pool.score([produced.rollouts[i] for i in left], batch_size)
        for i, value in zip(left, scored.values, strict=True):
            values[i] = value
        known = [value for value in values if value is not None]
        return produced.rollouts, known, [*produced.failures, *scored.failures]

    # Dynamic sampling.

    def _replace_uninformative(self, step: int, batch: Batch) -> Batch:
        """As many groups as a step takes, with those whose rewards differ in the first place.

        Of several candidates the one drawn first counts, not the one that was finished first, which
        would favour short responses.
        """
        assert self._sampler is not None
        config = self.config.rollout
        wanted, failures = config.rollout_prompts_per_step, list(batch.failures)
        picked = self._drawn(step)
        groups = _groups(batch, config.rollout_samples_per_prompt)
        rounds = 0
        while rounds < config.dynamic_sampling_rounds:
            missing = wanted - sum(map(_varies, groups.values()))
            count = missing + config.rollout_extra_prompts
            more = self._sampler.replacements(step, count, picked) if missing > 0 else []
            if not more:
                break
            new = self._finish(self._start(self._job_of(step, more, len(picked))))
            groups |= _groups(new, config.rollout_samples_per_prompt)
            failures += new.failures
            picked += more
            rounds += 1
        drawn = [self.inputs.prompts[i].id for i in picked]
        chosen = sorted(drawn, key=lambda name: not _varies(groups[name]))[:wanted]
        told = {
            "dynamic_sampling/rounds": float(rounds),
            "dynamic_sampling/prompts": float(len(drawn)),
            "dynamic_sampling/uninformative": float(sum(not _varies(groups[n]) for n in drawn)),
            "dynamic_sampling/replaced": float(len(set(drawn[:wanted]) - set(chosen))),
            "dynamic_sampling/missing": float(sum(not _varies(groups[n]) for n in chosen)),
        }
        return replace(_batch([groups[n] for n in sorted(chosen)], failures), statistics=told)


def generate_rollouts(
    engine: RolloutEngine,
    wanted: Sequence[tuple[Prompt, int]],
    streams: Sequence[int],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    policy_version: int,
) -> list[Rollout]:
    """One response to each prompt.

    Args:
        wanted: [N], prompt and number of the sample; samples of one prompt next to each other.
        streams: [N], the stream of random numbers of each.
        policy_version: where the engine does not say itself.
    """
    requests = [
        Request(prompt.token_ids, stream)
        for (prompt, _), stream in zip(wanted, streams, strict=True)
    ]
    completions = engine.generate(requests, sampling)
    if not completions:  # of none, the tokenizer's list of texts is not empty
        return []
    texts = tokenizer.batch_decode(
        [done.response_ids.tolist() for done in completions], skip_special_tokens=True
    )
    return [
        _rollout(prompt, sample, done, text, policy_version)
        for (prompt, sample), done, text in zip(wanted, completions, texts, strict=True)
    ]


def _rollout(
    prompt: Prompt, sample: int, done: Completion, text: str, policy_version: int
) -> Rollout:
    """A completion as the rollout of its prompt; `policy_version` where it does not say itself."""
    spans = done.version_spans
    return Rollout(
        prompt=prompt,
        sample=sample,
        response_ids=done.response_ids,
        behaviour_logprobs=done.logprobs,
        finish_reason=done.finish_reason,
        policy_version=spans[0][1] if spans else policy_version,
        response_text=text,
        topk_ids=done.topk_ids,
        topk_logprobs=done.topk_logprobs,
        kept_ids=done.kept_ids,
        experts=done.experts,
        version_spans=spans if len(spans) > 1 else (),
    )


_Group = list[tuple[Rollout, float]]


def _batch(groups: Sequence[_Group], failures: list[str]) -> Batch:
    pairs: list[Any] = [pair for group in groups for pair in group]
    return Batch([rollout for rollout, _ in pairs], [value for _, value in pairs], failures)


def _groups(batch: Batch, samples: int) -> dict[str, _Group]:
    """By prompt id."""
    pairs = [*zip(batch.rollouts, batch.rewards, strict=True)]
    groups = [pairs[i : i + samples] for i in range(0, len(pairs), samples)]
    return {group[0][0].prompt.id: group for group in groups}


def _varies(group: _Group) -> bool:
    """Whether the group teaches anything: its rewards, failures aside, are not all equal."""
    return len({value for _, value in group if not math.isnan(value)}) > 1
