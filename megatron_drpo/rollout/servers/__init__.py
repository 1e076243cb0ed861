"""Servers that generate: vLLM and SGLang over HTTP, token ids in, token ids and log-probs out.

    ServerEngine (engine)    balancing, retries, pauses; a `RolloutEngine`
      Client (client)        one server: seven verbs, bounded in time and size
        Dialect (dialects)   what the verbs are called there; pure functions

L2. A server's text is never turned into tokens again. Only the addresses that the user gave are
contacted; redirects are not followed, and answers are JSON of bounded size.
"""

from megatron_drpo.rollout.servers.client import Client, ServerError
from megatron_drpo.rollout.servers.dialects import (
    DIALECTS,
    Dialect,
    DiskUpdate,
    GroupClose,
    GroupOpen,
    GroupUpdate,
    Job,
    Response,
    Update,
)
from megatron_drpo.rollout.servers.engine import Pending, ServerEngine

__all__ = [
    "DIALECTS",
    "Client",
    "Dialect",
    "DiskUpdate",
    "GroupClose",
    "GroupOpen",
    "GroupUpdate",
    "Job",
    "Pending",
    "Response",
    "ServerEngine",
    "ServerError",
    "Update",
]
