"""Megatron's own format: Megatron reads what we write, we read what it writes, and no payload runs.

Megatron's `dist_checkpointing` is the reference, under every kind of layout.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_drpo.checkpoint import torch_dist
from megatron_drpo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.checkpoint.torch_dist import (
    MegatronWeights,
    TorchDistReader,
    TorchDistWriter,
    find_torch_dist,
    open_weights,
)
from megatron_drpo.errors import CheckpointError
from tests.distributed import run_distributed
from tests.tiny_models import EXPERTS, HIDDEN, LAYERS, VOCAB, reference_shard, save_tiny

WORLD = 4
MODELS = {"llama": False, "qwen3": True, "qwen2": False, "mixtral": False, "qwen3_moe": True}
# family, then tp, pp, chunks per stage, ep
LAYOUTS = [
    *(("llama", layout) for layout in [(1, 1, 1, 1), (1, 2, 2, 1)]),
    *(("qwen3", layout) for layout in [(1, 2, 1, 1), (2, 2, 1, 1)]),
    ("qwen2", (4, 1, 1, 1)),
    *(("mixtral", layout) for layout in [(2, 1, 1, 1), (1, 2, 1, 2)]),
    *(("qwen3_moe", layout) for layout in [(1, 1, 1, 4), (1, 2, 2, 2)]),
]
SINGLETONS = {"singleton_local_shards": True}


# --- Against Megatron ---------------------------------------------------------------------------


def _ranks(rank: int, world_size: int, root: Path) -> None:
    """In every layout: load what we wrote, compare each parameter, save it for us to read."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_drpo.config import ModelConfig, ParallelConfig
    from megatron_drpo.device import Device
    from megatron_drpo.mcore import model, parallel

    device = Device("cpu", "gloo", rank, "test")
    config = ModelConfig(hf_model="unused", transformer_impl="local")
    for family, (tp, pp, vp, ep) in LAYOUTS:
        layout = parallel.initialize(ParallelConfig(tp, pp, vp, ep), device, seed=1)
        architecture = read_architecture(root / family)
        hf = load_file(root / family / "model.safetensors")
        chunks = model.build_model(architecture, config, layout, device)

        def state(**metadata: Any) -> dict[str, Any]:
            return {  # a fresh dict for each chunk, since Megatron keeps its groups in it
                f"model{number}": chunk.sharded_state_dict(metadata=dict(metadata))
                for number, chunk in enumerate(chunks)  # noqa: B023
            }

        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(torch.nan)
            # Only the layers' `_extra_state`, which has no content here, is not in our files.
            loaded, missing, _ = dist_checkpointing.load(
                state(), str(root / f"{family}-megatron"), strict="return_all"
            )
        assert all("_extra_state" in key for key in missing), missing
        for number, chunk in enumerate(chunks):
            kept = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
            assert not kept.unexpected_keys
            assert all("_extra_state" in key for key in kept.missing_keys), kept.missing_keys
            layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
            for name, parameter in chunk.named_parameters():
                whole = _global_name(name, layers, layout.ep_rank * EXPERTS // ep)
                rows = len(parameter)
                expected = reference_shard(hf, _tied(hf, whole), layout.tp_rank, tp, rows)
                assert torch.equal(parameter, expected), (family, whole)
        name = f"{family}-{tp}-{pp}-{vp}-{ep}"
        for ending, metadata in [("", {}), *([("-one", SINGLETONS)] if vp == 2 else [])]:
            out = root / "saved" / (name + ending)
            if rank == 0:
                out.mkdir(parents=True)
            torch.distributed.barrier()
            dist_checkpointing.save(state(**metadata), str(out))
        parallel_state.destroy_model_parallel()


def _global_name(name: str, layers: list[int], first_expert: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(layers[int(parts[2])])
    if "local_experts" in parts:
        place = parts.index("local_experts") + 1
        parts[place] = str(int(parts[place]) + first_expert)
    return ".".join(parts)


def _tied(hf: dict[str, Tensor], name: str) -> str:
    tied = name == "output_layer.weight" and "lm_head.weight" not in hf
    return "embedding.word_embeddings.weight" if tied else name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family in both formats, and what Megatron saved; the ranks' assertions fail here."""
    root = tmp_path_factory.mktemp("torch_dist")
    for family, tie in MODELS.items():
        save_tiny(root / family, family, tie=tie)
        hf_to_megatron(root / family, root / f"{family}-megatron", tp_size=2)
    run_distributed(_ranks, WORLD, root)
    return root


@pytest.mark.distributed
def test_megatron_loads_ours_and_we_read_megatrons_in_every_layout(root: Path) -> None:
    saved = sorted(path.name for path in (root / "saved").iterdir())
    assert len(saved) == len(LAYOUTS) + sum(layout[2] == 2 for _, layout in LAYOUTS)
    for name in saved:
        family = name.partition("-")[0]
        before = load_file(root / family / "model.safetensors")
        out = root / "back" / name
        megatron_to_hf(root / "saved" / name, out, settings=root / family)
        after = load_file(out / "model.safetensors")
        assert after.keys() == before.keys(), name
        for tensor, value in before.items():
            assert torch.equal(after[tensor].view(torch.int32), value.view(torch.int32)), tensor


@pytest.mark.distributed
def test_a_layer_at_a_time_or_all_stacked_is_the_same(root: Path) -> None:
    """Megatron's newer keys, one per layer and expert, were really among what was read."""
    keys = TorchDistReader(root / "saved" / "qwen3_moe-1-2-2-2-one").tensors
    assert "decoder.layers.3.mlp.experts.experts.2.linear_fc1.weight_w" in keys
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight" not in keys
    keys = TorchDistReader(root / "saved" / "qwen3_moe-1-2-2-2").tensors
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight" in keys


# --- Without Megatron ---------------------------------------------------------------------------


def _write(directory: Path, tensors: dict[str, Tensor], **parts: list[int]) -> None:
    """A checkpoint of whole tensors; those in `parts` are cut into rows at these bounds."""
    directory.mkdir(parents=True, exist_ok=True)
    writer = TorchDistWriter(directory)
    for key, tensor in tensors.items():
        bounds = [0, *parts.get(key.replace(".", "_"), []), len(tensor)]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            offsets = (start, *[0] * (tensor.dim() - 1))
            writer.add(key, tensor.shape, offsets, tensor[start:stop])
    writer.finish({})


def _content(directory: Path) -> dict[str, Tensor]:
    reader = TorchDistReader(directory)
    return {key: reader.read(key) for key in reader.tensors}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_tiny(directory, "llama")
    return directory


@pytest.fixture(scope="module")
def stacked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What a Megatron checkpoint of the llama holds, by key."""
    out = tmp_path_factory.mktemp("stacked") / "out"
    hf_to_megatron(llama, out)
    return _content(out)


def test_torch_itself_reads_ours_and_we_read_torchs(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Any] = {
        "a": torch.randn(5, 7, generator=generator),
        "b": torch.randn(6, 3, 2, generator=generator).bfloat16(),
        "c": torch.randn(9, generator=generator).half(),
        "view": torch.randn(4, 6, generator=generator).t()[1:4],  # not contiguous
    }
    dcp.save(dict(tensors) | {"note": "text"}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    ours = _content(tmp_path / "theirs")
    assert ours.keys() == tensors.keys()
    _write(tmp_path / "ours", tensors, a=[2], b=[1, 4])
    theirs = {key: torch.zeros_like(value) for key, value in tensors.items()}
    dcp.load(theirs, checkpoint_id=tmp_path / "ours", no_dist=True)
    for key, value in tensors.items():
        for found in (ours[key], theirs[key], _content(tmp_path / "ours")[key]):
            assert found.dtype == value.dtype and torch.equal(found, value), key


def test_reads_one_index_of_a_stack_however_it_was_cut(tmp_path: Path) -> None:
    whole = torch.arange(4 * 6 * 5, dtype=torch.float32).reshape(4, 6, 5)
    writer = TorchDistWriter(tmp_path)
    for layers, rows, columns in [
        (slice(0, 3), slice(0, 6), slice(0, 2)),  # several layers in one chunk
        (slice(0, 3), slice(0, 4), slice(2, 5)),
        (slice(0, 3), slice(4, 6), slice(2, 5)),
        (slice(3, 4), slice(0, 6), slice(0, 5)),
    ]:
        offsets = (layers.start, rows.start, columns.start)
        writer.add("w", whole.shape, offsets, whole[layers, rows, columns])
    writer.finish({})
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("w"), whole)
    for layer in range(4):
        assert torch.equal(reader.read("w", (layer,)), whole[layer])
        assert torch.equal(reader.read("w", (layer, 5)), whole[layer, 5])
    with pytest.raises(CheckpointError, match=r"w\[4\] .*hole"):
        reader.read("w", (4,))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [([(0, 2), (3, 6)], "hole"), ([(0, 4), (3, 6)], "overlap"), ([(0, 4)], "hole")],
)
def test_chunks_must_cover_a_tensor_exactly(
    tmp_path: Path, rows: list[tuple[int, int]], problem: str
) -> None:
    writer = TorchDistWriter(tmp_path)
    for start, stop in rows:
        writer.add("w", (6, 2), (start, 0), torch.ones(stop - start, 2))
    writer.finish({})
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*w\[\] \[6, 2\] .*{problem}"):
        TorchDistReader(tmp_path).read("w")


def test_threads_write_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    writer = TorchDistWriter(tmp_path)

    def add(number: int) -> None:
        tensor = torch.full((1, 1000), float(number))
        chunks.append(writer.add("w", (64, 1000), (number, 0), tensor))

    chunks: list[torch_dist.Chunk] = []
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(64)))
    assert all(chunk.start % 64 == 0 for chunk in chunks)  # so that readers can map it
    writer.finish({})
    assert torch.equal(_content(tmp_path)["w"], torch.arange(64.0)[:, None].expand(64, 1000))
    assert 1 <= len(list(tmp_path.glob("*.distcp"))) <= 4


def test_what_is_continued_is_no_checkpoint_before_it_is_finished_again(tmp_path: Path) -> None:
    first = TorchDistWriter(tmp_path)
    chunks = [first.add("w", (2, 3), (0, 0), torch.ones(1, 3))]
    first.finish({})
    second = TorchDistWriter(tmp_path, chunks)
    assert find_torch_dist(tmp_path) is None
    second.add("w", (2, 3), (1, 0), torch.full((1, 3), 2.0))
    second.finish({})
    assert torch.equal(_content(tmp_path)["w"], torch.tensor([[1.0] * 3, [2.0] * 3]))


class _Payload:
    """Unpickled by the usual means, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class _Evaluated(_Payload):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


@pytest.mark.parametrize("payload", [_Payload, _Evaluated])
@pytest.mark.parametrize("place", ["alone", "planner_data", "key", "dtype"])
def test_a_payload_in_the_index_is_refused_and_does_not_run(
    tmp_path: Path, payload: Any, place: str
) -> None:
    ran, directory = tmp_path / "ran", tmp_path / "in"
    _write(directory, {"w": torch.ones(2, 2)})
    evil = payload(ran)
    content = evil
    if place != "alone":
        content = pickle.loads((directory / ".metadata").read_bytes())
    if place == "planner_data":
        content.planner_data = {"x": [evil]}
    if place == "key":
        content.storage_data = {evil: None}
    if place == "dtype":
        content.state_dict_metadata["w"].properties.dtype = evil
    (directory / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"\.metadata: .*not trusted.*(mkdir|eval)"):
        TorchDistReader(directory)
    assert not ran.exists()
    pickle.loads((directory / ".metadata").read_bytes())
    assert ran.exists()  # the payload was a real one


def test_a_payload_in_a_chunk_is_refused_and_does_not_run(tmp_path: Path) -> None:
    directory = tmp_path / "in"
    _write(directory, {"w": torch.ones(2, 2)})
    file = directory / "__0_0.distcp"
    size = file.stat().st_size
    torch.save(_Payload(tmp_path / "ran"), file)
    with file.open("ab") as stream:
        stream.truncate(max(size, file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: .*not w float32 \[2, 2\]"):
        TorchDistReader(directory).read("w")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda d: os.truncate(d / "__0_0.distcp", 900), "__0_0.distcp is cut off: 900 bytes of"),
        (lambda d: os.truncate(d / ".metadata", 50), r"\.metadata: is not the index"),
        (lambda d: (d / ".metadata").write_bytes(b""), r"\.metadata: is not the index"),
        (lambda d: (d / ".metadata").write_bytes(pickle.dumps([])), r"\.metadata: is not the ind"),
        (lambda d: (d / ".metadata").unlink(), r"\.metadata: cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    _write(tmp_path, {"w": torch.ones(3, 100)})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        TorchDistReader(tmp_path)


def test_damage_within_a_chunk_is_named(tmp_path: Path) -> None:
    _write(tmp_path, {"w": torch.ones(3, 100)})
    with (tmp_path / "__0_0.distcp").open("r+b") as stream:
        stream.write(bytes(64))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: what lies at byte 0 is not w"):
        TorchDistReader(tmp_path).read("w")


def test_the_index_cannot_point_outside(tmp_path: Path) -> None:
    _write(tmp_path / "in", {"w": torch.ones(2, 2)})
    (tmp_path / "in" / "__0_0.distcp").rename(tmp_path / "elsewhere")
    content = pickle.loads((tmp_path / "in" / ".metadata").read_bytes())
    for info in content.storage_data.values():
        info.relative_path = "../elsewhere"
    (tmp_path / "in" / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="'../elsewhere' is not the name of a file beside"):
        TorchDistReader(tmp_path / "in")


def test_training_state_is_passed_over_and_padding_dropped(
    tmp_path: Path, llama: Path, stacked: dict[str, Tensor]
) -> None:
    padding = torch.full((3, HIDDEN), 9.0)
    padded = {
        key: torch.cat([value, padding]) if len(value) == VOCAB else value
        for key, value in stacked.items()
    }
    state = {
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(HIDDEN),
        "chained_1.optimizer.state.param.output_layer.weight": torch.ones(2, 2),
    }
    _write(tmp_path, padded | state)
    with MegatronWeights(tmp_path, read_architecture(llama)) as weights:
        assert weights.tensors["output_layer.weight"] == (torch.float32, (VOCAB, HIDDEN))
        assert torch.equal(weights.load("output_layer.weight"), stacked["output_layer.weight"])
        name = "decoder.layers.mlp.linear_fc2.weight"
        assert torch.equal(weights.load(f"{name}[2]"), stacked[name][2])
        assert not any(key in weights.tensors for key in state)


@pytest.mark.parametrize("rows", [3, 8191, 8192])
def test_a_vocabulary_is_padded_as_far_as_megatron_does(
    tmp_path: Path, llama: Path, stacked: dict[str, Tensor], rows: int
) -> None:
    key = "embedding.word_embeddings.weight"
    padded = torch.cat([stacked[key], torch.ones(rows, HIDDEN)])
    _write(tmp_path, {**stacked, key: padded})
    if rows == 8192:
        message = f"{key}: 8253 rows, config.json makes it 61 and fewer than 8192 of padding"
        with pytest.raises(CheckpointError, match=message):
            MegatronWeights(tmp_path, read_architecture(llama))
        return
    with MegatronWeights(tmp_path, read_architecture(llama)) as weights:
        assert weights.num_padding_rows == rows
        assert torch.equal(weights.load(key), stacked[key])


_FC2 = "decoder.layers.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(_FC2), rf"{_FC2}\[0\] \[32, 40\] is missing"),
        (lambda t: t | {_FC2: t[_FC2][:, :, :39]}, r"fc2.weight is \[4, 32, 39\].*\[4, 32, 40\]"),
        (lambda t: t | {_FC2: t[_FC2][:3]}, r"fc2.weight is \[3, 32, 40\].*\[4, 32, 40\]"),
        (lambda t: t | {_FC2: torch.cat([t[_FC2], t[_FC2]])}, r"fc2.weight is \[8, 32, 40\]"),
        (
            lambda t: t | {_FC2: t[_FC2].int()},
            "fc2.weight has dtype int32, must be one of bfloat16",
        ),
        (
            lambda t: t | {"output_layer.weight": t["output_layer.weight"][:60]},
            "output_layer.weight: 60 rows, config.json makes it 61",
        ),
        (
            lambda t: t | {"decoder.final_layernorm.weight": torch.ones(HIDDEN + 1)},
            r"decoder.final_layernorm.weight: 33 rows, config.json makes it 32",
        ),
        (
            lambda t: t | {"decoder.layers.self_attention.linear_qkv.bias": torch.ones(4, 64)},
            r"linear_qkv.bias \[4, 64\] is left over: llama with 4 layers",
        ),
        # A layer of its own beside the stack: which is meant?
        (
            lambda t: t | {_FC2.replace("layers.", "layers.1."): t[_FC2][1]},
            r"decoder.layers.1.mlp.linear_fc2.weight \[32, 40\] is left over",
        ),
    ],
)
def test_what_does_not_fit_the_architecture_is_named(
    tmp_path: Path, llama: Path, stacked: dict[str, Tensor], change: Any, message: str
) -> None:
    tensors = dict(stacked)
    changed = change(tensors)
    _write(tmp_path, changed if isinstance(changed, dict) else tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        MegatronWeights(tmp_path, read_architecture(llama))
    assert str(tmp_path) in str(error.value)


def test_keys_of_single_layers_may_differ_in_dtype_and_are_refused(
    tmp_path: Path, llama: Path, stacked: dict[str, Tensor]
) -> None:
    tensors = dict(stacked)
    layers = tensors.pop(_FC2)
    for layer in range(LAYERS):
        value = layers[layer] if layer else layers[layer].bfloat16()
        tensors[_FC2.replace("layers.", f"layers.{layer}.")] = value
    _write(tmp_path, tensors)
    message = r"fc2.weight\[0\] is bfloat16 but .*fc2.weight\[1\] is float32"
    with pytest.raises(CheckpointError, match=message):
        MegatronWeights(tmp_path, read_architecture(llama))


def test_finds_what_a_directory_points_to(tmp_path: Path, llama: Path) -> None:
    assert find_torch_dist(llama) is None
    assert find_torch_dist(tmp_path / "absent") is None
    hf_to_megatron(llama, tmp_path / "run" / "iter_0000012")
    direct = tmp_path / "run" / "iter_0000012"
    assert find_torch_dist(direct) == direct
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    tracker.write_text("12\n")
    assert find_torch_dist(tmp_path / "run") == direct
    tracker.write_text("release")
    with pytest.raises(CheckpointError, match=f"{tracker}: says 'release', but .*release/.metadat"):
        find_torch_dist(tmp_path / "run")
    shutil.copytree(direct, tmp_path / "run" / "release")
    assert find_torch_dist(tmp_path / "run") == tmp_path / "run" / "release"
    ours = tmp_path / "checkpoints"
    shutil.copytree(direct, ours / "step-000003")
    (ours / "step-000003" / "state.json").write_text("{}")
    (ours / "latest").write_text("step-000003")
    assert find_torch_dist(ours) == ours / "step-000003"

    architecture = read_architecture(llama)
    for directory, kind in [(llama, "hf"), (tmp_path / "run", "megatron"), (ours, "megatron")]:
        with open_weights(directory, architecture) as weights:
            assert weights.kind == kind
    # DeepSpeed leaves a `latest` beside Hugging Face's weights.
    for text in (b"global_step500", b"step-", b"../step-000003", b"\xff\xfe"):
        (llama / "latest").write_bytes(text)
        with open_weights(llama, architecture) as weights:
            assert weights.kind == "hf"
    (llama / "latest").unlink()
    (ours / "latest").write_text("step-000004")
    with pytest.raises(CheckpointError, match="names step-000004, which is not a complete"):
        find_torch_dist(ours)
    with pytest.raises(CheckpointError, match=r"absent: holds no \.metadata"):
        MegatronWeights(tmp_path / "absent", architecture)


def test_what_the_index_may_name_does_nothing() -> None:
    plain = {("torch", "Size"), ("collections", "OrderedDict"), ("collections", "defaultdict")}
    for place, value in torch_dist._ALLOWED.items():
        inert = isinstance(value, type) and issubclass(value, torch_dist._Inert)
        assert inert or place in plain or isinstance(value, torch.dtype), place
