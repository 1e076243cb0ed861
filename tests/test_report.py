"""The report says the numbers of the log, alone in its file, and never runs what a model wrote."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_drpo.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from megatron_drpo.errors import DataError
from megatron_drpo.metrics import MetricsWriter
from megatron_drpo.report import comparison, plots, write_comparison, write_report
from megatron_drpo.report.comparison import CURVES
from megatron_drpo.report.plots import PLOTS
from megatron_drpo.report.run import load
from tools import report

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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures out, which take nearly all of the time, where the text is looked at."""
    monkeypatch.setattr(plots, "PLOTS", ())
    monkeypatch.setattr(comparison, "CURVES", ())


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
    with (run / "metrics.jsonl").open("a") as file:
        # A pause between two starts of a run is no time of it.
        file.write('{"step": 2, "time/evaluate": 3600.0}\n{"step": 4, "time/checkpoint": 103.4}\n')
    (run / "summary.json").write_text(
        json.dumps({"device": "cpu", "layout": "2 ranks: TP 1", "parameters": 9})
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
        "Memory",
    }
    (run / "histograms.jsonl").unlink()
    (run / "metrics.jsonl").write_text('{"entropy/mean": 0.5, "step": 1, "loss": null}\n')
    page = Page(write_report(run).read_text())
    assert page.pictures == ["Entropy"]
    assert "lossnot finite" in page.text


