"""The calculator example as its docstring has it: the policy learns to call.

Slow: it makes the base model (a minute) and trains for another. Over two ranks of one replica, so
that the environment's answers travel; the log-probs of all turns are training's, bit for bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_a_policy_learns_to_call_the_calculator(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    maker = [sys.executable, "-m", "examples.calculator.make_model"]
    made = subprocess.run(
        [*maker, str(tmp_path / "build" / "calculator")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert made.returncode == 0, made.stderr
    done = subprocess.run(
        [
            *("bash", str(ROOT / "examples" / "train_drpo_gpt.sh")),
            *("--config", str(ROOT / "examples" / "recipes" / "calculator_cpu.yaml")),
            *("--tensor-model-parallel-size", "2", "--save-rollouts", "--output-dir", "run"),
        ],
        cwd=tmp_path,
        env=environment | {"NPROC_PER_NODE": "2"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    accuracy = [line["eval/avg"] for line in lines if "eval/avg" in line]
    assert accuracy[0] < 0.4 and accuracy[-1] > 0.75
    steps = [line for line in lines if "engine_gap/exact_share" in line]
    assert len(steps) == 15
    assert all(line["engine_gap/exact_share"] == 1 for line in steps)
    _, *last = (tmp_path / "run/rollouts/step-000015.jsonl").read_text().splitlines()
    called = [json.loads(line) for line in last if "calc(" in json.loads(line)["response"]]
    assert len(called) > 0.8 * len(last)
    assert all(False in line["loss_mask"] for line in called if line["reward"] == 1)
