"""The doctor, end to end: what it says of this machine and of a plan, and when it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo import doctor, installation
from megatron_drpo.installation import Finding
from tests.published_configs import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
MODEL = "Qwen3-30B-A3B"
H100 = ["--device-memory-gib", "80", "--peak-tflops", "989", "--bf16"]
FITS = ["--world-size", "64", "--expert-model-parallel-size", "8", *H100]


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """Flags that name a directory with nothing in it but config.json."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[MODEL][0]))
    return ["--hf-model", str(tmp_path)]


def test_a_plan_needs_config_json_alone(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([*model, *FITS]) == 0
    text = capsys.readouterr().out
    assert "30,532,122,624 parameters, 3,353,032,704 of them active" in text
    assert "64 rank(s) = TP 1 x PP 1 x DP 64, EP 8" in text
    assert "EP 8: 16 of 128 experts on each rank, held by 8 rank(s)" in text
    for word in ("all-to-all EP", "reduce-scatter EDP", "tokens/s", "MFU", "GiB", "not run"):
        assert word in text
    # 5,164,972,032 parameters on a rank: 16 experts of each layer and everything else.
    per_expert = 3 * 2048 * 768
    assert f"{30_532_122_624 - (128 - 16) * 48 * per_expert:,}" in text
    file = [model[0], str(Path(model[1]) / "config.json")]
    assert doctor.main([*file, *FITS]) == 0
    assert capsys.readouterr().out == text


def test_what_does_not_fit_is_refused_with_what_does(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([*model, "--world-size", "4", *H100]) == 2
    error = capsys.readouterr().err
    found = re.search(r"stage 0 takes ([\d.]+) GiB", error)
    assert found and float(found[1]) > 200 and "--device-memory-gib 80" in error
    assert "no layout of so many ranks does" in error
    assert doctor.main([*model, "--world-size", "64", *H100]) == 2
    error = capsys.readouterr().err
    near = re.search(r"the nearest that fit: (.*?) \(", error)
    assert near
    argv = [*model, "--world-size", "64", *H100, *near[1].split()]
    assert doctor.main(argv) == 0


def test_what_is_impossible_is_refused(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*model, "--world-size", "64", "--expert-model-parallel-size", "5"]
    assert doctor.main(argv) == 2
    error = capsys.readouterr().err
    assert "num_experts 128" in error and "nearest possible layouts of 64 ranks" in error
    assert doctor.main([*model, "--world-size", "64", "--fp8-format", "e4m3", "--no-bf16"]) == 2
    assert "--bf16" in capsys.readouterr().err
    assert doctor.main([*model, "--world-size", "64", "--worldsize", "3"]) == 2
    assert "--worldsize: unknown flag" in capsys.readouterr().err
    assert doctor.main([*model, "--world-size", "0"]) == 2
    assert "--world-size 0: must be at least 1" in capsys.readouterr().err
    other = Path(model[1]) / "qwen.json"
    other.write_text("{}")
    assert doctor.main(["--hf-model", str(other), "--world-size", "1"]) == 2
    assert "qwen.json" in capsys.readouterr().err
    assert doctor.main([*model, "--world-size", "64", "--suggest"]) == 2
    error = capsys.readouterr().err
    assert "--peak-tflops" in error and "--device-memory-gib" in error


def test_suggestions_fit_and_come_fastest_first(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*model, "--world-size", "32", *H100, "--rollout-prompts-per-step", "256"]
    assert doctor.main([*argv, "--suggest"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith("TP ")]
    rates = [int(row[-1].replace(",", "")) for row in rows]
    assert len(rates) == doctor.NUM_SUGGESTED and rates == sorted(rates, reverse=True)
    sizes = [float(row[-5]) for row in rows]
    assert all(0 < size <= 0.9 * 80 for size in sizes)
    first = text.splitlines()[-1].removeprefix("the first one: ").split()
    assert doctor.main([*argv, *first]) == 0
    plan = capsys.readouterr().out
    assert f"{rates[0]:,} tokens/s" in plan and f"takes {sizes[0]:.1f} of 80.0 GiB" in plan


def test_settings_of_a_file_are_understood(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("bf16: true\nprompts: none.jsonl\nexpert-model-parallel-size: 16\n")
    argv = [*model, "--world-size", "64", "--config", str(file)]
    assert doctor.main(argv) == 0
    assert "EP 16: 8 of 128 experts" in capsys.readouterr().out


def test_the_guide_prints_what_the_tool_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan in full of docs/scaling.md, by the layout that it names itself."""
    config = PUBLISHED[MODEL][0] | {
        **{"num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64},
        **{"moe_intermediate_size": 1536, "intermediate_size": 12288},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    guide = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    batch = re.findall(r"--(?:prompt-length|rollout-\S+|max-tokens-per-microbatch) \d+", guide)
    argv = ["--hf-model", str(tmp_path), "--world-size", "256", *H100, *" ".join(batch).split()]
    argv += ["--pipeline-model-parallel-size", "16", "--context-parallel-size", "8"]
    argv += ["--expert-model-parallel-size", "4", "--decoder-first-pipeline-num-layers", "5"]
    assert doctor.main([*argv, "--decoder-last-pipeline-num-layers", "5"]) == 0
    printed = capsys.readouterr().out
    plan = guide[guide.index("    the layout") :].splitlines()
    assert len(plan) > 40
    assert [line for line in plan if line.removeprefix("    ") not in printed.splitlines()] == []


def test_it_starts_without_megatron_and_tells_a_typing_error_without_torch() -> None:
    code = (
        "import sys; from megatron_drpo import doctor; status = doctor.main({!r}); "
        "print(status, 'torch' in sys.modules, any(m.startswith('megatron.') for m in sys.modules))"
    )
    argv = ["--world-size", "8", "--hf-model", "gone", "--tensor-model-paralel-size", "2"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code.format(argv)], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip() == "2 False False", done.stderr
    assert "did you mean --tensor-model-parallel-size?" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code.format(argv[:4])], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip() == "2 True False", done.stderr
    assert "gone" in done.stderr


# --- The installation ---------------------------------------------------------------------------


def test_this_machine_is_ready() -> None:
    """As the container's health check starts it, from anywhere."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_drpo.doctor"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("ready") and "rror" not in done.stderr
    verdicts = dict(re.findall(r"^  (?:ok|note)  +([\w -]+?)  +(\S.*)$", done.stdout, re.MULTILINE))
    near = r"within (\S+) (?:of fp64|nats of transformers)"
    for what, most in (("kernels", 1e-5), ("training step", 2e-3)):
        (worst,) = re.findall(near, verdicts[what])
        assert 0 < float(worst) < most


def findings(monkeypatch: pytest.MonkeyPatch, require_gpu: bool = False) -> dict[str, Finding]:
    """All but the training step."""
    monkeypatch.setattr(installation, "_training_step", lambda device: "left out")
    return {found.what: found for found in installation.examine(require_gpu)}


def test_what_is_wrong_is_said_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["torch>=99", "no-such-package>=1", 'other>=1; extra == "test"', "safetensors>=0.1"]
    monkeypatch.setattr(installation, "requires", lambda name: wanted)
    found = findings(monkeypatch, require_gpu=True)
    packages, device = found["packages"], found["device"]
    assert packages.verdict == device.verdict == "FAIL"
    assert "torch is" in packages.says and ">=99 is needed" in packages.says
    assert "no-such-package>=1 is not installed" in packages.says
    assert "other" not in packages.says and "safetensors" not in packages.says
    assert "--require-gpu" in device.says and "--gpus all" in device.says
    assert found["kernels"].verdict == "ok"
    assert doctor.main(["--require-gpu"]) == 2
    assert "not ready: 2 of the above failed" in capsys.readouterr().err


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_drpo import vocab_parallel

    right = vocab_parallel.logprobs_and_entropy

    def wrong(logits: Any, *args: Any, **kwargs: Any) -> Any:
        scores = right(logits, *args, **kwargs)
        return scores._replace(logprobs=scores.logprobs * 1.001)

    monkeypatch.setattr(vocab_parallel, "logprobs_and_entropy", wrong)
    found = findings(monkeypatch)["kernels"]
    assert found.verdict == "FAIL" and "away from fp64" in found.says


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hf-model", "m"], "--world-size: is missing, and --hf-model is about"),
        (["--suggest"], "--world-size: is missing, and --suggest is about"),
        (["--require-gpus"], "--require-gpus: unknown flag; did you mean --require-gpu?"),
        (["--world-size", "8", "--hf-model", "m", "--require-gpu"], "--require-gpu: a plan needs"),
    ],
)
def test_a_plan_and_an_examination_are_not_mixed(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(argv) == 2
    assert message in capsys.readouterr().err
