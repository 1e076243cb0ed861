"""`tools/compare_runs.py`: which step and number differ first, and by which flags."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.arguments import parse
from tools.compare_runs import DIFFERENT, differences, differing_flags, main, stage

LINES = [
    {"step": 0, "eval/avg": 0.25, "time/evaluate": 1.0},
    {"step": 1, "loss": 0.5, "grad_norm": 2.0, "reward/mean": 0.25, "time/step": 3.0},
    {"step": 1, "time/checkpoint": 0.5},
    {"step": 2, "loss": 0.25, "grad_norm": None, "reward/mean": 0.5, "memory/train": 1.0},
    {"step": 3, "loss": 0.125, "grad_norm": 1.0, "reward/mean": 0.75, "mfu": 0.5},
]
FLAGS = ["--hf-model", "m", "--prompts", "p"]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """Two runs that differ in what a machine decides only."""
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        config, _ = parse([*FLAGS, "--output-dir", name])
        (tmp_path / name / "config.json").write_text(json.dumps(config.flat()))
        write(
            tmp_path / name,
            [
                line | {key: 1.0 * number for key in line if key.startswith(("time/", "m"))}
                for line in LINES
            ],
        )
    return str(tmp_path / "a"), str(tmp_path / "b")


def write(run: Path | str, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (Path(run) / "metrics.jsonl").write_text(text)


def change(run: str, step: int, **values: float | None) -> None:
    """Other numbers of a step; None is one that was not finite, and ... removes a number."""
    file = Path(run) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["step"] == step and "loss" in line:
            line |= {name.replace("__", "/"): value for name, value in values.items()}
    write(run, [{k: v for k, v in line.items() if v != "gone"} for line in lines])


def test_clocks_and_memory_are_no_difference(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*runs]) == 0
    out = capsys.readouterr().out
    assert "equal to the last bit: steps 0 to 3" in out
    assert "flags" not in out, "where a run is written to is no difference"


def test_the_first_difference_is_told_with_both_numbers(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    last_bit = math.nextafter(0.25, 1)
    change(runs[1], 2, loss=last_bit)
    change(runs[1], 3, loss=0.25, reward__mean=0.5)
    assert main([*runs]) == DIFFERENT == 1
    out = capsys.readouterr().out
    assert "first difference: step 2, in training; equal to the last bit before" in out
    (row,) = (line.split() for line in out.splitlines() if " loss " in line)
    assert row == ["2", "training", "loss", "0.25", repr(last_bit), "2.2e-16", "5.0e-01", "3"]
    assert "reward/mean" not in out and "1 more differ from a later step on; --all" in out
    assert main([*runs, "--all"]) == 1
    assert "reward/mean" in capsys.readouterr().out


def test_a_narrow_terminal_folds_lines_and_cuts_no_digits(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    ours, name = -1.2345678901234567e-100, "eval/" + "a-long-name-of-a-file/" * 5 + "avg"
    theirs = math.nextafter(ours, 0)
    change(runs[0], 2, **{name: ours})
    change(runs[1], 2, **{name: theirs})
    assert main([*runs]) == 1
    out = capsys.readouterr().out
    assert "\x1b[" in out, "this is a terminal"
    assert name in out and repr(ours) in out and repr(theirs) in out


def test_within_a_tolerance_numbers_are_equal(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    change(runs[1], 3, loss=0.125 * (1 + 1e-6), grad_norm=1.001)
    assert main([*runs, "--tolerance", "2e-3"]) == 0
    assert "equal within the tolerance" in capsys.readouterr().out
    assert main([*runs, "--absolute-tolerance", "0.0011"]) == 0
    assert main([*runs, "--tolerance", "1e-5"]) == 1
    assert "grad_norm" in capsys.readouterr().out
    assert main([*runs, "--tolerance", "1e-5", "--ignore", "grad"]) == 0


def test_what_is_not_finite_or_not_logged(runs: tuple[str, str]) -> None:
    assert main([*runs]) == 0  # null in both
    change(runs[1], 2, grad_norm=1.0)
    assert main([*runs, "--tolerance", "1"]) == 1
    change(runs[1], 2, grad_norm=None)
    change(runs[0], 3, reward__mean="gone")  # type: ignore[arg-type]
    assert main([*runs, "--tolerance", "1"]) == 1
    assert main([*runs, "--ignore", "reward/"]) == 0


def test_a_run_that_is_shorter_is_equal_as_far_as_it_goes(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(runs[0], LINES[:3])
    assert main([*runs]) == 0
    out = capsys.readouterr().out
    assert f"A  {runs[0]}: steps 0 to 1" in out and f"B  {runs[1]}: steps 0 to 3" in out
    assert "equal to the last bit: steps 0 to 1" in out
    write(runs[0], [{"step": 7, "loss": 1.0}])
    assert main([*runs]) == 2
    assert "steps 7 to 7" in (error := capsys.readouterr().err) and "no step that both" in error


def test_flags_that_differ(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(runs[1]) / "config.json"
    config = json.loads(file.read_text())
    config |= {"lr": 1e-3, "tensor_model_parallel_size": 2, "rollout_stop_strings": ["x"]}
    del config["drpo_delta"]  # of a time when there was no such flag
    file.write_text(json.dumps(config))
    assert main([*runs]) == 0, "flags alone make no difference of numbers"
    out = capsys.readouterr().out
    learned, where = out.split("flags that differ in where and how it is computed")
    assert "--lr: A 1e-06, B 0.001" in learned and "--rollout-stop-strings: A , B x" in learned
    assert "--tensor-model-parallel-size: A 1, B 2" in where
    assert "drpo-delta" not in out and "output-dir" not in out
    assert differing_flags({"drpo_delta": 1.0}, {}) == {"drpo_delta": [1.0, 12.5]}


def test_the_order_of_a_step_says_what_came_first() -> None:
    names = ["eval/avg", "loss", "engine_gap/max_abs", "packing/efficiency", "reward/mean"]
    names += ["response_length/mean", "advantage/std", "objective/penalty", "grad_norm"]
    names += ["servers/canary_gap", "servers/used"]
    ours = {1: dict.fromkeys(names, 1.0)}
    theirs = {1: dict.fromkeys(names, 2.0)}
    found = differences(ours, theirs, [1])
    assert [each.stage for each in found] == [
        *("responses", "rewards", "rewards", "packing", "scoring"),
        *("training", "training", "training", "weight sync", "weight sync", "evaluation"),
    ]
    assert {each.relative for each in found} == {0.5}
    assert stage("eval/response_length") == "evaluation" and stage("ratio/max") == "training"


def test_json(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    change(runs[1], 2, grad_norm=1.0)
    change(runs[1], 3, loss=0.25)
    assert main([*runs, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] is False and told["first_step"] == 2 and told["steps"] == [0, 1, 2, 3]
    first, second = told["differences"]
    assert first["name"] == "grad_norm" and first["ours"] is None and first["theirs"] == 1.0
    assert (second["name"], second["step"], second["relative"]) == ("loss", 3, 0.5)


def test_what_cannot_be_read(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([runs[0], "nowhere"]) == 2
    assert "nowhere/metrics.jsonl: does not exist" in capsys.readouterr().err
    assert main([*runs, "--tolerance", "-1"]) == 2
    assert "--tolerance -1.0: must be 0 or more" in capsys.readouterr().err
    assert main([*runs, "--json", "--all"]) == 2
    assert "--json: lists all numbers that ever differ; drop --all" in capsys.readouterr().err
