"""The small base model: its data, its tokenizer, and a directory that is made once and reused."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_drpo.errors import CheckpointError
from megatron_drpo.rewards import RewardRequest, load_reward
from tools import make_base_model
from tools.make_base_model import Problem, Recipe, ensure_base_model

TINY = Recipe(steps=3, num_prompts=40, num_eval_prompts=10)
SCRIPT = Path(make_base_model.__file__)
WORKED = re.compile(r"(\d+) (\d+) \\boxed\{(\d*)\}")

Corpus = list[tuple[str, str]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    recipe = Recipe()
    return make_base_model.make_corpus(make_base_model.make_splits(recipe).corpus, recipe)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_base_model(tmp_path_factory.mktemp("base") / "model", TINY)


def value(prompt: str) -> int:
    """The reference: Python's own arithmetic."""
    return eval(prompt.removesuffix("="))


def operands(prompt: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, re.findall(r"\d+", prompt))))


# The data


@pytest.mark.parametrize(
    ("problem", "solution"),
    [
        (Problem(47, "+", 85), r"12 13 \boxed{132}"),
        (Problem(10, "+", 10), r"0 2 \boxed{20}"),
        (Problem(85, "-", 47), r"8 3 \boxed{38}"),
        (Problem(85, "-", 82), r"3 0 \boxed{3}"),
        (Problem(30, "-", 30), r"0 0 \boxed{0}"),
    ],
)
def test_a_solution_is_worked_in_columns_from_the_right(problem: Problem, solution: str) -> None:
    assert make_base_model.work_out(problem) == solution


def test_worked_solutions_are_right_and_mistaken_ones_wrong_but_well_formed() -> None:
    rng = random.Random(0)
    splits = make_base_model.make_splits(Recipe())
    for problem in splits.eval_prompts + splits.prompts + splits.corpus:
        right = WORKED.fullmatch(make_base_model.work_out(problem))
        wrong = WORKED.fullmatch(make_base_model.mistaken_solution(problem, rng))
        assert right and int(right[3]) == value(problem.prompt) == problem.answer
        assert wrong and int(wrong[3]) != value(problem.prompt)


def test_no_pair_of_operands_is_in_two_splits() -> None:
    splits = make_base_model.make_splits(Recipe())
    used = [{operands(p.prompt) for p in part} for part in (splits.eval_prompts, splits.prompts)]
    assert len(splits.eval_prompts) == 256 and len(splits.prompts) == 3072
    assert [len(pairs) for pairs in used] == [128, 1536]
    used.append({operands(p.prompt) for p in splits.corpus})
    assert sum(map(len, used)) == len(set.union(*used)) == 4095


def test_more_prompts_than_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="8190"):
        make_base_model.make_splits(Recipe(num_prompts=8190))


def test_the_data_follow_from_the_seed(corpus: Corpus) -> None:
    for seed, same in ((0, True), (1, False)):
        recipe = Recipe(seed=seed)
        splits = make_base_model.make_splits(recipe)
        assert (splits == make_base_model.make_splits(Recipe())) is same
        assert (make_base_model.make_corpus(splits.corpus, recipe) == corpus) is same
    assert Recipe(seed=1).hash != Recipe().hash == Recipe(seed=0).hash


def test_the_corpus_has_the_stated_shares_of_flaws(corpus: Corpus) -> None:
    slips = rough = cut = right = long = 0
    for prompt, solution in corpus:
        match = WORKED.fullmatch(solution)
        assert match, solution
        ones, tens, boxed = match.groups()
        columns = str(10 * int(tens) + int(ones) % 10)
        slips += int(columns) != value(prompt)
        if len(columns) > 1 and columns[-1] != "0":  # else a flawed answer can look like another
            long += 1
            rough += boxed == columns[:-1] + "0"
            cut += boxed == columns[:-1]
            right += boxed == columns
    assert slips / len(corpus) == pytest.approx(0.05, abs=0.01)
    shares = [rough / long, cut / long, right / long]
    assert shares == pytest.approx([0.32, 0.29, 0.39], abs=0.02)
    base = sum(solution.endswith(f"{{{value(prompt)}}}") for prompt, solution in corpus)
    assert 0.35 < base / len(corpus) < 0.45


def test_the_math_reward_tells_right_from_wrong_solutions(corpus: Corpus) -> None:
    reward = load_reward("math")
    rewards = {True: 0, False: 0}
    for prompt, solution in corpus[:300]:
        truth = solution.endswith(f"{{{value(prompt)}}}")
        request = RewardRequest(prompt, solution, str(value(prompt)), "stop", {})
        assert reward(request) == truth, (prompt, solution)
        rewards[truth] += 1
    assert min(rewards.values()) > 100


# The saved directory


def test_the_directory_loads_as_any_hugging_face_checkpoint(built: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built)
    model = AutoModelForCausalLM.from_pretrained(built)
    config = model.config
    assert (config.model_type, config.vocab_size) == ("qwen3", len(tokenizer))
    for divisible in (
        config.vocab_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.num_hidden_layers,
    ):
        assert divisible % 2 == 0
    assert 500_000 < model.num_parameters() < 1_500_000
    assert model.generation_config.eos_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    ids = torch.tensor([tokenizer("47+85=").input_ids])
    assert ids.shape == (1, 6) and model(ids).logits.shape == (1, 6, len(tokenizer))


