"""From an HF architecture to Megatron's GPTModel.

In: `Architecture` (config.json) and the configuration. Out: this rank's chunks of the model, still
without weights. Every number of the model comes from config.json; nothing is listed by hand.
"""

from __future__ import annotations

import copy
import importlib.util
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_drpo.checkpoint.families import Architecture, padded_vocab_size
from megatron_drpo.checkpoint.families.rope import rotary_frequencies
from megatron_drpo.config import MemoryConfig, ModelConfig, PrecisionConfig
from megatron_drpo.device import Device
from megatron_drpo.mcore import attention, precision
from megatron_drpo.mcore.norm import RMSNorm
from megatron_drpo.mcore.parallel import Layout
from megatron_drpo.vocab_parallel.gemm import round_up

_AS_IS, _ALL_KEPT = PrecisionConfig(), MemoryConfig()


class PolicyModel(GPTModel):
    """GPTModel whose forward pass takes a packed row and ends before the output layer.

    The same forward serves scoring, training and generation; they differ in the layout only. The
    output layer belongs to `vocab_parallel`, which never holds all of its logits.
    """

    def forward(  # type: ignore[override]
        self, tokens: Tensor, positions: Tensor, layout: PackedSeqParams
    ) -> Tensor:
        """Hidden states [S, 1, H], on the last stage those after the final norm.

        Under sequence parallelism they are [S / tp, 1, H], this rank's part of them.

        Args:
            tokens, positions: int64 [S]; under context parallelism S tokens of this rank's.
            layout: how the tokens see each other (`mcore.attention`, or Transformer Engine's).
        """
        precision.begin_microbatch(self)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens[None], position_ids=positions[None])
        return self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary(positions, layout),
            packed_seq_params=layout,
        )

    def output_weight(self) -> Any:
        """Parameter [V/tp, H]: the output layer's on the last stage, the embedding's if tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _rotary(self, positions: Tensor, layout: PackedSeqParams) -> Tensor:
        if layout.qkv_format == "thd":  # Transformer Engine restarts positions by cu_seqlens
            return self.rotary_pos_emb(layout.max_seqlen_q, packed_seq=True)
        # Positions run on through the padding of a sequence. `packed_seq` says that context
        # parallelism needs no part cut out.
        longest = round_up(self.max_sequence_length, 2 * self.config.context_parallel_size)
        return self.rotary_pos_emb(longest, packed_seq=True)[positions]


def transformer_config(
    architecture: Architecture,
    config: ModelConfig,
    layout: Layout,
    device: Device,
    numbers: PrecisionConfig,
    memory: MemoryConfig,
) -> TransformerConfig:
    """Megatron's configuration of the model on this layout."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    gpu, interleaved = device.kind == "cuda", layout.vp_size > 1
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=architecture.qk_layernorm,
        **_attention(architecture),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=architecture.add_bias_linear,
        add_qkv_bias=architecture.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vp_size if interleaved else None,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.cp_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.bf16,
        calculate_per_token_loss=True,
        # With two stages the interleaved schedule is silently wrong under batched communication.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        bias_dropout_fusion=gpu,
        bias_activation_fusion=gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=gpu
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        **_experts(architecture, layout, grouped=use_transformer_engine(config)),
        **precision.of_products(numbers),
        **precision.of_activations(memory),
    )


def _attention(architecture: Architecture) -> dict[str, Any]:
    """What scaled or sliding attention adds to the configuration."""
    added: dict[str, Any] = {}
    if architecture.softmax_scale_factor != 1:
        factor = architecture.softmax_scale_factor
        added["softmax_scale"] = factor * architecture.kv_channels**-0.5
    if architecture.sliding_window is not None:
        # Tokens on the left and on the right, besides the token itself.
        added["window_size"] = (architecture.sliding_window - 1, 0)
        added["window_attn_skip_freq"] = [
            int(architecture.window_of(layer) is not None)
            for layer in range(architecture.num_layers)
        ]
    return added


