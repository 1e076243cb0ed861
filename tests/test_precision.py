"""bf16, the fp32 output layer, recomputation and offloading: what is computed in which numbers.

Recomputation must not change a bit. The output layer in fp32 is compared with fp64. FP8 and
offloading to the host need a GPU with Transformer Engine; here their settings are checked against
Megatron's own checks, and the offloaded optimizer with nothing to offload.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_drpo.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_drpo.device import Device
from megatron_drpo.types import Prompt, Rollout, Trajectory
from megatron_drpo.vocab_parallel import fused_linear_objective
from tests.distributed import renew_world, run_distributed
from tests.tiny_models import VOCAB, save_tiny

TEMPERATURE = 0.8
ADAM = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.05)
RECOMPUTATIONS = {
    "none": MemoryConfig(),
    "uniform": MemoryConfig("full", "uniform", 2),
    "block": MemoryConfig("full", "block", 1),
    "core_attn": MemoryConfig("selective", recompute_modules=("core_attn",)),
    "mlp": MemoryConfig("selective", recompute_modules=("mlp",)),
    "moe": MemoryConfig("selective", recompute_modules=("moe",)),
}
REFUSED_BY_MEGATRON = {
    "first and last layers": (
        PrecisionConfig(fp8_format="hybrid", first_last_layers_bf16=True),
        MemoryConfig(),
    ),
    "too many of them": (
        PrecisionConfig(
            fp8_format="hybrid",
            fp8_recipe="blockwise",
            first_last_layers_bf16=True,
            num_layers_at_end_in_bf16=5,
        ),
        MemoryConfig(),
    ),
    "act of no experts": (
        PrecisionConfig(),
        MemoryConfig("selective", recompute_modules=("moe_act",)),
    ),
    "norm and delayed scaling": (
        PrecisionConfig(fp8_format="hybrid"),
        MemoryConfig("selective", recompute_modules=("layernorm",)),
    ),
}
OF_FAMILY = {
    "qwen3": ["none", "uniform", "block", "core_attn", "mlp"],
    "qwen3_moe": ["none", "uniform", "block", "core_attn", "moe"],
}
PARTS = {
    "qwen3": MemoryConfig("selective", recompute_modules=("core_attn", "mlp")),
    "qwen3_moe": MemoryConfig("selective", recompute_modules=("core_attn", "moe")),
}
LAYOUTS = [
    ("qwen3", ParallelConfig(2, 2), [MemoryConfig("full", "uniform", 2), PARTS["qwen3"]]),
    ("qwen3", ParallelConfig(1, 2, 2), [MemoryConfig("full", "uniform", 1)]),
    (
        "qwen3_moe",
        ParallelConfig(1, 2, 1, 2),
        [MemoryConfig("full", "block", 1), PARTS["qwen3_moe"]],
    ),
]


def config(source: Path | str, sizes: ParallelConfig | None = None, **groups: Any) -> Config:
    model = groups.pop("model", {})
    settings: dict[str, Any] = {
        "rollout": RolloutConfig(rollout_temperature=TEMPERATURE),
        "objective": ObjectiveConfig(drpo_delta=0.5, loss_token_horizon=16),
        "optimizer": ADAM,
        "train": TrainConfig(max_tokens_per_microbatch=64),
    } | groups
    return Config(
        model=ModelConfig(hf_model=str(source), transformer_impl="local", **model),
        parallel=sizes or ParallelConfig(),
        data=DataConfig(prompts="unused"),
        **settings,
    )


def trajectories() -> list[Trajectory]:
    generator = torch.Generator().manual_seed(11)
    out = []
    for number in range(12):
        ids = torch.randint(3, VOCAB, (14,), generator=generator)
        logprobs = -0.5 - 5 * torch.rand(9, generator=generator)
        rollout = Rollout(
            Prompt(f"p{number}", "", ids[:5], None), 0, ids[5:], logprobs, "stop", 0, ""
        )
        out.append(Trajectory(rollout, 0.0, float(torch.randn((), generator=generator))))
    return out


class Run:
    """A policy in process groups of its own, which end with the `with` block."""

    def __init__(self, settings: Config, source: Path, rank: int, scratch: Path) -> None:
        self.settings, self.source, self.rank, self.scratch = settings, source, rank, scratch

    def __enter__(self) -> Any:
        from megatron_drpo.checkpoint.families import read_architecture
        from megatron_drpo.mcore import parallel
        from megatron_drpo.mcore.policy import Policy

        device = Device("cpu", "gloo", self.rank, "test")
        self.layout = parallel.initialize(self.settings.parallel, device, seed=1)
        self.policy = Policy.load(
            self.settings,
            read_architecture(self.source),
            self.layout,
            device,
            weights=self.source,
        )
        return self.policy

    def __exit__(self, *_: object) -> None:
        from megatron_drpo.mcore import parallel

        parallel.destroy(self.layout)
        for chunk in self.policy.chunks:
            vars(chunk).clear()
        stores = self.scratch / f"world-{self.layout.world_size}"
        stores.mkdir(exist_ok=True)
        renew_world(stores)


def gradients(policy: Any) -> list[Tensor]:
    return [p.main_grad.clone() for model in policy.models for p in model.parameters()]


def train(policy: Any) -> float:
    """The loss of `trajectories`, whose gradients are then in the buffers."""
    [rows] = policy.annotate([policy.pack(trajectories())])
    return policy.forward_backward(rows)[0]


# --- Recomputation ------------------------------------------------------------------------------


def bytes_kept(policy: Any) -> int:
    """Bytes that a forward pass of the first row holds for the backward pass, weights aside."""
    from megatron_drpo.mcore.attention import row_layout

    row, held = policy.pack(trajectories())[0], {}
    weights = {p.untyped_storage().data_ptr() for p in policy.models[0].parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    policy.models[0].train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layout = row_layout(row.cu_seqlens, row.tokens.numel())
        out = policy.models[0](row.tokens, row.positions, layout)
    assert out.requires_grad
    return sum(held.values())


def _recompute_in_layouts(rank: int, world_size: int, root: Path) -> None:
    for family, sizes, recomputations in LAYOUTS:
        first = None
        for memory in (MemoryConfig(), *recomputations):
            settings = config(root / family, sizes, memory=memory)
            with Run(settings, root / family, rank, root) as policy:
                found = train(policy), gradients(policy)
                first = found if first is None else first
                assert found[0] == first[0], (family, sizes, memory)
                assert all(map(torch.equal, found[1], first[1])), (family, sizes, memory)
                assert any(gradient.abs().max() > 1e-3 for gradient in found[1])
    settings = _with_output_layer(root / "qwen3", ParallelConfig(2, 2))
    with Run(settings, root / "qwen3", rank, root) as policy:
        found = train(policy), policy.optim_step().grad_norm
        if rank == 3:
            (root / "layouts.json").write_text(json.dumps(found))


def _alone(rank: int, world_size: int, root: Path) -> None:
    out: dict[str, Any] = {"kept": {}, "same": {}}
    for family, names in OF_FAMILY.items():
        first = None
        for name in names:
            settings = config(root / family, memory=RECOMPUTATIONS[name])
            with Run(settings, root / family, rank, root) as policy:
                out["kept"][f"{family} {name}"] = bytes_kept(policy)
                loss, grads = train(policy), gradients(policy)
                if first is None:
                    first = loss, grads
                same = loss == first[0] and all(map(torch.equal, grads, first[1]))
                out["same"][f"{family} {name}"] = same
    out["bf16"] = _facts_of_bf16(rank, root)
    out["output"] = _output_layer(rank, root)
    out["settings"] = _settings()
    out["activations"] = _offloaded_activations(rank, root)
    out["offload"] = _offloaded_optimizer(rank, root)
    (root / "alone.json").write_text(json.dumps(out))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("precision")
    for family in (*OF_FAMILY, "llama"):
        save_tiny(root / family, family)
    return root


@pytest.fixture(scope="module")
def alone(models: Path) -> Iterator[dict[str, Any]]:
    run_distributed(_alone, 1, models)
    yield json.loads((models / "alone.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("family", OF_FAMILY)
def test_recomputation_changes_no_bit_on_one_rank(alone, family: str) -> None:
    assert all(alone["same"][f"{family} {name}"] for name in OF_FAMILY[family])


@pytest.mark.distributed
def test_recomputation_changes_no_bit_in_any_layout(models: Path, alone) -> None:
    run_distributed(_recompute_in_layouts, 4, models)
    # And the output layer in fp32: sums over ranks are rounded to bf16, so no closer.
    found = json.loads((models / "layouts.json").read_text())
    assert found == pytest.approx(alone["output"]["alone"], rel=2e-2, abs=2e-3)


@pytest.mark.distributed
@pytest.mark.parametrize("family", OF_FAMILY)
def test_recomputation_keeps_less(alone, family: str) -> None:
    kept = {name: alone["kept"][f"{family} {name}"] for name in OF_FAMILY[family]}
    part = "moe" if family == "qwen3_moe" else "mlp"
    # Of four layers in two pieces, their inputs alone; all of one layer but its input.
    assert kept["uniform"] < 0.1 * kept["none"]
    assert 0.7 * kept["none"] < kept["block"] < 0.8 * kept["none"]
    assert kept["core_attn"] < 0.9 * kept["none"]
    assert kept[part] < 0.9 * kept["none"]


# --- bf16 ---------------------------------------------------------------------------------------


def _facts_of_bf16(rank: int, root: Path) -> dict[str, Any]:
    from megatron_drpo.mcore.optimizer import parts

    source = root / "qwen3"
    with Run(config(source, model={"bf16": True}), source, rank, root) as policy:
        weights = {str(p.dtype) for model in policy.models for p in model.parameters()}
        buffers = [buffer for chunk in policy.chunks for buffer in chunk.buffers]
        rows = policy.pack(trajectories())
        scores = policy.score(rows)
        train(policy)
        before = [p.detach().clone() for p in policy.models[0].parameters()]
        policy.optim_step()
        [part] = parts(policy.optimizer)
        masters = [p for group in part.shard_fp32_from_float16_groups for p in group]
        models = [p for group in part.shard_float16_groups for p in group]
        pairs = list(zip(masters, models, strict=True))
        return {
            "weights": sorted(weights),
            "gradients": sorted({str(buffer.grad_data.dtype) for buffer in buffers}),
            "reduced": sorted({str(buffer.grad_dtype) for buffer in buffers}),
            "masters": sorted({str(master.dtype) for master, _ in pairs}),
            "moments": sorted(
                {str(v.dtype) for s in part.optimizer.state.values() for v in s.values()}
            ),
            "finer": sum(int((m != w.float()).sum()) for m, w in pairs),
            "rounded": all(torch.equal(m.bfloat16(), w) for m, w in pairs),
            "moved": any(
                not torch.equal(a, b)
                for a, b in zip(before, policy.models[0].parameters(), strict=True)
            ),
            "logprobs": sorted({str(score.logprobs.dtype) for score in scores}),
            "covered": sum(m.numel() for m in masters) == sum(p.numel() for p in before),
        }


@pytest.mark.distributed
def test_bf16_has_masters_gradients_and_logprobs_in_fp32(alone) -> None:
    found = alone["bf16"]
    assert found["weights"] == ["torch.bfloat16"]
    for what in ("gradients", "reduced", "masters", "moments", "logprobs"):
        assert found[what] == ["torch.float32"], what
    # Each weight is its master rounded, and the masters hold what bf16 could not.
    assert found["covered"] and found["moved"] and found["rounded"] and found["finer"] > 1000


# --- The output layer in fp32 -------------------------------------------------------------------


def test_fp32_weights_under_bf16_hidden_states_have_the_gradients_of_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(300, 64, generator=generator).requires_grad_()
    ids = torch.randint(300, (40,), generator=generator)
    advantages = torch.randn(40, generator=generator)
    main_grad = torch.zeros_like(weight)

    def losses(tokens: slice, scores: Any) -> Tensor:
        return -advantages[tokens].to(scores.logprobs) * scores.logprobs.exp()

    result = fused_linear_objective(hidden, weight, ids, losses, weight_grad=main_grad)
    result.loss.backward()

    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logprobs = (x @ w.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    (-advantages.double() * logprobs.exp()).sum().backward()
    assert result.scores.logprobs.dtype == torch.float32
    torch.testing.assert_close(result.scores.logprobs.double(), logprobs, rtol=1e-6, atol=1e-5)
    assert x.grad is not None and w.grad is not None and hidden.grad is not None
    torch.testing.assert_close(main_grad.double(), w.grad, rtol=1e-4, atol=1e-7)
    # Hidden states are bf16, and so is their gradient: rounded once.
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.double(), x.grad, rtol=2**-8, atol=1e-6)

    rounded = fused_linear_objective(hidden, weight.detach().bfloat16(), ids, losses)
    assert (rounded.scores.logprobs - logprobs.float()).abs().mean() > 1e-3


def _with_output_layer(
    source: Path, sizes: ParallelConfig | None = None, *, fp32: bool = True, **train: Any
) -> Config:
    return config(
        source,
        sizes,
        model={"bf16": True},
        precision=PrecisionConfig(fp32_output_layer=fp32),
        train=TrainConfig(max_tokens_per_microbatch=64, **train),
    )


def _output_layer(rank: int, root: Path) -> dict[str, Any]:
    from megatron_drpo.mcore.state import load_checkpoint, save_checkpoint
    from megatron_drpo.mcore.weights import export
    from megatron_drpo.rollout.inprocess import InProcessEngine, probe_exact

    source, out = root / "qwen3", {}
    stored = load_file(source / "model.safetensors")["lm_head.weight"]

    for fp32 in (False, True):
        with Run(_with_output_layer(source, fp32=fp32), source, rank, root) as policy:
            model = policy.models[0]
            rows = policy.pack(trajectories())
            hidden: list[Tensor] = []
            model.register_forward_hook(lambda _, __, y, to=hidden: to.append(y.detach()))
            scores = policy.score(rows)
            gap = 0.0
            for row, score, h in zip(rows, scores, hidden, strict=True):
                logits = h[row.loss_index, 0].double() @ stored.double().T / TEMPERATURE
                wanted = logits.log_softmax(-1).gather(-1, row.targets[:, None])[:, 0]
                gap = max(gap, float((score.logprobs - wanted).abs().max()))
            out[f"gap {fp32}"] = gap
            if not fp32:
                continue
            out["types"] = sorted({str(p.dtype) for p in model.parameters()})
            out["fp32"] = [n for n, p in model.named_parameters() if p.dtype == torch.float32]
            out["exact"] = probe_exact(policy, InProcessEngine(policy, max_slots=5)).exact
            loss = train(policy)
            fused = model.output_layer.weight.main_grad.clone()
            norm = policy.optim_step().grad_norm
            out["alone"] = [loss, norm]
            held = model.output_layer.weight.detach()
            out["finer"] = int((held != held.bfloat16().float()).sum())
            export(root / "exported", source, policy.architecture, policy.models, policy.layout)
            kept = model.output_layer.weight.detach().clone()
            exported = load_file(next((root / "exported").glob("*.safetensors")))
            out["exported"] = sorted({str(value.dtype) for value in exported.values()})
            out["export is rounded"] = torch.equal(
                exported["lm_head.weight"], kept[:VOCAB].bfloat16()
            )
            from megatron_drpo.checkpoint.resume import Progress

            progress = Progress(**{name: 1 for name in Progress.__dataclass_fields__})
            save_checkpoint(root / "checkpoints", policy, progress, policy.config, source, keep=1)
            train(policy)
            after = policy.optim_step().grad_norm
            last = [p.detach().clone() for p in model.parameters()]
    with Run(_with_output_layer(source), source, rank, root) as policy:
        [path] = (root / "checkpoints").glob("step-*")
        load_checkpoint(path, policy)
        weight = policy.models[0].output_layer.weight
        out["resumed"] = weight.dtype == torch.float32 and torch.equal(weight.detach(), kept)
        train(policy)
        out["next norm"] = [policy.optim_step().grad_norm, after]
        out["next weights"] = all(
            torch.equal(a, b) for a, b in zip(policy.models[0].parameters(), last, strict=True)
        )
    with Run(_with_output_layer(source, fused_output=False), source, rank, root) as policy:
        plain_loss = train(policy)
        plain = policy.models[0].output_layer.weight.main_grad
        out["plain"] = [
            plain_loss - loss,
            float((plain - fused).abs().max()),
            float(fused.abs().max()),
            policy.optim_step().grad_norm - norm,
        ]
    return out


@pytest.mark.distributed
def test_output_layer_in_fp32_is_that_of_fp64(alone) -> None:
    found = alone["output"]
    assert found["types"] == ["torch.bfloat16", "torch.float32"]
    assert found["fp32"] == ["output_layer.weight"]
    # From the same hidden states; with a weight in bf16 the law is another one.
    assert found["gap True"] < 5e-6 < 1e-3 < found["gap False"]
    assert found["exact"]


@pytest.mark.distributed
def test_output_layer_in_fp32_trains_as_the_plain_one_does(alone) -> None:
    loss, gradient, largest, norm = alone["output"]["plain"]
    assert abs(loss) < 1e-6 and gradient < 1e-5 * max(largest, 1.0) and abs(norm) < 1e-5
    # The weight itself is what is updated: it is no bf16 number.
    assert alone["output"]["finer"] > 1000


@pytest.mark.distributed
def test_output_layer_in_fp32_is_resumed_as_it_is_and_exported_in_bf16(alone) -> None:
    found = alone["output"]
    assert found["exported"] == ["torch.bfloat16"] and found["export is rounded"]
    assert found["resumed"] and found["next weights"]
    assert found["next norm"][0] == found["next norm"][1]


# --- Settings -----------------------------------------------------------------------------------


def _settings() -> dict[str, Any]:
    """What Megatron's own configurations make of ours."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_drpo.mcore import precision

    def built(numbers: PrecisionConfig, memory: MemoryConfig) -> TransformerConfig:
        arguments = precision.of_products(numbers) | precision.of_activations(memory)
        return TransformerConfig(
            num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **arguments
        )

    out: dict[str, Any] = {"fp8": [], "refused": []}
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        numbers = PrecisionConfig(
            fp8_format="hybrid", fp8_recipe=recipe, fp8_margin=1, fp8_param_gather=True
        )
        made = built(numbers, MemoryConfig())
        out["fp8"].append([made.fp8, made.fp8_recipe, made.fp8_margin, made.fp8_param])
        whole = config("m", model={"bf16": True}, precision=numbers)
        optimizer = MegatronOptimizerConfig(lr=1.0, bf16=True, **precision.of_optimizer(whole))
        gather = DistributedDataParallelConfig(**precision.of_gradients(whole))
        out["fp8"][-1] += [optimizer.fp8_recipe, gather.fp8_param_gather]
    for name, settings in REFUSED_BY_MEGATRON.items():
        try:
            built(*settings)
        except ValueError:
            out["refused"].append(name)
    return out


