"""What a run says about itself: statistics of tokens and rollouts, the timer, and the writer.

Layer 0. The training loop hands in complete tensors (every loss token of an update, already
gathered over ranks), so each number is exact and no mean of means exists. Out go scalars by name,
to TensorBoard and to `metrics.jsonl`, and histograms, to TensorBoard and to `histograms.jsonl`,
from which `megatron_drpo.report` makes its pictures. The one step axis is the rollout step.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_drpo.dashboard import custom_scalars
from megatron_drpo.disk import write_atomically
from megatron_drpo.errors import DataError
from megatron_drpo.types import Trajectory

Sample = TypeVar("Sample")

logger = logging.getLogger(__name__)

MU_BUCKETS = {
    "le_1e-4": (0.0, 1e-4),
    "1e-4_1e-3": (1e-4, 1e-3),
    "1e-3_1e-2": (1e-3, 1e-2),
    "1e-2_1e-1": (1e-2, 1e-1),
    "1e-1_1": (1e-1, 1.0),
}
"""Buckets of the behaviour probability, (above, up to and including]."""

# The log-prob nearest to certainty that fp32 can tell from it: it is a difference of two numbers
# of order 1 and comes out as exactly 0 long before the other tokens have no mass.
_NEAREST_TO_CERTAIN = -(2.0**-24)


@dataclass(frozen=True, eq=False)
class TokenDiagnostics:
    """Every loss token of one optimizer update.

    Example, two tokens, the policy having moved on the second only:
        TokenDiagnostics(logprobs=tensor([-0.5, -1.0]), behaviour_logprobs=tensor([-0.5, -1.2]),
                         old_logprobs=tensor([-0.5, -1.2]), advantages=tensor([0.6, -0.4]),
                         gradient_weight=tensor([1.0, 1.005]), entropy=tensor([0.9, 1.4]),
                         objective={"penalty": tensor([0.0, 0.001])})
    """

    logprobs: Tensor
    """fp32 [T], log pi under the trainer."""
    behaviour_logprobs: Tensor
    """fp32 [T], log mu."""
    old_logprobs: Tensor
    """fp32 [T], log pi under the trainer before the first update of the batch."""
    advantages: Tensor
    """fp32 [T]."""
    gradient_weight: Tensor
    """fp32 [T], w in d objective / d log pi = r * advantage * w, r being the objective's ratio."""
    entropy: Tensor
    """fp32 [T], nats, of the trainer's distribution at the token."""
    objective: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 [T] each: what the objective says of each token besides."""

    @property
    def ratio(self) -> Tensor:
        """fp64 [T], pi / mu."""
        return (self.logprobs.double() - self.behaviour_logprobs.double()).exp()

    def cpu(self) -> TokenDiagnostics:
        """The same on the CPU."""
        return self._map(lambda values: values[0].cpu(), [self])

    @classmethod
    def cat(cls, parts: Sequence[TokenDiagnostics]) -> TokenDiagnostics:
        """One record of all tokens of `parts` (at least one), in their order."""
        return cls._map(torch.cat, parts)

    @classmethod
    def _map(
        cls, merge: Callable[[list[Tensor]], Tensor], parts: Sequence[TokenDiagnostics]
    ) -> TokenDiagnostics:
        names = [f.name for f in fields(cls) if f.name != "objective"]
        return cls(
            **{name: merge([getattr(part, name) for part in parts]) for name in names},
            objective={
                name: merge([part.objective[name] for part in parts]) for name in parts[0].objective
            },
        )


def quantiles(values: Tensor, levels: Sequence[float]) -> list[Tensor]:
    """Quantiles with linear interpolation; `torch.quantile` refuses more than 2**24 elements.

    Args:
        values: [T], T >= 1.
        levels: each between 0 and 1.
    """
    ordered = values.sort().values
    result = []
    for level in levels:
        position = level * (len(ordered) - 1)
        low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
        between = low + (high - low) * (position - math.floor(position))
        result.append(torch.where(low == high, low, between))  # two infinities have no between
    return result


def _floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """All values in one copy from the device."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


