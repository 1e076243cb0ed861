"""DRPO under Megatron-LM's own `pretrain`: what pretrain_gpt.py is, with another data set and loss.

    torchrun --nproc-per-node 8 examples/megatron_lm/train.py \
        --rollouts-file rollouts/ --rollout-samples-per-prompt 8 --calculate-per-token-loss \
        [the model's, the optimizer's and the layout's flags, as for pretrain_gpt.py]

For `megatron.training` of core 0.19, which comes with the wheel; README.md has what is different
in earlier ones. Everything but the functions below is Megatron's.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

import megatron_drpo.mcore  # noqa: F401  first: without a GPU it lets megatron-core run

# isort: split
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain  # type: ignore[import-not-found]
from megatron.training.argument_utils import (  # type: ignore[import-not-found]
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # type: ignore[import-not-found]

from megatron_drpo.config import ObjectiveConfig
from megatron_drpo.megatron_lm import RolloutDataset, forward_step
from megatron_drpo.objectives import build_objective


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Flags beside Megatron's own; the names are those of megatron_drpo."""
    group = parser.add_argument_group("objective")
    group.add_argument("--rollouts-file", required=True, help="a file, or a directory of them")
    group.add_argument("--rollout-samples-per-prompt", type=int, required=True)
    group.add_argument("--rollout-temperature", type=float, default=1.0)
    group.add_argument("--objective", default="drpo")
    group.add_argument("--drpo-delta", type=float, default=ObjectiveConfig.drpo_delta)
    group.add_argument("--loss-token-horizon", type=int, help="by default the file's header's")
    group.add_argument("--fused-output", action="store_true", help="hold no logits")
    return parser


def objective_of(args: Namespace) -> ObjectiveConfig:
    """The objective that the flags name; its other constants are their defaults."""
    return ObjectiveConfig(
        objective=args.objective,
        drpo_delta=args.drpo_delta,
        loss_token_horizon=args.loss_token_horizon,
    )


def datasets(num_samples: Any, vp_stage: int | None = None) -> tuple[RolloutDataset, None, None]:
    """`train_valid_test_dataset_provider`: the rollouts to train on, and none to evaluate on."""
    args = get_args()
    train = RolloutDataset(
        args.rollouts_file,
        seq_length=args.seq_length,
        vocab_size=args.vocab_size,
        samples_per_prompt=args.rollout_samples_per_prompt,
        temperature=args.rollout_temperature,
        objective=objective_of(args),
    )
    return train, None, None


datasets.is_distributed = True  # every rank reads its micro-batches itself


def main() -> None:
    """Parse Megatron's flags and ours, and train."""
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    step = partial(
        forward_step,
        objective=build_objective(objective_of(args)),
        vocab_size=args.vocab_size,
        temperature=args.rollout_temperature,
        fused=args.fused_output,
    )
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, step)


if __name__ == "__main__":
    main()
