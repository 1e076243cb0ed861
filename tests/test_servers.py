"""Generation by servers, against a loopback server whose law is a table, and against the real one.

The table gives every log-prob in closed form; the real engine is compared with transformers.
"""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_drpo.errors import ConfigError, RolloutError
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.rollout.servers import (
    DIALECTS,
    Client,
    DiskUpdate,
    GroupClose,
    GroupOpen,
    GroupUpdate,
    Job,
    ServerEngine,
    ServerError,
)
from megatron_drpo.rollout.servers import engine as engine_module
from megatron_drpo.rollout.servers.dialects import BadAnswerError
from tests.loopback_server import BigramEngine, LoopbackServer

V, STOP, TEMPERATURE = 23, 2, 0.7
PATHS = {"vllm": "/v1/completions", "sglang": "/generate"}
BOTH = pytest.mark.parametrize("dialect", ["vllm", "sglang"])


def table(seed: int) -> Tensor:
    return 2 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + i) for i in ids)


def closed_form(
    law: Tensor, prompt: Sequence[int], ids: Sequence[int], temperature: float = TEMPERATURE
) -> list[float]:
    """Log-probs of a response under a table."""
    out = []
    for before, token in zip([prompt[-1], *ids], ids, strict=False):
        weights = [math.exp(float(x) / temperature) for x in law[before]]
        out.append(math.log(weights[token] / sum(weights)))
    return out


