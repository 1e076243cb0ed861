"""`tools/convert_checkpoint.py` as a user runs it: both directions, proof, interruption, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_drpo.checkpoint import convert
from megatron_drpo.checkpoint.families.table import GatedMLP
from megatron_drpo.checkpoint.manifest import read_manifest
from megatron_drpo.checkpoint.torch_dist import MegatronWeights, TorchDistReader, TorchDistWriter
from tests.tiny_models import save_tiny
from tools.convert_checkpoint import _size, main

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool is a process of its own: it hides GPUs and sets threads."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "source", "qwen3", dtype=torch.bfloat16)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def to_megatron(source: Path, out: Path, *flags: str) -> int:
    return main(["hf-to-megatron", "--hf", str(source), "--out", str(out), *flags])


def to_hf(source: Path, out: Path, *flags: str) -> int:
    return main(["megatron-to-hf", "--megatron", str(source), "--out", str(out), *flags])


def verified(directory: Path) -> Any:
    """What the manifest says was proven."""
    manifest = read_manifest(directory)
    assert manifest is not None
    return manifest.verified


def stored(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# --- There and back -----------------------------------------------------------------------------


def test_there_and_back(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert to_megatron(source, megatron, "--tensor-model-parallel-size", "2") == 0
    said, warned = capfd.readouterr()
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    assert [line[0] for line in lines] == ["converting", "converted", "round", "logits", "wrote"]
    count = len(stored(source))
    size = sum(tensor.nbytes for tensor in stored(source).values())
    assert f"{count} tensors, {size:,} bytes" in said and "MB/s" in said
    assert "64 tokens through 4 of 4 layers differ by at most" in said
    assert not warned, "nothing but errors and a terminal's progress bar goes to stderr"

    proof = verified(megatron)
    assert proof["round_trip"] == "bit-exact"
    assert proof["logits"]["max_abs_diff"] < 1e-5
    assert proof["logits"]["layers"] == [0, 1, 2, 3]

    assert to_hf(megatron, back, "--max-shard-size", "20KB", "--workers", "1") == 0
    assert len(list(back.glob("*.safetensors"))) > 2
    before, after = stored(source), stored(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
    assert json.loads((back / "config.json").read_text())["hidden_size"] == 32
    assert (back / "tokenizer.json").read_text() == "{}"
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(path) for path in (source, back)]
    prompt = torch.tensor([[5, 17, 40]])
    one, other = (
        model.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None)
        for model in models
    )
    assert one.shape[1] == 15 and torch.equal(one, other)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "megatron", "back"}, "nothing else is left"


@pytest.mark.parametrize(
    ("flags", "layers"),
    [((), 4), (("--verify",), 4), (("--verify=fast",), 2), (("--verify", "fast"), 2)],
)
def test_verify_is_given_in_several_ways(
    source: Path, tmp_path: Path, flags: tuple[str, ...], layers: int
) -> None:
    assert to_megatron(source, tmp_path / "out", *flags) == 0
    assert len(verified(tmp_path / "out")["logits"]["layers"]) == layers


def test_without_verification_the_manifest_says_so(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_megatron(source, tmp_path / "out", "--verify=off") == 0
    assert verified(tmp_path / "out") is None
    assert "unverified" in capsys.readouterr().out.splitlines()[-1]


def test_settings_from_another_directory(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert to_megatron(source, megatron, "--verify=off") == 0
    (megatron / "config.json").unlink()
    assert to_hf(megatron, back) == 2
    assert f"{megatron}: has no config.json; give --hf DIR" in capsys.readouterr().err
    assert to_hf(megatron, back, "--hf", str(source), "--verify=off") == 0
    assert stored(back).keys() == stored(source).keys()


def test_padding_of_the_vocabulary_is_said_and_left_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_megatron(source, tmp_path / "megatron", "--verify=off") == 0
    assert "of the vocabulary" not in capsys.readouterr().out
    reader = TorchDistReader(tmp_path / "megatron")
    (tmp_path / "padded").mkdir()
    writer = TorchDistWriter(tmp_path / "padded")
    for key in reader.tensors:
        tensor = reader.read(key)
        if key == "output_layer.weight":
            tensor = torch.cat([tensor, torch.ones(67, 32, dtype=tensor.dtype)])
        writer.add(key, tensor.shape, [0] * tensor.dim(), tensor)
    writer.finish({})
    flags = ("--hf", str(source), "--verify=off")
    assert to_hf(tmp_path / "padded", tmp_path / "back", *flags) == 0
    assert "; 67 rows of the vocabulary are padding)" in capsys.readouterr().out
    after, before = stored(tmp_path / "back"), stored(source)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_inspect(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inspect", str(source)]) == 0
    assert "model.layers.{0..3}.mlp.up_proj.weight" in capsys.readouterr().out


# --- Results that are wrong ---------------------------------------------------------------------


def swapped(self: GatedMLP, hf: Any, *args: Any) -> Tensor:
    return torch.cat([source[:] for source in reversed(hf)])


def swapped_back(self: GatedMLP, shards: Any, *args: Any) -> tuple[Tensor, ...]:
    return tuple(reversed(shards[0].chunk(2)))


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_table_that_is_wrong_both_ways_is_found_by_the_logits(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    direction: str,
) -> None:
    """gate and up in each other's place: the round trip is perfect, the model is another."""
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    assert to_megatron(source, megatron, "--verify=off") == 0
    monkeypatch.setattr(GatedMLP, "to_megatron", swapped)
    monkeypatch.setattr(GatedMLP, "to_hf", swapped_back)
    call = to_megatron(source, out) if direction == "to megatron" else to_hf(megatron, out)
    assert call == 2
    error = capsys.readouterr().err
    assert "do not compute the same" in error and "depart at layer 0" in error
    assert {path.name for path in tmp_path.iterdir()} == {"source", "megatron"}