def test_text_from_outside_is_escaped(tmp_path: Path, undrawn):
    run = make_run(tmp_path / "<i>run", hf_model=EVIL)
    (run / "summary.json").write_text(json.dumps({"device": EVIL, EVIL: EVIL}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, EVIL: 1.0}) + "\n")
    sample = {"step": 4, "prompt": EVIL, "response": EVIL, "answer": EVIL, "reward": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = Page(write_report(run).read_text())
    assert page.text.count(EVIL) >= 8  # shown as it is,
    assert {"script", "i"}.isdisjoint(tag for tag, _ in page.tags)  # and never markup


def test_samples_are_the_best_and_the_worst_of_the_last_step(tmp_path: Path, undrawn):
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


def test_a_run_still_going_or_killed_can_be_reported(tmp_path: Path, undrawn):
    run = make_run(tmp_path / "arith", num_steps=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"reward/mean": 0.9')
    text = Page(write_report(run).read_text()).text
    assert "0.375 \u2192 0.375" in text
    assert "2.0 s" in text  # no summary: the time of the logged steps, the layout of the flags
    assert "auto, TP 1, PP 1" in text


def test_rewards_that_are_no_shares_are_not_called_accuracy(tmp_path: Path, undrawn):
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


def rows(html: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell: the text of the others."""
    found = {}
    for line in re.findall(r"<tr>(.*?)</tr>", html):
        first, *cells = (Page(cell).text for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", line))
        found[first] = cells
    return found


def test_several_runs_side_by_side(tmp_path: Path):
    one = make_run(tmp_path / "first" / "arith")
    two = make_run(tmp_path / "<b>second" / "arith", num_steps=6, hf_model=EVIL)
    short = make_run(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    del config["train_iters"]  # of a version that did not have it
    config |= {"output_dir": "elsewhere", "objective": "ppo"}
    (short / "config.json").write_text(json.dumps(config))
    (short / "metrics.jsonl").write_text(
        '{"reward/mean": 0.25, "step": 1, "time/step": 3.0}\n'
        '{"reward/mean": 0.5, "step": 2, "lr": 0.125, "time/step": null}\n'
    )
    out = write_comparison([one, two, short], tmp_path / "page.html")
    html = out.read_text()
    page, table = Page(html), rows(html)

    assert "3 runs comparedfirst/arith, <b>second/arith, short" in page.text
    assert table[""] == ["first/arith", "<b>second/arith", "short"]
    assert table["Held-out accuracy"][1:] == [
        "31.2 % \u2192 78.5 %avg@8, +47.3 points",
        "\u2013",
    ]
    assert table["Reward"] == [
        "0.375 \u2192 0.75step 1 to step 4",
        "0.375 \u2192 1step 1 to step 6",
        "0.25 \u2192 0.5step 1 to step 2",
    ]
    assert table["Wall time"] == ["20.0 s", "42.0 s", "3.0 s"]
    differing = {name: cells for name, cells in table.items() if name.startswith("--")}
    assert differing == {
        "--hf-model": ["models/base", EVIL, "models/base"],
        "--train-iters": ["4", "6", "\u2013"],
        "--objective": ["drpo", "drpo", "ppo"],
    }
    assert table["lr"] == ["1e-06", "1e-06", "0.125"]
    assert table["entropy/mean"] == ["0.25", "0.1667", "\u2013"]
    assert not re.search(r"https?://(?!evil)|@import|url\(", html)
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in page.tags}
    assert page.pictures[:4] == [
        "Held-out reward",
        "Held-out reward by time",
        "Reward",
        "Gradient weight",
    ]
    assert "Effective sample size" not in page.pictures  # none of them logged it


def test_curves_are_those_of_each_run(tmp_path: Path):
    runs = [load(make_run(tmp_path / name, num_steps=n)) for name, n in (("a", 4), ("b", 6))]
    curves = {curve.title: curve for curve in CURVES}

    def lines(title: str) -> list[tuple[list[float], list[float], str]]:
        (ax,) = curves[title].draw(runs).axes
        return [(list(x.get_xdata()), list(x.get_ydata()), x.get_color()) for x in ax.lines]

    (one, two) = lines("Reward")
    assert one[:2] == ([1, 2, 3, 4], [0.375, 0.5, 0.625, 0.75])
    assert two[:2] == ([1, 2, 3, 4, 5, 6], [0.375, 0.5, 0.625, 0.75, 0.875, 1.0])
    assert one[2] != two[2]
    # Steps take 2, 4, 6 and 8 s; evaluated before the first, and after two and four.
    assert lines("Held-out reward by time")[0][0] == pytest.approx([0, 6 / 60, 20 / 60])
    (ax,) = curves["Gradient weight"].draw(runs).axes
    assert len(ax.collections) == 2
    assert ax.collections[0].get_datalim(ax.transData).bounds == pytest.approx((1, 0.95, 3, 0.1))


def test_runs_that_are_alike_and_one_that_is_given_twice(tmp_path: Path, undrawn):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    html = write_comparison([one, two], tmp_path / "page.html").read_text()
    assert "All flags are the same." in html
    with pytest.raises(DataError, match=re.escape(f"{one}: given twice")):
        write_comparison([one, two, tmp_path / "two" / ".." / "one"], tmp_path / "page.html")


def test_command_line(tmp_path: Path, capsys, monkeypatch, undrawn):
    run = make_run(tmp_path / "arith", num_steps=2)
    other = make_run(tmp_path / "other", num_steps=2)
    monkeypatch.chdir(tmp_path)

    def main(*arguments: Path | str) -> tuple[int, str, str]:
        status = report.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    assert main(run) == (0, f"{run / 'report.html'}\n", "")
    assert main(run, "--out", "one.html") == (0, "one.html\n", "")
    assert Path("one.html").read_text() == (run / "report.html").read_text()
    assert main(run, other) == (0, "comparison.html\n", "")
    assert main(run, other, "--out", tmp_path / "two.html") == (0, f"{tmp_path / 'two.html'}\n", "")
    assert Path("two.html").read_text() == Path("comparison.html").read_text()

    status, out, err = main(run, tmp_path / "nowhere")
    assert (status, out) == (2, "") and str(tmp_path / "nowhere" / "metrics.jsonl") in err
    status, out, err = main(run, "--out", "no/such/folder/page.html")
    assert (status, out) == (2, "") and "no/such/folder/page.html: No such file" in err
