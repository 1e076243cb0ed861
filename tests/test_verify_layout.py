"""`--verify-layout`: every layout computes what one rank does, and one that does not is found out.

The matrix goes through the program's own functions in one start of four processes: one rank makes
each batch and measures it one sequence at a time, then all of them measure it under each layout.
What is broken on purpose stands beside it, in the same start.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from megatron_drpo.arguments import parse
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
from megatron_drpo.errors import ConfigError
from megatron_drpo.rollout.files import write_rollouts
from megatron_drpo.types import Prompt, Rollout, Trajectory
from tests.distributed import run_distributed
from tests.published_configs import PUBLISHED
from tests.tiny_models import VOCAB, save_tiny, tiny_model
from tests.tiny_run import make_tiny_run

ROOT = Path(__file__).resolve().parent.parent
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
    with worlds(config_of(root, DENSE, layout())) as here:
        batches = here.gather_objects(batches or None)[0]
    for name, (sizes, own) in MATRIX.items():
        with worlds(config_of(root, DENSE, sizes)) as here:
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
    for name, broken in BROKEN.items():
        config, batch = config_of(root, broken.task, broken.sizes), batches[broken.task.batch]
        with worlds(config) as here:
            measured = _measured(
                config,
                here,
                rank,
                lambda policy, broken=broken, batch=batch: measure(
                    policy, broken.breaks(policy, batch), batch
                ),
            )
            if measured:
                report = compare(measured, references[broken.task.batch], TOLERANCE)
                told = {"failed": [line.name for line in report.failed], "verdict": report.verdict}
                (root / f"{name}.json").write_text(json.dumps(told))
    worlds.end()


# What can go wrong in a layout, and what then is beyond the tolerance.


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


def _embedding_of_its_own(policy: Any, batch: Any) -> list[Any]:
    finalize = policy.models[0].config.finalize_model_grads_func

    def finalized(models: Any, *args: Any, **kwargs: Any) -> None:
        finalize(models, *args, **kwargs)
        if policy.layout.is_last_stage:
            models[-1].module.output_weight().main_grad.mul_(1.01)

    policy.models[0].config.finalize_model_grads_func = finalized
    return policy.pack(batch.trajectories)


@dataclass(frozen=True)
class Broken:
    breaks: Callable[[Any, Any], list[Any]]
    shows: Callable[[set[str]], bool]
    """Whether these are the names to expect."""
    task: Task = Task("qwen3", distributed_optimizer=False)
    sizes: ParallelConfig = field(default_factory=lambda: layout(2))


NUMBERS = {"loss", "global gradient norm"}
LOGPROBS = {"log-probs, scored", "log-probs, trained"}
BROKEN = {
    "keys and values exchanged on one rank": Broken(
        _exchanged_keys_and_values,
        lambda named: named >= LOGPROBS | {"model.layers.0.self_attn.q_proj.weight"},
    ),
    "one replica counts 1.001 times": Broken(
        _one_replica_counts_more,
        lambda named: len(named) > 40 and not named & (LOGPROBS | {"loss"}),
    ),
    "rows of a gradient reversed": Broken(
        _after_reduction(_reversed),
        lambda named: named == {"model.layers.1.mlp.down_proj.weight"},
    ),
    "a copy of its own on one rank": Broken(
        _after_reduction(_copy_of_its_own),
        lambda named: (
            len(named) == 1 and "copies of decoder.layers.1.input_layernorm" in str(named)
        ),
    ),
    "a tied embedding of its own on the last stage": Broken(
        _embedding_of_its_own,
        lambda named: (
            named >= {"copies of embedding.word_embeddings.weight (stage 0, chunk 0)"}
            and not named & {"model.embed_tokens.weight"}
        ),
        Task("llama", distributed_optimizer=False),
        layout(1, 2),
    ),
    "a sequence left out": Broken(
        _sequence_left_out,
        lambda named: named >= LOGPROBS | NUMBERS | {"tokens with loss"},
    ),
    "sequences see each other": Broken(
        _sequences_run_together,
        lambda named: named >= LOGPROBS | NUMBERS,
    ),
    "scored otherwise than trained": Broken(
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
        # In fp32, rounding is far from the 5 times that a user's numbers are allowed.
        assert line["parts"] <= tolerance * (5 if task.bf16 else 1), line


@pytest.mark.distributed
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(results: Path, name: str) -> None:
    told = _report(results, name)
    assert BROKEN[name].shows(set(told["failed"])), told["failed"]
    assert told["failed"][0] in told["verdict"]


# --- The program --------------------------------------------------------------------------------


def torchrun(directory: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Two ranks under the program's own starter; `argv` begins with what they run."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        [*starter, "--standalone", *argv],
        cwd=directory,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def record_rollouts(path: Path) -> None:
    """Two responses to each of four prompts, one of them right."""
    made = []
    for number in range(4):
        prompt = Prompt(f"p{number}", "1+1=", torch.tensor([4, 13, 4, 14]), "2")
        for sample in range(2):
            ids = torch.tensor([5 + sample, number + 3, 2])
            logprobs = torch.tensor([-2.0, -4.0, -3.0 - number / 8])
            rollout = Rollout(prompt, sample, ids, logprobs, "stop", 0, "")
            made.append(Trajectory(rollout, float(sample), 0.0))
    write_rollouts(path, made)


@pytest.mark.distributed
def test_a_start_prints_the_table_and_writes_no_run(tmp_path: Path) -> None:
    """Of recorded rollouts, and of the first half of the model, as it is on two stages."""
    flags = make_tiny_run(tmp_path)
    at = flags.index("--prompts")
    record_rollouts(tmp_path / "rollouts.jsonl")
    recorded = [*flags[:at], *flags[at + 2 :], "--rollouts-file", "rollouts.jsonl"]
    verify = [
        "--verify-layout",
        "--verify-layout-num-layers",
        "2",
        "--verify-layout-json",
        "v.json",
    ]
    pp2 = ["--pipeline-model-parallel-size", "2"]
    done = torchrun(tmp_path, "-m", "megatron_drpo", *recorded, *pp2, *verify)
    assert done.returncode == 0, done.stderr
    assert "chosen:    2 rank(s): TP 1, PP 2, DP 1" in done.stdout
    assert "reference: 1 rank(s): TP 1, PP 1, DP 1" in done.stdout
    told = json.loads((tmp_path / "v.json").read_text())
    assert told["failed"] == [] and told["tolerance"] == 1e-5
    lines = {line["name"]: line for line in told["lines"]}
    # An update is half of the four prompts: 2 x 2 responses of 3 tokens.
    assert lines["tokens with loss"]["chosen"] == 12
    names = {line["name"] for line in told["parameters"]}
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    table = done.stdout.splitlines()
    (header,) = (
        row for row in table if row.split() == ["chosen", "reference", "difference", "in", "parts"]
    )
    (loss,) = (row for row in table if row.startswith("loss "))
    assert loss.endswith("  ok") and header.index("reference") + len("reference") == loss.index(
        f"{lines['loss']['reference']:.9g}", header.index("chosen") + len("chosen")
    ) + len(f"{lines['loss']['reference']:.9g}")
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_a_start_with_a_broken_layout_fails_and_names_what_differs(tmp_path: Path) -> None:
    flags = make_tiny_run(tmp_path)
    (tmp_path / "broken.py").write_text(
        "import sys\n"
        "import torch\n"
        "from megatron_drpo import cli\n"
        "from megatron_drpo.mcore.policy import Policy\n"
        "def prepare(self, prepare=Policy._prepare_training):\n"
        "    if self.layout.tp_rank == 1:\n"
        "        with torch.no_grad():\n"
        "            self.models[0].decoder.layers[3].mlp.linear_fc2.weight *= 1.001\n"
        "    prepare(self)\n"
        "Policy._prepare_training = prepare\n"
        "sys.exit(cli.main())\n"
    )
    tp2 = ["--tensor-model-parallel-size", "2"]
    done = torchrun(tmp_path, "broken.py", *flags, *tp2, "--verify-layout")
    assert done.returncode != 0
    (row,) = (r for r in done.stdout.splitlines() if r.startswith("log-probs, trained"))
    assert row.endswith("  FAIL")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--verify-layout-tolerance 1e-05" in said[0]
    assert any(line.startswith("error: log-probs, trained: ") for line in said[1:])


# --- Which layout it is compared with -----------------------------------------------------------


def chosen_reference(
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    gib: float,
    sizes: ParallelConfig,
    world_size: int,
    num_layers: int | None = None,
) -> ParallelConfig:
    """What a run of a published model in bf16, on GPUs with so much memory, is compared with."""
    from megatron_drpo import hardware
    from megatron_drpo.device import Device
    from megatron_drpo.preflight import Inputs
    from megatron_drpo.verify_layout import layouts

    monkeypatch.setattr(hardware, "look", hardware.Machine)  # a GPU without Transformer Engine
    config = config_of(Path(), Task(model, bf16=True), sizes)
    prompts = (Prompt("p", "", torch.zeros(100, dtype=torch.int64), None),)
    inputs = Inputs(
        Device("cuda", "nccl", 0, "test"), Path(), Path(), PUBLISHED[model][1],
        None, (), prompts, (), None, None,  # type: ignore[arg-type]  # no tokenizer
    )  # fmt: skip
    monkeypatch.setattr(layouts, "_room", lambda device: int(gib * 2**30))
    here: Any = SimpleNamespace(world_size=world_size, gather_objects=lambda value: [value])
    layouts.check_depth(config, inputs, num_layers)
    return layouts.reference_of(config, inputs, here, num_layers).parallel


def test_the_reference_is_the_smallest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter takes 10 bytes: bf16, its gradient and its master weight in fp32."""
    find = partial(chosen_reference, monkeypatch)
    sizes = layout(4, 2, sequence_parallel=True)
    assert find("Llama-2-7b-hf", 80, sizes, 8) == layout()  # 67 GB
    assert find("Llama-2-7b-hf", 40, sizes, 8) == layout(1, 2)
    assert find("Llama-2-7b-hf", 40, sizes, 8, num_layers=16) == layout()
    experts = layout(1, 4, ep=8)
    assert find("Qwen3-30B-A3B", 80, experts, 64) == layout(1, 4)  # 305 GB
    assert find("Qwen3-30B-A3B", 60, experts, 64) == layout(1, 6)  # 5 does not divide 48 layers


