"""The configuration: frozen records that check themselves when built.

A field's name is its flag (`rollout_top_p` is `--rollout-top-p`) and its key in a YAML file; fields
that Megatron-LM also has carry Megatron's names. Checks across groups are in `Config`; what needs
files, the model or the number of ranks is checked by `megatron_drpo.cli` before any process group.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_drpo.errors import ConfigError

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KlEstimator = Literal["k1", "k2", "k3", "full"]


def flag(name: str) -> str:
    """`rollout_top_p` -> `--rollout-top-p`."""
    return "--" + name.replace("_", "-")


def _broken(group: object, **rules: tuple[bool, str]) -> list[str]:
    """A message for every broken rule: name=(holds, what is required)."""
    return [
        f"{flag(name)} {getattr(group, name)}: must be {need}"
        for name, (holds, need) in rules.items()
        if not holds
    ]


def _raise_if_any(problems: list[str]) -> None:
    """Raise one ConfigError that lists all of them."""
    if problems:
        raise ConfigError("\n".join(problems))


def _check(group: object, **rules: tuple[bool, str]) -> None:
    """Raise one ConfigError that lists every broken rule: name=(holds, what is required)."""
    _raise_if_any(_broken(group, **rules))


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    hf_model: str | None = None
    """Directory of a Hugging Face checkpoint (config.json, safetensors, tokenizer): the start."""
    load: str | None = None
    """Megatron checkpoint (torch_dist) to take the weights from instead of --hf-model's: of
    tools/convert_checkpoint.py, of Megatron-LM or of an earlier run. One that holds config.json and
    a tokenizer needs no --hf-model."""
    verify_weights: bool = True
    """Hash the weights before training and compare them with the manifest.json beside them (of a
    training checkpoint: state.json), where there is one; a difference stops the run. The ranks
    share the work, so it is one copy that is verified, on storage that all of them see."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto takes Transformer Engine where it is installed with a GPU."""
    bf16: bool = False
    """bf16 weights and activations, with fp32 master weights and fp32 gradient reduction."""

    def __post_init__(self) -> None:
        if not self.hf_model and not self.load:
            raise ConfigError(
                "--hf-model: give the directory of a Hugging Face checkpoint, or a Megatron one "
                "with --load"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over ranks; data parallelism takes what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the stack of layers."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Model chunks per pipeline rank: above 1, the interleaved schedule."""
    expert_model_parallel_size: int = 1
    """Ranks that share out the experts of a mixture of experts among themselves."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda (NCCL) where torch sees a GPU, else cpu (gloo)."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run with an error."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel parts of a layer over the tensor-parallel ranks
    as well; a mixture of experts needs it there."""
    context_parallel_size: int = 1
    """Ranks that split each sequence, two pieces each so that attention costs all of them the
    same."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each expert; by default --tensor-model-parallel-size."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage, where it is to have another number than the rest."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage, likewise."""

    def __post_init__(self) -> None:
        virtual, etp = (
            self.num_virtual_stages_per_pipeline_rank,
            self.expert_tensor_parallel_size,
        )
        uneven = {
            name: (
                getattr(self, name) is None
                or (getattr(self, name) >= 1 and self.pipeline_model_parallel_size > 1),
                "at least 1, and needs --pipeline-model-parallel-size of at least 2",
            )
            for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        }
        _check(
            self,
            tensor_model_parallel_size=(self.tensor_model_parallel_size >= 1, "at least 1"),
            pipeline_model_parallel_size=(self.pipeline_model_parallel_size >= 1, "at least 1"),
            num_virtual_stages_per_pipeline_rank=(
                virtual == 1 or (virtual > 1 and self.pipeline_model_parallel_size > 1),
                "1, or more than 1 with --pipeline-model-parallel-size of at least 2",
            ),
            expert_model_parallel_size=(self.expert_model_parallel_size >= 1, "at least 1"),
            distributed_timeout_minutes=(self.distributed_timeout_minutes > 0, "above 0"),
            sequence_parallel=(
                not self.sequence_parallel or self.tensor_model_parallel_size > 1,
                "off, or used with --tensor-model-parallel-size of at least 2",
            ),
            context_parallel_size=(self.context_parallel_size >= 1, "at least 1"),
            expert_tensor_parallel_size=(etp is None or etp >= 1, "at least 1"),
            **uneven,
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one replica of the dense layers: what the number of ranks is a multiple of."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def expert_tensor_size(self) -> int:
        """`--expert-tensor-parallel-size` with its default resolved."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_parallel_ranks(self) -> int:
        """Ranks of one replica of the experts, over all pipeline stages."""
        return (
            self.expert_tensor_size
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )


RecomputeModule = Literal["core_attn", "moe_act", "layernorm", "mlp", "moe"]
OffloadModule = Literal[
    "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"
]


@dataclass(frozen=True)
class PrecisionConfig:
    """Numbers of less than 16 bits in the layers' products, and of 32 in the output layer."""

    fp32_output_layer: bool = False
    """With --bf16: keep the output layer's weight in fp32 and multiply it in fp32."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute the products of the linear layers in FP8 (Transformer Engine): e4m3 throughout, or
    hybrid, with e5m2 for gradients."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How FP8 numbers are scaled: per tensor by the largest value of the past (delayed) or of the
    present (tensorwise), per block of 128 (blockwise, Hopper and later), or per 32 values (mxfp8,
    Blackwell). Delayed is Megatron's default; docs/precision.md says why blockwise and mxfp8 suit
    generation better."""
    fp8_margin: int = 0
    """Powers of two that delayed scaling stays below the largest FP8 number."""
    fp8_amax_history_len: int = 1
    """Micro-batches that delayed scaling looks back."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """What delayed scaling takes of them."""
    fp8_param_gather: bool = False
    """Keep the weights of the linear layers in FP8, and gather them so from the distributed
    optimizer."""
    first_last_layers_bf16: bool = False
    """Leave the first and the last layers in bf16."""
    num_layers_at_start_in_bf16: int = 1
    """How many first layers --first-last-layers-bf16 leaves in bf16."""
    num_layers_at_end_in_bf16: int = 1
    """How many last layers --first-last-layers-bf16 leaves in bf16."""

    def __post_init__(self) -> None:
        _check(
            self,
            fp8_amax_history_len=(self.fp8_amax_history_len >= 1, "at least 1"),
            num_layers_at_start_in_bf16=(self.num_layers_at_start_in_bf16 >= 0, "0 or more"),
            num_layers_at_end_in_bf16=(self.num_layers_at_end_in_bf16 >= 0, "0 or more"),
        )

    @property
    def row_multiple(self) -> int:
        """What the number of tokens in a product of matrices must be a multiple of."""
        if self.fp8_format is None:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16


@dataclass(frozen=True)
class MemoryConfig:
    """Activations that are computed again, or moved to the host, rather than kept on the device."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Compute whole layers again in the backward pass (full), or chosen parts of each
    (selective)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: keep the input of every --recompute-num-layers layers (uniform), or recompute the
    first --recompute-num-layers layers of each stage only (block)."""
    recompute_num_layers: int | None = None
    """See --recompute-method."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """With selective: what is computed again."""
    fine_grained_activation_offloading: bool = False
    """Move the inputs of --offload-modules to the host between forward and backward pass; needs
    Transformer Engine."""
    offload_modules: tuple[OffloadModule, ...] = ()
    """See --fine-grained-activation-offloading."""

    def __post_init__(self) -> None:
        granularity, count = self.recompute_granularity, self.recompute_num_layers
        again, moved = self.recompute_modules, self.offload_modules
        problems = _broken(self, recompute_num_layers=(count is None or count >= 1, "at least 1"))
        if granularity == "full" and (self.recompute_method is None or count is None):
            problems.append(
                f"--recompute-granularity full: needs --recompute-method (is "
                f"{self.recompute_method}) and --recompute-num-layers (is {count}), such as "
                "uniform and 1"
            )
        if granularity == "selective" and not again:
            problems.append(
                "--recompute-modules: --recompute-granularity selective needs at least one of "
                + ", ".join(get_args(RecomputeModule))
            )
        if not self.fine_grained_activation_offloading:
            _raise_if_any(problems)
            return
        if not moved:
            problems.append(
                "--fine-grained-activation-offloading: needs --offload-modules, of "
                + ", ".join(get_args(OffloadModule))
            )
        if "attn_proj" in moved and "core_attn" not in moved:
            problems.append(
                f"--offload-modules {' '.join(moved)}: attn_proj's input is core_attn's result, "
                "which that keeps on the device; add core_attn"
            )
        if granularity == "full":
            problems.append(
                "--recompute-granularity full --fine-grained-activation-offloading: whole layers "
                "that are computed again keep nothing inside that could be moved; use selective, "
                "or drop one of both"
            )
        both = {"core_attn": {"core_attn"}, "moe": {"expert_fc1", "moe_act"}}
        for name in again if granularity == "selective" else ():
            twice = [module for module in moved if module in both.get(name, ())]
            if twice:
                problems.append(
                    f"--recompute-modules {name} --offload-modules {' '.join(twice)}: what is "
                    "computed again keeps nothing that could be moved; drop one of both"
                )
        _raise_if_any(problems)


@dataclass(frozen=True)
class MoEConfig:
    """Training a mixture of experts."""

    moe_routing_replay: Literal["off", "rollout", "score"] = "off"
    """Train with the experts that each token was routed to while it was generated (rollout), or
    when the batch was scored before its first update (score), so that a step's updates see one
    routing."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts: JSONL, one object per line with `prompt` (text, or chat messages) and `answer`."""

    prompts: str | None = None
    """Training prompts; not needed with --rollouts-file."""
    eval_prompts: str | None = None
    """Held-out prompts; without them no evaluation is made."""
    apply_chat_template: bool = False
    """Put a text prompt through the tokenizer's chat template (chat messages always are)."""
    shuffle_prompts: bool = True
    """Draw the prompts of each epoch in an order given by --seed."""


@dataclass(frozen=True)
class RolloutConfig:
    """How training responses come about: generated, by which engine, and under which law."""

    rollout_engine: Literal["inprocess", "vllm", "sglang"] = "inprocess"
    """inprocess: the training process, with the training weights; vllm, sglang: HTTP servers
    (--rollout-servers)."""
    rollout_servers: tuple[str, ...] = ()
    """Addresses of the servers, such as http://10.0.0.7:8000; work is balanced over them."""
    rollout_server_timeout_seconds: float = 300.0
    """Time that a server may take for one request."""
    rollout_server_retries: int = 2
    """How often a request is sent again, to another server where there is one, after a connection
    failed, or a server was late or answered 429 or 5xx."""
    rollout_prompts_per_step: int = 64
    """Prompts per rollout batch, over all data-parallel ranks."""
    rollout_samples_per_prompt: int = 8
    """Responses per prompt: the group over which advantages are centred."""
    rollout_max_response_length: int = 256
    """A response stops at this many tokens (finish reason `length`)."""
    rollout_temperature: float = 1.0
    """Sampling temperature; the objective evaluates the policy at the same one."""
    rollout_top_p: float = 1.0
    """Nucleus sampling; 1 is off."""
    rollout_top_k: int = 0
    """Sample among the k most likely tokens only; 0 is off."""
    rollout_topk: int = 0
    """Record the behaviour policy's K likeliest ids and their log-probs at each token, as
    --objective dppo_topk_tv and dppo_topk_kl need them (published: 20); 0 is off. It does not
    truncate sampling, which is --rollout-top-k."""
    rollout_stop_ids: tuple[int, ...] = ()
    """Token ids that end a response, besides those of the model's generation_config.json."""
    rollout_stop_strings: tuple[str, ...] = ()
    """Texts that end a response, which holds the token that completes one."""
    rollout_max_slots: int = 256
    """Responses generated at the same time by a data-parallel rank, or by each server for it."""
    rollout_kv_cache_gib: float | None = None
    """Memory of a rank's KV cache: fewer responses are generated at the same time where
    --rollout-max-slots would take more; by default that is the only limit."""
    rollout_exact: Literal["auto", "on", "off"] = "auto"
    """Generate with the attention and the GEMM shapes of training, so that behaviour log-probs
    equal training's bit for bit; a probe at start proves it. on: refuse to run where it fails, and
    on GPUs compute with Megatron's batch-invariant kernels; auto: for CPUs, as far as the probe
    holds; off: faster attention."""
    rollout_lag: int = 0
    """Steps that generation runs ahead of training, with servers: the staleness of every token is
    at most so many steps; 0 waits."""
    rollout_extra_prompts: int = 0
    """With --dynamic-sampling, prompts generated beyond --rollout-prompts-per-step, so that fewer
    rounds are needed."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal, which teach nothing, by other prompts' (DAPO)."""
    dynamic_sampling_rounds: int = 3
    """Times that replacements are generated for one step; groups still missing then remain as they
    are."""
    environment: str | None = None
    """MODULE:FACTORY, called with the prompt for each conversation: responses become conversations
    of several turns, whose observations are not trained on."""
    environment_max_turns: int = 8
    """Turns of the policy in one conversation."""
    rollouts_file: str | None = None
    """Train on this file of rollouts (JSONL, as --save-rollouts writes) and generate nothing."""
    save_rollouts: bool = False
    """Write each step's rollouts to OUTPUT_DIR/rollouts/step-N.jsonl."""
    max_engine_gap: float | None = None
    """Stop if behaviour log-probs of the current weights differ from the trainer's by more than
    this on average (nats per token): then the two do not describe the same policy. By default 0
    where --rollout-exact is proven; else 0.001 in fp32, 0.1 in bf16 and 0.2 in FP8 in process, and
    0.2 for servers."""

    def __post_init__(self) -> None:
        _check(
            self,
            rollout_prompts_per_step=(self.rollout_prompts_per_step >= 1, "at least 1"),
            rollout_samples_per_prompt=(self.rollout_samples_per_prompt >= 1, "at least 1"),
            rollout_max_response_length=(self.rollout_max_response_length >= 1, "at least 1"),
            rollout_temperature=(self.rollout_temperature > 0, "above 0"),
            rollout_top_p=(0 < self.rollout_top_p <= 1, "above 0 and at most 1"),
            rollout_top_k=(self.rollout_top_k >= 0, "0 (off) or more"),
            rollout_topk=(self.rollout_topk >= 0, "0 (off) or more"),
            rollout_max_slots=(self.rollout_max_slots >= 1, "at least 1"),
            rollout_kv_cache_gib=(_positive(self.rollout_kv_cache_gib), "above 0 and finite"),
            rollout_server_timeout_seconds=(self.rollout_server_timeout_seconds > 0, "above 0"),
            rollout_server_retries=(self.rollout_server_retries >= 0, "0 or more"),
            rollout_stop_strings=(all(self.rollout_stop_strings), "texts that are not empty"),
            rollout_lag=(self.rollout_lag >= 0, "0 or more"),
            rollout_extra_prompts=(self.rollout_extra_prompts >= 0, "0 or more"),
            dynamic_sampling_rounds=(self.dynamic_sampling_rounds >= 1, "at least 1"),
            environment_max_turns=(self.environment_max_turns >= 1, "at least 1"),
            max_engine_gap=(self.max_engine_gap is None or self.max_engine_gap >= 0, "0 or more"),
        )

    @property
    def uses_servers(self) -> bool:
        """Whether responses come from servers rather than from the training process."""
        return self.rollout_engine != "inprocess"

    @property
    def kv_cache_bytes(self) -> int | None:
        """`--rollout-kv-cache-gib` in bytes."""
        gib = self.rollout_kv_cache_gib
        return None if gib is None else int(gib * 2**30)

    @property
    def num_drawn_prompts(self) -> int:
        """Prompts that a step draws at first: more than it takes with dynamic sampling only."""
        extra = self.rollout_extra_prompts if self.dynamic_sampling else 0
        return self.rollout_prompts_per_step + extra

    @property
    def truncated(self) -> bool:
        """Whether training responses are drawn from a truncated law."""
        return self.rollout_top_p < 1 or self.rollout_top_k > 0


@dataclass(frozen=True)
class RewardConfig:
    """What a response is worth."""

    reward: str = "math"
    """exact (the text equals the answer), math (math-verify), your own MODULE:FUNCTION, or the
    http:// or https:// address of a reward service."""
    reward_workers: int = 2
    """Processes of each data-parallel replica that compute rewards, or requests that a service is
    sent at the same time."""
    reward_timeout_seconds: float = 60.0
    """Time for the reward of one response (of a service: for one request, of up to 32 responses),
    or for one answer of an environment; longer is a failure."""
    reward_memory_gib: float = 4.0
    """Private memory that a reward process may take; more is a failure."""
    reward_max_failures: float = 0.1
    """Share of a batch's responses whose reward may fail, by an exception, a time-out or no finite
    number. A failure costs its sample: advantage 0, not in its group's mean; more stop the run."""

    def __post_init__(self) -> None:
        _check(
            self,
            reward_workers=(self.reward_workers >= 1, "at least 1"),
            reward_timeout_seconds=(self.reward_timeout_seconds > 0, "above 0"),
            reward_memory_gib=(_positive(self.reward_memory_gib), "above 0 and finite"),
            reward_max_failures=(0 <= self.reward_max_failures <= 1, "between 0 and 1"),
        )

    @property
    def is_service(self) -> bool:
        """Whether `--reward` is the address of a service, and no function."""
        return self.reward.startswith(("http://", "https://"))


@dataclass(frozen=True)
class WeightSyncConfig:
    """How new weights reach the servers of --rollout-engine vllm and sglang."""

    weight_sync: Literal["none", "disk", "collective"] = "none"
    """none: the engine reads the training weights themselves, or they never change; disk: a Hugging
    Face directory on storage that trainer and servers see; collective: broadcast over a process
    group that trainer and servers share (NCCL on GPUs, else gloo)."""
    weight_sync_dir: str | None = None
    """Where --weight-sync disk writes; by default OUTPUT_DIR/weight_sync."""
    weight_sync_address: str = "127.0.0.1"
    """Address of rank 0's machine as the servers see it, for --weight-sync collective."""
    weight_sync_port: int = 0
    """Port there; 0 takes a free one."""
    weight_sync_timeout_seconds: float = 300.0
    """Time that one synchronization may take."""

    def __post_init__(self) -> None:
        _check(
            self,
            weight_sync_port=(0 <= self.weight_sync_port < 1 << 16, "between 0 and 65535"),
            weight_sync_timeout_seconds=(self.weight_sync_timeout_seconds > 0, "above 0"),
        )


@dataclass(frozen=True)
class AdvantageConfig:
    """From rewards to advantages, within the group of samples of one prompt."""

    advantage_estimator: Literal["group-mean", "leave-one-out"] = "group-mean"
    """Baseline: the mean of the group, or the mean of the group's other samples."""
    advantage_divide_by_std: bool = False
    """Divide by the group's standard deviation (GRPO); off in the DRPO recipe."""


_DPPO_FIELDS = ("dppo_delta_low", "dppo_delta_high", "dppo_ratio_limit")

OBJECTIVE_FIELDS: dict[str, tuple[str, ...]] = {
    "drpo": ("drpo_delta", "drpo_penalty"),
    "dppo_tv": _DPPO_FIELDS,
    "dppo_kl": _DPPO_FIELDS,
    "dppo_topk_tv": _DPPO_FIELDS,
    "dppo_topk_kl": _DPPO_FIELDS,
    "ppo": ("ppo_clip_low", "ppo_clip_high", "ppo_dual_clip"),
    "spo": ("spo_epsilon",),
    "pg_is": (),
    "cispo": ("cispo_clip_low", "cispo_clip_high"),
    "gspo": ("gspo_clip_low", "gspo_clip_high"),
}
"""The objectives with a name, and the constants that each reads; another objective's are errors."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The per-token objective, what is added to it, and its aggregation (docs/objectives.md)."""

    objective: str = "drpo"
    """drpo, dppo_tv, dppo_kl, dppo_topk_tv, dppo_topk_kl, ppo, spo, pg_is, cispo, gspo, or your own
    MODULE:FUNCTION of per-token tensors."""
    drpo_delta: float = 12.5
    """DRPO's trust-region size: the gradient weight is 1 - sign(A(r-1)) |pi - mu| / delta."""
    drpo_penalty: Literal["sampled", "full"] = "sampled"
    """DRPO's penalty of the sampled token, or its expectation over the whole vocabulary, from the
    weights that generated."""
    dppo_delta_low: float | None = None
    """DPPO masks a token with A < 0 that became less likely, once its divergence is above this; by
    default 0.15 for total variation, 0.05 nats for KL."""
    dppo_delta_high: float | None = None
    """The same for A > 0 and a token that became more likely."""
    dppo_ratio_limit: float = 20.0
    """DPPO truncates its detached importance ratio at this."""
    ppo_clip_low: float = 0.2
    """PPO clips the ratio below 1 - this."""
    ppo_clip_high: float = 0.2
    """PPO clips the ratio above 1 + this (DAPO: 0.28)."""
    ppo_dual_clip: float | None = None
    """Dual clip: where A < 0, the objective is at least this times A (published: 3); or off."""
    spo_epsilon: float = 12.5
    """SPO's range: the gradient weight is 1 - sign(A(r-1)) |r - 1| / epsilon."""
    cispo_clip_low: float = 1.0
    """CISPO truncates the detached ratio below 1 - this; 1 is no lower limit."""
    cispo_clip_high: float = 5.0
    """CISPO truncates the detached ratio above 1 + this."""
    gspo_clip_low: float = 3e-4
    """GSPO clips the sequence ratio below 1 - this."""
    gspo_clip_high: float = 4e-4
    """GSPO clips the sequence ratio above 1 + this."""
    proximal_policy: Literal["behaviour", "trainer"] = "behaviour"
    """What the importance ratio r is taken against: the sampler's recorded log-probs, or the
    trainer's own before the first update of the batch (decoupled; then TIS, IcePop and the sequence
    masks act on trainer / sampler)."""
    tis_limit: float | None = None
    """Truncated importance sampling: the detached importance weight counts as this at most
    (published: 2); off by default."""
    icepop_low: float | None = None
    """IcePop: tokens whose importance weight lies below this are masked; off by default."""
    icepop_high: float | None = None
    """IcePop: tokens whose importance weight lies above this are masked; off by default."""
    sequence_mask: Literal["off", "geometric", "product"] = "off"
    """Mask whole sequences by the geometric mean or the product of their tokens' importance
    weights."""
    sequence_mask_low: float | None = None
    """Sequences below this are masked."""
    sequence_mask_high: float | None = None
    """Sequences above this are masked."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the frozen reference model; 0 is off and loads none."""
    kl_estimator: KlEstimator = "k3"
    """From the sampled token (k1, k2, k3), or exactly over the whole vocabulary (full)."""
    reference_model: str | None = None
    """Directory of the frozen reference model; by default --hf-model."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, with its true gradient over the whole vocabulary."""
    loss_aggregation: Aggregation = "seq-mean-token-sum-norm"
    """How token losses become one: mean over tokens; mean over sequences of their token means;
    or mean over sequences of their token sums divided by --loss-token-horizon."""
    loss_token_horizon: int | None = None
    """Divisor of seq-mean-token-sum-norm; by default --rollout-max-response-length."""
    log_ratio_limit: float = 20.0
    """Tokens with |log pi - log mu| beyond this are counted in `ratio/beyond_limit`; never
    clamped."""

    def __post_init__(self) -> None:
        _raise_if_any([*self._bad_constants(), *self._unread(), *self._at_odds()])

    def _bad_constants(self) -> list[str]:
        """Values out of range, each for itself."""
        horizon, dual, tis = self.loss_token_horizon, self.ppo_dual_clip, self.tis_limit
        share = "above 0 and at most 1 (1 is no lower limit)"
        # Total variation never exceeds 1; what KL may come to has no limit.
        most, scale = (1.0, " and at most 1") if self.objective.endswith("_tv") else (math.inf, "")
        return _broken(
            self,
            drpo_delta=(_positive(self.drpo_delta), "above 0 and finite"),
            dppo_delta_low=(_positive(self.dppo_delta_low, most), f"above 0{scale}"),
            dppo_delta_high=(_positive(self.dppo_delta_high, most), f"above 0{scale}"),
            dppo_ratio_limit=(1 <= self.dppo_ratio_limit < math.inf, "at least 1 and finite"),
            ppo_clip_low=(0 < self.ppo_clip_low <= 1, share),
            ppo_clip_high=(_positive(self.ppo_clip_high), "above 0 and finite"),
            ppo_dual_clip=(dual is None or 1 < dual < math.inf, "above 1 and finite"),
            spo_epsilon=(_positive(self.spo_epsilon), "above 0 and finite"),
            cispo_clip_low=(0 < self.cispo_clip_low <= 1, share),
            cispo_clip_high=(_positive(self.cispo_clip_high), "above 0 and finite"),
            gspo_clip_low=(0 < self.gspo_clip_low <= 1, share),
            gspo_clip_high=(_positive(self.gspo_clip_high), "above 0 and finite"),
            tis_limit=(tis is None or 1 <= tis < math.inf, "at least 1 and finite"),
            kl_coef=(0 <= self.kl_coef < math.inf, "0 (off) or more, and finite"),
            entropy_coef=(0 <= self.entropy_coef < math.inf, "0 (off) or more, and finite"),
            loss_token_horizon=(
                horizon is None
                or (horizon >= 1 and self.loss_aggregation == "seq-mean-token-sum-norm"),
                "at least 1, and is used by --loss-aggregation seq-mean-token-sum-norm only",
            ),
            # From 79.8 nats on, fp32 holds no ratio, and the objectives hold it there.
            log_ratio_limit=(0 < self.log_ratio_limit <= 79, "above 0 and at most 79"),
            **_bounds_around_1(self, "icepop_low", "icepop_high", least=sys.float_info.min),
            **_bounds_around_1(self, "sequence_mask_low", "sequence_mask_high"),
        )

    def _unread(self) -> list[str]:
        """Fields with another value than their default that nothing is going to read."""
        reasons = self.unread
        return [
            f"{flag(item.name)} {getattr(self, item.name)}: {reasons[item.name]}; drop it"
            for item in dataclasses.fields(self)
            if item.name in reasons and getattr(self, item.name) != item.default
        ]

    @property
    def unread(self) -> dict[str, str]:
        """Fields that nothing reads beside the others' values, and why."""
        readers: dict[str, list[str]] = {}
        for objective, names in OBJECTIVE_FIELDS.items():
            for name in names:
                readers.setdefault(name, []).append(objective)
        reasons = {
            name: f"is read by --objective {' and '.join(objectives)} only, not by {self.objective}"
            for name, objectives in readers.items()
            if self.objective not in objectives
        }
        if self.kl_coef == 0:
            reasons["kl_estimator"] = "is read with --kl-coef above 0 only"
            if self.objective in OBJECTIVE_FIELDS:  # a user's own may read the reference model
                reasons["reference_model"] = "is read with --kl-coef above 0 only"
        if self.sequence_mask == "off":
            reasons |= dict.fromkeys(
                ("sequence_mask_low", "sequence_mask_high"),
                "is read with --sequence-mask geometric and product only",
            )
        return reasons

    def _at_odds(self) -> list[str]:
        """An unknown objective, and settings that exclude or demand each other."""
        name, problems = self.objective, []
        module, _, function = name.partition(":")
        if name not in OBJECTIVE_FIELDS and not (module and function):
            close = difflib.get_close_matches(name, OBJECTIVE_FIELDS, n=1)
            problems.append(
                f"--objective {name}: unknown; use {', '.join(OBJECTIVE_FIELDS)}, or "
                "MODULE:FUNCTION of your own" + (f" (did you mean {close[0]}?)" if close else "")
            )
        decoupled = self.proximal_policy == "trainer"
        if decoupled and name.startswith("dppo_topk"):
            problems.append(
                f"--proximal-policy trainer: --objective {name} compares with the behaviour "
                f"policy's top-K log-probs, not the trainer's; use {name.replace('_topk', '')}"
            )
        own = {"gspo": "has one ratio per sequence, and TIS truncates that of tokens"}
        own |= dict.fromkeys(_TRUNCATED, "truncates its ratio itself, so that both would add up")
        if self.tis_limit is not None and not decoupled and name in own:
            problems.append(
                f"--tis-limit {self.tis_limit}: --objective {name} {own[name]}; drop it, or use "
                "--proximal-policy trainer"
            )
        if self.sequence_mask != "off":
            problems += [
                f"{flag(bound)}: must be given with --sequence-mask {self.sequence_mask}"
                for bound in ("sequence_mask_low", "sequence_mask_high")
                if getattr(self, bound) is None
            ]
        return problems

    @property
    def dppo_deltas(self) -> tuple[float, float]:
        """DPPO's limits for A < 0 and for A > 0, with their defaults resolved."""
        default = 0.15 if self.objective.endswith("_tv") else 0.05
        low, high = self.dppo_delta_low, self.dppo_delta_high
        return default if low is None else low, default if high is None else high

    @property
    def corrects(self) -> bool:
        """Whether an importance correction is on."""
        values = (self.tis_limit, self.icepop_low, self.icepop_high)
        return self.sequence_mask != "off" or any(value is not None for value in values)


_TRUNCATED = ("cispo", *(name for name in OBJECTIVE_FIELDS if name.startswith("dppo_")))
"""Objectives with a truncation of their own in the ratio."""


def _positive(value: float | None, most: float = math.inf) -> bool:
    """Above 0, finite, and not above `most`; or not given."""
    return value is None or (0 < value <= most and value < math.inf)


def _bounds_around_1(
    group: object, low_name: str, high_name: str, least: float = 0.0
) -> dict[str, tuple[bool, str]]:
    """Rules of an interval that on-policy tokens, whose importance weight is 1, lie inside."""
    low, high = getattr(group, low_name), getattr(group, high_name)
    return {
        low_name: (
            low is None or (least <= low <= 1 and (high is None or low < high)),
            f"{'above' if least else 'at least'} 0, at most 1 (the weight of an on-policy token) "
            f"and below {flag(high_name)}",
        ),
        high_name: (
            high is None or 1 <= high < math.inf,
            "at least 1 (the weight of an on-policy token) and finite",
        ),
    }


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, as Megatron runs it."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after the warm-up."""
    lr_warmup_iters: int = 0
    """Optimizer updates over which the learning rate rises from 0."""
    lr_decay_iters: int | None = None
    """Optimizer updates until --min-lr is reached; by default all of the run's."""
    weight_decay: float = 0.01
    """Decoupled weight decay; not applied to biases and norms."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Limit of the global gradient norm; 0 is off."""
    use_distributed_optimizer: bool = True
    """Split the optimizer's state over data-parallel ranks (and context-parallel ones)."""
    optimizer_cpu_offload: bool = False
    """On GPUs: keep the optimizer's state and master weights on the host, and update there."""
    optimizer_offload_fraction: float = 1.0
    """Share of the state that --optimizer-cpu-offload moves."""

    def __post_init__(self) -> None:
        decay = self.lr_decay_iters
        _check(
            self,
            lr=(self.lr > 0, "above 0"),
            min_lr=(
                0 <= self.min_lr <= self.lr
                and (self.min_lr == 0 or self.lr_decay_style != "constant"),
                f"between 0 and --lr {self.lr}, and needs --lr-decay-style linear or cosine",
            ),
            lr_warmup_iters=(self.lr_warmup_iters >= 0, "0 or more"),
            lr_decay_iters=(
                decay is None
                or (decay > self.lr_warmup_iters and self.lr_decay_style != "constant"),
                "above --lr-warmup-iters, and needs --lr-decay-style linear or cosine",
            ),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            adam_beta1=(0 <= self.adam_beta1 < 1, "at least 0 and below 1"),
            adam_beta2=(0 <= self.adam_beta2 < 1, "at least 0 and below 1"),
            adam_eps=(self.adam_eps > 0, "above 0"),
            clip_grad=(self.clip_grad >= 0, "0 (off) or more"),
            optimizer_offload_fraction=(
                0 < self.optimizer_offload_fraction <= 1,
                "above 0 and at most 1",
            ),
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    train_iters: int = 100
    """Training steps; each makes one rollout batch."""
    updates_per_rollout: int = 4
    """Optimizer updates per rollout batch, each on its own share of the prompts."""
    max_tokens_per_microbatch: int = 4096
    """Token budget of a packed row; one row is one micro-batch."""
    fused_output: bool = True
    """Compute output layer and objective together, a chunk of tokens at a time, so that the logits
    of a row never exist; --no-fused-output is the plain way, as a cross-check."""
    output_chunk_mib: int | None = None
    """MiB of logits and their gradient that a rank holds at a time, in scoring and in fused
    training; by default 1/25 of a row's, within limits that depend on the device: at least 1,024
    tokens and at most 512 MiB with bf16 on GPUs, else at least 32 tokens and at most 24 MiB."""
    seed: int = 1234
    """Seed of sampling and of the order of the prompts."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device in the precision of the run: then the share of it that training
    uses is logged (`mfu`), and --dry-run estimates tokens per second."""

    def __post_init__(self) -> None:
        _check(
            self,
            train_iters=(self.train_iters >= 1, "at least 1"),
            updates_per_rollout=(self.updates_per_rollout >= 1, "at least 1"),
            max_tokens_per_microbatch=(self.max_tokens_per_microbatch >= 2, "at least 2"),
            output_chunk_mib=(
                self.output_chunk_mib is None or self.output_chunk_mib >= 1,
                "at least 1",
            ),
            seed=(0 <= self.seed < 1 << 31, "at least 0 and below 2^31"),
            peak_tflops=(_positive(self.peak_tflops), "above 0 and finite"),
        )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on --eval-prompts, before, during and after training."""

    eval_interval: int = 10
    """Steps between evaluations; 0 evaluates before and after only."""
    eval_samples_per_prompt: int = 1
    """k of avg@k and pass@k."""
    eval_temperature: float = 1.0
    """Sampling temperature of evaluation; 0 is greedy."""
    eval_top_p: float = 1.0
    """Nucleus sampling of evaluation; 1 is off."""
    eval_top_k: int = 0
    """Top-k sampling of evaluation; 0 is off."""

    def __post_init__(self) -> None:
        _check(
            self,
            eval_interval=(self.eval_interval >= 0, "0 or more"),
            eval_samples_per_prompt=(
                self.eval_samples_per_prompt == 1
                or (self.eval_samples_per_prompt > 1 and self.eval_temperature > 0),
                "at least 1, and 1 with greedy --eval-temperature 0",
            ),
            eval_temperature=(self.eval_temperature >= 0, "0 (greedy) or more"),
            eval_top_p=(0 < self.eval_top_p <= 1, "above 0 and at most 1"),
            eval_top_k=(self.eval_top_k >= 0, "0 (off) or more"),
        )


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind, all of it under --output-dir."""

    output_dir: str = "runs/drpo"
    """Receives config.json, metrics.jsonl, tensorboard/, checkpoints/, hf/, report.html, and in
    model/ the config.json and tokenizer of the model it started from."""
    checkpoint_interval: int = 0
    """Steps between training checkpoints; 0 writes one at the end only."""
    checkpoint_keep: int = 2
    """Newest training checkpoints kept; 0 keeps all."""
    resume: bool = False
    """Continue from the newest checkpoint of --output-dir."""
    export_hf: bool = True
    """Write the trained policy to OUTPUT_DIR/hf at the end."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        _check(
            self,
            output_dir=(bool(self.output_dir), "a directory"),
            checkpoint_interval=(self.checkpoint_interval >= 0, "0 or more"),
            checkpoint_keep=(self.checkpoint_keep >= 0, "0 (all) or more"),
        )


@dataclass(frozen=True)
class Config:
    """One run, complete: the same on every rank, and written to OUTPUT_DIR/config.json."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        problems = []
        rollout, updates = self.rollout, self.train.updates_per_rollout
        if not rollout.rollouts_file and not self.data.prompts:
            problems.append("--prompts: give a JSONL file of prompts (or --rollouts-file)")
        if rollout.rollouts_file and self.data.prompts:
            problems.append("--prompts: is not used with --rollouts-file; give one of them")
        if rollout.rollouts_file and rollout.save_rollouts:
            problems.append("--save-rollouts: nothing is generated with --rollouts-file; drop it")
        if rollout.rollout_prompts_per_step % updates:
            problems.append(
                f"--rollout-prompts-per-step {rollout.rollout_prompts_per_step}: must be a "
                f"multiple of --updates-per-rollout {updates}"
            )
        if rollout.truncated and rollout.rollout_topk:
            problems.append(
                f"--rollout-topk {rollout.rollout_topk}: cannot be recorded under a truncated law "
                f"(--rollout-top-p {rollout.rollout_top_p} --rollout-top-k "
                f"{rollout.rollout_top_k}), which gives some of these ids no probability; use 1 "
                "and 0, or drop it"
            )
        problems += self._engine_problems()
        if self.moe.moe_routing_replay == "rollout" and not rollout.rollouts_file:
            reason = None
            if rollout.uses_servers:
                reason = f"--rollout-engine {rollout.rollout_engine} does not return the experts"
            elif rollout.environment:
                reason = "conversations of an --environment do not record the experts"
            if reason:
                problems.append(
                    f"--moe-routing-replay rollout: {reason} that tokens were routed to; use score"
                )
        if rollout.rollout_samples_per_prompt == 1:
            problems.append(
                "--rollout-samples-per-prompt 1: the advantage within a group of one is always 0; "
                "use at least 2"
            )
        _raise_if_any(problems)

    def _engine_problems(self) -> list[str]:
        """Settings of generation that exclude or demand each other."""
        rollout, sync = self.rollout, self.weight_sync.weight_sync
        engine, problems = rollout.rollout_engine, []
        if not rollout.uses_servers:
            if rollout.rollout_servers:
                problems.append(
                    f"--rollout-servers {' '.join(rollout.rollout_servers)}: are not used by "
                    "--rollout-engine inprocess; use vllm or sglang, or drop them"
                )
            if sync != "none":
                problems.append(
                    f"--weight-sync {sync}: --rollout-engine inprocess reads the training weights "
                    "themselves; drop it"
                )
            if rollout.rollout_lag:
                problems.append(
                    f"--rollout-lag {rollout.rollout_lag}: --rollout-engine inprocess generates "
                    "between the updates; use servers (vllm, sglang), or drop it"
                )
            return problems
        if not rollout.rollout_servers:
            problems.append(
                f"--rollout-servers: --rollout-engine {engine} needs the addresses of its servers, "
                "such as http://10.0.0.7:8000"
            )
        different = {address.rstrip("/") for address in rollout.rollout_servers}
        if len(different) < len(rollout.rollout_servers):
            problems.append(
                f"--rollout-servers {' '.join(rollout.rollout_servers)}: an address is there twice"
            )
        for address in rollout.rollout_servers:
            if not re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", address):
                problems.append(
                    f"--rollout-servers {address}: must be http://HOST:PORT or https://HOST:PORT"
                )
        if sync == "none" and (not rollout.rollouts_file or self.data.eval_prompts):
            problems.append(
                f"--weight-sync none: --rollout-engine {engine} would go on with the weights it "
                "started with; use disk or collective"
            )
        seconds, minutes = (
            self.weight_sync.weight_sync_timeout_seconds,
            self.parallel.distributed_timeout_minutes,
        )
        if 2 * seconds > 60 * minutes:
            problems.append(
                f"--weight-sync-timeout-seconds {seconds:g}: ranks wait for a sync and what "
                f"follows no longer than --distributed-timeout-minutes {minutes:g}; use at most "
                f"{30 * minutes:g} seconds, or raise the latter"
            )
        if rollout.truncated:
            problems.append(
                f"--rollout-top-p {rollout.rollout_top_p} --rollout-top-k {rollout.rollout_top_k}: "
                "training on a truncated distribution needs the kept ids of every token, which "
                f"--rollout-engine {engine} does not return; use 1 and 0, or inprocess"
            )
        if rollout.environment and rollout.rollout_lag:
            problems.append(
                f"--rollout-lag {rollout.rollout_lag}: an --environment runs in step with "
                "training; use 0"
            )
        return problems

    @property
    def loss_token_horizon(self) -> int:
        """The divisor of seq-mean-token-sum-norm, with its default resolved."""
        return self.objective.loss_token_horizon or self.rollout.rollout_max_response_length

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.train.train_iters * self.train.updates_per_rollout

    def flat(self) -> dict[str, object]:
        """Every field by its name, groups dissolved; a tuple becomes a list, as in JSON."""
        return _flat(dataclasses.asdict(self).values())

    def flat_defaults(self) -> dict[str, object]:
        """The default of every field, likewise."""
        groups = (getattr(self, group.name) for group in dataclasses.fields(self))
        return _flat({f.name: f.default for f in dataclasses.fields(group)} for group in groups)


def _flat(groups: Iterable[Mapping[str, object]]) -> dict[str, object]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for group in groups
        for name, value in group.items()
    }
