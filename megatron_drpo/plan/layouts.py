"""Layouts: which are possible, and of those that are not, what is near.

A layout is `ParallelConfig` and a number of ranks. What its records refuse by themselves (sequence
parallelism without tensor parallelism, chunks without a pipeline) is not repeated here; everything
that needs the number of ranks, the model or another group of the configuration is, so that nothing
which passes ends in one of Megatron's own checks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.config import Config, ParallelConfig, flag

NUM_NEAREST = 3
"""Possible layouts that an error names."""

_MORE_CHUNKS = (2, 3, 4, 6)

_FIRST, _LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    "expert_model_parallel_size",
)
_BESIDES = (
    *("expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank"),
    *("sequence_parallel", _FIRST, _LAST),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a possible layout, as `mcore.parallel.Layout` has them.

    Example: Shape.of(ParallelConfig(tensor_model_parallel_size=2), 8) has dp 4 and edp 4.
    """

    world_size: int
    tp: int
    pp: int
    vp: int
    """Model chunks of a pipeline rank."""
    cp: int
    dp: int
    ep: int
    etp: int
    edp: int
    """Ranks that hold the same experts."""
    sequence_parallel: bool

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Shape:
        """The sizes that follow."""
        return cls(
            world_size=world_size,
            tp=parallel.tensor_model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            vp=parallel.num_virtual_stages_per_pipeline_rank,
            cp=parallel.context_parallel_size,
            dp=world_size // parallel.model_parallel_size,
            ep=parallel.expert_model_parallel_size,
            etp=parallel.expert_tensor_size,
            edp=world_size // parallel.expert_parallel_ranks,
            sequence_parallel=parallel.sequence_parallel,
        )

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same dense layers: their gradients are summed."""
        return self.dp * self.cp

    @property
    def split_rows(self) -> int:
        """Ranks that share a row's tokens out between the tensor-parallel parts of a layer."""
        return self.cp * (self.tp if self.sequence_parallel else 1)

    @property
    def sequence_multiple(self) -> int:
        """What the tokens that a sequence takes up in a row are a multiple of."""
        return 2 * self.cp if self.cp > 1 else 1

    def row_multiple(self, products: int = 1) -> int:
        """What the tokens of a row are a multiple of, where those of a product of matrices are one
        of `products` (`PrecisionConfig.row_multiple`)."""
        return self.cp * math.lcm(16, products * self.split_rows // self.cp)

    def __str__(self) -> str:
        chunks = f" x {self.vp} chunks" if self.vp > 1 else ""
        experts = f", EP {self.ep}" if self.ep > 1 else ""
        experts += f", expert TP {self.etp}" if self.etp != self.tp else ""
        return (
            f"TP {self.tp}{' with SP' if self.sequence_parallel else ''} x PP {self.pp}{chunks} x "
            + (f"CP {self.cp} x " if self.cp > 1 else "")
            + f"DP {self.dp}{experts}"
        )


def stage_layers(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, all of its chunks together.

    Raises:
        ValueError: there is no such split; says why.
    """
    stages, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
    )
    first, last = (getattr(parallel, name) for name in (_FIRST, _LAST))
    given = [count for count in (first, last) if count is not None]
    middle, left = stages - len(given), num_layers - sum(given)
    if left < 0 or (middle == 0) != (left == 0):
        raise ValueError(
            f"{sum(given)} of {num_layers} layers are given away, which leaves {left} for the "
            f"other {middle} stages"
        )
    if middle and left % middle:
        raise ValueError(f"{left} layers cannot be shared out equally over {middle} stages")
    each = left // middle if middle else 0
    counts = [each] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    for count in counts:
        if count % chunks:
            raise ValueError(f"a stage's {count} layers cannot be cut into {chunks} chunks")
    return tuple(counts)


def problems(
    config: Config,
    world_size: int,
    architecture: Architecture | None,
    reference: Architecture | None = None,
) -> list[str]:
    """Why this layout is impossible: a message for each reason, none if it is possible.

    Args:
        architecture: of the policy; None where that is not known, and only ranks are checked.
        reference: of a frozen model in the same layout.

    The last message names the nearest layouts that are possible.
    """
    found = _broken(config, config.parallel, world_size, architecture)
    if reference is not None and reference != architecture:
        found += _model_problems(config.parallel, reference, "the reference model", trained=False)
    if found and architecture is not None:
        found[-1] += f"; {_nearest_text(config, world_size, architecture, reference)}"
    return found


def possible(
    config: Config,
    world_size: int,
    architecture: Architecture,
    reference: Architecture | None = None,
) -> Iterator[ParallelConfig]:
    """Layouts of `world_size` ranks that are possible with the rest of the configuration.

    Pipelines are tried with the configuration's chunks and stages, with fewer and more chunks, and
    where the layers cannot be shared out evenly with fewer of them on the first and last stage.
    """
    models = [model for model in (architecture, reference) if model is not None]
    for candidate in _candidates(config, world_size, models):
        if _broken(config, candidate, world_size, architecture):
            continue
        if reference and _model_problems(candidate, reference, "", trained=False):
            continue
        yield candidate


def nearest(
    config: Config,
    world_size: int,
    architecture: Architecture,
    reference: Architecture | None = None,
) -> list[ParallelConfig]:
    """Those of `possible`, nearest to the configuration's first.

    Distance counts doublings of (TP, PP, CP, EP), and half a doubling for each other setting that
    has to change with them.
    """
    present = config.parallel

    def distance(other: ParallelConfig) -> tuple[float, ...]:
        steps = [abs(math.log2(getattr(other, n) / getattr(present, n))) for n in _SIZES]
        changed = sum(getattr(other, n) != getattr(present, n) for n in _BESIDES)
        return (sum(steps) + changed / 2, *(getattr(other, name) for name in _SIZES))

    return sorted(possible(config, world_size, architecture, reference), key=distance)


def flags_of(parallel: ParallelConfig, present: ParallelConfig | None = None) -> str:
    """A layout as flags: those whose value differs from `present`'s, by default from 1 and off.

    Example: "--tensor-model-parallel-size 4 --sequence-parallel"
    """
    present = present or ParallelConfig()
    words = []
    for name in (*_SIZES, *_BESIDES):
        value = getattr(parallel, name)
        if value == getattr(present, name):
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            words.append(f"{flag(name)} {value}")
    return " ".join(words)


# --- The rules ----------------------------------------------------------------------------------


def _broken(
    config: Config, parallel: ParallelConfig, world_size: int, architecture: Architecture | None
) -> list[str]:
    """Every rule that `parallel` breaks, with the other groups as `config` has them."""
    found = _rank_problems(config, parallel, world_size)
    if architecture is not None:
        found += _model_problems(parallel, architecture, "the model", trained=True)
    return found


def _rank_problems(config: Config, parallel: ParallelConfig, world_size: int) -> list[str]:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, size = parallel.context_parallel_size, parallel.model_parallel_size
    if world_size % size or world_size < size:
        named = " ".join(
            f"{flag(name)} {getattr(parallel, name)}"
            for name in _SIZES[:3]
            if getattr(parallel, name) > 1
        )
        return [
            f"{named}: need a multiple of {size} ranks, but there are {world_size}; start them "
            f"with torchrun --nproc-per-node {size}, or with NPROC_PER_NODE={size} in the "
            "environment of bash examples/train_drpo_gpt.sh"
        ]
    found = []
    replicas, per_step = world_size // (tp * pp), config.rollout.rollout_prompts_per_step
    divided = f"{world_size} ranks / {tp} TP / {pp} PP"
    if per_step % replicas:
        found.append(
            f"--rollout-prompts-per-step {per_step}: must be a multiple of the {replicas} replicas "
            f"that share it out ({divided}); use {_multiple_near(per_step, replicas)}"
        )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    stage = world_size // pp
    if stage % (ep * etp):
        fitting = [size for size in _divisors(stage) if not stage % (size * etp)]
        also = "" if etp == 1 else f" with experts split over {etp} ranks (expert TP)"
        found.append(
            f"--expert-model-parallel-size {ep}: needs{also} a multiple of {ep * etp} ranks in "
            f"each pipeline stage, but there are {stage} ({world_size} ranks / {pp} PP); "
            + (f"use one of {_listed(fitting)}" if fitting else "lower expert TP")
        )
    budget = config.train.max_tokens_per_microbatch
    if cp > 1 and budget < 2 * cp:
        found.append(
            f"--context-parallel-size {cp}: cuts every sequence into {2 * cp} pieces, but "
            f"--max-tokens-per-microbatch {budget} has no room for one token in each; raise it, or "
            f"use at most {max(budget // 2, 1)}"
        )
    return found


def _model_problems(
    parallel: ParallelConfig, architecture: Architecture, whose: str, *, trained: bool
) -> list[str]:
    """Of one model, the policy (`trained`) or a frozen one."""
    found = _tensor_problems(parallel, architecture, whose)
    stages, virtual = (
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
    )
    try:
        stage_layers(parallel, architecture.num_layers)
    except ValueError as error:
        uneven = [name for name in (_FIRST, _LAST) if getattr(parallel, name) is not None]
        named = [f"{flag(name)} {getattr(parallel, name)}" for name in uneven]
        fitting = _divisors(architecture.num_layers)
        found.append(
            f"--pipeline-model-parallel-size {stages} --num-virtual-stages-per-pipeline-rank "
            f"{virtual}{''.join(' ' + name for name in named)}: do not fit num_layers "
            f"{architecture.num_layers} of {whose} (config.json): {error}; without uneven stages "
            f"their product, now {stages * virtual}, must be among {_listed(fitting)}"
        )
    experts, ep = architecture.num_experts, parallel.expert_model_parallel_size
    if experts % ep:
        fitting = _divisors(experts)
        found.append(
            f"--expert-model-parallel-size {ep}: does not divide num_experts {experts} of {whose} "
            f"(config.json); use one of {_listed(fitting)}"
        )
    tp, shared = parallel.tensor_model_parallel_size, ep * parallel.expert_tensor_size
    if experts and shared % tp and tp % shared:
        # Replicas that share experts generate in step; here one would belong to two such sets.
        found.append(
            f"--tensor-model-parallel-size {tp} --expert-model-parallel-size {ep} "
            f"--expert-tensor-parallel-size {parallel.expert_tensor_size}: the {tp} ranks of TP "
            f"would share experts with different ranks, as neither {tp} nor EP x expert TP "
            f"{shared} divides the other; use sizes that do"
        )
    return found + (_training_problems(parallel, architecture) if trained else [])


def _tensor_problems(parallel: ParallelConfig, architecture: Architecture, whose: str) -> list[str]:
    """What tensor parallelism cuts must be whole on every rank."""
    heads = {
        name: getattr(architecture, name) for name in ("num_attention_heads", "num_query_groups")
    }
    width = {"ffn_hidden_size": architecture.ffn_hidden_size}
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_size
    named, expert = f"--tensor-model-parallel-size {tp}", parallel.expert_tensor_parallel_size
    if not architecture.num_experts:
        return _not_divided(named, tp, heads | width, whose)
    if expert is None:  # one flag has to fit both
        return _not_divided(named, tp, heads | width, whose)
    return _not_divided(named, tp, heads, whose) + _not_divided(
        f"--expert-tensor-parallel-size {etp}", etp, width, whose
    )


def _not_divided(named: str, size: int, totals: dict[str, int], whose: str) -> list[str]:
    uneven = [f"{name} {total}" for name, total in totals.items() if total % size]
    if not uneven:
        return []
    fitting = _divisors(math.gcd(*totals.values()))
    return [
        f"{named}: does not divide {', '.join(uneven)} of {whose} (config.json); use one of "
        + _listed(fitting)
    ]


def _training_problems(parallel: ParallelConfig, architecture: Architecture) -> list[str]:
    """What Megatron asks of a mixture of experts that is trained, beyond its sizes."""
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    etp, found = parallel.expert_tensor_parallel_size, []
    if not architecture.num_experts:
        unread = {
            "expert_model_parallel_size": ep if ep > 1 else None,
            "expert_tensor_parallel_size": etp,
        }
        return [
            f"{flag(name)} {value}: the model has no experts (config.json); drop it, and use "
            "--tensor-model-parallel-size to split the layers"
            for name, value in unread.items()
            if value is not None
        ]
    if tp > 1 and not parallel.sequence_parallel:
        found.append(
            f"--tensor-model-parallel-size {tp}: the model has {architecture.num_experts} experts "
            "in each layer, and Megatron trains those under tensor parallelism with sequence "
            "parallelism only; add --sequence-parallel"
        )
    return found


# --- What is near -------------------------------------------------------------------------------


def _candidates(
    config: Config, world_size: int, models: Sequence[Architecture]
) -> Iterator[ParallelConfig]:
    """Layouts that the number of ranks and the heads allow, each with what has to follow from it:
    sequence parallelism where experts need it, nothing that needs a pipeline without one."""
    heads = math.gcd(*(n for m in models for n in (m.num_attention_heads, m.num_query_groups)))
    experts = math.gcd(*(model.num_experts for model in models))
    deepest = min(model.num_layers for model in models)
    pieces = config.train.max_tokens_per_microbatch // 2
    for tp in _divisors(math.gcd(world_size, heads)):
        for pp in (size for size in _divisors(world_size // tp) if size <= deepest):
            for cp in (size for size in _divisors(world_size // tp // pp) if size <= pieces):
                for ep in _divisors(math.gcd(experts, world_size // pp)) if experts else [1]:
                    sizes = dict(zip(_SIZES, (tp, pp, cp, ep), strict=True))
                    yield from _variants(config.parallel, sizes, bool(experts), deepest)


def _variants(
    present: ParallelConfig, sizes: dict[str, int], has_experts: bool, num_layers: int
) -> Iterator[ParallelConfig]:
    """One layout with the other settings as they are, as far as they go with these sizes, at their
    defaults, and at what else may suit it."""
    tp, pp, _, _ = sizes.values()
    virtual, etp = (
        present.num_virtual_stages_per_pipeline_rank,
        present.expert_tensor_parallel_size,
    )
    given = (getattr(present, _FIRST), getattr(present, _LAST))
    choices = itertools.product(
        {etp, None, 1 if tp > 1 else None} if has_experts else {None},
        {virtual, 1, *_MORE_CHUNKS} if pp > 1 else {1},
        {given, (None, None), _lighter_ends(pp, num_layers)} if pp > 1 else {(None, None)},
    )
    for etp, virtual, (first, last) in choices:
        given = [count for count in (first, last) if count is not None]
        middle = pp - len(given)
        if any(count % virtual for count in given) or (
            middle and (num_layers - sum(given)) % (middle * virtual)
        ):
            continue
        yield replace(
            present,
            **sizes,
            expert_tensor_parallel_size=etp,
            num_virtual_stages_per_pipeline_rank=virtual,
            sequence_parallel=tp > 1 and (present.sequence_parallel or has_experts),
            **{_FIRST: first, _LAST: last},
        )


def _lighter_ends(stages: int, num_layers: int) -> tuple[int | None, int | None]:
    """Layers of the first and the last stage that leave the others an equal number each; none where
    all can have that."""
    each = -(-num_layers // stages)
    left = num_layers - each * (stages - 2)
    if num_layers % stages == 0 or left < 2:
        return None, None
    return left // 2, left - left // 2


def _nearest_text(
    config: Config, world_size: int, architecture: Architecture, reference: Architecture | None
) -> str:
    found = nearest(config, world_size, architecture, reference)[:NUM_NEAREST]
    if not found:
        return (
            f"no layout of {world_size} ranks is possible with this model and "
            f"--rollout-prompts-per-step {config.rollout.rollout_prompts_per_step}"
        )
    texts = [
        f"{flags_of(parallel, config.parallel)} ({Shape.of(parallel, world_size)})"
        for parallel in found
    ]
    return f"nearest possible layouts of {world_size} ranks: " + ", or ".join(texts)


def _multiple_near(number: int, of: int) -> int:
    return max(of, round(number / of) * of)


def _divisors(number: int) -> list[int]:
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
