"""Weights over ranks: every parameter of every layout, and an export that all ranks agree on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.checkpoint.hf import HfWeights, SafetensorsFile, file_names
from megatron_drpo.checkpoint.manifest import check_manifest, read_manifest
from megatron_drpo.checkpoint.model_weights import FullTensors, export_hf, load_weights
from megatron_drpo.errors import CheckpointError
from tests.distributed import renew_world, run_distributed
from tests.tiny_models import EXPERTS, LAYERS, MOE, reference_shard, save_tiny, tiny_model

WORLD = 4


class Sizes(NamedTuple):
    """Of a layout; data parallelism takes the rest."""

    tp: int
    pp: int = 1
    vp: int = 1
    ep: int = 1
    cp: int = 1
    etp: int | None = None
    """None: as `tp`."""

    def __str__(self) -> str:
        return "-".join(map(str, self))


DENSE = [
    Sizes(4),
    Sizes(2),
    Sizes(2, cp=2),
    Sizes(1, 2),
    Sizes(1, 4),
    Sizes(2, 2),
    Sizes(1, 2, 2),
    Sizes(2, 2, 2),
]
EXPERT = [
    Sizes(1, ep=4),
    Sizes(1, ep=2),
    Sizes(2, ep=2),
    Sizes(1, 2, ep=2),
    Sizes(1, 2, 2, ep=2),
    Sizes(2, ep=2, etp=1),
    Sizes(4, ep=2, etp=1),  # all experts on the first half of those that share the rest
    Sizes(1, ep=2, etp=2),
    Sizes(1, ep=2, cp=2),
    Sizes(2, ep=4, cp=2, etp=1),
    Sizes(1, 2, etp=2),
    Sizes(2, 2, ep=2, etp=1),
]
BF16 = {Sizes(2, 2), Sizes(1, 2, ep=2)}
SMALL_FILES = {Sizes(1, 2, 2), Sizes(2, ep=2)}
STREAMED = {Sizes(2, ep=2, etp=1), Sizes(1, ep=2, etp=2), Sizes(2, 2, ep=2, etp=1)}
# The rank that fails to write: the first of the last stage, and of the last experts.
FAILING = {Sizes(2, 2): 2, Sizes(2, ep=2, etp=1): 1}
MAX_BYTES = 30_000
MODELS = [
    ("llama", True),
    ("mistral", False),
    ("mixtral", False),
    ("qwen2", True),
    ("qwen3", False),
    ("qwen3_moe", True),
]


def _layouts(family: str) -> list[Sizes]:
    return DENSE + EXPERT if family in MOE else DENSE


def _out(root: Path, family: str, sizes: Sizes) -> Path:
    return root / f"{family}-out-{sizes}"


def _ranks(rank: int, world_size: int, root: Path) -> None:
    """One start of the processes, which is what costs time, for everything below."""
    for sizes in DENSE + EXPERT:
        _convert(rank, root, sizes)
    _fail(rank, root / "failing")


def _start(rank: int, sizes: Sizes) -> tuple[Any, Any]:
    from megatron_drpo.config import ParallelConfig
    from megatron_drpo.device import Device
    from megatron_drpo.mcore import parallel

    device = Device("cpu", "gloo", rank, "test")
    config = ParallelConfig(
        *sizes[:4], context_parallel_size=sizes.cp, expert_tensor_parallel_size=sizes.etp
    )
    return parallel.initialize(config, device, seed=1), device


def end(layout: Any, directory: Path) -> None:
    """End what `_start` started; collective."""
    from megatron_drpo.mcore import parallel

    parallel.destroy(layout)
    renew_world(directory)


def _build(architecture: Any, layout: Any, device: Any, *, bf16: bool = False) -> list[Any]:
    from megatron_drpo.config import ModelConfig
    from megatron_drpo.mcore import model

    config = ModelConfig(hf_model="unused", transformer_impl="local", bf16=bf16)
    return model.build_model(architecture, config, layout, device)


def _convert(rank: int, root: Path, sizes: Sizes) -> None:
    """For every family: load, compare each parameter with the written-out reference, export."""
    from megatron_drpo.mcore.weights import places_of

    layout, device = _start(rank, sizes)
    assert (layout.tp_size, layout.pp_size, layout.vp_size, layout.ep_size) == sizes[:4]
    assert (layout.cp_size, layout.etp_size) == (sizes.cp, sizes.etp or sizes.tp)
    places = places_of(layout)
    for family, tie in MODELS:
        if sizes not in _layouts(family):
            continue
        source = root / family
        hf = load_file(source / "model.safetensors")
        if tie:
            hf["lm_head.weight"] = hf["model.embed_tokens.weight"]
        architecture = read_architecture(source)
        chunks = _build(architecture, layout, device, bf16=sizes in BF16)
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            torch.nn.init.constant_(parameter, float("nan"))
        with HfWeights(source, architecture) as weights:
            load_weights(weights, architecture, chunks, places)
        seen = [name for chunk in enumerate(chunks) for name in _check(hf, layout, *chunk)]
        layers = {int(name.split(".")[2]) for name in seen if "layers" in name}
        assert len(layers) == LAYERS // layout.pp_size and len(seen) == len(set(seen))
        experts = {int(name.split(".")[6]) for name in seen if "local_experts" in name}
        assert len(experts) == (EXPERTS // layout.ep_size if family in MOE else 0)

        small = {"max_shard_bytes": MAX_BYTES} if sizes in SMALL_FILES else {}
        out = _out(root, family, sizes)
        export_hf(out, source, architecture, chunks, places, **small)
        if sizes in STREAMED:
            _stream(hf, FullTensors(architecture, chunks, places))
    end(layout, root)


def _stream(hf: dict[str, Tensor], tensors: FullTensors) -> None:
    """Rank 0 gets every tensor, the experts of all ranks among them, and the others get none."""
    found = {name: value.clone() for name, value in tensors.stream()}
    assert found.keys() <= hf.keys()
    assert [*found] == [*tensors.described][: len(found)]
    assert all(torch.equal(value, hf[name]) for name, value in found.items())
    if dist.get_rank() == 0:
        assert found.keys() == tensors.described.keys()
        assert hf.keys() - found.keys() <= {"lm_head.weight"}  # a tied weight goes out once
    else:
        assert not found


def _check(hf: dict[str, Tensor], layout: Any, number: int, chunk: Any) -> list[str]:
    """Compare a chunk's parameters with the reference; returns their names in the whole model."""
    per_chunk = LAYERS // (layout.pp_size * layout.vp_size)
    names = []
    for local, parameter in chunk.named_parameters():
        parts = local.split(".")
        if local.startswith("decoder.layers."):
            first = (number * layout.pp_size + layout.pp_rank) * per_chunk
            parts[2] = str(first + int(parts[2]))
        if "local_experts" in parts:
            parts[6] = str(layout.ep_rank * EXPERTS // layout.ep_size + int(parts[6]))
        name = ".".join(parts)
        place = (layout.tp_rank, layout.tp_size)
        if "local_experts" in parts:
            place = (layout.etp_rank, layout.etp_size)
        expected = reference_shard(hf, name, *place, len(parameter))
        assert torch.equal(parameter, expected.to(parameter.dtype)), name
        names.append(name)
    return names


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks left behind; their own assertions fail here."""
    root = tmp_path_factory.mktemp("ranks")
    for family, tie in MODELS:
        save_tiny(root / family, family, tie=tie)
    save_tiny(root / "failing" / "in", "qwen3_moe")
    (root / "failing" / "occupied").mkdir()
    (root / "failing" / "occupied" / "notes.txt").write_text("keep")
    run_distributed(_ranks, WORLD, root)
    return root


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "tie"), MODELS)
def test_every_layout_exports_the_numbers_that_it_loaded(
    root: Path, family: str, tie: bool
) -> None:
    before = load_file(root / family / "model.safetensors")
    for sizes in _layouts(family):
        out = _out(root, family, sizes)
        dtype = torch.bfloat16 if sizes in BF16 else torch.float32
        files = sorted(path.name for path in out.glob("*.safetensors"))
        assert files == file_names(len(files))
        writers = sizes.pp * sizes.ep
        assert len(files) > writers if sizes in SMALL_FILES else len(files) == writers
        index = out / "model.safetensors.index.json"
        assert index.exists() == (len(files) > 1)
        after: dict[str, Tensor] = {}
        for file in files:
            shard = load_file(out / file)
            num_bytes = sum(value.numel() * value.element_size() for value in shard.values())
            assert shard and (num_bytes <= MAX_BYTES or sizes not in SMALL_FILES)
            assert not shard.keys() & after.keys()
            after |= shard
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert after[name].dtype == dtype and torch.equal(after[name], value.to(dtype)), name
        if index.exists():
            size = sum(value.numel() * dtype.itemsize for value in before.values())
            assert json.loads(index.read_text())["metadata"]["total_size"] == size
        manifest = read_manifest(out)
        assert manifest is not None
        with HfWeights(out, read_architecture(out)) as weights:
            assert check_manifest(weights, manifest) == []
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "tie"), MODELS)
def test_transformers_loads_what_many_ranks_wrote(root: Path, family: str, tie: bool) -> None:
    from transformers import AutoModelForCausalLM

    sizes = Sizes(2, ep=2, etp=1) if family in MOE else Sizes(1, 2, 2)
    found = AutoModelForCausalLM.from_pretrained(_out(root, family, sizes)).state_dict()
    expected = tiny_model(family, tie=tie).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def _fail(rank: int, root: Path) -> None:
    """One rank cannot write: all of them must say so, and none may wait."""
    from megatron_drpo.mcore.weights import places_of

    for sizes, fails in FAILING.items():
        layout, device = _start(rank, sizes)
        architecture = read_architecture(root / "in")
        chunks = _build(architecture, layout, device)

        def attempt(out: Path, layout: Any = layout, chunks: Any = chunks) -> str:
            source = read_architecture(root / "in")
            try:
                export_hf(out, root / "in", source, chunks, places_of(layout))
            except CheckpointError as error:
                return str(error)
            return "exported"

        occupied = attempt(root / "occupied")
        assert "occupied: exists and is no checkpoint" in occupied, occupied
        with pytest.MonkeyPatch.context() as patch:
            if rank == fails:
                patch.setattr(SafetensorsFile, "write", _disk_full_after(3))
            message = attempt(root / "out")
        assert "No space left on device" in message, message
        dist.barrier()
        assert sorted(path.name for path in root.iterdir()) == ["in", "occupied"]
        dist.barrier()
        assert attempt(root / "out") == "exported"
        dist.barrier()
        if rank == 0:
            (root / "out").rename(root.parent / f"recovered-{sizes}")
        end(layout, root.parent)


def _disk_full_after(count: int) -> Any:
    whole, written = SafetensorsFile.write, []

    def write(self: SafetensorsFile, name: str, tensor: Tensor) -> str:
        written.append(name)
        if len(written) > count:
            raise OSError(28, "No space left on device")
        return whole(self, name, tensor)

    return write


@pytest.mark.distributed
def test_a_rank_that_cannot_write_ends_the_export_everywhere(root: Path) -> None:
    """Asserted on the ranks, by `_fail`; here, that the next export went well."""
    assert (root / "failing" / "occupied" / "notes.txt").read_text() == "keep"
    for sizes in FAILING:
        assert (root / f"recovered-{sizes}" / "model-00002-of-00002.safetensors").exists()
