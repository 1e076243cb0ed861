"""The in-process engine: what it generates, and that its log-probs have the trainer's bits.

The reference is the trainer's own forward pass over packed rows (`Policy.score`), which
`test_layouts` holds against transformers, and generation in other circumstances: what is drawn
depends on the request alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.config import ParallelConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.types import Prompt, Rollout, Trajectory
from tests.distributed import run_distributed
from tests.test_layouts import TEMPERATURE, end, make_policy
from tests.tiny_models import VOCAB, save_tiny

BUDGET = 700
"""Tokens of the trainer's rows."""
POSITIONS = 640


def save_model(directory: Path) -> None:
    """With more positions than attention sums over at once."""
    save_tiny(directory, "qwen3")
    path = directory / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": POSITIONS})
    )


def sampling(length: int, **changes: Any) -> Sampling:
    return replace(Sampling(TEMPERATURE, 1.0, 0, length, stop_ids=(2, 9), seed=5), **changes)


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def requests(*lengths: int, samples: int = 1, seed: int = 0) -> list[Request]:
    return [
        Request(prompt, 100 * number + sample)
        for number, prompt in enumerate(prompts(*lengths, seed=seed))
        for sample in range(samples)
    ]


UNEVEN = requests(5, 1, 150, 40, 3, samples=3) + requests(300, 2, seed=1)
"""Groups of samples, prompts of one token, and sums over more keys than one GEMM takes."""


def scored(policy: Any, asked: Sequence[Request], completions: Sequence[Completion]) -> Any:
    """(behaviour log-probs, the trainer's) of this replica's rows, on the last stage."""
    trajectories = [
        Trajectory(
            Rollout(
                Prompt(f"p{number}", "", request.prompt_ids, None),
                0,
                done.response_ids,
                done.logprobs,
                "length",
                0,
                "",
                kept_ids=done.kept_ids,
            ),
            0.0,
            0.0,
        )
        for number, (request, done) in enumerate(zip(asked, completions, strict=True))
    ]
    rows = policy.pack(trajectories)
    pairs = zip(rows, policy.score(rows), strict=False)
    parts = [(row.behaviour_logprobs, scores.logprobs) for row, scores in pairs]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True)) if parts else None


def same(ours: Sequence[Completion], theirs: Sequence[Completion]) -> bool:
    """Whether two runs gave the same, to the last bit of every log-prob."""
    return len(ours) == len(theirs) and all(
        torch.equal(a.response_ids, b.response_ids)
        and torch.equal(a.logprobs, b.logprobs)
        and a.finish_reason == b.finish_reason
        for a, b in zip(ours, theirs, strict=True)
    )


class Passes:
    """Watches what goes through the model: tokens of each pass, and the caches."""

    def __init__(self) -> None:
        self.prefill: list[int] = []
        self.decode: list[int] = []
        self.cache_bytes = 0

    def __enter__(self) -> Passes:
        from megatron_drpo.rollout.inprocess import Session

        self._session, self._run = Session, Session._run
        Session._run = lambda session, work, chunk: self._see(session, work, chunk)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._session._run = self._run

    def _see(self, session: Any, work: Any, chunk: int) -> Tensor:
        from megatron_drpo.mcore.attention import DecodeLayout

        hidden = self._run(session, work, chunk)
        decodes = isinstance(work.layout, DecodeLayout)
        (self.decode if decodes else self.prefill).append(work.tokens.numel())
        parts = [part for layer in work.layout.cache.layers.values() for part in layer]
        size = sum(part.numel() * part.element_size() for part in parts)
        self.cache_bytes = max(self.cache_bytes, size)
        return hidden


# One rank.


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    root = tmp_path_factory.mktemp("inprocess")
    save_model(root / "model")
    from megatron_drpo.mcore import cpu, parallel

    cpu.install()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training: several split a GEMM's rows in ways of their own
    dist.init_process_group("gloo", f"file://{root}/store", rank=0, world_size=1)
    made, layouts = {}, []
    for name in ("fp32", "bf16"):
        bf16 = name == "bf16"
        layout, made[name] = make_policy(
            root / "model", 0, ParallelConfig(), budget=BUDGET, bf16=bf16
        )
        layouts.append(layout)
        if not bf16:
            parallel.parallel_state.destroy_model_parallel()
    yield made
    parallel.destroy(layouts[-1])
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture
def policy(policies: dict[str, Any]) -> Any:
    return policies["fp32"]