def _binary_kl(log_m: Tensor, log_p: Tensor) -> Tensor:
    """fp64 [T], KL(Bernoulli(m) || Bernoulli(p)), finite for every finite log-prob.

    Both are held below certainty by what fp32 resolves: a log-prob of exactly 0 says that the
    rest of the vocabulary is too small to see, not that it is impossible.
    """
    log_m, log_p = log_m.clamp(max=_NEAREST_TO_CERTAIN), log_p.clamp(max=_NEAREST_TO_CERTAIN)
    m, rest_m, rest_p = log_m.exp(), -log_m.expm1(), -log_p.expm1()
    hit = torch.where(m > 0, m * (log_m - log_p), 0.0)
    return hit + rest_m * (rest_m.log() - rest_p.log())


def trust_region_statistics(d: TokenDiagnostics, log_ratio_limit: float) -> dict[str, float]:
    """How far the policy is from the one that sampled, and what the objective makes of it.

    `weight/*` describe the gradient weight w (1 everywhere: plain policy gradient; `below_0` and
    `below_half` are shares of tokens), `ratio/*` r = pi / mu, with Kish's effective sample size
    (sum r)^2 / (T sum r^2) and `beyond_limit` the number of tokens with |log r| > the limit
    (`_share`: of all).
    `divergence/*` compare, per token, sampled id against all others: total variation |pi - mu|
    and KL(mu || pi) of that binary split, and `k3` the estimate of the full KL(mu || pi) by
    r - 1 - log r (http://joschu.net/blog/kl-approx.html). `divergence/tv_mu_*` is the total
    variation by bucket of mu (absent where no token falls in it), `divergence/share_mu_*` the
    share of tokens in it. `drift/*` compare the trainer with itself before the batch's first
    update, which leaves the engine gap out; `objective/*` are means of what the objective says of
    each token. Computed in fp64.

    Args:
        d: the tokens, T of them; T = 0 gives an empty dict.
        log_ratio_limit: nats.
    """
    if not d.logprobs.numel():
        return {}
    log_p, log_m = d.logprobs.double(), d.behaviour_logprobs.double()
    log_ratio, mu, weight = log_p - log_m, log_m.exp(), d.gradient_weight.double()
    total_variation = (log_p.exp() - mu).abs()
    drift = log_p - d.old_logprobs.double()
    beyond = (log_ratio.abs() > log_ratio_limit).double()
    # Relative to the largest ratio, so that the squares cannot overflow.
    relative = (log_ratio - log_ratio.max()).exp()
    weight_p01, weight_p50, weight_p99 = quantiles(weight, (0.01, 0.5, 0.99))
    statistics = {
        "weight/mean": weight.mean(),
        "weight/p01": weight_p01,
        "weight/p50": weight_p50,
        "weight/p99": weight_p99,
        "weight/below_0": (weight < 0).double().mean(),
        "weight/below_half": (weight < 0.5).double().mean(),
        "ratio/mean": d.ratio.mean(),
        "ratio/max": log_ratio.max().exp(),
        "ratio/p99": quantiles(d.ratio, (0.99,))[0],
        "ratio/effective_sample_size": relative.mean().square() / relative.square().mean(),
        "ratio/beyond_limit": beyond.sum(),
        "ratio/beyond_limit_share": beyond.mean(),
        "divergence/binary_tv": total_variation.mean(),
        "divergence/binary_kl": _binary_kl(log_m, log_p).mean(),
        "divergence/k3": (log_ratio.expm1() - log_ratio).mean(),
        "drift/mean_abs": drift.abs().mean(),
        "drift/max_abs": drift.abs().max(),
        "drift/k3": (drift.expm1() - drift).mean(),
        "entropy/mean": d.entropy.double().mean(),
    }
    for name, values in d.objective.items():
        statistics[f"objective/{name}"] = values.double().mean()
    for name, (above, up_to) in MU_BUCKETS.items():
        inside = ((mu > above) & (mu <= up_to)).double()
        if above == 0:  # a probability that underflowed to 0 belongs here as well
            inside = (mu <= up_to).double()
        statistics[f"divergence/share_mu_{name}"] = inside.mean()
        statistics[f"divergence/tv_mu_{name}"] = (total_variation * inside).sum() / inside.sum()
    result = _floats(statistics)
    for name in MU_BUCKETS:
        if result[f"divergence/share_mu_{name}"] == 0:
            del result[f"divergence/tv_mu_{name}"]
    return result


