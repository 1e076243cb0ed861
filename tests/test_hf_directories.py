"""Hugging Face directories without a model: what is read, what is written, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_drpo.checkpoint import hf
from megatron_drpo.checkpoint.families import family_of, read_architecture
from megatron_drpo.checkpoint.hf import HfWeights, SafetensorsFile, verify_checkpoint
from megatron_drpo.errors import CheckpointError
from tests.tiny_models import save_tiny, tiny_model

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def opened(directory: Path) -> HfWeights:
    return HfWeights(directory, read_architecture(directory))


def edit_weights(directory: Path, drop: tuple[str, ...] = (), **add: Tensor) -> None:
    path = directory / "model.safetensors"
    tensors = {name: value for name, value in load(path.read_bytes()).items() if name not in drop}
    save_file(tensors | add, path)


def problem(directory: Path) -> str:
    """The message of the error that verification must raise."""
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(directory, read_architecture(directory))
    return str(error.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_tiny(tmp_path, "qwen3")
    verify_checkpoint(tmp_path, read_architecture(tmp_path))
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


# --- Reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_is_read_whole_and_in_slices_by_any_thread(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_model("qwen3_moe", dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    expected = {name: value for file in files for name, value in load_file(file).items()}
    with opened(tmp_path) as weights, ThreadPoolExecutor(4) as threads:
        assert weights.kind == "hf" and weights.directory == tmp_path
        assert dict(weights.tensors) == {n: (v.dtype, tuple(v.shape)) for n, v in expected.items()}
        read = dict(zip(expected, threads.map(weights.load, expected), strict=True))
        architecture = read_architecture(tmp_path)
        entries = family_of(architecture).entries(architecture)
        for entry in entries:
            for name, lazy in zip(entry.hf, weights.hf(entry), strict=True):
                assert torch.equal(lazy[1:3], expected[name][1:3])
                assert torch.equal(lazy[..., :5], expected[name][..., :5])
        names = sorted(name for entry in entries for name in weights.names(entry))
        assert names == sorted(expected)
    for name, value in read.items():  # also after the files are closed
        assert value.dtype == dtype and torch.equal(value, expected[name]), name


def test_what_is_written_into_a_loaded_tensor_stays_out_of_the_file(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    with opened(saved) as weights:
        weights.load(EMBEDDING).zero_()
        assert weights.load(EMBEDDING).any()
    assert (saved / "model.safetensors").read_bytes() == before


def test_data_that_is_not_aligned_is_read(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    expected = load(data)  # `load_file` would map what is rewritten below
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    text += b" " * ((-len(text) + 1) % 4)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with opened(saved) as weights:
        for name, value in expected.items():
            read = weights.load(name)
            assert read.data_ptr() % 4 == 0 and torch.equal(read, value), name


def test_a_single_file_comes_before_an_index_as_in_transformers(saved: Path) -> None:
    weight_map = {"stale": "model-00001-of-00002.safetensors"}
    (saved / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with opened(saved) as weights:
        assert set(weights.tensors) == set(load_file(saved / "model.safetensors"))


def test_the_links_of_hugging_face_s_cache_are_followed(sharded: Path) -> None:
    blobs = sharded.parent / f"{sharded.name}-blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / blobs.name / str(number))
    with opened(sharded) as weights:
        assert torch.equal(weights.load(HEAD), tiny_model("llama").state_dict()[HEAD])


def test_a_tied_weight_is_found_under_either_name(tmp_path: Path) -> None:
    weight = save_tiny(tmp_path, "llama", tie=True)[EMBEDDING]
    architecture = read_architecture(tmp_path)
    family = family_of(architecture)
    tied = [family.first[0], family.last[-1]]

    def check(*names: str) -> None:
        with opened(tmp_path) as weights:
            assert set(weights.tensors) >= set(names)
            for entry in tied:
                assert weights.names(entry) == list(names)
                (tensor,) = weights.hf(entry)
                assert torch.equal(tensor, weight)

    check(EMBEDDING)
    edit_weights(tmp_path, **{HEAD: weight.clone()})
    check(EMBEDDING, HEAD)
    edit_weights(tmp_path, drop=(EMBEDDING,))
    check(HEAD)


def test_two_different_tied_weights_are_refused(tmp_path: Path) -> None:
    weight = save_tiny(tmp_path, "llama", tie=True)[EMBEDDING].clone()
    weight[-1, -1] += 1e-3
    edit_weights(tmp_path, **{HEAD: weight})
    first = family_of(read_architecture(tmp_path)).first[0]
    with opened(tmp_path) as weights:
        with pytest.raises(CheckpointError, match=f"{EMBEDDING} and {HEAD} differ"):
            weights.hf(first)
        assert torch.equal(weights.load(HEAD), weight)
    edit_weights(tmp_path, **{HEAD: weight.bfloat16()})
    assert f"{EMBEDDING} is F32 but {HEAD} is BF16" in problem(tmp_path)


# --- Writing ------------------------------------------------------------------------------------


def test_a_file_written_in_any_order_by_threads_is_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    draw = torch.Generator().manual_seed(1)
    tensors = {
        "odd": torch.randn(3, 5, generator=draw).bfloat16(),
        "wide": torch.randn(7, 11, generator=draw),
        "half": torch.randn(1, generator=draw).half(),
        "turned": torch.randn(33, 65, generator=draw).t(),
        "scalar": torch.tensor(3.5),
        '\u540d "quoted"': torch.randn(2, 2, 2, generator=draw),
    }
    file = SafetensorsFile(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    order = list(reversed(tensors))
    with ThreadPoolExecutor(3) as threads:
        digests = list(threads.map(lambda name: file.write(name, tensors[name]), order))
    assert not path.exists()
    file.close()
    for name, value in zip(order, digests, strict=True):
        raw = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert value == hashlib.sha256(raw).hexdigest()
    with safe_open(path, framework="pt") as read:
        assert read.metadata() == {"format": "pt"}
        assert set(read.keys()) == set(tensors)
        for name, value in tensors.items():
            found = read.get_tensor(name)
            assert found.dtype == value.dtype and torch.equal(found, value), name
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, value in tensors.items():
        assert header[name]["data_offsets"][0] % value.dtype.itemsize == 0
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_whole_never_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    described = {"a": (torch.float32, (2, 3)), "b": (torch.float32, (1,))}
    file = SafetensorsFile(path, described)
    file.write("a", torch.zeros(2, 3))
    for name, value in {
        "a": torch.zeros(2, 3),  # a second time
        "c": torch.zeros(1),
        "b": torch.zeros(2),
    }.items():
        with pytest.raises(ValueError, match=f"{name} .* still to be written"):
            file.write(name, value)
    with pytest.raises(ValueError, match="still to be written"):
        file.write("b", torch.zeros(1).bfloat16())
    with pytest.raises(ValueError, match="b were not written"):
        file.close()
    assert not path.exists()
    file.abort()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = SafetensorsFile(tmp_path / "x", {"a": (torch.float32, (4,))})

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        file.write("a", torch.zeros(4))
    with pytest.raises(ValueError, match="a were not written"):
        file.close()
    file.abort()


def test_writes_that_the_system_cuts_short_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:7], at))
    value = torch.arange(100.0)
    file = SafetensorsFile(tmp_path / "x", {"a": (torch.float32, (100,))})
    file.write("a", value)
    file.close()
    assert torch.equal(load_file(tmp_path / "x")["a"], value)


@given(
    sizes=st.lists(st.integers(1, 9), max_size=12),
    max_bytes=st.integers(1, 40),
)
def test_files_are_planned_in_order_and_full(sizes: list[int], max_bytes: int) -> None:
    names = [f"w{n}" for n in range(len(sizes))]
    tensors = {name: (torch.float16, (size,)) for name, size in zip(names, sizes, strict=True)}
    bytes_of = {name: 2 * size for name, size in zip(names, sizes, strict=True)}
    files = hf.plan_files(tensors, max_bytes)
    assert [name for file in files for name in file] == names
    for number, file in enumerate(files):
        used = sum(bytes_of[name] for name in file)
        assert file and (used <= max_bytes or len(file) == 1)
        if number + 1 < len(files):  # the next tensor had no room
            assert used + bytes_of[files[number + 1][0]] > max_bytes


def test_names_and_index_are_hugging_face_s(tmp_path: Path) -> None:
    assert hf.file_names(1) == ["model.safetensors"]
    assert hf.file_names(2) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    hf.write_index(tmp_path, {"a": "model.safetensors"}, 4)
    assert not list(tmp_path.iterdir())
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    expected = json.loads((tmp_path / INDEX).read_text())
    size = sum(v.numel() * 4 for v in tiny_model("llama").state_dict().values())
    hf.write_index(tmp_path, expected["weight_map"], size)
    written = json.loads((tmp_path / INDEX).read_text())
    assert written["weight_map"] == expected["weight_map"]
    assert written["metadata"]["total_size"] == expected["metadata"]["total_size"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_settings_are_copied_with_the_dtype_of_the_weights(tmp_path: Path, key: str | None) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    config = {"b": 1, "a": "\u00e9"} | ({key: "float32"} if key else {})
    (source / "config.json").write_text(json.dumps(config))
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "manifest.json",
    ):
        (source / name).write_text(f"{name} {{}}")
    for dtype in (None, torch.float32 if key else None):
        hf.copy_settings(source, out, dtype)
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    hf.copy_settings(source, out, torch.bfloat16)
    written = json.loads((out / "config.json").read_text())
    assert written == config | {key or "dtype": "bfloat16"} and list(written)[:2] == ["b", "a"]
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    ]
    assert (out / "tokenizer.json").read_text() == "tokenizer.json {}"


def test_a_config_with_both_names_of_the_dtype_keeps_both(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "config.json").write_text('{"dtype": "bfloat16", "torch_dtype": "float32"}')
    hf.copy_settings(source, out, torch.bfloat16)
    written = json.loads((out / "config.json").read_text())
    assert written == {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


# --- Damaged checkpoints ------------------------------------------------------------------------


def test_all_wrong_tensors_are_reported_with_file_and_both_shapes(saved: Path) -> None:
    edit_weights(
        saved,
        drop=("model.layers.3.mlp.up_proj.weight", "lm_head.weight"),
        **{
            "model.norm.weight": torch.zeros(31),
            "model.layers.4.mlp.up_proj.weight": torch.zeros(40, 32),
            "model.layers.0.self_attn.q_norm.weight": torch.zeros(8, dtype=torch.int8),
            "model.layers.0.self_attn.k_norm.weight": torch.zeros(8).to(torch.float8_e4m3fn),
        },
    )
    lines = problem(saved).splitlines()
    file = saved / "model.safetensors"
    formats = "must be one of BF16, F16, F32; a quantised model has to be stored in one of them"
    assert sorted(lines[1:]) == sorted(
        [
            f"  model.layers.3.mlp.up_proj.weight [40, 32] is missing from {saved}",
            f"  lm_head.weight [61, 32] is missing from {saved}",
            f"  {file}: model.norm.weight has shape [31], config.json makes it [32]",
            f"  {file}: model.layers.4.mlp.up_proj.weight [40, 32] is left over: qwen3 with 4 "
            "layers has no such tensor",
            f"  {file}: model.layers.0.self_attn.q_norm.weight has dtype I8, {formats} first",
            f"  {file}: model.layers.0.self_attn.k_norm.weight has dtype F8_E4M3, {formats} first",
        ]
    )


def test_a_message_stays_readable_when_everything_is_wrong(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config["layer_types"]
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 100}))
    lines = problem(saved).splitlines()
    assert len(lines) == 52
    assert lines[-1] == f"  and {96 * 11 - 50} more"  # a layer of Qwen3 has 11 tensors


def test_dtypes_that_cannot_be_stored_together_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")

    def recast(*endings: str) -> dict[str, Tensor]:
        return {n: v.bfloat16() for n, v in weights.items() if n.endswith(endings)}

    # Norms in another dtype than matrices are common, and can be stored.
    edit_weights(saved, **recast("norm.weight"))
    verify_checkpoint(saved, read_architecture(saved))
    edit_weights(saved, **recast("2.self_attn.k_proj.weight", "3.mlp.down_proj.weight"))
    lines = problem(saved).splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == [
        "  model.layers.0.self_attn.q_proj.weight is F32 but "
        "model.layers.2.self_attn.k_proj.weight is BF16",
        "  model.layers.0.mlp.down_proj.weight is F32 but model.layers.3.mlp.down_proj.weight is "
        "BF16",
    ]


def test_a_truncated_file_is_reported_with_both_sizes(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    for cut in (data[:-100], data + b"\0"):
        path.write_bytes(cut)
        expected = f"{path}: is cut off or damaged: {len(cut)} bytes, its header says {len(data)}"
        assert expected in problem(saved)
    path.write_bytes(data[:50])
    header = 8 + int.from_bytes(data[:8], "little")
    assert f"{path}: is cut off: 50 bytes, its header needs {header}" in problem(saved)


def rewrite_header(path: Path, change: Any) -> None:
    """Replace the header's text by `change(text)`; the data stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_header(path: Path, name: str, **fields: Any) -> None:
    def change(text: str) -> str:
        header = json.loads(text)
        header[name] |= {key: value(header[name][key]) for key, value in fields.items()}
        return json.dumps(header)

    rewrite_header(path, change)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_offsets": lambda at: [at[0] - 128, at[1] - 128]}, "overlaps|follows a gap"),
        ({"data_offsets": lambda at: [at[0] + 10**15, at[1] + 10**15]}, "follows a gap"),
        (
            {"data_offsets": lambda at: [at[0], at[1] - 4]},
            "takes 128 bytes, its header gives .*124",
        ),
        ({"data_offsets": lambda at: [at[1], at[0]]}, "takes 128 bytes, its header gives .*-128"),
        ({"data_offsets": lambda at: [-at[0], at[1]]}, "must be whole numbers"),
        ({"data_offsets": lambda at: [float(at[0]), at[1]]}, "must be whole numbers"),
        ({"data_offsets": lambda at: at[:1]}, "is not a safetensors file"),
        ({"shape": lambda shape: [33]}, "takes 132 bytes, its header gives it 128"),
        ({"shape": lambda shape: [-32]}, "must be whole numbers"),
        ({"shape": lambda shape: [0, 2**63]}, "has no elements"),
        ({"shape": lambda shape: ["32"]}, "must be whole numbers"),
        ({"shape": lambda shape: [4, 8]}, r"has shape \[4, 8\], config.json makes it \[32\]"),
        ({"dtype": lambda dtype: "F16"}, "takes 64 bytes, its header gives it 128"),
        ({"dtype": lambda dtype: None}, "has dtype None, must be one of"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    saved: Path, fields: dict[str, Any], message: str
) -> None:
    edit_header(saved / "model.safetensors", NORM, **fields)
    found = problem(saved)
    assert re.search(message, found) and str(saved / "model.safetensors") in found, found


