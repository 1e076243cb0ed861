"""Statistics against numpy and closed forms; what the writer leaves on disk, also after a kill."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from megatron_drpo.device import Device
from megatron_drpo.errors import DataError
from megatron_drpo.metrics import (
    Histogram,
    MetricsWriter,
    PhaseTimer,
    TokenDiagnostics,
    engine_gap_statistics,
    fullest,
    quantiles,
    read_jsonl,
    rollout_statistics,
    trust_region_statistics,
    worst_and_best,
)
from megatron_drpo.types import Prompt, Rollout, Trajectory


def diagnostics(num_tokens: int, seed: int = 0) -> TokenDiagnostics:
    g = torch.Generator().manual_seed(seed)
    behaviour = -(torch.rand(num_tokens, generator=g) ** 3) * 14
    return TokenDiagnostics(
        logprobs=(behaviour + 0.4 * torch.randn(num_tokens, generator=g)).clamp(max=0),
        behaviour_logprobs=behaviour,
        advantages=torch.randn(num_tokens, generator=g),
        gradient_weight=1 + 0.6 * torch.randn(num_tokens, generator=g),
        entropy=torch.rand(num_tokens, generator=g),
        old_logprobs=behaviour + 0.01 * torch.randn(num_tokens, generator=g),
        objective={"penalty": torch.rand(num_tokens, generator=g)},
    )


def one_token(log_p: torch.Tensor, log_m: torch.Tensor) -> TokenDiagnostics:
    return TokenDiagnostics(log_p, log_m, log_m, *[torch.ones_like(log_m)] * 3)


def trajectory(prompt: str, sample: int, reward: float, length: int, finish: str) -> Trajectory:
    rollout = Rollout(
        prompt=Prompt(id=prompt, text=f"{prompt}?", token_ids=torch.tensor([1]), answer="42"),
        sample=sample,
        response_ids=torch.full((length,), 3),
        behaviour_logprobs=torch.full((length,), -0.5),
        finish_reason=finish,
        policy_version=0,
        response_text=f"answer {sample}",
    )
    return Trajectory(rollout=rollout, reward=reward, advantage=reward - 0.5)


def board(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}
    )
    return accumulator.Reload()


def texts(events: EventAccumulator, tag: str) -> dict[int, str]:
    found = events.Tensors(f"{tag}/text_summary")
    return {e.step: e.tensor_proto.string_val[0].decode() for e in found}


def test_trust_region_statistics_match_numpy():
    d = diagnostics(4001)
    got = trust_region_statistics(d, log_ratio_limit=0.7)

    log_p = d.logprobs.numpy().astype(np.float64)
    log_m = d.behaviour_logprobs.numpy().astype(np.float64)
    w, p, m = d.gradient_weight.numpy().astype(np.float64), np.exp(log_p), np.exp(log_m)
    r, drift = p / m, log_p - d.old_logprobs.numpy().astype(np.float64)
    expected = {
        "weight/mean": w.mean(),
        "weight/p01": np.quantile(w, 0.01),
        "weight/p50": np.median(w),
        "weight/p99": np.quantile(w, 0.99),
        "weight/below_0": np.mean(w < 0),
        "weight/below_half": np.mean(w < 0.5),
        "ratio/mean": r.mean(),
        "ratio/max": r.max(),
        "ratio/p99": np.quantile(r, 0.99),
        "ratio/effective_sample_size": r.sum() ** 2 / (len(r) * (r**2).sum()),
        "ratio/beyond_limit": np.sum(np.abs(np.log(r)) > 0.7),
        "ratio/beyond_limit_share": np.mean(np.abs(np.log(r)) > 0.7),
        "divergence/binary_tv": np.abs(p - m).mean(),
        "divergence/k3": (r - 1 - np.log(r)).mean(),
        "drift/mean_abs": np.abs(drift).mean(),
        "drift/max_abs": np.abs(drift).max(),
        "drift/k3": (np.exp(drift) - 1 - drift).mean(),
        "objective/penalty": d.objective["penalty"].numpy().astype(np.float64).mean(),
        "entropy/mean": d.entropy.numpy().astype(np.float64).mean(),
    }
    edges = {
        "le_1e-4": (-1, 1e-4),
        "1e-4_1e-3": (1e-4, 1e-3),
        "1e-3_1e-2": (1e-3, 1e-2),
        "1e-2_1e-1": (1e-2, 1e-1),
        "1e-1_1": (1e-1, 1),
    }
    for name, (above, up_to) in edges.items():
        inside = (m > above) & (m <= up_to)
        expected[f"divergence/share_mu_{name}"] = inside.mean()
        expected[f"divergence/tv_mu_{name}"] = np.abs(p - m)[inside].mean()
    expected["divergence/binary_kl"] = got["divergence/binary_kl"]  # see the tests below
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=1e-10)
    assert 0 < got["weight/below_0"] < got["weight/below_half"] < 1
    assert 0 < got["ratio/beyond_limit"] < 4001


@pytest.mark.parametrize(("m", "p"), [(0.3, 0.5), (0.999, 0.2), (1e-6, 1e-3), (0.7, 0.7)])
def test_binary_kl_closed_form(m: float, p: float):
    log_m, log_p = torch.tensor([m]).log(), torch.tensor([p]).log()
    got = trust_region_statistics(one_token(log_p, log_m), 20.0)
    m, p = math.exp(log_m.item()), math.exp(log_p.item())  # as fp32 holds them
    kl = m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p))
    assert got["divergence/binary_kl"] == pytest.approx(kl, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("log_m", [0.0, -1e-9, -0.7, -200.0, -1e4])
@pytest.mark.parametrize("log_p", [0.0, -1e-9, -0.7, -200.0])
def test_statistics_stay_finite_at_certainty_and_underflow(log_m: float, log_p: float):
    d = one_token(torch.tensor([log_p]), torch.tensor([log_m]))
    got = trust_region_statistics(d, 20.0)
    kl, ess = got["divergence/binary_kl"], got["ratio/effective_sample_size"]
    assert math.isfinite(kl) and kl >= 0
    assert kl == 0 or log_m != log_p
    assert ess == 1
    assert not any(math.isnan(v) for v in got.values())


def test_equal_policies_diverge_nowhere():
    d = diagnostics(500)
    same = replace(d, behaviour_logprobs=d.logprobs, old_logprobs=d.logprobs)
    got = trust_region_statistics(same, 20.0)
    assert {n: v for n, v in got.items() if n.startswith("divergence/") and "share" not in n} == {
        n: 0.0 for n in got if n.startswith("divergence/") and "share" not in n
    }
    assert {v for n, v in got.items() if n.startswith("drift/")} == {0.0}
    for name in ("ratio/mean", "ratio/max", "ratio/p99", "ratio/effective_sample_size"):
        assert got[name] == 1.0
    assert engine_gap_statistics(d.logprobs, d.logprobs) == {
        "engine_gap/mean_abs": 0.0,
        "engine_gap/max_abs": 0.0,
        "engine_gap/ratio_min": 1.0,
        "engine_gap/ratio_max": 1.0,
        "engine_gap/exact_share": 1.0,
    }


def test_empty_buckets_are_left_out_and_no_tokens_give_nothing():
    d = one_token(torch.tensor([-0.6]), torch.tensor([-0.5]))
    got = trust_region_statistics(d, 20.0)
    assert [n for n in got if "tv_mu" in n] == ["divergence/tv_mu_1e-1_1"]
    assert got["divergence/share_mu_1e-1_1"] == 1.0
    assert got["divergence/share_mu_le_1e-4"] == 0.0
    none = torch.empty(0)
    assert trust_region_statistics(one_token(none, none), 20.0) == {}
    assert engine_gap_statistics(none, none) == {}
    assert rollout_statistics([]) == {}


@settings(max_examples=40, deadline=None)
@given(num_tokens=st.integers(1, 60), seed=st.integers(0, 10**6), data=st.data())
def test_order_and_split_of_the_tokens_do_not_matter(num_tokens: int, seed: int, data):
    d = diagnostics(num_tokens, seed)
    order = torch.tensor(data.draw(st.permutations(range(num_tokens))))
    cut = data.draw(st.integers(0, num_tokens))

    def pick(index: torch.Tensor) -> TokenDiagnostics:
        fields = {name: value for name, value in vars(d).items() if name != "objective"}
        return TokenDiagnostics(
            **{name: value[index] for name, value in fields.items()},
            objective={name: value[index] for name, value in d.objective.items()},
        )

    shuffled = TokenDiagnostics.cat([pick(order[:cut]), pick(order[cut:])])
    assert trust_region_statistics(shuffled, 0.5) == pytest.approx(
        trust_region_statistics(d, 0.5), rel=1e-12, abs=1e-15
    )
    assert engine_gap_statistics(shuffled.logprobs, shuffled.behaviour_logprobs) == pytest.approx(
        engine_gap_statistics(d.logprobs, d.behaviour_logprobs), rel=1e-12
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_match_numpy(values: list[float], level: float):
    got = quantiles(torch.tensor(values, dtype=torch.float64), [level])[0].item()
    assert got == pytest.approx(np.quantile(values, level), rel=1e-9, abs=1e-6)


def test_engine_gap_statistics_match_numpy():
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -0.25])
    behaviour = torch.tensor([-1.0, -2.5, -0.5, -0.125])
    assert engine_gap_statistics(logprobs, behaviour) == pytest.approx(
        {
            "engine_gap/mean_abs": 0.625 / 4,
            "engine_gap/max_abs": 0.5,
            "engine_gap/ratio_min": np.exp(-0.125),
            "engine_gap/ratio_max": np.exp(0.5),
            "engine_gap/exact_share": 0.5,
        }
    )


def test_rollout_statistics_by_hand():
    batch = [
        trajectory("a", 0, 1.0, 2, "stop"),
        trajectory("a", 1, 0.0, 4, "length"),
        trajectory("b", 0, 1.0, 6, "stop"),
        trajectory("b", 1, 1.0, 8, "stop"),
    ]
    lengths = [2, 4, 6, 8]
    assert rollout_statistics(batch) == pytest.approx(
        {
            "reward/mean": 0.75,
            "reward/std": np.std([1, 0, 1, 1]),
            "reward/failed": 0.0,
            "reward/groups_all_equal": 0.5,
            "response_length/mean": 5.0,
            "response_length/max": 8.0,
            "response_length/p99": np.quantile(lengths, 0.99),
            "finish/length_share": 0.25,
            "advantage/std": np.std([0.5, -0.5, 0.5, 0.5]),
        }
    )


def test_samples_whose_reward_failed_are_counted_and_left_out():
    nan = math.nan
    batch = [
        *(trajectory("a", i, reward, 2, "stop") for i, reward in enumerate((1.0, nan, 3.0))),
        *(trajectory("b", i, reward, 2, "stop") for i, reward in enumerate((5.0, nan, 5.0))),
        *(trajectory("c", i, reward, 2, "stop") for i, reward in enumerate((nan, nan, nan))),
    ]
    got = rollout_statistics(batch)
    assert got["reward/failed"] == 5
    assert got["reward/mean"] == 3.5 and got["reward/std"] == pytest.approx(np.std([1, 3, 5, 5]))
    assert got["reward/groups_all_equal"] == pytest.approx(2 / 3)
    assert got["response_length/mean"] == 2
    nothing = rollout_statistics(batch[6:])
    assert math.isnan(nothing["reward/mean"]) and nothing["reward/failed"] == 3


def test_histogram_counts_every_value_and_resists_outliers():
    values = torch.cat([torch.linspace(0, 1, 5000), torch.tensor([1e6])])
    h = Histogram.of(values)
    assert sum(h.counts) == 5001
    assert (h.min, h.max) == (0.0, 1e6)
    assert h.high < 1.01  # the outlier is in the last bin and does not stretch the others
    reference, _ = np.histogram(np.clip(values.double().numpy(), h.low, h.high), h.edges)
    assert np.abs(np.array(h.counts) - reference).max() <= 1  # a value on an edge
    assert h.sum == pytest.approx(values.double().sum().item())
    assert Histogram.of(torch.full((7,), 2.5)).counts == [7]


def test_writer_logs_the_same_to_tensorboard_and_jsonl(tmp_path: Path):
    scalars = {"reward/mean": 0.1 + 0.2, "loss": -1 / 3}
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(0, {"eval/avg": 0.25})
        writer.write(
            1, scalars, {"weight": torch.tensor([0.5, 1.0, 1.0, 1.5]), "none": torch.empty(0)}
        )
        writer.write(1, {"eval/avg": 0.5})
        writer.text("note", "hello", 1)
        worst, best = trajectory("b", 0, -0.5, 3, "length"), trajectory("a", 3, 1.0, 2, "stop")
        writer.samples(1, worst=[worst], best=[best])
        writer.samples(2, worst=[], best=[best, best])

    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"eval/avg": 0.25, "step": 0}\n'
        '{"loss": -0.3333333333333333, "reward/mean": 0.30000000000000004, "step": 1}\n'
        '{"eval/avg": 0.5, "step": 1}\n'
    )
    (histogram,) = read_jsonl(tmp_path / "histograms.jsonl")
    assert histogram.keys() == {"step", "weight"}
    assert sum(histogram["weight"]["counts"]) == 4
    line = {"step": 1, "prompt": "a?", "response": "answer 3", "reward": 1.0, "answer": "42"}
    assert read_jsonl(tmp_path / "samples.jsonl") == [
        {**line, "prompt": "b?", "response": "answer 0", "reward": -0.5},
        *(line, {**line, "step": 2}, {**line, "step": 2}),
    ]

    events = board(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("eval/avg")] == [(0, 0.25), (1, 0.5)]
    assert events.Scalars("loss")[0].value == pytest.approx(-1 / 3, rel=1e-6)
    value = events.Histograms("weight")[0].histogram_value
    assert (value.min, value.max, value.num, value.sum) == (0.5, 1.5, 4, 4.0)
    assert sum(value.bucket) == 4
    assert texts(events, "note") == {1: "hello"}
    best, worst = texts(events, "samples/best"), texts(events, "samples/worst")
    assert "**reward 1**, answer ` 42 ` (2 tokens, finish: stop)" in best[1]
    assert "\n    answer 3" in best[1] and "\n    a?" in best[1]
    assert best[2].count("**reward 1**") == 2
    assert "**reward -0.5**" in worst[1] and "answer 0" in worst[1]
    assert worst[2] == "None: all rewards are equal."


NASTY = "before\r<h1>not a heading</h1>\n```\n# nor this\n\n\n    * nor that\x85**nor bold**"


def test_what_a_model_wrote_stays_as_it_is(tmp_path: Path):
    """Through TensorBoard's own rendering: all in one block of code, none of it markup."""
    nasty = trajectory("a", 0, 1.0, 2, "stop")
    prompt = replace(nasty.rollout.prompt, text=NASTY, answer="` <b>`` 7`")
    nasty = replace(nasty, rollout=replace(nasty.rollout, prompt=prompt, response_text=NASTY))
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.samples(1, worst=[], best=[nasty])
    html = markdown_to_safe_html(texts(board(tmp_path), "samples/best")[1])
    assert html.count("<pre>") == 2
    assert {*re.findall(r"<(\w+)", html)} == {"p", "strong", "code", "pre"}
    for block in re.findall(r"<pre><code>(.*?)</code></pre>", html, re.DOTALL):
        assert unescape(block).rstrip("\n").split("\n") == NASTY.splitlines()
    assert "<code>` &lt;b&gt;`` 7`</code>" in html


