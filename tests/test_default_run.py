"""The job of `make train` at a third of its length: it learns, and what it exports is what it says.

Slow: it makes the base model (a minute) and trains for another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_the_cpu_recipe_raises_held_out_accuracy(tmp_path: Path) -> None:
    flags = ["--train-iters", "12", "--eval-interval", "6", "--output-dir", "run"]
    flags += ["--eval-temperature", "0", "--eval-samples-per-prompt", "1"]
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "train_drpo_gpt.sh"), *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    steps = [line for line in lines if "reward/mean" in line]
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"] + 0.3
    accuracy = [line["eval/avg"] for line in lines if "eval/avg" in line]
    assert accuracy[-1] > max(accuracy[0], 0.9)
    assert _accuracy_of_transformers(tmp_path) == pytest.approx(accuracy[-1], abs=1 / 256)


def _accuracy_of_transformers(directory: Path) -> float:
    """Greedy held-out accuracy of the exported model by `generate`, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory / "run/hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "run/hf")
    right = []
    for line in (directory / "build/base-model/eval_prompts.jsonl").open():
        problem = json.loads(line)
        prompt = tokenizer(problem["prompt"], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]
        response = tokenizer.decode(ids[prompt.input_ids.shape[1] :], skip_special_tokens=True)
        right.append(response.endswith(f"\\boxed{{{problem['answer']}}}"))
    return sum(right) / len(right)
