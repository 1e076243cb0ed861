"""megatron-core's CPU meaning: right inside `megatron`, and invisible to everybody else."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import py_compile
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the layer is installed where no GPU is used only"
)

SOURCE = """\
import torch
from torch.cuda import _lazy_call, current_device as here
from torch.cuda.random import get_rng_state

made = torch.zeros(2, device="cuda")
moved = torch.ones(2).cuda().cuda(torch.cuda.current_device(), non_blocking=True)
devices = {here(), torch.device("cuda"), made.device, moved.device}
is_float_tensor = torch.ones(1).type() == "torch.cuda.FloatTensor"
text = "cuda graphs need cuda"
on_device = moved.is_cuda
on_side_stream = torch.cuda.current_stream() != torch.cuda.Stream()

def draw():
    torch.cuda.manual_seed(3)
    state = get_rng_state()
    first = torch.rand(4, generator=torch.cuda.default_generators[0])
    torch.cuda.set_rng_state(state)
    return first, torch.rand(4, device="cuda")

def call_unknown():
    return torch.cuda.no_such_thing()

def wait():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        start.record()
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        end.record(torch.cuda.current_stream())
    torch.cuda.synchronize()
    return start.elapsed_time(end)
"""


@pytest.fixture
def cpu() -> types.ModuleType:
    """Not imported at the top: importing it installs the layer, and this file is also a program."""
    from megatron_drpo.mcore import cpu

    return cpu


@pytest.fixture
def load(
    cpu: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., types.ModuleType]]:
    """Import SOURCE by a name, from a folder that joins the namespace package `megatron`."""
    cpu.install()
    monkeypatch.syspath_prepend(tmp_path)

    def load(name: str = "megatron.like_core", *, compiled: bool = False) -> types.ModuleType:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(SOURCE)
        if compiled:
            py_compile.compile(str(path), doraise=True)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield load
    sys.modules.pop("megatron.like_core", None)


def test_inside_megatron_cuda_means_cpu(load: Callable[..., types.ModuleType]) -> None:
    module = load()
    assert module.devices == {torch.device("cpu")}
    assert module.is_float_tensor
    assert module.text == "cuda graphs need cuda"
    assert module.on_device and not module.on_side_stream
    assert torch.equal(*module.draw())
    assert 0 <= module.wait() < 1000
    assert not module.torch.cuda.is_available()


def test_outside_megatron_cuda_means_cuda(load: Callable[..., types.ModuleType]) -> None:
    with pytest.raises((RuntimeError, AssertionError), match="CUDA|NVIDIA"):
        load("somebody_else")


def test_unknown_names_fail_by_their_name(load: Callable[..., types.ModuleType]) -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        load().call_unknown()


def test_tracebacks_show_the_source_as_it_is_written(
    load: Callable[..., types.ModuleType],
) -> None:
    module = load()
    with pytest.raises(AttributeError) as caught:
        module.call_unknown()
    frame = traceback.extract_tb(caught.tb)[-1]
    assert frame.filename == module.__file__
    assert frame.line == "return torch.cuda.no_such_thing()"
    assert frame.lineno == SOURCE.splitlines().index("    " + frame.line) + 1


@pytest.mark.parametrize("compiled", [False, True])
def test_no_bytecode_is_written_or_read(
    load: Callable[..., types.ModuleType],
    cpu: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
) -> None:
    """What pip compiled is left alone, and not taken for the transformed module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    module = load(compiled=compiled)
    assert module.devices == {torch.device("cpu")}
    cache = Path(module.__file__).parent / "__pycache__"
    files = list(cache.iterdir()) if cache.exists() else []
    assert len(files) == compiled
    assert not any(cpu._SHIM.encode() in file.read_bytes() for file in files)


def test_second_install_changes_nothing(cpu: types.ModuleType) -> None:
    cpu.install()
    before = list(sys.meta_path)
    cpu.install()
    assert sys.meta_path == before