def test_damage_on_the_way_is_found_by_the_round_trip(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, load = "decoder.layers.mlp.linear_fc2.weight[2]", MegatronWeights.load

    def damaged(self: MegatronWeights, wanted: str) -> Tensor:
        tensor = load(self, wanted)
        if wanted == name:
            tensor = tensor.clone()
            tensor.view(torch.int16)[3, 3] ^= 1  # one bit
        return tensor

    monkeypatch.setattr(MegatronWeights, "load", damaged)
    assert to_megatron(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert name in error and "model.layers.2.mlp.down_proj.weight" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- Interruption -------------------------------------------------------------------------------


def interrupt(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """Ctrl-C when `function` has made `after` steps of progress."""

    def call(*args: Any, progress: Callable[[int], None], **kwargs: Any) -> Any:
        steps = 0

        def step(amount: int) -> None:
            nonlocal steps
            steps += 1
            if steps > after:
                raise KeyboardInterrupt
            progress(amount)

        return function(*args, progress=step, **kwargs)

    return call


@pytest.mark.parametrize("phase", ["hf_to_megatron", "verify_round_trip"])
def test_an_interrupted_conversion_is_continued(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    phase: str,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(convert, phase, interrupt(getattr(convert, phase), 3))
        assert to_megatron(source, out, "--workers", "1") == 130
    assert "the same command with --resume continues" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source", ".out.partial"}
    assert to_megatron(source, out) == 2
    assert "--resume" in capsys.readouterr().err
    assert to_megatron(source, out, "--resume", "--tensor-model-parallel-size", "2") == 2
    assert "tensor_model_parallel_size: 1, now 2" in capsys.readouterr().err
    assert not out.exists()
    assert to_megatron(source, out, "--resume") == 0
    assert verified(out)["round_trip"] == "bit-exact"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


# --- Mistakes of the user's ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of hf-to-megatron, megatron-to-hf or --inspect"),
        (["--inspect", ".", "hf-to-megatron", "--hf", ".", "--out", "x"], "give one of"),
        (["hf-to-megatron", "--hf", "."], "--out"),
        (["megatron-to-hf", "--megatron", ".", "--out", "x", "--max-shard-size", "5X"], "'5X'"),
        (["megatron-to-hf", "--megatron", ".", "--out", "x", "--max-shard-size", "0"], "'0'"),
        (["hf-to-megatron", "--hf", ".", "--out", "x", "--verify=later"], "later"),
    ],
)
def test_usage(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_are_checked_together_before_any_work(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    (out / "file").touch()
    flags = ("--workers", "0", "--tensor-model-parallel-size", "-1")
    assert to_megatron(tmp_path / "missing", out, *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert [line.split()[1] for line in lines] == [
        "--hf",
        "--workers",
        "--tensor-model-parallel-size",
        "--out",
    ]
    assert to_megatron(source, source) == 2
    assert "is the source itself" in capsys.readouterr().err


def test_a_size_that_no_layout_could_have_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_megatron(source, tmp_path / "out", "--tensor-model-parallel-size", "3") == 2
    error = capsys.readouterr().err
    assert "does not divide num_attention_heads 8, ffn_hidden_size 40" in error


def test_an_unsupported_model_is_an_error_without_a_traceback(source: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, source / "model.safetensors")
    command = ["hf-to-megatron", "--hf", str(source), "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, TOOL, *command], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and "Traceback" not in ended.stderr
    assert "model.norm.weight" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("500MB", 5 * 10**8),
        ("1.5KB", 1500),
        ("4096", 4096),
        ("10 MB", 10**7),
        ("2T", None),
        ("5iB", None),
    ],
)
def test_sizes_of_files(text: str, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(Exception, match="is not a size"):
            _size(text)
    else:
        assert _size(text) == expected