class Recorder:
    """Weights that only tell what was done to them."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def load_directory(self, directory: str) -> None:
        self.seen.append(directory)

    def init_group(self, **meeting: Any) -> None:
        self.seen.append(meeting)

    def receive(self, names: Any, shapes: Any, dtypes: Any) -> int:
        self.seen.append((names, shapes, dtypes))
        return len(names)

    def destroy_group(self) -> None:
        self.seen.append("left")


@pytest.fixture(scope="module")
def started() -> Iterator[list[LoopbackServer]]:
    law = table(0)
    both = [
        LoopbackServer(engine, decode=decode, score=engine.logprobs, weights=Recorder())
        for engine in (BigramEngine(law, decode=decode), BigramEngine(law, decode=decode))
    ]
    with both[0], both[1]:
        yield both


@pytest.fixture
def servers(started: list[LoopbackServer]) -> list[LoopbackServer]:
    for server in started:
        server.heal()
        server.requests.clear()
        server.weights.seen.clear()
        server.flushed, server.version = 0, "default"
        server.engine.table, server.engine.step_seconds, server.engine.steps = table(0), 0.0, 0
    return started


@pytest.fixture
def build() -> Iterator[Any]:
    """An engine over servers; closed at the end."""
    built = []

    def make(dialect: str, servers: Sequence[LoopbackServer | str], **options: Any) -> ServerEngine:
        urls = [each if isinstance(each, str) else each.url for each in servers]
        options = {"timeout_seconds": 20.0, "retries": 2, "decode": decode} | options
        built.append(ServerEngine(dialect, urls, **options))
        return built[-1]

    yield make
    for engine in built:
        engine.close()


def sampling(**changes: Any) -> Sampling:
    fields = {"temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0, "max_response_length": 12}
    return Sampling(**fields | {"stop_ids": (STOP,), "seed": 5} | changes)


def requests(num_prompts: int, samples: int = 1, **fields: Any) -> list[Request]:
    return [
        Request(torch.tensor([3, 4 + prompt % 16, 5 + prompt % 7]), prompt * samples + i, **fields)
        for prompt in range(num_prompts)
        for i in range(samples)
    ]


def assert_drawn(
    done: Completion, request: Request, law: Tensor, limit: int, stop_ids: Sequence[int] = (STOP,)
) -> None:
    """The response is complete, and its log-probs are those of the law."""
    ids, prompt = done.response_ids.tolist(), request.prompt_ids.tolist()
    assert done.logprobs.dtype == torch.float32 and done.response_ids.dtype == torch.int64
    assert done.logprobs.tolist() == pytest.approx(closed_form(law, prompt, ids), abs=2e-6)
    ends = [token for token in ids if token in stop_ids]
    if done.finish_reason == "stop":
        assert ends == ids[-1:]
    else:
        assert (done.finish_reason, len(ids), ends) == ("length", limit, [])


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def set_pace(servers: Sequence[LoopbackServer], step_seconds: float) -> None:
    for server in servers:
        server.engine.step_seconds = step_seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What comes back.


@BOTH
def test_ids_and_log_probs_of_the_sampled_law(dialect, servers, build) -> None:
    engine = build(dialect, servers[:1])
    wanted = requests(6, 4)
    found = engine.generate(wanted, sampling())
    for done, request in zip(found, wanted, strict=True):
        assert_drawn(done, request, servers[0].engine.table, 12)
    assert {done.finish_reason for done in found} == {"stop", "length"}
    assert servers[0].count(PATHS[dialect]) == 6, "a group is one request"
    if dialect == "sglang":
        for _, body in servers[0].requests:
            seeds = {law["sampling_seed"] for law in body["sampling_params"]}
            assert len(seeds) == 4 and max(seeds) < 1 << 31 and "n" not in body
    texts = [tuple(done.response_ids.tolist()) for done in found]
    assert len(set(texts)) > 20
    again = engine.generate(wanted, sampling())
    assert [tuple(done.response_ids.tolist()) for done in again] == texts
    other = engine.generate(wanted, sampling(seed=6))
    assert [tuple(done.response_ids.tolist()) for done in other] != texts


@BOTH
def test_limits_of_requests_and_greedy(dialect, servers, build) -> None:
    engine = build(dialect, servers[:1])
    prompt = torch.tensor([4, 9])
    wanted = [Request(prompt, 0, max_response_length=n) for n in (1, 3, 3, 7)]
    found = engine.generate(wanted, sampling(temperature=0.0, stop_ids=()))
    chain = [9]
    for _ in range(7):
        chain.append(int(servers[0].engine.table[chain[-1]].argmax()))
    assert [d.response_ids.tolist() for d in found] == [chain[1 : n + 1] for n in (1, 3, 3, 7)]
    assert all(not d.logprobs.any() for d in found), "a law of one token"


@BOTH
def test_likeliest_ids(dialect, servers, build) -> None:
    law = servers[0].engine.table.double() / TEMPERATURE
    wanted = requests(3, 2)
    for done, request in zip(
        build(dialect, servers[:1]).generate(wanted, sampling(record_topk=3)), wanted, strict=True
    ):
        before = [int(request.prompt_ids[-1]), *done.response_ids.tolist()[:-1]]
        best = torch.log_softmax(law[before], -1).topk(3)
        assert torch.equal(done.topk_ids, best.indices)
        assert torch.allclose(done.topk_logprobs.double(), best.values, atol=2e-6)
        assert done.topk_logprobs.dtype == torch.float32


@BOTH
def test_truncated_log_probs_are_not_known(dialect, servers, build) -> None:
    engine = build(dialect, servers[:1])
    (done,) = engine.generate(requests(1), sampling(top_p=0.9, temperature=0.5))
    assert done.logprobs.isnan().all() and done.kept_ids is None
    _, body = servers[0].requests[-1]
    law = body if dialect == "vllm" else body["sampling_params"][0]
    assert (law["top_p"], law["temperature"], law["repetition_penalty"]) == (0.9, 0.5, 1.0)


@BOTH
def test_stop_strings_end_with_the_token_that_completes_them(dialect, servers, build) -> None:
    engine = build(dialect, servers[:1])
    found = engine.generate(
        requests(8, 4), sampling(stop_strings=("bc", "k"), max_response_length=40)
    )
    ended = 0
    for done in found:
        text = decode(done.response_ids.tolist())
        assert "bc" not in text[:-1] and "k" not in text[:-1]
        if done.finish_reason == "stop" and not text.endswith(decode([STOP])):
            assert text.endswith(("bc", "k"))
            ended += 1
    assert ended > 5
    with pytest.raises(ConfigError, match="--rollout-stop-strings"):
        build(dialect, servers[:1], decode=None).generate([], sampling(stop_strings=("x",)))
    other = build(dialect, servers[:1], decode=lambda ids: "?" * len(ids))
    with pytest.raises(RolloutError, match="tokenizer"):
        other.generate(requests(8), sampling(stop_strings=("k",), max_response_length=40))


def test_the_servers_text_is_not_looked_at(servers, build, monkeypatch) -> None:
    monkeypatch.setattr(servers[0], "_decode", lambda ids: "3 3 3")
    wanted = requests(2)
    found = build("vllm", servers[:1]).generate(wanted, sampling())
    for done, request in zip(found, wanted, strict=True):
        assert_drawn(done, request, servers[0].engine.table, 12)


# What goes wrong.


@BOTH
@pytest.mark.parametrize(
    "fault, message",
    [
        ("redirect", "redirects.*not followed"),
        ("garbage", "not JSON"),
        ("constant", "not JSON"),
        ("flood", "more than [0-9]+ bytes"),
        ("positive", "above 0"),
        ("fewer", "1 responses in its answer where 2 were wanted"),
        ("unequal", "log-probs for|ended at 11 tokens"),
        ("short", "ended at 1 tokens where 12.*--rollout-max-response-length"),
        ("foreign", "no stop id.*--rollout-stop-ids"),
        ("text", "token ids?"),
    ],
)
def test_nonsense_is_refused_at_once(dialect, fault, message, servers, build) -> None:
    servers[0].fail(fault, None)
    with pytest.raises(RolloutError, match=message) as caught:
        build(dialect, servers).generate(requests(1, 2), sampling(stop_ids=()))
    assert servers[0].url in str(caught.value)
    assert [server.count(PATHS[dialect]) for server in servers] == [1, 0]
    assert servers[0].count("/health") == 0, "a redirect was followed"


@BOTH
@pytest.mark.parametrize("fault", ["error", "busy", "drop"])
def test_retries_are_bounded(dialect, fault, servers, build) -> None:
    engine = build(dialect, servers[:1], retries=2)
    servers[0].fail(fault, 2)
    wanted = requests(1, 2)
    for done, request in zip(engine.generate(wanted, sampling()), wanted, strict=True):
        assert_drawn(done, request, servers[0].engine.table, 12)
    assert servers[0].count(PATHS[dialect]) == 3
    servers[0].fail(fault, None)
    with pytest.raises(RolloutError, match=servers[0].url) as caught:
        engine.generate(wanted, sampling())
    assert servers[0].count(PATHS[dialect]) == 6
    assert "\x1b" not in str(caught.value)


def test_a_server_that_fails_is_out_for_its_batch(servers, build) -> None:
    engine = build("vllm", servers, retries=2, max_outstanding=2)
    servers[0].fail("error", None)
    wanted = requests(12, 2)
    for done, request in zip(engine.generate(wanted, sampling()), wanted, strict=True):
        assert_drawn(done, request, servers[1].engine.table, 12)
    assert servers[0].count(PATHS["vllm"]) == 3
    servers[0].heal()
    engine.generate(wanted, sampling())
    assert servers[0].count(PATHS["vllm"]) > 3


def test_failures_count_in_a_row(servers, build) -> None:
    engine = build("vllm", servers[:1], retries=4, max_outstanding=1)
    servers[0].fail("error")
    engine.submit(requests(6), sampling(), lambda *_: servers[0].fail("error")).result()
    assert servers[0].count(PATHS["vllm"]) == 12, "one failure before each response"


def test_a_server_that_hangs_is_out_at_once_and_all_are_named(servers, build) -> None:
    engine = build("sglang", servers, timeout_seconds=1.5, max_outstanding=2)
    servers[0].fail("hang", None)
    set_pace(servers, 0.03)  # so that work is left when the first has been late
    wanted = requests(8, 2)
    how = sampling(stop_ids=())
    for done, request in zip(engine.generate(wanted, how), wanted, strict=True):
        assert_drawn(done, request, servers[1].engine.table, 12, stop_ids=())
    assert servers[0].count(PATHS["sglang"]) == 1
    servers[1].fail("hang", None)
    with pytest.raises(RolloutError, match="no server is left") as caught:
        engine.generate(wanted, sampling())
    for server in servers:
        assert f"{server.url}: no answer to /generate within 1.5 s" in str(caught.value)


def test_nobody_listens(servers, build) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    engine = build("vllm", [nowhere, servers[0]])
    wanted = requests(3)
    for done, request in zip(engine.generate(wanted, sampling()), wanted, strict=True):
        assert_drawn(done, request, servers[0].engine.table, 12)
    with pytest.raises(RolloutError, match=f"{nowhere}: the connection failed") as caught:
        engine.ready()
    assert servers[0].url not in str(caught.value)
    build("vllm", servers).ready()


def test_ready_waits_for_a_server_that_is_coming_up(build) -> None:
    port = free_port()
    engine = build("vllm", [f"http://127.0.0.1:{port}"])
    late = LoopbackServer(BigramEngine(table(0)), port=port)
    timer = threading.Timer(0.3, late.__enter__)
    timer.start()
    engine.ready(wait_seconds=10)
    timer.join()
    late.__exit__()


def test_a_missing_route_names_the_remedy(servers) -> None:
    client = Client(servers[0].url + "/elsewhere", DIALECTS["vllm"])
    with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE=1"):
        run(client.version())


def run(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "localhost:8000",
            "ftp://host:1",
            "http://",
            "http://host:99999",
            "file:///etc/passwd",
        ),
        *("http://user:secret@host", "http://host/?x=1", "http://host/#x"),
    ],
)
def test_addresses_that_are_none(url) -> None:
    with pytest.raises(ConfigError, match="--rollout-servers"):
        ServerEngine("vllm", [url])


def test_other_mistakes_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match="--rollout-servers"):
        ServerEngine("vllm", [])
    with pytest.raises(ConfigError, match="twice"):
        ServerEngine("vllm", ["http://host:1/", "http://host:1"])
    with pytest.raises(ConfigError, match="--rollout-engine"):
        ServerEngine("other", ["http://host:1"])


def test_proxies_of_the_environment_are_not_used(servers, build, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    build("vllm", servers[:1], retries=0).generate(requests(1), sampling())


# Who does what, and when.


def test_work_goes_to_the_server_that_is_done(servers, build) -> None:
    servers[0].engine.step_seconds = 0.02
    build("vllm", servers, max_outstanding=2).generate(requests(20, 2), sampling(stop_ids=()))
    slow, fast = (server.count(PATHS["vllm"]) for server in servers)
    assert slow + fast == 20 and fast > 2 * slow > 0


def test_work_is_balanced_by_the_tokens_outstanding(servers, build) -> None:
    set_pace(servers, 0.02)
    prompt = torch.tensor([3, 4])
    wanted = [Request(prompt, i, max_response_length=n) for i, n in enumerate((64, 8, 9, 10, 11))]
    build("vllm", servers).generate(wanted, sampling(stop_ids=()))
    assert sorted(server.count(PATHS["vllm"]) for server in servers) == [1, 4]


def test_completions_are_told_as_they_finish(servers, build) -> None:
    servers[0].engine.step_seconds = 0.005
    told: list[tuple[int, int, str]] = []
    engine = build("sglang", servers[:1])
    wanted = [
        Request(torch.tensor([3 + n]), 0, max_response_length=length)
        for n, length in enumerate((90, 5, 45))
    ]
    seen_early: list[bool] = []

    def on_done(index: int, done: Completion) -> None:
        told.append((index, done.response_ids.numel(), threading.current_thread().name))
        seen_early.append(pending.done())

    pending = engine.submit(wanted, sampling(stop_ids=()), on_done)
    found = pending.result()
    assert [(index, count) for index, count, _ in told] == [(1, 5), (2, 45), (0, 90)]
    assert [done.response_ids.numel() for done in found] == [90, 5, 45]
    assert not any(seen_early) and pending.done()
    assert threading.current_thread().name not in {name for *_, name in told}

    def bad(index: int, done: Completion) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine.submit(wanted, sampling(), bad).result()


def test_batches_at_the_same_time(servers, build) -> None:
    engine = build("vllm", servers, max_outstanding=4)
    pendings = [
        (wanted, engine.submit(wanted, sampling(seed=seed)))
        for seed in range(4)
        if (wanted := requests(3 + seed, 2))
    ]
    for wanted, pending in pendings:
        for done, request in zip(pending.result(), wanted, strict=True):
            assert_drawn(done, request, servers[0].engine.table, 12)


def test_cancelled_and_closed(servers, build) -> None:
    servers[0].engine.step_seconds = 0.01
    engine = build("vllm", servers[:1])
    pending = engine.submit(requests(2), sampling(max_response_length=5000, stop_ids=()))
    pending.cancel()
    with pytest.raises(RolloutError, match="cancelled"):
        pending.result(5)
    pending = engine.submit(requests(2), sampling(max_response_length=5000, stop_ids=()))
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        pending.result(5)
    wait_for(lambda: not servers[0]._results)  # a server gives up what nobody waits for


def test_a_closed_engine_stays_closed(servers, build) -> None:
    engine = build("vllm", servers[:1])
    pending = engine.submit(requests(2), sampling())
    pending.result(5)
    engine.close()
    engine.close()
    pending.cancel()
    threads = threading.active_count()
    for verb in (
        lambda: engine.generate(requests(2), sampling()),
        engine.ready,
        engine.pause,
        lambda: engine.resume(1),
    ):
        with pytest.raises(RolloutError, match="the engine was closed"):
            verb()
    assert threading.active_count() <= threads
    assert servers[0].count(PATHS["vllm"]) == 1 + 1


def test_close_ends_a_verb_of_another_thread(build) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        engine = build("vllm", [f"http://127.0.0.1:{unused.getsockname()[1]}"])
        errors: list[RolloutError] = []

        def wait() -> None:
            with pytest.raises(RolloutError) as caught:
                engine.ready(60)
            errors.append(caught.value)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        wait_for(lambda: engine._loop is not None)
        engine.close()
        thread.join(5)
    assert [str(error) for error in errors] == ["the engine was closed"]


# Pauses.


@BOTH
def test_responses_go_on_under_new_weights(dialect, servers, build) -> None:
    old, new = table(0), table(1)
    set_pace(servers, 0.01)
    engine = build(dialect, servers, version=7, max_outstanding=6)
    limit = 200
    wanted = requests(8, 2)
    how = sampling(stop_ids=(), max_response_length=limit, record_topk=2)
    pending = engine.submit(wanted, how)
    wait_for(lambda: all(len(s._results) == 6 and s.engine.steps > 3 for s in servers))
    engine.pause()
    sent = sum(server.count(PATHS[dialect]) for server in servers)
    for server in servers:
        server.engine.table = new
    set_pace(servers, 0.0)
    time.sleep(0.1)
    assert not pending.done()
    assert sum(server.count(PATHS[dialect]) for server in servers) == sent, "sent while paused"
    engine.resume(8)
    kinds = set()
    for done, request in zip(pending.result(30), wanted, strict=True):
        ids, prompt = done.response_ids.tolist(), request.prompt_ids.tolist()
        assert len(ids) == limit == sum(count for count, _ in done.version_spans)
        assert done.topk_ids.shape == (limit, 2)
        split = done.version_spans[0][0] if done.version_spans[0][1] == 7 else 0
        expected = closed_form(old, prompt, ids[:split])
        expected += closed_form(new, [*prompt, *ids[:split]], ids[split:])
        assert done.logprobs.tolist() == pytest.approx(expected, abs=2e-6)
        kinds.add(tuple(version for _, version in done.version_spans))
    assert kinds == {(7, 8), (8,)}, "some were under way, and some waited"
    (done,) = engine.generate(requests(1), sampling(stop_ids=()))
    assert done.version_spans == ((12, 8),)


@BOTH
def test_stop_strings_are_found_across_pauses(dialect, servers, build) -> None:
    """The table is a cycle through the alphabet, so that a pause falls inside the stop string."""
    engine = build(dialect, servers[:1])
    servers[0].engine.table = 50 * torch.eye(V).roll(1, 1)
    set_pace(servers, 0.02)
    how = sampling(stop_strings=("klmnopqrst",), stop_ids=(), max_response_length=40)
    pending = engine.submit([Request(torch.tensor([0]), 0)], how)
    while not pending.done():
        before = servers[0].engine.steps
        wait_for(lambda before=before: servers[0].engine.steps > before + 2 or pending.done())
        engine.pause()
        engine.resume(engine.version + 1)
    (done,) = pending.result()
    assert decode(done.response_ids.tolist()) == "bcdefghijklmnopqrst"
    assert done.finish_reason == "stop" and len(done.version_spans) > 3
    assert sum(count for count, _ in done.version_spans) == 19 == done.logprobs.numel()


def test_another_engines_pause(servers, build) -> None:
    """Replicas share servers, and pause them one after the other."""
    set_pace(servers, 0.01)
    first, second = build("vllm", servers[:1]), build("vllm", servers[:1])
    wanted = requests(4, 2)
    pending = second.submit(wanted, sampling(stop_ids=(), max_response_length=200))
    wait_for(lambda: servers[0].engine.steps > 3)
    first.pause()
    set_pace(servers, 0.0)
    time.sleep(0.05)
    assert not pending.done()
    first.resume(1)
    for done, request in zip(pending.result(20), wanted, strict=True):
        assert_drawn(done, request, servers[0].engine.table, 200, stop_ids=())
        assert done.version_spans == ((200, 0),)
    seeds = [body["seed"] for path, body in servers[0].requests if path == PATHS["vllm"]]
    assert len(set(seeds)) == len(seeds) > 4, "random numbers are not drawn twice"


def test_what_a_paused_server_holds_is_sent_again(servers, build, monkeypatch) -> None:
    monkeypatch.setattr(engine_module, "_GRACE_SECONDS", 0.1)
    engine = build("sglang", servers[:1])
    run(engine.clients[0].pause())
    wanted = requests(2, 2)
    pending = engine.submit(wanted, sampling())
    time.sleep(0.05)
    engine.pause()
    assert servers[0].count("/generate") == 2
    engine.resume(3)
    for done, request in zip(pending.result(10), wanted, strict=True):
        assert_drawn(done, request, servers[0].engine.table, 12)
        assert done.version_spans == ((done.response_ids.numel(), 3),)
    assert servers[0].count("/generate") == 4


def test_a_server_that_breaks_everything_off(servers, build) -> None:
    engine = build("vllm", servers, retries=1)
    servers[0].fail("break", None)
    wanted = requests(2)
    for done, request in zip(engine.generate(wanted, sampling()), wanted, strict=True):
        assert_drawn(done, request, servers[1].engine.table, 12)
    servers[1].fail("break", None)
    with pytest.raises(RolloutError, match="failed 2 times"):
        engine.generate(wanted, sampling())


def test_a_server_that_cannot_be_paused_is_excluded(servers, build, monkeypatch) -> None:
    monkeypatch.setattr(engine_module, "_GRACE_SECONDS", 0.1)
    set_pace(servers, 0.01)
    engine = build("vllm", servers, max_outstanding=4)
    pending = engine.submit(requests(4, 2), sampling(stop_ids=(), max_response_length=200))
    wait_for(lambda: all(len(s._results) == 4 and s.engine.steps > 3 for s in servers))
    servers[0].fail("unpausable", None)
    engine.pause()
    before = servers[0].count(PATHS["vllm"])
    set_pace(servers, 0.0)
    engine.resume(1)
    assert len(pending.result(30)) == 8
    engine.generate(requests(4), sampling())
    assert servers[0].count(PATHS["vllm"]) == before
    servers[1].fail("unpausable", None)
    with pytest.raises(RolloutError, match="no server is left") as caught:
        engine.pause()
    assert all(server.url in str(caught.value) for server in servers)
    servers[1].heal()
    engine.exclude({})
    engine.resume(1)


def test_excluded_servers_get_nothing(servers, build) -> None:
    engine = build("vllm", servers)
    engine.exclude({servers[0].url: f"{servers[0].url}: holds old weights"})
    engine.generate(requests(6), sampling())
    assert [server.count(PATHS["vllm"]) for server in servers] == [0, 6]
    engine.exclude(dict.fromkeys([server.url for server in servers], "holds old weights"))
    with pytest.raises(RolloutError, match=f"{servers[1].url}: holds old weights"):
        engine.generate(requests(6), sampling())
    engine.exclude({})
    engine.generate(requests(6), sampling())
    assert servers[0].count(PATHS["vllm"]) > 0


# The verbs of weight sync.


@BOTH
def test_verbs_of_a_weight_sync(dialect, servers) -> None:
    server = servers[0]
    client = Client(server.url, DIALECTS[dialect], timeout_seconds=10)
    opened = GroupOpen("127.0.0.1", 29500, 1, 3, "weights-1", "gloo", 30.0)

    async def verbs() -> list[Any]:
        await client.ready()
        told = [await client.version(), await client.world_size()]
        await client.pause()
        await client.update(DiskUpdate("/models/version-4", 4))
        await client.flush()
        told.append(await client.version())
        await client.update(opened)
        part = GroupUpdate("weights-1", ["a.weight"], [(2, 3)], ["bfloat16"], None)
        await client.update(part)
        told.append(await client.version())
        await client.update(GroupUpdate("weights-1", ["b"], [[4]], ["float32"], 5))
        await client.flush()
        told.append(await client.version())
        await client.update(GroupClose("weights-1"))
        await client.resume()
        return told

    assert run(verbs()) == ["default", 1, "4", "4", "5"]
    directory, meeting, *rest = server.weights.seen
    assert directory == "/models/version-4"
    wanted = vars(opened).items() if dialect == "vllm" else list(vars(opened).items())[:-1]
    assert meeting == dict(wanted)
    assert rest == [
        (["a.weight"], [[2, 3]], ["bfloat16"]),
        (["b"], [[4]], ["float32"]),
        "left",
    ]
    assert server.flushed >= 2
    server.fail("broken", None)
    before = len(server.requests)
    with pytest.raises(ServerError, match="the update failed"):
        run(client.update(opened))
    assert len(server.requests) == before + 1, "joining twice is not joining once"
    server.heal()
    server.fail("stale", None)
    run(client.update(DiskUpdate("/models/version-6", 6)))
    assert run(client.version()) == "6" and len(server.weights.seen) == 5


def test_raw_log_probs_look_fine(servers) -> None:
    """What the canary is for: nothing but their values tells."""
    servers[0].fail("raw")
    client = Client(servers[0].url, DIALECTS["vllm"])
    job = Job((3, 4), samples=2, seed=1, max_tokens=12, sampling=sampling(stop_ids=()))
    raw, right = run(client.generate(job)), run(client.generate(job))
    law = servers[0].engine.table
    for one, other in zip(raw, right, strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(closed_form(law, [4], one.ids, 1.0), abs=2e-6)
        assert other.logprobs == pytest.approx(closed_form(law, [4], one.ids), abs=2e-6)


# The real engine behind the loopback server.


def test_the_real_engine_behind_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import tiny_model
    from tests.tiny_run import make_tiny_run

    make_tiny_run(tmp_path)
    other = tiny_model("qwen3")
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.loopback_server", str(tmp_path / "model")],
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        url = process.stdout.readline().strip()
        prompts = [torch.tensor([5, 6, 14]), torch.tensor([7, 3])]
        wanted = [Request(prompts[i // 3], i) for i in range(6)]
        how = sampling(max_response_length=20)
        engine = ServerEngine("vllm", [url], timeout_seconds=60)
        found = engine.generate(wanted, how)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        assert gap(model, wanted, found, TEMPERATURE) < 2e-5
        _post(url + "/loopback/fail", {"fault": "raw", "times": 2})
        raw = engine.generate(wanted, how)
        assert gap(model, wanted, raw, 1.0) < 2e-5 < 0.1 < gap(model, wanted, raw, TEMPERATURE)
        client = Client(url, DIALECTS["sglang"], timeout_seconds=60)
        run(client.update(DiskUpdate(str(tmp_path / "other"), 1)))
        renewed = engine.generate(wanted, how)
        assert gap(other, wanted, renewed, TEMPERATURE) < 2e-5
        assert gap(model, wanted, renewed, TEMPERATURE) > 0.01
        # Broken off, and continued.
        pending = engine.submit(wanted, sampling(stop_ids=(), max_response_length=50))
        engine.pause()
        engine.resume(2)
        found = pending.result(60)
        assert all(done.response_ids.numel() == 50 for done in found)
        assert gap(other, wanted, found, TEMPERATURE) < 2e-5
        engine.close()
    finally:
        process.kill()
        process.communicate()


def gap(
    model: Any, wanted: Sequence[Request], found: Sequence[Completion], temperature: float
) -> float:
    """Largest difference of log-probs to a model of transformers."""
    worst = 0.0
    for request, done in zip(wanted, found, strict=True):
        start = request.prompt_ids.numel()
        with torch.no_grad():
            logits = model(torch.cat([request.prompt_ids, done.response_ids])[None]).logits[0]
        law = torch.log_softmax(logits[start - 1 : -1].double() / temperature, -1)
        expected = law.gather(-1, done.response_ids[:, None])[:, 0]
        worst = max(worst, float((done.logprobs - expected).abs().max()))
    return worst


def _post(url: str, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, data, headers)).read()


def test_a_weight_group_takes_servers_without_pipelines_only() -> None:
    dialect = DIALECTS["sglang"]
    assert dialect.read_world_size({"tp_size": 4, "pp_size": 1}) == 4
    for name in ("pp_size", "dp_size"):
        with pytest.raises(BadAnswerError, match=f"{name} is 2.*--weight-sync disk"):
            dialect.read_world_size({"tp_size": 4, name: 2})
