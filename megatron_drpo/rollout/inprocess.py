"""Generation in the training process, with the training weights and the training attention.

The model is `Policy.models`, run through `PolicyModel.forward` as in training; only the layout
differs, and the KV cache travels in it. Active responses stay compact in slots 0 to n-1, so that
the cache is read without a copy. All ranks of a replica run this scheduler on the same numbers and
so take the same decisions; between stages travel hidden states, and from the last stage 16 bytes
per response and token, and as many per recorded likeliest id. `no_grad` and not `inference_mode`:
Megatron keeps rotary tables between calls, and training could not use tables made under inference
mode.

Where experts are shared out (EP), every forward pass exchanges tokens between the replicas of an
expert-parallel group. They then step together: a replica that has finished keeps passing idle rows
through the model until all have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.mcore.attention import (
    KEY_BLOCK,
    DecodeLayout,
    KVCache,
    RowLayout,
    round_up,
    row_layout,
)
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.vocab_parallel import counter_uniforms, project, sample, vocab_parallel_topk
from megatron_drpo.vocab_parallel.gemm import MIN_ROWS

_PREFILL_TOKENS = 8192
"""Prompt tokens that one packed prefill pass takes, unless a single prompt is longer."""


class InProcessEngine:
    """A `RolloutEngine` over the weights that are being trained; weight sync has nothing to do."""

    def __init__(self, policy: Policy, *, max_slots: int) -> None:
        self._policy = policy
        self._layout = policy.layout
        self._max_slots = max_slots

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `RolloutEngine.generate`; collective over model- and expert-parallel ranks."""
        for model in self._policy.models:
            model.eval()
        batch = _Batch(requests, sampling, self._max_slots, self._policy.device.torch)
        while self._any_busy(batch):
            admitted = batch.admit()
            tokens, positions, layout, rows = admitted or batch.decode()
            first = batch.num_active - rows.numel() if admitted else 0
            logits = self._forward(tokens, positions, layout, rows)
            if rows.numel():
                batch.advance(first, self._draw(logits, rows.numel(), batch, first))
        return batch.completions()

    def _any_busy(self, batch: _Batch) -> bool:
        """Whether a replica of the expert-parallel group, or this one alone, has work left."""
        busy = bool(batch.pending or batch.num_active)
        if self._layout.ep_size == 1:
            return busy
        flag = torch.tensor(int(busy), device=batch.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._layout.ep_group)
        return bool(flag)

    def _draw(self, logits: Tensor | None, count: int, batch: _Batch, first: int) -> _Drawn:
        """What the `count` responses from slot `first` on draw next; the same on every rank.

        Args:
            logits: [count, V/tp] on the last stage, None elsewhere.
        """
        sampling = batch.sampling
        topk = sampling.record_topk
        # Ids up to 2^53 and fp32 log-probs are exact in fp64, so one message carries it all.
        message = torch.empty((count, 2 + 2 * topk), dtype=torch.float64, device=batch.device)
        if logits is not None:
            where: dict[str, Any] = {
                "vocab_size": self._policy.architecture.vocab_size,
                "group": self._layout.tp_group,
            }
            drawn = sample(
                logits,
                batch.uniforms(first, count),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                **where,
            )
            message[:, 0], message[:, 1] = drawn.ids, drawn.logprobs
            if topk:
                likeliest = vocab_parallel_topk(
                    logits, topk, temperature=sampling.temperature, **where
                )
                message[:, 2 : 2 + topk] = likeliest.ids
                message[:, 2 + topk :] = likeliest.logprobs
        if self._layout.pp_size > 1:
            last = dist.get_global_rank(self._layout.pp_group, self._layout.pp_size - 1)
            dist.broadcast(message, last, group=self._layout.pp_group)
        return _Drawn(
            ids=message[:, 0].long(),
            logprobs=message[:, 1].float(),
            topk_ids=message[:, 2 : 2 + topk].long(),
            topk_logprobs=message[:, 2 + topk :].float(),
        )

    def _forward(
        self, tokens: Tensor, positions: Tensor, layout: RowLayout | DecodeLayout, rows: Tensor
    ) -> Tensor | None:
        """Logits [n, V/tp] on the last stage, None elsewhere; through all virtual stages."""
        models, group, size = self._policy.models, self._layout.pp_group, self._layout.pp_size
        rank = self._layout.pp_rank
        config = models[0].config
        logits = None
        for chunk, model in enumerate(models):
            if not model.pre_process:
                hidden = torch.empty(
                    (tokens.numel(), 1, config.hidden_size),
                    dtype=config.params_dtype,
                    device=tokens.device,
                )
                dist.recv(hidden, dist.get_global_rank(group, (rank - 1) % size), group=group)
                model.set_input_tensor(hidden)
            out = model(tokens, positions, layout)
            if rank == size - 1 and chunk == len(models) - 1:
                logits = project(out[rows, 0], model.output_weight())
            else:
                dist.send(
                    out.contiguous(), dist.get_global_rank(group, (rank + 1) % size), group=group
                )
        return logits


