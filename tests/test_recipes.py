"""The recipes of examples/recipes: their headers keep what they promise.

That each parses and explains each line is tested in test_repository.py. Here each is planned on the
published config.json of its model by the very commands in its header, and the memory and layout
that the header states are compared with what the doctor prints.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_drpo import doctor
from megatron_drpo.arguments import parse
from tests.published_configs import PUBLISHED
from tools import prepare_prompts

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
RECIPES_FOR_GPUS = [path for path in RECIPES if path.stem.endswith("gpu")]
SLURM = ROOT / "examples" / "slurm" / "train.sbatch"
PAPER = ROOT / "examples" / "recipes" / "qwen3_4b_base_dapo_math_8gpu.yaml"


def header(recipe: Path) -> str:
    """The comment before the settings, lines that end in a backslash joined."""
    lines = recipe.read_text().split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    text = "\n".join(line.removeprefix("#") for line in lines)
    return re.sub(r" *\\\n *", " ", text)


def commands(recipe: Path, start: str) -> list[list[str]]:
    """Of the header, those that start so, without that."""
    found = re.findall(rf"^ +{re.escape(start)}(.*)$", header(recipe), re.MULTILINE)
    return [shlex.split(text, comments=True) for text in found]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each model, with nothing in it but config.json."""
    from tools.make_base_model import build_model

    root = tmp_path_factory.mktemp("models")
    configs = {name: config for name, (config, _) in PUBLISHED.items()}
    configs["Llama-3.1-8B-Instruct"] = configs["Llama-3.1-8B"]
    small = build_model(vocab_size=100).config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    configs["base-model"] = configs["calculator"] = small
    for name, config in configs.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_header_states_what_the_doctor_says(
    recipe: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = header(recipe)
    stated = re.findall(r"Memory of a (?:GPU|rank)\b[^:]*: ([\d.]+) (GiB|MiB)", text)
    found = commands(recipe, "python -m megatron_drpo.doctor")
    assert found and len(found) == len(stated)
    config, _ = parse(["--config", str(recipe)])
    assert config.model.hf_model is not None
    model = models / Path(config.model.hf_model).name
    for argv, (peak, unit) in zip(found, stated, strict=True):
        assert argv[:2] == ["--config", str(recipe.relative_to(ROOT))]
        assert doctor.main(["--config", str(recipe), *argv[2:], "--hf-model", str(model)]) == 0
        plan = capsys.readouterr().out
        section = plan.partition("the memory of a rank")[2].splitlines()
        table = section[2 : 2 + config.parallel.pipeline_model_parallel_size]
        assert max(float(row.split()[-1].replace(",", "")) for row in table) == float(peak)
        assert f"in {unit}, of one rank" in plan
        assert "worth a look" not in plan
    (layout,) = re.findall(r"\d+ rank\(s\) = .*", plan)
    gpus = re.search(r"(\d+)gpu$", recipe.stem)
    assert layout.startswith(f"{gpus[1] if gpus else 2} rank(s)")
    if gpus:
        assert layout in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_header_plans_with_the_prompts_that_training_has_room_for(recipe: Path) -> None:
    """Prompts of the length that the doctor was given are accepted; and whoever trains on the same
    data has the same room for them."""
    config, _ = parse(["--config", str(recipe)])
    room = config.train.max_tokens_per_microbatch - config.rollout.rollout_max_response_length
    for argv in commands(recipe, "python -m megatron_drpo.doctor"):
        planned = int(argv[argv.index("--prompt-length") + 1])
        assert planned <= room
        if "--inputs data/dapo-math-17k.parquet" in header(recipe):
            assert planned == room == 2048


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_header_says_how_to_start_and_what_to_expect(recipe: Path) -> None:
    text = " ".join(header(recipe).split())
    assert "Start it" in text and "It works if" in text
    # A recipe for GPUs has not been run, and says so.
    assert ("NOT RUN HERE" in text) == recipe.stem.endswith("gpu")
    starts = f"--config examples/recipes/{recipe.name}"
    assert starts in text.partition("Memory of a")[0] or recipe.stem == "arithmetic_cpu"
    # Long responses make long steps: the notice of a stop that Slurm gives has to cover one.
    config, _ = parse(["--config", str(recipe)])
    assert (config.rollout.rollout_max_response_length > 4096) == ("--signal USR1@" in text)
    (notice,) = re.findall(r"--signal=USR1@(\d+)", SLURM.read_text())
    assert f"than the {notice} s of {SLURM.relative_to(ROOT)}" in text or "--signal" not in text


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that headers name, in the current directory: one problem each, in the format of its
    data set."""
    rows = {
        "gsm8k/train.jsonl": {"question": "1+1?", "answer": "It is 2.\n#### 2"},
        "gsm8k/test.jsonl": {"question": "1+2?", "answer": "It is 3.\n#### 3"},
        "MATH/train/algebra/1.json": {
            "problem": "1+1?",
            "solution": "\\boxed{2}",
            "level": "Level 1",
        },
        "math500/test.jsonl": {"problem": "1+2?", "solution": "\\boxed{3}", "answer": "3"},
        "aime24.jsonl": {"problem": "1+2?", "answer": "003"},
        "aime25.jsonl": {"problem": "1+3?", "answer": 4},
    }
    for name, row in rows.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))
    asked = [{"role": "user", "content": prepare_prompts.INSTRUCTIONS["dapo"]}]
    dapo = [{"prompt": json.loads(json.dumps(asked).replace("{problem}", "1+1?"))}]
    dapo[0] |= {"reward_model": {"ground_truth": "2"}}
    pq.write_table(pa.Table.from_pylist(dapo), tmp_path / "data" / "dapo-math-17k.parquet")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("recipe", RECIPES_FOR_GPUS, ids=lambda path: path.name)
@pytest.mark.usefixtures("data")
def test_the_commands_of_a_header_prepare_the_prompts_that_the_recipe_reads(recipe: Path) -> None:
    config, _ = parse(["--config", str(recipe)])
    for argv in commands(recipe, "python tools/prepare_prompts.py"):
        assert prepare_prompts.main(argv) == 0
    assert config.data.prompts is not None and config.data.eval_prompts is not None
    (line,) = map(json.loads, Path(config.data.prompts).read_text().splitlines())
    assert line["answer"] == "2" and "1+1?" in str(line["prompt"])
    for text in Path(config.data.eval_prompts).read_text().splitlines():
        held_out = json.loads(text)
        # Evaluated as it is trained: the same words, as text or as messages.
        asked, trained = str(held_out["prompt"]), str(line["prompt"])
        assert asked.replace(held_out["problem"], "") == trained.replace(line["problem"], "")


def test_the_papers_constants_are_in_its_recipe_and_marked() -> None:
    """The reference recipe: each constant is stated, and said to be the paper's."""
    paper = {
        **{"objective": "drpo", "drpo_delta": 12.5, "advantage_estimator": "group-mean"},
        **{"advantage_divide_by_std": False, "loss_aggregation": "seq-mean-token-sum-norm"},
        **{"loss_token_horizon": 8192, "proximal_policy": "behaviour"},
        **{"rollout_prompts_per_step": 64, "rollout_samples_per_prompt": 8},
        **{"rollout_temperature": 1.0, "rollout_top_p": 1.0, "rollout_top_k": 0},
        **{"updates_per_rollout": 4, "lr": 1e-6, "lr_decay_style": "constant"},
        **{"weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "clip_grad": 1.0},
        "eval_samples_per_prompt": 16,
    }
    config, _ = parse(["--config", str(PAPER)])
    values = config.flat()
    assert {name: values[name] for name in paper} == paper
    settings = yaml.safe_load(PAPER.read_text())
    assert {name.replace("_", "-") for name in paper} <= set(settings)
    lines = [line for line in PAPER.read_text().splitlines() if line and line[0] != "#"]
    sources = dict(re.match(r"([\w-]+):.*? # (paper|ours):", line).groups() for line in lines)  # type: ignore[union-attr]
    papers = {name for name, source in sources.items() if source == "paper"}
    named = {name.replace("_", "-") for name in paper}
    assert papers == named | {"hf-model", "prompts", "eval-prompts"}
