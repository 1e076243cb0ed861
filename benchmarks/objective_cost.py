"""A step of DRPO beside a step of plain next-token training by megatron-core alone.

    python -m benchmarks.objective_cost

Both train the same model on the same tokens in the same layout: `Policy.forward_backward` and
`optim_step` on scored rows, and Megatron's GPTModel with its own attention, norms, cross entropy
and Adam, through the same schedule, DistributedDataParallel and distributed optimizer. Every row is
one sequence, as Megatron's own attention knows no others, and all of its tokens but the first are
trained on. Both start from the same weights, which must give both the same log-likelihood. They
take turns in the same processes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    Place,
    add_settings,
    check_counts,
    conditions,
    machine,
    number,
    paired_ratio,
    run_ranks,
    seconds_of,
    slowest,
    table,
    write_record,
)
from megatron_drpo.arguments import parse
from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.device import choose_device
from megatron_drpo.types import Prompt, Rollout, Row, Trajectory

_RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "arithmetic_cpu.yaml"
_TARGET = 1.05
_SAME = {"fp32": 1e-4, "bf16": 2e-2}
"""How far apart the log-likelihoods of both may be, in nats per token."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP1": (1, ()),
    "TP2": (2, ("--tensor-model-parallel-size", "2")),
    "PP2": (2, ("--pipeline-model-parallel-size", "2")),
    "DP2": (2, ()),
}
"""By name: number of ranks, and flags."""