def test_what_fits_nowhere_is_told_how_many_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    find = partial(chosen_reference, monkeypatch, "Qwen3-235B-A22B")
    sizes = layout(1, 2, ep=64)
    with pytest.raises(ConfigError, match="no layout of fewer than 16 ranks") as error:
        find(80, sizes, 16)
    assert "80.0 GiB" in str(error.value)
    # 2.5 billion parameters each, and 1.2 billion besides; two stages take an even number.
    assert str(error.value).endswith("--verify-layout-num-layers 2")
    assert find(80, sizes, 16, num_layers=2) == layout()
    with pytest.raises(ConfigError, match="--verify-layout: .*more memory"):
        find(10, sizes, 16)


@pytest.mark.parametrize(
    ("sizes", "wrong", "named"),
    [
        (layout(1, 4), 6, "4, 8, 12, ..., 32"),
        (layout(1, 4, 2), 12, "8, 16, 24, 32"),
        (layout(1, 4, decoder_first_pipeline_num_layers=2), 4, "5, 8, 11, ..., 32"),
        (layout(), 33, "1, 2, 3, ..., 32"),
    ],
)
def test_a_depth_that_the_pipeline_cannot_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, sizes: ParallelConfig, wrong: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=f"--verify-layout-num-layers {wrong}: ") as error:
        chosen_reference(monkeypatch, "Llama-2-7b-hf", 80, sizes, 8, num_layers=wrong)
    assert f"can share out {named} of them" in str(error.value)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--verify-layout-tolerance", "0.1"], "--verify-layout-tolerance: is read with"),
        (["--verify-layout-json", "x"], "--verify-layout-json: is read with --verify-layout only"),
        (["--verify-layout", "--dry-run"], "--verify-layout: --dry-run starts nothing"),
        (["--verify-layout", "--verify-layout-tolerance", "0"], "--verify-layout-tolerance 0.0"),
        (["--verify-layout", "--verify-layout-num-layers", "0"], "--verify-layout-num-layers 0"),
    ],
)
def test_flags_that_are_at_odds_are_refused(argv: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--hf-model", "model", "--prompts", "p.jsonl", *argv])
    assert str(error.value).startswith(named)
