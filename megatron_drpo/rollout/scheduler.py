"""Which response is in which slot of the cache, what is computed next, and when one has ended.

Where it fits: the bookkeeping of `inprocess`. It computes nothing of the model, asks nobody, and
depends on the numbers that it is given alone, so that all ranks of a replica decide alike.

A prompt's tokens but the last fill the cache (prefill), a piece at a time where they are many. The
last one is computed like every token of the response (decode), which gives the law of the first.
So the samples of one prompt share its prefill: it is computed in one slot and copied to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_drpo.mcore.attention import (
    DecodeLayout,
    KVCache,
    Piece,
    RowLayout,
    prefill_layout,
)
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.rollout.stops import StopSearch
from megatron_drpo.types import FinishReason, KeptIds
from megatron_drpo.vocab_parallel import counter_uniforms
from megatron_drpo.vocab_parallel.gemm import KEY_BLOCK, MIN_ROWS, round_up

PREFILL_TOKENS = 8192
"""Prompt tokens that one pass takes at most."""
_MIN_ADMITTED = 8
"""One part in so many of the slots is free before new responses are let in, so that passes over
prompts are few and large."""


@dataclass(eq=False)
class Job:
    """A request on its way."""

    number: int
    """What its session calls it."""
    request: Request
    prompt: int
    """Equal for requests that share the work on their prompt."""
    limit: int
    """Tokens of the response at most."""
    filled: int = 0
    """Tokens of the prompt in the cache."""
    tokens: list[int] = field(default_factory=list)
    """Of the response, what its prompt ends with; only with stop strings."""
    search: StopSearch | None = None
    """For stop strings, once it has a slot."""
    kept: list[Tensor] = field(default_factory=list)
    """int32, of each token; only where truncated, on the last stage."""

    @property
    def prefill(self) -> int:
        """Tokens of the prompt that the cache is filled with: all but the last."""
        return self.request.prompt_ids.numel() - 1

    @property
    def capacity(self) -> int:
        """Positions of the cache that it needs: the last token of a response is never computed."""
        return round_up(self.prefill + self.limit, KEY_BLOCK)


class Pass(NamedTuple):
    """One run of tokens through the model."""

    tokens: Tensor
    """int64 [S]."""
    positions: Tensor
    """int64 [S]."""
    layout: RowLayout | DecodeLayout
    count: int
    """The outputs of so many of the first tokens are wanted: one of each response."""


class Drawn(NamedTuple):
    """One token of n responses."""

    ids: Tensor
    """int64 [n]."""
    logprobs: Tensor
    """fp32 [n]."""
    topk_ids: Tensor
    """int64 [n, K]."""
    topk_logprobs: Tensor
    """fp32 [n, K]."""
    kept: KeptIds | None = None
    """Where truncated, on the last stage."""


class SlotGroup:
    """Responses that are computed together, compact in slots 0 to n - 1 of a cache of their own.

    Args:
        max_slots: responses at the same time.
        slots_at: how many the memory has room for, of so many positions each.
        multiple: of which the tokens of a pass are.
        routing: (layers of the model, experts per token), where experts are recorded.
        exact: see `DecodeLayout`.
        decode: text of token ids; needed with stop strings.
    """

    def __init__(
        self,
        sampling: Sampling,
        max_slots: int,
        slots_at: Callable[[int], int],
        device: torch.device,
        *,
        multiple: int,
        routing: tuple[int, int],
        exact: bool,
        decode: Callable[[list[int]], str] | None,
    ) -> None:
        self.sampling, self.device, self.exact = sampling, device, exact
        self._multiple = multiple
        self.jobs: list[Job] = []
        """Of each slot in use."""
        self._max_slots, self._slots_at, self._decode = max_slots, slots_at, decode
        self._filling: list[tuple[Job, int]] = []
        """What the pass on its way adds to the cache: the job, and how many tokens."""
        experts = torch.empty((0, 0, *routing), dtype=torch.int16, device=device)
        self._cache = KVCache(0, 0, experts=experts if sampling.record_experts else None)
        self._stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        topk = sampling.record_topk

        def empty(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Of each slot.
        self._stream, self._first = empty(0), empty(0)
        self._limit, self._length = empty(0), empty(0)
        self._last, self._position = empty(0), empty(0)  # the token to compute next, and where
        # Of each token of each slot.
        self._ids, self._logprobs = empty(0, 0), empty(0, 0, dtype=torch.float32)
        self._topk_ids = empty(0, 0, topk)
        self._topk_logprobs = empty(0, 0, topk, dtype=torch.float32)

    _BY_SLOT = ("_stream", "_first", "_limit", "_length", "_last", "_position")
    _BY_TOKEN = ("_ids", "_logprobs", "_topk_ids", "_topk_logprobs")

    # What comes next.

    def plan(self, pending: deque[Job], share: int) -> Pass | None:
        """The next pass, None if there is nothing to do.

        Args:
            pending: responses that wait for a slot; those that get one are taken off.
            share: of all responses there are, so many are for this group.
        """
        self._admit(pending, share)
        return self._fill() or (self._next_tokens() if self.jobs else None)

    def idle(self) -> Pass:
        """A pass that leaves nothing behind, for a group that has nothing to do."""
        assert not self.jobs
        rows = self._rows(0)
        self._reserve(rows, KEY_BLOCK, 0)
        zeros = torch.zeros(rows, dtype=torch.long, device=self.device)
        return self._decode_pass(zeros, zeros, 0)

    def _admit(self, pending: deque[Job], share: int) -> None:
        wanted = min(self._max_slots, share)
        free = wanted - len(self.jobs)
        if not pending or (self.jobs and free < max(wanted // _MIN_ADMITTED, 1)):
            return
        first, length = len(self.jobs), self._cache.length
        while pending and len(self.jobs) < wanted:
            needed = max(length, pending[0].capacity)
            if len(self.jobs) >= self._slots_at(needed):
                break  # longer than those before it: until some of them have ended
            length = needed
            self.jobs.append(pending.popleft())
        new = self.jobs[first:]
        if not new:
            return
        if stops := self.sampling.stop_strings:
            assert self._decode is not None
            for job in new:
                job.search = StopSearch(stops, self._decode, job.tokens)
        self._reserve(len(self.jobs), length, max(job.limit for job in new))
        slots = slice(first, len(self.jobs))
        for name, values in (
            ("_stream", [job.request.stream for job in new]),
            ("_first", [job.request.first_position for job in new]),
            ("_limit", [job.limit for job in new]),
            ("_length", [0] * len(new)),
            ("_last", [int(job.request.prompt_ids[-1]) for job in new]),
            ("_position", [job.prefill for job in new]),
        ):
            getattr(self, name)[slots] = torch.tensor(values, device=self.device)

    def _reserve(self, slots: int, length: int, tokens: int) -> None:
        """Room for so many slots, positions of the cache and tokens of a response."""
        rows, length = self._cache.num_slots, max(length, self._cache.length)
        if slots > rows:  # twice as many, so that one after the other costs no copy each
            rows = max(slots, 2 * rows, MIN_ROWS)
        rows = self._rows(min(rows, max(min(self._max_slots, self._slots_at(length)), MIN_ROWS)))
        columns = max(self._ids.size(1), tokens)
        if (rows, length) != (self._cache.num_slots, self._cache.length):
            self._cache.resize(rows, length)
        for name in (*self._BY_SLOT, *self._BY_TOKEN):
            old: Tensor = getattr(self, name)
            size = (rows, columns)[: min(old.dim(), 2)]
            if old.shape[: len(size)] != size:
                new = old.new_zeros((*size, *old.shape[2:]))
                part = tuple(slice(min(a, b)) for a, b in zip(old.shape, size, strict=False))
                new[part] = old[part]
                setattr(self, name, new)

    def _rows(self, count: int) -> int:
        """Tokens of a pass that computes `count`."""
        return round_up(max(count, MIN_ROWS), self._multiple)

    def _fill(self) -> Pass | None:
        """The next pieces of prompts, None if all of them are in the cache."""
        self._share_prompts()
        leaders: dict[int, tuple[int, Job]] = {}
        for slot, job in enumerate(self.jobs):
            if job.filled < job.prefill:
                known = leaders.get(job.prompt)
                if known is None or known[1].filled < job.filled:
                    leaders[job.prompt] = (slot, job)
        pieces: list[Piece] = []
        room = PREFILL_TOKENS
        for slot, job in leaders.values():
            count = min(job.prefill - job.filled, room)
            if count:
                pieces.append(Piece(slot, job.filled, count))
                room -= count
        if not pieces:
            return None
        self._filling = [(self.jobs[piece.slot], piece.length) for piece in pieces]
        tokens = torch.cat(
            [
                self.jobs[piece.slot].request.prompt_ids[piece.start : piece.start + piece.length]
                for piece in pieces
            ]
        )
        if missing := self._rows(tokens.numel()) - tokens.numel():
            tokens = torch.cat([tokens, tokens[:1].expand(missing)])
        layout = prefill_layout(pieces, tokens.numel(), self._cache, self.device)
        return Pass(tokens.to(self.device), layout.positions, layout, 0)

    def _share_prompts(self) -> None:
        """Copy prompts that are in the cache already to the slots that need them."""
        ready: dict[int, int] = {}
        for slot, job in enumerate(self.jobs):
            if job.filled == job.prefill:
                ready.setdefault(job.prompt, slot)
        needing: dict[int, list[int]] = {}
        for slot, job in enumerate(self.jobs):
            if job.filled < job.prefill and job.prompt in ready:
                needing.setdefault(job.prompt, []).append(slot)
                job.filled = job.prefill
        for prompt, slots in needing.items():
            target = torch.tensor(slots, device=self.device)
            source = torch.full_like(target, ready[prompt])
            self._cache.copy(source, target, self.jobs[slots[0]].prefill)

    def _next_tokens(self) -> Pass:
        """The token of every response that comes next."""
        count = len(self.jobs)
        tokens, positions = self._last[:count], self._position[:count]
        if (
            missing := self._rows(count) - count
        ):  # slots that nobody has: what these rows write there is never read
            tokens, positions = (F.pad(part, (0, missing)) for part in (tokens, positions))
        return self._decode_pass(tokens, positions, count)

    def _decode_pass(self, tokens: Tensor, positions: Tensor, count: int) -> Pass:
        length = round_up(int(positions.max()) + 1, KEY_BLOCK)
        hidden = torch.arange(length, device=self.device) > positions[:, None]
        layout = DecodeLayout(
            qkv_format="sbhd",
            cache=self._cache,
            slots=torch.arange(tokens.numel(), device=self.device),
            positions=positions,
            hidden=hidden[:, None, None, None],
            exact=self.exact,
        )
        return Pass(tokens, positions, layout, count)

    # What came of it.

    def uniforms(self) -> Tensor:
        """fp64 [n], the random number of each response's next token."""
        count = len(self.jobs)
        positions = self._first[:count] + self._length[:count]
        return counter_uniforms(self.sampling.seed, self._stream[:count], positions)

    def filled(self) -> None:
        """A pass without outputs has ended: its tokens are in the cache."""
        for job, count in self._filling:
            job.filled += count
        self._filling = []

    def advance(self, drawn: Drawn) -> list[tuple[Job, Completion]]:
        """Append what was drawn to every response; those that have ended leave their slots."""
        count = len(self.jobs)
        slots = torch.arange(count, device=self.device)
        place = self._length[:count]
        self._ids[slots, place] = drawn.ids
        self._logprobs[slots, place] = drawn.logprobs
        if self.sampling.record_topk:
            self._topk_ids[slots, place] = drawn.topk_ids
            self._topk_logprobs[slots, place] = drawn.topk_logprobs
        if drawn.kept is not None:
            parts = drawn.kept.ids.cpu().split(drawn.kept.counts.tolist())
            for job, part in zip(self.jobs, parts, strict=True):
                job.kept.append(part)
        self._last[:count] = drawn.ids
        self._position[:count] += 1
        place += 1
        stopped = torch.isin(drawn.ids, self._stop_ids)
        if self.sampling.stop_strings:
            stopped |= self._completed_texts(drawn.ids).to(self.device)
        done = (stopped | (place >= self._limit[:count])).nonzero().flatten()
        if not done.numel():
            return []
        reasons: list[FinishReason] = ["stop" if by else "length" for by in stopped[done].tolist()]
        return self._retire(done, reasons)

    def remove(self, jobs: set[Job]) -> list[tuple[Job, Completion]]:
        """Take `jobs` out of their slots as they are; no pass may be on its way."""
        slots = [slot for slot, job in enumerate(self.jobs) if job in jobs]
        if not slots:
            return []
        return self._retire(torch.tensor(slots, device=self.device), ["abort"] * len(slots))

    def _completed_texts(self, ids: Tensor) -> Tensor:
        """bool [n]: whether these tokens complete a stop string."""
        found = []
        for job, token in zip(self.jobs, ids.tolist(), strict=True):
            assert job.search is not None
            found.append(job.search.push([token]) is not None)
        return torch.tensor(found)

    def _retire(self, done: Tensor, reasons: list[FinishReason]) -> list[tuple[Job, Completion]]:
        """The completions of slots `done`, which others then take."""
        names = self._BY_TOKEN if self.sampling.record_topk else self._BY_TOKEN[:2]
        columns = zip(*(getattr(self, name)[done].cpu() for name in names), strict=True)
        lengths = self._length[done].tolist()
        finished = []
        for slot, length, reason, parts in zip(
            done.tolist(), lengths, reasons, columns, strict=True
        ):
            ids, logprobs, *topk = (part[:length].clone() for part in parts)
            job, experts = self.jobs[slot], self._cache.experts
            if experts is not None:  # of what was computed: all tokens but the last
                experts = experts[slot, : job.filled + length].to("cpu", copy=True)
            completion = Completion(
                ids, logprobs, reason, *topk, kept_ids=_kept_ids(job), experts=experts
            )
            finished.append((job, completion))
        self._compact(done)
        return finished

    def _compact(self, done: Tensor) -> None:
        """Move the last responses into the slots that `done` leave."""
        count = len(self.jobs)
        active = torch.ones(count, dtype=torch.bool)
        active[done.cpu()] = False
        left = count - done.numel()
        target = (~active[:left]).nonzero().flatten()
        source = active[left:].nonzero().flatten() + left
        for old, new in zip(source.tolist(), target.tolist(), strict=True):
            self.jobs[new] = self.jobs[old]
        del self.jobs[left:]
        if target.numel():
            source, target = source.to(self.device), target.to(self.device)
            self._cache.copy(source, target)
            for name in (*self._BY_SLOT, *self._BY_TOKEN):
                values = getattr(self, name)
                values[target] = values[source]


def _kept_ids(job: Job) -> KeptIds | None:
    if not job.kept:
        return None
    counts = torch.tensor([part.numel() for part in job.kept])
    return KeptIds(torch.cat(job.kept), counts)
