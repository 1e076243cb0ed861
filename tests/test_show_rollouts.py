"""`tools/show_rollouts.py`: what it reads, which responses it chooses, and how it shows them."""

from __future__ import annotations

import gzip
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import make_tiny_run
from tools.show_rollouts import Response, Seen, Show, Sort, main, read, select, visible

HEADER = {
    "rollouts": 1,
    "temperature": 0.8,
    "top_p": 1.0,
    "top_k": 0,
    "max_response_length": 4,
    "engine": "in process",
}


def response(name: str, sample: int, text: str, reward: float | None, **more: Any) -> dict:
    """A line; one character is one token, and each is half as probable as the one before."""
    return {
        "id": name,
        "prompt": f"What is {name}?",
        "sample": sample,
        "response": text,
        "response_ids": [3 + int(c) if c.isdigit() else 13 for c in text],
        "behaviour_logprobs": [-math.log(2) * (1 + place) for place in range(len(text))],
        "finish_reason": "stop",
        "policy_version": 4,
        "answer": "7",
        "reward": reward,
    } | more


LINES = [
    response("a", 0, "7", 1.0),
    response("a", 1, "1234567=", 0.0, finish_reason="length"),
    response("b", 0, "12", None),
    response("b", 1, "12345", 0.5, loss_mask=[True, True, False, True, False]),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [HEADER, *LINES]))
    return path


def chosen(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> list[tuple[str, int]]:
    """(prompt, sample) of what `--json` prints."""
    assert main([*map(str, argv), "--json"]) == 0
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return [(line["id"], line["sample"]) for line in lines]


def fails(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert main([*map(str, argv)]) == 2
    return capsys.readouterr().err


A0, A1, B0, B1 = ("a", 0), ("a", 1), ("b", 0), ("b", 1)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], [A0, A1, B0, B1]),
        (["--min-reward", "0.5"], [A0, B1]),
        (["--max-reward", "0.5"], [A1, B1]),
        (["--min-reward", "0.1", "--max-reward", "0.9"], [B1]),
        (["--failed"], [B0]),
        (["--finish-reason", "length"], [A1]),
        (["--id", "b"], [B0, B1]),
        (["--search", "IS A"], []),
        (["--search", "is a"], [A0, A1]),
        (["--search", "^12+$"], [B0]),
        (["--search", "^7$"], [A0, A1, B0, B1]),
        (["--id", "b", "--min-reward", "0"], [B1]),
        (["--sort", "reward"], [A1, B1, A0, B0]),
        (["--sort", "reward", "--reverse"], [A0, B1, A1, B0]),
        (["--sort", "length"], [A0, B0, B1, A1]),
        (["--sort", "length", "--limit", "2"], [A0, B0]),
        (["--sort", "lowest"], [A1, B1, B0, A0]),
        (["--sort", "logprob", "--reverse"], [A0, B0, B1, A1]),
        (["--sort", "reward", "--limit", "0"], [A1, B1, A0, B0]),
        (["--sort", "reward", "--reverse", "--limit", "1"], [A0]),
        (["--reverse"], [B1, B0, A1, A0]),
        (["--reverse", "--limit", "3"], [B1, B0, A1]),
    ],
)
def test_filters_and_order(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    expected: list[tuple[str, int]],
) -> None:
    assert chosen(capsys, file, *argv) == expected


