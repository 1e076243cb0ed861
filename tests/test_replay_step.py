"""`tools/replay_step.py`: a step computed again is the step that the run made."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo import replay
from megatron_drpo.arguments import parse, parse_over
from megatron_drpo.config import Config
from megatron_drpo.dashboard import is_measurement
from megatron_drpo.errors import ConfigError, DataError
from tests.distributed import run_distributed
from tests.tiny_run import make_tiny_run
from tools.replay_step import _lines, _write, main

STEPS, DELTA = 3, 0.5
REWARD = """
def short(request):
    return -len(request.response) / 8
"""
TP1 = ("--tensor-model-parallel-size", "1")
REPLAYS: dict[str, list[str]] = {
    "first": ["--step", "1"],
    "last": ["--step", "3"],
    "dp2": ["--step", "3", *TP1, "--max-tokens-per-microbatch", "64"],
    "pp2": ["--step", "3", *TP1, "--pipeline-model-parallel-size", "2"],
    "ppo": ["--step", "1", "--objective", "ppo", "--ppo-clip-low", "0.1"],
    "sampled": [
        *("--step", "2", "--drpo-penalty", "sampled", "--drpo-delta", str(DELTA)),
        *("--kl-coef", "0"),
    ],
    "offline": ["--step", "2"],
}


def _train(rank: int, world_size: int, root: Path, flags: list[str]) -> None:
    """Runs and replays that share one start of the processes."""
    from megatron_drpo import cli, train

    train.write_report = lambda run: run  # whose pictures take longer than these runs
    os.chdir(root)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    # The objective that needs most of a step's past: both models' whole distributions, and the
    # one that the run started from.
    full = ["--drpo-penalty", "full", "--drpo-delta", "2", "--kl-coef", "0.05"]
    full += ["--kl-estimator", "full"]
    keep = ["--save-rollouts", "--checkpoint-interval", "1", "--checkpoint-keep", "0"]
    cli.start([*flags, *full, *keep, "--output-dir", "run"])
    clipped = ["--objective", "ppo", "--ppo-clip-low", "0.1", "--kl-coef", "0.05"]
    clipped += ["--kl-estimator", "full", "--train-iters", "1"]
    cli.start([*flags, *clipped, "--output-dir", "ppo"])
    at = flags.index("--prompts")
    offline = [*flags[:at], *flags[at + 2 :], "--rollouts-file", "run/rollouts"]
    at = offline.index("--eval-prompts")
    offline = [*offline[:at], *offline[at + 2 :], *keep[1:]]
    cli.start([*offline, "--train-iters", "2", "--output-dir", "offline"])
    if rank == 0:
        Path("before.json").write_text(json.dumps(snapshot(Path("run"))))
    computed, compute = [], replay.replay

    def recorded(*args: Any, **options: Any) -> replay.Replayed:
        computed.append(compute(*args, **options))
        return computed[-1]

    replay.replay = recorded
    for name, argv in REPLAYS.items():
        run = "offline" if name == "offline" else "run"
        screen = io.StringIO()
        tokens = [] if name == "first" else ["--tokens", f"{name}.jsonl"]
        with contextlib.redirect_stdout(screen):
            assert main([run, *argv, *tokens]) == 0
        # A table that nobody asked for takes much memory.
        assert bool(computed[-1].tokens) == (bool(tokens) and rank == 0)
        if rank == 0:
            Path(f"{name}.txt").write_text(screen.getvalue())
            Path(f"{name}.json").write_text(json.dumps(computed[-1].scalars))
    if rank == 0:
        Path("after.json").write_text(json.dumps(snapshot(Path("run"))))


def snapshot(run: Path) -> dict[str, list[int]]:
    """Size and time of change of everything in a run."""
    paths = [run, *sorted(run.rglob("*"))]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("replay")
    (root / "tiny_reward.py").write_text(REWARD)
    flags = [*make_tiny_run(root), "--reward", "tiny_reward:short"]
    flags += ["--eval-prompts", "prompts.jsonl", "--tensor-model-parallel-size", "2"]
    flags += ["--train-iters", str(STEPS), "--lr", "1e-3", "--lr-decay-style", "cosine"]
    flags += ["--lr-warmup-iters", "2", "--lr-decay-iters", str(2 * STEPS)]
    flags += ["--no-progress", "--no-export-hf"]
    run_distributed(_train, 2, root, flags)
    return root


def logged(run: Path, step: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if line.pop("step") == step:
            found |= {name: value for name, value in line.items() if not is_measurement(name)}
    return found


def replayed(root: Path, name: str) -> dict[str, float]:
    return json.loads((root / f"{name}.json").read_text())


def table(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "step"), [("first", 1), ("last", STEPS)])
def test_a_step_is_what_it_was_to_the_last_bit(root: Path, name: str, step: int) -> None:
    ours, theirs = replayed(root, name), logged(root / "run", step)
    assert ours["grad_norm"] > 0 and ours["policy_version"] == 2 * step
    evaluated = {key for key in theirs if key.startswith("eval/")}
    assert ours.keys() == theirs.keys() - evaluated
    assert ours == {key: theirs[key] for key in ours}
    said = (root / f"{name}.txt").read_text()
    assert f"{len(ours)} of {len(ours)} numbers are equal bit for bit" in said
    assert bool(evaluated) == ("not computed here: eval/avg" in said)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_another_layout_gives_the_same_step_to_rounding(root: Path, layout: str) -> None:
    ours, theirs = replayed(root, layout), logged(root / "run", STEPS)
    for name in ("reward/mean", "advantage/std", "lr", "tokens/total"):
        assert ours[name] == theirs[name]
    for name in ("loss", "grad_norm", "ratio/mean", "weight/mean", "entropy/mean"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-8)
    assert ours["loss"] != theirs["loss"], "this is another layout"
    known = ("update", "id", "sample", "token", "token_id", "text", "policy_version")
    for one, other in zip(table(root, layout), table(root, "last"), strict=True):
        assert [one[name] for name in known] == [other[name] for name in known]
        assert one["advantage"] == other["advantage"]
        for name in ("logprob", "old_logprob", "weight", "ratio"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


@pytest.mark.distributed
def test_the_table_is_that_of_the_saved_rollouts(root: Path) -> None:
    lines = (root / "run/rollouts/step-000002.jsonl").read_text().splitlines()
    saved = {(line["id"], line["sample"]): line for line in map(json.loads, lines[1:])}
    tokens = table(root, "sampled")
    seen: dict[tuple[str, int], list[int]] = {}
    for row in tokens:
        line, at = saved[row["id"], row["sample"]], row["token"]
        seen.setdefault((row["id"], row["sample"]), []).append(at)
        group = [other["reward"] for (name, _), other in saved.items() if name == row["id"]]
        advantage = line["reward"] - sum(group) / len(group)
        assert row["token_id"] == line["response_ids"][at]
        assert row["behaviour_logprob"] == line["behaviour_logprobs"][at]
        assert row["policy_version"] == 2
        assert row["advantage"] == pytest.approx(advantage, rel=1e-6)
        pi, mu = math.exp(row["logprob"]), math.exp(row["behaviour_logprob"])
        assert row["ratio"] == pytest.approx(pi / mu, rel=1e-12)
        sign = math.copysign(1, row["advantage"] * (row["ratio"] - 1)) if row["ratio"] != 1 else 0
        assert row["weight"] == pytest.approx(1 - sign * abs(pi - mu) / DELTA, abs=1e-5)
    # Every token once, each group in one of the two updates.
    assert seen == {key: [*range(len(line["response_ids"]))] for key, line in saved.items()}
    updates: dict[str, set[int]] = {}
    for row in tokens:
        updates.setdefault(row["id"], set()).add(row["update"])
    assert sorted(map(min, updates.values())) == [1, 1, 2, 2]
    assert all(len(numbers) == 1 for numbers in updates.values())
    # Before the first update pi is mu; after it, it has moved.
    assert all(row["logprob"] == row["old_logprob"] for row in tokens if row["update"] == 1)
    assert any(row["logprob"] != row["old_logprob"] for row in tokens if row["update"] == 2)
    weights = torch.tensor([row["weight"] for row in tokens], dtype=torch.float64)
    assert replayed(root, "sampled")["weight/mean"] == pytest.approx(weights.mean().item())


@pytest.mark.distributed
def test_another_objective_makes_of_the_step_what_its_own_run_did(root: Path) -> None:
    """Both runs draw the same responses in their first step."""
    ours, theirs = replayed(root, "ppo"), logged(root / "ppo", 1)
    assert ours == {name: theirs[name] for name in ours}
    assert ours["grad_norm"] != logged(root / "run", 1)["grad_norm"]
    said = (root / "ppo.txt").read_text()
    assert "with --objective ppo --ppo-clip-low 0.1" in said
    assert re.search(r"^reward/mean .* =$", said, re.M)
    assert re.search(r"^grad_norm .* \d\.\de[-+]\d\d$", said, re.M)
    assert re.search(r"relative difference of loss .*, of grad_norm \d\.\de[-+]\d\d$", said, re.M)


@pytest.mark.distributed
def test_a_run_on_recorded_rollouts_is_replayed_from_their_file(root: Path) -> None:
    ours, theirs = replayed(root, "offline"), logged(root / "offline", 2)
    assert ours == theirs


@pytest.mark.distributed
def test_nothing_in_the_run_is_changed(root: Path) -> None:
    before, after = (json.loads((root / f"{n}.json").read_text()) for n in ("before", "after"))
    assert len(before) > 20 and before == after


@pytest.mark.distributed
def test_what_is_not_there_is_said_with_the_steps_that_are(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    values = replay.read_config(run)
    with pytest.raises(DataError) as error:
        replay.find(run, 5, values)
    text = str(error.value)
    rollouts, checkpoint = run / "rollouts/step-000005.jsonl", run / "checkpoints/step-000004"
    assert f"--step 5: the rollouts of step 5 are not there ({rollouts}), and" in text
    assert f"the checkpoint before step 5 is not there ({checkpoint})" in text
    assert "steps that can be replayed: 1-3." in text
    assert "--save-rollouts" in text and "--checkpoint-keep 0" in text
    (run / "checkpoints/step-000001/state.json").unlink()
    with pytest.raises(DataError, match=r"the checkpoint before step 2.*replayed: 1, 3\."):
        replay.find(run, 2, values)
    with pytest.raises(DataError, match=r"--step 0: steps count from 1; .*replayed: 1, 3\."):
        replay.find(run, 0, values)
    shutil.rmtree(run / "rollouts")
    with pytest.raises(DataError, match="the rollouts of step 1 are not there .*; no step can be"):
        replay.find(run, 1, values)
    # What a run logged of no step is not a reason to refuse: the step may be what stopped it.
    assert replay.logged_step(run, 9) == {}


FLAGS = ["--hf-model", "m", "--prompts", "p"]
SOURCE = replay.Source(2, Path("checkpoints/step-000001"), Path("rollouts/step-000002.jsonl"))


@functools.cache
def parsed(*argv: str) -> Config:
    return parse([*FLAGS, *argv])[0]


def flat(*argv: str) -> dict[str, Any]:
    """A run's config.json."""
    return json.loads(json.dumps(parsed(*argv).flat()))