def engine(policy: Any, slots: int = 64, **options: Any) -> Any:
    from megatron_drpo.rollout.inprocess import InProcessEngine

    return InProcessEngine(policy, max_slots=slots, **options)


def generate(policy: Any, asked: Sequence[Request], law: Sampling, **options: Any) -> Any:
    return engine(policy, **options).generate(asked, law)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("slots", [2, 7, 64])
def test_log_probs_have_the_bits_of_training(policies, dtype: str, slots: int) -> None:
    policy = policies[dtype]
    done = generate(policy, UNEVEN, sampling(20), slots=slots)
    ours, trained = scored(policy, UNEVEN, done)
    assert ours.numel() > 200 and torch.equal(ours, trained)
    # Neither do they depend on what else is generated.
    alone = [generate(policy, [request], sampling(20))[0] for request in UNEVEN[-3:]]
    assert same(alone, done[-3:])


def test_generation_that_need_not_be_exact_stays_close(policy) -> None:
    done = generate(policy, UNEVEN, sampling(20), exact=False)
    ours, trained = scored(policy, UNEVEN, done)
    assert (ours - trained).abs().max() <= 1e-5


def test_a_group_shares_its_prefill(policy) -> None:
    asked = requests(41, 30, samples=6)
    apart = [*asked[::2], *asked[1::2]]  # neighbours still, but each prompt in two places
    with Passes() as passes:
        done = generate(policy, asked, sampling(12))
    assert sum(passes.prefill) == 40 + 29  # the last token of a prompt is computed in each slot
    with Passes() as passes:
        again = generate(policy, apart, sampling(12))
    assert sum(passes.prefill) == 2 * (40 + 29)
    assert same(again, [*done[::2], *done[1::2]])
    with Passes() as passes:
        # As slots become free, one after the other: taken from those who have the prompt.
        few = generate(policy, asked[:6], sampling(12), slots=4)
    assert sum(passes.prefill) == 40 and max(passes.decode) == 4
    assert same(few, done[:6])


def test_long_prompts_are_prefilled_in_pieces(policy, monkeypatch) -> None:
    from megatron_drpo.rollout import scheduler

    asked = requests(300, 6, 90, samples=2) + requests(200, seed=1)
    whole = generate(policy, asked, sampling(10))
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 64)
    with Passes() as passes:
        pieces = generate(policy, asked, sampling(10))
    assert max(passes.prefill) == 64 and sum(passes.prefill) == 299 + 5 + 89 + 199
    assert same(whole, pieces)


@pytest.mark.parametrize("slots", [5, 8])
def test_the_cache_stays_within_its_memory(policy, slots: int) -> None:
    from megatron_drpo.rollout.memory import kv_cache_bytes

    asked, law = requests(*[9] * 12, 100, 5), sampling(30)
    size = {"tp_size": 1, "pp_size": 1, "element_bytes": 4, "length": 130}
    room = kv_cache_bytes(policy.architecture, slots=slots, **size)
    with Passes() as passes:
        done = generate(policy, asked, law, cache_bytes=room)
    assert max(passes.decode) == 12  # there is room for more until the long one comes
    assert passes.cache_bytes <= room
    assert same(done, generate(policy, asked, law))
    with Passes() as passes:
        generate(policy, requests(*[100] * slots), law, cache_bytes=room)
    assert passes.cache_bytes == room and max(passes.decode) == slots  # all that there is


def test_too_little_memory_for_the_cache_is_refused(policy) -> None:
    from megatron_drpo.rollout.memory import kv_cache_bytes

    size = {"tp_size": 1, "pp_size": 1, "element_bytes": 4, "length": 130}
    least = kv_cache_bytes(policy.architecture, slots=4, **size)
    with pytest.raises(RolloutError, match=r"--rollout-kv-cache-gib .*4 responses of 192 tokens"):
        generate(policy, requests(100), sampling(30), cache_bytes=least - 1)
    generate(policy, requests(100), sampling(30), cache_bytes=least)


