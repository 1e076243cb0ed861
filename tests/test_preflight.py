"""What is refused before any long work, and what a dry run says."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_drpo import cli, hardware
from megatron_drpo.arguments import parse
from megatron_drpo.checkpoint.convert import hf_to_megatron
from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.device import Device
from megatron_drpo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DrpoError,
    RewardError,
    RolloutError,
)
from megatron_drpo.preflight import Inputs, preflight
from tests.tiny_run import NUM_PROMPTS, make_tiny_run


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, make_tiny_run(directory)


@pytest.fixture(autouse=True)
def gpus_stay_visible() -> Iterator[None]:
    """`--device cpu` hides the GPUs from its process, which here is that of all tests."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield
    if visible is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


@pytest.fixture
def flags(
    run_directory: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Flags of a valid run, in a current directory of the test's own."""
    directory, flags = run_directory
    for path in directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return flags


def check(argv: list[str], world_size: int = 1, rank: int = 0) -> Inputs:
    config, _ = parse(argv)
    return preflight(config, world_size, rank)


def refused(kind: type[DrpoError], argv: list[str], world_size: int = 1, rank: int = 0) -> str:
    with pytest.raises(kind) as caught:
        check(argv, world_size, rank)
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_valid_run_is_read_once_and_megatron_is_not_imported(flags: list[str]) -> None:
    before = {name for name in sys.modules if name.startswith("megatron.")}
    inputs = check([*flags, "--eval-prompts", "prompts.jsonl", "--rollout-stop-ids", "3"])
    assert {name for name in sys.modules if name.startswith("megatron.")} == before
    assert inputs.architecture.num_attention_heads == 8
    assert [prompt.text for prompt in inputs.prompts] == [f"{i}+{i}=" for i in range(NUM_PROMPTS)]
    assert len(inputs.eval_prompts) == NUM_PROMPTS
    assert inputs.stop_ids == (2, 3)
    assert inputs.rollouts is None and inputs.device.kind in ("cpu", "cuda")
    assert sorted(os.listdir()) == ["model", "prompts.jsonl"]


@pytest.mark.parametrize("world_size", [4, 8])
def test_layouts_that_fit_pass(flags: list[str], world_size: int) -> None:
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    check([*flags, *sizes, "--num-virtual-stages-per-pipeline-rank", "2"], world_size)


@pytest.mark.parametrize(
    ("extra", "world_size", "parts"),
    [
        (["--tensor-model-parallel-size", "2"], 3, ["size 2", "are 3", "--nproc-per-node 2"]),
        (["--tensor-model-parallel-size", "3"], 3, ["heads 8", "groups 4", "ffn_hidden_size 40"]),
        (["--tensor-model-parallel-size", "8"], 8, ["num_query_groups 4", "use one of 1, 2, 4"]),
        (["--pipeline-model-parallel-size", "3"], 3, ["layers 4", "now 3", "among 1, 2, 4"]),
        (
            ["--pipeline-model-parallel-size", "2"]
            + ["--num-virtual-stages-per-pipeline-rank", "3"],
            2,
            ["num_layers 4", "now 6"],
        ),
        ([], 3, ["--rollout-prompts-per-step 4", "3 replicas", "nearest possible layouts of 3"]),
        (["--context-parallel-size", "2"], 3, ["size 2", "multiple of 2", "are 3"]),
        (
            ["--context-parallel-size", "2", "--max-tokens-per-microbatch", "13"]
            + ["--rollout-max-response-length", "10"],
            2,
            ["microbatch 13", "14 tokens, padded to 16", "at least 16"],
        ),
        (
            ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "4"],
            2,
            ["first-pipeline-num-layers 4", "num_layers 4", "nearest possible layouts of 2 ranks"],
        ),
        (["--rollout-max-response-length", "64"], 1, ["length 64", "embeddings 64", "at most 63"]),
        (["--max-tokens-per-microbatch", "11"], 1, ["microbatch 11", "at least 12"]),
        (["--rollout-prompts-per-step", "10"], 1, ["per-step 10", f"{NUM_PROMPTS} prompts"]),
        (["--resume"], 1, ["--resume", "out/checkpoints"]),
        (["--transformer-impl", "transformer_engine", "--device", "cpu"], 1, ["needs a GPU"]),
    ],
)
def test_what_does_not_fit_names_both_numbers_and_the_flag(
    flags: list[str], extra: list[str], world_size: int, parts: list[str]
) -> None:
    message = refused(ConfigError, [*flags, *extra], world_size)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def use_experts(flags: list[str]) -> list[str]:
    """The flags, but of a mixture of experts: 4 in each layer, 2 for each token."""
    from tests.tiny_models import save_tiny

    save_tiny(Path("experts"), "qwen3_moe")
    for file in Path("model").glob("tokenizer*"):
        Path("experts", file.name).write_bytes(file.read_bytes())
    return [*flags, "--hf-model", "experts"]