@dataclass(frozen=True)
class Model:
    """A Qwen3, and the batch that it is trained on."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    channels: int
    length: int
    """Tokens of a row."""
    rows: int
    """Of all replicas together."""


MODELS = {
    "calculator": Model(64, 128, 384, 4, 4, 2, 32, length=512, rows=8),
    "large vocabulary": Model(151_936, 128, 384, 4, 4, 2, 32, length=512, rows=2),
    "0.6B": Model(151_936, 1024, 3072, 28, 16, 8, 128, length=4096, rows=4),
}
_DEFAULT = {"cpu": ("calculator", "large vocabulary"), "cuda": ("0.6B",)}


@dataclass(frozen=True)
class Case:
    """What is measured. Example: Case("calculator", Model(...), "TP2", "fp32")."""

    name: str
    model: Model
    layout: str
    dtype: str


@dataclass(frozen=True)
class Result:
    """Seconds of each round: on the wall of the slowest rank, on CPUs of the busiest."""

    case: Case
    plain: list[float]
    plain_cpu: list[float]
    drpo: list[float]
    drpo_cpu: list[float]


def measure(cases: Sequence[Case], device: str, threads: int, rounds: int) -> list[Result]:
    """Every case, in processes of its own."""
    results = []
    for case in cases:
        with tempfile.TemporaryDirectory() as directory:
            _save(case.model, directory)
            size = LAYOUTS[case.layout][0]
            ranks = run_ranks(_time, size, device, threads, directory, case, rounds)
        plain, drpo = (slowest(times) for times in zip(*ranks, strict=True))
        results.append(Result(case, *plain, *drpo))
    return results


def _save(model: Model, directory: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.groups,
        head_dim=model.channels,
        intermediate_size=model.ffn,
        max_position_embeddings=model.length,
        tie_word_embeddings=True,
        initializer_range=model.hidden**-0.5,  # large: a wrong layer must show in the likelihood
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)


def _time(place: Place, directory: str, case: Case, rounds: int) -> list[list[tuple[float, float]]]:
    """Wall and CPU seconds of both steps in each round, after one that does not count."""
    # Imported here, as it takes seconds, and memory that others need not have.
    from megatron_drpo.mcore import parallel
    from megatron_drpo.mcore.policy import Policy

    arguments = ["--config", str(_RECIPE), "--hf-model", directory, "--fused-output"]
    arguments += ["--tensor-model-parallel-size", "1", "--lr", "1e-6"]
    arguments += ["--max-tokens-per-microbatch", str(case.model.length)]
    arguments += [*LAYOUTS[case.layout][1], *(["--bf16"] if case.dtype == "bf16" else [])]
    config, _ = parse(arguments)
    layout = parallel.initialize(config.parallel, place.device, seed=0)
    architecture, source = read_architecture(directory), Path(directory)
    # Plain training first: to build ours exchanges Megatron's Adam, where it has none of its own.
    plain = PlainTraining(config, architecture, layout, place.device, source)
    policy = Policy.load(config, architecture, layout, place.device, weights=source)
    rows = policy.pack(_trajectories(case.model))
    assert {len(row.names) for row in rows} == {1}
    scores = policy.score(rows, temperature=1.0)
    ours = -sum(float(each.logprobs.double().sum()) for each in scores)
    loss = plain.step(rows)
    if layout.is_last_stage:
        count = sum(row.targets.numel() for row in rows)
        gap = abs(ours - loss) / count
        assert gap < _SAME[case.dtype], f"log-likelihoods are {gap} nats per token apart"
    (scored,) = policy.annotate([rows])

    def drpo() -> None:
        policy.forward_backward(scored)
        assert not policy.optim_step().skipped

    steps: list[Callable[[], Any]] = [lambda: plain.step(rows), drpo]
    seconds: list[list[tuple[float, float]]] = [[], []]
    for turn in range(rounds + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            seconds[which].append(seconds_of(place, steps[which]))
    return [times[1:] for times in seconds]


class PlainTraining:
    """Next-token training as a program around megatron-core does it, with nothing of ours in it
    but the numbers of its configuration and the weights it starts from."""

    def __init__(
        self, config: Any, architecture: Any, layout: Any, device: Any, weights: Path
    ) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_local_spec,
            get_gpt_layer_with_transformer_engine_spec,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megatron_drpo.checkpoint.families import padded_vocab_size
        from megatron_drpo.mcore.model import transformer_config, use_transformer_engine
        from megatron_drpo.mcore.weights import load

        spec = (
            get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_layernorm)
            if use_transformer_engine(config.model)
            else get_gpt_layer_local_spec(
                qk_layernorm=architecture.qk_layernorm, normalization="RMSNorm"
            )
        )
        numbers: Any = transformer_config(
            architecture, config.model, layout, device, config.precision, config.memory
        )
        model = GPTModel(
            config=numbers,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(architecture.vocab_size, layout.tp_size),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=layout.pp_rank == 0,
            post_process=layout.is_last_stage,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,
        ).to(device=device.torch, dtype=numbers.params_dtype)
        load(weights, architecture, [model], layout, verify=False)  # type: ignore[list-item]
        self.chunk = DistributedDataParallel(
            config=numbers,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=True
            ),
            module=model,
        )
        self.optimizer: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.optimizer.lr,
                weight_decay=config.optimizer.weight_decay,
                clip_grad=config.optimizer.clip_grad,
                bf16=config.model.bf16,
                params_dtype=numbers.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.chunk],
        )
        numbers.finalize_model_grads_func = finalize_model_grads
        numbers.grad_scale_func = self.optimizer.scale_loss
        numbers.no_sync_func = self.chunk.no_sync
        self.device, self.is_last_stage = device.torch, layout.is_last_stage

    def step(self, rows: Sequence[Row]) -> float:
        """One update; returns the summed loss of this replica's rows, 0 but on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.chunk.train()
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        schedule: Any = get_forward_backward_func()
        outputs = schedule(
            forward_step_func=self._forward_step,
            data_iterator=iter(rows),
            model=self.chunk,
            num_microbatches=len(rows),
            seq_length=rows[0].tokens.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
        updated, _, _ = self.optimizer.step()
        assert updated
        return sum(float(loss) for loss in outputs)

    def _forward_step(self, rows: Iterator[Row], chunk: Any) -> tuple[Tensor, Any]:
        row = next(rows)
        tokens = row.tokens.to(self.device)
        labels = tokens.roll(-1)  # the last token's is not one, and has weight 0
        weights = torch.ones(tokens.numel(), device=self.device)
        weights[-1] = 0
        positions = row.positions.to(self.device)
        losses = chunk(tokens[None], positions[None], None, labels=labels[None])
        return losses, partial(self._loss, weights)

    def _loss(self, weights: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = (losses.float().view(-1) * weights).sum()
        return loss, weights.sum().int(), loss.detach()


def _trajectories(model: Model) -> list[Trajectory]:
    """Random ids, whose behaviour log-probs are those of a policy that knows nothing."""
    generator = torch.Generator().manual_seed(0)
    trajectories = []
    for index in range(model.rows):
        ids = torch.randint(model.vocab, (model.length,), generator=generator)
        rollout = Rollout(
            prompt=Prompt(f"random:{index}", "", ids[:1], None),
            sample=0,
            response_ids=ids[1:],
            behaviour_logprobs=torch.full((model.length - 1,), -math.log(model.vocab)),
            finish_reason="length",
            policy_version=0,
            response_text="",
        )
        sign = 1.0 if index % 2 else -1.0
        trajectories.append(Trajectory(rollout, reward=max(sign, 0.0), advantage=sign / 2))
    return trajectories


# Records: what a JSON file holds.


def record_of(results: Sequence[Result], device: str, threads: int, rounds: int) -> dict[str, Any]:
    """All that `render` needs, and what the figures depend on."""
    return {
        "benchmark": "objective_cost",
        "machine": machine(device),
        "device": choose_device(device).kind,  # type: ignore[arg-type]
        "megatron_core": version("megatron-core"),
        "threads": threads,
        "rounds": rounds,
        "results": [asdict(result) for result in results],
    }


def results_of(record: dict[str, Any]) -> list[Result]:
    """The figures in a record."""
    found = []
    for result in record["results"]:
        case = result["case"]
        found.append(Result(**result | {"case": Case(**case | {"model": Model(**case["model"])})}))
    return found


def targets(results: Sequence[Result], device: str) -> list[str]:
    """Lines that say whether a step of DRPO takes no longer than it may.

    What counts is the time on the wall, and of CPUs, which others may share, the time on them.
    """
    lines = ["Targets:", ""]
    for result in results:
        if device == "cpu":
            ratio, unit = paired_ratio(result.drpo_cpu, result.plain_cpu), "CPU s"
        else:
            ratio, unit = paired_ratio(result.drpo, result.plain), "s"
        lines.append(
            f"- {result.case.name}, {result.case.layout}: {ratio:.2f} x the {unit} of plain "
            f"training, wanted at most {_TARGET:.2f}: {'met' if ratio <= _TARGET else 'missed'}"
        )
    return lines


def render(record: dict[str, Any]) -> str:
    """A table in Markdown, and the targets."""
    results = results_of(record)
    rows = [
        [
            f"{result.case.name}, {result.case.layout}",
            number(statistics.median(result.plain)),
            number(statistics.median(result.drpo)),
            number(paired_ratio(result.drpo, result.plain)),
            number(statistics.median(result.plain_cpu)),
            number(statistics.median(result.drpo_cpu)),
            number(paired_ratio(result.drpo_cpu, result.plain_cpu)),
        ]
        for result in results
    ]
    batches = {result.case.name: result.case for result in results}
    sizes = [
        f"- {name}: V = {case.model.vocab}, H = {case.model.hidden}, {case.model.layers} layers, "
        f"{case.dtype}; {case.model.rows} rows of {case.model.length} tokens."
        for name, case in batches.items()
    ]
    head = ["", "plain s", "DRPO s", "x plain", "plain CPU s", "DRPO CPU s", "x plain"]
    return "\n".join(
        [
            conditions(record),
            "",
            "**A training step**, gradients and update, of DRPO and of plain next-token training:",
            "",
            *sizes,
            "",
            table(head, rows),
            "",
            *targets(results, record["device"]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.objective_cost",
        description="A training step of DRPO beside one of plain next-token training.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, help="calculator, large vocabulary; 0.6B on a GPU"
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--rows", type=int, help="of a batch; each model has its own")
    parser.add_argument("--length", type=int, help="tokens of a row, a multiple of 16; likewise")
    add_settings(parser, rounds=7)
    options = parser.parse_args(argv)
    check_counts(parser, options)
    kind = choose_device(options.device).kind
    sizes = {name: getattr(options, name) for name in ("rows", "length")}
    given = {name: value for name, value in sizes.items() if value is not None}
    if given.get("length", 16) % 16 or given.get("length", 16) < 16:
        parser.error(f"--length {options.length}: must be a multiple of 16")
    if given.get("rows", 2) % 2 or given.get("rows", 2) < 2:
        parser.error(f"--rows {options.rows}: must be a multiple of 2, for two replicas")
    dtype = "bf16" if kind == "cuda" else "fp32"
    cases = [
        Case(name, Model(**asdict(MODELS[name]) | given), layout, dtype)
        for name in options.models or _DEFAULT[kind]
        for layout in options.layouts
    ]
    results = measure(cases, options.device, options.threads, options.rounds)
    record = record_of(results, options.device, options.threads, options.rounds)
    print(render(record))
    if options.json:
        write_record(options.json, record)


if __name__ == "__main__":
    main()