def test_passes_can_be_multiples_of_what_a_layout_needs(policy, monkeypatch) -> None:
    from megatron_drpo.rollout import inprocess
    from megatron_drpo.rollout.memory import kv_cache_bytes

    size = {"tp_size": 1, "pp_size": 1, "element_bytes": 4, "length": 190}
    room = kv_cache_bytes(policy.architecture, slots=11, **size)
    law = sampling(30)
    without = generate(policy, UNEVEN[:-2], law, cache_bytes=room)
    monkeypatch.setattr(inprocess, "rows_multiple", lambda config: 6)
    with Passes() as passes:
        done = generate(policy, UNEVEN[:-2], law, cache_bytes=room)
    assert max(passes.decode) == 6 and not any(n % 6 for n in passes.decode + passes.prefill)
    assert passes.cache_bytes <= room
    assert same(done, without)
    least = kv_cache_bytes(policy.architecture, slots=6, **size)
    with pytest.raises(RolloutError, match=r"--rollout-kv-cache-gib .*6 responses of 192 tokens"):
        generate(policy, requests(150), law, cache_bytes=least - 1)
    generate(policy, requests(150), law, cache_bytes=least)


def test_each_request_has_its_own_limit(policy) -> None:
    asked = requests(4, 4, 4)
    limits = [3, None, 40]
    limited = [
        replace(request, max_response_length=limit)
        for request, limit in zip(asked, limits, strict=True)
    ]
    done = generate(policy, limited, sampling(12, stop_ids=()))
    assert [one.response_ids.numel() for one in done] == [3, 12, 40]
    assert {one.finish_reason for one in done} == {"length"}
    full = generate(policy, asked, sampling(40, stop_ids=()))
    for ours, whole in zip(done, full, strict=True):
        count = ours.response_ids.numel()
        assert torch.equal(ours.response_ids, whole.response_ids[:count])


def test_a_response_can_be_continued(policy) -> None:
    asked, law = requests(12, 90), sampling(20, stop_ids=())
    whole = generate(policy, asked, law)
    for begun in (1, 7, 19):
        rest = [
            Request(
                torch.cat([request.prompt_ids, done.response_ids[:begun]]),
                request.stream,
                first_position=begun,
                max_response_length=20 - begun,
            )
            for request, done in zip(asked, whole, strict=True)
        ]
        for new, old in zip(generate(policy, rest, law), whole, strict=True):
            assert torch.equal(new.response_ids, old.response_ids[begun:])
            assert torch.equal(new.logprobs, old.logprobs[begun:])


def text_of(ids: Sequence[int]) -> str:
    """A token is a letter, two, or nothing."""
    return "".join("" if i % 7 == 0 else "ab" if i % 7 == 1 else "abcdefgh"[i % 7] for i in ids)


def test_stop_strings_end_a_response_with_the_token_that_completes_one(policy) -> None:
    law = sampling(60, stop_ids=())
    asked = requests(3, 8, 20, samples=4)
    whole = generate(policy, asked, law)
    law = replace(law, stop_strings=("babd", "dd"))  # of two tokens at least
    done = generate(policy, asked, law, decode=text_of)
    stopped, rests, reached = 0, [], []
    for request, ours, full in zip(asked, done, whole, strict=True):
        ids, count = full.response_ids.tolist(), ours.response_ids.numel()
        assert ours.response_ids.tolist() == ids[:count]
        complete = [
            n for n in range(1, 61) if any(stop in text_of(ids[:n]) for stop in law.stop_strings)
        ]
        assert count == (complete or [60])[0]
        assert ours.finish_reason == ("stop" if complete else "length")
        stopped += bool(complete)
        if complete:
            begun = torch.cat([request.prompt_ids, full.response_ids[: count - 1]])
            rests.append(replace(request, prompt_ids=begun, first_position=count - 1))
            reached.append(ids[count - 1])
    assert stopped >= 3
    # A string that began in a part of the response that is in the prompt already.
    for token, one in zip(reached, generate(policy, rests, law, decode=text_of), strict=True):
        assert one.response_ids.tolist() == [token] and one.finish_reason == "stop"