def engine_gap_statistics(logprobs: Tensor, behaviour_logprobs: Tensor) -> dict[str, float]:
    """How well generation and training agree on a fresh batch, where pi should equal mu.

    Args:
        logprobs: fp32 [T], log pi of the trainer at the weights that generated; T = 0 gives {}.
        behaviour_logprobs: fp32 [T], log mu as the generator recorded it.

    Returns:
        `engine_gap/` mean_abs and max_abs of log pi - log mu (nats), ratio_min and ratio_max of
        pi / mu, exact_share of tokens with equal log-probs.
    """
    if not logprobs.numel():
        return {}
    log_ratio = logprobs.double() - behaviour_logprobs.double()
    return _floats(
        {
            "engine_gap/mean_abs": log_ratio.abs().mean(),
            "engine_gap/max_abs": log_ratio.abs().max(),
            "engine_gap/ratio_min": log_ratio.min().exp(),
            "engine_gap/ratio_max": log_ratio.max().exp(),
            "engine_gap/exact_share": (logprobs == behaviour_logprobs).double().mean(),
        }
    )


def rollout_statistics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Rewards, advantages and lengths of one rollout batch; no trajectories give {}.

    Standard deviations are those of the batch itself (divided by its size). A group is all
    samples of one prompt id; one whose rewards are all equal teaches nothing. `reward/failed` is
    the number of samples whose reward failed (NaN): no other `reward/` looks at those, and where
    all of them failed, mean and standard deviation are NaN.
    """
    if not trajectories:
        return {}
    judged = [t for t in trajectories if not math.isnan(t.reward)]
    reward = torch.tensor([t.reward for t in judged], dtype=torch.float64)
    advantage = torch.tensor([t.advantage for t in trajectories], dtype=torch.float64)
    length = torch.tensor(
        [t.rollout.response_ids.numel() for t in trajectories], dtype=torch.float64
    )
    groups: dict[str, set[float]] = {t.rollout.prompt.id: set() for t in trajectories}
    for t in judged:
        groups[t.rollout.prompt.id].add(t.reward)
    truncated = sum(t.rollout.finish_reason == "length" for t in trajectories)
    return {
        "reward/mean": reward.mean().item(),
        "reward/std": (reward - reward.mean()).square().mean().sqrt().item(),
        "reward/failed": float(len(trajectories) - len(judged)),
        "reward/groups_all_equal": sum(len(g) <= 1 for g in groups.values()) / len(groups),
        "response_length/mean": length.mean().item(),
        "response_length/max": length.max().item(),
        "response_length/p99": quantiles(length, (0.99,))[0].item(),
        "finish/length_share": truncated / len(trajectories),
        "advantage/std": advantage.std(correction=0).item(),
    }


class PhaseTimer:
    """Seconds and memory of each phase of a step: generate, reward, score, train, sync,
    checkpoint, evaluate.

    Args:
        synchronize: called at both ends of a phase; on a GPU it must wait for the queued work,
            or the time of one phase shows up in the next.
        take_memory: bytes, the most that this rank used since the last call; called at both ends
            of a phase.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] = lambda: None,
        take_memory: Callable[[], int] = lambda: 0,
    ) -> None:
        self._synchronize, self._take_memory = synchronize, take_memory
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, int] = {}
        self._active: str | None = None
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `time/NAME`, and note the memory; phases do not nest."""
        assert self._active is None, f"phase {name} inside phase {self._active}"
        self._synchronize()
        self._take_memory()  # what was used before the phase is not its own
        self._active, start = name, time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            self._active = None
            elapsed = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed
            self._bytes[name] = max(self._bytes.get(name, 0), self._take_memory())

    def pop(self) -> dict[str, float]:
        """Of every phase since the last call `time/PHASE`, and `memory/PHASE`, GiB of this rank;
        `time/step`, the time of it all."""
        now = time.perf_counter()
        result = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        result |= {f"memory/{name}": used / 2**30 for name, used in self._bytes.items()}
        result["time/step"] = now - self._start
        self._seconds, self._bytes, self._start = {}, {}, now
        return result


def fullest(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`memory/PHASE` of the rank that used most, for each phase of any of them.

    Args:
        ranks: what `PhaseTimer.pop` returned on each.
    """
    names = {name: None for pop in ranks for name in pop if name.startswith("memory/")}
    return {name: max(pop.get(name, 0.0) for pop in ranks) for name in names}