def test_a_config_json_is_the_configuration_again() -> None:
    other = ["--rollout-stop-strings", "a", "b", "--lr", "1e-5", "--kl-coef", "0.1"]
    other += ["--recompute-granularity", "selective", "--recompute-modules", "mlp"]
    argv = [*other, "--objective", "ppo", "--ppo-clip-low", "0.1", "--kl-estimator", "full"]
    assert parse_over(flat(*argv), []) == (parsed(*argv), set())
    drpo = ["--objective", "drpo", "--drpo-delta", "2"]
    config, given = parse_over(flat(*argv), drpo)
    assert given == {"objective", "drpo_delta"}
    assert config == parsed(*other, *drpo, "--kl-estimator", "full")
    # A run that is older than a flag had its default.
    older = {name: value for name, value in flat().items() if name != "rollout_exact"}
    assert parse_over(older, [])[0] == parsed()
    with pytest.raises(ConfigError, match="config.json: has `warp`, which this version does not"):
        parse_over(flat() | {"warp": 9}, [])
    with pytest.raises(ConfigError, match="--ppo-clip-low 0.1: is read by --objective ppo only"):
        parse_over(flat(*argv), ["--objective", "drpo", "--ppo-clip-low", "0.1"])


def test_flags_that_a_replay_does_not_read_are_refused() -> None:
    argv = ["--lr", "1", "--reward", "exact", "--objective", "ppo", "--output-dir", "x"]
    with pytest.raises(ConfigError) as error:
        replay.configure(flat(), SOURCE, argv)
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["--lr", "--output-dir", "--reward"]


