"""What is refused on which machine: devices, versions and models are made up here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_drpo import hardware
from megatron_drpo.arguments import parse
from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.config import MemoryConfig, PrecisionConfig
from megatron_drpo.device import Device
from megatron_drpo.errors import ConfigError
from megatron_drpo.hardware import Machine, look, problems
from megatron_drpo.preflight import preflight
from tests.tiny_run import make_tiny_run

CPU = Machine(Device("cpu", "gloo", 0, "torch sees no GPU"))
HOPPER = Machine(Device("cuda", "nccl", 0, "torch sees 8 GPUs"), "H100", (9, 0), (12, 9), (2, 9))
A100 = replace(HOPPER, gpu="A100", capability=(8, 0))
ADA = replace(HOPPER, gpu="L40S", capability=(8, 9))
BLACKWELL = replace(HOPPER, gpu="B200", capability=(10, 0))
RTX = replace(HOPPER, gpu="RTX 5090", capability=(12, 0))
WITHOUT_ENGINE = replace(HOPPER, transformer_engine=None)

DENSE = Architecture(
    family="qwen3",
    num_layers=28,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    tie_word_embeddings=False,
    qk_layernorm=True,
    add_qkv_bias=False,
    hf_dtype="bfloat16",
)
MOE = replace(
    DENSE, family="qwen3_moe", ffn_hidden_size=768, num_experts=128, num_experts_per_token=8
)
TIED = replace(DENSE, tie_word_embeddings=True)
LLAMA = replace(DENSE, family="llama", qk_layernorm=False)
ODD = replace(DENSE, ffn_hidden_size=3080)

FP8 = "--bf16 --fp8-format hybrid"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
OFFLOAD = "--fine-grained-activation-offloading --offload-modules"
PP4 = "--pipeline-model-parallel-size 4"


def given(flags: str) -> list[str]:
    return ["--hf-model", "m", "--prompts", "p", *flags.split()]


def found(flags: str, machine: Machine, architecture: Architecture | None = DENSE) -> list[str]:
    config, _ = parse(given(flags))
    return problems(config, architecture, machine)


@pytest.mark.parametrize(
    ("flags", "machine", "architecture"),
    [
        ("", CPU, DENSE),
        ("--bf16 --fp32-output-layer", CPU, DENSE),
        (FP8, HOPPER, DENSE),
        (FP8, ADA, DENSE),
        (f"{FP8} --fp8-recipe tensorwise", ADA, DENSE),
        (f"{FP8} --fp8-recipe blockwise --fp8-param-gather", HOPPER, DENSE),
        (f"{FP8} --fp8-recipe blockwise", BLACKWELL, MOE),
        (f"{FP8} --fp8-recipe mxfp8", BLACKWELL, DENSE),
        (f"{FP8} --fp8-recipe tensorwise", RTX, DENSE),
        (f"{FP8} --fp8-recipe tensorwise --first-last-layers-bf16", HOPPER, DENSE),
        (f"{FP8} --tensor-model-parallel-size 8", HOPPER, DENSE),
        (f"{FULL} 7 {PP4}", CPU, DENSE),
        (f"{FULL} 1", CPU, MOE),
        (f"{SELECTIVE} core_attn mlp", CPU, DENSE),
        (f"{SELECTIVE} core_attn moe", CPU, MOE),
        (f"{SELECTIVE} layernorm moe_act", HOPPER, MOE),
        (f"{OFFLOAD} qkv_linear core_attn attn_proj", HOPPER, LLAMA),
        (f"{OFFLOAD} qkv_linear", HOPPER, DENSE),
        (f"{OFFLOAD} mlp_norm expert_fc1 moe_act", HOPPER, MOE),
        ("--bf16 --optimizer-cpu-offload --optimizer-offload-fraction 0.5", HOPPER, DENSE),
    ],
)
def test_what_the_machine_can_do_passes(flags: str, machine: Machine, architecture) -> None:
    assert found(flags, machine, architecture) == []


@pytest.mark.parametrize(
    ("flags", "machine", "architecture", "parts"),
    [
        (FP8, CPU, DENSE, ["--fp8-format hybrid", "on the CPU", "torch sees no GPU", "drop it"]),
        (FP8, WITHOUT_ENGINE, DENSE, ["Transformer Engine", "not installed", "NGC"]),
        (
            "--fp8-format e4m3",
            HOPPER,
            DENSE,
            ["--fp8-format e4m3", "needs --bf16", "add it"],
        ),
        (
            f"{FP8} --transformer-impl local",
            HOPPER,
            DENSE,
            ["--fp8-format hybrid --transformer-impl local", "transformer_engine or auto"],
        ),
        (FP8, A100, DENSE, ["8.9 or more", "A100 has 8.0", "drop --fp8-format"]),
        (
            f"{FP8} --fp8-recipe blockwise",
            ADA,
            DENSE,
            ["blockwise", "9.0 or more", "L40S has 8.9", "use --fp8-recipe delayed or tensorwise"],
        ),
        (
            f"{FP8} --fp8-recipe mxfp8",
            HOPPER,
            DENSE,
            ["10.0 or more and below 12.0", "H100 has 9.0", "delayed or tensorwise or blockwise"],
        ),
        (
            f"{FP8} --fp8-recipe mxfp8",
            RTX,
            DENSE,
            ["10.0 or more and below 12.0", "RTX 5090 has 12.0"],
        ),
        (
            f"{FP8} --fp8-recipe blockwise",
            replace(HOPPER, cuda=(12, 8)),
            DENSE,
            ["CUDA 12.9 on H100", "built for 12.8"],
        ),
        (FP8, replace(ADA, cuda=(12, 0)), DENSE, ["CUDA 12.1 on L40S", "built for 12.0"]),
        (
            f"{FP8} --fp8-recipe tensorwise",
            replace(HOPPER, transformer_engine=(2, 1)),
            DENSE,
            ["tensorwise", "Transformer Engine 2.2", "2.1 is installed"],
        ),
        (
            f"{FP8} --first-last-layers-bf16",
            HOPPER,
            DENSE,
            ["--first-last-layers-bf16 --fp8-recipe delayed", "another recipe"],
        ),
        (
            f"{FP8} --fp8-recipe tensorwise --first-last-layers-bf16 "
            f"--num-layers-at-end-in-bf16 8 {PP4}",
            HOPPER,
            DENSE,
            ["--num-layers-at-end-in-bf16 8", "has 7 layers (28 / 4)"],
        ),
        (
            f"{FP8} --fp8-recipe mxfp8 --fp8-param-gather",
            BLACKWELL,
            DENSE,
            ["--fp8-param-gather --fp8-recipe mxfp8", "drop --fp8-param-gather"],
        ),
        (
            f"{FP8} --fp8-param-gather --no-use-distributed-optimizer",
            HOPPER,
            DENSE,
            ["--fp8-param-gather --no-use-distributed-optimizer", "drop one"],
        ),
        (
            f"{FP8} --fp8-recipe blockwise --fp8-param-gather --optimizer-cpu-offload",
            HOPPER,
            DENSE,
            ["--fp8-param-gather --fp8-recipe blockwise --optimizer-cpu-offload", "delayed"],
        ),
        (FP8, HOPPER, ODD, ["multiples of 16", "ffn_hidden_size 3080", "config.json"]),
        (
            f"{FP8} --fp8-recipe mxfp8 --tensor-model-parallel-size 8",
            BLACKWELL,
            replace(DENSE, ffn_hidden_size=3200),
            ["multiples of 32", "ffn_hidden_size 3200 / 8 ranks"],
        ),
        ("--bf16 --fp32-output-layer", CPU, TIED, ["--fp32-output-layer", "tie_word_embeddings"]),
        (f"{FULL} 8 {PP4}", CPU, DENSE, ["layers 8", "has 7 layers", "at most"]),
        (f"{FULL} 3 {PP4}", CPU, DENSE, ["layers 3", "7 layers of a stage", "use one of 1, 7"]),
        (
            f"{FULL} 2 {PP4} --decoder-first-pipeline-num-layers 4",
            CPU,
            replace(DENSE, num_layers=25),
            ["the 4 and 7 layers of a stage", "use one of 1"],
        ),
        (
            f"{SELECTIVE} layernorm",
            CPU,
            DENSE,
            ["--recompute-modules layernorm", "use core_attn, mlp, moe"],
        ),
        (f"{SELECTIVE} moe_act", WITHOUT_ENGINE, MOE, ["modules moe_act", "Transformer Engine"]),
        (f"{SELECTIVE} layernorm", HOPPER, DENSE, ["layernorm", "inside the linear layer"]),
        (f"{SELECTIVE} mlp", CPU, MOE, ["--recompute-modules mlp", "use moe"]),
        (f"{SELECTIVE} moe", CPU, DENSE, ["--recompute-modules moe", "no experts"]),
        (
            f"{FP8} {SELECTIVE} moe_act",
            HOPPER,
            MOE,
            ["--recompute-modules moe_act --fp8-recipe delayed", "another recipe"],
        ),
        (
            f"{FP8} --fp8-recipe tensorwise {SELECTIVE} layernorm",
            replace(HOPPER, transformer_engine=(2, 5)),
            MOE,
            ["layernorm --fp8-format hybrid", "Transformer Engine 2.6", "2.5"],
        ),
        (
            f"{OFFLOAD} core_attn",
            HOPPER,
            DENSE,
            ["--offload-modules core_attn", "norms of queries and keys", "(qwen3)"],
        ),
        (f"{OFFLOAD} qkv_linear", CPU, DENSE, ["activation-offloading", "on the CPU", "drop it"]),
        (
            f"{OFFLOAD} qkv_linear --transformer-impl local",
            HOPPER,
            DENSE,
            ["activation-offloading --transformer-impl local", "Transformer Engine"],
        ),
        (
            f"{OFFLOAD} qkv_linear",
            replace(HOPPER, transformer_engine=(2, 10)),
            DENSE,
            ["NVTE_CPU_OFFLOAD_V1=1"],
        ),
        (f"{OFFLOAD} mlp_norm", HOPPER, DENSE, ["--offload-modules mlp_norm", "inside the linear"]),
        (f"{OFFLOAD} expert_fc1", HOPPER, DENSE, ["--offload-modules expert_fc1", "no experts"]),
        ("--bf16 --optimizer-cpu-offload", CPU, DENSE, ["--optimizer-cpu-offload", "is already"]),
        (
            "--bf16 --optimizer-cpu-offload",
            WITHOUT_ENGINE,
            DENSE,
            ["--optimizer-cpu-offload", "not installed", "drop it"],
        ),
        (
            "--bf16 --optimizer-cpu-offload --no-use-distributed-optimizer",
            HOPPER,
            DENSE,
            ["--optimizer-cpu-offload --no-use-distributed-optimizer", "drop one"],
        ),
        (
            "--optimizer-cpu-offload",
            HOPPER,
            DENSE,
            ["--optimizer-cpu-offload without --bf16", "resumed", "use --bf16"],
        ),
        (
            "--bf16 --fp32-output-layer --optimizer-cpu-offload",
            HOPPER,
            DENSE,
            ["--optimizer-cpu-offload --fp32-output-layer", "resumed", "drop one"],
        ),
    ],
)
def test_what_it_cannot_do_names_flag_values_and_remedy(
    flags: str, machine: Machine, architecture: Architecture, parts: list[str]
) -> None:
    [message] = found(flags, machine, architecture)
    assert message.startswith("--") and "\n" not in message
    assert all(part in message for part in parts), message


def test_weights_kept_on_the_device_may_be_offloaded_around() -> None:
    machine = replace(HOPPER, transformer_engine=(2, 10), keeps_weights_on_device=True)
    assert found(f"{OFFLOAD} qkv_linear", machine) == []


def test_without_a_model_the_machine_is_checked_all_the_same() -> None:
    assert len(found(f"{FP8} --fp32-output-layer", CPU, None)) == 1


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        ("--fp32-output-layer", "--fp32-output-layer"),
        ("--bf16 --fp8-recipe blockwise", "--fp8-recipe"),
        ("--bf16 --fp8-margin 0", "--fp8-margin"),
        ("--bf16 --fp8-param-gather", "--fp8-param-gather"),
        ("--bf16 --num-layers-at-start-in-bf16 2", "--num-layers-at-start-in-bf16"),
        (f"{FP8} --fp8-recipe blockwise --fp8-amax-history-len 4", "--fp8-amax-history-len"),
        (f"{FP8} --num-layers-at-end-in-bf16 2", "--num-layers-at-end-in-bf16"),
        ("--recompute-method uniform", "--recompute-method"),
        ("--recompute-modules mlp", "--recompute-modules"),
        ("--recompute-granularity selective --recompute-num-layers 1", "--recompute-num-layers"),
        (f"{FULL} 1 --recompute-modules core_attn", "--recompute-modules"),
        ("--offload-modules core_attn", "--offload-modules"),
        ("--optimizer-offload-fraction 0.5", "--optimizer-offload-fraction"),
    ],
)
def test_flags_that_do_nothing_are_errors(flags: str, unused: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(given(flags))
    message = str(caught.value)
    assert message.startswith(f"{unused}: is read with") and "\n" not in message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--recompute-granularity full", ["--recompute-method (is None)", "uniform and 1"]),
        (f"{FULL} 0", ["--recompute-num-layers 0", "at least 1"]),
        ("--fine-grained-activation-offloading", ["needs --offload-modules"]),
        (f"{OFFLOAD} attn_proj", ["attn_proj", "add core_attn"]),
        (f"{FULL} 1 {OFFLOAD} core_attn", ["--recompute-granularity full", "drop one of both"]),
        (
            f"{SELECTIVE} core_attn {OFFLOAD} core_attn",
            ["--recompute-modules core_attn --offload-modules core_attn", "drop one of both"],
        ),
        (
            f"{SELECTIVE} moe {OFFLOAD} moe_act",
            ["--recompute-modules moe --offload-modules moe_act"],
        ),
        ("--optimizer-cpu-offload --optimizer-offload-fraction 0", ["fraction 0", "at most 1"]),
        (f"{FP8} --fp8-amax-history-len 0", ["--fp8-amax-history-len 0", "at least 1"]),
    ],
)
def test_settings_at_odds_are_refused_on_any_machine(flags: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(given(flags))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_modules_are_needed_to_be_computed_again() -> None:
    with pytest.raises(ConfigError, match="selective needs at least one of core_attn, moe_act"):
        MemoryConfig("selective", recompute_modules=())


@pytest.mark.parametrize(
    ("numbers", "multiple"),
    [
        (PrecisionConfig(), 1),
        (PrecisionConfig(fp8_format="hybrid"), 16),
        (PrecisionConfig(fp8_format="e4m3", fp8_recipe="blockwise"), 16),
        (PrecisionConfig(fp8_format="e4m3", fp8_recipe="mxfp8"), 32),
    ],
)
def test_rows_are_what_transformer_engine_takes(numbers: PrecisionConfig, multiple: int) -> None:
    assert numbers.row_multiple == multiple


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    flags = make_tiny_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield [*flags, "--device", "cpu"]
    if visible is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def test_a_run_hears_of_all_of_them_at_once_before_it_starts(tiny: list[str]) -> None:
    flags = "--fp8-format hybrid --optimizer-cpu-offload --recompute-granularity selective"
    config, _ = parse([*tiny, *flags.split(), "--recompute-modules", "moe"])
    with pytest.raises(ConfigError) as caught:
        preflight(config, 1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for flag in ("--fp8-format", "needs --bf16", "--optimizer-cpu-offload", "moe", "multiples"):
        assert any(flag in line for line in lines), flag
    assert not Path("out").exists()


def test_this_machine_is_seen_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"transformer-engine": "2.9.0+70f53666"}
    monkeypatch.setattr(hardware.importlib.metadata, "version", installed.__getitem__)
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    machine = look(CPU.device)
    assert machine.transformer_engine == (2, 9) and machine.keeps_weights_on_device
    assert machine.gpu is None and machine.capability is None
