"""Rewards: what they say of responses, and what is said of rewards that do not work."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo.config import RewardConfig
from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.rewards import (
    RewardRequest,
    TimeLimitExpired,
    check_prompts,
    load_reward,
    time_limit,
)
from megatron_drpo.rewards.pool import RewardPool, Scored, check_failures, check_reward
from megatron_drpo.types import Prompt, Rollout


def request(response: str, answer: str) -> RewardRequest:
    return RewardRequest("question", response, answer, "stop")


def rollout(response: str = "42", answer: str | None = "42", sample: int = 3) -> Rollout:
    prompt = Prompt("train.jsonl:7", "12+30=", torch.tensor([1]), answer, {"level": 2})
    return Rollout(prompt, sample, torch.tensor([2]), torch.tensor([-0.5]), "length", 0, response)


def config(reward: str, **changes: Any) -> RewardConfig:
    """One worker, any number of failures."""
    return replace(RewardConfig(reward, reward_workers=1, reward_max_failures=1.0), **changes)


def score(config: RewardConfig, responses: list[str]) -> Scored:
    with RewardPool(config) as pool:
        return pool.score([rollout(text, sample=i) for i, text in enumerate(responses)])


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Writes a module into the current directory and gives its name, unique to the test."""
    root = str(Path(__file__).resolve().parent.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [root, *(entry for entry in sys.path if entry)])

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
    assert load_reward("math")(request("$9^{9^{9^9}}$", "42")) == 0.0
    assert time.monotonic() - start < 10


def test_a_users_function_sees_the_request(module):
    name = module(
        "def reward(r):\n"
        "    assert (r.prompt, r.response, r.answer) == ('12+30=', '42', '42')\n"
        "    assert r.finish_reason == 'length'\n"
        "    return r.metadata['level'] / 4\n"
    )
    assert score(config(f"{name}:reward"), ["42"]) == Scored([0.5], [])


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


VALUES = {
    "True": 1.0,
    "2": 2.0,
    "0.25": 0.25,
    "-1.0": -1.0,
    "np.float32(0.5)": 0.5,
    "np.int64(3)": 3.0,
    "np.bool_(True)": 1.0,
    "np.array([0.75])[0]": 0.75,
    "Fraction(1, 4)": 0.25,
    "float('nan')": "returned nan (float); must be a finite number",
    "float('-inf')": "returned -inf (float); must be a finite number",
    "np.float64('nan')": "nan",
    "None": "returned None (NoneType); must be a finite number",
    "'1'": "returned '1' (str); must be a finite number",
    "[1.0]": "returned [1.0] (list)",
    "np.array([1.0, 2.0])": "(ndarray); must be a finite number",
    "1j": "returned 1j (complex)",
    "10**400": "must be a finite number",
    "lambda: 1": "(function); must be a finite number",
    "type('Mute', (), {'__repr__': lambda self: 1 / 0})()": "(ZeroDivisionError) (Mute)",
}
"""What a reward returns, and what becomes of it: a number, or words in the failure."""


def test_numbers_of_all_kinds_are_taken_and_the_rest_fails_in_order(module):
    name = module(
        "from fractions import Fraction\nimport numpy as np\ndef f(r): return eval(r.response)\n"
    )
    scored = score(config(f"{name}:f", reward_workers=2), list(VALUES))
    failures = iter(scored.failures)
    for (text, wanted), value in zip(VALUES.items(), scored.values, strict=True):
        assert type(value) is float
        if isinstance(wanted, float):
            assert value == wanted, text
        else:
            failure = next(failures)
            assert math.isnan(value)
            assert wanted in failure, text
            assert failure.startswith("prompt 'train.jsonl:7', sample "), text
    assert not list(failures)


