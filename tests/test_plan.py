"""Plans against models that are really built, published figures and closed forms."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_drpo.checkpoint.families import Architecture, read_architecture
from megatron_drpo.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_drpo.device import Device
from megatron_drpo.plan.advice import Texts, warnings
from megatron_drpo.plan.job import Job, Rows
from megatron_drpo.plan.layouts import Shape, flags_of, nearest, possible, problems, stage_layers
from megatron_drpo.plan.memory import fullest, memory, slots
from megatron_drpo.plan.sizes import count, parameters
from megatron_drpo.plan.speed import Machines, bubble, mfu, speed, training_flops
from megatron_drpo.plan.traffic import collectives
from tests.distributed import renew_world, run_distributed
from tests.published_configs import PUBLISHED
from tests.tiny_models import save_tiny

QWEN3_30B = PUBLISHED["Qwen3-30B-A3B"][1]
QWEN3_235B = replace(
    QWEN3_30B,
    num_layers=94,
    hidden_size=4096,
    ffn_hidden_size=1536,
    num_attention_heads=64,
)
LLAMA_8B = PUBLISHED["Llama-3.1-8B"][1]
SMALL = Architecture(
    family="llama",
    num_layers=8,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=64,
    max_position_embeddings=4096,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    tie_word_embeddings=False,
    qk_layernorm=False,
    add_qkv_bias=False,
    hf_dtype="float32",
)
EXPERTS = replace(
    SMALL,
    family="qwen3_moe",
    qk_layernorm=True,
    num_experts=8,
    num_experts_per_token=2,
    normalize_router_weights=True,
)


def config(
    *, prompts: int = 64, updates: int = 1, budget: int = 1024, response: int = 768, **groups: Any
) -> Config:
    groups = {"parallel": ParallelConfig(), "objective": ObjectiveConfig()} | groups
    return Config(
        model=groups.pop("model", ModelConfig(hf_model="none")),
        data=DataConfig(prompts="none"),
        rollout=RolloutConfig(
            rollout_prompts_per_step=prompts,
            rollout_samples_per_prompt=2,
            rollout_max_response_length=response,
        ),
        train=TrainConfig(updates_per_rollout=updates, max_tokens_per_microbatch=budget),
        **groups,
    )


def layout(
    tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, vp: int = 1, **others: Any
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        num_virtual_stages_per_pipeline_rank=vp,
        **others,
    )


def job(
    architecture: Architecture = SMALL, world_size: int = 1, *, gpu: bool = True, **settings: Any
) -> Job:
    return Job(
        architecture, config(**settings), world_size, gpu=gpu, transformer_engine=gpu,
        prompt_length=256,
    )  # fmt: skip


# --- Layouts ------------------------------------------------------------------------------------


def splits(total: int, stages: int, chunks: int) -> bool:
    return total % (stages * chunks) == 0


@pytest.mark.parametrize("architecture", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_a_layout_is_possible_exactly_if_everything_divides(architecture: Architecture) -> None:
    """Every (TP, PP, VPP, CP, EP) of 8 ranks, against the rules written out once more."""
    world, num_possible = 8, 0
    sizes = (1, 2, 3, 8)
    for tp, pp, vp, cp, ep in itertools.product((*sizes, 4), sizes, (1, 2), (1, 2), sizes):
        if vp > 1 and pp == 1:
            continue
        ours = config(parallel=layout(tp, pp, cp, ep, vp, sequence_parallel=tp > 1), prompts=8)
        fits = world % (tp * pp * cp) == 0 and world % (tp * ep * pp) == 0
        fits = fits and 8 % tp == 0 and 4 % tp == 0 and 48 % tp == 0 and splits(8, pp, vp)
        fits = fits and (8 % ep == 0 if architecture.num_experts else ep == 1)
        assert (not problems(ours, world, architecture)) == fits, (tp, pp, vp, cp, ep)
        num_possible += fits
    assert num_possible > 8


@pytest.mark.parametrize(
    ("first", "last", "stages", "chunks", "expected"),
    [
        (None, None, 4, 1, (2, 2, 2, 2)),
        (1, None, 2, 1, (1, 7)),
        (1, 1, 4, 1, (1, 3, 3, 1)),
        (2, 2, 4, 2, (2, 2, 2, 2)),
        (None, 2, 4, 1, (2, 2, 2, 2)),
        (3, None, 4, 1, None),  # 5 over 3
        (4, 4, 3, 1, None),  # nothing for the middle
        (3, 4, 2, 1, None),  # one left for nobody
        (1, 1, 4, 2, None),  # half a layer
        (9, None, 2, 1, None),
    ],
)
def test_uneven_stages(
    first: int | None,
    last: int | None,
    stages: int,
    chunks: int,
    expected: tuple[int, ...] | None,
) -> None:
    parallel = layout(
        pp=stages,
        vp=chunks,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )
    if expected is not None:
        assert stage_layers(parallel, 8) == expected
        return
    with pytest.raises(ValueError):
        stage_layers(parallel, 8)
    (message,) = problems(config(parallel=parallel, prompts=stages), stages, SMALL)
    assert "num_layers 8" in message and f"--pipeline-model-parallel-size {stages}" in message
    assert "nearest possible layouts" in message or "no layout" in message


@pytest.mark.parametrize(
    ("parallel", "world", "architecture", "parts"),
    [
        (layout(tp=3), 3, SMALL, ["size 3", "heads 8", "groups 4", "use one of 1, 2, 4"]),
        (layout(tp=2), 3, SMALL, ["size 2", "multiple of 2", "are 3", "--nproc-per-node 2"]),
        (layout(ep=3), 6, EXPERTS, ["size 3", "num_experts 8", "1, 2, 4, 8"]),
        (layout(ep=4), 2, EXPERTS, ["size 4", "multiple of 4", "are 2", "of 1, 2"]),
        (layout(tp=2), 2, EXPERTS, ["size 2", "8 experts", "add --sequence-parallel"]),
        (layout(ep=2), 2, SMALL, ["size 2", "no experts"]),
        (layout(expert_tensor_parallel_size=2), 2, SMALL, ["--expert-tensor-parallel-size 2"]),
        (
            layout(expert_tensor_parallel_size=32),
            32,
            EXPERTS,
            ["--expert-tensor-parallel-size 32", "ffn_hidden_size 48", "24"],
        ),
        (layout(cp=8), 8, SMALL, ["size 8", "16 pieces", "microbatch 8", "at most 4"]),
        (
            layout(tp=2, ep=3, expert_tensor_parallel_size=1, sequence_parallel=True),
            6,
            replace(EXPERTS, num_experts=9),
            ["--tensor-model-parallel-size 2", "--expert-model-parallel-size 3", "neither 2 nor"],
        ),
    ],
)
def test_what_is_impossible_names_flags_both_numbers_and_a_way_out(
    parallel: ParallelConfig, world: int, architecture: Architecture, parts: list[str]
) -> None:
    budget = 8 if parallel.context_parallel_size > 1 else 1024
    ours = config(parallel=parallel, prompts=world, budget=budget, response=4)
    (message,) = problems(ours, world, architecture)
    assert all(part in message for part in parts), message
    near = nearest(ours, world, architecture)
    text = [flags_of(found, parallel) for found in near[:3]]
    assert text and all(flags in message for flags in text)
    for found in near[:3]:
        assert not problems(replace(ours, parallel=found), world, architecture)


def test_the_nearest_layout_changes_least() -> None:
    ours = config(parallel=layout(tp=8, pp=2), prompts=16)
    found = nearest(ours, 16, SMALL)
    assert (found[0].tensor_model_parallel_size, found[0].pipeline_model_parallel_size) == (4, 2)
    (message,) = problems(ours, 16, SMALL)
    assert "--tensor-model-parallel-size 4 (TP 4 x PP 2 x DP 2)" in message
    # Every one of 7 ranks' layouts breaks the number of prompts.
    impossible = problems(config(prompts=16), 7, SMALL)
    assert "no layout of 7 ranks is possible" in impossible[-1]
    assert "--rollout-prompts-per-step 16" in impossible[0] and "7 replicas" in impossible[0]


def test_a_frozen_model_is_split_but_not_trained() -> None:
    ours = config(parallel=layout(tp=2), prompts=2)
    assert not problems(ours, 2, SMALL, EXPERTS)  # needs no sequence parallelism
    odd = replace(SMALL, num_query_groups=1)
    (message,) = problems(ours, 2, SMALL, odd)
    assert "num_query_groups 1 of the reference model" in message


@pytest.mark.parametrize("architecture", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_megatron_accepts_whatever_is_possible(architecture: Architecture) -> None:
    """Its configuration checks itself; its own count of layers is that of the plan."""
    from megatron_drpo.config import PrecisionConfig
    from megatron_drpo.mcore.model import transformer_config  # isort: skip
    from megatron.core.transformer.transformer_block import get_num_layers_to_build  # isort: skip

    ours = config(parallel=layout(), prompts=16)
    device, found = Device("cpu", "gloo", 0, "test"), 0
    for parallel in possible(ours, 16, architecture):
        shape = Shape.of(parallel, 16)
        there: Any = SimpleNamespace(
            tp_size=shape.tp, pp_size=shape.pp, vp_size=shape.vp, cp_size=shape.cp,
            dp_size=shape.dp, ep_size=shape.ep, etp_size=shape.etp,
            sequence_parallel=shape.sequence_parallel,
            first_stage_layers=parallel.decoder_first_pipeline_num_layers,
            last_stage_layers=parallel.decoder_last_pipeline_num_layers,
        )  # fmt: skip
        made = transformer_config(
            architecture, ours.model, there, device, PrecisionConfig(), MemoryConfig()
        )
        layers = stage_layers(parallel, architecture.num_layers)
        for stage, expected in enumerate(layers):
            chunk = 0 if shape.vp > 1 else None
            assert get_num_layers_to_build(made, chunk, stage) * shape.vp == expected
        found += 1
    assert found > 50


# --- Parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "whole", "active"),
    [
        # The publishers' figures, in billions.
        (QWEN3_30B, 30.5, 3.3),
        (QWEN3_235B, 235, 22),
        (LLAMA_8B, 8.03, 8.03),
        (PUBLISHED["Mixtral-8x7B-v0.1"][1], 46.7, 12.9),
    ],
    ids=["Qwen3-30B-A3B", "Qwen3-235B-A22B", "Llama-3.1-8B", "Mixtral-8x7B"],
)
def test_published_models_have_as_many_parameters(
    architecture: Architecture, whole: float, active: float
) -> None:
    assert count(architecture) / 1e9 == pytest.approx(whole, rel=0.002)
    assert count(architecture, active=True) / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_parameters_are_those_of_the_stored_model(family: str, tie: bool, tmp_path: Path) -> None:
    stored = save_tiny(tmp_path, family, tie=tie)
    assert count(read_architecture(tmp_path)) == sum(tensor.numel() for tensor in stored.values())


BUILT = [
    (SMALL, layout()),
    (replace(SMALL, tie_word_embeddings=True, vocab_size=61), layout(tp=2)),
    (replace(SMALL, tie_word_embeddings=True), layout(pp=2)),
    (SMALL, layout(tp=2, pp=2, vp=2)),
    (SMALL, layout(pp=4, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=3)),
    (replace(SMALL, add_qkv_bias=True, family="qwen2", vocab_size=61), layout(tp=4)),
    (EXPERTS, layout(ep=4)),
    (EXPERTS, layout(tp=2, ep=2, sequence_parallel=True)),
    (EXPERTS, layout(tp=2, ep=4, expert_tensor_parallel_size=1, sequence_parallel=True)),
    (EXPERTS, layout(pp=2, ep=2)),
]


def _count_built(rank: int, world_size: int, directory: str) -> None:
    from megatron_drpo.mcore import parallel
    from megatron_drpo.mcore.model import build_model

    device = Device("cpu", "gloo", 0, "test")
    for number, (architecture, ours) in enumerate(BUILT):
        if number:
            renew_world(Path(directory))
        here = parallel.initialize(ours, device, 0)
        models = build_model(architecture, ModelConfig(hf_model="none"), here, device)
        sizes = {"dense": 0, "experts": 0, "largest": 0}
        for model in models:
            for name, parameter in model.named_parameters():
                kind = "experts" if ".experts." in name else "dense"
                sizes[kind] += parameter.numel()
                sizes["largest"] = max(sizes["largest"], parameter.numel())
        shape = Shape.of(ours, world_size)
        stages = parameters(architecture, shape, stage_layers(ours, architecture.num_layers))
        planned = stages[here.pp_rank]
        found = {name: getattr(planned, name) for name in sizes}
        assert found == sizes, (rank, ours, found, sizes)
        parallel.destroy(here)


@pytest.mark.distributed
def test_parameters_of_a_rank_are_those_that_megatron_builds(tmp_path: Path) -> None:
    run_distributed(_count_built, 4, str(tmp_path))


# --- Rows and memory ----------------------------------------------------------------------------


def test_rows_hold_whole_sequences_and_no_more_than_the_budget() -> None:
    # 128 sequences of 1,024 tokens on 4 replicas, four in a row of 4,096.
    assert job(world_size=4, budget=4096 + 1000).rows == Rows(8, 4096, 4, 1024)
    assert job(world_size=4, budget=1024).rows == Rows(32, 1024, 1, 1024)
    # An update has 2 sequences for each replica: rows need not be as long as they may.
    assert job(world_size=4, updates=16, budget=1 << 20).rows == Rows(1, 2048, 2, 1024)
    # 3 rows of 3 would do; the interleaved pipeline takes them in pairs.
    assert job(parallel=layout(pp=2, vp=2), world_size=2, prompts=4, budget=3072).rows.count == 4
    # Sequences of 1,022 tokens are padded to a multiple of 2 cp, rows to one of cp * 16.
    split = replace(job(parallel=layout(cp=4), world_size=4), prompt_length=254)
    assert split.rows == Rows(128, 1024, 1, 1024)


def test_what_is_held_is_bytes_per_parameter() -> None:
    """fp32: 4 + 4 + 8; bf16: 2 + 4 + 12 of which the optimizer's part is shared out."""
    size = count(SMALL)
    (stage,) = memory(job(world_size=1))
    assert (stage.weights, stage.gradients, stage.optimizer) == (4 * size, 4 * size, 8 * size)
    bf16 = ModelConfig(hf_model="none", bf16=True)
    (stage,) = memory(job(world_size=4, model=bf16))
    assert (stage.weights, stage.gradients) == (2 * size, 4 * size)
    assert stage.optimizer == 12 * -(-size // 4)
    alone = OptimizerConfig(use_distributed_optimizer=False)
    assert memory(job(world_size=4, model=bf16, optimizer=alone))[0].optimizer == 12 * size
    host = OptimizerConfig(optimizer_cpu_offload=True, optimizer_offload_fraction=0.75)
    assert memory(job(world_size=1, model=bf16, optimizer=host))[0].optimizer == 3 * size


def test_optimizer_state_is_shared_out_over_who_holds_the_same() -> None:
    shape = dict(tp=2, cp=2, ep=4, expert_tensor_parallel_size=1, sequence_parallel=True)
    planned = job(EXPERTS, 16, parallel=layout(**shape))
    (stage,) = memory(planned)
    assert (planned.shape.dp, planned.shape.num_replicas, planned.shape.edp) == (4, 8, 4)
    own = stage.parameters
    assert own.experts == 8 * 2 * 3 * 32 * 48  # layers, experts, matrices
    assert stage.optimizer == 8 * (-(-own.dense // 8) + own.experts // 4)


@pytest.mark.parametrize(
    ("pp", "vp", "rows", "expected"),
    [
        (1, 1, 8, [1]),
        (4, 1, 8, [4, 3, 2, 1]),
        (4, 1, 2, [2, 2, 2, 1]),
        # 2 * (stages after) + (chunks - 1) * stages + 1 chunks of a half each.
        (4, 2, 8, [11 / 2, 9 / 2, 7 / 2, 5 / 2]),
        (4, 2, 4, [8 / 2, 8 / 2, 7 / 2, 5 / 2]),
    ],
)
def test_micro_batches_in_flight(pp: int, vp: int, rows: int, expected: list[float]) -> None:
    planned = job(parallel=layout(pp=pp, vp=vp), world_size=pp, prompts=4 * rows, budget=8192)
    planned = replace(planned, config=config(
        parallel=layout(pp=pp, vp=vp), prompts=rows // 2 or 1, budget=1024
    ))  # fmt: skip
    assert planned.rows.count == rows
    assert [stage.in_flight for stage in memory(planned)] == expected


def test_recomputation_keeps_the_input_of_every_so_many_layers() -> None:
    full: dict[str, Any] = {"recompute_granularity": "full"}
    every = memory(job())[0].kept
    ends = 2 * 1024 * 32 * 4  # the final norm
    layer = (every - ends) // 8
    stream = 1024 * 32 * 4

    def kept(method: str, layers: int) -> int:
        setting = MemoryConfig(**full, recompute_method=method, recompute_num_layers=layers)
        return memory(job(memory=setting))[0].kept - ends

    assert kept("uniform", 1) == 8 * stream
    assert kept("uniform", 4) == 2 * stream
    assert kept("block", 3) == 3 * stream + 5 * layer
    assert layer > 10 * stream
    selective = MemoryConfig(recompute_granularity="selective", recompute_modules=("mlp",))
    gone = (32 + 3 * 48) * 1024 * 4  # the MLP's input, gate and up, their product
    assert memory(job(memory=selective))[0].kept - ends == 8 * (layer - gone)


def test_sequence_and_context_parallelism_split_what_is_kept() -> None:
    whole = memory(job(world_size=1))[0].kept
    assert memory(job(world_size=2, parallel=layout(cp=2)))[0].kept == whole // 2
    plain = memory(job(world_size=2, parallel=layout(tp=2)))[0].kept
    both = memory(job(world_size=2, parallel=layout(tp=2, sequence_parallel=True)))[0].kept
    # Rotary tables are the only part that TP halves neither alone nor with SP.
    rotary = 8 * 4 * 1024 * 8 * 4
    assert both == (whole + rotary) // 2 < plain < whole


def test_scores_are_held_without_flash_attention_only() -> None:
    scores = 8 * 8 * 1024 * 1024 * 4  # layers, heads
    flash, local = memory(job())[0], memory(replace(job(), transformer_engine=False))[0]
    assert 0 < local.kept - flash.kept - scores < 0.2 * scores  # and a mask


def test_the_kv_cache_and_training_take_turns() -> None:
    planned = job(prompts=64)
    (stage,) = memory(planned)
    assert slots(planned) == 128
    # keys and values, layers, slots, positions, groups, channels, fp32
    assert stage.kv_cache == 2 * 8 * 128 * 1024 * 4 * 8 * 4
    assert stage.peak == stage.held + max(stage.kv_cache, stage.kept + stage.working, stage.update)
    assert memory(replace(planned, generates=False))[0].kv_cache == 0


def test_a_reference_model_is_held_in_the_layout_of_the_policy() -> None:
    ours = replace(job(world_size=2, parallel=layout(pp=2)), reference=SMALL)
    for stage in memory(ours):
        assert stage.others == 4 * stage.parameters.total


# --- Messages and time --------------------------------------------------------------------------


def sent(planned: Job) -> dict[tuple[str, str], tuple[int, int]]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for c in collectives(planned):
        count_, size = found.get((c.kind, c.group), (0, 0))
        found[c.kind, c.group] = (count_ + c.count, size + c.bytes)
    return found


def test_one_rank_says_nothing() -> None:
    assert collectives(job()) == []


def test_collectives_of_a_dense_layer() -> None:
    """64 micro-batches of 1,024 tokens: scored, then trained in one update."""
    hidden, m, layers = 1024 * 32 * 4, 128, 8
    tensor = sent(job(world_size=2, parallel=layout(tp=2)))
    # Forward 2 in scoring and in training, backward 2; embedding twice, output layer once.
    times = m * layers * 6 + m * 3
    assert tensor["all-reduce", "TP"] == (times, times * hidden)  # 2 (g - 1) / g = 1
    both = sent(job(world_size=2, parallel=layout(tp=2, sequence_parallel=True)))
    gathers, scatters = m * layers * (2 + 2 + 4) + 3 * m, m * layers * 6 + 3 * m
    assert both["all-gather", "TP"] == (gathers, gathers * hidden // 2)
    assert both["reduce-scatter", "TP"] == (scatters, scatters * hidden // 2)
    full = MemoryConfig(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    again = sent(job(world_size=2, parallel=layout(tp=2), memory=full))
    assert again["all-reduce", "TP"][0] == times + m * layers * 2


def test_collectives_of_replicas_pipelines_and_contexts() -> None:
    size = count(SMALL)
    data = sent(job(world_size=4, updates=2))
    assert data["reduce-scatter", "DP"] == (2, 2 * size * 4 * 3 // 4)
    assert data["all-gather", "DP"] == (2, 2 * size * 4 * 3 // 4)
    pipe = sent(job(world_size=2, parallel=layout(pp=2)))
    assert pipe["send", "PP"] == (3 * 128, 3 * 128 * 1024 * 32 * 4)
    context = sent(job(world_size=2, parallel=layout(cp=2)))
    keys = 1024 * 2 * 32 * 4  # of the whole row
    assert context["all-gather", "CP"] == (128 * 8 * 2, 128 * 8 * 2 * keys // 2)
    assert context["reduce-scatter", "CP"] == (128 * 8, 128 * 8 * keys // 2)


def test_collectives_of_experts() -> None:
    hidden, m, layers = 1024 * 32 * 4, 32, 8
    found = sent(job(EXPERTS, 4, parallel=layout(ep=4)))
    # Scoring, forward, backward: there and back, two experts for each token, three of four away.
    times = m * layers * 3 * 2
    assert found["all-to-all", "EP"] == (times, times * 2 * hidden * 3 // 4)
    assert ("reduce-scatter", "EDP") not in found
    parts = layout(tp=2, ep=2, sequence_parallel=True)
    split = sent(job(EXPERTS, 4, parallel=parts))
    # Half of the tokens on each rank; both ranks of an expert see all of them.
    times = 64 * layers * 3
    assert split["all-gather", "ETP"] == (times, times * 2 * hidden // 2)
    assert split["all-to-all", "EP"] == (2 * times, 2 * times * hidden // 2)


def test_operations_are_6_per_active_parameter_and_12_per_seen_pair() -> None:
    """Megatron-LM's count: without embedding, norms and biases; half of all pairs are seen."""
    lengths = [1000, 3000]
    embedding = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    norms = LLAMA_8B.hidden_size * (2 * LLAMA_8B.num_layers + 1)
    weights = count(LLAMA_8B) - embedding - norms
    pairs = sum(length**2 for length in lengths) / 2
    expected = 6 * weights * 4000 + 12 * LLAMA_8B.num_layers * LLAMA_8B.query_size * pairs
    assert training_flops(LLAMA_8B, lengths) == pytest.approx(expected, rel=1e-12)
    prompts_left_out = training_flops(LLAMA_8B, lengths, loss_tokens=2500)
    assert expected - prompts_left_out == pytest.approx(6 * embedding * 1500, rel=1e-9)
    qwen = training_flops(QWEN3_30B, [1]) / 6
    assert qwen == pytest.approx(count(QWEN3_30B, active=True) - 151936 * 2048, rel=1e-3)
    # 400 TFLOP/s of 8 * 1,000.
    assert mfu(4e15, 10.0, 8, 1000.0) == pytest.approx(0.05)


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 1), (4, 8, 2), (2, 2, 1), (1, 4, 1)])
def test_the_bubble_is_what_a_schedule_leaves(p: int, m: int, v: int) -> None:
    """All of a stage's work takes m; the first chunk of the last stage starts (p - 1) / v late."""
    planned = job(parallel=layout(pp=p, vp=v), world_size=p, prompts=m // 2)
    assert planned.rows.count == m
    fill = (p - 1) / v
    assert bubble(planned) == pytest.approx(fill / (m + fill))


def test_time_is_operations_at_the_assumed_share_of_the_peak_and_messages() -> None:
    machines = Machines(peak_tflops=100.0, efficiency=0.5)
    alone = speed(job(LLAMA_8B), machines)
    flops = 128 * training_flops(LLAMA_8B, [1024], loss_tokens=768)
    assert alone.flops == pytest.approx(flops)
    assert alone.seconds == pytest.approx(4 / 3 * flops / 50e12)
    assert alone.mfu == pytest.approx(0.5 * 3 / 4)
    assert alone.tokens_per_second == pytest.approx(128 * 1024 / alone.seconds)
    full = MemoryConfig(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    again = speed(job(LLAMA_8B, memory=full), machines)
    assert again.seconds == pytest.approx(5 / 3 * flops / 50e12)
    split = job(LLAMA_8B, 2, parallel=layout(tp=2))
    total = sum(size for _, size in sent(split).values())
    inside, outside = (
        speed(split, replace(machines, gpus_per_node=each, node_gbytes=100.0, network_gbytes=10.0))
        for each in (2, 1)
    )
    assert inside.messages == pytest.approx(total / 100e9)
    assert outside.messages == pytest.approx(total / 10e9)
    assert inside.seconds == pytest.approx(2 / 3 * flops / 50e12 + total / 100e9)


# --- Warnings -----------------------------------------------------------------------------------


def test_what_is_odd_is_said_and_nothing_else() -> None:
    quiet = Texts(eos_id=2, stop_ids=(2, 7), has_chat_template=False, plain_prompt="1+1=")
    assert warnings(job(), quiet) == []
    assert warnings(job(world_size=4, parallel=layout(pp=4)), quiet) == []

    def only(planned: Job, texts: Texts = quiet) -> str:
        (found,) = warnings(planned, texts)
        return found

    found = only(job(), replace(quiet, eos_id=5))
    assert "--rollout-stop-ids" in found and "id 5" in found and "2 7" in found
    found = only(job(), replace(quiet, has_chat_template=True))
    assert "--apply-chat-template" in found and "'1+1='" in found
    stored = replace(SMALL, hf_dtype="bfloat16")
    assert "--bf16" in only(job(stored)) and warnings(job(stored, gpu=False), quiet) == []
    few = only(job(world_size=4, parallel=layout(pp=4), prompts=2))
    assert "4 micro-batch(es)" in few and f"{3 / 7:.0%}" in few
    idle = only(job(world_size=8, prompts=8, updates=4))
    assert "4 sequences for 8 data-parallel replicas" in idle
    short = only(replace(job(world_size=8, parallel=layout(cp=8)), prompt_length=8))
    assert "pieces of 48" in short
    assert "--sequence-parallel" in only(job(world_size=2, parallel=layout(tp=2)))
    starved = only(job(replace(EXPERTS, num_experts=64)))
    assert "32 tokens" in starved and "--expert-model-parallel-size 1" in starved


def test_fullest_is_the_stage_that_needs_most() -> None:
    planned = job(world_size=4, parallel=layout(pp=4))
    assert fullest(memory(replace(planned, generates=False))).stage == 0  # most in flight
    assert fullest(memory(planned)).stage == 3  # equal caches, and the final norm
