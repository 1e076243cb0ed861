"""What `--dry-run` prints: a run's configuration and what follows from it.

L3. In: the configuration and the checked inputs. Out: text for people.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from megatron_drpo import __version__, hardware
from megatron_drpo.config import Config, ObjectiveConfig, flag
from megatron_drpo.plan import text
from megatron_drpo.plan.advice import Texts, warnings
from megatron_drpo.plan.job import Job
from megatron_drpo.plan.speed import Machines, speed
from megatron_drpo.preflight import Inputs


def _drpo(config: ObjectiveConfig) -> tuple[str, str]:
    delta = config.drpo_delta
    if config.drpo_penalty == "full":
        return (
            "r A - |A| / (2 delta) * sum_v (pi_v - mu_v)^2",
            f"delta {delta:g}: half of what the squared distance is divided by; the gradient "
            "weight of r A is 1",
        )
    return (
        "r A - |A| / (2 delta) * mu * (r - 1)^2",
        f"delta {delta:g}: the gradient weight 1 - sign(A (r - 1)) |pi - mu| / delta stays within "
        f"[{1 - 1 / delta:.4g}, {1 + 1 / delta:.4g}]",
    )


def _dppo(config: ObjectiveConfig, divergence: str, buckets: str) -> tuple[str, str]:
    low, high = config.dppo_deltas
    return (
        f"M sg(min(r, {config.dppo_ratio_limit:g})) A log pi",
        f"M = 0 where A > 0, pi > mu and {divergence} > {high:g}, or A < 0, pi < mu and it is > "
        f"{low:g}; over {buckets}",
    )


def _ppo(config: ObjectiveConfig) -> tuple[str, str]:
    low, high, dual = config.ppo_clip_low, config.ppo_clip_high, config.ppo_dual_clip
    clipped = f"min(r A, clip(r, {1 - low:g}, {1 + high:g}) A)"
    stops = f"a token stops where A > 0 and r > {1 + high:g}, or A < 0 and r < {1 - low:g}"
    if dual is None:
        return clipped, stops
    return (
        f"{clipped}, and where A < 0 at least {dual:g} A",
        f"{stops}, or A < 0 and r > {dual:g}",
    )


_TV, _KL = "TV(mu, pi)", "KL(mu || pi)"
_BINARY = "the sampled id against the rest"
_TOPK = "the sampled id, the behaviour policy's top K and the rest"
_FORMULAS: dict[str, Callable[[ObjectiveConfig], tuple[str, str]]] = {
    "drpo": _drpo,
    "dppo_tv": lambda config: _dppo(config, _TV, _BINARY),
    "dppo_kl": lambda config: _dppo(config, _KL, _BINARY),
    "dppo_topk_tv": lambda config: _dppo(config, _TV, _TOPK),
    "dppo_topk_kl": lambda config: _dppo(config, _KL, _TOPK),
    "ppo": _ppo,
    "spo": lambda config: (
        f"r A - |A| / (2 * {config.spo_epsilon:g}) * (r - 1)^2",
        f"the gradient weight 1 - sign(A (r - 1)) |r - 1| / {config.spo_epsilon:g} has no bound",
    ),
    "pg_is": lambda config: ("r A", "the gradient weight is 1"),
    "cispo": lambda config: (
        f"sg(clip(r, {1 - config.cispo_clip_low:g}, {1 + config.cispo_clip_high:g})) A log pi",
        "no token loses its gradient, and none counts for more than the limit",
    ),
    "gspo": lambda config: (
        f"min(s A, clip(s, {1 - config.gspo_clip_low:g}, {1 + config.gspo_clip_high:g}) A)",
        "s is the geometric mean of r over the tokens of the sequence",
    ),
}
"""Each objective as maximised, and what its constants mean."""


def describe(config: Config, inputs: Inputs, world_size: int) -> str:
    """The configuration by groups, the plan that follows from it, warnings and the objective."""
    job = job_of(config, inputs, world_size)
    texts = _texts(inputs)
    sections = {
        group: [_as_flag(name, value) for name, value in values.items()]
        for group, values in dataclasses.asdict(config).items()
    }
    device, machines = inputs.device, machines_of(config)
    sections |= {
        "the model": text.model_lines(job),
        "the layout": [
            *text.layout_lines(job),
            f"device {device.kind} ({device.backend}): {device.reason}",
        ],
        "the memory of a rank, by pipeline stage": text.memory_lines(job),
        "what ranks send each other": text.traffic_lines(job),
        "the run": _consequences(config, inputs),
        "the objective, maximised": _objective(config),
    }
    if machines is not None:
        sections["the speed of training"] = text.speed_lines(job, machines, speed(job, machines))
    sections["worth a look"] = warnings(job, texts)
    head = f"Megatron-DRPO {__version__}, dry run: all checks passed, nothing was started"
    return f"{head}\n\n{text.page(sections)}"


def job_of(config: Config, inputs: Inputs, world_size: int) -> Job:
    """What a plan of this run is about."""
    known = (*inputs.prompts, *inputs.eval_prompts, *(r.prompt for r, _ in inputs.rollouts or ()))
    return Job(
        inputs.architecture,
        config,
        world_size,
        gpu=inputs.device.kind == "cuda",
        transformer_engine=hardware.uses_engine(config, hardware.look(inputs.device)),
        prompt_length=max((prompt.token_ids.numel() for prompt in known), default=1),
        reference=inputs.reference and inputs.reference[0],
        generates=inputs.generates,
        eval_samples=len(inputs.eval_prompts) * config.eval.eval_samples_per_prompt,
    )


def machines_of(config: Config) -> Machines | None:
    """What time is estimated for; None without --peak-tflops."""
    peak = config.train.peak_tflops
    return None if peak is None else Machines(peak)


def _texts(inputs: Inputs) -> Texts:
    tokenizer = inputs.tokenizer
    special, end = tokenizer.all_special_tokens, tokenizer.eos_token_id
    plain = (
        prompt.text
        for prompt in (*inputs.prompts, *inputs.eval_prompts)
        if not any(token in prompt.text for token in special)
    )
    return Texts(
        eos_id=end if isinstance(end, int) else None,
        stop_ids=inputs.stop_ids,
        has_chat_template=bool(tokenizer.chat_template),
        plain_prompt=next(plain, None),
    )


def _as_flag(name: str, value: object) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    if isinstance(value, tuple):
        return " ".join([flag(name), *map(str, value)]) if value else f"{flag(name)} (none)"
    return f"{flag(name)} {value}"


def _consequences(config: Config, inputs: Inputs) -> list[str]:
    rollout, train = config.rollout, config.train
    per_step = rollout.rollout_prompts_per_step * rollout.rollout_samples_per_prompt
    lines = [
        f"{train.train_iters} steps of {per_step} samples = {rollout.rollout_prompts_per_step} "
        f"prompts x {rollout.rollout_samples_per_prompt}",
        f"{config.num_updates} optimizer updates, {train.updates_per_rollout} per step, each on "
        f"{per_step // train.updates_per_rollout} samples",
    ]
    if inputs.rollouts is not None:
        lines.append(f"{len(inputs.rollouts)} recorded rollouts, nothing is generated to train on")
    else:
        tokens = per_step * rollout.rollout_max_response_length
        epochs = train.train_iters * rollout.rollout_prompts_per_step / len(inputs.prompts)
        lines += [
            f"at most {tokens:,} response tokens per step, {tokens * train.train_iters:,} in all",
            f"{len(inputs.prompts)} training prompts: {epochs:.2f} epochs",
        ]
        lines += _generation(config)
    lines.append(
        f"temperature {rollout.rollout_temperature:g}: one setting, of sampling and of training"
    )
    if inputs.eval_prompts:
        samples = len(inputs.eval_prompts) * config.eval.eval_samples_per_prompt
        lines.append(
            f"{samples} held-out samples per evaluation, at temperature "
            f"{config.eval.eval_temperature:g}"
        )
    return lines


def _generation(config: Config) -> list[str]:
    """Who generates, and when."""
    rollout, lines = config.rollout, []
    if rollout.uses_servers:
        sync = config.weight_sync.weight_sync
        lines.append(
            f"generated by {len(rollout.rollout_servers)} {rollout.rollout_engine} server(s), "
            f"which get new weights by {sync} after every step"
        )
    if rollout.rollout_lag:
        lines.append(
            f"generation runs {rollout.rollout_lag} step(s) ahead: tokens are at most as stale"
        )
    if rollout.dynamic_sampling:
        lines.append(
            f"groups of equal rewards are replaced, in at most {rollout.dynamic_sampling_rounds} "
            f"rounds; {rollout.rollout_extra_prompts} prompts more than needed from the start"
        )
    if rollout.environment:
        lines.append(
            f"conversations of at most {rollout.environment_max_turns} turns with "
            f"{rollout.environment}"
        )
    return lines


def _objective(config: Config) -> list[str]:
    aggregated = f"aggregation {config.objective.loss_aggregation}"
    if config.objective.loss_aggregation == "seq-mean-token-sum-norm":
        aggregated += f", sums divided by {config.loss_token_horizon}"
    objective = config.objective
    lines = ["a function of your own, per token"]
    if objective.objective in _FORMULAS:
        lines = [*_FORMULAS[objective.objective](objective)]
    decoupled = objective.proximal_policy == "trainer"
    if decoupled:
        lines.append("mu stands for the trainer's own probability before the batch's first update")
    lines[0] = f"{objective.objective}: {lines[0]}"
    return [*lines, "r = pi / mu", *_corrections(objective), *_terms(objective), aggregated]


def _corrections(objective: ObjectiveConfig) -> list[str]:
    if not objective.corrects:
        return []
    decoupled = objective.proximal_policy == "trainer"
    lines = [
        "rho = trainer before the first update / sampler" if decoupled else "rho = r as a constant"
    ]
    if objective.tis_limit is not None:
        role = "is a constant factor, and" if decoupled else ""
        lines.append(" ".join(f"rho {role} counts as {objective.tis_limit:g} at most".split()))
    low, high = objective.icepop_low, objective.icepop_high
    if low is not None or high is not None:
        inside = f"[{low or 0:g}, {math.inf if high is None else high:g}]"
        lines.append(f"tokens with rho outside {inside} are masked")
    if objective.sequence_mask != "off":
        low, high = objective.sequence_mask_low, objective.sequence_mask_high
        mean = "geometric mean" if objective.sequence_mask == "geometric" else "product"
        lines.append(f"sequences with the {mean} of rho outside [{low:g}, {high:g}] are masked")
    return lines


def _terms(objective: ObjectiveConfig) -> list[str]:
    lines = []
    if objective.kl_coef:
        source = objective.reference_model or "--hf-model"
        kind = objective.kl_estimator
        how = "over the whole vocabulary" if kind == "full" else f"estimated by {kind}"
        lines.append(f"- {objective.kl_coef:g} * KL(pi || {source}), {how}")
    if objective.entropy_coef:
        lines.append(f"+ {objective.entropy_coef:g} * entropy of pi")
    return lines
