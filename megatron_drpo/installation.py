"""Is this installation ready to train? Versions, devices, kernels, and a training step for real.

L3, what `python -m megatron_drpo.doctor` prints without a model. In: the machine. Out: findings,
one for each thing that a run needs. One that fails says what to do; nothing is left on disk.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_drpo.device import Device, choose_device
from megatron_drpo.errors import DrpoError

_GIB = 1 << 30
_SHARED_MEMORY = _GIB
"""What NCCL and data of many ranks want of /dev/shm; Docker gives 64 MiB."""
_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}
"""Nats that log-probs may differ by; GPUs may multiply fp32 matrices with 10 bits (TF32)."""


@dataclass(frozen=True)
class Finding:
    """Example: Finding("ok", "device", "cpu (torch sees no GPU)")."""

    verdict: Literal["ok", "note", "FAIL"]
    """A note is nothing to mend here: what is missing, and what it would be for."""
    what: str
    says: str


def examine(require_gpu: bool) -> Iterator[Finding]:
    """Everything that a run needs, one after the other; the last ones take seconds.

    Args:
        require_gpu: a machine without a GPU that torch can use fails.
    """
    yield Finding("ok", "Python", f"{platform.python_version()}, {platform.platform()}")
    yield _packages()
    try:
        device = choose_device("auto")
    except DrpoError as error:
        yield Finding("FAIL", "device", str(error))
        return
    yield _device(device, require_gpu)
    yield from _optional(device)
    if device.kind == "cuda":
        yield from _limits()
    for what, check in (("kernels", _kernels), ("training step", _training_step)):
        yield _attempt(what, check, device)


def _packages() -> Finding:
    from packaging.requirements import Requirement

    what = "packages"
    try:
        wanted = [Requirement(text) for text in requires("megatron-drpo") or ()]
    except PackageNotFoundError:
        says = "megatron-drpo is not installed but run from its directory; pip install -e . lets "
        return Finding("note", what, says + "pip see to what it needs")
    found, wrong = {}, []
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            found[each.name] = version(each.name)
        except PackageNotFoundError:
            wrong.append(f"{each.name}{each.specifier} is not installed")
            continue
        if not each.specifier.contains(found[each.name], prereleases=True):
            wrong.append(f"{each.name} is {found[each.name]}, but {each.specifier} is needed")
    if wrong:
        return Finding("FAIL", what, f"{'; '.join(wrong)}; install this package again with pip")
    main = ", ".join(f"{name} {found[name]}" for name in ("torch", "megatron-core", "transformers"))
    return Finding("ok", what, f"{main} and {len(found) - 3} more, as asked for")


def _device(device: Device, require_gpu: bool) -> Finding:
    what = "device"
    if device.kind == "cpu":
        says = f"cpu ({device.reason}), {os.cpu_count()} cores"
        if not require_gpu:
            return Finding("ok", what, says)
        remedy = "start the container with --gpus all, and see that nvidia-smi works in it"
        return Finding("FAIL", what, f"--require-gpu: {says}; {remedy}")
    free, total = torch.cuda.mem_get_info(device.index)
    major, minor = torch.cuda.get_device_capability(device.index)
    memory = f"{total / _GIB:.0f} GiB ({free / _GIB:.0f} free)"
    says = f"{device.reason}, capability {major}.{minor}, {memory}, CUDA {torch.version.cuda}"
    return Finding("ok", what, says)


def _optional(device: Device) -> Iterator[Finding]:
    """What GPUs are faster with, or need for some flags."""
    uses = {
        "transformer-engine": "its layers, flash attention, FP8 and experts on GPUs",
        "apex": "a fused Adam, where Transformer Engine has none",
    }
    for name, use in uses.items():
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            where = "NGC's PyTorch images have it" if device.kind == "cuda" else "not used on CPUs"
            yield Finding("note", name, f"not installed: for {use}; {where}")


def _limits() -> Iterator[Finding]:
    """What containers keep small by default, and NCCL runs into."""
    import resource

    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < _SHARED_MEMORY:
        says = f"/dev/shm has {size / _GIB:.2f} GiB, and NCCL may fail with less than 1; start the "
        yield Finding("note", "shared memory", says + "container with --ipc=host or --shm-size=8g")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        says = f"limited to {soft} bytes, and InfiniBand wants no limit; start the container with "
        yield Finding("note", "locked memory", says + "--ulimit memlock=-1")


def _attempt(what: str, check: Callable[[Device], str], device: Device) -> Finding:
    """Whatever goes wrong is what somebody wants to read here."""
    try:
        return Finding("ok", what, check(device))
    except DrpoError as error:
        return Finding("FAIL", what, str(error))
    except Exception as error:
        return Finding("FAIL", what, f"{type(error).__name__}: {error}")


def _kernels(device: Device) -> str:
    """Log-probs and their gradient from logits, against fp64."""
    from megatron_drpo.vocab_parallel import logprobs_and_entropy
    from megatron_drpo.vocab_parallel.sweep import describe_sweep

    num_tokens, vocab_size = 64, 1000
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(num_tokens, vocab_size, generator=generator)
    ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    slopes = torch.randn(num_tokens, generator=generator)

    def gradient(logits: Tensor, logprobs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        found = logprobs(logits)
        (found * slopes.to(found)).sum().backward()
        assert logits.grad is not None
        return found.detach().double().cpu(), logits.grad.double().cpu()

    ours = gradient(
        logits.to(device.torch),
        lambda z: (
            logprobs_and_entropy(
                z, ids.to(device.torch), vocab_size=vocab_size, temperature=1.0, group=None
            ).logprobs
        ),
    )
    oracle = gradient(
        logits.double(), lambda z: z.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    )
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, oracle, strict=True))
    name = describe_sweep(device.kind)
    if not worst < 1e-5:
        raise DrpoError(f"{name}: log-probs or gradients are {worst:.1e} away from fp64")
    return f"{name}; log-probs and gradients within {worst:.1e} of fp64"


def _training_step(device: Device) -> str:
    """A small Llama: its log-probs against those of transformers, then one DRPO update."""
    from torch import distributed as dist
    from torch._C._distributed_c10d import HashStore
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from megatron_drpo.checkpoint.families import read_architecture
    from megatron_drpo.config import Config, DataConfig, ModelConfig
    from megatron_drpo.mcore import parallel
    from megatron_drpo.mcore.policy import Policy
    from megatron_drpo.types import Prompt, Rollout, Trajectory

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )  # fmt: skip
        ).eval()
        model.save_pretrained(directory)
        ids = torch.randint(64, (16,))
        with torch.no_grad():
            expected = model(ids[None]).logits[0].double().log_softmax(-1)
        expected = expected[:-1].gather(-1, ids[1:, None]).squeeze(-1)[7:]
        config = Config(ModelConfig(directory), data=DataConfig(prompts="none"))
        dist.init_process_group(device.backend, store=HashStore(), rank=0, world_size=1)
        try:
            layout = parallel.initialize(config.parallel, device, seed=0)
            policy = Policy.load(
                config, read_architecture(Path(directory)), layout, device, weights=Path(directory)
            )
            rollout = Rollout(
                prompt=Prompt("p", "", ids[:8], None),
                sample=0,
                response_ids=ids[8:],
                behaviour_logprobs=expected.float(),
                finish_reason="length",
                policy_version=0,
                response_text="",
            )
            ((row,),) = policy.annotate([policy.pack([Trajectory(rollout, 1.0, 1.0)])])
            assert row.old_logprobs is not None
            worst = float((row.old_logprobs.double().cpu() - expected).abs().max())
            _, tokens = policy.forward_backward([row])
            update = policy.optim_step()
            assert tokens is not None
            parallel.destroy(layout)
        finally:
            dist.destroy_process_group()
    if not worst < _TOLERANCE[device.kind]:
        raise DrpoError(
            f"log-probs of a small Llama are {worst:.1e} nats from those of transformers"
        )
    if update.skipped or not update.grad_norm > 0:
        raise DrpoError(f"an update's gradient norm is {update.grad_norm}; it should be above 0")
    return (
        f"a small Llama, {device.kind} and {device.backend}: log-probs within {worst:.1e} nats of "
        "transformers' own, one DRPO update made"
    )
