"""Counted operations against what torch counts while transformers computes the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.plan.flops import attention_cost, linear_flops
from tests.published_configs import PUBLISHED
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "mixtral", "qwen3_moe"])
def test_operations_are_those_that_transformers_needs(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)

    def counted(length: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.arange(length)[None])
        return counter.get_total_flops()

    per_token, attention = linear_flops(architecture), attention_cost(architecture)
    model.set_attn_implementation("eager")
    for length in (16, 48):
        # transformers multiplies every query with every key, we count those that it may see.
        wanted = per_token * (length + 2 * attention(length))
        assert counted(length) == pytest.approx(wanted, rel=1e-9)


def test_a_mixture_counts_the_experts_that_a_token_is_routed_to() -> None:
    """Qwen3-30B-A3B has, says its name, 3 of 30 billion parameters at work for a token."""
    architecture = PUBLISHED["Qwen3-30B-A3B"][1]
    embedding = architecture.vocab_size * architecture.hidden_size
    assert linear_flops(architecture) / 2 + embedding == pytest.approx(3.3e9, rel=0.02)


def test_layers_that_slide_are_counted_apart() -> None:
    architecture = replace(PUBLISHED["Qwen3-0.6B"][1], sliding_window=512, sliding_layers=(0, 1, 5))
    cost, full = attention_cost(architecture), attention_cost(PUBLISHED["Qwen3-0.6B"][1])
    assert cost(512) == pytest.approx(full(512))
    # Beyond the window each of 3 of 28 layers sees 512 keys a token, which is 2 * 512 in L^2 / 2.
    assert cost(5001) - cost(5000) == pytest.approx(
        25 / 28 * (full(5001) - full(5000)) + 3 / 28 * full.full * 2 * 512
    )