def test_worst_and_best_samples():
    batch = [
        trajectory("a", 0, 0.5, 1, "stop"),
        trajectory("a", 1, 1.0, 1, "stop"),
        trajectory("b", 0, 0.0, 1, "stop"),
        trajectory("b", 1, 0.25, 1, "stop"),
        trajectory("c", 0, 1.0, 1, "stop"),
        trajectory("d", 0, 0.75, 1, "stop"),
    ]

    def told(count: int) -> list[list[tuple[str, float]]]:
        return [
            [(t.rollout.prompt.id, t.reward) for t in found]
            for found in worst_and_best(batch, count)
        ]

    assert told(1) == [[("b", 0.0)], [("c", 1.0)]]
    assert told(3) == [[("b", 0.0), ("a", 0.5)], [("c", 1.0), ("a", 1.0), ("d", 0.75)]]
    worst, best = worst_and_best([replace(t, reward=0.0) for t in batch])
    assert (worst, len(best)) == ([], 3)


def test_what_is_not_finite_becomes_null_with_a_warning(tmp_path: Path, caplog):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(
            4,
            {"grad_norm": math.nan, "loss": -math.inf, "lr": 1e-6},
            {"weight": torch.tensor([1.0, math.nan, 2.0])},
        )
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"grad_norm": null, "loss": null, "lr": 1e-06, "step": 4}\n'
    assert sum(json.loads((tmp_path / "histograms.jsonl").read_text())["weight"]["counts"]) == 2
    assert "step 4: grad_norm is nan" in caplog.text
    assert "1 values of weight" in caplog.text


