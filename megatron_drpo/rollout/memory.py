"""What the KV cache of the in-process engine takes, without building anything.

Where it fits: asked by the engine for its slots, and before a run starts by whoever plans memory.
"""

from __future__ import annotations

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.config import Config
from megatron_drpo.errors import RolloutError
from megatron_drpo.vocab_parallel.gemm import KEY_BLOCK, MIN_ROWS, round_up


def kv_cache_bytes(
    architecture: Architecture,
    *,
    tp_size: int,
    pp_size: int,
    element_bytes: int,
    slots: int,
    length: int,
) -> int:
    """Bytes of a rank's KV cache.

    Args:
        architecture: of the model.
        tp_size, pp_size: ranks that share the heads, and the layers.
        element_bytes: 2 in bf16, 4 in fp32.
        slots: responses at the same time.
        length: tokens of the longest prompt and of the longest response.
    """
    groups = -(-architecture.num_query_groups // tp_size)
    layers = -(-architecture.num_layers // pp_size)
    position = 2 * layers * groups * architecture.kv_channels * element_bytes
    return slots * round_up(length, KEY_BLOCK) * position


def slots_within(
    cache_bytes: int,
    architecture: Architecture,
    *,
    tp_size: int,
    pp_size: int,
    element_bytes: int,
    length: int,
    multiple: int = 1,
) -> int:
    """Slots of each of the `pp_size` groups of slots that `cache_bytes` have room for.

    Args:
        multiple: of which their number is, see `rows_multiple`; the others as `kv_cache_bytes`.

    Raises:
        RolloutError: there is no room for the fewest that a group can have.
    """
    slot = kv_cache_bytes(
        architecture,
        tp_size=tp_size,
        pp_size=pp_size,
        element_bytes=element_bytes,
        slots=1,
        length=length,
    )
    slots = cache_bytes // slot // pp_size // multiple * multiple
    if slots < MIN_ROWS:
        least = pp_size * round_up(MIN_ROWS, multiple)
        raise RolloutError(
            f"--rollout-kv-cache-gib {cache_bytes / 2**30:.3g}: {least} responses of {length} "
            f"tokens are the least, and take {least * slot / 2**30:.3g} GiB; raise it, or lower "
            "--rollout-max-response-length"
        )
    return slots


def planned_slots(config: Config, architecture: Architecture, prompt_length: int) -> int | None:
    """`slots_within` as the flags have it; None where they set no limit.

    Args:
        prompt_length: tokens of the longest prompt.
    """
    if config.rollout.kv_cache_bytes is None:
        return None
    return slots_within(
        config.rollout.kv_cache_bytes,
        architecture,
        tp_size=config.parallel.tensor_model_parallel_size,
        pp_size=config.parallel.pipeline_model_parallel_size,
        element_bytes=2 if config.model.bf16 else 4,
        length=prompt_length + config.rollout.rollout_max_response_length,
        multiple=rows_multiple(config),
    )


def rows_multiple(config: Config) -> int:
    """Of which the tokens of every pass are: sequence parallelism shares them out evenly, and
    products of few bits want whole blocks of them on each rank."""
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return ranks * config.precision.row_multiple
