"""One step of a run, computed again from its checkpoint and its rollouts (`tools/replay_step.py`).

L3, beside the loop, whose own code computes the step. In: a run directory, the number of a step,
and flags that differ from the run's. Out: the step's numbers, and every token of every update.
Nothing in the run directory is written.

A step is what it was because all that it takes is on the disk: the weights and the optimizer's
state before it (the checkpoint of the step before, or the model that the run started from), its
responses with their log-probs and rewards (`--save-rollouts`), and the seed that shares them out
among its updates. Nothing is generated or judged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_drpo.arguments import parse_over
from megatron_drpo.checkpoint.resume import STATE, step_name
from megatron_drpo.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    MemoryConfig,
    ObjectiveConfig,
    ParallelConfig,
    RewardConfig,
    flag,
)
from megatron_drpo.dashboard import is_measurement
from megatron_drpo.errors import ConfigError, DataError
from megatron_drpo.report.run import read_metrics
from megatron_drpo.rollout.files import step_file

if TYPE_CHECKING:
    from megatron_drpo.mcore.parallel import Layout
    from megatron_drpo.metrics import TokenDiagnostics
    from megatron_drpo.preflight import Inputs
    from megatron_drpo.types import Row

_MAY_DIFFER = frozenset(
    {
        item.name
        for group in (ParallelConfig, MemoryConfig, AdvantageConfig, ObjectiveConfig)
        for item in dataclasses.fields(group)
    }
    | {"hf_model", "load", "verify_weights", "transformer_impl", "moe_routing_replay"}
    | {"updates_per_rollout", "max_tokens_per_microbatch", "fused_output", "output_chunk_mib"}
    | {"clip_grad", "optimizer_cpu_offload", "optimizer_offload_fraction", "rollout_exact"}
)
"""Flags of training that a replay takes: what a step is computed with, and where. The rest is on
the disk (rewards, the optimizer's settings), or has no part in it."""


@dataclass(frozen=True)
class Source:
    """What a step is computed from.

    Example: Source(step=5, checkpoint=Path("runs/a/checkpoints/step-000004"),
                    rollouts=Path("runs/a/rollouts/step-000005.jsonl"))
    """

    step: int
    """From 1, as in metrics.jsonl and the names of files."""
    checkpoint: Path | None
    """Of the step before; None: the model that the run started from."""
    rollouts: Path
    """Of the step; or, of a run with `--rollouts-file`, the file of all steps."""


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json: the run's flags, by the names of their fields.

    Raises:
        DataError: it cannot be read.
    """
    file = run / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give the --output-dir of a run") from error
    except ValueError as error:
        raise DataError(f"{file}: is not JSON ({error}); restore the file") from error
    if not isinstance(values, dict):
        raise DataError(f"{file}: must be a JSON object; restore the file")
    return values


def find(run: Path, step: int, values: dict[str, Any]) -> Source:
    """What step `step` of a run is computed from.

    Args:
        values: of its config.json.

    Raises:
        DataError: a part is not there; names it, and the steps that can be replayed.
    """
    recorded = values.get("rollouts_file")

    def source(number: int) -> Source:
        saved = run / "rollouts" / step_file(number)
        checkpoint = run / "checkpoints" / step_name(number - 1)
        return Source(
            number, checkpoint if number > 1 else None, Path(recorded) if recorded else saved
        )

    def missing(source: Source) -> list[str]:
        found = []
        if not source.rollouts.exists():
            found.append(f"the rollouts of step {source.step} are not there ({source.rollouts})")
        if source.checkpoint is not None and not (source.checkpoint / STATE).is_file():
            found.append(
                f"the checkpoint before step {source.step} is not there ({source.checkpoint})"
            )
        return found

    lacking = missing(source(step)) if step >= 1 else ["steps count from 1"]
    if not lacking:
        return source(step)
    # A step that can be replayed is the first one or comes after a checkpoint.
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    after = {int(name[5:]) + 1 for name in names if name[5:].isdigit()}
    possible = [number for number in sorted(after | {1}) if not missing(source(number))]
    told = f"steps that can be replayed: {_spans(possible)}" if possible else "no step can be"
    raise DataError(
        f"--step {step}: {', and '.join(lacking)}; {told}. A run with --save-rollouts "
        "--checkpoint-interval 1 --checkpoint-keep 0 keeps what every step needs"
    )


def _spans(numbers: Sequence[int]) -> str:
    """[1, 3, 4, 5] -> 1, 3-5."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)


def configure(values: dict[str, Any], source: Source, argv: Sequence[str]) -> Config:
    """The configuration to compute a step with: the run's, with the flags of `argv` over it.

    Raises:
        ConfigError: as of training, or a flag has no part in a step that is computed again.
    """
    config, given = parse_over(values, argv)
    idle = sorted(given - _MAY_DIFFER)
    if idle:
        raise ConfigError(
            "\n".join(
                f"{flag(name)}: a replay takes this from the run, or has no use for it; drop it "
                "(objective, advantages and layout may differ)"
                for name in idle
            )
        )
    rollout, reward = config.rollout, config.reward
    if rollout.rollouts_file is None:
        # The rewards are in the file, and an environment's conversations are over.
        reward = RewardConfig(reward="exact", reward_workers=1)
    return dataclasses.replace(
        config,
        data=DataConfig(prompts=config.data.prompts),
        reward=reward,
        rollout=dataclasses.replace(
            rollout,
            save_rollouts=False,
            environment=None,
            # Who looks into a run that was stopped by this gap wants to see it.
            max_engine_gap=None if rollout.rollouts_file else math.inf,
        ),
        # Of a resumed run, the model that it started from is not hashed once more.
        output=dataclasses.replace(config.output, resume=source.checkpoint is not None),
    )


@dataclass(frozen=True)
class Replayed:
    """A step that was computed again.

    Example: Replayed(scalars={"loss": 0.25, ...}, tokens=[{"update": 1, "id": "a:7", ...}, ...])
    """

    scalars: dict[str, float]
    """As training logs them."""
    tokens: list[dict[str, Any]]
    """If asked for, every loss token of every update, on rank 0 (elsewhere none), as
    docs/debugging.md has them: `update` from 1, `id` and `sample` of the rollout, `token` (its
    number in the response, from 0), `token_id`, `text`, `policy_version`, `behaviour_logprob` (log
    mu), `logprob` (log pi, at this update), `old_logprob` (before the first), `ratio` (pi / mu),
    `weight` (the objective's gradient weight), `advantage`, `entropy`, and `objective/*`, which the
    objective says besides."""


def replay(config: Config, inputs: Inputs, source: Source, *, with_tokens: bool) -> Replayed:
    """Compute a step again; collective over all ranks.

    Args:
        config: of `configure`.
        inputs: of `preflight(config, ..., replay=source.rollouts)`.
        with_tokens: fill `Replayed.tokens`, at near 1 KB of rank 0's memory per token; the same on
            all ranks.
    """
    # Imported here, since they take seconds: a step that is not there is said at once.
    from megatron_drpo import train
    from megatron_drpo.mcore import parallel

    table: list[dict[str, Any]] = []

    class Recorded(train.Run):
        """Keeps what is known of each token while the step is computed."""

        def update(self, rows_of_updates: Sequence[Sequence[Row]]):
            scalars, tokens = super().update(rows_of_updates)
            places = _places(rows_of_updates, self.layout)
            if tokens is not None:
                table.extend(_describe(places, tokens, inputs))
            return scalars, tokens

    layout = parallel.initialize(config.parallel, inputs.device, config.train.seed)
    with contextlib.ExitStack() as background:
        run = Recorded if with_tokens else train.Run
        scalars, _ = run(config, inputs, layout, background, source.checkpoint).train_step()
    parallel.destroy(layout)
    return Replayed(scalars, table)


class _Place(NamedTuple):
    """Where a token belongs."""

    update: int
    name: str
    """Of its sequence, as in `Row.names`."""
    position: int
    """In the sequence, its prompt included."""
    token_id: int
    policy_version: int


def _places(rows_of_updates: Sequence[Sequence[Row]], layout: Layout) -> list[_Place]:
    """Of all ranks' tokens, in the order of their diagnostics; collective, [] but on rank 0."""
    own = None
    if layout.is_last_stage and layout.tp_rank == 0:
        own = [
            _Place(number, row.names[sequence], position, token_id, version)
            for number, rows in enumerate(rows_of_updates, start=1)
            for row in rows
            for sequence, position, token_id, version in zip(
                row.sequence.tolist(),
                (row.positions[row.loss_index] + 1).tolist(),
                row.targets.tolist(),
                row.policy_versions.tolist(),
                strict=True,
            )
        ]
    return [*itertools.chain.from_iterable(layout.gather_to_main(own))]


def _describe(
    places: Sequence[_Place], tokens: TokenDiagnostics, inputs: Inputs
) -> list[dict[str, Any]]:
    """`Replayed.tokens`, by update, prompt, sample and token: the same in every layout."""
    assert inputs.rollouts is not None
    rollouts = {rollout.name: rollout for rollout, _ in inputs.rollouts}
    texts = inputs.tokenizer.batch_decode([[place.token_id] for place in places])
    columns = {
        "behaviour_logprob": tokens.behaviour_logprobs,
        "logprob": tokens.logprobs,
        "old_logprob": tokens.old_logprobs,
        "ratio": tokens.ratio,
        "weight": tokens.gradient_weight,
        "advantage": tokens.advantages,
        "entropy": tokens.entropy,
        **{f"objective/{name}": values for name, values in tokens.objective.items()},
    }
    numbers = zip(*(values.tolist() for values in columns.values()), strict=True)
    table = []
    for place, text, values in zip(places, texts, numbers, strict=True):
        rollout = rollouts[place.name]
        table.append(
            {
                "update": place.update,
                "id": rollout.prompt.id,
                "sample": rollout.sample,
                "token": place.position - rollout.prompt.token_ids.numel(),
                "token_id": place.token_id,
                "text": text,
                "policy_version": place.policy_version,
                **dict(zip(columns, values, strict=True)),
            }
        )
    return sorted(table, key=lambda row: tuple(row[n] for n in ("update", "id", "sample", "token")))


@dataclass(frozen=True)
class Number:
    """A number of a step, as the run logged it and as the replay has it.

    Example: Number(name="loss", logged=0.25, replayed=0.25)
    """

    name: str
    logged: float | None
    """None: the run did not log it; NaN: it was not finite."""
    replayed: float

    @property
    def equal(self) -> bool:
        """To the last bit; what is not finite is alike."""
        return self.logged == self.replayed or (
            self.logged is not None and math.isnan(self.logged) and not math.isfinite(self.replayed)
        )

    @property
    def difference(self) -> float:
        """Relative to the larger of both, 0 to 2; NaN where one of them is no finite number."""
        if self.logged is None or not math.isfinite(self.logged + self.replayed):
            return math.nan
        larger = max(abs(self.logged), abs(self.replayed))
        return abs(self.logged - self.replayed) / larger if larger else 0.0


def logged_step(run: Path, step: int) -> dict[str, float]:
    """What a run logged of a step, measurements left out; empty if it was not logged.

    Raises:
        DataError: metrics.jsonl is damaged.
    """
    line = read_metrics(run).get(step, {})
    return {name: value for name, value in line.items() if not is_measurement(name)}


def compare(logged: Mapping[str, float], scalars: Mapping[str, float]) -> list[Number]:
    """The numbers of a replay beside those that were logged, in the order of the step."""
    return [Number(name, logged.get(name), value) for name, value in scalars.items()]
