"""The servers of a run: brought to the trainer's weights, and looked at before they are used.

L3, between the loop and the servers of `--rollout-engine vllm` and `sglang`. A sync is: the engines
pause what runs, the weights go over, a canary proves that each server computes with them, and the
engines go on with the servers that passed. One that did not is named, and left alone until a later
sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from megatron_drpo.config import Config
from megatron_drpo.errors import RolloutError, ServersError
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.rollout.canary import Canary
from megatron_drpo.rollout.servers import ServerEngine
from megatron_drpo.weight_sync.sync import Model, WeightSync, build_weight_sync

_START_SECONDS = 600.0
"""For servers that are still loading when the run starts."""


class Serving:
    """Servers that follow the policy. All methods are collective over all ranks.

    Args:
        engine: this rank's, on the source of each replica; None elsewhere.
        prompts: int64 [P] each, for the canary; the same ones on every rank.
        settings: directory of the model's config.json and tokenizer.
        bound: largest mean gap of a server that is used, nats per token.
        rounding: mean gap that arithmetic alone can make.
        say: tells people a line, on one rank.

    Raises:
        ServersError: on all ranks, if not all servers are up.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        engine: ServerEngine | None,
        prompts: Sequence[Tensor],
        settings: Path,
        *,
        bound: float,
        rounding: float,
        say: Callable[[str], None],
    ) -> None:
        self._policy, self._engine, self._say = policy, engine, say
        clients = () if engine is None else engine.clients
        if engine is not None:
            urls = ", ".join(client.url for client in clients)
            say(f"waiting for {urls}: at most {_START_SECONDS:g} s")
        self._together(lambda engine: engine.ready(_START_SECONDS))
        self._sync: WeightSync = build_weight_sync(
            config.weight_sync,
            Model(policy.architecture, policy.models, policy.layout, policy.device.torch),
            clients,
            directory=Path(config.output.output_dir),
            settings=settings,
        )
        self._canary = Canary(policy, clients, prompts, bound=bound, rounding=rounding)
        self._excluded: dict[str, str] = {}

    def sync(self) -> dict[str, float]:
        """Give the servers the policy's weights as they are now; metrics of it.

        Raises:
            ServersError: on all ranks, if no server computes with them afterwards.
        """
        version = self._policy.num_updates
        self._together(lambda engine: engine.pause())
        try:
            synced = self._sync.sync(version)
            checked = self._canary.check(version, synced.servers)
        except RolloutError as error:
            raise ServersError(str(error)) from error
        excluded = {**synced.failures, **checked.failures}
        for url, reason in excluded.items():
            if url not in self._excluded:
                self._say(f"warning: not used until a later sync: {reason}")
        for url in self._excluded.keys() - excluded.keys():
            self._say(f"{url} is used again")
        self._excluded = excluded
        if self._engine:
            self._engine.exclude(excluded)
        self._together(lambda engine: engine.resume(version))
        used = [gap for url, gap in checked.gaps.items() if url not in excluded]
        return {"servers/used": float(len(used)), "servers/canary_gap": max(used)}

    def _together(self, verb: Callable[[ServerEngine], None]) -> None:
        """A verb of all engines; what one of them raises, every rank does."""
        with ThreadPoolExecutor(1) as thread:
            engine = self._engine
            self._policy.layout.wait_for(None if engine is None else thread.submit(verb, engine))

    def close(self) -> None:
        """Leave the servers as they are."""
        self._sync.close()
