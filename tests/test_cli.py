"""The command line: what it accepts, what it refuses, and what it says then."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_drpo import cli
from megatron_drpo.arguments import Options, parse
from megatron_drpo.config import Config, ObjectiveConfig
from megatron_drpo.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["--hf-model", "model", "--prompts", "p.jsonl"]


def refused(*argv: str) -> list[str]:
    """The lines of the ConfigError that these arguments give."""
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return str(caught.value).splitlines()


def yaml_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_flags_are_the_field_names_and_fill_every_group() -> None:
    config, options = parse(
        [*NEEDED, "--tensor-model-parallel-size", "2", "--bf16", "--no-shuffle-prompts"]
        + ["--rollout-stop-ids", "5", "7", "--lr=3e-4", "--drpo_delta", "0.5"]
        + ["--loss-aggregation", "token-mean", "--eval-prompts", "e.jsonl", "--eval-top-p", "0.9"]
    )
    assert config.model.hf_model == "model" and config.model.bf16
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.data.prompts == "p.jsonl" and not config.data.shuffle_prompts
    assert config.rollout.rollout_stop_ids == (5, 7)
    assert config.optimizer.lr == 3e-4
    assert config.objective.drpo_delta == 0.5
    assert config.objective.loss_aggregation == "token-mean"
    assert config.eval.eval_top_p == 0.9
    assert not options.dry_run and options.config is None


def test_what_is_not_given_has_the_default_of_the_records() -> None:
    config, _ = parse(NEEDED)
    assert isinstance(config, Config)
    assert config.flat() == {**config.flat(), "train_iters": 100, "lr": 1e-6, "drpo_delta": 12.5}
    assert type(config.model).__module__ == "megatron_drpo.config"


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert parse([*NEEDED, "--lr", "1", "--lr", "2"])[0].optimizer.lr == 2


def test_yaml_is_taken_and_the_command_line_wins(tmp_path: Path) -> None:
    file = yaml_file(
        tmp_path,
        "hf-model: from-yaml\nprompts: p.jsonl\nlr: 1e-6\nbf16: true\nresume: true\n"
        "rollout_stop_ids: [3, 4]\neval-prompts: null\nseed: 7\nreward: exact\n",
    )
    config, options = parse(["--seed", "8", "--config", file, "--no-resume", "--dry-run"])
    assert config.model.hf_model == "from-yaml" and config.model.bf16
    assert config.optimizer.lr == 1e-6
    assert config.rollout.rollout_stop_ids == (3, 4)
    assert config.data.eval_prompts is None
    assert config.train.seed == 8 and not config.output.resume
    assert options == Options(config=file, dry_run=True)


def test_another_objective_leaves_out_what_the_file_gives_its_own(tmp_path: Path) -> None:
    file = yaml_file(
        tmp_path, "hf-model: m\nprompts: p.jsonl\nobjective: drpo\ndrpo-delta: 0.5\nkl-coef: 0.1\n"
    )
    flags = ["--config", file, "--objective", "ppo"]
    objective = parse([*flags, "--ppo-clip-high", "0.28"])[0].objective
    assert (objective.objective, objective.ppo_clip_high, objective.kl_coef) == ("ppo", 0.28, 0.1)
    assert objective.drpo_delta == ObjectiveConfig.drpo_delta
    assert parse(["--config", file])[0].objective.drpo_delta == 0.5
    assert parse([*flags[:3], "drpo"])[0].objective.drpo_delta == 0.5
    (tmp_path / "at-odds").mkdir()
    at_odds = yaml_file(
        tmp_path / "at-odds",
        "hf-model: m\nprompts: p.jsonl\nobjective: drpo\nppo-clip-high: 0.3\n",
    )
    for again in ([], ["--objective", "drpo"]):  # no other objective: the file's own mistake
        with pytest.raises(ConfigError, match="--ppo-clip-high 0.3: is read by"):
            parse(["--config", at_odds, *again])
    with pytest.raises(ConfigError, match="--drpo-delta 0.5: is read by --objective drpo only"):
        parse([*flags, "--drpo-delta", "0.5"])  # here it is meant


def test_paths_of_a_yaml_file_are_relative_to_the_current_directory(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "hf-model: sub/model\nprompts: p.jsonl\n")
    assert parse(["--config", file])[0].model.hf_model == "sub/model"


def test_unknown_flags_are_all_named_with_the_closest_known_one() -> None:
    lines = refused(*NEEDED, "--tran-iters", "3", "--drpo-detla=1", "--qqqqqq")
    assert len(lines) == 3
    assert "--tran-iters" in lines[0] and "did you mean --train-iters?" in lines[0]
    assert "--drpo-detla" in lines[1] and "did you mean --drpo-delta?" in lines[1]
    assert "--qqqqqq" in lines[2] and "did you mean" not in lines[2]


@pytest.mark.parametrize("flag", ["--train-it", "--no-lr", "--tensor-model-parallel", "--model.lr"])
def test_flags_are_known_by_their_whole_name_only(flag: str) -> None:
    assert flag in refused(*NEEDED, flag, "3")[0]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--lr", "fast"], ["--lr", "'fast'"]),
        (["--train-iters", "3.5"], ["--train-iters", "'3.5'"]),
        (["--device", "gpu"], ["--device", "'gpu'", "'cuda'"]),
        (["--seed"], ["--seed"]),
        (["--config"], ["--config"]),
        (["stray"], ["stray"]),
        (["--bf16", "yes"], ["yes"]),
        (["-x"], ["-x"]),
    ],
)
def test_wrong_values_name_flag_and_value_without_a_box(argv: list[str], names: list[str]) -> None:
    (line,) = refused(*NEEDED, *argv)
    assert all(name in line for name in names)
    assert line.isascii() and "  " not in line


def test_problems_of_all_groups_come_at_once() -> None:
    lines = refused("--lr", "0", "--rollout-top-p", "3", "--train-iters", "0")
    for flag in ("--hf-model", "--lr 0", "--rollout-top-p 3", "--train-iters 0"):
        assert any(line.startswith(flag) for line in lines), flag
    lines = refused()
    assert lines[0].startswith("--hf-model") and lines[1].startswith("--prompts")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr: 1\ntrain-itres: 3\n", [":2: train-itres:", "did you mean train-iters?"]),
        ("lr: 1\nseed: 1\nlr: 2\n", [":3: lr:", "line 1"]),
        ("learning_rate: 1\nlr: [1, 2]\n", [":1: learning_rate:", ":2: lr:"]),
        ("lr:\n  peak: 1\n", [":1: lr:", "one value"]),
        ("bf16: yes please\n", [":1: bf16:", "true or false"]),
        ("dry-run: true\n", [":1: dry-run:", "unknown key"]),
        ("lr: fast\n", ["--lr", "'fast'", "run.yaml:1"]),
        ("seed: 2\ntrain-iters: 0\n", ["--train-iters 0", "run.yaml:2"]),
        ("- lr\n", ["run.yaml:", "flag: value"]),
        ("", ["run.yaml:", "flag: value"]),
        ("lr: [1\n", ["run.yaml:2", "not YAML"]),
    ],
)
def test_yaml_mistakes_name_file_line_and_key(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = "\n".join(refused(*NEEDED, "--config", yaml_file(tmp_path, text)))
    assert all(part in message for part in ["run.yaml", *parts]), message


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused("--config", str(tmp_path / "nowhere.yaml"))[0]


def test_flags_without_effect_are_refused(tmp_path: Path) -> None:
    assert "--eval-prompts" in refused(*NEEDED, "--eval-interval", "3")[0]
    lines = refused("--hf-model", "m", "--rollouts-file", "r.jsonl", "--shuffle-prompts")
    assert len(lines) == 1 and lines[0].startswith("--shuffle-prompts")
    recorded = ["--hf-model", "m", "--rollouts-file", "r.jsonl"]
    idle = ["--rollout-max-slots", "9", "--rollout-stop-ids", "3", "--apply-chat-template"]
    lines = refused(*recorded, *idle, "--max-engine-gap", "0.1")
    assert len(lines) == 4 and all("--rollouts-file" in line for line in lines)
    parse([*recorded, *idle, "--eval-prompts", "e.jsonl"])  # evaluation does generate
    # A recipe's keys may be left idle by the command line, since they cannot be taken back.
    file = yaml_file(tmp_path, "eval-prompts: e.jsonl\neval-interval: 3\n")
    config, _ = parse([*NEEDED, "--config", file, "--eval-prompts", "None"])
    assert config.data.eval_prompts is None


def test_engines_take_what_is_theirs() -> None:
    vllm = [*NEEDED, "--rollout-engine", "vllm"]
    served = [*vllm, "--rollout-servers", "http://h:8000", "--weight-sync", "disk"]
    parse(served)
    both = "\n".join(refused(*vllm))
    assert "--rollout-servers" in both and "--weight-sync none" in both
    for wrong, named in (
        (["--rollout-top-p", "0.9"], "kept ids"),
        (["--rollout-exact", "on"], "--rollout-exact"),
        (["--weight-sync-port", "1"], "--weight-sync-port"),
        (["--rollout-servers", "h:8000"], "--rollout-servers h:8000"),
        (["--rollout-lag", "1", "--environment", "m:E"], "--rollout-lag 1"),
    ):
        (line,) = refused(*served, *wrong)
        assert named in line
    for wrong in (
        ["--rollout-servers", "http://h:8000"],
        ["--rollout-lag", "1"],
        ["--rollout-server-retries", "1"],
        ["--weight-sync", "disk"],
        ["--rollout-extra-prompts", "1"],
        ["--environment-max-turns", "2"],
    ):
        (line,) = refused(*NEEDED, *wrong)
        assert line.startswith(wrong[0])
    (line,) = refused(*NEEDED, "--rollout-top-k", "5", "--rollout-topk", "3")
    assert "--rollout-topk 3" in line
    parse([*NEEDED, "--rollout-top-k", "5"])


def test_help_groups_flags_and_explains_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "rollout options" in text and "--rollout-top-p FLOAT" in text
    assert "Nucleus sampling; 1 is off. (default: 1.0)" in text
    assert "--bf16, --no-bf16" in text


def test_help_comes_from_rank_0_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr().out == ""


def test_a_users_error_is_printed_line_by_line_and_gives_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise DataError("p.jsonl:3: malformed\np.jsonl:5: empty")

    assert cli.exit_status(fail) == 2
    assert capsys.readouterr().err == "error: p.jsonl:3: malformed\nerror: p.jsonl:5: empty\n"


@pytest.mark.parametrize(("rank", "said"), [("0", "error: interrupted\n"), ("1", "")])
def test_ctrl_c_ends_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str, said: str
) -> None:
    monkeypatch.setenv("RANK", rank)

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert cli.exit_status(interrupted) == 130
    assert capsys.readouterr().err == said


def test_a_full_disk_is_the_users_and_other_failures_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_with(number: int) -> None:
        def run(config: Config, inputs: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("megatron_drpo.train.run", run)

    monkeypatch.setattr("megatron_drpo.preflight.preflight", lambda *args: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    argv = [*NEEDED, "--output-dir", "runs/mine"]
    fails_with(errno.ENOSPC)
    assert cli.exit_status(lambda: cli.start(argv)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --output-dir runs/mine: No space left on device; ")
    fails_with(errno.ECONNRESET)  # of another rank that is gone
    with pytest.raises(ConnectionResetError):
        cli.exit_status(lambda: cli.start(argv))


def test_a_rank_other_than_0_speaks_only_after_waiting_for_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", waits.append)

    def fail() -> None:
        raise ConfigError("--lr: wrong here")

    assert cli.exit_status(fail) == 2
    assert waits == [11.0]
    assert capsys.readouterr().err == "error on rank 5: --lr: wrong here\n"


def test_a_run_without_torchrun_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 4 -m megatron_drpo"):
        cli.start(
            [*NEEDED, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
        )


@pytest.mark.parametrize(("world_size", "expected"), [("1", []), ("2", [2.0])])
def test_a_defect_keeps_its_traceback_and_may_be_the_echo_of_another_rank(
    monkeypatch: pytest.MonkeyPatch, world_size: str, expected: list[float]
) -> None:
    waits: list[float] = []
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(cli.time, "sleep", waits.append)

    def fail() -> None:
        raise KeyError("defect")

    with pytest.raises(KeyError):
        cli.exit_status(fail)
    assert waits == expected


def test_a_mistyped_flag_is_answered_without_importing_torch() -> None:
    code = (
        "import sys; from megatron_drpo import cli; sys.argv[1:] = ['--lr', 'x']; "
        "status = cli.main(); print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, "RANK": "0"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert done.stderr.startswith("error: --lr")
