"""What `--dry-run` prints: a run's configuration and what follows from it.

L3. In: the configuration and the checked inputs. Out: text for people.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from megatron_drpo import __version__
from megatron_drpo.checkpoint.families import Entry, family_of
from megatron_drpo.config import Config, ObjectiveConfig, flag
from megatron_drpo.objectives import build_objective
from megatron_drpo.preflight import Inputs
from megatron_drpo.rollout.memory import kv_cache_bytes, planned_slots
from megatron_drpo.vocab_parallel.linear import BUDGET, BUDGET_MIXED


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
    """The configuration by groups, the layout, memory per rank, consequences and the objective."""
    sections = {
        group: [_as_flag(name, value) for name, value in values.items()]
        for group, values in dataclasses.asdict(config).items()
    }
    sections |= {
        "the layout": _layout(config, inputs, world_size),
        "the memory of the fullest rank, without activations": _memory(config, inputs, world_size),
        "the run": _consequences(config, inputs),
        "the objective, maximised": _objective(config),
    }
    blocks = [f"Megatron-DRPO {__version__}, dry run: all checks passed, nothing was started"]
    for title, lines in sections.items():
        blocks.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(blocks)


def _as_flag(name: str, value: object) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    if isinstance(value, tuple):
        return " ".join([flag(name), *map(str, value)]) if value else f"{flag(name)} (none)"
    return f"{flag(name)} {value}"


def _sizes(config: Config, world_size: int) -> tuple[int, int, int]:
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    return tp, pp, world_size // (tp * pp)


def _layout(config: Config, inputs: Inputs, world_size: int) -> list[str]:
    tp, pp, dp = _sizes(config, world_size)
    chunks = config.parallel.num_virtual_stages_per_pipeline_rank
    layers = inputs.architecture.num_layers // (pp * chunks)
    device, experts = inputs.device, inputs.architecture.num_experts
    ep = config.parallel.expert_model_parallel_size
    return [
        f"{world_size} rank(s) = TP {tp} x PP {pp} x DP {dp}",
        f"{chunks} chunk(s) of {layers} layer(s) on each rank",
        *([f"EP {ep}: {experts // ep} of {experts} experts on each rank"] if experts else []),
        f"device {device.kind} ({device.backend}): {device.reason}",
    ]


def _count(entries: Iterable[Entry], inputs: Inputs, tp: int) -> int:
    """Parameters of these entries on one tensor-parallel rank, one expert's where they are many."""
    return sum(
        math.prod(shape) // (tp if entry.transform.sharded else 1)
        for entry in entries
        for shape in entry.transform.hf_shapes(inputs.architecture)
    )


def _num_parameters(inputs: Inputs, config: Config) -> tuple[int, int]:
    """Parameters of the fullest rank, that of the first or of the last pipeline stage, in experts
    and in everything else."""
    architecture, family = inputs.architecture, family_of(inputs.architecture)
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    layers = architecture.num_layers // pp
    one_expert = _count((entry for entry in family.layer if entry.is_expert), inputs, tp)
    experts = architecture.num_experts // config.parallel.expert_model_parallel_size * one_expert
    others = _count((entry for entry in family.layer if not entry.is_expert), inputs, tp)
    first, last = _count(family.first, inputs, tp), _count(family.last, inputs, tp)
    if pp > 1:  # a tied output layer is then a copy of the embedding
        ends = max(first, last)
    else:
        ends = first + last - (first if architecture.tie_word_embeddings else 0)
    return layers * experts, layers * others + ends


