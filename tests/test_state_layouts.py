"""A training state saved in one layout continues in any other as if it had never stopped.

In one start of four processes, each layout trains for two updates, saves, and makes a third one.
Then each layout, started from other weights, loads what the one before it saved and makes the third
update itself: loss, gradient norm and every weight must be those of the run that never
stopped. In bf16, where rounding differs between layouts, the state is saved again instead, and must
hold the same bits, master weights included.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_drpo.config import OptimizerConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.test_layouts import end, make_policy, trajectories
from tests.tiny_models import VOCAB, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WORLD = 4
WIDE = 67
"""A vocabulary that TP 1, 2 and 4 pad to 80, 96 and 128 rows; the tiny models' 61 to 64 always."""
# Moments and weight decay matter; rounding of gradients that are 0 in truth does not.
OPTIMIZER = OptimizerConfig(lr=1e-2, adam_eps=1e-3, weight_decay=0.1, clip_grad=1.0)


class Layout(NamedTuple):
    tp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    cp: int = 1
    etp: int | None = None
    sp: bool = False

    def __str__(self) -> str:
        usual = self._field_defaults
        said = {name: value for name, value in self._asdict().items() if value != usual[name]}
        return "-".join(f"{name}{value:d}" for name, value in said.items()) or "one"

    @property
    def sizes(self) -> ParallelConfig:
        return ParallelConfig(
            *self[:4],
            sequence_parallel=self.sp,
            context_parallel_size=self.cp,
            expert_tensor_parallel_size=self.etp,
        )


class Group(NamedTuple):
    """Layouts; each reads the state of the one before it, and the first that of the last."""

    model: str
    layouts: tuple[Layout, ...]
    distributed_optimizer: bool = True
    bf16: bool = False

    def before(self, layout: Layout) -> Layout:
        return self.layouts[self.layouts.index(layout) - 1]

    def __str__(self) -> str:
        kind = "shared" if self.distributed_optimizer else "whole"
        return f"{self.model}-{kind}{'-bf16' if self.bf16 else ''}"


# model: family, tied, vocabulary
MODELS = {
    "dense": ("qwen2", False, WIDE),
    "tied": ("llama", True, VOCAB),
    "experts": ("qwen3_moe", False, VOCAB),
    "tied_experts": ("mixtral", True, WIDE),
}
GROUPS = [
    Group("dense", (Layout(), Layout(4), Layout(2, cp=2, sp=True), Layout(1, 2, 2))),
    Group("tied", (Layout(2, 2), Layout(1, 4))),
    Group(
        "experts",
        (
            Layout(),
            Layout(ep=4),
            Layout(2, ep=2, etp=1, sp=True),
            Layout(1, 2, 2, ep=2),
            Layout(2, ep=2, sp=True),
            Layout(cp=2, ep=2, etp=2),
        ),
    ),
    Group("dense", (Layout(1, 2), Layout(4, sp=True)), distributed_optimizer=False),
    Group(
        "experts",
        (Layout(ep=2), Layout(1, 2), Layout(2, ep=2, etp=1, sp=True)),
        distributed_optimizer=False,
    ),
    Group("tied_experts", (Layout(ep=2, etp=2), Layout(1, 2, 2)), bf16=True),
    Group("dense", (Layout(2, 2), Layout()), distributed_optimizer=False, bf16=True),
]
FP32 = [group for group in GROUPS if not group.bf16]
BF16 = [group for group in GROUPS if group.bf16]


def _widen(directory: Path, vocab: int) -> None:
    """Append random rows to the embedding and the output layer of a tiny model."""
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(11)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        more = torch.randn(vocab - VOCAB, weights[name].size(1), generator=generator)
        weights[name] = torch.cat([weights[name], 0.2 * more])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": vocab}))