class _Drawn(NamedTuple):
    """One token of n responses."""

    ids: Tensor
    """int64 [n]."""
    logprobs: Tensor
    """fp32 [n]."""
    topk_ids: Tensor
    """int64 [n, K]."""
    topk_logprobs: Tensor
    """fp32 [n, K]."""


class _Batch:
    """The scheduler's state: which request sits in which slot, and what it has produced."""

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        max_slots: int,
        device: torch.device,
    ) -> None:
        self.sampling = sampling
        self.device = device
        self.requests = requests
        self.pending = list(range(len(requests)))[::-1]
        self.num_active = 0
        self.num_slots = min(max_slots, len(requests))
        length = sampling.max_response_length
        longest = max((request.prompt_ids.numel() for request in requests), default=0)
        # MIN_ROWS slots at least: decoding never runs on fewer rows (`decode`).
        slots = max(self.num_slots, MIN_ROWS)
        self.cache = KVCache(slots, round_up(longest + length, KEY_BLOCK))
        self.request = torch.zeros(slots, dtype=torch.long, device=device)
        self.stream = torch.zeros(slots, dtype=torch.long, device=device)
        self.prompt_length = torch.zeros(slots, dtype=torch.long, device=device)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)
        self.last = torch.zeros(slots, dtype=torch.long, device=device)
        self.ids = torch.zeros((slots, length), dtype=torch.long, device=device)
        self.logprobs = torch.zeros((slots, length), device=device)
        topk = sampling.record_topk
        self.topk_ids = torch.zeros((slots, length, topk), dtype=torch.long, device=device)
        self.topk_logprobs = torch.zeros((slots, length, topk), device=device)
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        self._done: list[Completion | None] = [None] * len(requests)

    def uniforms(self, first: int, count: int) -> Tensor:
        """fp64 [count], the random number of the next token of slots `first` and on."""
        slots = slice(first, first + count)
        return counter_uniforms(self.sampling.seed, self.stream[slots], self.length[slots])

    def admit(self) -> tuple[Tensor, Tensor, RowLayout, Tensor] | None:
        """Fill free slots with pending requests: the packed row of their prompts, or None.

        Waits until an eighth of the slots is free, so that prefill passes stay few and large.
        """
        free = self.num_slots - self.num_active
        if not self.pending or (self.num_active and free < max(self.num_slots // 8, 1)):
            return None
        prompts: list[Tensor] = []
        size = 0
        while self.pending and len(prompts) < free:
            request = self.requests[self.pending[-1]]
            size += request.prompt_ids.numel()
            if prompts and size > _PREFILL_TOKENS:
                break
            slot = self.num_active + len(prompts)
            self.request[slot] = self.pending.pop()
            self.stream[slot] = request.stream
            self.prompt_length[slot] = request.prompt_ids.numel()
            self.length[slot] = 0
            prompts.append(request.prompt_ids)
        lengths = torch.tensor([prompt.numel() for prompt in prompts])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        tokens = torch.cat(prompts)
        slots = torch.arange(len(prompts)).repeat_interleave(lengths)
        positions = torch.arange(tokens.numel()) - bounds[slots]
        if tokens.numel() < MIN_ROWS:
            # Padding tokens rewrite the first position of slot 0's own prompt with the same values.
            missing = MIN_ROWS - tokens.numel()
            tokens = torch.cat([tokens, tokens[:1].expand(missing)])
            slots = torch.cat([slots, slots[:1].expand(missing)])
            positions = torch.cat([positions, positions[:1].expand(missing)])
        layout = row_layout(bounds.to(self.device), tokens.numel())
        layout.cache = self.cache
        layout.slots = (slots + self.num_active).to(self.device)
        layout.positions = positions.to(self.device)
        self.num_active += len(prompts)
        rows = (bounds[1:] - 1).to(self.device)
        return tokens.to(self.device), layout.positions, layout, rows

    def decode(self) -> tuple[Tensor, Tensor, DecodeLayout, Tensor]:
        """The last token of every active response; idle slots fill up to MIN_ROWS rows.

        With no response active they are all there is, and the pass leaves nothing behind.
        """
        count = max(self.num_active, MIN_ROWS)
        positions = self.prompt_length[:count] + self.length[:count] - 1
        positions = positions.clamp(min=0)
        layout = DecodeLayout(
            qkv_format="sbhd",
            cache=self.cache,
            positions=positions,
            key_length=round_up(int(positions.max()) + 1, KEY_BLOCK),
        )
        rows = torch.arange(self.num_active, device=self.device)
        return self.last[:count], positions, layout, rows

    def advance(self, first: int, drawn: _Drawn) -> None:
        """Append what was drawn to slots `first` and on, then retire what has finished."""
        ids = drawn.ids
        slots = torch.arange(first, first + ids.numel(), device=self.device)
        place = self.length[slots]
        self.ids[slots, place] = ids
        self.logprobs[slots, place] = drawn.logprobs
        self.topk_ids[slots, place] = drawn.topk_ids
        self.topk_logprobs[slots, place] = drawn.topk_logprobs
        self.last[slots] = ids
        self.length[slots] += 1
        stopped = torch.isin(ids, self.stop_ids)
        finished = stopped | (self.length[slots] >= self.sampling.max_response_length)
        done = slots[finished]
        if not done.numel():
            return
        by_stop = stopped[finished].tolist()
        lengths, numbers = self.length[done].tolist(), self.request[done].tolist()
        state = (self.ids, self.logprobs, self.topk_ids, self.topk_logprobs)
        for row, columns in enumerate(zip(*(part[done].cpu() for part in state), strict=True)):
            ids_, logprobs, *topk = (column[: lengths[row]].clone() for column in columns)
            self._done[numbers[row]] = Completion(
                ids_,
                logprobs,
                "stop" if by_stop[row] else "length",
                *(topk if self.sampling.record_topk else ()),
            )
        self._compact(done)

    def _compact(self, done: Tensor) -> None:
        """Move the last active slots into the holes that finished ones leave."""
        active = torch.ones(self.num_active, dtype=torch.bool, device=self.device)
        active[done] = False
        left = self.num_active - done.numel()
        target = (~active[:left]).nonzero().flatten()
        source = active[left:].nonzero().flatten() + left
        self.num_active = left
        if not target.numel():
            return
        self.cache.move(source, target)
        for state in (
            self.request,
            self.stream,
            self.prompt_length,
            self.length,
            self.last,
            self.ids,
            self.logprobs,
            self.topk_ids,
            self.topk_logprobs,
        ):
            state[target] = state[source]

    def completions(self) -> list[Completion]:
        assert all(done is not None for done in self._done)
        return [done for done in self._done if done is not None]