HOSTILE = """
import os, re, signal, subprocess, sys, time
def reward(r):
    print("talk", r.response)
    os.write(1, b"{}\\n")
    kind = r.response
    if kind == "raise": return {}["x"]
    if kind == "exit 0": sys.exit(0)
    if kind == "exit 3": sys.exit(3)
    if kind == "_exit 0": os._exit(0)
    if kind == "_exit 3": os._exit(3)
    if kind == "sleep": time.sleep(60)
    if kind == "spin":
        while True:
            try:
                while True: pass
            except BaseException: pass
    if kind == "regex": re.match("(a+)+$", "a" * 60 + "b")
    if kind == "memory": return len([bytearray(1 << 20) for _ in range(500)])
    if kind == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stdin": return len(sys.stdin.read())
    if kind == "child":
        child = subprocess.Popen(["sleep", "60"])
        open("child", "w").write(str(child.pid))
        child.wait()
    if kind == "long": raise ValueError("x" * 10**6)
    return float(kind)
"""

HOSTILE_SAID = {
    "raise": r"raised KeyError: 'x' \(.*user_.*\.py:7\)$",
    "exit 0": "raised SystemExit: 0",
    "exit 3": "raised SystemExit: 3",
    "_exit 0": r"ended its process \(exit status 0\)",
    "_exit 3": r"ended its process \(exit status 3\)",
    "sleep": "took longer than --reward-timeout-seconds 2",
    "spin": "took longer than --reward-timeout-seconds 2",
    "regex": "took longer than --reward-timeout-seconds 2",
    "memory": "took more memory than --reward-memory-gib",
    "segfault": "ended by SIGSEGV",
    "killed": r"ended by SIGKILL \(often: the machine is out of memory\)",
    "child": "took longer than --reward-timeout-seconds 2",
    "long": "raised ValueError: x{900}",
}


def gone(pid: int) -> bool:
    """Within seconds; a zombie that nobody collects counts as gone."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_whatever_a_reward_does_costs_its_sample_alone(module, tmp_path):
    """What it prints goes to the error stream, also past Python; what it reads is empty."""
    name = module(HOSTILE)
    responses = [text for kind in HOSTILE_SAID for text in (kind, "0.5")] + ["stdin"]
    limits = {"reward_timeout_seconds": 2.0, "reward_memory_gib": 0.25, "reward_workers": 4}
    start = time.monotonic()
    scored = score(config(f"{name}:reward", **limits), responses)
    assert time.monotonic() - start < 50  # one that is left alone would take 60
    assert scored.values[1::2] == [0.5] * len(HOSTILE_SAID)
    assert all(map(math.isnan, scored.values[:-1:2])) and scored.values[-1] == 0
    assert len(scored.failures) == len(HOSTILE_SAID)
    for i, (failure, said) in enumerate(zip(scored.failures, HOSTILE_SAID.values(), strict=True)):
        assert failure.startswith(f"prompt 'train.jsonl:7', sample {2 * i}: ")
        assert re.search(said, failure)
        assert len(failure) < 1200
    assert gone(int((tmp_path / "child").read_text()))


def test_a_worker_that_died_between_batches_costs_nothing(module):
    name = module("import os\ndef reward(r): return os.getpid()\n")
    with RewardPool(config(f"{name}:reward")) as pool:
        (first,) = pool.score([rollout()]).values
        assert pool.score([rollout()] * 3).values == [first] * 3
        os.kill(int(first), signal.SIGKILL)
        time.sleep(0.2)
        second = pool.score([rollout()] * 2)
        assert second.failures == [] and second.values[0] == second.values[1] != first
    assert gone(int(second.values[0]))


def test_workers_share_the_work_and_keep_the_order(module):
    name = module(
        "import os, time\n"
        "def reward(r):\n"
        "    time.sleep(0.02 if int(r.response) % 3 == 0 else 0)\n"
        "    return os.getpid() * 1000 + int(r.response)\n"
    )
    values = score(config(f"{name}:reward", reward_workers=2), [str(i) for i in range(60)]).values
    assert [value % 1000 for value in values] == list(range(60))
    assert len({value // 1000 for value in values}) == 2


def test_more_failures_than_allowed_stop_the_run_at_once(module):
    name = module("import time\ndef reward(r): time.sleep(0 if r.response == '1' else 60)\n")
    slow = config(f"{name}:reward", reward_timeout_seconds=0.2, reward_max_failures=0.25)
    with pytest.raises(RewardError) as caught:
        score(slow, ["x"] * 16)
    # The fifth makes it certain: the others are not tried.
    assert str(caught.value).startswith(
        "--reward-max-failures 0.25: 5 of 16 responses have no reward and 4 may have none; "
        "mend what failed, or raise the limit: prompt 'train.jsonl:7', sample 0: took longer than "
        "--reward-timeout-seconds 0.2; prompt"
    )
    assert str(caught.value).endswith("; and 2 more")
    with RewardPool(slow) as pool:  # of a larger batch, as many may be lost
        assert len(pool.score([rollout(sample=i) for i in range(5)], batch_size=20).failures) == 5


def test_the_share_of_failures_that_is_allowed():
    limit = config("exact", reward_max_failures=0.1)
    check_failures(limit, ["a"] * 6, 64)
    with pytest.raises(RewardError, match="7 of 64 .* and 6 may .*: a; a; a; and 4 more$"):
        check_failures(limit, ["a"] * 7, 64)
    check_failures(config("exact", reward_max_failures=0.0), [], 4)
    with pytest.raises(RewardError, match="1 of 4 .* and 0 may .*: a$"):
        check_failures(config("exact", reward_max_failures=0.0), ["a"], 4)


def test_a_large_response_passes(module):
    name = module("def reward(r): return len(r.response)\n")
    assert score(config(f"{name}:reward"), ["\u00e4" * 10**6]).values == [10**6]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys\n\nsys.exit(3)", r"importing .* raised SystemExit: 3 \(.*\.py:3\)"),
        ("import os\nos._exit(3)", r"while it was imported, ended its process \(exit status 3\)"),
        ("x = 1", "no function 'reward'"),
        ("x = bytearray(1 << 30)", "importing .* raised MemoryError.*--reward-memory-gib"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused_at_the_start(module, source, said):
    name = module(source)
    with pytest.raises(RewardError, match=rf"^--reward {name}:reward: .*{said}"):
        check_reward(config(f"{name}:reward", reward_memory_gib=0.5))


def test_a_worker_needs_neither_torch_nor_numpy(module):
    name = module(
        "import sys\n"
        "def reward(r): return len({'torch', 'numpy', 'megatron', 'asyncio'} & set(sys.modules))\n"
    )
    assert score(config(f"{name}:reward"), ["42"]).values == [0.0]


TRAINER = """
import sys
import torch
from megatron_drpo.config import RewardConfig
from megatron_drpo.rewards.pool import RewardPool
from megatron_drpo.types import Prompt, Rollout

