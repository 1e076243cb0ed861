"""HF <-> Megatron over ranks: every parameter of every layout, and an export all ranks agree on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed import run_distributed
from tests.tiny_models import LAYERS, reference_shard, save_tiny

WORLD = 4
# tp, pp, chunks per stage; data parallelism takes the rest
LAYOUTS = [(4, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 2, 2)]
MODELS = [("llama", True), ("qwen3", False)]
BF16_LAYOUT = (2, 2, 1)


def _out(root: Path, family: str, layout: tuple[int, int, int]) -> Path:
    return root / f"{family}-out-tp{layout[0]}-pp{layout[1]}-vp{layout[2]}"


def _ranks(rank: int, world_size: int, root: Path) -> None:
    """One start of the processes, which is what costs time, for everything below."""
    _convert(rank, root)
    _fail(rank, root / "failing")


def _convert(rank: int, root: Path) -> None:
    """In every layout: load, compare each parameter with the written-out reference, export."""
    from megatron.core import parallel_state

    from megatron_drpo.checkpoint.families import read_architecture
    from megatron_drpo.checkpoint.hf import export_hf, load_hf
    from megatron_drpo.config import ModelConfig, ParallelConfig
    from megatron_drpo.device import Device
    from megatron_drpo.mcore import model, parallel

    device = Device("cpu", "gloo", rank, "test")
    for tp, pp, vp in LAYOUTS:
        sizes = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            num_virtual_stages_per_pipeline_rank=vp,
        )
        layout = parallel.initialize(sizes, device, seed=1)
        bf16 = (tp, pp, vp) == BF16_LAYOUT
        for family, tie in MODELS:
            source = root / family
            hf = load_file(source / "model.safetensors")
            if tie:
                hf["lm_head.weight"] = hf["model.embed_tokens.weight"]
            architecture = read_architecture(source)
            config = ModelConfig(hf_model="unused", transformer_impl="local", bf16=bf16)
            chunks = model.build_model(architecture, config, layout, device)
            for parameter in (p for chunk in chunks for p in chunk.parameters()):
                torch.nn.init.constant_(parameter, float("nan"))
            load_hf(source, architecture, chunks, tp_rank=layout.tp_rank, tp_size=tp)

            seen = set()
            per_chunk = LAYERS // (pp * vp)
            for number, chunk in enumerate(chunks):
                first = (number * pp + layout.pp_rank) * per_chunk
                for name, parameter in chunk.named_parameters():
                    parts = name.split(".")
                    if name.startswith("decoder.layers."):
                        parts[2] = str(first + int(parts[2]))
                    name = ".".join(parts)
                    expected = reference_shard(hf, name, layout.tp_rank, tp, len(parameter))
                    assert torch.equal(parameter, expected.to(parameter.dtype)), (family, name)
                    seen.add(name)
            layers = {int(name.split(".")[2]) for name in seen if "layers" in name}
            assert len(layers) == LAYERS // pp

            out = _out(root, family, (tp, pp, vp))
            groups = {"tp_group": layout.tp_group, "pp_group": layout.pp_group}
            export_hf(out, source, architecture, chunks, **groups, dp_rank=layout.dp_rank)
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks left behind; their own assertions fail here."""
    root = tmp_path_factory.mktemp("ranks")
    for family, tie in MODELS:
        save_tiny(root / family, family, tie=tie)
    save_tiny(root / "failing" / "in", "llama")
    (root / "failing" / "occupied").mkdir()
    (root / "failing" / "occupied" / "notes.txt").write_text("keep")
    run_distributed(_ranks, WORLD, root)
    return root


@pytest.mark.distributed
def test_every_layout_holds_the_right_numbers_and_exports_them(root: Path) -> None:
    from transformers import AutoModelForCausalLM

    for family, _ in MODELS:
        before = load_file(root / family / "model.safetensors")
        for layout in LAYOUTS:
            out = _out(root, family, layout)
            dtype = torch.bfloat16 if layout == BF16_LAYOUT else torch.float32
            stages = layout[1]
            files = sorted(path.name for path in out.glob("*.safetensors"))
            if stages == 1:
                assert files == ["model.safetensors"]
                assert not (out / "model.safetensors.index.json").exists()
            else:
                names = [f"model-{n + 1:05d}-of-{stages:05d}.safetensors" for n in range(stages)]
                assert files == names
                index = json.loads((out / "model.safetensors.index.json").read_text())
                size = sum(value.numel() * dtype.itemsize for value in before.values())
                assert index["metadata"]["total_size"] == size
            after = {}
            for file in files:
                shard = load_file(out / file)
                assert not shard.keys() & after.keys()
                after |= shard
            assert after.keys() == before.keys()
            for name, value in before.items():
                assert after[name].dtype == dtype and torch.equal(after[name], value.to(dtype))
        reloaded = AutoModelForCausalLM.from_pretrained(_out(root, family, (2, 2, 2)))
        assert all(torch.equal(reloaded.state_dict()[name], before[name]) for name in before)
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def _fail(rank: int, root: Path) -> None:
    """One rank cannot write: all of them must say so, and none may wait."""
    from megatron_drpo.checkpoint import hf
    from megatron_drpo.checkpoint.families import read_architecture
    from megatron_drpo.config import ModelConfig, ParallelConfig
    from megatron_drpo.device import Device
    from megatron_drpo.errors import CheckpointError
    from megatron_drpo.mcore import model, parallel

    device = Device("cpu", "gloo", rank, "test")
    sizes = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    layout = parallel.initialize(sizes, device, seed=1)
    architecture = read_architecture(root / "in")
    config = ModelConfig(hf_model="unused", transformer_impl="local")
    chunks = model.build_model(architecture, config, layout, device)
    groups = {"tp_group": layout.tp_group, "pp_group": layout.pp_group}

    def attempt(out: Path) -> str:
        try:
            hf.export_hf(out, root / "in", architecture, chunks, **groups, dp_rank=0)
        except CheckpointError as error:
            return str(error)
        return "exported"

    occupied = attempt(root / "occupied")
    assert "occupied: exists and is no checkpoint" in occupied, occupied
    whole = hf.save_file
    if layout.pp_rank == 1:

        def full(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        hf.save_file = full
    message = attempt(root / "out")
    assert "No space left on device" in message, message
    hf.save_file = whole
    dist.barrier()
    assert sorted(path.name for path in root.iterdir()) == ["in", "occupied"]
    dist.barrier()
    assert attempt(root / "out") == "exported"


@pytest.mark.distributed
def test_a_rank_that_cannot_write_ends_the_export_everywhere(root: Path) -> None:
    assert (root / "failing" / "occupied" / "notes.txt").read_text() == "keep"
    assert load_file(root / "failing" / "out" / "model-00002-of-00002.safetensors")
    assert not [path for path in (root / "failing").iterdir() if path.name.startswith(".")]
