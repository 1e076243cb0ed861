"""Conversion both ways: bit for bit, all accounted for, and nothing half done that looks whole."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_drpo.checkpoint import convert
from megatron_drpo.checkpoint.convert import (
    RESULT,
    VerificationError,
    hf_to_megatron,
    megatron_to_hf,
    verify_round_trip,
)
from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.checkpoint.hf import staging_of
from megatron_drpo.checkpoint.manifest import (
    FILE,
    Manifest,
    check_manifest,
    describe_architecture,
    digest,
    read_manifest,
)
from megatron_drpo.checkpoint.resume import STATE, digests
from megatron_drpo.checkpoint.torch_dist import (
    TorchDistReader,
    find_torch_dist,
    open_weights,
    stored_entries,
)
from megatron_drpo.errors import CheckpointError
from tests.tiny_models import EXPERTS, LAYERS, MOE, reference_shard, save_tiny

FAMILIES = [("llama", True), ("qwen2", False), ("qwen3", False), ("mixtral", False)]
FAMILIES += [("qwen3_moe", True), ("mistral", False)]
DTYPES = {"llama": torch.bfloat16, "mixtral": torch.float16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family as `FAMILY`, converted as `FAMILY-megatron`, and back as `FAMILY-back`."""
    root = tmp_path_factory.mktemp("models")
    for family, tie in FAMILIES:
        save_tiny(root / family, family, tie=tie, dtype=DTYPES.get(family, torch.float32))
        (root / family / "tokenizer.json").write_text('{"of": "' + family + '"}')
        hf_to_megatron(root / family, root / f"{family}-megatron", tp_size=4, workers=3)
        megatron_to_hf(root / f"{family}-megatron", root / f"{family}-back", workers=3)
    return root


def _weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and digest(found[name]) == digest(value), name


def _content(directory: Path) -> dict[str, Tensor]:
    reader = TorchDistReader(directory)
    return {key: reader.read(key) for key in reader.tensors}


def _read(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    assert manifest is not None
    return manifest


# --- What is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_there_and_back_is_the_same(models: Path, family: str) -> None:
    _assert_same(_weights(models / f"{family}-back"), _weights(models / family))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        before = (models / family / name).read_bytes()
        assert (models / f"{family}-megatron" / name).read_bytes() == before
        assert (models / f"{family}-back" / name).read_bytes() == before
    assert not [path.name for path in models.rglob("*") if "partial" in path.name]
    assert not list(models.rglob(convert.JOURNAL))


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_what_lies_in_the_checkpoint_is_megatrons_parameter(models: Path, family: str) -> None:
    """Against a reference written out in loops, for each layer and expert."""
    hf, stored = _weights(models / family), _content(models / f"{family}-megatron")
    checked = set()
    for key, value in stored.items():
        local = key.replace("linear_qkv.layer_norm_weight", "input_layernorm.weight")
        local = local.replace("self_attention.input_", "input_")
        local = local.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        local = local.replace("experts.experts.", "experts.local_experts.{expert}.")
        if not key.startswith("decoder.layers."):
            assert torch.equal(value, reference_shard(hf, local, 0, 1, len(value)))
            checked.add(key)
            continue
        assert len(value) == LAYERS
        for layer in range(LAYERS):
            name = local.replace("layers.", f"layers.{layer}.")
            for expert, one in enumerate(value[layer] if "{expert}" in name else [value[layer]]):
                expected = reference_shard(hf, name.format(expert=expert), 0, 1, 0)
                assert torch.equal(one, expected), name
                checked.add(name.format(expert=expert))
    assert len(checked) == len(_read(models / f"{family}-megatron").tensors)


def test_each_tensor_parallel_rank_finds_its_own_bytes_together(models: Path) -> None:
    reader = TorchDistReader(models / "mixtral-megatron")
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    boxes = sorted((c.offsets, c.sizes) for c, *_ in reader.check(key, (1, 2)))
    assert boxes == [((1, 2, row, 0), (1, 1, 10, 32)) for row in range(0, 80, 10)]
    key = "decoder.layers.self_attention.linear_proj.weight"
    boxes = sorted((c.offsets, c.sizes) for c, *_ in reader.check(key, (3,)))
    assert boxes == [((3, 0, column), (1, 32, 16)) for column in range(0, 64, 16)]


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_the_manifest_accounts_for_every_tensor(models: Path, family: str) -> None:
    forth, back = _read(models / f"{family}-megatron"), _read(models / f"{family}-back")
    weights = _weights(models / family)
    assert (forth.kind, forth.source.kind, back.kind, back.source.kind) == (
        *("megatron", "hf"),
        *("hf", "megatron"),
    )
    assert {n: r.sha256 for n, r in forth.source.tensors.items()} == {
        name: digest(value) for name, value in weights.items()
    }
    assert forth.source.tensors == back.tensors and forth.tensors == back.source.tensors
    assert forth.source.not_carried == back.source.not_carried == {}
    assert forth.source.path == str(models / family)
    assert forth.verified is None and forth.versions["torch"] == torch.__version__
    architecture = read_architecture(models / family)
    assert forth.architecture["num_experts"] == (EXPERTS if family in MOE else 0)
    for directory in (f"{family}-megatron", f"{family}-back"):
        with open_weights(models / directory, architecture) as found:
            assert check_manifest(found, _read(models / directory)) == []


def test_megatron_lm_finds_the_arguments_it_asks_for(models: Path) -> None:
    from argparse import Namespace

    with torch.serialization.safe_globals([Namespace]):
        common = torch.load(models / "qwen3_moe-megatron" / "common.pt", weights_only=True)
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)
    config = json.loads((models / "qwen3_moe" / "config.json").read_text())
    for name, key in [
        *(("num_layers", "num_hidden_layers"), ("hidden_size", "hidden_size")),
        *(("num_query_groups", "num_key_value_heads"), ("kv_channels", "head_dim")),
        *(("moe_ffn_hidden_size", "moe_intermediate_size"), ("norm_epsilon", "rms_norm_eps")),
        ("moe_router_topk", "num_experts_per_tok"),
    ]:
        assert getattr(common["args"], name) == config[key], name
    assert (common["args"].num_experts, common["args"].tensor_model_parallel_size) == (EXPERTS, 4)
    assert common["args"].untie_embeddings_and_output_weights is False