def test_truncated_sampling_keeps_its_ids(policy) -> None:
    law = sampling(15, top_k=9, top_p=0.8)
    done = generate(policy, UNEVEN, law, slots=7)
    for one in done:
        kept = one.kept_ids
        assert kept is not None and kept.counts.numel() == one.response_ids.numel()
        assert kept.counts.min() >= 1 and kept.counts.max() <= 9
        for token, ids in zip(one.response_ids, kept.ids.split(kept.counts.tolist()), strict=True):
            assert token in ids
    assert len({int(count) for one in done for count in one.kept_ids.counts}) > 4
    ours, trained = scored(policy, UNEVEN, done)
    assert torch.equal(ours, trained)


def test_requests_are_added_while_others_run(policy) -> None:
    law = sampling(16)
    whole = generate(policy, UNEVEN, law)
    session = engine(policy, slots=6).start(law)
    done: dict[int, Completion] = {}
    numbers: list[int] = []
    for first in range(0, len(UNEVEN), 4):
        numbers += session.add(UNEVEN[first : first + 4])
        for _ in range(3):
            done.update(session.step())
    while session.busy:
        done.update(session.step())
    assert numbers == list(range(len(UNEVEN)))
    assert same([done[number] for number in numbers], whole)
    assert session.step() == []  # nothing left, nothing to do


def test_an_aborted_response_has_what_it_had(policy, monkeypatch) -> None:
    from megatron_drpo.rollout import scheduler

    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 100)  # so that prompts are under way
    law = sampling(16, stop_ids=(), record_topk=3)
    asked = requests(30, 250, samples=2) + requests(4, 4)
    whole = generate(policy, asked, law)
    for steps in range(12):
        session = engine(policy, slots=5).start(law)
        session.add(asked)
        done: dict[int, Completion] = {}
        for _ in range(steps):
            done.update(session.step())
        aborted = dict(session.abort([0, 2, 5, 77]))  # there is no 77
        assert aborted.keys() == {0, 2, 5}
        assert aborted[5].response_ids.numel() == 0  # it waited for a slot
        assert aborted[0].topk_ids.shape == (aborted[0].response_ids.numel(), 3)
        while session.busy:
            done.update(session.step())
        assert done.keys() == {1, 3, 4}
        assert same([done[n] for n in (1, 3, 4)], [whole[n] for n in (1, 3, 4)])
        for number, one in aborted.items():
            count = one.response_ids.numel()
            assert one.finish_reason == "abort" and count <= steps
            assert torch.equal(one.logprobs, whole[number].logprobs[:count])
    assert aborted[0].response_ids.numel() > 3


def test_all_responses_can_be_aborted(policy) -> None:
    session = engine(policy, slots=3).start(sampling(16, stop_ids=(), top_k=4))
    session.add(requests(5, 5, 5, 5))
    session.step()
    session.step()
    done = dict(session.abort())
    assert [one.response_ids.numel() for _, one in sorted(done.items())] == [1, 1, 1, 0]
    assert all(len(one.kept_ids.counts) == one.response_ids.numel() for one in done.values())
    assert not session.busy and session.abort() == []