def _experts(architecture: Architecture, layout: Layout, *, grouped: bool) -> dict[str, Any]:
    """What a mixture of experts adds to the configuration; nothing to a dense model's.

    A token's weights come from the router in fp32. Nothing balances the load of the experts: that
    would be a loss beside the objective.

    Args:
        grouped: compute all experts of a rank in one call of Transformer Engine's.
    """
    if not architecture.num_experts:
        return {}
    return dict(
        num_moe_experts=architecture.num_experts,
        moe_ffn_hidden_size=architecture.ffn_hidden_size,
        moe_router_topk=architecture.num_experts_per_token,
        moe_router_pre_softmax=not architecture.normalize_router_weights,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=grouped,
        expert_model_parallel_size=layout.ep_size,
        expert_tensor_parallel_size=layout.etp_size,
    )


def _layer_spec(architecture: Architecture, use_te: bool) -> ModuleSpec:
    """Megatron's own layer spec with our core attention and norms in it."""
    experts: dict[str, Any] = {
        "num_experts": architecture.num_experts or None,
        "moe_grouped_gemm": use_te,
    }
    if use_te:
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=architecture.qk_layernorm, **experts
        )
        core = attention.TECoreAttention
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=architecture.qk_layernorm, normalization="RMSNorm", **experts
        )
        core = attention.CoreAttention
    spec: Any = copy.deepcopy(spec)
    inner = spec.submodules.self_attention.submodules
    inner.core_attention = core
    if not use_te:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        if architecture.qk_layernorm:
            inner.q_layernorm = inner.k_layernorm = RMSNorm
    if architecture.num_experts and not use_te:
        # Transformer Engine leaves the norm before a router by itself: keep its own name in
        # checkpoints, so that they move between both implementations.
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return spec


def use_transformer_engine(config: ModelConfig) -> bool:
    """Resolve `--transformer-impl`."""
    if config.transformer_impl == "auto":
        return attention.HAVE_TE
    return config.transformer_impl == "transformer_engine"


def use_batch_invariant_kernels() -> None:
    """Megatron's GPU kernels whose results for a row do not depend on the other rows.

    They replace torch's in this whole process, for training as for generation.
    """
    from megatron.core.transformer.custom_layers import batch_invariant_kernels  # needs Triton

    batch_invariant_kernels.enable_batch_invariant_mode()


@torch.no_grad()  # else FP8 weights would keep their initial values, for master weights
def build_model(
    architecture: Architecture,
    config: ModelConfig,
    layout: Layout,
    device: Device,
    *,
    numbers: PrecisionConfig = _AS_IS,
    memory: MemoryConfig = _ALL_KEPT,
) -> list[PolicyModel]:
    """This rank's chunks (one, or `vp_size` under the interleaved schedule), weights unset."""
    megatron_config = transformer_config(architecture, config, layout, device, numbers, memory)
    use_te = use_transformer_engine(config)
    layer_spec = _layer_spec(architecture, use_te)
    make = partial(
        PolicyModel,
        config=megatron_config,
        vocab_size=padded_vocab_size(architecture.vocab_size, layout.tp_size),
        max_sequence_length=architecture.max_position_embeddings,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
    )
    frequencies = rotary_frequencies(architecture).to(device.torch)
    chunks = []
    for stage in range(layout.vp_size):
        vp_stage = stage if layout.vp_size > 1 else None
        spec: Any = layer_spec
        if not use_te:  # Megatron takes the final norm from what is installed, not from the layers
            count = get_num_layers_to_build(megatron_config, vp_stage)
            norm: Any = RMSNorm
            spec = TransformerBlockSubmodules([layer_spec] * count, layer_norm=norm)
        chunk: Any = make(
            transformer_layer_spec=spec,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            vp_stage=vp_stage,
        )
        # Megatron knows Llama 3's scaling for one original context length only.
        chunk.rotary_pos_emb.inv_freq = frequencies
        # The optimizer keeps experts apart where this is False, and Megatron sets it only where
        # experts are shared out: then its state would not move between other sizes and 1.
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False  # read by its name
        # Norms of the local spec are built in fp32 whatever params_dtype says.
        chunk.to(device=device.torch, dtype=megatron_config.params_dtype)
        if (
            numbers.fp32_output_layer
            and chunk.post_process
            and not architecture.tie_word_embeddings
        ):
            chunk.output_layer.weight.data = chunk.output_layer.weight.data.float()
        chunks.append(chunk)
    return chunks
