"""Rewards: what they say of responses, and what is said of rewards that do not work."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.rewards import (
    RewardRequest,
    TimeLimitExpired,
    check_prompts,
    load_reward,
    score,
    time_limit,
)
from megatron_drpo.types import Prompt, Rollout


def request(response: str, answer: str) -> RewardRequest:
    return RewardRequest("question", response, answer, "stop")


def rollout(response: str = "42", answer: str | None = "42", sample: int = 3) -> Rollout:
    prompt = Prompt("train.jsonl:7", "12+30=", torch.tensor([1]), answer, {"level": 2})
    return Rollout(prompt, sample, torch.tensor([2]), torch.tensor([-0.5]), "length", 0, response)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Writes a module into the current directory and gives its name, unique to the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])

    def write(source: str) -> str:
        name = f"user_{abs(hash(request.node.name))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [("42", "42", 1), (" 42\n", "42 ", 1), ("42.", "42", 0), ("", "42", 0), ("4 2", "42", 0)],
)
def test_exact(response, answer, expected):
    assert load_reward("exact")(request(response, answer)) == expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        # Plain numbers: the last one counts.
        ("42", "42", 1),
        ("12+30=42", "42", 1),
        ("12+30=41", "42", 0),
        ("First 42, and then 17.", "42", 0),
        ("He pays $70,000.", "70000", 1),
        ("#### 70000", "70,000", 1),
        ("It is -7", "7", 0),
        ("0.5", "1/2", 1),
        # LaTeX, boxed or between dollar signs: the last box counts.
        (r"So \boxed{\frac{1}{2}}.", "0.5", 1),
        (r"So \boxed{\frac{1}{2}}.", r"\frac{1}{3}", 0),
        (r"$x = 5$, so the answer is \boxed{42}. That was all; check: 3.", "42", 1),
        (r"So \boxed{41}. Let me check again: 3+4=7. So it is \boxed{42}", "42", 1),
        (r"So \boxed{41}. Let me check again: 3+4=7. So it is \boxed{42}", "41", 0),
        (r"It is \boxed{42}. The final answer is $3$.", "42", 1),
        (r"\boxed{1} and \boxed{2}", "1, 2", 1),
        (r"\boxed{1} or \boxed{2}", "2", 0),
        (r"The answer is $3\sqrt{13}$.", r"3\sqrt{13}", 1),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", 1),
        (r"\boxed{(\frac{\pi}{2}, 3)}", r"(3,\frac{\pi}{2})", 0),
        (r"\boxed{(x-1)(x+1)}", "x^2-1", 1),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1),
        (r"\boxed{\text{Carla}}", r"\text{Evelyn}", 0),
        (r"\boxed{6 - 5i}", "6 - 5i", 1),
        # Golds in other wrappings.
        ("42", "$42$", 1),
        ("42", r"\boxed{42}", 1),
        ("42", "He has 6 * 7 = <<6*7=42>>42 ducks.\n#### 42", 1),
        ("6", "He has 6 * 7 = <<6*7=42>>42 ducks.\n#### 42", 0),
        # Nothing to find.
        ("", "42", 0),
        ("I do not know.", "42", 0),
    ],
)
def test_math(response, answer, expected):
    assert load_reward("math")(request(response, answer)) == expected


def test_math_gives_up_on_a_response_that_would_compute_forever(monkeypatch):
    monkeypatch.setattr("megatron_drpo.rewards.math_answer.SECONDS", 0.5)
    start = time.monotonic()
    values = score(load_reward("math"), "math", [rollout("$9^{9^{9^9}}$"), rollout("42")], 60.0)
    assert values == [0.0, 1.0]
    assert time.monotonic() - start < 10


def test_a_users_function_sees_the_request(module):
    name = module(
        "def reward(r):\n"
        "    assert (r.prompt, r.response, r.answer) == ('12+30=', '42', '42')\n"
        "    assert r.finish_reason == 'length'\n"
        "    return r.metadata['level'] / 4\n"
    )
    assert score(load_reward(f"{name}:reward"), name, [rollout()], 5.0) == [0.5]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mathe", ["mathe", "exact", "MODULE:FUNCTION", "did you mean math?"]),
        ("zzz", ["zzz", "exact, math"]),
        ("no_such_module:f", ["no module 'no_such_module'", "PYTHONPATH"]),
        ("{module}:scores", ["no function 'scores'", "did you mean score?"]),
        ("{module}:constant", ["no function 'constant'"]),
        ("{module}:later", ["async"]),
        ("{module}:", ["unknown"]),
    ],
)
def test_rewards_that_cannot_be_loaded(module, name, parts):
    source = "constant = 3\ndef score(r): return 1\nasync def later(r): return 1\n"
    name = name.format(module=module(source))
    with pytest.raises(RewardError) as caught:
        load_reward(name)
    assert str(caught.value).startswith(f"--reward {name}: ")
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("source", "said"),
    [("import no_such_package", "ModuleNotFoundError"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_module_that_fails_to_import_shows_its_own_error(module, source, said):
    with pytest.raises(RewardError, match=f"importing .* raised {said}") as caught:
        load_reward(module(source) + ":f")
    assert type(caught.value.__cause__).__name__ == said


def test_prompts_without_an_answer_are_refused_by_rewards_that_need_one():
    def prompt(name: str, answer: str | None) -> Prompt:
        return Prompt(name, "x", torch.tensor([1]), answer)

    prompts = [prompt("a:1", "3"), *(prompt(f"a:{n}", None) for n in range(2, 14))]
    for name in ("exact", "math"):
        with pytest.raises(DataError) as caught:
            check_prompts(name, [*prompts, prompt("b:9", " ")])
        text = str(caught.value)
        assert text.startswith("a:2, a:3, ") and "a:11 and 3 more" in text and "a:1," not in text
        assert f"--reward {name}" in text and "`answer`" in text
        check_prompts(name, prompts[:1])
    check_prompts("mine:reward", prompts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", 10**400, [1.0]])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(RewardError, match=r"mine:f.*train.jsonl:7.*sample 3.*finite number"):
        score(lambda r: value, "mine:f", [rollout()], 5.0)


def test_numbers_of_all_kinds_are_taken():
    values = iter([True, 2, 0.25, np.float32(0.5), np.int64(3), np.bool_(True), -1.0])
    got = score(lambda r: next(values), "f", [rollout()] * 7, 5.0)
    assert got == [1.0, 2.0, 0.25, 0.5, 3.0, 1.0, -1.0]
    assert {type(value) for value in got} == {float}


def test_an_exception_names_the_reward_the_prompt_and_the_sample():
    def broken(r: RewardRequest) -> float:
        return {"a": 1.0}[r.response]

    with pytest.raises(RewardError) as caught:
        score(broken, "mine:broken", [rollout("a"), rollout("b", sample=5)], 5.0)
    for part in ("--reward mine:broken", "'train.jsonl:7'", "sample 5", "KeyError: 'b'"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_says_where_in_the_users_code_it_was_raised(module, tmp_path):
    name = module("import json\ndef bad(r):\n    return json.loads(r.response)\n")
    with pytest.raises(RewardError) as caught:
        score(load_reward(f"{name}:bad"), f"{name}:bad", [rollout("{")], 5.0)
    assert "JSONDecodeError: Expecting property name" in str(caught.value)
    assert f"({tmp_path / name}.py:3)" in str(caught.value)


@pytest.mark.parametrize("status", ["", "0", "3"])
def test_a_reward_that_exits_does_not_end_the_run_in_silence(module, status):
    name = module(f"import sys\ndef quits(r):\n    sys.exit({status})\n")
    with pytest.raises(RewardError, match=r"sample 3: raised SystemExit.*\.py:3"):
        score(load_reward(f"{name}:quits"), f"{name}:quits", [rollout()], 5.0)


def test_a_module_that_exits_when_imported_is_refused(module):
    name = module("import sys\n\nsys.exit(3)\n")
    with pytest.raises(RewardError, match=rf"--reward {name}:f: .*SystemExit: 3.*\.py:3"):
        load_reward(f"{name}:f")


def sleeping(r: RewardRequest) -> float:
    time.sleep(30)
    return 1.0


def busy_and_deaf(r: RewardRequest) -> float:
    try:
        while True:
            pass
    except Exception:
        return 1.0


def losing_the_first_alarm(r: RewardRequest) -> float:
    class Loses:
        def __del__(self) -> None:
            time.sleep(30)  # what is raised here, Python reports and drops

    del [Loses()][0]
    time.sleep(30)
    return 1.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("reward", [sleeping, busy_and_deaf, losing_the_first_alarm])
def test_a_reward_that_hangs_is_stopped(reward):
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"sample 3.*--reward-timeout-seconds 0.2"):
        score(reward, "mine:f", [rollout()], 0.2)
    assert time.monotonic() - start < 5


def test_limits_nest_and_leave_an_outer_timer_running():
    handler, (outer, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(TimeLimitExpired), time_limit(0.5):
        with pytest.raises(TimeLimitExpired), time_limit(0.1):
            time.sleep(5)
        with time_limit(5):
            pass
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is handler
    # pytest's own timeout, if it runs by the same timer, goes on.
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (outer > 0)
