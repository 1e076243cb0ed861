"""The training loop: one function owns the order of things.

    prompts -> generate -> reward -> advantages -> score -> updates -> evaluate -> checkpoint

L3. In: the configuration and the inputs that `preflight` read. Out: a run directory (see
`OutputConfig.output_dir`). Every rank runs the same loop on the same records: responses and rewards
are exchanged once per step, and from there on advantages, packing and all decisions are the same
pure functions of the same numbers everywhere. The loop keeps no random state: what a step draws
depends on (seed, step) alone, so a resume needs only the number of the step.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_drpo import rewards
from megatron_drpo.advantages import make_trajectories
from megatron_drpo.checkpoint import resume
from megatron_drpo.checkpoint.hf import copy_settings
from megatron_drpo.checkpoint.model_weights import export_hf
from megatron_drpo.config import Config
from megatron_drpo.errors import RolloutError
from megatron_drpo.mcore import parallel, state
from megatron_drpo.mcore.model import use_transformer_engine
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.metrics import (
    MetricsWriter,
    PhaseTimer,
    TokenDiagnostics,
    engine_gap_statistics,
    rollout_statistics,
    trust_region_statistics,
    write_atomically,
)
from megatron_drpo.packing import split_updates
from megatron_drpo.preflight import Inputs
from megatron_drpo.prompts import PromptSampler
from megatron_drpo.report import write_report
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.rollout.files import write_rollouts
from megatron_drpo.rollout.inprocess import InProcessEngine
from megatron_drpo.types import Prompt, Rollout, Row, Trajectory
from megatron_drpo.vocab_parallel.gemm import describe_gemm
from megatron_drpo.vocab_parallel.sweep import describe_sweep

_EVAL_STREAM = 1 << 40
"""Evaluation draws from streams of its own, the same ones each time."""


def run(config: Config, inputs: Inputs) -> None:
    """Train, from the HF checkpoint or from the newest training checkpoint, to `train_iters`."""
    layout = parallel.initialize(config.parallel, inputs.device, config.train.seed)
    _Run(config, inputs, layout).train()
    parallel.destroy(layout)


class _Run:
    """A run in progress: what the steps share."""

    def __init__(self, config: Config, inputs: Inputs, layout: parallel.Layout) -> None:
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
        self.engine = InProcessEngine(self.policy, max_slots=config.rollout.rollout_max_slots)
        self.reward = rewards.load_reward(config.reward.reward)
        self.timer = PhaseTimer(inputs.device.synchronize)
        self.sampler = None
        if inputs.rollouts is None:
            self.sampler = PromptSampler(
                len(inputs.prompts),
                config.rollout.rollout_prompts_per_step,
                config.train.seed,
                config.data.shuffle_prompts,
            )
        self.writer: MetricsWriter | None = None
        self.evaluated: dict[str, float] = {}
        self.skipped_updates = 0
        self.step = 0
        if config.output.resume:
            self._resume()

    def say(self, message: str) -> None:
        """A line for people, from one rank, that does not break the progress bar."""
        if self.main:
            tqdm.write(message)

    def _resume(self) -> None:
        path = resume.latest(self.directory / "checkpoints")
        assert path is not None, "preflight checks that there is a checkpoint"
        progress = state.load_checkpoint(path, self.policy)
        self.step, self.skipped_updates = progress.step, progress.skipped_updates
        self.say(f"resumed from {path}: {self.step} steps done")

    # The loop.

    def train(self) -> None:
        """All steps that are left, with evaluation and checkpoints in between and at the end."""
        config, steps = self.config, self.config.train.train_iters
        started = time.perf_counter()
        if self.main:
            self.directory.mkdir(parents=True, exist_ok=True)
            _write_json(self.directory / "config.json", config.flat())
            self._keep_settings()
            resume_step = self.step + 1 if config.output.resume else None
            self.writer = MetricsWriter(self.directory, resume_step=resume_step)
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
            scalars, histograms = self._train_step()
            self.step += 1
            scalars |= self.timer.pop()
            _add_throughput(scalars)
            self._log(scalars, histograms)
            if self._due(config.eval.eval_interval):
                self._evaluate()
            if self._due(config.output.checkpoint_interval):
                self._checkpoint()
            bar.set_postfix(_postfix(scalars, self.evaluated))
            bar.update()
        bar.close()
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
                    "wall_seconds": time.perf_counter() - started,
                },
            )
            self.say(f"report: {write_report(self.directory)}")

    def _keep_settings(self) -> None:
        """A copy of the model's config.json and tokenizer for checkpoints and export, which may
        come days later, when who started the run has tidied up."""
        if not self.settings.is_dir():
            staging = self.settings.with_name(".model.tmp")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            copy_settings(self.inputs.model, staging, None)
            staging.rename(self.settings)

    def _due(self, interval: int) -> bool:
        """True at the end of the run, and every `interval` steps unless that is 0."""
        at_end = self.step == self.config.train.train_iters
        return at_end or bool(interval and self.step % interval == 0)

    def _log(
        self, scalars: dict[str, float], histograms: dict[str, torch.Tensor] | None = None
    ) -> None:
        if self.writer:
            self.writer.write(self.step, scalars, histograms)

    def _train_step(self) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """One rollout batch and its optimizer updates; scalars and histograms of it."""
        config, samples = self.config, self.config.rollout.rollout_samples_per_prompt
        rollouts, values = self._collect()
        trajectories = make_trajectories(rollouts, values, samples, config.advantage)
        if config.rollout.save_rollouts and self.main:
            path = self.directory / "rollouts" / f"step-{self.step + 1:06d}.jsonl"
            write_rollouts(path, trajectories)
        scalars = rollout_statistics(trajectories)
        with self.timer.phase("score"):
            updates = self._annotate(trajectories)
            scalars |= self._engine_gap(updates)
        with self.timer.phase("train"):
            updated, tokens = self._update(updates)
        scalars |= updated
        scalars["tokens/response"] = sum(t.rollout.response_ids.numel() for t in trajectories)
        scalars["tokens/total"] = scalars["tokens/response"] + sum(
            t.rollout.prompt.token_ids.numel() for t in trajectories
        )
        if tokens is None:
            return scalars, {}
        scalars |= trust_region_statistics(tokens, config.objective.log_ratio_limit)
        histograms = {
            "weight": tokens.gradient_weight,
            "ratio": tokens.ratio,
            "entropy": tokens.entropy,
            "reward": torch.tensor([t.reward for t in trajectories]),
            "response_length": torch.tensor(
                [float(t.rollout.response_ids.numel()) for t in trajectories]
            ),
        }
        return scalars, histograms

    # Responses and their rewards.

    def _collect(self) -> tuple[list[Rollout], list[float]]:
        """This step's rollouts, grouped by prompt, and their rewards; the same on every rank."""
        config = self.config.rollout
        per_step, samples = config.rollout_prompts_per_step, config.rollout_samples_per_prompt
        if self.sampler is None:
            return self._from_file(per_step * samples)
        prompts = [self.inputs.prompts[i] for i in self.sampler.indices(self.step)]
        sampling = Sampling(
            temperature=config.rollout_temperature,
            top_p=config.rollout_top_p,
            top_k=config.rollout_top_k,
            max_response_length=config.rollout_max_response_length,
            stop_ids=self.inputs.stop_ids,
            seed=self.config.train.seed + (self.step << 32),
            record_topk=config.rollout_topk,
        )
        with self.timer.phase("generate"):
            rollouts = self._generate(prompts, samples, sampling, first_stream=0)
        with self.timer.phase("reward"):
            return self._exchange(rollouts)

    def _from_file(self, count: int) -> tuple[list[Rollout], list[float]]:
        """The next `count` rollouts of `--rollouts-file`, from its start again after its end."""
        recorded = self.inputs.rollouts
        assert recorded is not None
        picked = [recorded[(self.step * count + i) % len(recorded)] for i in range(count)]
        rollouts = [rollout for rollout, _ in picked]
        values = [value for _, value in picked if value is not None]
        if len(values) == len(rollouts):
            return rollouts, values
        with self.timer.phase("reward"):
            share = len(rollouts) // self.layout.dp_size
            start = self.layout.dp_rank * share
            return self._exchange(rollouts[start : start + share])

    def _generate(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, *, first_stream: int
    ) -> list[Rollout]:
        """This replica's share of the responses, `samples` for each prompt.

        Which random numbers a response takes depends on its place among all prompts, not on the
        replica that makes it.
        """
        mine = range(self.layout.dp_rank, len(prompts), self.layout.dp_size)
        jobs = [(i, sample) for i in mine for sample in range(samples)]
        requests = [
            Request(prompts[i].token_ids, first_stream + i * samples + sample) for i, sample in jobs
        ]
        completions = self.engine.generate(requests, sampling)
        texts = self._decode(completions)
        return [
            Rollout(
                prompt=prompts[i],
                sample=sample,
                response_ids=done.response_ids,
                behaviour_logprobs=done.logprobs,
                finish_reason=done.finish_reason,
                policy_version=self.policy.num_updates,
                response_text=text,
                topk_ids=done.topk_ids,
                topk_logprobs=done.topk_logprobs,
            )
            for (i, sample), done, text in zip(jobs, completions, texts, strict=True)
        ]

    def _decode(self, completions: Sequence[Completion]) -> list[str]:
        return self.inputs.tokenizer.batch_decode(
            [done.response_ids.tolist() for done in completions], skip_special_tokens=True
        )

    def _exchange(self, rollouts: list[Rollout]) -> tuple[list[Rollout], list[float]]:
        """Rewards from one rank of each replica; then everybody's rollouts, on every rank."""
        message = None
        if self.layout.is_replica_source:
            config = self.config.reward
            values = rewards.score(
                self.reward, config.reward, rollouts, config.reward_timeout_seconds
            )
            message = (rollouts, values)
        groups: dict[str, list[tuple[Rollout, float]]] = {}
        for rollouts_, values_ in self.layout.gather_objects(message):
            for rollout, value in zip(rollouts_, values_, strict=True):
                groups.setdefault(rollout.prompt.id, []).append((rollout, value))
        # By prompt id: an order that does not depend on how prompts were dealt to replicas.
        pairs = [pair for name in sorted(groups) for pair in groups[name]]
        return [rollout for rollout, _ in pairs], [value for _, value in pairs]

    # The trainer's side.

    def _annotate(self, trajectories: Sequence[Trajectory]) -> list[list[Row]]:
        """The rows of each update, with what the policy says of them before the first one."""
        config = self.config
        shares = split_updates(
            trajectories,
            config.rollout.rollout_samples_per_prompt,
            config.train.updates_per_rollout,
            (config.train.seed, self.step),
        )
        return self.policy.annotate([self.policy.pack(share) for share in shares])

    def _engine_gap(self, updates: Sequence[Sequence[Row]]) -> dict[str, float]:
        """Behaviour log-probs against the trainer's, before any update; the same on every rank."""
        pair = None
        if self.layout.is_last_stage and self.layout.tp_rank == 0:
            rows = [row for rows in updates for row in rows]
            pair = (
                torch.cat([row.old_logprobs for row in rows if row.old_logprobs is not None]).cpu(),
                torch.cat([row.behaviour_logprobs for row in rows]).cpu(),
            )
        pairs = self.layout.gather_objects(pair)
        gap = engine_gap_statistics(
            torch.cat([trainer for trainer, _ in pairs]),
            torch.cat([behaviour for _, behaviour in pairs]),
        )
        limit = self.config.rollout.max_engine_gap
        if self.sampler is not None and not gap["engine_gap/mean_abs"] <= limit:
            raise RolloutError(
                f"--max-engine-gap {limit}: behaviour log-probs of step {self.step + 1} differ "
                f"from the trainer's by {gap['engine_gap/mean_abs']:.4g} nats per token on "
                "average, so they do not describe the policy that generated; raise the limit only "
                "if you know why"
            )
        return gap

    def _update(
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
        return scalars, TokenDiagnostics.cat(received) if self.main else None

    # Evaluation, checkpoints, the end.

    def _evaluate(self) -> None:
        """avg@k and pass@k on the held-out prompts: means over prompts of mean and best of k."""
        if not self.inputs.eval_prompts:
            return
        config = self.config.eval
        samples = config.eval_samples_per_prompt
        sampling = Sampling(
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            top_k=config.eval_top_k,
            max_response_length=self.config.rollout.rollout_max_response_length,
            stop_ids=self.inputs.stop_ids,
            seed=self.config.train.seed,
        )
        with self.timer.phase("evaluate"):
            mine = self._generate(
                self.inputs.eval_prompts, samples, sampling, first_stream=_EVAL_STREAM
            )
            rollouts, values = self._exchange(mine)
        groups = torch.tensor(values, dtype=torch.float64).view(-1, samples)
        lengths = [rollout.response_ids.numel() for rollout in rollouts]
        self.evaluated = {
            "eval/avg": groups.mean().item(),
            "eval/pass": groups.max(-1).values.mean().item(),
            "eval/response_length": sum(lengths) / len(lengths),
        }
        self._log(self.evaluated | {"time/evaluate": self.timer.pop()["time/evaluate"]})
        if self.writer:
            pairs = zip(rollouts, values, strict=True)
            ranked = sorted((Trajectory(*pair, 0.0) for pair in pairs), key=lambda t: t.reward)
            self.writer.samples(self.step, ranked[:3] + ranked[-3:])
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
        self._log({"time/checkpoint": self.timer.pop()["time/checkpoint"]})

    def _export(self) -> None:
        path = self.directory / "hf"
        export_hf(
            path,
            self.settings,
            self.inputs.architecture,
            self.policy.models,
            tp_group=self.layout.tp_group,
            pp_group=self.layout.pp_group,
            ep_group=self.layout.ep_group,
            dp_rank=self.layout.dp_rank,
            run=f"{self.directory.resolve()}, step {self.step}",
        )
        self.layout.barrier()
        self.say(f"exported: {path}")


def _add_throughput(scalars: dict[str, float]) -> None:
    """Tokens per second of a step, from its token counts and times."""
    rates = {
        "tokens_per_second/generate": ("tokens/response", "time/generate"),
        "tokens_per_second/train": ("tokens/total", "time/train"),
        "tokens_per_second": ("tokens/total", "time/step"),
    }
    for name, (tokens, seconds) in rates.items():
        if scalars.get(seconds):
            scalars[name] = scalars[tokens] / scalars[seconds]


def _postfix(scalars: dict[str, float], evaluated: dict[str, float]) -> dict[str, str]:
    shown = {"reward": f"{scalars['reward/mean']:.3f}"}
    if evaluated:
        shown["held-out"] = f"{evaluated['eval/avg']:.3f}"
    shown["tok/s"] = f"{scalars['tokens_per_second']:.0f}"
    return shown


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")