@pytest.mark.parametrize(
    ("request_", "law", "message"),
    [
        (Request(torch.empty(0, dtype=torch.long), 0), sampling(4), "no tokens"),
        (requests(600)[0], sampling(41), r"600 tokens .* up to 41 .* 640 positions"),
        (requests(5)[0], sampling(4, stop_strings=("x",)), "no tokenizer"),
    ],
)
def test_what_cannot_be_generated_is_refused(policy, request_, law, message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        generate(policy, [request_], law)


class Spoiled:
    """An engine whose log-probs are off by one bit, in one token."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def generate(self, asked: Any, law: Sampling) -> list[Completion]:
        first, *others = self._inner.generate(asked, law)
        logprobs = first.logprobs.clone()
        logprobs[0] = logprobs[0].nextafter(torch.tensor(-100.0))
        return [replace(first, logprobs=logprobs), *others]


def test_the_probe_tells_exact_from_nearly_exact(policies) -> None:
    from megatron_drpo.rollout.inprocess import probe_exact

    for policy in policies.values():
        probe = probe_exact(policy, engine(policy))
        assert probe.exact and probe.max_gap == 0 and probe.num_tokens > 100
        assert "bit for bit" in probe.text
    policy = policies["fp32"]
    probe = probe_exact(policy, Spoiled(engine(policy)))  # type: ignore[arg-type]
    assert not probe.exact and 0 < probe.max_gap < 1e-6 and "differ" in probe.text


def test_attention_of_a_row_is_that_of_its_definition() -> None:
    from megatron_drpo.mcore.attention import attend_layout, row_layout

    lengths, padding, heads, groups, dim = (300, 5, 70, 1, 66), 9, 4, 2, 8
    tokens = sum(lengths) + padding
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(tokens, 1, n, dim, generator=generator).requires_grad_()
        for n in (heads, groups, groups)
    )
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    out = attend_layout(query, key, value, row_layout(bounds, tokens), 1, 0.3)
    upstream = torch.randn(tokens - padding, heads * dim, generator=generator)
    grads = torch.autograd.grad((out[: tokens - padding, 0] * upstream).sum(), (query, key, value))

    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    rows, first = [], 0
    for length in lengths:
        for t in range(first, first + length):
            for head in range(heads):
                group = head * groups // heads
                scores = 0.3 * wide[1][first : t + 1, 0, group] @ wide[0][t, 0, head]
                rows.append(scores.softmax(-1) @ wide[2][first : t + 1, 0, group])
        first += length
    expected = torch.cat(rows).view(-1, heads * dim)
    assert (out[: tokens - padding, 0] - expected).abs().max() < 1e-6
    wanted = torch.autograd.grad((expected * upstream).sum(), wide)
    for ours, right in zip(grads, wanted, strict=True):
        assert (ours - right).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [3, 100, 144, 200, 300])
def test_a_cached_token_has_the_bits_of_its_row(policies, length: int, dtype) -> None:
    """However many keys others see: with heads of a usual size, sums split by their number."""
    from megatron_drpo.mcore.attention import (
        DecodeLayout,
        KVCache,
        Piece,
        attend_layout,
        prefill_layout,
        row_layout,
    )

    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(length, 1, heads, 64, generator=generator).to(dtype) for heads in (4, 2, 2)
    )
    row = attend_layout(query, key, value, row_layout(torch.tensor([0, length]), length), 1, 0.125)
    for others in (0, 250, 500):
        cache, most = KVCache(4, 576), max(length - 1, others)
        pieces = [Piece(2, 0, length // 3), Piece(2, length // 3, length - length // 3)]
        for piece in pieces:
            part = slice(piece.start, piece.start + piece.length)
            padded = [
                torch.cat([x[part], x[part][:1].expand(3, -1, -1, -1)]) for x in (query, key, value)
            ]
            layout = prefill_layout([piece], piece.length + 3, cache, torch.device("cpu"))
            out = attend_layout(*padded, layout, 1, 0.125)
            assert torch.equal(out[: piece.length], row[part])
        cache.copy(torch.tensor([2]), torch.tensor([1]), length - 1)
        last = [torch.cat([x[:1], x[-1:], x[:2]]) for x in (query, key, value)]
        positions = torch.tensor([0, length - 1, most, 0])
        seen = torch.arange(-(-(most + 1) // 64) * 64) > positions[:, None]
        decode = DecodeLayout(
            qkv_format="sbhd",
            cache=cache,
            slots=torch.arange(4),
            positions=positions,
            hidden=seen[:, None, None, None],
        )
        assert torch.equal(attend_layout(*last, decode, 1, 0.125)[1], row[-1])


# Several ranks.

LAYOUTS = {"tp2": (2, 1, 1), "pp2": (1, 2, 1), "pp2vp2": (1, 2, 2)}


def _ranks(rank: int, world_size: int, root: Path) -> None:
    """Everything of one start: each layout generates in all the ways that have to agree."""
    from megatron_drpo.rollout import scheduler
    from megatron_drpo.rollout.inprocess import probe_exact

    for name, sizes in LAYOUTS.items():
        for dtype in ("fp32", "bf16"):
            layout, policy = make_policy(
                root / "model", rank, ParallelConfig(*sizes), budget=BUDGET, bf16=dtype == "bf16"
            )
            results: dict[str, Any] = {"probe": probe_exact(policy, engine(policy)).exact}
            results["plain"] = generate(policy, UNEVEN, sampling(20))
            results["truncated"] = generate(policy, UNEVEN, sampling(12, top_k=9), slots=6)
            for key in ("plain", "truncated"):
                pair = scored(policy, UNEVEN, results[key])
                results[f"{key} exact"] = pair is None or torch.equal(*pair)
            whole, scheduler.PREFILL_TOKENS = scheduler.PREFILL_TOKENS, 64
            session = engine(policy, slots=6).start(sampling(20))
            added = session.add(UNEVEN[:9])
            done: dict[int, Completion] = {}
            for _ in range(9):
                done.update(session.step())
            added += session.add(UNEVEN[9:])
            done.update(session.abort([1, 9]))
            results["aborted"] = done.pop(1, None), done.pop(9)
            while session.busy:
                done.update(session.step())
            scheduler.PREFILL_TOKENS = whole
            results["session"] = [done.get(number) for number in added]
            with Passes() as passes:
                session = engine(policy).start(sampling(12, stop_ids=()))
                session.add(requests(*[3] * 12))
                for _ in range(6):
                    session.step()
            results["passes"] = len(passes.prefill) + len(passes.decode), max(passes.decode)
            torch.save(results, root / f"{name}-{dtype}-{rank}.pt")
            end(layout, policy, root)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    save_model(root / "model")
    run_distributed(_ranks, 2, root)
    return root


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_generate_alike_and_have_the_bits_of_training(
    ranks: Path, policies, name: str, dtype: str
) -> None:
    policy = policies[dtype]
    here = {
        "plain": generate(policy, UNEVEN, sampling(20)),
        "truncated": generate(policy, UNEVEN, sampling(12, top_k=9)),
    }
    for rank in range(2):
        got = torch.load(ranks / f"{name}-{dtype}-{rank}.pt", weights_only=False)
        assert got["probe"] and got["plain exact"] and got["truncated exact"]
        whole = got["plain"]
        if dtype == "fp32" or name != "tp2":  # TP rounds other sums
            for key, expected in here.items():
                for ours, one in zip(got[key], expected, strict=True):
                    assert torch.equal(ours.response_ids, one.response_ids)
                    assert (ours.logprobs - one.logprobs).abs().max() < 1e-5
        for ours, one in zip(got["truncated"], here["truncated"], strict=True):
            assert ours.kept_ids.counts.numel() == ours.response_ids.numel()
            if dtype == "fp32":
                assert torch.equal(ours.kept_ids.ids, one.kept_ids.ids)
        for number, ours in enumerate(got["session"]):
            if ours is not None:
                assert same([ours], [whole[number]])
        assert [n for n, ours in enumerate(got["session"]) if ours is None] == [1, 9]
        begun, waiting = got["aborted"]
        assert waiting.response_ids.numel() == 0 and waiting.finish_reason == "abort"
        count = begun.response_ids.numel()
        assert begun.finish_reason == "abort" and 0 < count < whole[1].response_ids.numel()
        assert torch.equal(begun.logprobs, whole[1].logprobs[:count])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["pp2", "pp2vp2"])
def test_pipeline_stages_all_work_in_every_tick(ranks: Path, name: str) -> None:
    """In a step, each chunk of the model computes a pass of each of two groups, which share the
    responses out; less where the pipeline fills."""
    for rank in range(2):
        got = torch.load(ranks / f"{name}-fp32-{rank}.pt", weights_only=False)
        passes, largest = got["passes"]
        chunks = 2 if name.endswith("vp2") else 1
        assert passes >= 2 * chunks * 6 - 2 and largest == 6