def _update(policy, number: int) -> dict[str, float]:
    """Update `number` of a run: on its own third of the trajectories."""
    [rows] = policy.annotate([policy.pack(trajectories()[4 * number : 4 * number + 4])])
    loss, _ = policy.forward_backward(rows)
    return {"loss": loss, "grad_norm": policy.optim_step().grad_norm}


def _save(policy, directory: Path, step: int) -> Path:
    from megatron_drpo.checkpoint.resume import Progress
    from megatron_drpo.mcore import state

    progress, settings = Progress(step, step, 0), Path(policy.config.model.hf_model)
    return state.save_checkpoint(directory, policy, progress, policy.config, settings, keep=0)


def _start(root: Path, rank: int, group: Group, layout: Layout, model: str):
    optimizer = replace(OPTIMIZER, use_distributed_optimizer=group.distributed_optimizer)
    return make_policy(root / model, rank, layout.sizes, optimizer, bf16=group.bf16)


def _third_update(policy, layout, out: Path) -> None:
    """Its statistics and the weights after it, into `out`."""
    from megatron_drpo.mcore.weights import export

    result = _update(policy, 2)
    source = Path(policy.config.model.hf_model)
    export(out, source, policy.architecture, policy.models, layout)
    if layout.rank == 0:
        (out / "result.json").write_text(json.dumps(result))


def _poison_padding(policy) -> None:
    """As if the padding of the vocabulary had drifted before the load: it must become 0 again."""
    vocab, layout = policy.architecture.vocab_size, policy.layout
    for model in policy.models:
        for name, parameter in model.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                first = layout.tp_rank * parameter.size(0)
                parameter.data[max(0, vocab - first) :] = 7.0
    policy.optimizer.reload_model_params()  # into the master weights


def _padding(policy) -> float:
    """Largest number in the padding of the vocabulary on any rank."""
    vocab, layout = policy.architecture.vocab_size, policy.layout
    largest = [
        parameter[max(0, vocab - layout.tp_rank * parameter.size(0)) :].abs().sum().item()
        for model in policy.models
        for name, parameter in model.named_parameters()
        if name in ("embedding.word_embeddings.weight", "output_layer.weight")
    ]
    return max(layout.gather_objects(max(largest, default=0.0)))