def _memory(config: Config, inputs: Inputs, world_size: int) -> list[str]:
    tp, pp, dp = _sizes(config, world_size)
    architecture, rollout = inputs.architecture, config.rollout
    experts, others = _num_parameters(inputs, config)
    parameters = experts + others
    width = 2 if config.model.bf16 else 4
    if config.optimizer.use_distributed_optimizer:
        # Over the ranks that hold the same parameters: of an expert's, there are fewer.
        experts = experts * config.parallel.expert_model_parallel_size // dp
        others //= dp
    # Adam's two moments, and fp32 master weights where the weights are bf16.
    state = (experts + others) * (12 if config.model.bf16 else 8)
    parts = {
        f"weights, {parameters:,} parameters": parameters * width,
        "gradients, fp32": parameters * 4,
        "optimizer state, fp32": state,
    }
    if inputs.generates and not rollout.uses_servers:
        slots, longest = _slots(config, inputs, world_size), _longest(config, inputs)
        parts[f"KV cache, {slots} slots of {longest} tokens"] = kv_cache_bytes(
            architecture, tp_size=tp, pp_size=pp, element_bytes=width, slots=slots, length=longest
        )
    parts |= _output_memory(config, inputs, world_size)
    parts["together"] = sum(parts.values())
    return [f"{size / 2**20:>12,.1f} MiB  {name}" for name, size in parts.items()]


def _output_memory(config: Config, inputs: Inputs, world_size: int) -> dict[str, int]:
    """What the output layer and the other models that the objective compares with take."""
    tp, pp, dp = _sizes(config, world_size)
    architecture, train = inputs.architecture, config.train
    width = 2 if config.model.bf16 else 4
    row = train.max_tokens_per_microbatch
    logits = row * architecture.vocab_size // tp * 4
    if train.fused_output:
        mixed = config.model.bf16 and inputs.device.kind == "cuda"
        most = (BUDGET_MIXED if mixed else BUDGET).most_bytes
        chunk = most if train.output_chunk_mib is None else train.output_chunk_mib << 20
        parts = {"logits of a chunk of tokens and their gradient, at most": min(logits, chunk)}
    else:
        parts = {f"logits of one row of {row} tokens": logits}
    if inputs.reference is not None:
        other, _ = inputs.reference
        size = sum(_num_parameters(replace(inputs, architecture=other), config))
        parts[f"weights of the reference model, {size:,} parameters"] = size * width
    needs = build_objective(config.objective).needs
    kept = architecture.hidden_size * needs.behaviour_l2
    if inputs.reference is not None:
        kept += inputs.reference[0].hidden_size * needs.reference_kl
    if kept:
        rollout = config.rollout
        tokens = rollout.rollout_prompts_per_step * rollout.rollout_samples_per_prompt
        tokens *= rollout.rollout_max_response_length
        states = tokens // dp * kept * width
        parts["hidden states of the batch, kept for whole distributions"] = states
    if needs.behaviour_l2:
        output = architecture.vocab_size // tp * architecture.hidden_size * width
        parts["output layer of the weights that generated"] = output
    return parts


def _slots(config: Config, inputs: Inputs, world_size: int) -> int:
    """Responses that a rank's KV cache holds at the same time, at most."""
    rollout, (_, pp, dp) = config.rollout, _sizes(config, world_size)
    wanted = [(len(inputs.eval_prompts), config.eval.eval_samples_per_prompt)]
    if inputs.rollouts is None:
        wanted.append((rollout.num_drawn_prompts, rollout.rollout_samples_per_prompt))
    most = max(-(-prompts // dp) * samples for prompts, samples in wanted)
    slots = min(rollout.rollout_max_slots, most)
    room = planned_slots(config, inputs.architecture, _longest_prompt(inputs))
    return slots if room is None else min(slots, pp * room)


def _longest_prompt(inputs: Inputs) -> int:
    prompts = (*inputs.prompts, *inputs.eval_prompts)
    return max((prompt.token_ids.numel() for prompt in prompts), default=0)


def _longest(config: Config, inputs: Inputs) -> int:
    """Tokens that a sequence may come to, prompt and response."""
    return _longest_prompt(inputs) + config.rollout.rollout_max_response_length


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
    if inputs.eval_prompts:
        samples = len(inputs.eval_prompts) * config.eval.eval_samples_per_prompt
        lines.append(f"{samples} held-out samples per evaluation")
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
