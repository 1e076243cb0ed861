"""`--verify-layout`: one batch under the run's layout, and again under the smallest that fits.

L3. In: the configuration and the checked inputs. Out: a table of both layouts' numbers, and an
error where they differ by more than the tolerance.

The reference has one sequence in each row and as few ranks as hold the model, without sequence,
context, expert or interleaved pipeline parallelism and without recomputation: what it computes is
as simple as can be. Both sides run the program's own code: they pack, score, annotate, compute loss
and gradients, and reduce these as training does, up to the optimizer's update.

Where nothing was recorded (`--rollouts-file`), the sequences are the run's first prompts, with
pieces of other prompts for responses. What behaviour policy and trainer are said to have thought of
these is what the run's layout gives, moved at random, so that no ratio is 1 and penalties act; the
reference gets the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from megatron_drpo.arguments import Options
from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.config import Config
from megatron_drpo.device import Device
from megatron_drpo.disk import write_atomically
from megatron_drpo.errors import ConfigError, VerificationError
from megatron_drpo.mcore import parallel
from megatron_drpo.mcore.parallel import Layout
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.preflight import Inputs
from megatron_drpo.verify_layout.batch import make_batch
from megatron_drpo.verify_layout.layouts import check_depth, reference_of, shorten
from megatron_drpo.verify_layout.measure import measure
from megatron_drpo.verify_layout.report import compare

_DAY = timedelta(days=1)


def default_tolerance(config: Config) -> float:
    """`--verify-layout-tolerance` with its default resolved."""
    if config.precision.fp8_format is not None:
        return 0.2
    return 0.05 if config.model.bf16 else 1e-5


def run(config: Config, inputs: Inputs, options: Options) -> None:
    """Compute, compare and print; collective over all ranks that torchrun started.

    Raises:
        ConfigError: no smaller layout fits, or the model has not so many layers.
        VerificationError: on every rank, if anything differs by more than the tolerance.
    """
    num_layers, told = options.verify_layout_num_layers, options.verify_layout_json
    check_depth(config, inputs, num_layers)
    if told and not Path(told).absolute().parent.is_dir():
        raise ConfigError(f"--verify-layout-json {told}: there is no such directory; create it")
    store, rank, world_size = next(rendezvous("env://"))
    with world(config, inputs.device, PrefixStore("chosen", store), rank, world_size) as here:
        smaller = reference_of(config, inputs, here, num_layers)
        policy = load(config, inputs, here, num_layers)
        batch = make_batch(config, inputs, policy)
        chosen = measure(policy, policy.pack(batch.trajectories), batch)
        let_go(policy)
        del policy
    again = None
    size = smaller.parallel.model_parallel_size
    if rank < size:
        inner = PrefixStore("reference", store)
        with world(smaller, inputs.device, inner, rank, size) as here:
            policy = load(smaller, inputs, here, num_layers)
            again = measure(policy, policy.own_rows([batch.one_by_one]), batch)
            let_go(policy)
            del policy
    if chosen is not None and again is not None:
        tolerance = options.verify_layout_tolerance or default_tolerance(config)
        report = compare(chosen, again, tolerance)
        print(report, flush=True)
        if told:
            write_atomically(Path(told), report.to_json())
        store.set("verdict", report.verdict)
    # However long the reference takes: a rank that fails meanwhile is torchrun's affair.
    store.wait(["verdict"], _DAY)
    verdict = store.get("verdict").decode()
    if verdict:
        raise VerificationError(verdict)


@contextlib.contextmanager
def world(config: Config, device: Device, store: Store, rank: int, size: int) -> Iterator[Layout]:
    """The process groups of a layout over the first `size` ranks."""
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    dist.init_process_group(
        device.backend, store=store, rank=rank, world_size=size, timeout=timeout
    )
    layout = parallel.initialize(config.parallel, device, config.train.seed)
    yield layout
    parallel.destroy(layout)
    dist.destroy_process_group()


def load(config: Config, inputs: Inputs, layout: Layout, num_layers: int | None) -> Policy:
    """The policy as training starts with it, or the first layers of it."""

    class FirstLayers(Policy):
        """Built with fewer layers, and filled from the whole checkpoint."""

        def _build(self, architecture: Architecture):
            return super()._build(shorten(architecture, num_layers))

    return FirstLayers.load(
        config,
        inputs.architecture,
        layout,
        inputs.device,
        weights=inputs.weights,
        reference=inputs.reference,
    )


def let_go(policy: Policy) -> None:
    """Give memory back: hooks of the autograd graph hold the gradient buffers in a circle."""
    for chunk in policy.chunks:
        vars(chunk).clear()
    vars(policy).clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