def test_resume_removes_what_a_killed_run_logged_beyond_its_checkpoint(tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def log(writer: MetricsWriter, steps: range, offset: float = 0.0) -> None:
        for step in steps:
            writer.write(
                step, {"loss": step / 7 + offset}, {"weight": torch.arange(3.0) + step + offset}
            )
            writer.samples(step, worst=[], best=[trajectory("a", step, offset, 2, "stop")])

    with MetricsWriter(straight, resume_step=None) as writer:
        log(writer, range(1, 7))
    with MetricsWriter(killed, resume_step=None) as writer:
        log(writer, range(1, 4))
        log(writer, range(4, 6), offset=100.0)  # after the last checkpoint
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.8')  # killed in the middle of a line
    with MetricsWriter(killed, resume_step=4) as writer:
        log(writer, range(4, 7))

    for name in ("metrics.jsonl", "histograms.jsonl", "samples.jsonl"):
        assert (killed / name).read_text() == (straight / name).read_text()
    assert not list(killed.glob("*.tmp"))
    expected = [(e.step, e.value) for e in board(straight).Scalars("loss")]
    assert [(e.step, e.value) for e in board(killed).Scalars("loss")] == expected
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_does_not_continue_an_old_log(tmp_path: Path):
    for value in (1.0, 2.0):
        with MetricsWriter(tmp_path, resume_step=None) as writer:
            writer.write(int(value), {"loss": value})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 2.0}]
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("loss")] == [(2, 2.0)]


