"""What the verbs of a server are called: vLLM and SGLang, as pure functions.

In: what is wanted. Out: the HTTP calls to make, and their answers read into records. Nothing here
talks to a network, so every rule can be tested without one.

vLLM (0.32): the routes besides /v1 exist with VLLM_SERVER_DEV_MODE=1 only. Its log-probs are those
of the sampled law with `--logprobs-mode processed_logprobs` alone. SGLang, after its documentation
and with `sampling_seed` (0.5.3 or newer): its log-probs are after temperature and before
truncation. Neither returns the ids that truncation kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from megatron_drpo.rollout.engine import Sampling
from megatron_drpo.types import FinishReason

# What is wanted of a server, and what it answers.


@dataclass(frozen=True)
class Job:
    """Responses to one prompt, in one HTTP request.

    Example: Job((5, 6, 14), samples=8, seed=17, max_tokens=256, sampling=Sampling(...))
    """

    prompt_ids: tuple[int, ...]
    samples: int
    seed: int
    """0 to 2^62; sample i draws with `seed + i`. A server's draws also depend on its batches."""
    max_tokens: int
    sampling: Sampling
    """Its own length limit and seed are not looked at."""


@dataclass(frozen=True)
class Response:
    """One sample of a job, as the server tells it. Example: Response([8, 2], [-0.2, -0.01], "stop")

    Dims: R tokens, K likeliest ids.
    """

    ids: list[int]
    """[R], the stop id included."""
    logprobs: list[float]
    """[R]."""
    finish_reason: FinishReason
    topk: list[list[tuple[int, float]]] | None = None
    """[R][K] ids and their log-probs, the likeliest first, with `record_topk`."""


@dataclass(frozen=True)
class DiskUpdate:
    """New weights in a Hugging Face directory that the server sees."""

    directory: str
    version: int


@dataclass(frozen=True)
class GroupOpen:
    """Join a process group over which weights will come; returns when all ranks have.

    Fields as of `weight_sync.receiver.WeightReceiver.init_group`.
    """

    master_address: str
    master_port: int
    rank_offset: int
    """Rank of the server's first worker."""
    world_size: int
    group_name: str
    backend: str
    timeout_seconds: float


@dataclass(frozen=True)
class GroupUpdate:
    """Receive tensors over the group, in this order, and load them.

    vLLM takes all of the model in one such update, SGLang any part.
    """

    group_name: str
    names: Sequence[str]
    shapes: Sequence[Sequence[int]]
    dtypes: Sequence[str]
    version: int | None
    """Of the weights, where this update completes them."""


@dataclass(frozen=True)
class GroupClose:
    """Leave the group."""

    group_name: str


Update = DiskUpdate | GroupOpen | GroupUpdate | GroupClose


@dataclass(frozen=True)
class Call:
    """One HTTP request."""

    method: Literal["GET", "POST"]
    path: str
    body: Mapping[str, Any] | None = None
    max_bytes: int = 1 << 22
    """Most that the answer may have."""
    plain: bool = False
    """The answer is not JSON, and only its status counts."""
    repeatable: bool = True
    """Sending it twice does what sending it once does."""
    accept: tuple[str, Any] | None = None
    """A field of the answer, and what it must be."""


class BadAnswerError(ValueError):
    """A server's answer is not what its dialect says; the text names the field."""


class Dialect(Protocol):
    """One kind of server."""

    @property
    def name(self) -> str:
        """As in `--rollout-engine`."""
        ...

    @property
    def hint(self) -> str:
        """What to do where a route other than that for generating is missing."""
        ...

    def ready(self) -> Call: ...
    def generate(self, job: Job) -> Call: ...
    def read_responses(self, job: Job, answer: Any) -> list[Response]:
        """Raises BadAnswerError."""
        ...

    def pause(self) -> Call:
        """Break off what runs: it returns with what it has, as `abort`; hold what comes."""
        ...

    def flush(self) -> Call:
        """Forget cached keys and values of prompts."""
        ...

    def update(self, update: Update) -> list[Call]: ...
    def version(self) -> Call: ...
    def read_version(self, answer: Any) -> str: ...
    def resume(self) -> Call: ...
    def world_size(self) -> Call: ...
    def read_world_size(self, answer: Any) -> int:
        """Workers that join a group."""
        ...