def test_a_replay_needs_neither_rewards_nor_environments_nor_the_bound_of_the_gap() -> None:
    values = flat("--reward", "gone:away", "--environment", "gone:away", "--save-rollouts")
    config = replay.configure(values | {"max_engine_gap": 0.01}, SOURCE, [])
    assert config.reward.reward == "exact" and config.rollout.environment is None
    assert config.rollout.max_engine_gap == math.inf and not config.rollout.save_rollouts
    assert config.output.resume
    first = replay.configure(values, dataclasses.replace(SOURCE, checkpoint=None), [])
    assert not first.output.resume


def test_numbers_are_equal_only_to_the_last_bit() -> None:
    nan, inf = math.nan, math.inf
    assert replay.Number("x", 1.0, 1.0).equal and replay.Number("x", nan, inf).equal
    assert not replay.Number("x", 1.0, math.nextafter(1, 2)).equal
    assert not replay.Number("x", None, 1.0).equal and not replay.Number("x", nan, 1.0).equal
    assert not replay.Number("x", 1.0, nan).equal
    assert replay.Number("x", 2.0, 1.5).difference == 0.25
    assert replay.Number("x", 1.5, -2.0).difference == 1.75
    assert replay.Number("x", 0.0, 0.0).difference == 0
    assert math.isnan(replay.Number("x", nan, 1.0).difference)


