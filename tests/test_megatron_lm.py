"""The objective in somebody else's training script: data set, losses, refusals, and the example.

Two kinds of model stand in for the user's. Megatron's own GPTModel under Megatron's schedule, whose
loss and gradients must be those of transformers in fp64 and of our own `Policy`. And one without
layers, made of an embedding and an output layer, which on a CPU can go where Megatron's attention
and norms cannot: context and sequence parallelism, and `output_processor` in any version.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from megatron_drpo.config import ObjectiveConfig, ParallelConfig
from megatron_drpo.errors import ConfigError, DataError, RolloutError
from megatron_drpo.megatron_lm import (
    RolloutDataset,
    forward_step,
    loss_func,
    micro_batch,
    output_layer,
)
from megatron_drpo.objectives import Tokens, build_objective
from megatron_drpo.rollout.files import FileHeader, write_rollouts
from megatron_drpo.types import KeptIds, Prompt, Rollout, Trajectory
from tests.distributed import renew_world, run_distributed
from tests.test_layouts import DELTA, HORIZON, SHOWS_GRADIENTS, TEMPERATURE, make_policy
from tests.tiny_models import VOCAB, save_tiny, tiny_model

SEQ_LENGTH, PADDED_VOCAB, HIDDEN, TOPK, SAMPLES = 16, 64, 5, 3, 2
CPU = torch.device("cpu")
DRPO = ObjectiveConfig(drpo_delta=DELTA, loss_token_horizon=HORIZON)
OBJECTIVES = {
    "drpo": DRPO,
    "sequences": ObjectiveConfig(
        objective="gspo",
        gspo_clip_low=0.5,
        gspo_clip_high=0.6,
        sequence_mask="geometric",
        sequence_mask_low=0.02,
        sequence_mask_high=5.0,
        entropy_coef=0.1,
        loss_aggregation="token-mean",
    ),
    "topk": ObjectiveConfig(
        objective="dppo_topk_tv",
        dppo_delta_low=0.2,
        dppo_delta_high=0.2,
        loss_aggregation="seq-mean-token-mean",
    ),
}
LAYOUTS = {
    "tp2": ParallelConfig(2),
    "sp2": ParallelConfig(2, sequence_parallel=True),
    "dp2": ParallelConfig(),
    "cp2": ParallelConfig(context_parallel_size=2),
}
GPT_LAYOUTS = {
    "tp2": ParallelConfig(2),
    "pp2": ParallelConfig(1, 2),
    "dp2": ParallelConfig(),
}


def rollouts() -> list[Trajectory]:
    """Six prompts, two uneven responses to each; the longest fills `SEQ_LENGTH` labels."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(6):
        ids = torch.randint(3, VOCAB, (1 + number,), generator=generator)
        for sample in range(SAMPLES):
            length = int(torch.randint(1, 9, (), generator=generator))
            length = SEQ_LENGTH + 1 - len(ids) if (number, sample) == (5, 1) else length
            response = torch.randint(3, VOCAB, (length,), generator=generator)
            mask = torch.rand(length, generator=generator) < 0.8
            mask[0] = True
            rollout = Rollout(
                prompt=Prompt(f"p{number}", "", ids, None),
                sample=sample,
                response_ids=response,
                behaviour_logprobs=torch.where(
                    mask, -2 - 4 * torch.rand(length, generator=generator), 0.0
                ),
                finish_reason="stop",
                policy_version=0,
                response_text="",
                topk_ids=torch.where(
                    mask[:, None], torch.stack([response, *_others(response)], 1), 0
                ),
                topk_logprobs=torch.where(mask[:, None], torch.full((length, TOPK), -2.5), 0.0),
                loss_mask=None if mask.all() else mask,
            )
            found.append(Trajectory(rollout, float(torch.rand((), generator=generator)), 0.0))
    return found


def _others(ids: Tensor) -> list[Tensor]:
    return [(ids + step) % VOCAB for step in range(1, TOPK)]