class Vllm:
    """vLLM's OpenAI-compatible server."""

    name = "vllm"
    hint = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"

    def ready(self) -> Call:
        return Call("GET", "/health", plain=True)

    def generate(self, job: Job) -> Call:
        sampling = job.sampling
        body: dict[str, Any] = {
            "prompt": [list(job.prompt_ids)],
            "n": job.samples,
            "max_tokens": job.max_tokens,
            "seed": job.seed,
            "logprobs": sampling.record_topk,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            # The model's eos may not be among the stop ids, which alone decide.
            "ignore_eos": True,
            "stop_token_ids": list(sampling.stop_ids),
            "stop": list(sampling.stop_strings),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }
        # What is not said, a generation_config.json on the server may decide.
        return Call(
            "POST",
            "/v1/completions",
            body | _law(sampling, no_top_k=0),
            _answer_bytes(job),
            repeatable=False,
        )

    def read_responses(self, job: Job, answer: Any) -> list[Response]:
        found = []
        for choice in _list(answer, "choices"):
            ids = _ids(choice, "token_ids")
            told = _field(choice, "logprobs", dict)
            logprobs = _numbers(told, "token_logprobs")
            topk = None
            if job.sampling.record_topk:
                topk = [
                    _likeliest(
                        [(_vllm_id(token), value) for token, value in entries.items()],
                        job.sampling.record_topk,
                    )
                    for entries in _list(told, "top_logprobs", dict)
                ]
            reason = _field(choice, "finish_reason", str)
            found.append(Response(ids, logprobs, _finish_reason(reason), topk))
        return found

    def pause(self) -> Call:
        return Call("POST", "/pause?mode=abort", accept=("status", "paused"))

    def flush(self) -> Call:
        return Call("POST", "/reset_prefix_cache", accept=("success", True))

    def update(self, update: Update) -> list[Call]:
        match update:
            case DiskUpdate(directory, version):
                reload = _rpc("reload_weights", {"weights_path": directory}, repeatable=True)
                return [reload, self._set_version(version)]
            case GroupOpen():
                return [_rpc("drpo_init_group", vars(update))]
            case GroupUpdate(_, names, shapes, dtypes, version):
                arguments = {
                    "names": list(names),
                    "shapes": [list(shape) for shape in shapes],
                    "dtypes": list(dtypes),
                }
                receive = _rpc("drpo_receive", arguments)
                return [receive] if version is None else [receive, self._set_version(version)]
            case GroupClose():
                return [_rpc("drpo_destroy_group", {}, repeatable=True)]

    def _set_version(self, version: int) -> Call:
        body = {"new_version": str(version)}
        return Call("POST", "/update_weight_version", body, accept=("success", True))

    def version(self) -> Call:
        return Call("GET", "/weight_info")

    def read_version(self, answer: Any) -> str:
        return _field(answer, "weight_version", str)

    def resume(self) -> Call:
        return Call("POST", "/resume", accept=("status", "resumed"))

    def world_size(self) -> Call:
        return Call("GET", "/get_world_size?include_dp=false")

    def read_world_size(self, answer: Any) -> int:
        return _field(answer, "world_size", int)


class Sglang:
    """SGLang's native routes."""

    name = "sglang"
    hint = "it takes SGLang 0.5.3 or newer"

    def ready(self) -> Call:
        return Call("GET", "/health", plain=True)

    def generate(self, job: Job) -> Call:
        sampling = job.sampling
        law = _law(sampling, no_top_k=-1) | {
            "max_new_tokens": job.max_tokens,
            # It would ignore stop ids as well.
            "ignore_eos": not sampling.stop_ids,
            "stop_token_ids": list(sampling.stop_ids),
            "stop": list(sampling.stop_strings),
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        # Not its `n`: the samples would share one seed. Some versions keep 32 bits of it.
        body = {
            "input_ids": [list(job.prompt_ids)] * job.samples,
            "sampling_params": [
                law | {"sampling_seed": (job.seed + sample) % (1 << 31)}
                for sample in range(job.samples)
            ],
            "return_logprob": True,
            "top_logprobs_num": sampling.record_topk,
            "stream": False,
        }
        return Call("POST", "/generate", body, _answer_bytes(job), repeatable=False)

    def read_responses(self, job: Job, answer: Any) -> list[Response]:
        found = []
        for item in _list({"answer": answer}, "answer", dict):
            told = _field(item, "meta_info", dict)
            reason = _field(_field(told, "finish_reason", dict), "type", str)
            # What never ran has no log-probs at all.
            drawn = _pairs(told.get("output_token_logprobs") or [])
            topk = None
            if job.sampling.record_topk:
                topk = [
                    _likeliest(_pairs(entries), job.sampling.record_topk)
                    for entries in told.get("output_top_logprobs") or []
                ]
            found.append(
                Response(
                    [token for token, _ in drawn],
                    [value for _, value in drawn],
                    _finish_reason(reason),
                    topk,
                )
            )
        return found

    def pause(self) -> Call:
        return Call("POST", "/pause_generation", {"mode": "abort"}, plain=True)

    def flush(self) -> Call:
        return Call("POST", "/flush_cache", plain=True)

    def update(self, update: Update) -> list[Call]:
        done = ("success", True)
        match update:
            case DiskUpdate(directory, version):
                body = {
                    "model_path": directory,
                    "weight_version": str(version),
                    "flush_cache": True,
                }
                return [Call("POST", "/update_weights_from_disk", body, accept=done)]
            case GroupOpen():
                body = {key: value for key, value in vars(update).items() if key not in _OURS}
                return [
                    Call("POST", "/init_weights_update_group", body, repeatable=False, accept=done)
                ]
            case GroupUpdate(group_name, names, shapes, dtypes, version):
                body = {
                    "group_name": group_name,
                    "names": list(names),
                    "shapes": [list(shape) for shape in shapes],
                    "dtypes": list(dtypes),
                    "flush_cache": version is not None,
                }
                if version is not None:
                    body["weight_version"] = str(version)
                return [
                    Call(
                        "POST",
                        "/update_weights_from_distributed",
                        body,
                        repeatable=False,
                        accept=done,
                    )
                ]
            case GroupClose(group_name):
                body = {"group_name": group_name}
                return [Call("POST", "/destroy_weights_update_group", body, accept=done)]

    def version(self) -> Call:
        return Call("GET", "/get_model_info")

    def read_version(self, answer: Any) -> str:
        return _field(answer, "weight_version", str)

    def resume(self) -> Call:
        return Call("POST", "/continue_generation", {}, plain=True)

    def world_size(self) -> Call:
        return Call("GET", "/get_server_info")

    def read_world_size(self, answer: Any) -> int:
        # Its workers find their place in a group by their tensor-parallel rank alone.
        for name in ("pp_size", "dp_size"):
            if answer.get(name, 1) != 1:
                raise BadAnswerError(
                    f"{name} is {str(answer[name])[:40]}, and a weight group takes 1; start "
                    "it so, or use --weight-sync disk"
                )
        return _field(answer, "tp_size", int)


DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (Vllm(), Sglang())}
"""By `--rollout-engine`."""

