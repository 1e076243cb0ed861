"""Generating responses: the in-process engine beside `transformers.generate`, and vLLM if given.

    python -m benchmarks.generation

Tokens of responses per second that a process spends on CPUs, for two Qwen3-style models of random
weights and three workloads: responses of equal length, groups of 8 with one prompt each, and
lengths from a lognormal distribution. The contenders draw at temperature 1 and take turns in one
process, each round in another order. Ours gives the log-prob of each token as well.

A running vLLM server takes part with `--vllm MODEL=URL@PID`: its CPU seconds are those of process
PID and all that it started. It must serve the model that an earlier run left in `--scratch`, such
as SCRATCH/27M:

    python -m vllm.entrypoints.openai.api_server --model SCRATCH/27M \\
        --dtype float32 --no-enable-prefix-caching --max-model-len 1024
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    Place,
    add_output,
    check_counts,
    conditions,
    machine,
    number,
    paired_ratio,
    run_ranks,
    seconds_of,
    table,
    write_record,
)
from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_drpo.rollout.engine import Request, Sampling

MODELS: dict[str, dict[str, Any]] = {
    "1.3M": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "27M": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}
"""By name, the sizes in the words of config.json; input and output layer share their weight."""
_POSITIONS = 1024
_SLOTS = 64
"""Responses at the same time, of every contender."""
_REFERENCE = "transformers.generate"
_EXACT, _FAST, _VLLM = "ours, exact", "ours, not exact", "vLLM's server"
TARGETS = {"equal lengths": 1.0, "groups of 8": 1.4, "lognormal lengths": 2.0}
"""By workload, how many times as fast as transformers ours has to be."""


@dataclass(frozen=True)
class Work:
    """Prompts, and how long the response to each is. Example: Work("groups of 8", [...], [...])."""

    name: str
    prompts: list[Tensor]
    """int64 [P] each, all of one length."""
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        """Of all responses."""
        return sum(self.lengths)


def workloads(vocab: int) -> list[Work]:
    """Those of `TARGETS`, in that order."""
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int, length: int) -> list[Tensor]:
        return [torch.randint(3, vocab, (length,), generator=generator) for _ in range(count)]

    groups = [prompt for prompt in prompts(_SLOTS // 8, 128) for _ in range(8)]
    spread = torch.randn(2 * _SLOTS, generator=generator).exp()
    lengths = (40 * spread).long().clamp(1, 160).tolist()
    return [
        Work("equal lengths", prompts(_SLOTS, 16), [64] * _SLOTS),
        Work("groups of 8", groups, [64] * _SLOTS),
        Work("lognormal lengths", prompts(2 * _SLOTS, 16), lengths),
    ]


@dataclass(frozen=True)
class Server:
    """A vLLM server of one of the models."""

    model: str
    url: str
    pid: int

    @classmethod
    def parse(cls, text: str) -> Server:
        """From MODEL=URL@PID."""
        model, _, rest = text.partition("=")
        url, _, pid = rest.rpartition("@")
        if model not in MODELS or not url.startswith("http") or not pid.isdecimal():
            raise argparse.ArgumentTypeError(f"{text}: write MODEL=URL@PID")
        return cls(model, url.rstrip("/"), int(pid))

    def cpu_seconds(self) -> float:
        """Spent so far by the process and all that it started."""
        return _cpu_ticks(self.pid) / os.sysconf("SC_CLK_TCK")

    def generate(self, work: Work) -> None:
        """Every response as a request of its own, as many at a time as the others compute."""

        def ask(prompt: Tensor, length: int) -> None:
            body = {
                "prompt": prompt.tolist(),
                "max_tokens": length,
                "min_tokens": length,
                "ignore_eos": True,
                "temperature": 1.0,
                "logprobs": 0,
                "return_token_ids": True,
            }
            request = urllib.request.Request(
                f"{self.url}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=600) as answer:
                (choice,) = json.load(answer)["choices"]
            if len(choice["token_ids"]) != length:
                raise RuntimeError(f"{self.url}: {len(choice['token_ids'])} tokens, not {length}")

        with ThreadPoolExecutor(_SLOTS) as pool:
            list(pool.map(ask, work.prompts, work.lengths))


def _cpu_ticks(pid: int) -> int:
    process = Path(f"/proc/{pid}")
    # After the name in brackets: fields 14 to 17 of proc(5), children that have ended included.
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    children = {
        int(child)
        for task in (process / "task").iterdir()
        for child in (task / "children").read_text().split()
    }
    return sum(map(int, fields[11:15])) + sum(map(_cpu_ticks, children))


@dataclass(frozen=True)
class Result:
    """One contender at one workload. Example: Result("27M", "groups of 8", "ours, exact", ...)."""

    model: str
    work: str
    name: str
    num_tokens: int
    cpu_seconds: list[float]
    """Of each round."""

    @property
    def speed(self) -> float:
        """Tokens per CPU second, the median round's."""
        return self.num_tokens / statistics.median(self.cpu_seconds)


def measure(
    models: Sequence[str], rounds: int, servers: Sequence[Server], scratch: Path | None
) -> list[Result]:
    """Every contender at every workload."""
    results = []
    with nullcontext(str(scratch)) if scratch else tempfile.TemporaryDirectory() as name:
        for model in models:
            directory = Path(name) / model
            if not directory.exists():
                _make_model(directory, MODELS[model])
            served = [asdict(server) for server in servers if server.model == model]
            (found,) = run_ranks(_time, 1, "cpu", 1, model, str(directory), rounds, served)
            results += [Result(**result) for result in found]
    return results