def test_what_is_told_of_loss_and_gradient_is_how_they_differ() -> None:
    logged = {"loss": 0.5, "grad_norm": 2.0, "reward/mean": 0.25}

    def told(**scalars: float) -> str:
        done = replay.Replayed(logged | scalars, [])
        return _lines(SOURCE, [], logged, done)[-1]

    assert told() == "3 of 3 numbers are equal bit for bit"
    assert told(**{"reward/mean": 0.5}) == "2 of 3 numbers are equal bit for bit"
    one = "2 of 3 numbers are equal bit for bit; relative difference of "
    assert told(loss=0.4) == one + "loss 2.0e-01"
    assert told(grad_norm=2.5) == one + "grad_norm 2.0e-01"


def test_a_table_of_tokens_is_json(tmp_path: Path) -> None:
    """Which knows neither NaN nor infinity."""
    file = tmp_path / "t.jsonl"
    row = {"text": "a", "token": 3, "ratio": math.inf, "logprob": -math.inf, "weight": math.nan}
    _write(file, [row | {"entropy": 0.1}, row])

    def refuse(name: str) -> None:
        raise AssertionError(name)

    first, second = (
        json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()
    )
    assert first == {"text": "a", "token": 3, "entropy": 0.1} | dict.fromkeys(
        ["ratio", "logprob", "weight"]
    )
    assert second["ratio"] is None


def test_the_tool_refuses_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main([str(tmp_path), "--step", "1"]) == 2
    assert f"{tmp_path}/config.json: No such file" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(flat()))
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/step-000001.jsonl").touch()
    assert main([str(tmp_path), "--step", "1", "--tokens", str(tmp_path / "t.jsonl")]) == 2
    assert "which a replay leaves as it is" in capsys.readouterr().err
    assert main([str(tmp_path), "--step", "1"]) == 2
    assert (
        "start this with torchrun --nproc-per-node 1 tools/replay_step" in capsys.readouterr().err
    )