@pytest.mark.parametrize("sort", ["file", "reward", "length"])
@pytest.mark.parametrize("reverse", [False, True])
def test_no_more_is_kept_than_is_shown(tmp_path: Path, sort: Sort, reverse: bool) -> None:
    """A run need not fit into memory; its rewards still count. Ties stay in the file's order."""
    file = tmp_path / "many.jsonl"
    lines = [response("a", n, "7" * (1 + n % 5), (n * 7 % 11) / 8 or None) for n in range(60)]
    file.write_text("".join(json.dumps(line) + "\n" for line in [HEADER, *lines]))
    alive: list[weakref.ref[Response]] = []
    most = 0

    def watched(responses: Iterator[Response]) -> Iterator[Response]:
        nonlocal most
        for each in responses:
            alive.append(weakref.ref(each))
            most = max(most, sum(ref() is not None for ref in alive))
            yield each

    seen, asked = Seen(), Show((), id="a", sort=sort, reverse=reverse, limit=4)
    shown = select(watched(read(file, None, seen)), asked, seen)
    assert most <= 4 + 3, "and those in hand"
    rewards = [line["reward"] for line in lines if line["reward"] is not None]
    assert (seen.num_chosen, seen.num_responses, seen.rewards) == (60, 60, rewards)
    sign = -1 if reverse else 1

    def key(line: dict[str, Any]) -> float:
        reward = math.inf if line["reward"] is None else sign * line["reward"]
        return {
            "file": sign * line["sample"],
            "length": sign * len(line["response"]),
            "reward": reward,
        }[sort]

    expected = [line["sample"] for line in sorted(lines, key=key)[:4]]
    assert [each.line["sample"] for each in shown] == expected


