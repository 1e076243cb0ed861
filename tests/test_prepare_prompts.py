r"""tools/prepare_prompts.py: data sets as they lie on people's disks, and what is made of them.

Lines have the fields of the published files. What the reward makes of the results was measured on
the real GSM8K and MATH-500 (docs/data.md).
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro

from megatron_drpo.prompts import read_prompts
from megatron_drpo.rewards import RewardRequest, load_reward
from tests.test_prompts import TEMPLATE, make_tokenizer
from tools import prepare_prompts

DAPO = prepare_prompts.INSTRUCTIONS["dapo"]


def write(path: Path, rows: Sequence[object]) -> str:
    """JSONL; an array where the name ends in .json, Parquet where it ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(tmp_path: Path, dataset: str, *inputs: str, more: Sequence[str] = ()) -> list[Any]:
    out = tmp_path / "out" / "prompts.jsonl"
    argv = [dataset, "--inputs", *inputs, "--out", str(out), *more]
    assert prepare_prompts.main(argv) == 0
    return read(out)


def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, dataset: str, *argv: str
) -> list[str]:
    """The lines of the error; nothing may have been written."""
    out = tmp_path / "refused.jsonl"
    assert prepare_prompts.main([dataset, "--out", str(out), *argv]) == 2
    assert not out.exists()
    return capsys.readouterr().err.splitlines()