def dataset(path: Path, objective: ObjectiveConfig = DRPO, **changes: Any) -> RolloutDataset:
    settings: dict[str, Any] = {
        "seq_length": SEQ_LENGTH,
        "vocab_size": VOCAB,
        "samples_per_prompt": SAMPLES,
        "temperature": TEMPERATURE,
        "objective": objective,
    }
    return RolloutDataset(path, **settings | changes)


def micro_batches(data: RolloutDataset, rank: int, size: int) -> Iterator[dict[str, Any]]:
    """Of three samples each, dealt to data-parallel ranks as Megatron's sampler does."""
    own = [[*range(at, at + 3)] for at in range(3 * rank, len(data), 3 * size)]
    return iter(DataLoader(data, batch_sampler=own))


def group_mean_advantages(batch: Sequence[Trajectory]) -> list[float]:
    means = [(batch[i].reward + batch[i + 1].reward) / 2 for i in range(0, len(batch), SAMPLES)]
    return [t.reward - means[i // SAMPLES] for i, t in enumerate(batch)]


def transformers_gradients(family: str) -> tuple[float, dict[str, Tensor]]:
    """(DRPO's loss, its gradient by every weight) by transformers in fp64, written out."""
    model = tiny_model(family, dtype=torch.float64)
    batch, total = rollouts(), torch.zeros((), dtype=torch.float64)
    for trajectory, a in zip(batch, group_mean_advantages(batch), strict=True):
        rollout = trajectory.rollout
        prompt, response = rollout.prompt.token_ids, rollout.response_ids
        logits = model(torch.cat([prompt, response])[None]).logits[0] / TEMPERATURE
        for t, token in enumerate(response.tolist()):
            if rollout.loss_mask is not None and not rollout.loss_mask[t]:
                continue
            pi = torch.log_softmax(logits[len(prompt) - 1 + t], -1)[token].exp()
            mu = math.exp(float(rollout.behaviour_logprobs[t]))
            objective = pi / mu * a - abs(a) / (2 * DELTA) * mu * (pi / mu - 1) ** 2
            total = total - objective / HORIZON / len(batch)
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters()}


# The model without layers.


def tables() -> tuple[Tensor, Tensor]:
    """fp64 [V, H]: embedding and output layer; the ids that are padding must not matter."""
    generator = torch.Generator().manual_seed(6)
    shape = (PADDED_VOCAB, HIDDEN)
    embedding, output = (torch.randn(shape, generator=generator).double() for _ in range(2))
    output[VOCAB:] *= 1000
    return embedding, output


class Bigram(nn.Module):
    """GPTModel's interface around an embedding and this rank's rows of an output layer."""

    def __init__(self, layout: Any) -> None:
        super().__init__()
        embedding, output = tables()
        rows = PADDED_VOCAB // layout.tp_size
        own = output[layout.tp_rank * rows : (layout.tp_rank + 1) * rows]
        self.embedding = nn.Parameter(embedding.float())
        self.output = nn.Parameter(own.float())
        self.config = a_config(sequence_parallel=layout.sequence_parallel)
        self.pg_collection = SimpleNamespace(tp=layout.tp_group, cp=layout.cp_group)
        self.vocab_size = PADDED_VOCAB

    def forward(
        self,
        tokens,
        positions,
        attention_mask,
        *,
        runtime_gather_output=None,
        output_processor=None,
    ) -> Any:
        from megatron.core import tensor_parallel

        assert tokens.shape == positions.shape and attention_mask is None
        hidden = self.embedding[tokens].transpose(0, 1)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        if output_processor is not None:
            return output_processor(
                hidden_states=hidden, output_layer=None, output_weight=self.output, labels=None
            )
        assert runtime_gather_output is False
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        return (hidden @ self.output.T).transpose(0, 1).contiguous()


def a_config(**changes: Any) -> SimpleNamespace:
    sound = {"calculate_per_token_loss": True, "mtp_num_layers": None, "sequence_parallel": False}
    return SimpleNamespace(**sound | changes)


def bigram_reference(objective: ObjectiveConfig) -> dict[str, Any]:
    """Loss, gradients and means of all samples at once, in fp64: the objective's own function, with
    weights by hand."""
    embedding, output = (x.requires_grad_() for x in tables())
    batch = rollouts()
    columns: dict[str, list[Tensor]] = {}
    for trajectory, advantage in zip(batch, group_mean_advantages(batch), strict=True):
        r = trajectory.rollout
        mask = torch.ones(len(r.response_ids)).bool() if r.loss_mask is None else r.loss_mask
        seen = torch.cat([r.prompt.token_ids, r.response_ids])[len(r.prompt.token_ids) - 1 : -1]
        logits = embedding[seen[mask]] @ output[:VOCAB].T / TEMPERATURE
        table = torch.log_softmax(logits, -1)
        ids, mu, count = r.response_ids[mask], r.behaviour_logprobs[mask].double(), int(mask.sum())
        assert r.topk_ids is not None and r.topk_logprobs is not None
        logprobs = table.gather(1, ids[:, None])[:, 0]
        log_ratio = (logprobs - mu).mean().detach()
        weight = {"token-mean": 1.0, "seq-mean-token-mean": 1 / count}
        found = {
            "logprobs": logprobs,
            "behaviour_logprobs": mu,
            "advantages": torch.full_like(mu, advantage),
            "entropy": -(table.exp() * table).sum(-1),
            "sequence_log_ratio": log_ratio.expand(count),
            "sequence_length": torch.full_like(mu, count),
            "topk_logprobs": table.gather(1, r.topk_ids[mask]),
            "behaviour_topk_logprobs": r.topk_logprobs[mask].double(),
            "sampled_in_topk": r.topk_ids[mask] == ids[:, None],
            "weights": torch.full_like(mu, weight.get(objective.loss_aggregation, 1 / HORIZON)),
        }
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
    every = {name: torch.cat(parts) for name, parts in columns.items()}
    weights = every.pop("weights")
    result = build_objective(objective)(Tokens(**every))
    items = len(weights) if objective.loss_aggregation == "token-mean" else len(batch)
    loss = (result.losses * weights).sum() / items
    loss.backward()
    ratio = (every["logprobs"] - every["behaviour_logprobs"]).exp()
    return {
        "loss": loss.detach(),
        "embedding": embedding.grad,
        "output": output.grad,
        "items": items,
        "weight/mean": result.gradient_weights.mean(),
        "ratio/mean": ratio.mean().detach(),
        "entropy/mean": every["entropy"].mean().detach(),
    }


def _added(value: Tensor, groups: Sequence[Any]) -> Tensor:
    value = value.clone()
    for group in groups:
        dist.all_reduce(value, group=group)
    return value


def _run_bigram(path: Path, layout: Any, objective: ObjectiveConfig, fused: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    model = Bigram(layout)
    batches = micro_batches(dataset(path, objective), layout.dp_rank, layout.dp_size)
    step = partial(
        forward_step,
        objective=build_objective(objective),
        vocab_size=VOCAB,
        temperature=TEMPERATURE,
        fused=fused,
    )
    reports, items = [], torch.zeros((), dtype=torch.int)
    for _ in range(len(rollouts()) // 3 // layout.dp_size):
        output, func = step(batches, model)
        loss, count, report = func(output)
        loss.backward()
        items += count
        reports.append(report)
    over = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
    names = reports[0].keys()
    assert all(report.keys() == names for report in reports)
    sums = {name: _added(sum(r[name] for r in reports), over) for name in names}  # type: ignore[arg-type]
    total = _added(items, over)
    name = f"{objective.objective} loss"
    assert sums[name][1] == total
    embedding, output = model.embedding.grad, model.output.grad
    assert embedding is not None and output is not None
    output = _added(output, over) / total
    shards = [torch.empty_like(output) for _ in range(layout.tp_size)]
    dist.all_gather(shards, output, group=layout.tp_group)
    means = {key: value[0] / value[1] for key, value in sums.items()}
    return {
        **means,
        "loss": means[name],
        "items": int(total),
        "embedding": _added(embedding, over) / total,
        "output": torch.cat(shards),
    }


# Megatron's model, as a training script has it.


def _gpt(policy: Any, layout: Any, source: Path) -> Any:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_drpo.mcore.model import transformer_config
    from megatron_drpo.mcore.weights import load

    config, architecture = policy.config, policy.architecture
    numbers: Any = transformer_config(
        architecture, config.model, layout, policy.device, config.precision, config.memory
    )
    assert numbers.calculate_per_token_loss
    model = GPTModel(
        config=numbers,
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=architecture.qk_layernorm, normalization="RMSNorm"
        ),
        vocab_size=policy.models[-1].vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=layout.pp_rank == 0,
        post_process=layout.is_last_stage,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
    )
    load(source, architecture, [model], layout, verify=False)
    chunk = DistributedDataParallel(numbers, DistributedDataParallelConfig(), model)
    numbers.finalize_model_grads_func = finalize_model_grads
    numbers.no_sync_func = chunk.no_sync
    return chunk


def _train_gpt(chunk: Any, data: RolloutDataset, layout: Any, *, fused: bool) -> float:
    """Gradients by Megatron's schedule; the loss as Megatron's loop reports it, on all ranks."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunk.zero_grad_buffer()
    schedule: Any = get_forward_backward_func()
    reports = schedule(
        forward_step_func=partial(
            forward_step,
            objective=build_objective(DRPO),
            vocab_size=VOCAB,
            temperature=TEMPERATURE,
            fused=fused,
        ),
        data_iterator=micro_batches(data, layout.dp_rank, layout.dp_size),
        model=chunk,
        num_microbatches=len(data) // 3 // layout.dp_size,
        seq_length=SEQ_LENGTH,
        micro_batch_size=3,
        forward_only=False,
    )
    total = torch.zeros(2)
    for report in reports:
        total += report["drpo loss"]
    dist.all_reduce(total)  # tensor-parallel ranks, who say the same, twice: the mean stays
    return float(total[0] / total[1])


def _ranks(rank: int, world_size: int, root: Path) -> None:
    """One start of two processes, which is what costs time, for everything below."""
    from examples.megatron_lm import core_only
    from megatron_drpo.mcore import parallel
    from megatron_drpo.mcore.weights import export

    path = root / "rollouts.jsonl"
    for name, sizes in GPT_LAYOUTS.items():
        optimizer = replace(SHOWS_GRADIENTS, use_distributed_optimizer=False)
        layout, policy = make_policy(root / "model", rank, sizes, optimizer, budget=64)
        data = dataset(path)
        chunk = _gpt(policy, layout, root / "model")
        losses = {"plain": _train_gpt(chunk, data, layout, fused=False)}
        [rows] = policy.annotate([policy.pack(data.trajectories)])
        losses["policy"], _ = policy.forward_backward(rows)
        ours, theirs = _gradients(policy.models[0]), _gradients(chunk.module)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(value, ours[key], rtol=1e-4, atol=2e-6, msg=key)
        with torch.no_grad():
            for key, parameter in chunk.module.named_parameters():
                parameter.copy_(theirs[key])
        export(root / name, root / "model", policy.architecture, [chunk.module], layout)
        fusible = "output_processor" in inspect.signature(chunk.module.forward).parameters
        if fusible:
            load_again = _gpt(policy, layout, root / "model")
            losses["fused"] = _train_gpt(load_again, data, layout, fused=True)
            for key, value in _gradients(load_again.module).items():
                torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=2e-6, msg=key)
            vars(load_again).clear()
        (root / f"{name}-{rank}.json").write_text(json.dumps(losses))
        parallel.destroy(layout)
        for wrapper in (chunk, *policy.chunks):
            vars(wrapper).clear()
        renew_world(root)
    for name, sizes in LAYOUTS.items():
        layout = parallel.initialize(sizes, _device(rank), seed=1)
        for kind, objective in OBJECTIVES.items():
            for fused in (False, True):
                result = _run_bigram(path, layout, objective, fused)
                torch.save(result, root / f"bigram-{name}-{kind}-{fused}-{rank}.pt")
        parallel.destroy(layout)
        renew_world(root)
    history = core_only.main(["--tensor-model-parallel-size", "2", "--train-iters", "4"])
    (root / f"example-{rank}.json").write_text(json.dumps(history))


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.main_grad for name, parameter in model.named_parameters()}


def _device(rank: int) -> Any:
    from megatron_drpo.device import Device

    return Device("cpu", "gloo", rank, "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron_lm")
    save_tiny(path / "model", "qwen3")
    write_rollouts(path / "rollouts.jsonl", rollouts())
    return path


@pytest.fixture(scope="module")
def results(root: Path) -> Path:
    run_distributed(_ranks, 2, root)
    return root


@pytest.fixture(scope="module")
def reference() -> tuple[float, dict[str, Tensor]]:
    return transformers_gradients("qwen3")


@pytest.mark.distributed
@pytest.mark.parametrize("name", GPT_LAYOUTS)
def test_megatrons_model_and_schedule_give_the_gradients_of_transformers(
    results: Path, reference: tuple[float, dict[str, Tensor]], name: str
) -> None:
    loss, gradients = reference
    for rank in range(2):
        losses = json.loads((results / f"{name}-{rank}.json").read_text())
        assert {"plain", "policy"} <= losses.keys()
        for value in losses.values():
            assert value == pytest.approx(loss, rel=1e-5)
    exported = {}
    for file in (results / name).glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() == gradients.keys()
    assert max(value.abs().max() for value in gradients.values()) > 0.02
    for key, value in exported.items():
        torch.testing.assert_close(value.double(), gradients[key], rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_objective_is_the_same_in_every_layout(results: Path, name: str, kind: str) -> None:
    expected = bigram_reference(OBJECTIVES[kind])
    for rank in range(2):
        for fused in (False, True):
            found = torch.load(results / f"bigram-{name}-{kind}-{fused}-{rank}.pt")
            assert found["items"] == expected["items"]
            for key in ("loss", "weight/mean", "ratio/mean", "entropy/mean"):
                assert float(found[key]) == pytest.approx(float(expected[key]), rel=2e-5), key
            for key in ("embedding", "output"):
                torch.testing.assert_close(
                    found[key].double(), expected[key], rtol=1e-4, atol=1e-6, msg=key
                )


@pytest.mark.distributed
def test_the_example_learns(results: Path) -> None:
    """Rewards are nearly balanced about their mean, so the loss starts at about 0."""
    first, second = (json.loads((results / f"example-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    losses = [means["drpo loss"] for means in first]
    assert abs(losses[0]) < 0.002 and losses[-1] < -0.015
    assert first[0]["weight/mean"] == pytest.approx(1, abs=1e-3)
    assert first[-1]["weight/mean"] < first[0]["weight/mean"]


# The data set.


def test_a_sample_is_a_shifted_sequence_with_what_is_known_of_each_label(tmp_path: Path) -> None:
    def response(sample: int, reward: float) -> Trajectory:
        rollout = Rollout(
            prompt=Prompt("p", "", torch.tensor([5, 6]), None),
            sample=sample,
            response_ids=torch.tensor([8, 9, 2]),
            behaviour_logprobs=torch.tensor([-0.5, 0.0, -0.25]),
            finish_reason="stop",
            policy_version=0,
            response_text="",
            loss_mask=torch.tensor([True, False, True]),
        )
        return Trajectory(rollout, reward, 0.0)

    write_rollouts(tmp_path / "r.jsonl", [response(0, 1.0), response(1, 0.0)])
    config = ObjectiveConfig(loss_aggregation="seq-mean-token-mean")
    data = dataset(tmp_path / "r.jsonl", config, seq_length=6)
    assert len(data) == 2
    sample = data[0]
    assert {name: value.tolist() for name, value in sample.items() if name != "name"} == {
        "tokens": [5, 6, 8, 9, 2, 0],
        "labels": [6, 8, 9, 2, 0, 0],
        "position_ids": [0, 1, 2, 3, 4, 0],
        "loss_mask": [0, 1, 0, 1, 0, 0],
        "behaviour_logprobs": [0, -0.5, 0, -0.25, 0, 0],
        "advantages": [0, 0.5, 0, 0.5, 0, 0],
        "weights": [0, 0.5, 0, 0.5, 0, 0],
        "num_items": 1,
    }
    assert sample["name"] == "sample 0 of prompt p"
    assert data[1]["advantages"].tolist() == [0, -0.5, 0, -0.5, 0, 0]
    token_mean = dataset(tmp_path / "r.jsonl", ObjectiveConfig(loss_aggregation="token-mean"))
    assert int(token_mean[0]["num_items"]) == 2 and token_mean[0]["weights"].sum() == 2


def test_a_files_header_says_what_the_flags_leave_open(tmp_path: Path) -> None:
    header = FileHeader(1.0, 1.0, 0, 24, (2,), (), 1, "test", "00", None, "test")
    write_rollouts(tmp_path / "r.jsonl", rollouts(), header)
    data = dataset(tmp_path / "r.jsonl", ObjectiveConfig(), temperature=1.0)
    assert data[0]["weights"].max() == pytest.approx(1 / 24)
    with pytest.raises(DataError, match=r"temperature 1\.0, but temperature is 0\.8.*use 1\.0"):
        dataset(tmp_path / "r.jsonl", ObjectiveConfig())


def test_rollouts_that_cannot_be_used_are_refused(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(ConfigError, match="loss_token_horizon: is not set.*has no header"):
        dataset(root / "rollouts.jsonl", ObjectiveConfig())
    with pytest.raises(DataError, match="have 17 tokens, the model's context 16"):
        dataset(root / "rollouts.jsonl", seq_length=15)
    write_rollouts(path, [replace(t, reward=None) for t in rollouts()])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no rewards; give each line a `reward`"):
        dataset(path)
    batch = [
        replace(
            t,
            rollout=replace(
                t.rollout,
                topk_ids=None,
                topk_logprobs=None,
                kept_ids=KeptIds(
                    t.rollout.response_ids.int(), torch.ones_like(t.rollout.response_ids)
                ),
            ),
        )
        for t in rollouts()
    ]
    write_rollouts(path, batch)
    with pytest.raises(DataError, match=r"top-p or top-k \(`kept_ids`\).*top_p 1 and top_k 0"):
        dataset(path)


# What is refused, and what is inert.


def a_group(size: int = 1) -> Any:
    """A process group, as far as its first rank asks it."""
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


def a_model(tp: Any = None, cp: Any = None, **changes: Any) -> SimpleNamespace:
    groups = SimpleNamespace(tp=tp or a_group(), cp=cp or a_group())
    return SimpleNamespace(config=a_config(**changes), pg_collection=groups, vocab_size=64)


def a_batch(root: Path) -> dict[str, Any]:
    return next(micro_batches(dataset(root / "rollouts.jsonl"), 0, 1))


def test_the_groups_are_the_models_own() -> None:
    tp, cp = a_group(2), a_group(2)
    layer = output_layer(a_model(tp, cp, sequence_parallel=True), vocab_size=61, temperature=0.5)
    assert layer.group is tp and layer.context_group is cp
    assert layer.sequence_parallel and layer.temperature == 0.5 and layer.vocab_size == 61
    alone = output_layer(a_model(), vocab_size=61)
    assert alone.group is None and alone.context_group is None and not alone.sequence_parallel


def test_a_model_that_is_trained_otherwise_is_refused() -> None:
    assert output_layer(a_model(), vocab_size=61).vocab_size == 61
    wrapped = SimpleNamespace(module=SimpleNamespace(module=a_model()))
    assert output_layer(wrapped, vocab_size=61).group is None
    with pytest.raises(ConfigError, match="--calculate-per-token-loss: is off.*add it"):
        output_layer(a_model(calculate_per_token_loss=False), vocab_size=61)
    with pytest.raises(ConfigError, match="--mtp-num-layers 1: multi-token prediction"):
        output_layer(a_model(mtp_num_layers=1), vocab_size=61)
    with pytest.raises(ConfigError, match="vocab_size 65: the model has 64 ids"):
        output_layer(a_model(), vocab_size=65)


def test_a_batch_that_lacks_something_is_refused(root: Path) -> None:
    batch = a_batch(root)
    with pytest.raises(ConfigError, match="has cu_seqlens: packed sequences are not supported"):
        micro_batch(batch | {"cu_seqlens": torch.tensor([0, 16])}, device=CPU)
    less = {name: value for name, value in batch.items() if name != "advantages"}
    with pytest.raises(ConfigError, match="the batch has no advantages: must hold tokens, labels"):
        micro_batch(less, device=CPU)
    with pytest.raises(ConfigError, match="--seq-length 16: must be a multiple of 6 with"):
        micro_batch(batch, device=CPU, cp_size=3)
    bad = batch | {"behaviour_logprobs": batch["behaviour_logprobs"] - torch.inf}
    with pytest.raises(RolloutError, match="behaviour policy's log-prob of token .* sample 0 of p"):
        micro_batch(bad, device=CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(drpo_penalty="full"), "whole distribution of the behaviour policy"),
        (ObjectiveConfig(kl_coef=0.1, kl_estimator="full"), "distribution of the reference model"),
        (ObjectiveConfig(kl_coef=0.1), "reads reference_logprobs, and the batch has none"),
        (ObjectiveConfig(proximal_policy="trainer"), "reads old_logprobs, and the batch has none"),
        (ObjectiveConfig(objective="dppo_topk_kl"), "reads topk_ids, behaviour_topk_logprobs"),
    ],
)
def test_an_objective_that_reads_what_is_not_there_is_refused(
    root: Path, config: ObjectiveConfig, message: str
) -> None:
    batch = {name: value for name, value in a_batch(root).items() if "topk" not in name}
    row = micro_batch(batch, device=CPU)
    layer = output_layer(a_model(), vocab_size=VOCAB)
    logits = torch.zeros(3, SEQ_LENGTH, PADDED_VOCAB)
    with pytest.raises(ConfigError, match=message):
        loss_func(row, layer, build_objective(config), logits)


def test_log_probs_that_the_batch_holds_are_read(root: Path) -> None:
    """Decoupled, with the trainer's old log-probs at log mu + 0.5: TIS weighs every token by its
    limit, as rho = e^0.5 is above that."""
    batch = a_batch(root)
    batch["old_logprobs"] = batch["behaviour_logprobs"] + 0.5
    batch["reference_logprobs"] = batch["behaviour_logprobs"]
    row = micro_batch(batch, device=CPU)
    layer = output_layer(a_model(), vocab_size=VOCAB)
    config = ObjectiveConfig(
        objective="pg_is", proximal_policy="trainer", tis_limit=1.25, kl_coef=0.5, kl_estimator="k1"
    )
    logits = torch.zeros(3, SEQ_LENGTH, PADDED_VOCAB, requires_grad=True)
    loss, items, report = loss_func(row, layer, build_objective(config), logits)
    mask, log_pi = batch["loss_mask"] > 0, -math.log(VOCAB)
    ratio = (log_pi - batch["old_logprobs"].double()).exp()
    kl = log_pi - batch["reference_logprobs"].double()
    losses = -1.25 * ratio * batch["advantages"] + 0.5 * kl
    expected = (losses * batch["weights"])[mask].sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert int(items) == 3 and report["objective/tis_truncated"].tolist() == [mask.sum()] * 2


def test_a_fused_loss_needs_a_model_with_a_place_for_it(root: Path) -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vars(self).update(vars(a_model()))
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens

    arguments: dict[str, Any] = {"objective": build_objective(DRPO), "vocab_size": VOCAB}
    with pytest.raises(ConfigError, match=r"no output_processor.*from 0\.18 on; use fused=False"):
        forward_step(iter([a_batch(root)]), Old(), **arguments, fused=True)


def test_what_is_no_loss_token_is_inert(root: Path) -> None:
    row = micro_batch(a_batch(root), device=CPU)
    layer = output_layer(a_model(), vocab_size=VOCAB)
    logits = torch.randn(3, SEQ_LENGTH, PADDED_VOCAB, generator=torch.Generator().manual_seed(1))
    others = torch.ones(3 * SEQ_LENGTH, dtype=torch.bool)
    others[row.loss_index] = False
    wild = logits.clone()
    wild.flatten(0, 1)[others] = torch.nan
    wild[..., VOCAB:] = 1e30
    results = []
    for values in (logits, wild):
        values.requires_grad_()
        loss, _, _ = loss_func(row, layer, build_objective(DRPO), values)
        loss.backward()
        results.append((loss.detach(), values.grad))
    (loss, grad), (loss_, grad_) = results
    assert torch.equal(loss, loss_) and grad is not None and torch.equal(grad, grad_)
    assert not grad.flatten(0, 1)[others].any() and not grad[..., VOCAB:].any()


# The script for pretrain, which asks for a GPU: what it hands over.


def test_the_script_for_pretrain_hands_over_what_it_asks_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(seq_length=SEQ_LENGTH, vocab_size=VOCAB)
    flags = f"--rollouts-file {root / 'rollouts.jsonl'} --rollout-samples-per-prompt {SAMPLES}"
    flags += f" --rollout-temperature {TEMPERATURE} --drpo-delta 0.3 --loss-token-horizon 8"
    called: list[tuple[Any, ...]] = []

    def parse_and_validate_args(extra_args_provider: Any) -> argparse.Namespace:
        parser = extra_args_provider(argparse.ArgumentParser())
        return parser.parse_args(flags.split(), args)

    modules = {
        "megatron.training": {"get_args": lambda: args, "pretrain": lambda *a: called.append(a)},
        "megatron.training.arguments": {"parse_and_validate_args": parse_and_validate_args},
        "megatron.training.argument_utils": {
            "gpt_config_from_args": lambda given: ("model", given),
            "pretrain_cfg_container_from_args": lambda given, model: ("config", given, model),
        },
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    script = Path(__file__).parents[1] / "examples" / "megatron_lm" / "train.py"
    runpy.run_path(str(script), run_name="__main__")
    [(config, provider, kind, step)] = called
    assert config == ("config", args, ("model", args)) and kind.name == "encoder_or_decoder"
    assert provider.is_distributed
    train, valid, test = provider([12, 0, 0], vp_stage=0)
    assert len(train) == 12 and valid is None and test is None
    assert train[0]["weights"].max() == pytest.approx(1 / 8)
    assert step.func is forward_step
    settings = dict(step.keywords)
    objective = settings.pop("objective")
    assert settings == {"vocab_size": VOCAB, "temperature": TEMPERATURE, "fused": False}
    one = torch.ones(1, dtype=torch.float64)
    tokens = Tokens(0 * one, math.log(0.5) * one, one)  # pi 1, mu 1/2, A 1
    assert float(objective(tokens).gradient_weights) == pytest.approx(1 - 0.5 / 0.3)