@pytest.mark.distributed
def test_megatron_takes_what_is_passed_and_refuses_what_is_refused_here(alone) -> None:
    assert alone["settings"]["fp8"] == [
        ["hybrid", recipe, 1, True, recipe, True]
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
    ]
    assert alone["settings"]["refused"] == list(REFUSED_BY_MEGATRON)


# --- Activations on the host --------------------------------------------------------------------


def _offloaded_activations(rank: int, root: Path) -> dict[str, Any]:
    """Steps of several sizes, each scored first; what Megatron asks of a GPU is made up."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as megatron

    class Switch:
        CPUOffloadEnabled = False

    transformer_engine.cpu_offload = Switch
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[assignment]
    pool = megatron.GPUTensorPool
    megatron.GPUTensorPool = lambda **_: pool(device="cpu", pin_memory=False)
    moved: list[int] = []
    offload = megatron.ChunkOffloadHandler.offload

    def counted(self: Any, tensor: Tensor, **keywords: Any) -> Any:
        moved.append(tensor.nbytes)
        return offload(self, tensor, **keywords)

    megatron.ChunkOffloadHandler.offload = counted
    source, batch = root / "llama", trajectories()
    memory = MemoryConfig(
        fine_grained_activation_offloading=True,
        offload_modules=("qkv_linear", "core_attn", "attn_proj"),
    )
    steps: list[list[Any]] = []
    for settings in (MemoryConfig(), memory):
        with Run(config(source, memory=settings), source, rank, root) as policy:
            for model in policy.models:
                model.config.min_offloaded_tensor_size = 1
            for number, part in enumerate([batch, batch[:3], batch, batch, batch[:6]]):
                [rows] = policy.annotate([policy.pack(part)])
                scored = len(moved)
                policy.forward_backward(rows)
                grads = gradients(policy)
                if settings is memory:
                    pairs = zip(grads, steps[number][1], strict=True)
                    apart = max(float((a - b).abs().max()) for a, b in pairs)
                    steps[number] = [len(rows), scored, sum(moved), apart]
                else:
                    steps.append([len(rows), grads])
                moved.clear()
                policy.score(rows)
    return {"steps": steps}


@pytest.mark.distributed
def test_activations_move_while_training_only_and_gradients_stay(alone) -> None:
    """Megatron's offloading, rehearsed on the CPU: its bookkeeping, not its copies."""
    rows, scored, moved, apart = zip(*alone["activations"]["steps"], strict=True)
    assert len(set(rows)) > 1
    assert not any(scored) and all(moved)
    # What comes back lies otherwise in memory, which GEMMs answer with another rounding.
    assert max(apart) < 1e-6


