"""Which engine `--rollout-engine` names, made ready.

In: the configuration and the policy. Out: an engine, and whether its log-probs were proven to be
training's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_drpo.config import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.rollout.inprocess import InProcessEngine, probe_exact
from megatron_drpo.rollout.servers import ServerEngine


class Engine(NamedTuple):
    """An engine and what is known of it."""

    generator: InProcessEngine | ServerEngine | None
    """None on ranks that do not talk to the servers."""
    exact: bool
    text: str
    """For people."""


def build_engine(
    config: RolloutConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> Engine:
    """The engine; collective. No server is contacted yet.

    Raises:
        RolloutError: `--rollout-exact on`, and the probe found a difference.
    """
    if not config.uses_servers:
        return _inprocess_engine(config, policy, tokenizer)
    engine = server_engine(config, tokenizer) if policy.layout.is_replica_source else None
    return Engine(engine, False, f"{config.rollout_engine} {' '.join(config.rollout_servers)}")


def server_engine(config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> ServerEngine:
    """The engine over servers, none of which is contacted yet; for one rank of each replica."""
    return ServerEngine(
        config.rollout_engine,
        config.rollout_servers,
        timeout_seconds=config.rollout_server_timeout_seconds,
        retries=config.rollout_server_retries,
        max_outstanding=config.rollout_max_slots,
        decode=_decoder(tokenizer),
    )


def _inprocess_engine(
    config: RolloutConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> Engine:
    wanted = config.rollout_exact
    exact = wanted == "on" or (wanted == "auto" and policy.device.kind == "cpu")
    engine = InProcessEngine(
        policy,
        max_slots=config.rollout_max_slots,
        cache_bytes=config.kv_cache_bytes,
        exact=exact,
        decode=_decoder(tokenizer),
    )
    if not exact:
        return Engine(engine, False, "in process, with faster attention than training's")
    probe = probe_exact(policy, engine)
    if wanted == "on" and not probe.exact:
        raise RolloutError(
            f"--rollout-exact on: {probe.text}; use auto, where --max-engine-gap bounds the "
            "difference"
        )
    return Engine(engine, probe.exact, f"in process; {probe.text}")


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    return lambda ids: str(tokenizer.decode(ids))