def gsm8k(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": f"It is <<1+1=2>>2, #### no.\n#### {answer}"}


def dapo(problem: str, answer: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO.replace("{problem}", problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }


# --- The data sets --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_gsm8k(tmp_path: Path, suffix: str) -> None:
    rows = [gsm8k("How many \u00e9clairs?", "1,250"), gsm8k("And now?", "-3"), gsm8k("Cost?", "$7")]
    lines = prepare(tmp_path, "gsm8k", write(tmp_path / f"train{suffix}", rows))
    assert [line["answer"] for line in lines] == ["1250", "-3", "7"]
    assert [line["source"] for line in lines] == [f"train{suffix}:{n}" for n in (1, 2, 3)]
    assert lines[0]["problem"] == "How many \u00e9clairs?"
    (message,) = lines[0]["prompt"]
    assert message["role"] == "user" and "\\boxed{}" in message["content"]
    assert message["content"].startswith("How many \u00e9clairs?\n")
    assert len({line["id"] for line in lines}) == 3


def test_math_as_its_authors_and_as_math_500_have_it(tmp_path: Path) -> None:
    root = tmp_path / "MATH" / "train"
    solution = "First $\\boxed{1}$, then $x = \\boxed{\\frac{1}{2} \\text{ of } \\{a\\}}$."
    problem = {"problem": "Half?", "level": "Level 5", "type": "Algebra", "solution": solution}
    (root / "algebra").mkdir(parents=True)
    (root / "algebra" / "7.json").write_text(json.dumps(problem))
    other = problem | {"problem": "Two?", "solution": "So \\fbox{2}."}
    (root / "algebra" / "8.json").write_text(json.dumps(other))
    subject = {"problem": "1+1?", "solution": "It is \\boxed{9}.", "answer": "2", "level": 3}
    file = write(tmp_path / "test.jsonl", [subject | {"subject": "Prealgebra"}])
    half, two, last = prepare(tmp_path, "math", str(root), file)
    assert half["answer"] == "\\frac{1}{2} \\text{ of } \\{a\\}"
    assert (half["source"], half["level"], half["subject"]) == (
        *("algebra/7.json:1", "Level 5"),
        "Algebra",
    )
    assert two["answer"] == "2"
    assert (last["answer"], last["level"], last["subject"]) == ("2", 3, "Prealgebra")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed {5}", "5"),
        ("is $\\boxed 5$.", "5"),
        ("is $\\boxed5.$", "5"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("\\boxed{1", None),
        ("$\\boxed{1}$, no: $\\boxed\\frac{1}{2}$", None),
        ("$\\boxed{1}$, no: $\\boxed \\pi$", None),
        ("\\boxed{1} \\boxedness", "1"),
        ("no box {1}", None),
        ("", None),
    ],
)
def test_the_last_box_of_a_solution(solution: str, answer: str | None) -> None:
    assert prepare_prompts.boxed(solution) == answer


def test_dapo_in_its_own_words_and_bare_is_one_problem(tmp_path: Path) -> None:
    published = write(tmp_path / "dapo-math-17k.parquet", [dapo("Find $x$.", "34")] * 3)
    processed = write(tmp_path / "processed.jsonl", [{"prompt": " Find  $x$.", "solution": "34"}])
    rewritten = {"problem": "Find $y$.", "reward_model": {"ground_truth": ["5"]}}
    other = write(tmp_path / "other.jsonl", [rewritten])
    lines = prepare(tmp_path, "dapo", published, processed, other)
    assert [(line["problem"], line["answer"]) for line in lines] == [
        ("Find $x$.", "34"),
        ("Find $y$.", "5"),
    ]
    # With the instruction of that name the published words come back.
    argv = ["--template", "raw", "--instruction", "dapo"]
    assert prepare(tmp_path, "dapo", published, more=argv)[0]["prompt"] == DAPO.replace(
        "{problem}", "Find $x$."
    )


def test_aime_of_many_uploaders(tmp_path: Path) -> None:
    hub = {"id": 60, "problem": "A?", "solution": "...", "answer": "033", "year": "2024"}
    capital = {"ID": "2024-II-4", "Problem": "B?", "Solution": "...", "Answer": 0}
    question = {"question": "C?", "answer": 70.0}
    lines = prepare(
        tmp_path,
        "aime",
        write(tmp_path / "a.parquet", [hub]),
        write(tmp_path / "b.jsonl", [capital, question]),
        write(tmp_path / "c.json", [dapo("D?", "999")]),
    )
    assert [(line["problem"], line["answer"]) for line in lines] == [
        *(("A?", "33"), ("B?", "0")),
        *(("C?", "70"), ("D?", "999")),
    ]


# --- Prompts --------------------------------------------------------------------------------------


def test_training_reads_what_is_written(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", [gsm8k("abc", "3"), gsm8k("xyz", "4")])
    out = tmp_path / "out" / "prompts.jsonl"
    options = {"apply_chat_template": False, "max_prompt_length": 100, "context_flag": ""}
    tokenizer = make_tokenizer(template=TEMPLATE)
    prepare(tmp_path, "gsm8k", file, more=["--instruction", "{problem}=", "--system", "be"])
    first, second = read_prompts(out, tokenizer, **options)
    assert first.text == "[system]be</s>[user]abc=</s>[assistant]"
    assert (first.answer, first.metadata["problem"]) == ("3", "abc")
    chat_ids = [first.id, second.id]
    raw = ["--instruction", "none", "--template", "raw"]
    prepare(tmp_path, "gsm8k", file, more=raw)
    first, second = read_prompts(out, tokenizer, **options)
    assert (first.text, second.text) == ("abc", "xyz")
    assert [first.id, second.id] == chat_ids, "the problem decides, not its words or template"
    reward = load_reward("math")
    for response, worth in (("so \\boxed{3}", 1.0), ("so \\boxed{4}", 0.0)):
        request = RewardRequest(first.text, response, first.answer, "stop", first.metadata)
        assert reward(request) == worth


def test_repeated_problems_are_written_once_and_contradictory_ones_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [gsm8k("A  b?", "1"), gsm8k("C?", "2"), gsm8k("a b?", "1"), gsm8k("C?", "3")]
    rows += [gsm8k("C?", "2"), gsm8k("x - 1?", "5"), gsm8k("x + 1?", "6")]
    lines = prepare(tmp_path, "gsm8k", write(tmp_path / "t.jsonl", rows))
    assert [line["problem"] for line in lines] == ["A  b?", "x - 1?", "x + 1?"]
    told = capsys.readouterr().out
    assert "7 lines, 3 of them repeat an earlier one" in told
    assert "1 with two different answers left out: t.jsonl:4" in told
    assert "prompts.jsonl: 3 prompts" in told


def test_what_is_evaluated_on_is_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [dapo("Let $x = 1$. Find it.", "1"), dapo("Other?", "2"), dapo("Third?", "3")]
    file = write(tmp_path / "train.jsonl", train)
    # Set differently, in the data set's own file, and one prepared by the tool.
    aime = write(tmp_path / "aime.jsonl", [{"problem": "Let \\(x=1\\).  Find it.", "answer": "1"}])
    prepare(tmp_path, "aime", write(tmp_path / "b.jsonl", [{"problem": "third?", "answer": "3"}]))
    held = tmp_path / "held.jsonl"
    (tmp_path / "out" / "prompts.jsonl").rename(held)
    capsys.readouterr()
    lines = prepare(tmp_path, "dapo", file, more=["--exclude", aime, str(held)])
    assert [line["problem"] for line in lines] == ["Other?"]
    assert "2 of --exclude left out: train.jsonl:1, train.jsonl:3" in capsys.readouterr().out


FORMULA = (
    "Let $f\\left(x\\right) = \\dfrac{x}{2}$,\\\\and \\begin{align*}y&=1.\\end{align*} Get $y$."
)


@pytest.mark.parametrize(
    ("copy", "left_out"),
    [
        ("Let \\(f(x)=\\frac x2\\), and \\[ y = 1. \\] Get \\( y \\).", True),
        ("let f(x) = x/2, and y = 1. get y", True),
        (FORMULA.replace("and", "or"), False),
        (FORMULA.replace("{2}", "{3}"), False),
    ],
)
def test_commands_of_latex_do_not_hide_a_copy(tmp_path: Path, copy: str, left_out: bool) -> None:
    file = write(tmp_path / "t.jsonl", [dapo(copy, "1"), dapo("Other?", "2")])
    excluded = write(tmp_path / "e.jsonl", [{"problem": FORMULA}])
    lines = prepare(tmp_path, "dapo", file, more=["--exclude", excluded])
    assert [line["problem"] for line in lines] == ["Other?"] if left_out else [copy, "Other?"]


def test_problems_of_commands_alone_are_not_all_alike(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [dapo("$\\alpha$", "1"), dapo("$\\beta$?", "2")])
    excluded = write(tmp_path / "e.jsonl", [{"problem": "$ \\alpha $"}])
    (line,) = prepare(tmp_path, "dapo", file, more=["--exclude", excluded])
    assert line["problem"] == "$\\beta$?"


def test_the_guides_commands_are_understood() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    lines = re.sub(r" *\\\n *", " ", guide).splitlines()
    found = [
        line.partition("prepare_prompts.py ")[2] for line in lines if line[:10] == "    python"
    ]
    named = set()
    for text in filter(None, found):
        settings = tyro.cli(prepare_prompts.Prepare, args=shlex.split(text))
        assert "{problem}" in settings.wording
        named.add(settings.dataset)
    assert named == {"gsm8k", "math", "dapo", "aime"}


def test_a_held_out_part_does_not_depend_on_order(tmp_path: Path) -> None:
    rows = [gsm8k(f"Question {n}?", str(n)) for n in range(40)]
    held = tmp_path / "held.jsonl"

    def split(rows: list[dict[str, str]], seed: str = "1") -> tuple[list[str], list[str]]:
        file = write(tmp_path / "t.jsonl", rows)
        more = ["--holdout", "10", "--eval-out", str(held), "--seed", seed]
        left = prepare(tmp_path, "gsm8k", file, more=more)
        return [line["problem"] for line in left], [line["problem"] for line in read(held)]

    left, kept = split(rows)
    assert len(kept) == 10 and len(left) == 30
    assert sorted(left + kept) == sorted(row["question"] for row in rows)
    assert left == [row["question"] for row in rows if row["question"] not in kept], "file order"
    assert set(split(rows[::-1])[1]) == set(kept)
    assert len(set(split([*rows, gsm8k("One more?", "1")])[1]) - set(kept)) <= 1
    assert set(split(rows, seed="2")[1]) != set(kept)


def test_no_near_copy_of_a_held_out_problem_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two problems, each in four settings: whichever is held out, its others are not trained on."""
    settings = (
        "What is $\\frac{%d}{2}$?",
        "What is $\\dfrac %d2$?",
        "What is %d/2?",
        "what is %d / 2",
    )
    rows = [gsm8k(text % number, "1") for number in (3, 5) for text in settings]
    file, held = write(tmp_path / "t.jsonl", rows), tmp_path / "held.jsonl"
    more = ["--holdout", "1", "--eval-out", str(held)]
    lines = prepare(tmp_path, "gsm8k", file, more=more)
    (out,) = read(held)
    other = "5" if "3" in out["problem"] else "3"
    assert len(lines) == 4 and all(other in line["problem"] for line in lines)
    alike = [n for n, row in enumerate(rows, 1) if other not in row["question"]]
    alike = [f"t.jsonl:{n}" for n in alike if f"t.jsonl:{n}" != out["source"]]
    assert f"3 like a held-out one left out: {', '.join(alike)}" in capsys.readouterr().out
    # Where only copies would be left, there is nothing to train on.
    file = write(tmp_path / "t.jsonl", rows[:4])
    held.unlink()
    (line,) = refused(capsys, tmp_path, "gsm8k", "--inputs", file, *more)
    assert "--holdout 1: 4 problems are left of --inputs, 3 of them like a held-out one" in line
    assert not held.exists()


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "row", "told"),
    [
        ("gsm8k", {"problem": "A?", "answer": "2\n#### 2"}, "`question` must hold it"),
        ("math", gsm8k("A?", "2"), "`problem` must hold it"),
        ("dapo", gsm8k("A?", "2"), "name the data set that this is: gsm8k has `####`"),
        ("dapo", {"problem": "A?", "solution": "It is $\\boxed{2}$."}, "math has it in \\boxed{}"),
        ("aime", gsm8k("A?", "2"), "a whole number from 0 to 999"),
    ],
)
def test_files_of_another_data_set_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, row: Any, told: str
) -> None:
    file = write(tmp_path / "t.jsonl", [row])
    (line,) = refused(capsys, tmp_path, dataset, "--inputs", file)
    assert f"{file}:1: " in line and told in line


def test_refused_lines_of_all_files_are_listed_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = gsm8k("A?", "1"), {"question": "B?", "answer": "2"}
    first = write(tmp_path / "a.jsonl", [good, bad, bad])
    (tmp_path / "b.jsonl").write_text("{\n\n{\n")
    second = write(tmp_path / "c.parquet", [good, bad])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "C?"}' * 99)[:-9])
    excluded = write(tmp_path / "d.json", [{}])
    names = [first, *(str(tmp_path / name) for name in ("b.jsonl", "empty.jsonl", "cut.jsonl.gz"))]
    argv = ["--inputs", *names, second, "--exclude", excluded]
    lines = refused(capsys, tmp_path, "gsm8k", *argv)
    places = [re.split(": (?=[`a-z])", line.removeprefix("error: "))[0] for line in lines]
    assert places == [
        *(f"{first}:2", f"{first}:3", f"{names[1]}:1", f"{names[1]}:3"),
        *(names[2], names[3], f"{second}:2", f"{excluded}:1"),
    ]
    # Ten are named, of whatever file, and the others counted.
    many = [write(tmp_path / f"{n}.jsonl", [bad, good, bad]) for n in range(7)]
    lines = refused(capsys, tmp_path, "gsm8k", "--inputs", *many)
    assert [line.partition(": `")[0].removeprefix("error: ") for line in lines[:-1]] == [
        f"{name}:{number}" for name in many[:5] for number in (1, 3)
    ]
    assert lines[-1].endswith("... and 4 more")


def test_both_files_are_written_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "t.jsonl", [gsm8k("A?", "1"), gsm8k("B?", "2")])
    before = sorted(tmp_path.iterdir())
    for place, told in ((f"{file}/held.jsonl", "cannot be written"), (tmp_path, "is a directory")):
        argv = ["--inputs", file, "--holdout", "1", "--eval-out", str(place)]
        (line,) = refused(capsys, tmp_path, "gsm8k", *argv)
        assert str(place) in line and told in line
        assert sorted(tmp_path.iterdir()) == before


def test_lines_of_another_data_set_are_refused_by_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "t.jsonl", [gsm8k("A?", "1"), {"question": "B?", "answer": "2"}, {}])
    first, last = refused(capsys, tmp_path, "gsm8k", "--inputs", file)
    assert f"{file}:2: `answer` must end in `#### NUMBER`" in first
    assert f"{file}:3: found no text of a problem" in last
    file = write(tmp_path / "t.json", [{"problem": "A?", "solution": "It is 7."}, 3])
    first, last = refused(capsys, tmp_path, "math", "--inputs", file)
    assert f"{file}:1: has neither an `answer`" in first and f"{file}:2: must be" in last
    other = dapo("A?", "1") | {"prompt": [{"role": "user", "content": "A? Think."}]}
    file = write(tmp_path / "t.parquet", [dapo("A?", "1"), other])
    (line,) = refused(capsys, tmp_path, "dapo", "--inputs", file)
    assert f"{file}:2: `prompt` does not have the words of DAPO-Math-17k" in line
    file = write(tmp_path / "t.jsonl", [{"prompt": "A?", "answer": None}])
    assert "found no answer" in refused(capsys, tmp_path, "dapo", "--inputs", file)[0]
    for answer in ("1000", "-1", "x", 3.5):
        file = write(tmp_path / "t.jsonl", [{"problem": "A?", "answer": answer}])
        (line,) = refused(capsys, tmp_path, "aime", "--inputs", file)
        assert f"{file}:1:" in line and "from 0 to 999" in line
    (tmp_path / "t.jsonl").write_text('{"problem": "A?"\n')
    assert ":1: malformed JSON" in refused(capsys, tmp_path, "aime", "--inputs", file)[0]
    assert (
        ":1: malformed JSON"
        in refused(capsys, tmp_path, "gsm8k", "--inputs", file, "--exclude", file)[0]
    )


def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, empty = str(tmp_path / "gone.jsonl"), tmp_path / "empty"
    empty.mkdir()
    assert f"{gone}: no such file" in refused(capsys, tmp_path, "aime", "--inputs", gone)[0]
    assert "holds no file" in refused(capsys, tmp_path, "aime", "--inputs", str(empty))[0]
    none = write(tmp_path / "none.json", [])
    assert "is empty" in refused(capsys, tmp_path, "aime", "--inputs", none)[0]
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and what a broken copy leaves")
    (line,) = refused(capsys, tmp_path, "aime", "--inputs", str(damaged))
    assert f"{damaged}: cannot be read as Parquet" in line
    # Its end is whole, and so what is read first; a page is not.
    whole = Path(write(damaged, [{"problem": f"A{n}?", "answer": "1"} for n in range(999)]))
    content = bytearray(whole.read_bytes())
    content[20:2000] = bytes(1980)
    damaged.write_bytes(content)
    (line,) = refused(capsys, tmp_path, "aime", "--inputs", str(damaged))
    assert f"{damaged}: cannot be read as Parquet" in line
    file = write(tmp_path / "t.parquet", [{"problem": "A?", "answer": "1"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (line,) = refused(capsys, tmp_path, "aime", "--inputs", file)
    assert f"{file}: is a Parquet file" in line and "pip install pyarrow" in line


def test_settings_at_odds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "t.jsonl", [gsm8k("A?", "1"), gsm8k("B?", "2")])
    argv = ["--inputs", file, "--instruction", "Think.", "--template", "raw", "--system", "x"]
    found = refused(capsys, tmp_path, "gsm8k", *argv, "--holdout", "1")
    assert len(found) == 3
    assert "--instruction 'Think.': must be" in found[0] and "{problem}" in found[0]
    assert "--system" in found[1] and "--holdout 1 --eval-out None" in found[2]
    held = ["--eval-out", str(tmp_path / "held.jsonl"), "--holdout"]
    (line,) = refused(capsys, tmp_path, "gsm8k", "--inputs", file, *held, "2")
    assert "--holdout 2: 2 problems are left" in line and not (tmp_path / "held.jsonl").exists()
    assert "--inputs: give" in refused(capsys, tmp_path, "gsm8k", "--inputs")[0]
    (line,) = refused(capsys, tmp_path, "gsm8k", "--inputs", file, "--seed", "1234")
    assert "--seed 1234: is of the choice of --holdout" in line
    (line,) = refused(capsys, tmp_path, "gsm8k", "--inputs", file, "--exclude", file)
    assert "0 problems are left" in line
    inside = str(tmp_path / "t.jsonl" / "out.jsonl")
    assert prepare_prompts.main(["gsm8k", "--inputs", file, "--out", inside]) == 2
    assert f"{inside}: cannot be written" in capsys.readouterr().err
    before = Path(file).read_text()
    assert prepare_prompts.main(["gsm8k", "--inputs", file, "--out", file]) == 2
    assert "must be other files" in capsys.readouterr().err and Path(file).read_text() == before