_OURS = ("timeout_seconds",)
"""What SGLang's workers do not take."""


def _law(sampling: Sampling, no_top_k: int) -> dict[str, Any]:
    """Everything that shapes the sampled law, said in full."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or no_top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def _answer_bytes(job: Job) -> int:
    """A generous limit: a token's text has at most some hundred bytes, and its numbers fewer."""
    tokens = job.samples * job.max_tokens + len(job.prompt_ids) * job.samples
    return (1 << 20) + tokens * (1024 + 128 * job.sampling.record_topk)


def _rpc(method: str, arguments: Mapping[str, Any], *, repeatable: bool = False) -> Call:
    body = {"method": method, "kwargs": dict(arguments)}
    return Call("POST", "/collective_rpc", body, repeatable=repeatable)


# Reading answers: each function names the field that is wrong.


def _field(answer: Any, name: str, kind: type) -> Any:
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise BadAnswerError(f"{name} is not {_KINDS[kind]} in its answer")
    return value


_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def _list(answer: Any, name: str, kind: type = dict) -> list[Any]:
    values = _field(answer, name, list)
    if not all(isinstance(value, kind) for value in values):
        raise BadAnswerError(f"{name} holds something else than {_KINDS[kind]} in its answer")
    return values


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ids(answer: Any, name: str) -> list[int]:
    values = _field(answer, name, list)
    if not all(map(_is_id, values)):
        raise BadAnswerError(f"{name} holds something else than token ids")
    return values


def _numbers(answer: Any, name: str) -> list[float]:
    values = _field(answer, name, list)
    if not all(map(_is_number, values)):
        raise BadAnswerError(f"{name} holds something else than finite numbers")
    return [float(value) for value in values]


def _vllm_id(token: str) -> int:
    number = token.removeprefix("token_id:")
    if not (number.isascii() and number.isdigit() and number != token):
        raise BadAnswerError(f"top_logprobs names a token {token[:40]!r} and not its id")
    return int(number)


def _pairs(entries: Any) -> list[tuple[int, float]]:
    """SGLang's [log-prob, id, text] as (id, log-prob)."""
    found = []
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, list) or len(entry) < 2:
            raise BadAnswerError("a log-prob is not a list [log-prob, id, text]")
        if not _is_number(entry[0]) or not _is_id(entry[1]):
            raise BadAnswerError("a log-prob is not a finite number with a token id")
        found.append((entry[1], float(entry[0])))
    return found


def _likeliest(entries: list[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """Among them may be the sampled id, in addition."""
    if not all(_is_number(value) for _, value in entries):
        raise BadAnswerError("top_logprobs holds something else than finite numbers")
    if len(entries) < count:
        raise BadAnswerError(f"a token has {len(entries)} likeliest ids where {count} were wanted")
    return sorted(entries, key=lambda entry: -entry[1])[:count]


def _finish_reason(reason: str) -> FinishReason:
    if reason not in ("stop", "length", "abort"):
        raise BadAnswerError(f"finish reason {reason[:40]!r} is unknown")
    return cast(FinishReason, reason)