def test_a_name_given_twice_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    rewrite_header(path, lambda text: text.replace('"lm_head.weight"', f'"{NORM}"'))
    assert f"{path}: names '{NORM}' twice" in problem(saved)


def test_other_contents_are_no_safetensors_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    path.write_text(pointer)
    assert f"{path}: is a Git LFS pointer, not the weights: run `git lfs pull`" in problem(saved)
    path.write_bytes(b"")
    assert f"{path}: is empty" in problem(saved)
    path.write_bytes(b"\x05")
    assert f"{path}: is not a safetensors file" in problem(saved)
    for text in (b"hello", b"[1]", b'{"a": 1}', b"[" * 100_000, b'{"a": {"dtype": "F32"}}'):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert f"{path}: is not a safetensors file" in problem(saved)
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    assert f"{path}: is not a file" in problem(saved)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models

    path = saved / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    assert "safetensors.index.json is there; download the model's safetensors" in problem(saved)
    (saved / "consolidated.00.pth").write_bytes(b"")
    assert "only pickled weights (consolidated.00.pth)" in problem(saved)
    torch.save(tensors, saved / "pytorch_model.bin")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(saved)

    python, flag, program, *arguments = shlex.split(problem(saved).splitlines()[-1])
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(compile(program, "command", "exec"), {})
    converted = Path(arguments[1])
    assert f"use {converted}" in problem(saved)
    assert (converted / "tokenizer.json").is_file()
    with opened(converted) as weights:
        assert all(torch.equal(weights.load(name), value) for name, value in tensors.items())