def test_json_is_the_lines_as_they_are(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--json", "--failed"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line.pop("file"), line.pop("line")) == (str(file), 4)
    assert line == LINES[2]


def test_a_page_says_what_a_person_wants_to_know(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(file), "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert "temperature 0.8, top_p 1.0, top_k 0, max_response_length 4, engine in process" in out
    assert f"{file}:2  a  sample 0" in out and "What is a?" in out
    assert "reward 1  answer 7  stop  1 tokens, mean log-prob -0.693, lowest -0.693" in out
    assert "reward 0  answer 7  length  8 tokens" in out and "reward failed" in out
    assert "3 of 4 chosen, of 4 responses, mean reward of all 0.5" in out
    assert "\x1b" not in out, "no colours where there is no terminal"
    assert main([str(file), "--id", "b", "--min-reward", "0"]) == 0
    # Of the three that the policy wrote: -log 2 times 1, 2 and 4.
    assert "5 tokens, mean log-prob -1.617, lowest -2.773" in capsys.readouterr().out


def test_every_token_with_its_probability(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run the texts of tokens are those of its own tokenizer."""
    make_tiny_run(tmp_path)  # whose ids 3 to 12 are the digits
    (tmp_path / "rollouts").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in [HEADER, *LINES])
    (tmp_path / "rollouts/step-000001.jsonl").write_text(text)
    file = tmp_path / "rollouts/step-000001.jsonl"
    assert main([str(file), "--tokens", "--rare", "0.1", "--id", "b", "--min-reward", "0"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row and row[0].isdigit() and row[1].isdigit()]
    assert rows == [
        ["0", "4", '"1"', "-0.6931", "0.5"],
        ["1", "5", '"2"', "-1.3863", "0.25"],
        ["2", "6", '"3"', "not", "the", "policy's"],
        ["3", "7", '"4"', "-2.7726", "0.0625", "<-", "rare"],
        ["4", "8", '"5"', "not", "the", "policy's"],
    ]
    other = tmp_path / "elsewhere.jsonl"
    other.write_text(text)
    assert main([str(other), "--tokens", "--id", "a", "--limit", "1"]) == 0
    assert '"7"' not in capsys.readouterr().out, "nobody said which tokenizer"
    argv = ["--tokens", "--id", "a", "--limit", "1", "--tokenizer", str(tmp_path / "model")]
    assert main([str(other), *argv]) == 0
    assert '"7"' in capsys.readouterr().out
    assert "--tokenizer nowhere: no such directory" in fails(
        capsys, other, "--tokens", "--tokenizer", "nowhere"
    )


def test_shards_runs_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    sample = {"step": 5, "prompt": "1+1=", "response": "2", "reward": 1.0, "answer": "2"}
    samples = [sample, sample | {"step": 10, "response": "3", "reward": None}]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    assert main([str(run), "--step", "10"]) == 0
    out = capsys.readouterr().out
    assert "step 10" in out and "reward failed" in out and "step 5" not in out
    for number, line in enumerate(LINES[:2], start=1):
        text = json.dumps(HEADER) + "\n" + json.dumps(line) + "\n"
        (run / f"rollouts/step-{number:06d}.jsonl").write_text(text)
    assert chosen(capsys, run) == [A0, A1]
    assert chosen(capsys, run, "--step", "2") == [A1]
    assert "--step 3: " in fails(capsys, run, "--step", "3")
    shards = tmp_path / "shards"
    shards.mkdir()
    packed = gzip.compress((json.dumps(HEADER) + "\n" + json.dumps(LINES[2]) + "\n").encode())
    (shards / "rollouts-00000-of-00002.jsonl.gz").write_bytes(packed)
    growing = json.dumps(HEADER) + "\n" + json.dumps(LINES[3]) + "\n"
    (shards / "rollouts-00001-of-00002.jsonl.partial").write_text(growing)
    assert chosen(capsys, shards, run) == [B0, B1, A0, A1]


def test_files_whose_writer_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line, or a gzip member, that is not complete is not there yet."""
    rows = [(json.dumps(line) + "\n").encode() for line in [HEADER, *LINES]]
    plain, packed = tmp_path / "a.jsonl.partial", tmp_path / "b.jsonl.gz.partial"
    plain.write_bytes(b"".join(rows[:4])[:-5])
    assert chosen(capsys, plain) == [A0, A1]
    members = [gzip.compress(b"".join(each)) for each in (rows[:3], rows[3:])]
    packed.write_bytes(b"".join(members)[:-5])
    assert chosen(capsys, packed) == [A0, A1]
    packed.write_bytes(b"".join(members))
    assert chosen(capsys, packed) == [A0, A1, B0, B1]
    (tmp_path / "c.jsonl.partial").write_bytes(rows[0][:-5])  # just begun
    assert chosen(capsys, tmp_path) == [A0, A1, A0, A1, B0, B1]
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes(b"".join(rows[1:4])[:-1])
    assert chosen(capsys, samples) == [A0, A1]
    # What has its name is complete, or damaged.
    finished, whole = tmp_path / "d.jsonl", tmp_path / "e.jsonl.gz"
    finished.write_bytes(plain.read_bytes())
    assert f"{finished}:4: malformed JSON" in fails(capsys, finished)
    whole.write_bytes(packed.read_bytes()[:-5])
    assert f"{whole}: is damaged or not complete" in fails(capsys, whole)


def test_long_texts_are_cut_in_the_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.jsonl"
    line = {"prompt": "p", "response": "first" + "x" * 990 + "last!"}
    file.write_text(json.dumps(line) + "\n")
    assert main([str(file)]) == 0
    out = capsys.readouterr().out
    assert "first" in out and "last!" in out and "[... 400 characters; --full" in out
    assert main([str(file), "--full"]) == 0
    assert "x" * 990 in capsys.readouterr().out.replace("\n", "")


def test_a_response_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07 [bold]not markup[/bold]\n\x9b31m"
    file = tmp_path / "evil.jsonl"
    line = response("\x1b[1m", 0, evil, 1.0, answer="\x1b[5m", finish_reason="\x1b[3m")
    line |= {"policy_version": "\x1b[4m", "sample": "\x1b[7m", "prompt": "half of a pair: \ud800"}
    del line["behaviour_logprobs"], line["response_ids"]
    header = HEADER | {"engine": "\x1b[8m"}
    file.write_text(json.dumps(header) + "\n" + json.dumps(line) + "\n")
    assert main([str(file)]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)
    assert r"\x1b[2J" in out and "[bold]not markup[/bold]" in out
    assert all(rf"\x1b[{number}m" in out for number in (1, 3, 4, 5, 7, 8))
    assert visible("a\tb\nc\r") == "a\tb\nc\\x0d"


def test_colours_are_for_terminals(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main([str(file), "--min-reward", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[1;32m1" in out and "\x1b[1;33m0.5" in out, "green the best, yellow between"
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([str(file), "--min-reward", "0.1"]) == 0
    assert "\x1b[1;32m" not in capsys.readouterr().out


def test_what_cannot_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "PATH: give a run" in fails(capsys)
    assert "nowhere: is not there" in fails(capsys, "nowhere")
    assert "holds neither *.jsonl" in fails(capsys, tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "answer": "7"}\n{"prompt": "p", "response": 3}\n')
    error = fails(capsys, bad)
    assert f"{bad}:1: `response` must be text" in error and f"{bad}:2: `response`" in error
    bad.write_text(json.dumps(LINES[0] | {"behaviour_logprobs": []}) + "\n")
    assert "must be lists, equally long" in fails(capsys, bad)
    bad.write_text(json.dumps(LINES[0] | {"reward": "high"}) + "\n")
    assert "`reward` must be a number" in fails(capsys, bad)
    error = fails(capsys, bad, "--search", "(", "--tokens", "--rare", "2", "--limit", "-1")
    assert len(error.splitlines()) == 3 and "--search (: is no regular expression" in error
    assert "drop --tokens" in fails(capsys, bad, "--json", "--tokens")
    assert "--failed: has no reward" in fails(capsys, bad, "--failed", "--min-reward", "1")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"reward": math.nan}, "`reward` must be"),
        ({"reward": math.inf}, "`reward` must be"),
        ({"reward": 10**400}, "`reward` must be"),
        ({"behaviour_logprobs": [None]}, "`behaviour_logprobs` holds None at index 0"),
        ({"behaviour_logprobs": ["-1"]}, "`behaviour_logprobs` holds '-1' at index 0"),
        ({"behaviour_logprobs": [800.0]}, "`behaviour_logprobs` holds 800.0 at index 0"),
        ({"behaviour_logprobs": [math.nan]}, "`behaviour_logprobs` holds nan at index 0"),
        ({"behaviour_logprobs": -0.5}, "must be lists, equally long"),
        ({"loss_mask": [True, False]}, "must be lists, equally long"),
        ({"response_ids": ["7"]}, "`response_ids` holds '7' at index 0"),
        ({"response_ids": [-1]}, "`response_ids` holds -1 at index 0"),
    ],
)
def test_a_damaged_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: dict[str, Any], told: str
) -> None:
    file = tmp_path / "damaged.jsonl"
    lines = [HEADER, LINES[0], LINES[0] | damage]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"{file}:3: " in (error := fails(capsys, file, "--tokens")) and told in error


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"behaviour_logprobs": None, "response_ids": None}, "no tokens with log-probs"),
        ({"behaviour_logprobs": None, "loss_mask": [True] * 3}, "no tokens with log-probs"),
        ({"response_ids": None}, "3 tokens, mean log-prob -1.386"),
        ({"loss_mask": [False] * 3, "behaviour_logprobs": [None] * 3}, "no tokens with log-probs"),
        ({"loss_mask": [True, True, False], "behaviour_logprobs": [-1, -2, None]}, "-1.500"),
        ({"answer": 42}, "answer 42"),
    ],
)
def test_what_a_line_need_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], shown: str
) -> None:
    file = tmp_path / "sparse.jsonl"
    file.write_text(json.dumps(response("a", 0, "123", 1.0) | fields) + "\n")
    for options in ([], ["--tokens"]):
        for sort in ("file", "length", "logprob"):
            assert main([str(file), "--sort", sort, "--search", "3|42", *options]) == 0
            out = capsys.readouterr().out
            assert "1 of 1 chosen" in out
            assert shown in out or (not options and shown.startswith("no tokens"))
    assert chosen(capsys, file, "--search", "^42$") == [A0][: "answer" in fields]


def test_options_that_nothing_would_read(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--json: has long texts whole; drop --full" in fails(capsys, file, "--json", "--full")
    assert "--rare 0.5: is read by --tokens only" in fails(capsys, file, "--rare", "0.5")
    assert "--tokenizer d: is read by --tokens only" in fails(capsys, file, "--tokenizer", "d")
    assert f"--step 3: {file} does not say the step" in fails(capsys, file, "--step", "3")
    step = file.rename(file.with_name("step-000003.jsonl"))
    assert len(chosen(capsys, step, "--step", "3")) == 4
    samples = file.with_name("copied.jsonl")
    samples.write_text("".join(json.dumps(LINES[n] | {"step": n}) + "\n" for n in range(4)))
    assert chosen(capsys, samples, "--step", "2") == [B0]