@pytest.mark.parametrize(
    ("extra", "world_size", "parts"),
    [
        (["--expert-model-parallel-size", "4"], 2, ["size 4", "there are 2", "one of 1, 2"]),
        (
            ["--expert-model-parallel-size", "3", "--rollout-prompts-per-step", "6"],
            3,
            ["size 3", "num_experts 4", "use one of 1, 2, 4"],
        ),
        (["--expert-model-parallel-size", "0"], 1, ["size 0", "at least 1"]),
        (
            ["--tensor-model-parallel-size", "2"],
            2,
            ["size 2", "4 experts", "add --sequence-parallel"],
        ),
    ],
)
def test_experts_that_cannot_be_trained_in_a_layout_are_refused(
    flags: list[str], extra: list[str], world_size: int, parts: list[str]
) -> None:
    message = refused(ConfigError, [*use_experts(flags), *extra], world_size)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_experts_are_trained_where_they_can_be(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = use_experts(flags)
    pipeline = ["--pipeline-model-parallel-size", "2"]
    check([*experts, *pipeline, "--expert-model-parallel-size", "2"], 8)
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    check([*experts, *split, "--expert-model-parallel-size", "4"], 8)
    message = refused(ConfigError, [*flags, "--expert-model-parallel-size", "2"], 2)
    assert "the model has no experts" in message and "\n" not in message
    # A frozen model's forward pass asks for nothing: its layers may be split.
    sizes = ["--tensor-model-parallel-size", "2", "--kl-coef", "0.1"]
    check([*flags, *sizes, "--reference-model", "experts"], 2)
    cuda = Device("cuda", "nccl", 0, "test")
    monkeypatch.setattr("megatron_drpo.preflight.choose_device", lambda _: cuda)
    monkeypatch.setattr("megatron_drpo.hardware.look", hardware.Machine)
    monkeypatch.setattr("megatron_drpo.preflight._have_transformer_engine", lambda: False)
    check(flags)
    assert "Transformer Engine" in refused(ConfigError, experts)
    kl = [*flags, "--kl-coef", "0.1", "--reference-model", "experts"]
    assert "Transformer Engine" in refused(ConfigError, kl)


def test_exactness_on_a_gpu_needs_kernels_and_layers(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Device("cuda", "nccl", 0, "test")
    monkeypatch.setattr("megatron_drpo.preflight.choose_device", lambda _: cuda)
    monkeypatch.setattr("megatron_drpo.hardware.look", hardware.Machine)
    monkeypatch.setattr("megatron_drpo.preflight._have_transformer_engine", lambda: False)
    check(flags)
    message = refused(ConfigError, [*flags, "--rollout-exact", "on"])
    assert "Transformer Engine" in message and "--transformer-impl local" in message
    monkeypatch.setattr("megatron_drpo.preflight._have_transformer_engine", lambda: True)
    check([*flags, "--rollout-exact", "on", "--transformer-impl", "local"])


def test_what_generation_needs_is_there_before_it_starts(flags: list[str]) -> None:
    message = refused(RolloutError, [*flags, "--environment", "nowhere:Env"])
    assert "--environment nowhere:Env" in message
    message = refused(RewardError, [*flags, "--reward", "http://127.0.0.1:9/judge"])
    assert "http://127.0.0.1:9/judge" in message
    message = refused(RolloutError, [*flags, "--rollout-kv-cache-gib", "1e-5"])
    assert "--rollout-kv-cache-gib 1e-05" in message and "4 responses of" in message
    check([*flags, "--rollout-kv-cache-gib", "1"])


def test_recorded_rollouts_are_those_of_the_runs_law_and_tokenizer(flags: list[str]) -> None:
    at = flags.index("--prompts")
    recorded = [*flags[:at], *flags[at + 2 :], "--rollouts-file", "r.jsonl"]
    header = {
        **{"rollouts": 1, "temperature": 0.5, "top_p": 1.0, "top_k": 0, "seed": 1},
        **{"max_response_length": 8, "stop_ids": [2], "stop_strings": [], "engine": "e"},
        **{"tokenizer_sha256": "0" * 64, "weights_sha256": None, "policy": "p"},
    }
    line = {
        **{"prompt": "1+1=", "prompt_ids": [4, 13, 4, 14], "response": "2", "response_ids": [5]},
        **{"behaviour_logprobs": [-0.1], "finish_reason": "stop", "policy_version": 0},
        "reward": 1.0,
    }
    lines = [header, *({"id": str(i // 2), "sample": i % 2, **line} for i in range(8))]
    Path("r.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    message = refused(ConfigError, recorded)
    assert "temperature 0.5" in message and "--rollout-temperature 1.0" in message
    assert "tokenizer 000000000000" in message


def test_files_that_cannot_be_used_are_refused(flags: list[str]) -> None:
    Path("bad.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": \n')
    assert "bad.jsonl:2" in refused(DataError, [*flags, "--eval-prompts", "bad.jsonl"])
    Path("none.jsonl").write_text("\n")
    assert "none.jsonl: is empty" in refused(DataError, [*flags, "--eval-prompts", "none.jsonl"])
    Path("long.jsonl").write_text(f'{{"prompt": "{"1" * 57}", "answer": "2"}}\n')
    message = refused(DataError, [*flags, "--eval-prompts", "long.jsonl"])
    assert "long.jsonl:1" in message and "57" in message and "56" in message
    Path("open.jsonl").write_text('{"prompt": "1+1="}\n')
    assert "answer" in refused(DataError, [*flags, "--eval-prompts", "open.jsonl"])
    message = refused(ConfigError, [*flags, "--hf-model", "gone"])
    assert "--hf-model gone: no such directory" in message
    assert "nothing" in refused(RewardError, [*flags, "--reward", "nothing"])


def test_a_damaged_checkpoint_is_found_by_rank_0(flags: list[str]) -> None:
    broken = Path("broken")
    broken.mkdir()
    for path in Path("model").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    argv = [*flags, "--hf-model", "broken"]
    assert "model.safetensors" in refused(CheckpointError, argv)
    check(argv, rank=1)


def test_an_output_directory_must_be_new_or_resumed(flags: list[str]) -> None:
    checkpoints = Path("out/checkpoints")
    checkpoints.mkdir(parents=True)
    check(flags)  # a run that ended before its first checkpoint
    (checkpoints / "latest").write_text("step-000001")
    assert "not a complete checkpoint" in refused(CheckpointError, flags)
    (checkpoints / "step-000001").mkdir()
    fields = ("progress", "scheduler", "world_size", "megatron_core", "files")
    state = dict.fromkeys(fields) | {"config": parse(flags)[0].flat()}
    (checkpoints / "step-000001" / "state.json").write_text(json.dumps(state))
    assert "--resume" in refused(ConfigError, flags)
    check([*flags, "--resume", "--train-iters", "9"])
    check([*flags, "--resume", "--train-iters", "1"])
    message = refused(CheckpointError, [*flags, "--resume", "--lr", "0.5"])
    assert "--lr" in message and "1e-06" in message and "0.5" in message
    (checkpoints / "step-000001").rename(checkpoints / "step-000003")
    (checkpoints / "latest").write_text("step-000003")
    message = refused(ConfigError, [*flags, "--resume"])
    assert "--train-iters 2" in message and "3 steps already" in message


def test_an_output_directory_must_be_writable(flags: list[str]) -> None:
    Path("file").write_text("")
    message = refused(ConfigError, [*flags, "--output-dir", "file/run"])
    assert "--output-dir file/run" in message
    check([*flags, "--output-dir", "file/run"], rank=1)


def test_all_problems_come_at_once(flags: list[str]) -> None:
    message = refused(
        ConfigError,
        [
            *flags,
            "--tensor-model-parallel-size",
            "3",
            "--reward",
            "nothing",
            "--output-dir",
            "/proc/x",
        ]
        + ["--eval-prompts", "gone.jsonl", "--resume"],
        world_size=4,
    )
    for part in ("multiple of 3", "heads 8", "nothing", "/proc", "gone.jsonl", "--resume"):
        assert part in message


def test_a_file_that_two_flags_name_is_complained_of_once(flags: list[str]) -> None:
    Path("bad.jsonl").write_text('{"prompt": \n')
    argv = [*flags, "--prompts", "bad.jsonl", "--eval-prompts", "bad.jsonl"]
    assert refused(ConfigError, argv).count("bad.jsonl:1") == 1


def test_recorded_rollouts_are_read(flags: list[str]) -> None:
    line = (
        '{"id": "a", "prompt": "1+1=", "prompt_ids": [4, 13, 4, 14], "sample": %d, '
        '"response": "2", "response_ids": [5, 2], "behaviour_logprobs": [-0.5, %s], '
        '"finish_reason": "stop", "policy_version": 0, "reward": 1.0}\n'
    )
    argv = [*flags, "--rollouts-file", "r.jsonl", "--prompts", "None"]
    Path("r.jsonl").write_text(line % (0, "-0.1") + line % (1, "-0.2"))
    message = refused(ConfigError, argv)
    assert "--rollout-prompts-per-step 4" in message and "holds 1 prompts" in message
    argv += ["--rollout-prompts-per-step", "1", "--updates-per-rollout", "1"]
    inputs = check(argv)
    assert inputs.rollouts is not None
    assert [reward for _, reward in inputs.rollouts] == [1.0, 1.0]
    assert len(inputs.prompts) == 0
    Path("r.jsonl").write_text(line % (0, "-0.1") + line % (1, "0.2"))
    assert "r.jsonl:2" in refused(DataError, argv)
    Path("r.jsonl").write_text(line % (0, "-0.1") + line % (1, "-0.2"))
    assert "at least 6" in refused(ConfigError, [*argv, "--max-tokens-per-microbatch", "5"])
    bare = line.replace(', "reward": 1.0', "")
    Path("r.jsonl").write_text(bare % (0, "-0.1") + bare % (1, "-0.2"))
    assert "answer" in refused(DataError, argv)  # --reward exact has nothing to compare with


def test_likeliest_ids_are_asked_for_where_they_are_needed_and_only_there(flags: list[str]) -> None:
    topk = [*flags, "--objective", "dppo_topk_kl"]
    message = refused(ConfigError, topk)
    assert "--objective dppo_topk_kl" in message and "--rollout-topk 20" in message
    check([*topk, "--rollout-topk", "5"])
    assert "has 61 token ids" in refused(ConfigError, [*topk, "--rollout-topk", "62"])
    message = refused(ConfigError, [*flags, "--rollout-topk", "5"])
    assert "--rollout-topk 5" in message and "--save-rollouts" in message
    check([*flags, "--rollout-topk", "5", "--save-rollouts"])


def test_recorded_rollouts_must_hold_what_the_objective_reads(flags: list[str]) -> None:
    line = (
        '{"id": "a", "prompt": "1+1=", "prompt_ids": [4, 13, 4, 14], "sample": %d, '
        '"response": "2", "response_ids": [5], "behaviour_logprobs": [-0.5], '
        '"finish_reason": "stop", "policy_version": 0, "reward": 1.0%s}\n'
    )
    argv = [*flags, "--rollouts-file", "r.jsonl", "--prompts", "None"]
    argv += ["--rollout-prompts-per-step", "1", "--updates-per-rollout", "1"]
    Path("r.jsonl").write_text(line % (0, "") + line % (1, ""))
    message = refused(ConfigError, [*argv, "--objective", "dppo_topk_tv"])
    assert "r.jsonl" in message and "`topk_ids`" in message and "--save-rollouts" in message
    message = refused(ConfigError, [*argv, "--drpo-penalty", "full"])
    assert "--drpo-penalty full" in message and "--rollouts-file" in message
    likeliest = ', "topk_ids": [[5, 6]], "topk_logprobs": [[-0.5, -2.0]]'
    Path("r.jsonl").write_text(line % (0, likeliest) + line % (1, likeliest))
    inputs = check([*argv, "--objective", "dppo_topk_tv"])
    assert inputs.rollouts is not None and inputs.rollouts[0][0].topk_ids is not None


def test_the_reference_model_is_checked_as_the_policy_is(flags: list[str]) -> None:
    from tests.tiny_models import save_tiny

    assert check(flags).reference is None
    kl = [*flags, "--kl-coef", "0.1"]
    inputs = check(kl)
    assert inputs.reference == (inputs.architecture, inputs.weights)
    message = refused(ConfigError, [*kl, "--reference-model", "gone"])
    assert "--reference-model gone: no such directory" in message
    save_tiny(Path("llama"), "llama")
    other = check([*kl, "--reference-model", "llama"]).reference
    assert other is not None and other[0].family == "llama" and other[1] == Path("llama")
    path = Path("llama/config.json")
    path.write_text(path.read_text().replace('"vocab_size": 61', '"vocab_size": 60'))
    message = refused(ConfigError, [*kl, "--reference-model", "llama"])
    assert "has 60 token ids" in message and "61" in message


def test_a_dry_run_tells_the_consequences_and_leaves_nothing(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.start([*flags, "--dry-run", "--tensor-model-parallel-size", "2", "--drpo-delta", "2"])
    text = capsys.readouterr().out
    assert "--tensor-model-parallel-size 2\n" in text and "--rollout-prompts-per-step 4\n" in text
    assert "2 rank(s) = TP 2 x PP 1 x DP 1" in text
    assert "2 steps of 8 samples = 4 prompts x 2" in text
    assert "4 optimizer updates, 2 per step, each on 4 samples" in text
    assert "at most 64 response tokens per step, 128 in all" in text
    assert "[0.5, 1.5]" in text
    assert "KV cache, 8 slots of 12 tokens" in text
    assert "all-reduce TP" in text and "temperature 1: one setting" in text
    assert sorted(os.listdir()) == ["model", "prompts.jsonl"]


@pytest.mark.parametrize("pp", [1, 2])
def test_the_memory_estimate_counts_the_parameters_of_a_rank(
    flags: list[str], capsys: pytest.CaptureFixture[str], pp: int
) -> None:
    from tests.tiny_models import tiny_model

    total = {name: p.numel() for name, p in tiny_model("qwen3").named_parameters()}
    embedding, output = total["model.embed_tokens.weight"], total["lm_head.weight"]
    norm, layers = total["model.norm.weight"], 0
    for name, size in total.items():
        if ".layers." in name:
            layers += size if "norm" in name else size // 2  # norms are on every rank
    ends = (embedding if pp == 1 else 0) + output
    ends = ends * 64 // 61  # 61 ids, padded to a multiple of 16 on both ranks
    expected = layers // pp + ends // 2 + norm
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", str(pp)]
    cli.start([*flags, "--dry-run", *sizes])
    (row,) = [line for line in _table(capsys.readouterr().out) if line[0] == str(pp - 1)]
    assert row[2] == f"{expected:,}"
    assert row[3] == f"{expected * 4 / 2**10:,.1f}" == row[4]


def _table(text: str) -> list[list[str]]:
    """Rows of the table of memory by pipeline stage."""
    _, _, rest = text.partition("by pipeline stage\n")
    lines = itertools.takewhile(
        lambda line: line[:1].isdigit(), map(str.strip, rest.splitlines()[1:])
    )
    return [line.split() for line in lines]


def test_the_memory_estimate_shares_out_experts(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    argv = [*use_experts(flags), "--dry-run", "--expert-model-parallel-size", "2"]
    sizes = {n: w.numel() for n, w in load_file("experts/model.safetensors").items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name) // 2
    others = sum(size for name, size in sizes.items() if ".experts." not in name)
    monkeypatch.setenv("WORLD_SIZE", "4")
    cli.start(argv)
    text = capsys.readouterr().out
    assert "4 rank(s) = TP 1 x PP 1 x DP 4" in text
    assert "EP 2: 2 of 4 experts on each rank" in text
    others += 2 * 3 * 32  # rows that pad 61 ids to 64
    (row,) = _table(text)
    assert row[2] == f"{experts + others:,}"
    # Adam's two moments: an expert's are on two ranks, the others' on four.
    state = (experts // 2 + others // 4) * 8
    assert row[5] == f"{state / 2**10:,.1f}"


# --- Megatron checkpoints -----------------------------------------------------------------------


def without_model(flags: list[str]) -> list[str]:
    at = flags.index("--hf-model")
    return [*flags[:at], *flags[at + 2 :]]


@pytest.fixture
def converted(flags: list[str]) -> list[str]:
    """The flags without a model, whose conversion is in `megatron`."""
    hf_to_megatron("model", "megatron")
    return without_model(flags)


def test_a_converted_checkpoint_needs_no_hugging_face_directory(converted: list[str]) -> None:
    inputs = check([*converted, "--load", "megatron"])
    assert (inputs.model, inputs.weights) == (Path("megatron"), Path("megatron"))
    assert inputs.architecture == read_architecture("model")
    inputs = check([*converted, "--hf-model", "model", "--load", "megatron"])
    assert (inputs.model, inputs.weights) == (Path("model"), Path("megatron"))


def test_each_kind_of_checkpoint_has_its_flag(converted: list[str]) -> None:
    message = refused(ConfigError, [*converted, "--load", "model"])
    assert "--load model: is no Megatron checkpoint" in message and "--hf-model" in message
    message = refused(ConfigError, [*converted, "--hf-model", "megatron"])
    assert "--hf-model megatron: is a Megatron checkpoint" in message and "--load" in message
    with pytest.raises(ConfigError, match="--hf-model: give .* or a Megatron one with --load"):
        check(converted)


def test_weights_alone_do_not_say_what_model_they_are(converted: list[str]) -> None:
    Path("megatron/config.json").unlink()
    message = refused(ConfigError, [*converted, "--load", "megatron"])
    assert "--load megatron: holds no config.json" in message and "--hf-model" in message
    assert check([*converted, "--load", "megatron", "--hf-model", "model"]).model == Path("model")


def test_two_models_of_equal_shapes_are_told_apart(converted: list[str]) -> None:
    shutil.copytree("model", "other")
    path = Path("other/config.json")
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 7000.0
    path.write_text(json.dumps(config))
    argv = [*converted, "--load", "megatron", "--hf-model", "other"]
    message = refused(ConfigError, argv)
    assert "rotary_base 7000.0 against 5000.0" in message and "drop --hf-model" in message


def test_megatron_weights_that_do_not_fit_are_refused(converted: list[str]) -> None:
    path = Path("megatron/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 48}))
    message = refused(CheckpointError, [*converted, "--load", "megatron"])
    assert "the weights do not fit config.json" in message