def test_files_are_as_large_as_told_and_indexed(models: Path, tmp_path: Path) -> None:
    megatron_to_hf(models / "qwen3-megatron", tmp_path / "out", max_shard_bytes=20_000, workers=2)
    files = sorted(tmp_path.joinpath("out").glob("*.safetensors"))
    weights = _weights(models / "qwen3")
    assert len(files) > 3
    assert all(sum(v.nbytes for v in load_file(file).values()) <= 20_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    _assert_same(_weights(tmp_path / "out"), weights)


def test_progress_adds_up_to_the_source(models: Path, tmp_path: Path) -> None:
    total = sum(value.nbytes for value in _weights(models / "qwen3").values())
    steps: list[int] = []
    hf_to_megatron(models / "qwen3", tmp_path / "m", workers=2, progress=steps.append)
    assert sum(steps) == total and len(steps) > 10
    steps.clear()
    megatron_to_hf(tmp_path / "m", tmp_path / "h", progress=steps.append)
    assert sum(steps) == total


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_without_tensor_parallelism_only_what_is_reordered_is_copied(
    models: Path, family: str
) -> None:
    """Memory and time: most of a model would be copied for nothing."""
    architecture = read_architecture(models / family)
    weights = _weights(models / family)
    for entry in stored_entries(architecture):
        hf = [weights[name] for name in entry.hf]
        shape = entry.transform.megatron_shape(architecture)
        whole = entry.transform.to_megatron(hf, shape, 0, 1, architecture)
        back = entry.transform.to_hf([whole], architecture)
        assert all(torch.equal(one, other) for one, other in zip(back, hf, strict=True))
        if len(hf) == 1:
            assert whole.data_ptr() == hf[0].data_ptr() == back[0].data_ptr(), entry.name
        if len(hf) == 2:
            storages = {tensor.untyped_storage().data_ptr() for tensor in (whole, *back)}
            assert len(storages) == 1, entry.name


# --- Odd sources --------------------------------------------------------------------------------


def _copy(models: Path, family: str, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(models / family, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_weight_stored_under_any_name(models: Path, tmp_path: Path, stored: str) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tied = _weights(models / "llama")[names[0]]

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[names[0]]
        tensors.update({name: tied.clone() for name in names if stored in (name, "both")})

    source = _copy(models, "llama", tmp_path / "in", change)
    manifest = hf_to_megatron(source, tmp_path / "m")
    _assert_same(_content(tmp_path / "m"), _content(models / "llama-megatron"))
    assert manifest.source.tensors.keys() == _weights(source).keys()
    twice = {"lm_head.weight": "tied to model.embed_tokens.weight, and equal"}
    assert manifest.source.not_carried == (twice if stored == "both" else {})
    _verify(source, tmp_path / "m", manifest)
    megatron_to_hf(tmp_path / "m", tmp_path / "h")
    _assert_same(_weights(tmp_path / "h"), _weights(models / "llama"))
    _verify(tmp_path / "m", tmp_path / "h", _read(tmp_path / "h"))


def test_tied_weights_that_differ_are_refused(models: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5

    source = _copy(models, "llama", tmp_path / "in", change)
    with pytest.raises(CheckpointError, match="embed_tokens.weight and lm_head.weight differ"):
        hf_to_megatron(source, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_tables_that_follow_from_the_config_are_listed(models: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = _copy(models, "llama", tmp_path / "in", lambda t: t.update({name: torch.ones(4)}))
    manifest = hf_to_megatron(source, tmp_path / "m")
    assert manifest.source.not_carried == {name: "follows from config.json"}
    assert manifest.source.tensors[name].sha256 == digest(torch.ones(4))
    _verify(source, tmp_path / "m", manifest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_both_ways(
    models: Path, tmp_path: Path, value: float
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value

    source = _copy(models, "llama", tmp_path / "in", change)
    with pytest.raises(CheckpointError, match="layers.2.mlp.up_proj.weight holds NaN or infinity"):
        hf_to_megatron(source, tmp_path / "m", workers=2)
    assert not (tmp_path / "m").exists()

    from megatron_drpo.checkpoint.torch_dist import TorchDistWriter

    (tmp_path / "damaged").mkdir()
    writer = TorchDistWriter(tmp_path / "damaged")
    for key, tensor in _content(models / "llama-megatron").items():
        if key.endswith("linear_fc2.weight"):
            tensor[1, 0, 0] = value
        writer.add(key, tensor.shape, [0] * tensor.dim(), tensor)
    writer.finish({})
    name = r"decoder.layers.mlp.linear_fc2.weight\[1\] holds NaN or infinity"
    with pytest.raises(CheckpointError, match=name):
        megatron_to_hf(tmp_path / "damaged", tmp_path / "h", settings=models / "llama")
    assert not (tmp_path / "h").exists()


def test_config_says_the_dtype_most_weights_have(models: Path, tmp_path: Path) -> None:
    """A model that was configured in fp32 and trained in bf16, all but its norms."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: t.float() for name, t in tensors.items() if "norm" in name})

    source = _copy(models, "llama", tmp_path / "in", change)
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    hf_to_megatron(source, tmp_path / "m")
    manifest = megatron_to_hf(tmp_path / "m", tmp_path / "h")
    assert json.loads((tmp_path / "h" / "config.json").read_text())["dtype"] == "bfloat16"
    assert manifest.architecture["hf_dtype"] == "bfloat16"
    assert manifest.architecture == describe_architecture(read_architecture(tmp_path / "h"))
    assert manifest.tensors["model.norm.weight"].dtype == "float32"
    _verify(tmp_path / "m", tmp_path / "h", manifest)


def test_no_settings_is_an_error_that_names_them(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama-megatron", tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"{tmp_path}/m/config.json: cannot be read"):
        megatron_to_hf(tmp_path / "m", tmp_path / "h")


def test_settings_of_another_model_are_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 1e4
    path.write_text(json.dumps(config | {"dtype": "float32"}))
    megatron, out = models / "llama-megatron", tmp_path / "h"
    message = f"--hf {tmp_path}/other: .* {megatron}: rotary_base 10000.0 against 5000.0; give"
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(megatron, out, settings=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    config["rope_parameters"]["rope_theta"] = 5000.0
    path.write_text(json.dumps(config | {"dtype": "float32"}))  # how it is stored is not compared
    megatron_to_hf(megatron, out, settings=tmp_path / "other")


# --- The source's own manifest ------------------------------------------------------------------


def _flip(directory: Path, value: Tensor) -> Path:
    """Flip a bit of a tensor in the file that holds it."""
    needle = bytes(value.contiguous().view(torch.uint8).numpy())
    (file,) = [path for path in directory.iterdir() if needle in path.read_bytes()]
    with file.open("r+b") as stream:
        stream.seek(file.read_bytes().index(needle))
        stream.write(bytes([needle[0] ^ 1]))
    return file


@pytest.mark.parametrize("direction", ["megatron", "back"])
def test_a_source_that_was_damaged_since_it_was_made_is_refused(
    models: Path, tmp_path: Path, direction: str
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(models / f"qwen3-{direction}", source)
    name = "model.layers.2.mlp.up_proj.weight"
    _flip(source, _weights(models / "qwen3")[name][-1])
    convert_it = megatron_to_hf if direction == "megatron" else hf_to_megatron
    if direction == "megatron":
        name = "decoder.layers.mlp.linear_fc1.weight[2]"
    with pytest.raises(CheckpointError) as error:
        convert_it(source, out)
    first, *named = str(error.value).splitlines()
    assert f"{source}: is not what its manifest.json says" in first
    assert "or delete manifest.json" in first
    assert named[0] == f"  {name} differs" and "--resume" in named[1] and len(named) == 2
    assert not out.exists()
    (source / FILE).unlink()
    convert_it(source, out, resume=True)


def test_a_config_that_was_changed_since_is_refused(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(models / "qwen3-megatron", source)
    with (source / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=r"manifest.json says; .*:\n  config.json differs"):
        megatron_to_hf(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_damaged_training_checkpoint_is_refused(models: Path, tmp_path: Path) -> None:
    """Its manifest is `state.json`, of whole files."""
    run = tmp_path / "checkpoints"
    step = run / "step-000004"
    shutil.copytree(models / "qwen3-megatron", step)
    (step / FILE).unlink()
    fields = dict.fromkeys(("progress", "scheduler", "world_size", "megatron_core", "config"))
    state = fields | {"files": digests(step, 0, 1)}
    (step / STATE).write_text(json.dumps(state))
    (run / "latest").write_text(step.name)
    megatron_to_hf(run, tmp_path / "out", workers=3)
    _assert_same(_weights(tmp_path / "out"), _weights(models / "qwen3"))
    file = _flip(step, _weights(models / "qwen3")["model.layers.2.mlp.up_proj.weight"][-1])
    message = f"(?s)state.json says; .*delete state.json.*\n  {file}: differs from what was saved$"
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(run, tmp_path / "again", workers=3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "out"}


# --- Proof --------------------------------------------------------------------------------------


def _verify(source: Path, result: Path, manifest: Manifest, **how: Any) -> None:
    architecture = read_architecture(result)
    with open_weights(source, architecture) as one, open_weights(result, architecture) as other:
        verify_round_trip(one, other, architecture, manifest, **how)


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_the_round_trip_of_what_was_written_holds(models: Path, family: str) -> None:
    for source, result in [
        (family, f"{family}-megatron"),
        (f"{family}-megatron", f"{family}-back"),
    ]:
        sizes: list[int] = []
        manifest = _read(models / result)
        _verify(models / source, models / result, manifest, workers=2, progress=sizes.append)
        assert sum(sizes) == sum(value.nbytes for value in _weights(models / family).values())


@pytest.mark.parametrize("direction", ["megatron", "back"])
def test_one_flipped_bit_on_disk_is_named(models: Path, tmp_path: Path, direction: str) -> None:
    result, name = tmp_path / "out", "model.layers.2.mlp.up_proj.weight"
    shutil.copytree(models / f"qwen3-{direction}", result)
    _flip(result, _weights(models / "qwen3")[name][-1])
    source = models / ("qwen3" if direction == "megatron" else "qwen3-megatron")
    with pytest.raises(VerificationError) as error:
        _verify(source, result, _read(result), workers=2)
    said = str(error.value).splitlines()
    assert str(result) in said[0] and "convert again" in said[0]
    fc1 = "decoder.layers.mlp.linear_fc1.weight[2]"
    expected = {"megatron": {f"{fc1} is not what was written", f"{name} is not what was read"}}
    expected["back"] = {f"{name} is not what was written", f"{fc1} is not what was read"}
    assert set(map(str.strip, said[1:])) == expected[direction]


def test_a_tensor_that_nobody_accounted_for_is_named(models: Path) -> None:
    manifest = _read(models / "qwen3-megatron")
    forged = dict(manifest.source.tensors)
    forged["x"] = forged.pop("model.norm.weight")
    manifest = replace(manifest, source=replace(manifest.source, tensors=forged))
    with pytest.raises(
        CheckpointError, match="(?s)model.norm.weight is in the source only.*x is n"
    ):
        _verify(models / "qwen3", models / "qwen3-megatron", manifest)


# --- Interrupted --------------------------------------------------------------------------------


def _in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def _forth(models: Path, out: Path, **how: Any) -> Manifest:
    return hf_to_megatron(models / "qwen3", out, tp_size=2, **how)


def _back(models: Path, out: Path, **how: Any) -> Manifest:
    return megatron_to_hf(models / "qwen3-megatron", out, max_shard_bytes=30_000, **how)


def _load(out: Path) -> dict[str, Tensor]:
    return _content(out) if find_torch_dist(out) else _weights(out)


def _lines(out: Path) -> list[bytes]:
    return (staging_of(out) / convert.JOURNAL).read_bytes().splitlines()


@pytest.mark.parametrize("run", [_forth, _back])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("after", [1, 12, 30])
def test_killed_and_resumed_is_as_if_never_killed(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Any,
    workers: int,
    after: int,
) -> None:
    out = tmp_path / "out"

    def killed() -> None:
        calls = iter(range(1, after + 1))

        def progress(_: int) -> None:
            if next(calls) == after:
                os.kill(os.getpid(), signal.SIGKILL)

        run(models, out, workers=workers, progress=progress)

    assert _in_child(killed) == -signal.SIGKILL
    assert not out.exists() and find_torch_dist(staging_of(out) / RESULT) is None
    done = len(_lines(out)) - 1
    assert after <= done < len(_read(models / "qwen3-megatron").tensors)

    with pytest.raises(CheckpointError, match=f"(?s){staging_of(out)}.*--resume, or delete"):
        run(models, out)
    # The process may have died in the middle of a write.
    with (staging_of(out) / convert.JOURNAL).open("ab") as journal:
        journal.write(b'{"entry": "torn')
    for file in staging_of(out).glob("*/*.distcp"):
        with file.open("ab") as stream:
            stream.write(b"torn" * 100)

    converted = []
    for target in (convert._ToMegatron, convert._ToHf):
        whole = target.convert
        monkeypatch.setattr(
            target, "convert", lambda self, e, whole=whole: converted.append(e) or whole(self, e)
        )
    sizes: list[int] = []
    manifest = run(models, out, workers=workers, resume=True, progress=sizes.append)
    undisturbed = run(models, tmp_path / "undisturbed")
    assert manifest.tensors == undisturbed.tensors and manifest.source == undisturbed.source
    _assert_same(_load(out), _load(tmp_path / "undisturbed"))
    assert not any(b"torntorn" in file.read_bytes() for file in out.iterdir())
    names = sorted(path.name for path in out.iterdir() if path.suffix != ".distcp")
    others = (tmp_path / "undisturbed").iterdir()
    assert names == sorted(path.name for path in others if path.suffix != ".distcp")
    assert not staging_of(out).exists()
    total = len(manifest.tensors if run is _forth else manifest.source.tensors)
    again = len(converted) - total  # the undisturbed run converts all of them
    assert sum(sizes) == sum(value.nbytes for value in _weights(models / "qwen3").values())
    if run is _forth:
        assert again == total - done
    elif after == 30:  # most files were whole
        assert again < total // 2


@pytest.mark.parametrize("run", [_forth, _back])
def test_what_the_journal_claims_is_read_again(models: Path, tmp_path: Path, run: Any) -> None:
    """Power was lost, and the file system kept the journal, but not all of the tensors."""
    out = tmp_path / "out"

    def stopped(size: int) -> None:
        if len(_lines(out)) > 25:
            raise CheckpointError("stop")

    with pytest.raises(CheckpointError, match=r"stop\n.*--resume"):
        run(models, out, progress=stopped)
    needle = bytes(
        _weights(models / "qwen3")["model.embed_tokens.weight"][7].view(torch.uint8).numpy()
    )
    staged = (staging_of(out) / RESULT).iterdir()
    (file,) = [path for path in staged if needle in path.read_bytes()]
    file.write_bytes(file.read_bytes().replace(needle, bytes(len(needle))))
    run(models, out, resume=True)
    run(models, tmp_path / "undisturbed")
    _assert_same(_load(out), _load(tmp_path / "undisturbed"))


@pytest.mark.parametrize("run", [_forth, _back])
def test_a_full_disk_is_named_and_resumed(models: Path, tmp_path: Path, run: Any) -> None:
    out, said = tmp_path / "out", tmp_path / "said"

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            run(models, out, workers=2)
        except CheckpointError as error:
            said.write_text(str(error))

    assert _in_child(full) == 0
    assert "File too large" in said.read_text() and str(staging_of(out)) in said.read_text()
    assert "--resume" in said.read_text() and not out.exists()
    run(models, out, resume=True)
    run(models, tmp_path / "undisturbed")
    _assert_same(_load(out), _load(tmp_path / "undisturbed"))


def test_a_source_that_vanishes_is_named(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Tensor:
        raise OSError(5, "Input/output error", "/models/x")

    monkeypatch.setattr(convert.HfWeights, "load", gone)
    with pytest.raises(CheckpointError, match=r"(?s)/models/x: Input/output error.*--resume"):
        _forth(models, tmp_path / "out")
    assert staging_of(tmp_path / "out").exists() and not (tmp_path / "out").exists()


# --- Interrupted in the proof -------------------------------------------------------------------


def _prove(source: Any, result: Any, manifest: Manifest) -> dict[str, str]:
    verify_round_trip(source, result, read_architecture(result.directory), manifest)
    return {"round_trip": "bit-exact"}


@pytest.mark.parametrize("run", [_forth, _back])
@pytest.mark.parametrize(
    "reason", [OSError(5, "Input/output error"), RuntimeError("no"), KeyboardInterrupt(), None]
)
def test_a_proof_that_ends_early_is_resumed_and_converts_nothing_again(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Any,
    reason: BaseException | None,
) -> None:
    out = tmp_path / "out"

    def stop(source: Any, result: Any, manifest: Manifest) -> dict[str, str]:
        with pytest.raises(CheckpointError, match="another process is converting there"):
            run(models, out, resume=True)
        assert not out.exists() and result.directory == staging_of(out) / RESULT
        if reason is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise reason or AssertionError

    if reason is None:
        assert _in_child(lambda: run(models, out, verify=stop)) == -signal.SIGKILL
    else:
        kind = CheckpointError if isinstance(reason, OSError) else type(reason)
        with pytest.raises(kind) as error:
            run(models, out, verify=stop)
        said = "".join([str(error.value), *getattr(error.value, "__notes__", ())])
        assert isinstance(reason, KeyboardInterrupt) or f"{staging_of(out)}: continue with" in said
    assert not out.exists()
    with pytest.raises(CheckpointError, match="--resume, or delete"):
        run(models, out, verify=_prove)

    converted = []
    for target in (convert._ToMegatron, convert._ToHf):
        whole = target.convert
        monkeypatch.setattr(
            target, "convert", lambda self, e, whole=whole: converted.append(e) or whole(self, e)
        )
    manifest = run(models, out, resume=True, verify=_prove)
    assert not converted
    assert manifest == _read(out) and manifest.verified == {"round_trip": "bit-exact"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / convert.JOURNAL).exists()
    run(models, tmp_path / "undisturbed")
    _assert_same(_load(out), _load(tmp_path / "undisturbed"))


@pytest.mark.parametrize("run", [_forth, _back])
def test_what_is_found_wrong_is_deleted(models: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "out"

    def wrong(source: Any, result: Any, manifest: Manifest) -> dict[str, str]:
        name = "model.layers.2.mlp.up_proj.weight"
        _flip(result.directory, _weights(models / "qwen3")[name][-1])
        return _prove(source, result, manifest)

    with pytest.raises(VerificationError, match=f"(?s)up_proj.weight is not .*\n{out}: not made"):
        run(models, out, verify=wrong)
    assert not list(tmp_path.iterdir())


def test_a_source_that_changed_meanwhile_is_not_what_was_converted(
    models: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(models / "qwen3", source)

    def stop(*_: object) -> dict[str, str]:
        raise CheckpointError("stop")

    with pytest.raises(CheckpointError, match="stop"):
        hf_to_megatron(source, out, verify=stop)
    tensors = _weights(source)
    tensors["model.norm.weight"][3] += 1.0
    save_file(tensors, source / "model.safetensors")
    for proof in (_prove, None):
        with pytest.raises(CheckpointError, match="--resume: (?s:.*)source: .*model.safetensors"):
            hf_to_megatron(source, out, resume=True, verify=proof)
    assert not out.exists()


def test_killed_while_the_journal_is_removed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result has its name by then; what is left beside it does no harm."""
    out = tmp_path / "out"

    def killed() -> None:
        whole = shutil.rmtree

        def rmtree(path: Path, **how: Any) -> None:
            if path == staging_of(out):
                os.kill(os.getpid(), signal.SIGKILL)
            whole(path, **how)

        monkeypatch.setattr(shutil, "rmtree", rmtree)
        _forth(models, out)

    assert _in_child(killed) == -signal.SIGKILL
    assert [path.name for path in staging_of(out).iterdir()] == [convert.JOURNAL]
    assert not (out / convert.JOURNAL).exists()
    _assert_same(_load(out), _content(models / "qwen3-megatron"))
    with pytest.raises(CheckpointError, match=f"{out}: exists"):
        _forth(models, out, resume=True)
    shutil.rmtree(out)
    _forth(models, out, resume=True)
    _assert_same(_load(out), _content(models / "qwen3-megatron"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- Resumed, or not ----------------------------------------------------------------------------


def _begin(models: Path, out: Path) -> None:
    def stop(size: int) -> None:
        raise CheckpointError("stop")

    with pytest.raises(CheckpointError):
        _forth(models, out, progress=stop)


@pytest.mark.parametrize("torn", [b'{"entry": "to', b""])
def test_interrupted_again_and_again(models: Path, tmp_path: Path, torn: bytes) -> None:
    out = tmp_path / "out"

    def stop(size: int) -> None:
        if next(steps) == 0:
            raise CheckpointError("stop")

    for attempt in range(4):
        steps = iter(range(5 * attempt, -1, -1))
        with pytest.raises(CheckpointError, match="stop"):
            _forth(models, out, resume=True, progress=stop)
        with (staging_of(out) / convert.JOURNAL).open("ab") as journal:
            journal.write(torn)
    (staging_of(out) / convert.JOURNAL).write_bytes(torn)  # killed in the first line, even
    _forth(models, out, resume=True)
    _assert_same(_load(out), _content(models / "qwen3-megatron"))


def test_resume_wants_the_same_settings_and_source(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _begin(models, out)
    with pytest.raises(
        CheckpointError, match="--resume: (?s:.*)tensor_model_parallel_size: 2, now 4"
    ):
        hf_to_megatron(models / "qwen3", out, tp_size=4, resume=True)
    with pytest.raises(CheckpointError, match="--resume: (?s:.*)config.json: .*(?s:.*)source: "):
        hf_to_megatron(models / "llama", out, tp_size=2, resume=True)
    _forth(models, out, resume=True)
    _assert_same(_load(out), _content(models / "qwen3-megatron"))


def test_resume_without_anything_to_resume_begins(models: Path, tmp_path: Path) -> None:
    _forth(models, tmp_path / "out", resume=True)
    _assert_same(_load(tmp_path / "out"), _content(models / "qwen3-megatron"))


def test_two_at_once_are_kept_apart(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _begin(models, out)
    with (staging_of(out) / convert.JOURNAL).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=f"{staging_of(out)}: another process"):
            _forth(models, out, resume=True)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_where_files_cannot_be_locked(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.delattr(os, "posix_fadvise")  # nor can that everywhere
    out = tmp_path / "out"
    if code == errno.EIO:
        with pytest.raises(CheckpointError, match="Input/output error; choose another --out"):
            _forth(models, out)
    else:
        _forth(models, out)
        _assert_same(_load(out), _content(models / "qwen3-megatron"))


def test_a_damaged_journal_is_named(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _begin(models, out)
    journal = staging_of(out) / convert.JOURNAL
    journal.write_bytes(journal.read_bytes() + b"[1]\n")
    with pytest.raises(CheckpointError, match=f"{journal}: is damaged .*delete {staging_of(out)}"):
        _forth(models, out, resume=True)


def test_what_exists_is_not_touched(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _forth(models, out)  # an empty directory is as good as none
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=f"{out}: exists; .*--out"):
            _back(models, out, resume=resume)
    _assert_same(_load(out), _content(models / "qwen3-megatron"))
    (tmp_path / "file").write_text("keep")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'file'}: exists"):
        _forth(models, tmp_path / "file")
    with pytest.raises(CheckpointError, match="file/.*: Not a directory; .*--out"):
        _forth(models, tmp_path / "file" / "below")
