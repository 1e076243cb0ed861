"""DRPO in a training script around megatron-core alone: no megatron.training, no GPU needed.

    python examples/megatron_lm/core_only.py
    torchrun --nproc-per-node 2 examples/megatron_lm/core_only.py --tensor-model-parallel-size 2

A random GPT learns from a rollouts file that this script writes first: responses drawn uniformly
from all ids, rewarded by the share of ids that are even. Model, data-parallel wrapper, optimizer
and schedule are Megatron's. Of Megatron-DRPO there are `RolloutDataset`, whose samples torch
collates, and `forward_step`, which the schedule calls: the lines marked (1) to (3).
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import megatron_drpo.mcore  # noqa: F401  first: without a GPU it lets megatron-core run

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.data import DataLoader

from megatron_drpo.config import ObjectiveConfig
from megatron_drpo.megatron_lm import RolloutDataset, forward_step
from megatron_drpo.objectives import build_objective
from megatron_drpo.rollout.files import write_rollouts
from megatron_drpo.types import Prompt, Rollout, Trajectory

VOCAB, PADDED_VOCAB, SEQ_LENGTH = 60, 64, 16
PROMPT, RESPONSE, SAMPLES, NUM_PROMPTS = 4, 12, 8, 16
MICRO_BATCH, GLOBAL_BATCH = 4, 64
OBJECTIVE = ObjectiveConfig(objective="drpo", drpo_delta=0.2, loss_token_horizon=RESPONSE)


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train, and return what each update reported (on the last pipeline stage)."""
    args = parse(argv)
    device = start(args)
    model, optimizer = build(args, device)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rollouts.jsonl"
        write_rollouts(path, draw())
        dataset = RolloutDataset(  # (1) the responses, with advantages and weights
            path,
            seq_length=SEQ_LENGTH,
            vocab_size=VOCAB,
            samples_per_prompt=SAMPLES,
            objective=OBJECTIVE,
        )
    step = partial(  # (2) what a micro-batch means
        forward_step, objective=build_objective(OBJECTIVE), vocab_size=VOCAB, fused=args.fused
    )
    batches = micro_batches(dataset)
    schedule: Any = get_forward_backward_func()
    history = []
    for iteration in range(1, args.train_iters + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = schedule(
            forward_step_func=step,
            data_iterator=batches,
            model=model,
            num_microbatches=GLOBAL_BATCH // MICRO_BATCH // dist_size(),
            seq_length=SEQ_LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        means = mean_over_ranks(reports)
        if means and dist.get_rank() == dist.get_world_size() - 1:
            text = "   ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"iteration {iteration}   {text}", flush=True)
        history.append(means)
    return history


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--train-iters", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--fused", action="store_true", help="needs megatron-core 0.18 or later")
    return parser.parse_args(argv)


def start(args: argparse.Namespace) -> torch.device:
    """torch.distributed (torchrun's, or one process alone) and Megatron's groups."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone: dict[str, Any] = {"init_method": "tcp://127.0.0.1:0", "rank": 0, "world_size": 1}
        dist.init_process_group(
            "nccl" if gpu else "gloo", **({} if "RANK" in os.environ else alone)
        )
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    )
    model_parallel_cuda_manual_seed(1)
    return torch.device(device)


def build(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """A small GPT in its data-parallel wrapper, and its optimizer."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,  # (3) one global denominator
    )
    torch.manual_seed(1)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=PADDED_VOCAB,
        max_sequence_length=SEQ_LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    ).to(device)
    chunk = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True),
        module=model,
    )
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(lr=args.lr, weight_decay=0.0, use_distributed_optimizer=True), [chunk]
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = chunk.no_sync
    return chunk, optimizer


def draw() -> list[Trajectory]:
    """Responses of a policy that draws every id alike: its log-prob is log 1 / VOCAB."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for number in range(NUM_PROMPTS):
        ids = torch.randint(VOCAB, (PROMPT,), generator=generator)
        prompt = Prompt(id=f"prompt {number}", text="", token_ids=ids, answer=None)
        for sample in range(SAMPLES):
            response = torch.randint(VOCAB, (RESPONSE,), generator=generator)
            rollout = Rollout(
                prompt=prompt,
                sample=sample,
                response_ids=response,
                behaviour_logprobs=torch.full((RESPONSE,), -math.log(VOCAB)),
                finish_reason="length",
                policy_version=0,
                response_text="",
            )
            reward = float((response % 2 == 0).float().mean())
            # A file keeps rewards; the data set makes advantages of them.
            drawn.append(Trajectory(rollout, reward, advantage=0.0))
    return drawn


def micro_batches(dataset: RolloutDataset) -> Iterator[dict[str, Any]]:
    """This data-parallel rank's micro-batches, again and again; the same on its other ranks."""
    rank, size = parallel_state.get_data_parallel_rank(), dist_size()
    own = [
        [*range(start, start + MICRO_BATCH)]
        for start in range(rank * MICRO_BATCH, len(dataset), size * MICRO_BATCH)
    ]
    loader = DataLoader(dataset, batch_sampler=own)
    while True:
        yield from loader


def dist_size() -> int:
    """Number of data-parallel ranks."""
    return parallel_state.get_data_parallel_world_size()


def mean_over_ranks(reports: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """As Megatron's training loop does: sums and counts added up, then divided."""
    means = {}
    for name in reports[0] if reports else ():
        total = torch.stack([report[name] for report in reports]).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        means[name] = float(total[0] / total[1])
    return means


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