def test_install_after_megatron_is_refused(
    cpu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not cpu._Finder])
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match="import megatron_drpo.mcore first"):
        cpu.install()
    assert sys.meta_path == before


# One process that has everything: transformers before and after megatron-core was really used.


def _tiny_llama() -> Any:
    from tests.tiny_models import tiny_model

    return tiny_model("llama")


def _torch_names() -> dict[str, int]:
    """Identity of everything in those parts of torch that megatron-core takes to be CUDA."""
    import torch.cuda.random

    owners = (torch, torch.cuda, torch.cuda.random, torch.Tensor, torch.nn.Module)
    values = {
        f"{owner.__name__}.{name}": inspect.getattr_static(owner, name)
        for owner in owners
        for name in dir(owner)
    }
    # State that torch itself keeps there: lazy imports, and the seeds it holds for later.
    state = types.ModuleType | list | dict | bool | int
    return {name: id(value) for name, value in values.items() if not isinstance(value, state)}


def _bytecode() -> dict[str, int]:
    (folder,) = importlib.util.find_spec("megatron").submodule_search_locations
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*.pyc")}


def _hf_answers(directory: str) -> dict[str, list]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = model(torch.arange(12)[None] % 7).logits
    return {"inv_freq": model.model.rotary_emb.inv_freq.tolist(), "logits": logits.tolist()}


def _train_megatron_once(directory: str) -> dict[str, Any]:
    """A step of megatron's own model: parallel state, rng tracker, forward and backward."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    store = torch.distributed.FileStore(f"{directory}/store", 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    model = GPTModel(config, get_gpt_layer_local_spec(), 32, 16, position_embedding_type="rope")
    tokens = torch.arange(8)[None]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    loss = model(tokens, tokens, mask, labels=tokens).mean()
    loss.backward()
    torch.distributed.destroy_process_group()
    gradients = [p.grad for p in model.parameters()]
    return {
        "loss": loss.item(),
        "gradients": all(g.isfinite().all() and g.any() for g in gradients),
    }


def _observe(directory: str) -> dict[str, Any]:
    assert "megatron_drpo" not in sys.modules
    seen: dict[str, Any] = {"hf_before": _hf_answers(directory)}
    names, bytecode = _torch_names(), _bytecode()
    import megatron_drpo.mcore  # noqa: F401  installs the layer

    seen["megatron"] = _train_megatron_once(directory)
    now = _torch_names()
    seen["torch_changed"] = [name for name in names if now.get(name) != names[name]]
    seen["torch_names"] = len(names)
    seen["bytecode_changed"] = _bytecode() != bytecode
    seen["hf_after"] = _hf_answers(directory)
    return seen


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("llama")
    _tiny_llama().save_pretrained(directory)
    done = subprocess.run(
        [sys.executable, __file__, str(directory)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "observed.json").read_text())


def test_transformers_is_right_after_megatron_was_used(observed: dict[str, Any]) -> None:
    """Its RoPE table was seen to turn to garbage, silently, in a process with a patched torch."""
    before, after = observed["hf_before"], observed["hf_after"]
    assert after == before
    frequencies = [5000.0 ** (-i / 4) for i in range(4)]  # theta^(-2i/d) for d = 8 channels
    assert after["inv_freq"] == pytest.approx(frequencies, rel=1e-6)
    logits = torch.tensor(after["logits"])
    expected = _tiny_llama()(torch.arange(12)[None] % 7).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1


def test_torch_is_left_as_it_was(observed: dict[str, Any]) -> None:
    assert observed["torch_names"] > 1000
    assert observed["torch_changed"] == []


def test_megatron_itself_works_and_its_files_stay_as_installed(observed: dict[str, Any]) -> None:
    step = observed["megatron"]
    assert step["gradients"] and 2 < step["loss"] < 6  # about log(32) untrained
    assert not observed["bytecode_changed"]


if __name__ == "__main__":
    Path(sys.argv[1], "observed.json").write_text(json.dumps(_observe(sys.argv[1])))