@pytest.mark.parametrize("damage", ["{oops}", "[1]", '{"loss": 1.0}', '{"step": 1.5}'])
def test_a_damaged_log_is_named_by_file_and_line_and_left_alone(tmp_path: Path, damage: str):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"loss": 0.5, "step": 1}}\n{damage}\n{{"loss": 0.5, "step": 3}}\n'
    path.write_text(text)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        MetricsWriter(tmp_path, resume_step=2)
    assert path.read_text() == text


def test_phase_timer_adds_up_waits_for_the_device_and_resets():
    waits = []
    memory = iter([9, 3, 7, 5, 2, 4, 6, 1])  # GiB, at both ends of each phase
    timer = PhaseTimer(lambda: waits.append(None), lambda: next(memory) * 2**30)
    for _ in range(2):
        with timer.phase("generate"):
            time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), timer.phase("train"):
        _ = 1 / 0
    time.sleep(0.01)
    times = timer.pop()
    # The more of 3 and 5; what was used before a phase is not its own.
    assert (times.pop("memory/generate"), times.pop("memory/train")) == (5.0, 4.0)
    assert times.keys() == {"time/generate", "time/train", "time/step"}
    assert times["time/generate"] >= 0.04
    assert times["time/step"] >= times["time/generate"] + times["time/train"] + 0.01
    assert len(waits) >= 5
    with timer.phase("score"):
        pass
    again = timer.pop()
    assert again.keys() == {"time/score", "memory/score", "time/step"}
    assert again["time/step"] < times["time/step"]
    assert again["memory/score"] == 1.0


def test_the_fullest_rank_of_each_phase_counts():
    ranks = [
        {"time/train": 1.0, "memory/train": 2.5, "memory/generate": 1.0, "time/step": 9.0},
        {"time/train": 2.0, "memory/train": 0.5, "memory/generate": 3.0, "memory/sync": 0.25},
    ]
    expected = {"memory/train": 2.5, "memory/generate": 3.0, "memory/sync": 0.25}
    assert fullest(ranks) == expected
    assert fullest([]) == {}


def test_memory_that_is_let_go_of_shows():
    device = Device("cpu", "gloo", 0, "")
    before = device.take_memory()
    big = torch.ones(2**24)  # 64 MiB, more than an allocator would keep
    held = device.take_memory()
    del big
    assert 2**26 * 0.9 < held - before < 2**26 * 1.2
    assert device.take_memory() < before + 2**25
