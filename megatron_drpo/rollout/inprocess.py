"""Generation in the training process, with the training weights and the training attention.

The model is `Policy.models`, run through the operations of `PolicyModel.forward`; only the layout
differs from training's, and the KV cache travels in it. All ranks of a replica run the same
scheduler on the same numbers and so take the same decisions; between stages travel hidden states,
and from the last stage 16 bytes per response and token, as many per recorded likeliest id, and the
kept ids of responses that have ended. `no_grad` and not `inference_mode`: Megatron keeps rotary
tables between calls, and training could not use tables made under inference mode.

Pipeline stages work at the same time: the slots form as many groups as there are stages, and in
each tick every stage computes another group's pass (`Session._tick`). What a group draws at the end
of one tick it can compute at the beginning of the next, when its turn has come again.

Where replicas share the experts (EP, expert TP), every forward pass exchanges tokens between them.
They then step together: a replica that has finished keeps passing idle rows through the model until
all have. The ranks of a context-parallel group are replicas like any others here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.errors import RolloutError
from megatron_drpo.mcore.attention import DecodeLayout, PrefillLayout
from megatron_drpo.mcore.dense import forward_of
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.rollout.memory import rows_multiple, slots_within
from megatron_drpo.rollout.scheduler import Drawn, Job, Pass, SlotGroup
from megatron_drpo.types import KeptIds, Prompt, Rollout, Trajectory
from megatron_drpo.vocab_parallel import project, sample, vocab_parallel_topk

Finished = list[tuple[int, Completion]]
"""Responses that have ended, under the numbers that `Session.add` gave them."""


class InProcessEngine:
    """A `RolloutEngine` over the weights that are being trained; weight sync has nothing to do.

    Args:
        policy: whose weights generate.
        max_slots: responses at the same time.
        cache_bytes: memory that this rank's KV cache may take; None: as much as the slots need.
        exact: log-probs with the bits of training (`probe_exact` proves it), for which attention
            computes rows that it needs not.
        decode: text of token ids; needed with `Sampling.stop_strings` only.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_slots: int,
        cache_bytes: int | None = None,
        exact: bool = True,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.policy, self.max_slots, self.cache_bytes = policy, max_slots, cache_bytes
        self.exact, self.decode = exact, decode

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `RolloutEngine.generate`; collective over model- and expert-parallel ranks.

        Raises:
            RolloutError: as `Session.add`.
        """
        session = self.start(sampling)
        numbers = session.add(requests)
        done: dict[int, Completion] = {}
        while session.busy:
            done.update(session.step())
        return [done[number] for number in numbers]

    def start(self, sampling: Sampling) -> Session:
        """Nothing generated yet: responses are asked for by `Session.add`."""
        return Session(self, sampling)


class Session:
    """Generation to which requests can be added while it runs.

    All methods are to be called in the same order with the same arguments on all ranks of a
    replica, and `step` and `busy` together on all replicas that share experts out.
    """

    def __init__(self, engine: InProcessEngine, sampling: Sampling) -> None:
        self._engine, self.sampling = engine, sampling
        self._policy, self._layout = engine.policy, engine.policy.layout
        self._device = self._policy.device.torch
        if sampling.stop_strings and engine.decode is None:
            raise RolloutError("--rollout-stop-strings: the engine was given no tokenizer")
        assert self._policy.routing or not sampling.record_experts, "--moe-routing-replay is off"
        for model in self._policy.models:
            model.eval()
        self._forwards = [forward_of(model) for model in self._policy.models]
        groups = self._layout.pp_size
        self._multiple = rows_multiple(self._policy.config)
        self._groups = [
            SlotGroup(
                sampling,
                (engine.max_slots + groups - 1 - number) // groups,
                self._slots_at,
                self._device,
                multiple=self._multiple,
                routing=self._routing_shape,
                exact=engine.exact,
                decode=engine.decode,
            )
            for number in range(groups)
        ]
        self._passes: list[Pass | None] = [None] * groups
        """Of each group, the one that is on its way through the stages."""
        self._hidden: Tensor | None = None
        """What the stage before has sent for the next tick."""
        self._ticks = 0
        self._pending: deque[Job] = deque()
        self._finished: Finished = []
        self._num_jobs, self._num_prompts = 0, 0
        self._last_prompt: Tensor | None = None

    # What a caller does.

    def add(self, requests: Iterable[Request]) -> list[int]:
        """Ask for a response to each of `requests`; returns the number of each.

        Raises:
            RolloutError: a prompt is empty, or with its response longer than the model or the
                memory for the KV cache has room for.
        """
        jobs = [self._job(request) for request in requests]
        self._pending.extend(jobs)
        return [job.number for job in jobs]

    @property
    def busy(self) -> bool:
        """Whether a response is missing, here or on a replica that shares experts out."""
        busy = bool(self._pending or self._finished or any(group.jobs for group in self._groups))
        return self._layout.any_expert_peer(busy, self._device)

    @torch.no_grad()
    def step(self) -> Finished:
        """One pass of every group through all stages; returns the responses that have ended."""
        for _ in range(self._num_stages):
            self._tick()
        finished, self._finished = self._finished, []
        return finished

    @torch.no_grad()
    def abort(self, numbers: Iterable[int] | None = None) -> Finished:
        """End responses, None: all of them, with what they have, which may be no token.

        Returns:
            Those that were asked for, with `finish_reason` "abort" unless they end meanwhile, and
            whichever other responses did. Numbers of responses that have ended are passed over.
        """
        wanted = None if numbers is None else set(numbers)
        # Passes on their way end as they would have; no others begin.
        for _ in range(self._num_stages):
            self._tick(start=False)
        jobs = [*self._pending, *(job for group in self._groups for job in group.jobs)]
        ended = {job for job in jobs if wanted is None or job.number in wanted}
        for job in [job for job in self._pending if job in ended]:
            self._pending.remove(job)
            self._finish([(job, self._nothing())])
        for group in self._groups:
            self._finish(group.remove(ended))
        finished, self._finished = self._finished, []
        return finished

    # Requests.

    def _job(self, request: Request) -> Job:
        limit = request.max_response_length or self.sampling.max_response_length
        prompt = request.prompt_ids
        number, size = self._num_jobs, prompt.numel()
        if not size:
            raise RolloutError(f"request {number}: its prompt has no tokens; give it one at least")
        most = self._policy.architecture.max_position_embeddings
        if size + limit > most:
            raise RolloutError(
                f"request {number}: a prompt of {size} tokens and a response of up to {limit} "
                f"exceed the model's {most} positions; lower --rollout-max-response-length"
            )
        if self._last_prompt is None or not torch.equal(self._last_prompt, prompt):
            self._num_prompts += 1
            self._last_prompt = prompt
        job = Job(number, request, self._num_prompts, limit)
        if self.sampling.stop_strings:
            job.tokens = prompt[size - request.first_position :].tolist()
        self._slots_at(job.capacity)
        self._num_jobs += 1
        return job

    def _slots_at(self, length: int) -> int:
        """Slots of each group if every one has `length` positions."""
        cache_bytes = self._engine.cache_bytes
        if cache_bytes is None:
            return self._engine.max_slots
        return slots_within(
            cache_bytes,
            self._policy.architecture,
            tp_size=self._layout.tp_size,
            pp_size=self._layout.pp_size,
            element_bytes=self._policy.models[0].config.params_dtype.itemsize,
            length=length,
            multiple=self._multiple,
        )

    def _nothing(self) -> Completion:
        topk = self.sampling.record_topk
        experts = torch.empty((0, *self._routing_shape), dtype=torch.int16)
        likeliest = torch.empty((0, topk), dtype=torch.long), torch.empty((0, topk))
        kept = KeptIds(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.long))
        return Completion(
            torch.empty(0, dtype=torch.long),
            torch.empty(0),
            "abort",
            *(likeliest if topk else ()),
            kept_ids=kept if self.sampling.truncated else None,
            experts=experts if self.sampling.record_experts else None,
        )

    @property
    def _routing_shape(self) -> tuple[int, int]:
        """(layers, experts per token)."""
        architecture = self._policy.architecture
        return architecture.num_layers, architecture.num_experts_per_token

    # Passes through the stages.

    @property
    def _num_stages(self) -> int:
        """Virtual ones: stage v is on rank v % pp_size of the pipeline."""
        return self._layout.pp_size * len(self._policy.models)

    def _tick(self, *, start: bool = True) -> None:
        """One stage's work on every rank, and then what the ranks have to tell each other.

        Group g enters stage 0 at tick g and then every `num_stages` ticks, so that rank r always
        has group (tick - r) % pp_size, each at the stage where its pass is. All ranks exchange at
        the end of a tick: hidden states with their neighbours, then what the last stage drew.
        """
        tick, stages, rank = self._ticks, self._num_stages, self._layout.pp_rank
        size = self._layout.pp_size
        if start and tick % stages < size:
            self._passes[tick % stages] = self._plan(self._groups[tick % stages])
        group = (tick - rank) % size
        work, stage = self._passes[group], (tick - group) % stages
        out = None if work is None else self._run(work, stage // size)
        last = stage == stages - 1
        after = (tick + 1 - rank) % size
        coming, its_stage = self._passes[after], (tick + 1 - after) % stages
        self._exchange(None if last else out, coming if its_stage else None)
        ending = (tick + 1) % stages
        if ending < size and (done := self._passes[ending]) is not None:
            self._end(self._groups[ending], done, out if last else None)
            self._passes[ending] = None
        self._ticks += 1

    def _plan(self, group: SlotGroup) -> Pass | None:
        missing = len(self._pending) + sum(len(other.jobs) for other in self._groups)
        planned = group.plan(self._pending, -(-missing // len(self._groups)))
        return group.idle() if planned is None and self._layout.shares_experts else planned

    def _run(self, work: Pass, chunk: int) -> Tensor:
        """Hidden states [S, 1, H] after one chunk of the model."""
        record, layout = self.sampling.record_experts, work.layout
        routing = self._policy.routing[chunk] if self._policy.routing else None
        if routing:
            routing.begin(record=record)
        out = self._forwards[chunk](work.tokens, work.positions, layout, self._hidden)
        if routing and record:
            assert isinstance(layout, PrefillLayout | DecodeLayout)
            experts = layout.cache.experts
            assert experts is not None
            layers = torch.tensor(routing.layers, device=self._device)
            where = layout.slots[:, None], layout.positions[:, None], layers
            experts[where] = routing.recorded()
        return out

    def _exchange(self, out: Tensor | None, coming: Pass | None) -> None:
        """Send `out` to the next stage, and receive the input of `coming` from the one before."""
        layout = self._layout
        if layout.pp_size == 1:
            return
        operations, group, self._hidden = [], layout.pp_group, None
        if out is not None:
            to = dist.get_global_rank(group, (layout.pp_rank + 1) % layout.pp_size)
            operations.append(dist.P2POp(dist.isend, out.contiguous(), to, group))
        if coming is not None:
            config = self._policy.models[0].config
            self._hidden = torch.empty(
                (coming.tokens.numel(), 1, config.hidden_size),
                dtype=config.params_dtype,
                device=self._device,
            )
            source = dist.get_global_rank(group, (layout.pp_rank - 1) % layout.pp_size)
            operations.append(dist.P2POp(dist.irecv, self._hidden, source, group))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()

    def _end(self, group: SlotGroup, work: Pass, hidden: Tensor | None) -> None:
        """What follows the last stage of a pass, whose output `hidden` only that stage has."""
        if work.count:
            self._finish(group.advance(self._draw(group, work.count, hidden)))
        else:
            group.filled()

    def _draw(self, group: SlotGroup, count: int, hidden: Tensor | None) -> Drawn:
        """The next token of each of `count` responses; the same on every rank.

        Args:
            hidden: [S, 1, H] on the last stage, None elsewhere.
        """
        sampling, topk = self.sampling, self.sampling.record_topk
        # Ids up to 2^53 and fp32 log-probs are exact in fp64, so one message carries it all.
        message = torch.empty((count, 2 + 2 * topk), dtype=torch.float64, device=self._device)
        kept = None
        if hidden is not None:
            logits = project(hidden[:count, 0], self._policy.models[-1].output_weight())
            where: dict[str, Any] = {
                "vocab_size": self._policy.architecture.vocab_size,
                "group": self._layout.tp_group,
            }
            drawn = sample(
                logits,
                group.uniforms(),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                **where,
            )
            message[:, 0], message[:, 1], kept = drawn.ids, drawn.logprobs, drawn.kept
            if topk:
                likeliest = vocab_parallel_topk(
                    logits, topk, temperature=sampling.temperature, **where
                )
                message[:, 2 : 2 + topk] = likeliest.ids
                message[:, 2 + topk :] = likeliest.logprobs
        self._from_last_stage(message)
        return Drawn(
            ids=message[:, 0].long(),
            logprobs=message[:, 1].float(),
            topk_ids=message[:, 2 : 2 + topk].long(),
            topk_logprobs=message[:, 2 + topk :].float(),
            kept=kept,
        )

    def _from_last_stage(self, message: Tensor) -> None:
        """Make `message` what it is there. In a group of its own: on GPUs the order of these and of
        the hidden states is then no matter."""
        if self._layout.pp_size > 1:
            group = self._layout.draw_group
            last = dist.get_global_rank(group, self._layout.pp_size - 1)
            dist.broadcast(message, last, group=group)

    def _finish(self, ended: list[tuple[Job, Completion]]) -> None:
        if ended and self.sampling.truncated and self._layout.pp_size > 1:
            ended = self._share_kept(ended)
        if ended and self.sampling.record_experts:
            ended = self._share_experts(ended)
        self._finished += [(job.number, completion) for job, completion in ended]

    def _share_kept(self, ended: list[tuple[Job, Completion]]) -> list[tuple[Job, Completion]]:
        """The kept ids of `ended` on all stages, as the last one has them."""
        lengths = [completion.response_ids.numel() for _, completion in ended]
        counts = torch.zeros(sum(lengths), dtype=torch.long, device=self._device)
        kept = [completion.kept_ids for _, completion in ended]
        here = self._layout.is_last_stage
        if here:
            counts.copy_(torch.cat([part.counts for part in kept if part is not None]))
        self._from_last_stage(counts)
        ids = torch.zeros(int(counts.sum()), dtype=torch.int32, device=self._device)
        if here:
            ids.copy_(torch.cat([part.ids for part in kept if part is not None]))
        self._from_last_stage(ids)
        by_job = counts.cpu().split(lengths)
        ids_by_job = ids.cpu().split([int(part.sum()) for part in by_job])
        return [
            (job, replace(completion, kept_ids=KeptIds(part_ids, part)))
            for (job, completion), part_ids, part in zip(ended, ids_by_job, by_job, strict=True)
        ]

    def _share_experts(self, ended: list[tuple[Job, Completion]]) -> list[tuple[Job, Completion]]:
        """The experts of `ended` in all layers: a stage has recorded those of its own."""
        parts = [part.experts for _, part in ended if part.experts is not None]
        experts = torch.cat(parts)
        if self._layout.pp_size > 1:
            message = experts.int().to(self._device)
            dist.all_reduce(message, group=self._layout.draw_group)
            experts = message.cpu()
        fits = self._policy.architecture.num_experts <= 1 << 8
        experts = experts.to(torch.uint8 if fits else torch.int16).split([len(p) for p in parts])
        return [
            (job, replace(completion, experts=part.clone()))
            for (job, completion), part in zip(ended, experts, strict=True)
        ]


@dataclass(frozen=True)
class ExactProbe:
    """What `probe_exact` found, the same on all ranks."""

    exact: bool
    """True if all log-probs had the bits of the trainer's."""
    num_tokens: int
    max_gap: float
    """Nats."""
    text: str
    """For people. Example: "log-probs are training's bit for bit (probe of 168 tokens)"."""