def _make_model(directory: Path, sizes: dict[str, Any]) -> None:
    """Random weights, and the tokenizer that a server asks for: words that are their numbers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {str(number): number for number in range(sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen3Config(
        **sizes,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)


def _time(
    place: Place, model: str, directory: str, rounds: int, servers: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """`Result`s, after a few tokens that do not count."""
    works = workloads(MODELS[model]["vocab_size"])
    warm_up = Work("a few tokens", works[0].prompts[:8], [8] * 8)
    calls = {
        _REFERENCE: _transformers(directory),
        **_ours(place, directory),
    }
    clocks: dict[str, Callable[[], float]] = {}
    for server in servers:
        running = Server(**server)
        calls[_VLLM], clocks[_VLLM] = running.generate, running.cpu_seconds
    for call in calls.values():
        call(warm_up)
    results = []
    for work in works:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds):
            order = list(calls)[turn % len(calls) :] + list(calls)[: turn % len(calls)]
            for name in order:
                start = clocks[name]() if name in clocks else 0.0
                _, busy = seconds_of(place, lambda name=name, work=work: calls[name](work))
                seconds[name].append(clocks[name]() - start if name in clocks else busy)
        results += [
            asdict(Result(model, work.name, name, work.num_tokens, times))
            for name, times in seconds.items()
        ]
    return results


def _transformers(directory: str) -> Callable[[Work], None]:
    """Batches of `_SLOTS`, each until its longest response is done."""
    from transformers import Qwen3ForCausalLM

    model: Any = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def generate(work: Work) -> None:
        for first in range(0, len(work.prompts), _SLOTS):
            ids = torch.stack(work.prompts[first : first + _SLOTS])
            length = max(work.lengths[first : first + _SLOTS])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert out.shape == (ids.size(0), ids.size(1) + length)

    return generate


def _ours(place: Place, directory: str) -> dict[str, Callable[[Work], None]]:
    layout = place.start_megatron()
    from megatron_drpo.mcore.policy import Policy
    from megatron_drpo.rollout.inprocess import InProcessEngine

    config = Config(
        model=ModelConfig(hf_model=directory, transformer_impl="local"),
        parallel=ParallelConfig(),
        data=DataConfig(prompts="unused"),
        rollout=RolloutConfig(),
        objective=ObjectiveConfig(),
        train=TrainConfig(),
    )
    source = Path(directory)
    policy = Policy.load(config, read_architecture(source), layout, place.device, weights=source)

    def contender(exact: bool) -> Callable[[Work], None]:
        engine = InProcessEngine(policy, max_slots=_SLOTS, exact=exact)

        def generate(work: Work) -> None:
            requests = [
                Request(prompt, stream, max_response_length=length)
                for stream, (prompt, length) in enumerate(
                    zip(work.prompts, work.lengths, strict=True)
                )
            ]
            sampling = Sampling(1.0, 1.0, 0, max(work.lengths), stop_ids=(), seed=0)
            done = engine.generate(requests, sampling)
            assert [one.response_ids.numel() for one in done] == work.lengths

        return generate

    return {_EXACT: contender(True), _FAST: contender(False)}


def record_of(results: Sequence[Result], rounds: int) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "benchmark": "generation",
        "machine": machine("cpu"),
        "megatron_core": version("megatron-core"),
        "transformers": version("transformers"),
        "threads": 1,
        "rounds": rounds,
        "results": [asdict(result) for result in results],
    }


def targets(results: Sequence[Result]) -> list[str]:
    """How the exact engine stands beside what is wanted of it."""
    lines = []
    by_key = {(result.model, result.work, result.name): result for result in results}
    for (model, work, name), result in by_key.items():
        if name != _EXACT:
            continue
        others = {_REFERENCE: TARGETS[work], _VLLM: 1.0}
        for other, wanted in others.items():
            reference = by_key.get((model, work, other))
            if reference is None:
                continue
            ratio = paired_ratio(reference.cpu_seconds, result.cpu_seconds)
            verdict = "met" if ratio >= wanted else "missed"
            lines.append(
                f"- {model}, {work}: {ratio:.2f} x {other}, wanted at least {wanted:.1f}: {verdict}"
            )
    return ["Targets:", "", *lines]


def render(record: dict[str, Any]) -> str:
    """The table, one row per model and contender."""
    results = [Result(**result) for result in record["results"]]
    works = list(TARGETS)
    rows = []
    for model, name in dict.fromkeys((result.model, result.name) for result in results):
        speeds = {
            result.work: result.speed
            for result in results
            if (result.model, result.name) == (model, name)
        }
        cells = [number(speeds.get(work, math.nan), 0) for work in works]
        rows.append([f"{model}, {name}", *cells])
    return "\n".join(
        [
            conditions(record),
            "",
            f"**Tokens of responses per CPU second**, fp32; transformers {record['transformers']}.",
            "",
            table(["", *works], rows),
            "",
            *targets(results),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description="Speed of generating responses on a CPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--vllm", nargs="+", type=Server.parse, default=[], metavar="MODEL=URL@PID")
    parser.add_argument("--scratch", type=Path, help="keep the models here, for a server to serve")
    add_output(parser, rounds=3)
    options = parser.parse_args(argv)
    check_counts(parser, options)
    results = measure(options.models, options.rounds, options.vllm, options.scratch)
    record = record_of(results, options.rounds)
    print(render(record))
    if options.json:
        write_record(options.json, record)


if __name__ == "__main__":
    main()
