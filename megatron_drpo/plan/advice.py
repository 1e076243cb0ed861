"""Settings that are allowed, and yet are probably not meant: warnings, each with its remedy.

What cannot be run at all is refused elsewhere (`layouts`, `preflight`); nothing here stops a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_drpo.plan.job import Job
from megatron_drpo.plan.speed import BUSY_EXPERT, bubble

_LONG_BUBBLE = 1 / 3
_SHORT_PIECE = 64


@dataclass(frozen=True)
class Texts:
    """What is known of the tokenizer and the prompts. Example: Texts(eos_id=2, stop_ids=(2,),
    has_chat_template=False, plain_prompt="1+1=")"""

    eos_id: int | None
    """The tokenizer's own end of a text."""
    stop_ids: tuple[int, ...]
    """What ends a response."""
    has_chat_template: bool
    plain_prompt: str | None
    """A prompt without any special token in it, if there is one."""


def warnings(job: Job, texts: Texts | None = None) -> list[str]:
    """What a person may want to look at before starting this run."""
    found = [*_of_precision(job), *_of_layout(job), *_of_memory(job)]
    return found + ([] if texts is None else [*_of_texts(job, texts)])


def _of_precision(job: Job) -> Iterator[str]:
    stored, bf16 = job.architecture.hf_dtype, job.config.model.bf16
    if stored == "bfloat16" and not bf16 and job.gpu:
        yield (
            "--no-bf16: the checkpoint is stored in bfloat16, and this run computes in fp32, in "
            "twice the memory and several times the time; add --bf16 unless that is meant"
        )
    if stored == "float32" and bf16:
        yield (
            "--bf16: the checkpoint is stored in float32, and its weights are rounded; master "
            "weights start from the rounded ones"
        )


def _of_layout(job: Job) -> Iterator[str]:
    shape, rows, train = job.shape, job.rows, job.config.train
    waits = bubble(job)
    if waits > _LONG_BUBBLE:
        yield (
            f"--pipeline-model-parallel-size {shape.pp}: an update has {rows.count} micro-batch(es)"
            f" on each replica, so that a rank waits {waits:.0%} of the time; use fewer stages, "
            f"lower --max-tokens-per-microbatch {train.max_tokens_per_microbatch}, or raise "
            "--num-virtual-stages-per-pipeline-rank"
        )
    if job.samples_per_update < shape.dp:
        yield (
            f"--updates-per-rollout {train.updates_per_rollout}: an update has "
            f"{job.samples_per_update} sequences for {shape.dp} data-parallel replicas, so that "
            "some train on nothing; lower it, or raise --rollout-prompts-per-step"
        )
    piece = job.longest // (2 * shape.cp)
    if shape.cp > 1 and piece < _SHORT_PIECE:
        yield (
            f"--context-parallel-size {shape.cp}: sequences of at most {job.longest} tokens are "
            f"cut into pieces of {piece}; with data parallelism instead the ranks would wait less"
        )
    met = job.tokens_per_expert
    if job.gpu and 0 < met < BUSY_EXPERT:
        yield (
            f"--max-tokens-per-microbatch {train.max_tokens_per_microbatch}: an expert sees about "
            f"{met:.0f} tokens of a micro-batch, and below {BUSY_EXPERT} its products wait for its "
            f"weights; raise it, or --expert-model-parallel-size {shape.ep}"
        )


def _of_memory(job: Job) -> Iterator[str]:
    if job.shape.tp > 1 and not job.shape.sequence_parallel and job.gpu:
        yield (
            f"--tensor-model-parallel-size {job.shape.tp}: without --sequence-parallel each of "
            "these ranks keeps all activations between attention and MLP; add it"
        )


def _of_texts(job: Job, texts: Texts) -> Iterator[str]:
    ids = " ".join(map(str, texts.stop_ids))
    if texts.eos_id is not None and texts.eos_id not in texts.stop_ids:
        yield (
            f"--rollout-stop-ids: the tokenizer ends a text with id {texts.eos_id}, but a response "
            f"ends with {ids} only (eos_token_id of generation_config.json or config.json); add "
            f"{texts.eos_id} if it is to end one, too"
        )
    plain, data = texts.plain_prompt, job.config.data
    if texts.has_chat_template and plain is not None and not data.apply_chat_template:
        yield (
            f"--no-apply-chat-template: the tokenizer has a chat template, and prompts such as "
            f"{plain[:40]!r} reach the model without it; add --apply-chat-template if the model "
            "was trained to chat"
        )