@dataclass(frozen=True)
class Histogram:
    """Counts of one tensor's values in equal bins.

    The bins span the middle 99.8 % so that one outlier does not squeeze the rest into a single
    bin; the outermost two also hold what lies beyond them, so the counts add up to all values.

    Example: Histogram(low=0.98, high=1.02, min=0.93, max=1.05, sum=..., sum_squares=...,
                       counts=[12, 40, ..., 9])
    """

    low: float
    """Left edge of the first bin."""
    high: float
    """Right edge of the last bin; equal to `low`, with a single bin, where the span is empty."""
    min: float
    max: float
    sum: float
    sum_squares: float
    counts: list[int]

    @classmethod
    def of(cls, values: Tensor, num_bins: int = 50) -> Histogram:
        """Histogram of `values`, any shape, at least one, all finite."""
        values = values.detach().double().flatten().cpu()
        low, high = (q.item() for q in quantiles(values, (0.001, 0.999)))
        counts = torch.tensor([len(values)])
        if low < high:
            counts = torch.histc(values.clamp(low, high), num_bins, low, high)
        return cls(
            low=low,
            high=high,
            min=values.min().item(),
            max=values.max().item(),
            sum=values.sum().item(),
            sum_squares=values.square().sum().item(),
            counts=[int(c) for c in counts],
        )

    @property
    def edges(self) -> list[float]:
        """The len(counts) + 1 edges of the bins."""
        width = (self.high - self.low) / len(self.counts)
        return [self.low + i * width for i in range(len(self.counts))] + [self.high]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that `MetricsWriter` wrote, each with an integer `step`.

    A last line without its newline is what a killed run leaves behind, and is not counted.

    Raises:
        DataError: a line is not a JSON object with a `step`; names file and line.
    """
    text = path.read_text(encoding="utf-8")
    records = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON ({error}); remove the line or the file"
            ) from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise DataError(
                f"{path}:{number}: expected an object with an integer `step`; remove the line"
            )
        records.append(record)
    return records


class MetricsWriter:
    """The log of a run, owned by one rank: TensorBoard, and the same as JSONL.

        OUTPUT_DIR/tensorboard/       scalars, histograms, texts
        OUTPUT_DIR/metrics.jsonl      {"loss": 0.25, "step": 3, ...}, one line per `write`
        OUTPUT_DIR/histograms.jsonl   {"step": 3, "weight": {fields of Histogram}}
        OUTPUT_DIR/samples.jsonl      {"step": 3, "prompt": ..., "response": ..., "reward": ...}

    Everything is flushed at the end of each call, so a killed run keeps what it had said.

    Args:
        output_dir: created if needed.
        resume_step: the first step that will be written. A killed run may have logged beyond
            its last checkpoint: what it said of this step and later ones is removed. None
            starts anew: all that an earlier run logged in this directory is removed.

    Raises:
        DataError: resuming, and a line of an earlier log is damaged; names file and line.
    """

    def __init__(self, output_dir: Path, *, resume_step: int | None) -> None:
        # Imported here because only one rank pays for it.
        from torch.utils.tensorboard import SummaryWriter

        board = Path(output_dir) / "tensorboard"
        board.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            for old in board.glob("events.out.tfevents.*"):
                old.unlink()
        self._files = {}
        self._logged: set[str] = set()
        for name in ("metrics", "histograms", "samples"):
            path = Path(output_dir) / f"{name}.jsonl"
            kept = []
            if resume_step is not None and path.exists():
                kept = [r for r in read_jsonl(path) if r["step"] < resume_step]
            if name == "metrics":
                self._logged.update(key for record in kept for key in record if key != "step")
            write_atomically(path, "".join(map(_json_line, kept)))
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(board), purge_step=resume_step)
        self._charts: dict[str, Any] = {}

    def write(
        self,
        step: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Log a step; several calls may share one, a reader merges their lines.

        A scalar that is not finite goes to TensorBoard as it is, to metrics.jsonl as null (JSON
        has no NaN), and to the log as a warning. Histograms leave such values out.

        Args:
            scalars: by name; `step` is not a name.
            histograms: any shape and device, by name; one without any value is left out.
        """
        assert "step" not in scalars, "`step` is the axis, not a metric"
        line: dict[str, Any] = {"step": step}
        for name, value in scalars.items():
            value = float(value)
            self._board.add_scalar(name, value, step)
            if not math.isfinite(value):
                logger.warning("step %d: %s is %s", step, name, value)
            line[name] = value if math.isfinite(value) else None
        self._lay_out(scalars)
        self._append("metrics", line)
        if histograms:
            self._write_histograms(step, histograms)
        self._board.flush()

    def _lay_out(self, names: Iterable[str]) -> None:
        """Tell TensorBoard the charts anew whenever one more of them has something to show."""
        before = len(self._logged)
        self._logged.update(names)
        if self._charts and len(self._logged) == before:
            return
        charts = custom_scalars(self._logged)
        if charts != self._charts:
            self._board.add_custom_scalars(charts)
            self._charts = charts

    def _write_histograms(self, step: int, histograms: Mapping[str, Tensor]) -> None:
        line: dict[str, Any] = {"step": step}
        for name, values in histograms.items():
            finite = values[values.isfinite()]
            if finite.numel() < values.numel():
                dropped = values.numel() - finite.numel()
                logger.warning("step %d: %d values of %s are not finite", step, dropped, name)
            if not finite.numel():
                continue
            h = Histogram.of(finite)
            line[name] = vars(h)
            self._board.add_histogram_raw(
                name,
                min=h.min,
                max=h.max,
                num=finite.numel(),
                sum=h.sum,
                sum_squares=h.sum_squares,
                bucket_limits=h.edges[1:],
                bucket_counts=h.counts,
                global_step=step,
            )
        self._append("histograms", line)

    def text(self, tag: str, text: str, step: int) -> None:
        """Log a text (TensorBoard renders Markdown)."""
        self._board.add_text(tag, text, step)
        self._board.flush()

    def samples(
        self, step: int, *, worst: Sequence[Trajectory], best: Sequence[Trajectory]
    ) -> None:
        """Log some responses for people to read: as lines of samples.jsonl, the worst first, and
        as two texts of TensorBoard, `samples/worst` and `samples/best`."""
        for name, trajectories in (("worst", worst), ("best", best)):
            for t in trajectories:
                line = {
                    "step": step,
                    "prompt": t.rollout.prompt.text,
                    "response": t.rollout.response_text,
                    "reward": t.reward if math.isfinite(t.reward) else None,
                    "answer": t.rollout.prompt.answer,
                }
                self._append("samples", line)
            text = "\n\n---\n\n".join(map(_sample_markdown, trajectories))
            self.text(f"samples/{name}", text or "None: all rewards are equal.", step)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        self._files[name].write(_json_line(line))
        self._files[name].flush()

    def close(self) -> None:
        self._board.close()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def worst_and_best(
    samples: Sequence[Sample],
    count: int = 3,
    *,
    reward: Callable[[Any], float] = lambda t: t.reward,
    prompt: Callable[[Any], str] = lambda t: t.rollout.prompt.id,
) -> tuple[list[Sample], list[Sample]]:
    """Samples to look at: of the lowest and of the highest reward, both from the extreme inwards.

    Args:
        samples: trajectories, or whatever `reward` and `prompt` know.
        count: at most so many of either.
        reward: of a sample; finite.
        prompt: what the samples of one prompt have in common.

    Returns:
        Neither has two samples of one prompt. The worst have less reward than any of the best, so
        there are none where all rewards are equal.
    """

    def one_per_prompt(ordered: Iterable[Sample]) -> list[Sample]:
        chosen: dict[str, Sample] = {}
        for sample in ordered:
            chosen.setdefault(prompt(sample), sample)
        return list(chosen.values())[:count]

    ranked = sorted(samples, key=reward)
    best = one_per_prompt(reversed(ranked))
    return one_per_prompt(s for s in ranked if reward(s) < reward(best[-1])), best


def _sample_markdown(t: Trajectory) -> str:
    """A sample as Markdown, in which what the model wrote stays as it is."""
    rollout = t.rollout
    answer = "" if rollout.prompt.answer is None else f", answer {_code(rollout.prompt.answer)}"
    length = f"{rollout.response_ids.numel()} tokens, finish: {rollout.finish_reason}"
    return (
        f"**reward {t.reward:g}**{answer} ({length})\n\n"
        f"prompt\n\n{_block(rollout.prompt.text)}\n\n"
        f"response\n\n{_block(rollout.response_text)}"
    )


def _block(text: str) -> str:
    """Indented lines are code to Markdown, whatever is in them; a fence could be closed."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _code(text: str) -> str:
    """One line of code, fenced by more backticks than it has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {' '.join(text.split())} {fence}"


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
