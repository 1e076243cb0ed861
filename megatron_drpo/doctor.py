"""Is the installation ready, and what would a run take? No weights, no prompts, no torchrun.

    python -m megatron_drpo.doctor [--require-gpu]

checks the machine, its packages and kernels, and makes a training step (`installation`). With a
number of ranks it plans a run, from config.json alone, and needs no GPU:

    python -m megatron_drpo.doctor --hf-model DIR_OR_CONFIG_JSON --world-size 64 \\
        --device-memory-gib 80 --peak-tflops 989 --bf16 [any flag of training]

prints the model, the layout, the memory of a rank by pipeline stage, what ranks send each other and
how long a step takes; it exits with status 2 and a reason where the layout is impossible or does
not fit. With --suggest it searches the layouts instead and prints those that fit, the fastest
first. Flags and YAML files are those of training (`--dry-run` prints the same plan with a run's own
prompts); GPUs with Transformer Engine are assumed unless --device cpu or --transformer-impl local
says otherwise.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import tyro

from megatron_drpo import __version__
from megatron_drpo.arguments import Options, given_names, parse, types_of
from megatron_drpo.cli import exit_status
from megatron_drpo.config import Config, MemoryConfig, ParallelConfig, flag
from megatron_drpo.errors import ConfigError

if TYPE_CHECKING:
    from megatron_drpo.checkpoint.families import Architecture
    from megatron_drpo.plan.job import Job
    from megatron_drpo.plan.speed import Speed

NUM_SUGGESTED, NUM_NEAR = 10, 3
_RECOMPUTED = MemoryConfig(
    recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
)
_GIB = 1 << 30
_NO_PROMPTS = "(none)"
"""Stands for the prompts that training asks for, and that are not read here."""


@dataclass(frozen=True)
class Doctor:
    """Without --world-size: whether this machine is ready to train. With it: what a run would take,
    before there is a cluster, a checkpoint or a prompt; then all flags of training are understood
    as well (docs/flags.md)."""

    require_gpu: bool = False
    """A machine without a usable GPU is not ready."""
    world_size: int | None = None
    """Ranks of the run to plan: GPUs."""
    device_memory_gib: float | None = None
    """Memory of a GPU; then a run that does not fit is refused."""
    prompt_length: int = 1024
    """Tokens of the longest prompt."""
    suggest: bool = False
    """Search the layouts of so many ranks, with and without recomputation, and print those that
    fit, ranked by estimated time; needs --peak-tflops and --device-memory-gib."""
    gpus_per_node: int = 8
    """GPUs of a machine."""
    node_gbytes: float = 300.0
    """10^9 bytes per second that a GPU sends within its machine, as reached by collectives."""
    network_gbytes: float = 40.0
    """The same to other machines."""
    efficiency: float | None = None
    """Share of --peak-tflops that products of matrices reach; by default 0.5, and 0.3 where there
    are experts."""
    gpu_capability: float = 9.0
    """Compute capability of the GPUs, which FP8 depends on: 8.9 Ada, 9.0 Hopper, 10.0 Blackwell."""

    def problems(self, config: Config) -> list[str]:
        """Values that mean nothing in a plan."""
        positive = ("device_memory_gib", "node_gbytes", "network_gbytes", "efficiency")
        rules = {name: (getattr(self, name), 0.0, "above 0") for name in positive}
        counted = ("world_size", "prompt_length", "gpus_per_node")
        rules |= {name: (getattr(self, name), 0.5, "at least 1") for name in counted}
        found = [
            f"{flag(name)} {value}: must be {need}"
            for name, (value, least, need) in rules.items()
            if value is not None and not value > least
        ]
        if self.require_gpu:
            found.append("--require-gpu: a plan needs no GPU; drop it, or --world-size")
        if self.efficiency is not None and self.efficiency > 1:
            found.append(f"--efficiency {self.efficiency}: must be at most 1")
        if self.suggest and config.train.peak_tflops is None:
            found.append("--suggest: ranks layouts by time; give --peak-tflops (H100 in bf16: 989)")
        if self.suggest and self.device_memory_gib is None:
            found.append("--suggest: keeps layouts that fit; give --device-memory-gib")
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Examine or plan; the exit status."""
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Parse, check, and print what was found.

    Raises:
        DrpoError: whatever the user has to mend; the machine is not ready, or the run does not fit.
    """
    doctor, rest = tyro.cli(
        Doctor,
        args=argv,
        prog="doctor",
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if doctor.world_size is None:
        _examine_installation(doctor, rest)
        return
    named = [word.partition("=")[0].replace("_", "-") for word in rest]
    if "--prompts" not in named and "--rollouts-file" not in named:
        rest = [*rest, "--prompts", _NO_PROMPTS, "--rollouts-file", "None"]
    config, _ = parse(rest)
    found = doctor.problems(config)
    if found:
        raise ConfigError("\n".join(found))
    patient = Patient(doctor, doctor.world_size, config)
    if doctor.suggest:
        patient.suggest()
    else:
        patient.examine()


def _examine_installation(doctor: Doctor, rest: Sequence[str]) -> None:
    given_names(rest, types_of([*get_type_hints(Config).values(), Options, Doctor]))
    changed = [each.name for each in fields(Doctor) if getattr(doctor, each.name) != each.default]
    unread = [*(flag(name) for name in changed if name != "require_gpu"), *rest]
    if unread:
        raise ConfigError(
            f"--world-size: is missing, and {unread[0]} is about a run on so many ranks; give it "
            "for a plan, or no flags to examine this machine"
        )
    from megatron_drpo.installation import examine

    print(f"Megatron-DRPO {__version__}: is this machine ready?\n")
    failed = 0
    for finding in examine(doctor.require_gpu):
        print(f"  {finding.verdict:<4}  {finding.what:<18}  {finding.says}", flush=True)
        failed += finding.verdict == "FAIL"
    if failed:
        raise ConfigError(f"not ready: {failed} of the above failed")
    print("\nready")


class Patient:
    """A model and a configuration on so many ranks."""

    def __init__(self, doctor: Doctor, world_size: int, config: Config) -> None:
        # Imported here and below, since torch takes seconds: a mistyped flag is answered at once.
        from megatron_drpo.objectives import build_objective
        from megatron_drpo.plan.speed import Machines

        self.doctor, self.world_size, self.config = doctor, world_size, config
        self.gpu = config.parallel.device != "cpu"
        self.architecture, self.reference = _architecture("--hf-model", config.model.hf_model), None
        needs = build_objective(config.objective).needs
        if needs.reference_logprobs or needs.reference_kl:
            other = config.objective.reference_model
            self.reference = (
                _architecture("--reference-model", other) if other else self.architecture
            )
        self.machines = Machines(
            peak_tflops=config.train.peak_tflops or math.nan,
            gpus_per_node=doctor.gpus_per_node,
            node_gbytes=doctor.node_gbytes,
            network_gbytes=doctor.network_gbytes,
            efficiency=doctor.efficiency,
        )

    @property
    def device_bytes(self) -> float | None:
        gib = self.doctor.device_memory_gib
        return None if gib is None else gib * _GIB

    def job(self, config: Config | None = None) -> Job:
        """The run, or the same with other settings."""
        from megatron_drpo.plan.job import Job

        config = config or self.config
        return Job(
            self.architecture,
            config,
            self.world_size,
            gpu=self.gpu,
            transformer_engine=self.gpu and config.model.transformer_impl != "local",
            prompt_length=self.doctor.prompt_length,
            reference=self.reference,
            generates=config.rollout.rollouts_file is None,
        )

    def examine(self) -> None:
        """Print the plan of the layout that was given.

        Raises:
            ConfigError: it is impossible, or does not fit.
        """
        from megatron_drpo.plan import text
        from megatron_drpo.plan.advice import warnings
        from megatron_drpo.plan.layouts import problems
        from megatron_drpo.plan.speed import fits, speed

        found = problems(self.config, self.world_size, self.architecture, self.reference)
        found += self._unsupported()
        if found:
            raise ConfigError("\n".join(found))
        job = self.job()
        sections = {
            "the model": text.model_lines(job),
            "the layout": text.layout_lines(job),
            "the memory of a rank, by pipeline stage": text.memory_lines(job, self.device_bytes),
            "what ranks send each other": text.traffic_lines(job, self.machines),
        }
        if self.config.train.peak_tflops is not None:
            sections["the speed of training"] = text.speed_lines(
                job, self.machines, speed(job, self.machines)
            )
        sections["worth a look"] = warnings(job)
        print(text.page(sections))
        if self.device_bytes is not None and not fits(job, self.device_bytes):
            raise ConfigError(self._too_large(job))

    def suggest(self) -> None:
        """Print the fastest layouts that fit.

        Raises:
            ConfigError: none does.
        """
        from megatron_drpo.plan import text

        found = self._ranked()[:NUM_SUGGESTED]
        if not found:
            raise ConfigError(
                f"--world-size {self.world_size} --device-memory-gib "
                f"{self.doctor.device_memory_gib:g}: no layout of this model fits, even with all "
                "layers recomputed; use more GPUs, or lower --max-tokens-per-microbatch "
                f"{self.config.train.max_tokens_per_microbatch}"
            )
        best = found[0][0].config
        lines = [
            *text.suggestion_lines(found),
            "",
            text.assumed(self.architecture, self.machines),
            "the first one: " + _flags(best, self.config),
        ]
        print("\n".join(lines))

    def _ranked(self) -> list[tuple[Job, Speed]]:
        """Layouts that fit, the fastest first; recomputed only where they do not fit without."""
        from megatron_drpo.plan.layouts import possible
        from megatron_drpo.plan.speed import speed

        kept = []
        for parallel in possible(self.config, self.world_size, self.architecture, self.reference):
            if parallel.tensor_model_parallel_size > self.doctor.gpus_per_node:
                continue
            job = self._fitting(parallel)
            if job is not None:
                kept.append((job, speed(job, self.machines)))
        return sorted(kept, key=lambda found: found[1].seconds)

    def _fitting(self, parallel: ParallelConfig) -> Job | None:
        """The run in a layout, recomputed only where it must be to fit; None if it never fits."""
        from megatron_drpo.plan.speed import fits

        assert self.device_bytes is not None, "asked for only where it is known"
        for memory in (self.config.memory, _RECOMPUTED):
            job = self.job(replace(self.config, parallel=parallel, memory=memory))
            if fits(job, self.device_bytes):
                return job
        return None

    def _too_large(self, job: Job) -> str:
        from megatron_drpo.plan.layouts import nearest
        from megatron_drpo.plan.memory import fullest, memory
        from megatron_drpo.plan.speed import USABLE

        worst = fullest(memory(job))
        near = []
        for parallel in nearest(self.config, self.world_size, self.architecture, self.reference):
            other = self._fitting(parallel)
            if other is not None:
                near.append(f"{_flags(other.config, self.config)} ({other.shape})")
            if len(near) == NUM_NEAR:
                break
        remedy = (
            "the nearest that fit: " + ", or ".join(near)
            if near
            else "no layout of so many ranks does, even with all layers recomputed"
        )
        return (
            f"--device-memory-gib {self.doctor.device_memory_gib:g}: a rank of pipeline stage "
            f"{worst.stage} takes {worst.peak / _GIB:.1f} GiB, and more than {USABLE:.0%} of the "
            f"memory should not be planned for; {remedy}"
        )

    def _unsupported(self) -> list[str]:
        """What GPUs of this kind, or Transformer Engine, would refuse later."""
        from megatron_drpo import hardware
        from megatron_drpo.device import Device

        if not self.gpu:
            device = Device("cpu", "gloo", 0, "--device cpu")
            return hardware.problems(self.config, self.architecture, hardware.Machine(device))
        device = Device("cuda", "nccl", 0, "assumed")
        major, minor = divmod(round(self.doctor.gpu_capability * 10), 10)
        machine = hardware.Machine(device, "this GPU", (major, minor), (13, 0), (2, 9))
        return hardware.problems(self.config, self.architecture, machine)


def _architecture(name: str, model: str | None) -> Architecture:
    """Of a directory that holds config.json, or of that file itself.

    Raises:
        CheckpointError: as `read_architecture`.
    """
    from megatron_drpo.checkpoint.families import read_architecture

    if model is None:
        raise ConfigError(f"{name}: give a directory that holds config.json, or that file itself")
    path = Path(model)
    if path.is_file() and path.name != "config.json":
        raise ConfigError(
            f"{name} {model}: is a file of another name than config.json; give the model's "
            "config.json, or the directory that holds it"
        )
    return read_architecture(path.parent if path.is_file() else path)


def _flags(config: Config, present: Config) -> str:
    """What is different, as flags."""
    from megatron_drpo.plan.layouts import flags_of

    words = flags_of(config.parallel, present.parallel).split()
    if config.memory != present.memory:
        words += ["--recompute-granularity full --recompute-method uniform"]
        words += ["--recompute-num-layers 1"]
    return " ".join(words) or "as it is"


if __name__ == "__main__":
    sys.exit(main())