def _ranks(rank: int, world_size: int, root: Path) -> None:
    from megatron_drpo.mcore import state

    gc.freeze()  # Megatron collects garbage at every load: not what was imported
    for group in GROUPS:
        for saved in group.layouts:
            layout, policy = _start(root, rank, group, saved, group.model)
            _update(policy, 0)
            _update(policy, 1)
            _save(policy, root / str(group) / str(saved), 2)
            if not group.bf16:
                _third_update(policy, layout, root / str(group) / str(saved) / "never-stopped")
            end(layout, policy, root)
        for loaded in group.layouts:
            layout, policy = _start(root, rank, group, loaded, f"other-{group.model}")
            _poison_padding(policy)
            facts = {"poisoned": _padding(policy)}
            source = root / str(group) / str(group.before(loaded))
            progress = state.load_checkpoint(source / "step-000002", policy)
            assert progress.num_updates == policy.num_updates == 2
            facts["loaded"] = _padding(policy)
            if group.bf16:
                _save(policy, source / str(loaded), 2)
            else:
                _third_update(policy, layout, source / str(loaded))
                facts["updated"] = _padding(policy)
            if rank == 0:
                (source / str(loaded) / "facts.json").write_text(json.dumps(facts))
            end(layout, policy, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("states")
    for model, (family, tie, vocab) in MODELS.items():
        weights = save_tiny(root / model, family, tie=tie)
        save_tiny(root / f"other-{model}", family, tie=tie)
        others = {name: value.flip(0).contiguous() for name, value in weights.items()}
        path = root / f"other-{model}" / "model.safetensors"
        save_file(others, path, metadata={"format": "pt"})
        if vocab > VOCAB:
            _widen(root / model, vocab)
            _widen(root / f"other-{model}", vocab)
    run_distributed(_ranks, WORLD, root)
    return root


def _pairs(groups: list[Group]) -> Any:
    return pytest.mark.parametrize(
        ("group", "saved", "loaded"),
        [(group, group.before(to), to) for group in groups for to in group.layouts],
        ids=str,
    )


def _weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.distributed
@_pairs(FP32)
def test_the_next_update_is_that_of_the_run_that_never_stopped(
    root: Path, group: Group, saved: Layout, loaded: Layout
) -> None:
    source = root / str(group) / str(saved)
    straight = json.loads((source / "never-stopped" / "result.json").read_text())
    resumed = json.loads((source / str(loaded) / "result.json").read_text())
    assert straight["grad_norm"] > 0.1 and math.isfinite(straight["loss"])
    for name, value in straight.items():
        assert resumed[name] == pytest.approx(value, rel=5e-6, abs=1e-6), name
    expected = _weights(source / "never-stopped")
    found = _weights(source / str(loaded))
    assert found.keys() == expected.keys()
    start = _weights(root / group.model)
    for name, value in expected.items():
        assert (value - start[name]).abs().max() > 1e-3, name  # three updates did something
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.distributed
@_pairs(GROUPS)
def test_padding_of_the_vocabulary_is_zero_after_loading(
    root: Path, group: Group, saved: Layout, loaded: Layout
) -> None:
    path = root / str(group) / str(saved) / str(loaded) / "facts.json"
    facts = json.loads(path.read_text())
    assert facts.pop("poisoned") > 0
    assert set(facts.values()) == {0.0}


def _state(path: Path, vocab: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, without the padding of the vocabulary, which must be 0."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(described.size, dtype=described.properties.dtype)
        for name, described in metadata.items()
        if isinstance(described, TensorStorageMetadata)
    }
    load(tensors, checkpoint_id=path, no_dist=True)
    for name, value in tensors.items():
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            assert value.size(0) >= vocab and not value[vocab:].any()
            value = value[:vocab]
        yield name, value


@pytest.mark.distributed
@pytest.mark.parametrize("group", [group for group in GROUPS if group.layouts[0].pp == 1], ids=str)
def test_a_checkpoint_names_its_tensors_as_the_tables_do(root: Path, group: Group) -> None:
    """The names are those of Transformer Engine, though the layers are Megatron's local ones."""
    from megatron_drpo.checkpoint.families import family_of, read_architecture

    architecture = read_architecture(root / group.model)
    expected = {entry.key for entry in family_of(architecture).entries(architecture)}
    if architecture.tie_word_embeddings:
        expected.remove("output_layer.weight")
    path = root / str(group) / str(group.layouts[0]) / "step-000002"
    stored = [name for name, _ in _state(path, MODELS[group.model][2])]
    assert {name for name in stored if not name.startswith("optimizer.")} == expected
    moments = {f"optimizer.state.exp_avg.{name}" for name in expected}
    assert moments < set(stored)


@pytest.mark.distributed
@_pairs(BF16)
def test_a_state_that_is_loaded_and_saved_again_holds_the_same_bits(
    root: Path, group: Group, saved: Layout, loaded: Layout
) -> None:
    source, vocab = root / str(group) / str(saved), MODELS[group.model][2]
    before = dict(_state(source / "step-000002", vocab))
    after = dict(_state(source / str(loaded) / "step-000002", vocab))
    assert before.keys() == after.keys()
    masters = [
        name
        for name in before
        if name.startswith(("optimizer.state.param", "optimizer.state.fp32"))
    ]
    assert masters and any(name.startswith("optimizer.state.exp_avg_sq") for name in before)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
        master = next((m for m in masters if m.endswith(f".{name}")), None)
        if not name.startswith("optimizer."):
            assert value.dtype == torch.bfloat16 and master is not None
            assert torch.equal(before[master].bfloat16(), value), name
            assert not torch.equal(before[master], value.float()), name
