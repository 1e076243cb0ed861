"""`--verify-layout`: every layout computes what one rank does, and one that does not is found out.

The matrix goes through the program's own functions in one start of four processes: one rank makes
each batch and measures it one sequence at a time, then all of them measure it under each layout.
What is broken on purpose stands beside it, in the same start.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_drpo.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_drpo.types import Prompt
from tests.distributed import run_distributed
from tests.tiny_models import VOCAB, save_tiny, tiny_model

WORLD = 4
TOLERANCE = 1e-5
BF16_TOLERANCE = 0.05

OBJECTIVES = {
    "drpo": ObjectiveConfig(drpo_delta=0.5),
    "sequences": ObjectiveConfig(
        objective="gspo",
        gspo_clip_low=0.02,
        gspo_clip_high=0.02,
        sequence_mask="geometric",
        sequence_mask_low=0.95,
        sequence_mask_high=1.05,
        kl_coef=0.3,
        kl_estimator="full",
        entropy_coef=0.1,
    ),
    "distributions": ObjectiveConfig(
        drpo_penalty="full",
        drpo_delta=0.3,
        kl_coef=0.2,
        proximal_policy="trainer",
        tis_limit=1.05,
        icepop_low=0.9,
        icepop_high=1.1,
        loss_aggregation="token-mean",
    ),
    "topk": ObjectiveConfig(
        objective="dppo_topk_kl",
        dppo_delta_low=0.3,
        dppo_delta_high=0.3,
        loss_aggregation="seq-mean-token-mean",
    ),
}


@dataclass(frozen=True)
class Task:
    """What a layout computes; by default rows of several sequences, and distributed Adam."""

    model: str
    objective: str = "drpo"
    bf16: bool = False
    budget: int = 64
    distributed_optimizer: bool = True
    truncated: bool = False
    replay: Literal["off", "rollout", "score"] = "off"

    @property
    def batch(self) -> tuple[object, ...]:
        """What the reference depends on."""
        return self.model, self.objective, self.bf16, self.truncated, self.replay

    def __str__(self) -> str:
        words = [self.model]
        words += [self.objective] if self.objective != "drpo" else []
        words += [name for name in ("bf16", "truncated") if getattr(self, name)]
        words += [f"{self.replay}-routing"] if self.replay != "off" else []
        words += [f"rows{self.budget}"] if self.budget != 64 else []
        return "-".join(words + ["plain"] * (not self.distributed_optimizer))


def layout(tp: int = 1, pp: int = 1, vp: int = 1, ep: int = 1, **others: Any) -> ParallelConfig:
    return ParallelConfig(tp, pp, vp, ep, **others)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {"tie": True}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"tie": True}),
}
DENSE, EXPERTS = Task("qwen3"), Task("mixtral")
ALL_OBJECTIVES = [Task("qwen3", name) for name in OBJECTIVES if name != "drpo"]
SP = {"sequence_parallel": True}
CP2, WHOLE = {"context_parallel_size": 2}, {"expert_tensor_parallel_size": 1}
# The ranks that a layout leaves are data-parallel.
MATRIX: dict[str, tuple[ParallelConfig, list[Task]]] = {
    "dp4": (
        layout(),
        [
            Task("qwen3", budget=24),
            Task("qwen3", budget=200),
            Task("qwen3", distributed_optimizer=False),
            EXPERTS,
        ],
    ),
    "tp2": (
        layout(2),
        [DENSE, Task("llama"), Task("qwen2"), *ALL_OBJECTIVES, Task("qwen3", truncated=True)],
    ),
    "tp4": (layout(4), [Task("qwen3", budget=24)]),
    "tp2-sp": (layout(2, **SP), [DENSE, Task("qwen2"), EXPERTS, Task("qwen3", bf16=True)]),
    "tp4-sp": (layout(4, **SP), [Task("llama", budget=24)]),
    "pp2": (layout(1, 2), [DENSE, Task("llama", distributed_optimizer=False), Task("qwen3_moe")]),
    "pp4": (layout(1, 4), [Task("qwen3", budget=24)]),
    "pp2-1+3": (layout(1, 2, decoder_first_pipeline_num_layers=1), [DENSE]),
    "tp2-pp2-3+1": (layout(2, 2, decoder_last_pipeline_num_layers=1), [Task("llama")]),
    "pp2-vp2": (layout(1, 2, 2), [DENSE, Task("llama")]),
    "tp2-pp2": (layout(2, 2), [DENSE, Task("qwen2"), Task("qwen3", bf16=True)]),
    "tp2-sp-pp2-vp2": (layout(2, 2, 2, **SP), [Task("llama", budget=24), EXPERTS]),
    "cp2": (
        layout(**CP2),
        [
            Task("qwen3", budget=24),
            Task("qwen3", budget=200),
            *ALL_OBJECTIVES,
            Task("qwen3", truncated=True),
            Task("mistral"),
            EXPERTS,
        ],
    ),
    "cp4": (layout(context_parallel_size=4), [Task("qwen3"), Task("mistral")]),
    "tp2-cp2": (layout(2, **CP2), [Task("llama")]),
    "tp2-sp-cp2": (layout(2, **SP, **CP2), [DENSE, Task("mistral"), Task("qwen3", bf16=True)]),
    "pp2-cp2": (layout(1, 2, **CP2), [Task("llama"), Task("qwen3", distributed_optimizer=False)]),
    "pp2-vp2-cp2": (layout(1, 2, 2, **CP2), [Task("qwen3", "sequences")]),
    "ep2": (layout(ep=2), [EXPERTS, Task("mixtral", distributed_optimizer=False)]),
    "ep4": (layout(ep=4), [Task("mixtral", budget=24), Task("mixtral", bf16=True)]),
    "pp2-ep2": (layout(1, 2, ep=2), [EXPERTS, Task("qwen3_moe")]),
    "pp2-vp2-ep2": (layout(1, 2, 2, ep=2), [Task("mixtral", budget=24)]),
    "cp2-ep2": (layout(ep=2, **CP2), [EXPERTS, Task("mixtral", replay="score")]),
    "etp2": (layout(expert_tensor_parallel_size=2), [EXPERTS]),
    "etp2-ep2": (layout(ep=2, expert_tensor_parallel_size=2), [EXPERTS]),
    "tp2-sp-ep2": (
        layout(2, ep=2, **SP),
        [EXPERTS, Task("qwen3_moe"), Task("mixtral", replay="rollout")],
    ),
    "tp2-sp-ep4-etp1": (layout(2, ep=4, **SP, **WHOLE), [EXPERTS]),
    "tp2-sp-pp2-ep2-etp1": (layout(2, 2, ep=2, **SP, **WHOLE), [Task("qwen3_moe")]),
    "tp2-sp-cp2-ep2-etp1": (layout(2, ep=2, **SP, **CP2, **WHOLE), [EXPERTS]),
}
CASES = [(name, task) for name, (_, tasks) in MATRIX.items() for task in tasks]


def config_of(root: Path, task: Task, sizes: ParallelConfig) -> Config:
    objective = OBJECTIVES[task.objective]
    other = str(root / "other") if objective.kl_coef else None
    return Config(
        model=ModelConfig(str(root / task.model), transformer_impl="local", bf16=task.bf16),
        parallel=sizes,
        data=DataConfig(prompts="unused"),
        rollout=RolloutConfig(
            rollout_prompts_per_step=6,
            rollout_samples_per_prompt=2,
            rollout_max_response_length=12,
            rollout_temperature=0.8,
            rollout_topk=5 if task.objective == "topk" else 0,
            rollout_top_k=20 if task.truncated else 0,
        ),
        moe=MoEConfig(moe_routing_replay=task.replay),
        objective=replace(objective, reference_model=other),
        optimizer=OptimizerConfig(use_distributed_optimizer=task.distributed_optimizer),
        train=TrainConfig(max_tokens_per_microbatch=task.budget, updates_per_rollout=1),
    )


def inputs_of(config: Config, rank: int) -> Any:
    from megatron_drpo.checkpoint.families import read_architecture
    from megatron_drpo.device import Device
    from megatron_drpo.preflight import Inputs

    generator = torch.Generator().manual_seed(2)
    prompts = [
        Prompt(f"p{n}", "", torch.randint(3, VOCAB, (n % 5 + 1,), generator=generator), None)
        for n in range(6)
    ]
    source, reference = Path(str(config.model.hf_model)), config.objective.reference_model
    return Inputs(
        device=Device("cpu", "gloo", rank, "test"),
        model=source,
        weights=source,
        architecture=read_architecture(source),
        tokenizer=None,  # type: ignore[arg-type]  # of no use here
        stop_ids=(),
        prompts=prompts,
        eval_prompts=(),
        reference=None if reference is None else (read_architecture(reference), Path(reference)),
        rollouts=None,
    )


class Worlds:
    """One world after the other in the same processes, as `verify_layout.run` has two."""

    def __init__(self, root: Path, rank: int) -> None:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
        self._rank, self._count = rank, 0
        self._store = dist.FileStore(str(root / "store"), WORLD)

    def _next(self) -> Any:
        from torch.distributed import PrefixStore

        self._count += 1
        return PrefixStore(str(self._count), self._store)

    @contextlib.contextmanager
    def __call__(self, config: Config, size: int = WORLD) -> Iterator[Any]:
        """The layout, on the ranks that are part of it, else None."""
        from megatron_drpo import verify_layout

        store = self._next()
        if self._rank >= size:
            yield None
            return
        device = inputs_of(config, self._rank).device
        with verify_layout.world(config, device, store, self._rank, size) as here:
            yield here

    def end(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", store=self._next(), rank=self._rank, world_size=WORLD)


def _measured(config: Config, here: Any, rank: int, use: Callable[[Any], Any]) -> Any:
    """What `use` makes of the policy of a configuration."""
    from megatron_drpo import verify_layout

    policy = verify_layout.load(config, inputs_of(config, rank), here, None)
    result = use(policy)
    verify_layout.let_go(policy)
    return result


def _ranks(rank: int, world_size: int, root: Path) -> None:
    from megatron_drpo.verify_layout.batch import make_batch
    from megatron_drpo.verify_layout.measure import measure
    from megatron_drpo.verify_layout.report import compare

    worlds = Worlds(root, rank)
    batches: dict[Any, Any] = {}
    references: dict[Any, Any] = {}
    tasks = {task.batch: task for _, task in CASES}
    with worlds(config_of(root, DENSE, layout()), size=1) as here:
        for key, task in tasks.items() if here else ():
            config = config_of(root, task, layout())

            def both(policy: Any, config: Config = config) -> Any:
                batch = make_batch(config, inputs_of(config, rank), policy)
                return batch, measure(policy, batch.one_by_one, batch)

            batches[key], references[key] = _measured(config, here, rank, both)
    for name, (sizes, own) in MATRIX.items():
        with worlds(config_of(root, DENSE, sizes)) as here:
            batches = here.gather_objects(batches or None)[0]
            for task in own:
                config, batch = config_of(root, task, sizes), batches[task.batch]
                measured = _measured(
                    config,
                    here,
                    rank,
                    lambda policy, batch=batch: measure(
                        policy, policy.pack(batch.trajectories), batch
                    ),
                )
                if measured:
                    report = compare(measured, references[task.batch], TOLERANCE)
                    (root / f"{name}-{task}.json").write_text(json.dumps(asdict(report)))
    broken = Task("qwen3", distributed_optimizer=False)
    config = config_of(root, broken, layout(2))
    with worlds(config) as here:
        batch = batches[broken.batch]
        for name, (breaks, _) in BROKEN.items():
            measured = _measured(
                config,
                here,
                rank,
                lambda policy, breaks=breaks: measure(policy, breaks(policy, batch), batch),
            )
            if measured:
                report = compare(measured, references[broken.batch], TOLERANCE)
                told = {"failed": [line.name for line in report.failed], "verdict": report.verdict}
                (root / f"{name}.json").write_text(json.dumps(told))
    worlds.end()


# What can go wrong in the layout TP 2 x DP 2, and what then shows: the log-probs before (scored) and
# at (trained) the update, loss and norm, parts of the names of tensors, ranks that hold copies.


def _exchanged_keys_and_values(policy: Any, batch: Any) -> list[Any]:
    if policy.layout.tp_rank == 1:
        weight = policy.models[0].decoder.layers[1].self_attention.linear_qkv.weight
        with torch.no_grad():
            weight.view(2, -1, 8, weight.size(-1))[:, 2:] = (
                weight.view(2, -1, 8, weight.size(-1))[:, 2:].flip(1).clone()
            )
    return policy.pack(batch.trajectories)


def _one_replica_counts_more(policy: Any, batch: Any) -> list[Any]:
    finalize = policy.models[0].config.finalize_model_grads_func

    def unfair(models: Any, *args: Any, **kwargs: Any) -> Any:
        if policy.layout.dp_rank == 1:
            for model in models:
                model.scale_gradients(1.001)
        return finalize(models, *args, **kwargs)

    policy.models[0].config.finalize_model_grads_func = unfair
    return policy.pack(batch.trajectories)


def _after_reduction(change: Callable[[Any, Any], None]) -> Callable[[Any, Any], list[Any]]:
    def broken(policy: Any, batch: Any) -> list[Any]:
        finalize = policy.models[0].config.finalize_model_grads_func

        def finalized(models: Any, *args: Any, **kwargs: Any) -> Any:
            result = finalize(models, *args, **kwargs)
            change(policy.layout, models[0].module.decoder.layers[1])
            return result

        policy.models[0].config.finalize_model_grads_func = finalized
        return policy.pack(batch.trajectories)

    return broken


def _reversed(layout: Any, layer: Any) -> None:
    layer.mlp.linear_fc2.weight.main_grad.copy_(layer.mlp.linear_fc2.weight.main_grad.flip(0))


def _copy_of_its_own(layout: Any, layer: Any) -> None:
    if layout.tp_rank == 1:
        layer.input_layernorm.weight.main_grad.mul_(1.01)


def _sequence_left_out(policy: Any, batch: Any) -> list[Any]:
    return policy.pack(batch.trajectories[:-1])


def _sequences_run_together(policy: Any, batch: Any) -> list[Any]:
    rows = policy.pack(batch.trajectories)
    return [replace(row, cu_seqlens=row.cu_seqlens[[0, -1]]) for row in rows]


def _scored_otherwise(policy: Any, batch: Any) -> list[Any]:
    annotate = policy.annotate

    def moved(updates: Any) -> Any:
        rows = annotate(updates)
        return [[replace(r, old_logprobs=r.old_logprobs + 1e-3) for r in u] for u in rows]

    policy.annotate = moved
    return policy.pack(batch.trajectories)


NUMBERS = {"loss", "global gradient norm"}
LOGPROBS = {"log-probs, scored", "log-probs, trained"}
BROKEN: dict[str, tuple[Callable[[Any, Any], list[Any]], Callable[[set[str]], bool]]] = {
    "keys and values exchanged on one rank": (
        _exchanged_keys_and_values,
        lambda named: named >= LOGPROBS | {"model.layers.0.self_attn.q_proj.weight"},
    ),
    "one replica counts 1.001 times": (
        _one_replica_counts_more,
        lambda named: len(named) > 40 and not named & (LOGPROBS | {"loss"}),
    ),
    "rows of a gradient reversed": (
        # On the distributed optimizer's buckets: what a rank does not own is not looked at.
        _after_reduction(_reversed),
        lambda named: named == {"model.layers.1.mlp.down_proj.weight"},
    ),
    "a copy of its own on one rank": (
        _after_reduction(_copy_of_its_own),
        lambda named: (
            len(named) == 1 and "copies of decoder.layers.1.input_layernorm" in str(named)
        ),
    ),
    "a sequence left out": (
        _sequence_left_out,
        lambda named: named >= LOGPROBS | NUMBERS | {"tokens with loss"},
    ),
    "sequences see each other": (
        _sequences_run_together,
        lambda named: named >= LOGPROBS | NUMBERS,
    ),
    "scored otherwise than trained": (
        _scored_otherwise,
        lambda named: named == {"log-probs, scored"},
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    for model, (family, changes) in MODELS.items():
        save_tiny(root / model, family, **changes)
    other = tiny_model("qwen3")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.1
    other.save_pretrained(root / "other")
    run_distributed(_ranks, WORLD, root, timeout=280)
    return root


def _report(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / f"{name}.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "task"), CASES, ids=str)
def test_a_layout_computes_what_one_rank_does(results: Path, name: str, task: Task) -> None:
    report = _report(results, f"{name}-{task}")
    tolerance = BF16_TOLERANCE if task.bf16 else TOLERANCE
    for line in [*report["lines"], *report["parameters"]]:
        assert line["difference"] <= tolerance, line
        # Of fp32 as well: rounding is far from the 5 times that a user's tensors are allowed.
        assert line["distance"] <= tolerance * (5 if task.bf16 else 1), line


@pytest.mark.distributed
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(results: Path, name: str) -> None:
    told = _report(results, name)
    assert BROKEN[name][1](set(told["failed"])), told["failed"]
    assert told["failed"][0] in told["verdict"]
