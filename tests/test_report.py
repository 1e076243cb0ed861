"""The report says the numbers of the log, alone in its file, and never runs what a model wrote."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_drpo.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from megatron_drpo.errors import DataError
from megatron_drpo.metrics import MetricsWriter
from megatron_drpo.report import PLOTS, write_report

EVIL = '<script src="http://evil.example/x.js">alert("&")</script>'


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside the style sheet."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style:
            self.text += data

    @property
    def pictures(self) -> list[str]:
        return [a["alt"] or "" for tag, a in self.tags if tag == "img"]


def make_run(path: Path, num_steps: int = 4, hf_model: str = "models/base") -> Path:
    config = Config(
        model=ModelConfig(hf_model=hf_model),
        data=DataConfig(prompts="train.jsonl"),
        eval=EvalConfig(eval_samples_per_prompt=8),
        train=TrainConfig(train_iters=num_steps),
    )
    with MetricsWriter(path, resume_step=None) as writer:
        writer.write(0, {"eval/avg": 0.312, "eval/pass": 0.6})
        for step in range(1, num_steps + 1):
            scalars = {
                "reward/mean": 0.25 + 0.125 * step,
                "weight/mean": 1.0,
                "weight/p50": 1.0,
                "weight/p01": 0.95,
                "weight/p99": 1.05,
                "ratio/max": 1.5,
                "engine_gap/mean_abs": 0.0,
                "engine_gap/max_abs": 0.0,
                "entropy/mean": 1.0 / step,
                "response_length/mean": 7.0,
                "finish/length_share": 0.0,
                "grad_norm": float("nan") if step == 2 else 0.5,
                "lr": 1e-6,
                "time/generate": 1.0,
                "time/train": 2.0,
                "time/step": 2.0 * step,
                "tokens_per_second": 600.0 / step,
            }
            weight = torch.ones(9) if step == 1 else torch.linspace(0.9, 1.1, 99)
            writer.write(step, scalars, {"weight": weight})
        writer.write(num_steps // 2, {"eval/avg": 0.805, "eval/pass": 0.9})
        writer.write(num_steps, {"eval/avg": 0.785, "eval/pass": 0.9})
    (path / "config.json").write_text(json.dumps(config.flat()))
    return path


def test_the_report_stands_alone_and_says_the_numbers(tmp_path: Path):
    run = make_run(tmp_path / "arith")
    (run / "summary.json").write_text(
        json.dumps(
            {"device": "cpu", "layout": "2 ranks: TP 1", "wall_seconds": 3723.4, "parameters": 9}
        )
    )
    path = write_report(run)
    html = path.read_text()
    page = Page(html)

    assert path == run / "report.html"
    assert not re.search(r"https?://|@import|url\(", html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html):
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert picture.width > 600 and len(picture.convert("L").getcolors()) > 3

    for fact in (
        "31.2 % \u2192 78.5 %",
        "avg@8, +47.3 points",
        "80.5 %at step 2",
        "0.375 \u2192 0.75",
        "4of 4",
        "1 h 02 min",
        # 600 + 300 + 200 + 150 tokens per second over 2 + 4 + 6 + 8 s: 4800 tokens in 20 s
        "Tokens per second240",
        "cpu, 2 ranks: TP 1",
        "--eval-samples-per-prompt8",
        "models/base",
        "parameters9",
    ):
        assert fact in page.text, fact


def test_only_logged_series_are_drawn(tmp_path: Path):
    run = make_run(tmp_path / "arith")
    drawn = Page(write_report(run).read_text()).pictures
    assert drawn[:4] == [
        "Reward",
        "Held-out accuracy",
        "Gradient weight",
        "Gradient weight, distribution",
    ]
    assert {p.title for p in PLOTS} - set(drawn) == {
        "Importance ratio, distribution",
        "Divergence from the behaviour policy",
        "Divergence by probability of the token",
        "Drift within a step",
        "What the objective does",
        "Entropy, distribution",
        "Response length, distribution",
    }
    (run / "histograms.jsonl").unlink()
    (run / "metrics.jsonl").write_text('{"entropy/mean": 0.5, "step": 1, "loss": null}\n')
    page = Page(write_report(run).read_text())
    assert page.pictures == ["Entropy"]
    assert "lossnot finite" in page.text


def test_text_from_outside_is_escaped(tmp_path: Path):
    run = make_run(tmp_path / "<i>run", hf_model=EVIL)
    (run / "summary.json").write_text(json.dumps({"device": EVIL, EVIL: EVIL}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, EVIL: 1.0}) + "\n")
    sample = {"step": 4, "prompt": EVIL, "response": EVIL, "answer": EVIL, "reward": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = Page(write_report(run).read_text())
    assert page.text.count(EVIL) >= 8  # shown as it is,
    assert {"script", "i"}.isdisjoint(tag for tag, _ in page.tags)  # and never markup


def test_samples_are_the_best_and_the_worst_of_the_last_step(tmp_path: Path):
    run = make_run(tmp_path / "arith")
    samples = [(1, "old", 9.0)] + [(4, f"response-{i}", float(i)) for i in range(10)]
    lines = [
        {"step": step, "prompt": f"p{text}", "response": text, "answer": None, "reward": reward}
        for step, text, reward in samples
    ]
    lines.append({**lines[-1], "response": "the same prompt again", "reward": 8.5})
    lines.append({**lines[-1], "prompt": "long", "response": "x" * 5000, "reward": -1.0})
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(write_report(run).read_text()).text
    shown = re.findall(r"(Best|Worst): reward ([-\d.]+)", text)
    assert shown == [
        ("Best", "9"),
        ("Best", "8"),
        ("Best", "7"),
        ("Worst", "-1"),
        ("Worst", "0"),
        ("Worst", "1"),
    ]
    assert "3500 more characters" in text


def test_a_run_still_going_or_killed_can_be_reported(tmp_path: Path):
    run = make_run(tmp_path / "arith", num_steps=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"reward/mean": 0.9')
    text = Page(write_report(run).read_text()).text
    assert "0.375 \u2192 0.375" in text
    assert "2.0 s" in text  # no summary: the time of the logged steps, the layout of the flags
    assert "auto, TP 1, PP 1" in text


def test_rewards_that_are_no_shares_are_not_called_accuracy(tmp_path: Path):
    run = make_run(tmp_path / "arith")
    (run / "metrics.jsonl").write_text(
        '{"eval/avg": -0.5, "step": 0}\n{"eval/avg": 1.25, "step": 3}\n'
    )
    text = Page(write_report(run).read_text()).text
    assert "Held-out reward-0.5 \u2192 1.25avg@8, +1.75" in text
    assert "%" not in text


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_a_directory_without_metrics_is_refused(tmp_path: Path, content: str | None):
    run = make_run(tmp_path / "arith")
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=re.escape(str(run / "metrics.jsonl"))):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_damaged_configuration_is_named(tmp_path: Path, content: str | None):
    run = make_run(tmp_path / "arith")
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(str(run / "config.json"))):
        write_report(run)


def test_command_line(tmp_path: Path, monkeypatch, capsys):
    run = make_run(tmp_path / "arith", num_steps=2)
    tool = Path(__file__).parents[1] / "tools" / "report.py"

    def main(argument: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", str(argument)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(tool), run_name="__main__")
        return end.value.code

    assert main(run) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main(tmp_path / "nowhere") == 2
    assert str(tmp_path / "nowhere" / "metrics.jsonl") in capsys.readouterr().err
