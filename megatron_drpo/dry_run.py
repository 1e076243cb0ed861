"""What `--dry-run` prints: a run's configuration and what follows from it.

L3. In: the configuration and the checked inputs. Out: text for people.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from megatron_drpo import __version__
from megatron_drpo.checkpoint.families import Entry, family_of
from megatron_drpo.config import Config, flag
from megatron_drpo.preflight import Inputs

_FORMULAS = {
    "drpo": lambda config: (
        "r A - |A| / (2 delta) * mu * (r - 1)^2, with r = pi / mu",
        f"delta {config.drpo_delta:g}: the gradient weight 1 - sign(A (r - 1)) |pi - mu| / delta "
        f"stays within [{1 - 1 / config.drpo_delta:.4g}, {1 + 1 / config.drpo_delta:.4g}]",
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
        return " ".join([flag(name), *map(str, value)])
    return f"{flag(name)} {value}"


def _sizes(config: Config, world_size: int) -> tuple[int, int, int]:
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    return tp, pp, world_size // (tp * pp)


def _layout(config: Config, inputs: Inputs, world_size: int) -> list[str]:
    tp, pp, dp = _sizes(config, world_size)
    chunks = config.parallel.num_virtual_stages_per_pipeline_rank
    layers = inputs.architecture.num_layers // (pp * chunks)
    device = inputs.device
    return [
        f"{world_size} rank(s) = TP {tp} x PP {pp} x DP {dp}",
        f"{chunks} chunk(s) of {layers} layer(s) on each rank",
        f"device {device.kind} ({device.backend}): {device.reason}",
    ]


def _count(entries: Iterable[Entry], inputs: Inputs, tp: int) -> int:
    """Parameters of these entries on one tensor-parallel rank."""
    return sum(
        math.prod(shape) // (tp if entry.transform.sharded else 1)
        for entry in entries
        for shape in entry.transform.hf_shapes(inputs.architecture)
    )


def _num_parameters(inputs: Inputs, tp: int, pp: int) -> int:
    """Parameters of the fullest rank: that of the first or of the last pipeline stage."""
    architecture, family = inputs.architecture, family_of(inputs.architecture)
    layers = architecture.num_layers // pp * _count(family.layer, inputs, tp)
    first, last = _count(family.first, inputs, tp), _count(family.last, inputs, tp)
    if pp > 1:  # a tied output layer is then a copy of the embedding
        return layers + max(first, last)
    tied = first if architecture.tie_word_embeddings else 0
    return layers + first + last - tied


def _memory(config: Config, inputs: Inputs, world_size: int) -> list[str]:
    tp, pp, dp = _sizes(config, world_size)
    architecture, rollout = inputs.architecture, config.rollout
    parameters = _num_parameters(inputs, tp, pp)
    width = 2 if config.model.bf16 else 4
    # Adam's two moments, and fp32 master weights where the weights are bf16.
    state = parameters * (12 if config.model.bf16 else 8)
    if config.optimizer.use_distributed_optimizer:
        state //= dp
    slots = min(
        rollout.rollout_max_slots,
        rollout.rollout_prompts_per_step // dp * rollout.rollout_samples_per_prompt,
    )
    per_token = 2 * architecture.key_value_size // tp * (architecture.num_layers // pp) * width
    budget = config.train.max_tokens_per_microbatch
    parts = {
        f"weights, {parameters:,} parameters": parameters * width,
        "gradients, fp32": parameters * 4,
        "optimizer state, fp32": state,
    }
    if inputs.rollouts is None or inputs.eval_prompts:  # something is generated
        longest = _longest(config, inputs)
        parts[f"KV cache, {slots} slots of {longest} tokens"] = slots * longest * per_token
    logits = budget * architecture.vocab_size // tp * 4
    parts[f"logits of one row of {budget} tokens, fp32"] = logits
    parts["together"] = sum(parts.values())
    return [f"{size / 2**20:>12,.1f} MiB  {name}" for name, size in parts.items()]


def _longest(config: Config, inputs: Inputs) -> int:
    """Tokens that a sequence may come to, prompt and response."""
    prompts = [prompt.token_ids.numel() for prompt in (*inputs.prompts, *inputs.eval_prompts)]
    return max(prompts, default=0) + config.rollout.rollout_max_response_length


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
    if inputs.eval_prompts:
        samples = len(inputs.eval_prompts) * config.eval.eval_samples_per_prompt
        lines.append(f"{samples} held-out samples per evaluation")
    return lines


def _objective(config: Config) -> list[str]:
    aggregation = config.objective.loss_aggregation
    if aggregation == "seq-mean-token-sum-norm":
        aggregation += f", sums divided by {config.loss_token_horizon}"
    formula, constants = _FORMULAS[config.objective.objective](config.objective)
    return [f"{config.objective.objective}: {formula}", constants, f"aggregation {aggregation}"]