def test_problems_of_several_files(sharded: Path) -> None:
    files = sorted(sharded.glob("model-*.safetensors"))
    index_path = sharded / INDEX
    files[0].unlink()
    twice, value = next(iter(load_file(files[2]).items()))
    save_file(load_file(files[1]) | {"stray": torch.zeros(1), twice: value}, files[1])
    message = problem(sharded)
    assert f"{files[0]}: cannot be read (No such file" in message
    assert f"{files[1]}: stray is not placed there by {index_path.name}" in message
    assert f"{files[1]}: {twice} is stored twice: {INDEX} places it in {files[2].name}" in message


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "weights.bin", ""])
def test_an_index_names_safetensors_beside_it_and_nothing_else(sharded: Path, file: str) -> None:
    tensors = {HEAD: tiny_model("llama").state_dict()[HEAD]}
    save_file(tensors, sharded.parent / "secret.safetensors")
    save_file(tensors, sharded / "weights.bin")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][HEAD] = file
    (sharded / INDEX).write_text(json.dumps(index))
    expected = f"{sharded / INDEX}: {file!r} is not the name of a safetensors file beside it"
    assert expected in problem(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "nothing",
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
    ],
)
def test_what_is_no_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert f"{sharded / INDEX}: is not a safetensors index" in problem(sharded)


def test_a_tensor_that_its_file_lacks_is_missing(sharded: Path) -> None:
    files = sorted(sharded.glob("model-*.safetensors"))
    name, *_ = load_file(files[1])
    save_file({n: v for n, v in load_file(files[1]).items() if n != name}, files[1])
    assert f"{name} [" in problem(sharded) and f"is missing from {sharded}" in problem(sharded)


def test_a_table_that_follows_from_config_json_may_be_stored(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[0]
    cached = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(file) | {cached: torch.ones(4)}, file)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][cached] = file.name
    (sharded / INDEX).write_text(json.dumps(index))
    with opened(sharded) as weights:
        assert weights.tensors[cached] == (torch.float32, (4,))
