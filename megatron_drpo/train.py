"""The training loop: one function owns the order of things.

    prompts -> generate -> reward -> advantages -> score -> updates -> evaluate -> checkpoint

L3. In: the configuration and the inputs that `preflight` read. Out: a run directory (see
`OutputConfig.output_dir`). Every rank runs the same loop on the same records: responses and rewards
are exchanged once per step, and from there on advantages, packing and all decisions are the same
pure functions of the same numbers everywhere. The loop keeps no random state: what a step draws
depends on (seed, step) alone, so a resume needs only the number of the step.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_drpo.advantages import make_trajectories
from megatron_drpo.checkpoint import resume
from megatron_drpo.checkpoint.hf import copy_settings
from megatron_drpo.collect import Batch, Collector
from megatron_drpo.config import Config
from megatron_drpo.disk import write_atomically
from megatron_drpo.errors import ServersError
from megatron_drpo.gate import Gate, rounding
from megatron_drpo.mcore import parallel, state
from megatron_drpo.mcore.model import use_transformer_engine
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.mcore.weights import export
from megatron_drpo.metrics import (
    MetricsWriter,
    PhaseTimer,
    TokenDiagnostics,
    fullest,
    rollout_statistics,
    trust_region_statistics,
    worst_and_best,
)
from megatron_drpo.packing import packing_statistics, split_updates
from megatron_drpo.plan.flops import attention_cost
from megatron_drpo.plan.speed import mfu, training_flops
from megatron_drpo.preflight import Inputs
from megatron_drpo.report import write_report
from megatron_drpo.rollout.engines import build_engine
from megatron_drpo.rollout.files import (
    FileHeader,
    make_header,
    step_file,
    tokenizer_sha256,
    write_rollouts,
)
from megatron_drpo.rollout.inprocess import InProcessEngine
from megatron_drpo.rollout.servers import ServerEngine
from megatron_drpo.serving import Serving
from megatron_drpo.types import Row, Trajectory
from megatron_drpo.vocab_parallel.gemm import describe_gemm
from megatron_drpo.vocab_parallel.sweep import describe_sweep

_TOLD = 3
"""Failures of a batch that are told by name."""


def run(config: Config, inputs: Inputs) -> bool:
    """Train, from the HF checkpoint or from the newest training checkpoint, to `train_iters`.

    Returns:
        False if the run was asked to stop before that (SIGUSR1), and is saved.
    """
    layout = parallel.initialize(config.parallel, inputs.device, config.train.seed)
    checkpoint = None
    if config.output.resume:
        checkpoint = resume.latest(Path(config.output.output_dir) / "checkpoints")
        assert checkpoint is not None, "preflight checks that there is one"
    with contextlib.ExitStack() as background:
        finished = Run(config, inputs, layout, background, checkpoint).train()
    if not finished:
        layout.barrier()  # torchrun ends all ranks once one has failed, as a stopped run's do
    parallel.destroy(layout)
    return finished


class Run:
    """A run in progress: what the steps share. Nothing is written before `train`."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        layout: parallel.Layout,
        background: contextlib.ExitStack,
        checkpoint: Path | None,
    ) -> None:
        """Ready to train.

        Args:
            background: ends what works in the background.
            checkpoint: of this run, to continue from; None starts anew.
        """
        self.config, self.inputs, self.layout = config, inputs, layout
        self.directory = Path(config.output.output_dir)
        self.settings = self.directory / "model"
        self.main = layout.rank == 0
        implementation = (
            "Transformer Engine" if use_transformer_engine(config.model) else "Megatron's local"
        )
        self.say(f"device: {inputs.device.kind} ({inputs.device.backend}): {inputs.device.reason}")
        self.say(f"layout: {layout}; layers: {implementation}")
        kind = inputs.device.kind
        self.say(f"output layer: {describe_gemm(kind)}; sweep: {describe_sweep(kind)}")
        self.policy = Policy.load(
            config,
            inputs.architecture,
            layout,
            inputs.device,
            weights=inputs.weights,
            reference=inputs.reference,
        )
        self.say(f"weights: {inputs.weights}, {self.policy.verified}")
        self.timer = PhaseTimer(inputs.device.synchronize, inputs.device.take_memory)
        self.writer: MetricsWriter | None = None
        self.evaluated: dict[str, float] = {}
        self.skipped_updates = 0
        self.step = 0
        self.saved_step = 0
        """Of the newest checkpoint."""
        if checkpoint is not None:
            self._resume(checkpoint)
        self.engine = None
        if inputs.generates:
            self.engine = build_engine(config.rollout, self.policy, inputs.tokenizer)
        generator = self.engine and self.engine.generator
        if isinstance(generator, ServerEngine):
            background.callback(generator.close)
        self.collector = Collector(
            config, inputs, layout, generator, lambda: self.policy.num_updates, self.timer
        )
        background.callback(self.collector.close)
        self.gate = Gate(config, self.policy, exact=bool(self.engine and self.engine.exact))
        if self.engine:
            bound = self.gate.bound
            self.say(
                f"engine: {self.engine.text}; largest gap to training's log-probs: {bound.nats:g} "
                f"nats per token ({bound.reason})"
            )
        self.serving = None
        if inputs.generates and config.rollout.uses_servers:
            assert not isinstance(generator, InProcessEngine)
            self.serving = Serving(
                config,
                self.policy,
                generator,
                [prompt.token_ids for prompt in (*inputs.prompts, *inputs.eval_prompts)],
                self.settings,
                bound=bound.nats,
                rounding=rounding(config),
                say=self.say,
            )

    def say(self, message: str) -> None:
        """A line for people, from one rank, that does not break the progress bar."""
        if self.main:
            tqdm.write(message)

    def _resume(self, path: Path) -> None:
        progress = state.load_checkpoint(path, self.policy)
        self.step, self.skipped_updates = progress.step, progress.skipped_updates
        self.saved_step = self.step
        self.say(f"resumed from {path}: {self.step} steps done")

    # The loop.

    def train(self) -> bool:
        """All steps that are left, with evaluation and checkpoints in between and at the end;
        False if a stop was asked for before the last."""
        config, steps = self.config, self.config.train.train_iters
        if self.main:
            self.directory.mkdir(parents=True, exist_ok=True)
            _write_json(self.directory / "config.json", config.flat())
            self._keep_settings()
            if config.rollout.save_rollouts:
                self._drop_rollouts()
            resume_step = self.step + 1 if config.output.resume else None
            self.writer = MetricsWriter(self.directory, resume_step=resume_step)
        self.layout.barrier()  # servers are told of settings that rank 0 has kept
        self._sync()
        bar = tqdm(
            total=steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (self.main and config.output.progress),
        )
        self.timer.pop()
        if self.step == 0:
            self._evaluate()
        while self.step < steps:
            if self._stop_asked():
                bar.close()
                self._stop()
                return False
            scalars: dict[str, float] = {}
            histograms: dict[str, torch.Tensor] = {}
            try:
                scalars, histograms = self.train_step()
                self.step += 1
                scalars |= self._sync()
            except ServersError as error:
                if scalars:  # the step is done
                    self._log(scalars, histograms)
                raise ServersError(f"{error}\n{self._rescue()}") from error
            scalars |= self._measured()
            scalars |= _throughput(scalars, self.layout.world_size, config.train.peak_tflops)
            self._log(scalars, histograms)
            if self._due(config.eval.eval_interval):
                self._evaluate()
            if self._due(config.output.checkpoint_interval):
                self._checkpoint()
            bar.set_postfix(_postfix(scalars, self.evaluated))
            bar.update()
        bar.close()
        if self.serving:
            self.serving.close()
        if config.output.export_hf:
            self._export()
        if self.writer:
            self.writer.close()
            _write_json(
                self.directory / "summary.json",
                {
                    "device": self.inputs.device.kind,
                    "layout": str(self.layout),
                    "steps": self.step,
                },
            )
            self.say(f"report: {write_report(self.directory)}")
        return True

    def _stop_asked(self) -> bool:
        """True on all ranks once one was sent SIGUSR1, which the launcher blocks: so it waits."""
        return not self.layout.all_agree(signal.SIGUSR1 not in signal.sigpending())

    def _stop(self) -> None:
        """Leave the run as one that `--resume` continues."""
        if self.saved_step < self.step:
            self._checkpoint()
        if self.serving:
            self.serving.close()
        if self.writer:
            self.writer.close()
        then = "saved; continue with --resume" if self.step else "nothing to save; start again"
        self.say(
            f"stopped (SIGUSR1) after step {self.step} of {self.config.train.train_iters}: {then}"
        )

    def _keep_settings(self) -> None:
        """A copy of the model's config.json and tokenizer for checkpoints and export, which may
        come days later, when who started the run has tidied up."""
        if not self.settings.is_dir():
            staging = self.settings.with_name(".model.tmp")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            copy_settings(self.inputs.model, staging, None)
            staging.rename(self.settings)

    def _drop_rollouts(self) -> None:
        """Of steps that this run has yet to make: those of an earlier one in this directory, or of
        steps beyond the checkpoint, as with what was logged of them."""
        for file in (self.directory / "rollouts").glob("step-*.jsonl"):
            if int(file.stem.removeprefix("step-")) > self.step:
                file.unlink()

    def _due(self, interval: int) -> bool:
        """True at the end of the run, and every `interval` steps unless that is 0."""
        at_end = self.step == self.config.train.train_iters
        return at_end or bool(interval and self.step % interval == 0)

    def _log(
        self, scalars: dict[str, float], histograms: dict[str, torch.Tensor] | None = None
    ) -> None:
        if self.writer:
            self.writer.write(self.step, scalars, histograms)

    def _measured(self, phase: str | None = None) -> dict[str, float]:
        """Times of this rank and memory of the fullest since the last call, or those of one phase
        alone; collective."""
        popped = self.timer.pop()
        measured = popped | fullest(self.layout.gather_to_main(popped))
        if phase is None:
            return measured
        return {name: measured[name] for name in (f"time/{phase}", f"memory/{phase}")}

    def train_step(self) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """One rollout batch and its optimizer updates; scalars and histograms of it. The number of
        steps done, `step`, is the caller's to raise."""
        config, samples = self.config, self.config.rollout.rollout_samples_per_prompt
        batch = self.collector.collect(self.step)
        self._tell_failures(batch)
        trajectories = make_trajectories(batch.rollouts, batch.rewards, samples, config.advantage)
        if config.rollout.save_rollouts and self.main:
            path = self.directory / "rollouts" / step_file(self.step + 1)
            write_rollouts(path, trajectories, self._header())
        scalars = rollout_statistics(trajectories) | batch.statistics
        scalars |= self._staleness(trajectories)
        with self.timer.phase("score"):
            updates, packing = self._annotate(trajectories)
            scalars |= packing | self.gate.check(updates, self.step)
        with self.timer.phase("train"):
            updated, tokens = self.update(updates)
        scalars |= updated
        lengths = _lengths(trajectories)
        response = sum(t.rollout.response_ids.numel() for t in trajectories)
        scalars["tokens/response"], scalars["tokens/total"] = response, sum(lengths)
        flops = training_flops(self.inputs.architecture, lengths, loss_tokens=response)
        scalars["tflop/train"] = flops / 1e12
        if tokens is None:
            return scalars, {}
        scalars |= trust_region_statistics(tokens, config.objective.log_ratio_limit)
        histograms = {
            "weight": tokens.gradient_weight,
            "ratio": tokens.ratio,
            "entropy": tokens.entropy,
            "reward": torch.tensor([t.reward for t in trajectories if not math.isnan(t.reward)]),
            "response_length": torch.tensor(
                [float(t.rollout.response_ids.numel()) for t in trajectories]
            ),
        }
        return scalars, histograms

    def _rescue(self) -> str:
        """Save what was trained, as far as it is not saved; what a person can do then.

        Servers fail before the first update of a step or after its last.
        """
        if self.saved_step < self.step:
            self._checkpoint()
        if not self.step:
            return "mend or replace the servers, and start again"
        return (
            f"the {self.step} steps done are saved; mend or replace the servers, then continue "
            "with --resume"
        )

    def _sync(self) -> dict[str, float]:
        """New weights into the servers, where servers generate."""
        if not self.serving:
            return {}
        with self.timer.phase("sync"):
            return self.serving.sync()

    @cached_property
    def _tokenizer_sha256(self) -> str:
        return tokenizer_sha256(self.inputs.tokenizer)

    def _header(self) -> FileHeader:
        """What the rollouts of this step have in common."""
        assert self.engine is not None, "what is saved was generated"
        return make_header(
            self.collector.sampling(self.step),
            engine=self.engine.text,
            tokenizer_sha256=self._tokenizer_sha256,
            weights_sha256=None,
            policy=f"{self.directory}, step {self.step}",
        )

    def _tell_failures(self, batch: Batch) -> None:
        """Rewards that failed, by name: the first few."""
        for failure in batch.failures[:_TOLD]:
            self.say(f"failed: {failure}")
        if len(batch.failures) > _TOLD:
            self.say(f"failed: {len(batch.failures) - _TOLD} more")

    def _staleness(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """How many steps older than the policy the tokens' weights are, where they may be."""
        if not (self.config.rollout.rollout_lag and self.collector.generates):
            return {}
        spans = [span for t in trajectories for span in t.rollout.spans]
        updates = self.config.train.updates_per_rollout
        ages = [(self.policy.num_updates - version) / updates for _, version in spans]
        counts = [count for count, _ in spans]
        mean = sum(a * c for a, c in zip(ages, counts, strict=True)) / sum(counts)
        return {"staleness/mean": mean, "staleness/max": max(ages)}

    # The trainer's side.

    def _annotate(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[list[list[Row]], dict[str, float]]:
        """The rows of each update, with what the policy says of them before the first one, and how
        well they are packed."""
        config = self.config
        shares = split_updates(
            trajectories,
            config.rollout.rollout_samples_per_prompt,
            config.train.updates_per_rollout,
            (config.train.seed, self.step),
        )
        packed = [self.policy.pack_replicas(share) for share in shares]
        statistics = packing_statistics(
            packed,
            num_tokens=sum(_lengths(trajectories)),
            attention=attention_cost(self.inputs.architecture),
        )
        return self.policy.annotate([self.policy.own_rows(rows) for rows in packed]), statistics

    def update(
        self, rows_of_updates: Sequence[Sequence[Row]]
    ) -> tuple[dict[str, float], TokenDiagnostics | None]:
        """All optimizer updates of the batch; on rank 0 also the diagnostics of every token."""
        losses, updates, parts = [], [], []
        for rows in rows_of_updates:
            loss, tokens = self.policy.forward_backward(rows)
            updates.append(self.policy.optim_step())
            losses.append(loss)
            if tokens is not None:
                parts.append(tokens)
        self.skipped_updates += sum(update.skipped for update in updates)
        message = None
        if parts and self.layout.tp_rank == 0:
            message = TokenDiagnostics.cat(parts).cpu()
        received = self.layout.gather_to_main(message)
        norms = [update.grad_norm for update in updates]
        scalars = {
            # Each update has a loss and a norm of its own: these are means over the updates.
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "lr": updates[-1].lr,
            "skipped_updates": float(self.skipped_updates),
            "policy_version": float(self.policy.num_updates),
        }
        differing = self.policy.take_routing_differences()
        if differing is not None:
            scalars["moe/routing_differs"] = differing
        return scalars, TokenDiagnostics.cat(received) if self.main else None

    # Evaluation, checkpoints, the end.

    def _evaluate(self) -> None:
        """avg@k and pass@k on the held-out prompts: means over prompts of mean and best of k."""
        if not self.inputs.eval_prompts:
            return
        config = self.config.eval
        samples = config.eval_samples_per_prompt
        batch = self.collector.evaluate()
        self._tell_failures(batch)
        rollouts = batch.rollouts
        # What could not be judged counts as not solved.
        values = [0.0 if math.isnan(value) else value for value in batch.rewards]
        groups = torch.tensor(values, dtype=torch.float64).view(-1, samples)
        lengths = [rollout.response_ids.numel() for rollout in rollouts]
        self.evaluated = {
            "eval/avg": groups.mean().item(),
            "eval/pass": groups.max(-1).values.mean().item(),
            "eval/response_length": sum(lengths) / len(lengths),
        }
        self._log(self.evaluated | self._measured("evaluate"))
        if self.writer:
            pairs = zip(rollouts, values, strict=True)
            worst, best = worst_and_best([Trajectory(*pair, 0.0) for pair in pairs])
            self.writer.samples(self.step, worst=worst, best=best)
        self.say(
            f"step {self.step}: held-out avg@{samples} {self.evaluated['eval/avg']:.3f}, "
            f"pass@{samples} {self.evaluated['eval/pass']:.3f} "
            f"({len(self.inputs.eval_prompts)} prompts)"
        )

    def _checkpoint(self) -> None:
        with self.timer.phase("checkpoint"):
            state.save_checkpoint(
                self.directory / "checkpoints",
                self.policy,
                resume.Progress(self.step, self.policy.num_updates, self.skipped_updates),
                self.config,
                self.settings,
                keep=self.config.output.checkpoint_keep,
            )
        self.saved_step = self.step
        self._log(self._measured("checkpoint"))

    def _export(self) -> None:
        path = self.directory / "hf"
        export(
            path,
            self.settings,
            self.inputs.architecture,
            self.policy.models,
            self.layout,
            run=f"{self.directory.resolve()}, step {self.step}",
        )
        self.layout.barrier()
        self.say(f"exported: {path}")


def _lengths(trajectories: Sequence[Trajectory]) -> list[int]:
    """Tokens of each sequence, prompt and response."""
    return [trajectory.rollout.num_tokens for trajectory in trajectories]


def _throughput(
    scalars: dict[str, float], world_size: int, peak_tflops: float | None
) -> dict[str, float]:
    """Tokens per second of a step, from its token counts and times; use of the devices' peak."""
    rates = {
        "tokens_per_second/generate": ("tokens/response", "time/generate"),
        "tokens_per_second/train": ("tokens/total", "time/train"),
        "tokens_per_second": ("tokens/total", "time/step"),
    }
    found = {
        name: scalars[tokens] / scalars[seconds]
        for name, (tokens, seconds) in rates.items()
        if scalars.get(seconds)
    }
    if peak_tflops and scalars.get("time/train"):
        flops, seconds = scalars["tflop/train"] * 1e12, scalars["time/train"]
        found["mfu"] = mfu(flops, seconds, world_size, peak_tflops)
    return found


def _postfix(scalars: dict[str, float], evaluated: dict[str, float]) -> dict[str, str]:
    shown = {"reward": f"{scalars['reward/mean']:.3f}"}
    if evaluated:
        shown["held-out"] = f"{evaluated['eval/avg']:.3f}"
    shown["tok/s"] = f"{scalars['tokens_per_second']:.0f}"
    return shown


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")