prompt = Prompt("p", "x", torch.tensor([1]), "y")
rollouts = [
    Rollout(prompt, i, torch.tensor([2]), torch.tensor([-0.5]), "stop", 0, "") for i in range(2)
]
with RewardPool(RewardConfig(sys.argv[1], reward_workers=2)) as pool:
    pool.score(rollouts)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_trainer(module, tmp_path, how):
    """Also those that are busy in C and hear nothing; Ctrl-C ends the trainer at once."""
    name = module(
        "import os, re\n"
        "def reward(r):\n"
        "    open(f'worker-{os.getpid()}', 'w').close()\n"
        "    re.match('(a+)+$', 'a' * 60 + 'b')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, f"{name}:reward"],
        env=os.environ | {"PYTHONPATH": sys.path[0], "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        # A shell's job in the background, which this may be part of, ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as trainer:
        deadline = time.monotonic() + 60
        while len(started := list(tmp_path.glob("worker-*"))) < 2:
            assert time.monotonic() < deadline and trainer.poll() is None
            time.sleep(0.05)
        trainer.send_signal(how)
        _, error = trainer.communicate(timeout=30)
    assert all(gone(int(path.name.removeprefix("worker-"))) for path in started)
    if how == signal.SIGINT:
        assert error.rstrip().endswith(b"KeyboardInterrupt")


# A reward that a service computes.


@contextlib.contextmanager
def service(answer: Callable[[list[dict[str, Any]]], tuple[int, Any]]) -> Iterator[str]:
    """The address of a service that answers so; what is bytes goes out as it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = answer(json.loads(body)["requests"])
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Location", "/elsewhere")  # for the one answer that sends us away
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        server.server_close()


def test_a_service_gets_batches_and_its_numbers_come_back_in_order():
    seen: list[list[dict[str, Any]]] = []

    def answer(requests):
        seen.append(requests)
        return 200, {"rewards": [float(r["response"]) for r in requests]}

    with service(answer) as address:
        scored = score(config(address, reward_workers=2), [str(i) for i in range(100)])
    assert scored == Scored([float(i) for i in range(100)], [])
    assert sorted(map(len, seen)) == [0, 0, 4, 32, 32, 32]
    assert max(seen, key=len)[0] == {
        "prompt": "12+30=",
        "response": max(seen, key=len)[0]["response"],
        "answer": "42",
        "finish_reason": "length",
        "metadata": {"level": 2},
    }


def test_what_a_service_gives_for_a_sample_that_is_no_number_fails_that_sample():
    given = [1, None, "2", [3.0], math.nan, 10**400, 0.5]
    with service(lambda r: (200, {"rewards": given[: len(r)]})) as address:
        scored = score(config(address), ["x"] * len(given))
    assert [scored.values[0], scored.values[-1]] == [1.0, 0.5]
    assert [failure.partition(", sample ")[2][0] for failure in scored.failures] == list("12345")
    assert "the service gave 'null'; must be a finite number" in scored.failures[0]


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("megatron_drpo.rewards.service.RETRY_PAUSES", (0.01, 0.01))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_service_that_is_busy_is_asked_again_a_few_times(no_pauses, status):
    calls: list[int] = []

    def busy(failures):
        def answer(requests):
            if not requests:
                return 200, {"rewards": []}
            calls.append(1)
            return (status, b"busy") if len(calls) <= failures else (200, {"rewards": [1.0]})

        return answer

    with service(busy(2)) as address:
        assert score(config(address), ["x"]).values == [1.0]
    calls.clear()
    with service(busy(3)) as address:
        (failure,) = score(config(address), ["x"]).failures
    assert f"the service answered {status} 'busy', 3 times" in failure and len(calls) == 3


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((404, b"no such page"), r"the service answered 404 'no such page'"),
        ((302, b""), "the service answered 302"),
        ((200, b"<html>"), r"answered '<html>' to 1 requests; must be .* with 1 numbers or null"),
        ((200, {"rewards": [1.0, 2.0]}), "to 1 requests"),
        ((200, {"rewards": 1.0}), "to 1 requests"),
        ((200, [1.0]), "to 1 requests"),
    ],
)
def test_a_service_that_answers_otherwise_than_agreed_stops_the_run(reply, said):
    with (
        service(lambda requests: reply if requests else (200, {"rewards": []})) as address,
        pytest.raises(RewardError, match=rf"^--reward {address}: .*{said}"),
    ):
        score(config(address), ["x"])


def test_a_service_that_is_slow_costs_its_samples():
    def slow(requests):
        time.sleep(0.8 if requests else 0)
        return 200, {"rewards": [1.0] * len(requests)}

    with service(slow) as address:
        scored = score(config(address, reward_timeout_seconds=0.3), ["x", "y"])
    assert len(scored.failures) == 2
    assert "the service took longer than --reward-timeout-seconds 0.3" in scored.failures[1]


def test_the_example_service_serves_a_function(module):
    name = module("def reward(r): return {'42': r.metadata['level']}[r.response]\n")
    with subprocess.Popen(
        [sys.executable, "-m", "examples.reward_service", f"{name}:reward", "--port", "0"],
        env=os.environ | {"PYTHONPATH": sys.path[0]},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            scored = score(config(address, reward_workers=2), ["42", "43", "42"])
        finally:
            process.kill()
    assert [scored.values[0], scored.values[2]] == [2.0, 2.0]
    assert "sample 1: the service gave 'null'" in scored.failures[0]


def test_a_service_that_is_not_there_is_named_at_the_start(no_pauses):
    with pytest.raises(RewardError, match=r"http://127.0.0.1:9/: no answer .* is the service run"):
        check_reward(config("http://127.0.0.1:9/"))


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