# --- The optimizer on the host ------------------------------------------------------------------


class _OnHost(torch.Tensor):
    """What Megatron has copied to the host, told from what is on the device, here both the CPU.

    On CPUs Megatron's modules ask `is_cpu` where their source says `is_cuda` (mcore/cpu.py).
    """

    is_cpu = False  # type: ignore[assignment]


def _offloaded_optimizer(rank: int, root: Path) -> dict[str, Any]:
    from megatron.core.optimizer import optimizer_config

    from megatron_drpo.checkpoint.resume import Progress
    from megatron_drpo.mcore import precision
    from megatron_drpo.mcore.optimizer import parts
    from megatron_drpo.mcore.state import load_checkpoint, save_checkpoint

    # Pinned memory and the version of Transformer Engine are for GPUs.
    optimizer_config.is_te_min_version = lambda version: True
    torch.Tensor.pin_memory = lambda tensor: tensor.as_subclass(_OnHost)  # type: ignore[assignment]
    of_optimizer = precision.of_optimizer
    precision.of_optimizer = lambda config: of_optimizer(config) | {"pin_cpu_grads": False}

    source, runs = root / "qwen3", {}
    progress = Progress(**{name: 1 for name in Progress.__dataclass_fields__})
    for share in (0.0, 0.5, 1.0):
        optimizer = ADAM
        if share:
            optimizer = replace(ADAM, optimizer_cpu_offload=True, optimizer_offload_fraction=share)
        settings = config(source, model={"bf16": True}, optimizer=optimizer)
        run: dict[str, Any] = {"norms": [], "weights": []}
        with Run(settings, source, rank, root) as policy:
            path = root / f"state-{share}"
            save_checkpoint(path, policy, progress, settings, source, keep=0)  # before any update
            for step in (2, 3, 4):
                train(policy)
                run["norms"].append(policy.optim_step().grad_norm)
                run["weights"].append([p.detach().float() for p in policy.models[0].parameters()])
                later = replace(progress, step=step)
                save_checkpoint(path, policy, later, settings, source, keep=0)
            inner = parts(policy.optimizer)[0].optimizer
            if share:
                total = sum(p.numel() for p in policy.models[0].parameters())
                moved = inner.gpu_params_map_cpu_copy
                run["share"] = sum(p.numel() for p in moved) / total
                run["masters"] = sorted({str(p.dtype) for p in inner.param_to_fp32_param.values()})
        for step in (1, 3):
            with Run(settings, source, rank, root) as policy:
                load_checkpoint(path / f"step-00000{step}", policy)
                train(policy)
                policy.optim_step()
                again = [p.detach().float() for p in policy.models[0].parameters()]
            after = run["weights"][0 if step == 1 else 2]
            run[f"resumed {step}"] = all(map(torch.equal, again, after))
        runs[share] = run
    plain, found = runs[0.0], {}
    for share in (0.5, 1.0):
        run = runs[share]
        apart = [
            float(max((a - b).abs().max() for a, b in zip(x, y, strict=True)))
            for x, y in zip(run["weights"], plain["weights"], strict=True)
        ]
        del run["weights"]
        found[str(share)] = run | {"apart": apart, "plain": plain["norms"]}
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_offloading_optimizer_clips_updates_and_resumes_as_the_plain_one(alone, share) -> None:
    """Megatron's offloading optimizer, rehearsed on the CPU."""
    found = alone["offload"][str(share)]
    assert share <= found["share"] <= min(share + 0.3, 1.0)
    assert found["masters"] == ["torch.float32"]
    assert all(norm > ADAM.clip_grad for norm in found["norms"])
    assert found["norms"] == pytest.approx(found["plain"], rel=1e-3)
    # Another order of operations: a step of 1e-3 may round to the bf16 number next to it.
    assert max(found["apart"]) <= 2**-7
    assert found["resumed 1"] and found["resumed 3"]
