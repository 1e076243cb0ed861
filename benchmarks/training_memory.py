"""A training step of the default recipe with a large vocabulary: fused output layer or plain one.

    python -m benchmarks.training_memory

The model of `make train`, with random weights and the vocabulary raised to 151,936; one optimizer
update's share of a rollout batch, with random ids instead of generated ones. What is measured is
`Policy.forward_backward`, the whole of it: `--fused-output` and `--no-fused-output` take turns in
the same processes for time, and have new processes each for memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    MB,
    Place,
    add_settings,
    check_counts,
    conditions,
    extra_memory_of,
    machine,
    number,
    paired_ratio,
    peak_resident,
    run_ranks,
    seconds_of,
    slowest,
    table,
    write_record,
)
from megatron_drpo.arguments import parse
from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.types import Prompt, Rollout, Trajectory

_RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "arithmetic_cpu.yaml"
_PROMPT_LENGTH, _RESPONSE_LENGTH = 6, 32
_FLAGS = {True: "--fused-output", False: "--no-fused-output"}


@dataclass(frozen=True)
class Step:
    """One optimizer update. Example: Step(vocab=151936, responses=128, tp=1, fused=True)."""

    vocab: int
    responses: int
    tp: int
    fused: bool


@dataclass(frozen=True)
class Result:
    """What was measured of a step."""

    step: Step
    seconds: list[float]
    """Of each round, of the slowest rank."""
    cpu_seconds: list[float]
    """Of each round, of the busiest rank, all its threads."""
    peak_bytes: int
    """Highest resident memory of rank 0 during the step, or what torch had allocated on its GPU."""


def measure(
    vocab: int, responses: int, tps: Sequence[int], device: str, threads: int, rounds: int
) -> list[Result]:
    """Both output layers at each TP."""
    results = []
    with tempfile.TemporaryDirectory() as directory:
        _make_model(directory, vocab)
        for tp in tps:
            pair = [Step(vocab, responses, tp, fused) for fused in (False, True)]
            ranks = run_ranks(_time, tp, device, threads, directory, pair, rounds)
            for step, times in zip(pair, zip(*ranks, strict=True), strict=True):
                peak = run_ranks(_peak, tp, device, threads, directory, step)[0]
                results.append(Result(step, *slowest(times), peak))
    return results


def _make_model(directory: str, vocab: int) -> None:
    """The shape of the base model of `make train`, untrained."""
    from tools.make_base_model import build_model

    torch.manual_seed(0)
    build_model(vocab).save_pretrained(directory)


def _load(place: Place, model: str, step: Step) -> Callable[[], Any]:
    """A policy, ready to be called: gradients of the step, nothing updated."""
    layout = place.start_megatron()
    from megatron_drpo.mcore.policy import Policy

    arguments = ["--config", str(_RECIPE), "--hf-model", model, _FLAGS[step.fused]]
    config, _ = parse([*arguments, "--tensor-model-parallel-size", str(step.tp)])
    source = Path(model)
    policy = Policy.load(config, read_architecture(source), layout, place.device, weights=source)
    (rows,) = policy.annotate([policy.pack(_trajectories(step))])
    return lambda: policy.forward_backward(rows)


def _time(
    place: Place, model: str, steps: Sequence[Step], rounds: int
) -> list[list[tuple[float, float]]]:
    """Wall and CPU seconds of each step in each round, after one that does not count."""
    calls = [_load(place, model, step) for step in steps]
    seconds = [[seconds_of(place, call) for call in calls] for _ in range(rounds + 1)]
    return [list(times) for times in zip(*seconds[1:], strict=True)]


def _peak(place: Place, model: str, step: Step) -> int:
    """Bytes, all that the process holds, of the second step: the first one leaves things behind."""
    call = _load(place, model, step)
    call()
    extra_memory_of(place, call)
    on_gpu = place.device.kind == "cuda"
    return torch.cuda.max_memory_allocated() if on_gpu else peak_resident()


def _trajectories(step: Step) -> list[Trajectory]:
    """Random ids, whose behaviour log-probs are those of a policy that knows nothing."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(step.vocab, (count,), generator=generator)

    trajectories = []
    for index in range(step.responses):
        prompt = Prompt(f"random:{index}", "", ids(_PROMPT_LENGTH), None)
        rollout = Rollout(
            prompt=prompt,
            sample=0,
            response_ids=ids(_RESPONSE_LENGTH),
            behaviour_logprobs=torch.full((_RESPONSE_LENGTH,), -math.log(step.vocab)),
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
        "benchmark": "training_memory",
        "machine": machine(device),
        "megatron_core": version("megatron-core"),
        "threads": threads,
        "rounds": rounds,
        "results": [asdict(result) for result in results],
    }


def render(record: dict[str, Any]) -> str:
    """A table in Markdown."""
    results = [Result(**result | {"step": Step(**result["step"])}) for result in record["results"]]
    plain = {result.step.tp: result for result in results if not result.step.fused}
    rows = [
        [
            f"TP {result.step.tp}, `{_FLAGS[result.step.fused]}`",
            number(statistics.median(result.seconds), 1),
            number(statistics.median(result.cpu_seconds), 1),
            number(paired_ratio(result.seconds, plain[result.step.tp].seconds)),
            number(result.peak_bytes / MB, 0),
        ]
        for result in results
    ]
    step = results[0].step
    tokens = step.responses * _RESPONSE_LENGTH
    return "\n".join(
        [
            conditions(record),
            "",
            f"**One training step** (`forward_backward`): the default recipe's model with "
            f"V = {step.vocab}, {step.responses} responses, {tokens} loss tokens.",
            "",
            table(["", "s", "CPU s", "x plain", "peak MB of a rank"], rows),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_memory",
        description="Time and memory of a training step, with the output layer fused and not.",
        allow_abbrev=False,
    )
    parser.add_argument("--vocab", type=int, default=151_936, help="V")
    parser.add_argument("--responses", type=int, default=128, help="of one update, all loss tokens")
    parser.add_argument("--tp", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="ranks")
    add_settings(parser, rounds=3)
    options = parser.parse_args(argv)
    check_counts(parser, options, "vocab", "responses")
    results = measure(
        options.vocab,
        options.responses,
        options.tp,
        options.device,
        options.threads,
        options.rounds,
    )
    record = record_of(results, options.device, options.threads, options.rounds)
    print(render(record))
    if options.json:
        write_record(options.json, record)


if __name__ == "__main__":
    main()