_PROBE_PROMPTS = (1, 2, 7, 7, 7, 30, 120, 500)
_PROBE_RESPONSE = 24


def probe_exact(policy: Policy, engine: InProcessEngine) -> ExactProbe:
    """Whether `engine` gives the log-probs that the trainer gives, bit for bit; collective.

    Random prompts, short and long, are answered under the configured law, and the answers scored
    by the forward pass of training, packed and padded as it packs them.
    """
    config, architecture = policy.config, policy.architecture
    most = min(architecture.max_position_embeddings, config.train.max_tokens_per_microbatch)
    response = max(min(_PROBE_RESPONSE, most // 2), 1)
    generator = torch.Generator().manual_seed(0)
    prompts: list[Tensor] = []
    for length in _PROBE_PROMPTS:
        size = (max(min(length, most - response), 1),)
        ids = torch.randint(architecture.vocab_size, size, generator=generator)
        # Equal neighbours share their prefill.
        prompts.append(prompts[-1] if prompts and prompts[-1].shape == size else ids)
    rollout = config.rollout
    sampling = Sampling(
        rollout.rollout_temperature,
        rollout.rollout_top_p,
        rollout.rollout_top_k,
        response,
        stop_ids=(),
        seed=0,
        record_experts=config.moe.moe_routing_replay == "rollout",
    )
    requests = [Request(prompt, stream) for stream, prompt in enumerate(prompts)]
    trajectories = [
        Trajectory(
            Rollout(
                prompt=Prompt(f"probe:{number}", "", prompt, None),
                sample=0,
                response_ids=completion.response_ids,
                behaviour_logprobs=completion.logprobs,
                finish_reason="length",
                policy_version=policy.num_updates,
                response_text="",
                kept_ids=completion.kept_ids,
                experts=completion.experts,
            ),
            reward=0.0,
            advantage=0.0,
        )
        for number, (prompt, completion) in enumerate(
            zip(prompts, engine.generate(requests, sampling), strict=True)
        )
    ]
    rows = policy.pack(trajectories)
    gap = torch.zeros(1)
    for row, scores in zip(rows, policy.score(rows), strict=False):
        if row.targets.numel():
            difference = (scores.logprobs.cpu() - row.behaviour_logprobs.cpu()).abs().max()
            gap = torch.maximum(gap, difference.nan_to_num(nan=torch.inf))
    dist.all_reduce(gap, dist.ReduceOp.MAX, group=policy.layout.control_group)
    tokens = sum(trajectory.rollout.response_ids.numel() for trajectory in trajectories)
    exact, of = float(gap) == 0, f"(probe of {tokens} tokens)"
    text = (
        f"log-probs are training's bit for bit {of}"
        if exact
        else f"log-probs differ from training's by up to {float(gap):.2g} nats {of}"
    )
    return ExactProbe(exact, tokens, float(gap), text)