def test_the_prompts_files_and_metadata_say_what_was_made(built: Path) -> None:
    metadata = json.loads((built / "base_model.json").read_text())
    assert metadata["recipe_hash"] == TINY.hash
    assert metadata["recipe"] | {"seed": 0, "steps": 3} == metadata["recipe"]
    for name in ("greedy_accuracy", "sampled_accuracy", "sampled_pass_at_8"):
        assert 0 <= metadata[name] <= 1
    splits = make_base_model.make_splits(TINY)
    for name, problems in (("prompts", splits.prompts), ("eval_prompts", splits.eval_prompts)):
        lines = [json.loads(line) for line in (built / f"{name}.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == [problem.prompt for problem in problems]
        assert all(line["answer"] == str(value(line["prompt"])) for line in lines)


def test_any_printable_ascii_text_survives_the_tokenizer(built: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built)
    original = sentencepiece.SentencePieceProcessor(model_file=str(built / "tokenizer.model"))

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
    def check(text: str) -> None:
        assume(not any(name in text for name in tokenizer.all_special_tokens))
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        assert ids == original.encode(text)

    # What would go wrong first: outer and double spaces, a box after a space, line ends.
    for text in ("  47 +  85 = ", " \\boxed{132}", "12 13 \\boxed{132}", "a\nb\n"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    check()
    assert tokenizer.convert_ids_to_tokens(tokenizer("132").input_ids) == ["1", "3", "2"]
    assert len(tokenizer("12 13 \\boxed{132}").input_ids) == 10  # "\boxed{" is one token


def test_training_lowers_the_loss_of_responses_only(corpus: Corpus, built: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built)
    recipe = Recipe(steps=30)
    inputs, labels = make_base_model.encode_corpus(corpus[: 30 * recipe.batch_size], tokenizer)
    for row, (prompt, solution) in enumerate(corpus[:50]):
        kept = labels[row] != -100
        assert tokenizer.decode(inputs[row][kept]) == solution + "</s>"
        assert tokenizer.decode(inputs[row][: int(kept.nonzero()[0])]) == prompt
    with make_base_model._torch_state(0), torch.no_grad():
        model = make_base_model.build_model(len(tokenizer))
        before = model(inputs[:64], labels=labels[:64]).loss
        with torch.enable_grad():
            make_base_model.train(model, inputs, labels, recipe)
        assert model(inputs[:64], labels=labels[:64]).loss < 0.5 * before


def test_the_same_seed_makes_the_same_model_and_leaves_torch_as_it_was(
    built: Path, tmp_path: Path
) -> None:
    import torch

    torch.manual_seed(5)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = ensure_base_model(tmp_path / "again", TINY)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer.model", "prompts.jsonl"):
        assert (again / name).read_bytes() == (built / name).read_bytes(), name


# Made once, reused, refused


def fake_build(seconds: float, builds: list[Path]) -> Callable[[Path, Recipe], dict[str, object]]:
    """A stand-in for the minute of training."""

    def build(directory: Path, recipe: Recipe) -> dict[str, object]:
        builds.append(directory)
        time.sleep(seconds)
        metadata = {"recipe_hash": recipe.hash, "seconds": seconds, "greedy_accuracy": 1.0}
        metadata |= {"sampled_accuracy": 0.4, "sampled_pass_at_8": 1.0}
        (directory / "base_model.json").write_text(json.dumps(metadata))
        return metadata

    return build


def test_a_directory_of_the_same_recipe_is_reused(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds: list[Path] = []
    monkeypatch.setattr(make_base_model, "_build", fake_build(0, builds))
    assert ensure_base_model(built, TINY) == built
    assert not builds
    assert f"reusing {built}" in capsys.readouterr().out


def test_reuse_imports_nothing_heavy(built: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tools.make_base_model import Recipe, ensure_base_model\n"
        f"ensure_base_model(Path({str(built)!r}), {TINY!r})\n"
        "assert not {'torch', 'transformers', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], check=True)


def test_many_callers_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []
    complete: list[bool] = []
    monkeypatch.setattr(make_base_model, "_build", fake_build(0.3, builds))
    directory = tmp_path / "new" / "model"

    def call() -> None:
        complete.append((ensure_base_model(directory, TINY) / "base_model.json").is_file())

    # Each call opens the lock file anew, so that threads exclude each other as processes do.
    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert complete == [True] * 4
    assert len(builds) == 1
    assert sorted(p.name for p in directory.parent.iterdir()) == [".model.lock", "model"]


def test_a_build_that_fails_or_is_killed_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "model"

    def fail(directory: Path, recipe: Recipe) -> dict[str, object]:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(make_base_model, "_build", fail)
    with pytest.raises(KeyboardInterrupt):
        ensure_base_model(directory, TINY)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]

    leftover = tmp_path / ".model.partial"
    leftover.mkdir()
    (leftover / "config.json").write_text("half")
    monkeypatch.setattr(make_base_model, "_build", fake_build(0, []))
    ensure_base_model(directory, TINY)
    assert [path.name for path in directory.iterdir()] == ["base_model.json"]


def test_another_recipes_directory_is_refused_with_both_hashes(built: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        ensure_base_model(built, Recipe(seed=7))
    for part in (str(built), TINY.hash, Recipe(seed=7).hash, "delete"):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_directory_of_something_else_is_refused_and_untouched(
    tmp_path: Path, content: str | None
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if content is not None:
        (tmp_path / "base_model.json").write_text(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        ensure_base_model(tmp_path, TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_command_line_prints_an_error_without_traceback(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(in_the_way / "model")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {in_the_way / 'model'}: ")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
