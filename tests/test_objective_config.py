"""What the objective's flags refuse: constants out of range, options without effect, conflicts."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

import pytest

from megatron_drpo.config import (
    OBJECTIVE_FIELDS,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
)
from megatron_drpo.dry_run import _objective
from megatron_drpo.errors import ConfigError


def refused(**given: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        ObjectiveConfig(**given)
    return str(caught.value).splitlines()


READER = {name: objective for objective, names in OBJECTIVE_FIELDS.items() for name in names}
ON = {
    "sequence_mask_low": {"sequence_mask": "product", "sequence_mask_high": 2.0},
    "sequence_mask_high": {"sequence_mask": "product", "sequence_mask_low": 0.5},
}


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("drpo_delta", [0.0, -1.0, math.inf, math.nan], [0.05, 12.5, 1e3]),
        ("dppo_delta_low", [0.0, -0.1, math.inf, math.nan], [1e-3, 3.0]),
        ("dppo_delta_high", [0.0, -0.1, math.inf, math.nan], [1e-3, 3.0]),
        ("dppo_ratio_limit", [0.5, math.inf, math.nan], [1.0, 1e4]),
        ("ppo_clip_low", [0.0, 1.1, math.nan], [0.1, 1.0]),
        ("ppo_clip_high", [0.0, -1.0, math.inf, math.nan], [0.28, 5.0]),
        ("ppo_dual_clip", [1.0, 0.5, math.inf, math.nan], [1.5, 3.0]),
        ("spo_epsilon", [0.0, -1.0, math.inf, math.nan], [0.2]),
        ("cispo_clip_low", [0.0, 1.1, math.nan], [0.2, 1.0]),
        ("cispo_clip_high", [0.0, math.inf, math.nan], [0.28]),
        ("gspo_clip_low", [0.0, 1.1, math.nan], [1e-4]),
        ("gspo_clip_high", [0.0, math.inf, math.nan], [1e-4]),
        ("tis_limit", [0.9, math.inf, math.nan], [1.0, 2.0]),
        ("icepop_low", [-0.1, 0.0, 1.1, math.nan], [0.01, 0.5, 1.0]),
        ("icepop_high", [0.9, math.inf, math.nan], [1.0, 5.0]),
        ("sequence_mask_low", [-0.1, 1.5, math.nan], [0.0, 0.99]),
        ("sequence_mask_high", [0.9, math.inf, math.nan], [1.001, 100.0]),
        ("kl_coef", [-0.1, math.inf, math.nan], [0.0, 1e-3]),
        ("entropy_coef", [-0.1, math.inf, math.nan], [0.0, 1e-3]),
        ("log_ratio_limit", [0.0, -1.0, 79.5, math.inf, math.nan], [5.0, 79.0]),
    ],
)
def test_constants_out_of_range_are_named_with_what_is_needed(
    name: str, bad: list[float], good: list[float]
) -> None:
    objective = READER.get(name, "drpo")
    flag = "--" + name.replace("_", "-")
    for value in bad:
        lines = refused(objective=objective, **{**ON.get(name, {}), name: value})
        assert [line for line in lines if line.startswith(f"{flag} {value}: must be ")], lines
    for value in good:
        config = ObjectiveConfig(objective, **{**ON.get(name, {}), name: value})
        assert getattr(config, name) == value


def test_total_variation_never_exceeds_one() -> None:
    for name in ("dppo_tv", "dppo_topk_tv"):
        (line,) = refused(objective=name, dppo_delta_high=1.5)
        assert line == "--dppo-delta-high 1.5: must be above 0 and at most 1"


def test_dppo_deltas_have_the_defaults_of_their_divergence() -> None:
    for name, default in (("tv", 0.15), ("kl", 0.05), ("topk_tv", 0.15), ("topk_kl", 0.05)):
        assert ObjectiveConfig(f"dppo_{name}").dppo_deltas == (default, default)
        assert ObjectiveConfig(f"dppo_{name}", dppo_delta_high=0.3).dppo_deltas == (default, 0.3)


@pytest.mark.parametrize("objective", [*OBJECTIVE_FIELDS, "my_module:my_function"])
def test_another_objectives_constants_are_errors_that_name_their_reader(objective: str) -> None:
    values = {"drpo_penalty": "full", "dppo_delta_low": 0.1, "dppo_delta_high": 0.1}
    values |= {"dppo_ratio_limit": 9.0, "ppo_dual_clip": 3.0}
    for name, reader in READER.items():
        given = {"objective": objective, name: values.get(name, 0.25)}
        if name in OBJECTIVE_FIELDS.get(objective, ()):
            ObjectiveConfig(**given)
            continue
        (line,) = refused(**given)
        assert line.startswith(f"--{name.replace('_', '-')} {given[name]}: is read by --objective ")
        assert reader in line and f"not by {objective}; drop it" in line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kl_estimator": "k1"}, "--kl-estimator k1: is read with --kl-coef above 0 only"),
        ({"reference_model": "m"}, "--reference-model m: is read with --kl-coef above 0 only"),
        (
            {"sequence_mask_low": 0.5},
            "--sequence-mask-low 0.5: is read with --sequence-mask geometric and product only",
        ),
        (
            {"sequence_mask": "product", "sequence_mask_low": 0.5},
            "--sequence-mask-high: must be given with --sequence-mask product",
        ),
        (
            {"sequence_mask": "geometric", "sequence_mask_high": 1.5},
            "--sequence-mask-low: must be given with --sequence-mask geometric",
        ),
        (
            {"icepop_low": 1.0, "icepop_high": 1.0},
            "--icepop-low 1.0: must be .*below --icepop-high",
        ),
        (
            {"loss_token_horizon": 9, "loss_aggregation": "token-mean"},
            "--loss-token-horizon 9: .*seq-mean-token-sum-norm only",
        ),
        (
            {"objective": "dppo_topk_kl", "proximal_policy": "trainer"},
            "--proximal-policy trainer: .*use dppo_kl",
        ),
        (
            {"objective": "dppo_tv", "tis_limit": 2.0},
            "--tis-limit 2.0: .*--proximal-policy trainer",
        ),
        ({"objective": "cispo", "tis_limit": 2.0}, "--tis-limit 2.0: .*truncates its ratio itself"),
        ({"objective": "gspo", "tis_limit": 2.0}, "--tis-limit 2.0: .*one ratio per sequence"),
        ({"objective": "drop"}, r"--objective drop: unknown; use drpo, .*did you mean drpo\?"),
        ({"objective": "dppo-kl"}, r"--objective dppo-kl: unknown; .*did you mean dppo_kl\?"),
        ({"objective": "module:"}, "--objective module:: unknown; .*MODULE:FUNCTION"),
        ({"objective": ":f"}, "--objective :f: unknown"),
        ({"objective": ""}, "--objective : unknown"),
    ],
)
def test_settings_that_do_nothing_or_exclude_each_other(given: dict[str, Any], said: str) -> None:
    (line,) = refused(**given)
    assert re.match(said, line), line


def test_what_is_refused_in_one_mode_is_taken_in_the_other() -> None:
    for objective in ("dppo_tv", "cispo", "gspo"):
        ObjectiveConfig(objective, tis_limit=2.0, proximal_policy="trainer")
    ObjectiveConfig(kl_coef=0.1, kl_estimator="full", reference_model="m")
    ObjectiveConfig(icepop_low=0.5)
    ObjectiveConfig("mine:f", tis_limit=2.0, entropy_coef=0.1)


def test_all_problems_are_listed_at_once() -> None:
    lines = refused(
        objective="pp", drpo_delta=0.0, kl_coef=-1.0, reference_model="m", sequence_mask="product"
    )
    starts = [
        "--drpo-delta",
        "--kl-coef",
        "--objective",
        "--sequence-mask-low",
        "--sequence-mask-h",
    ]
    assert all(any(line.startswith(start) for line in lines) for start in starts), lines


def test_the_defaults_are_the_published_ones() -> None:
    config = ObjectiveConfig()
    assert (config.objective, config.drpo_delta, config.drpo_penalty) == ("drpo", 12.5, "sampled")
    assert config.proximal_policy == "behaviour" and not config.corrects
    off = ("kl_coef", "entropy_coef")
    assert all(getattr(config, name) == 0 for name in off)
    assert {f.name for f in fields(config)} > set(READER)


@pytest.mark.parametrize(
    "given",
    [
        {"tis_limit": 2.0},
        {"icepop_low": 0.5},
        {"icepop_high": 5.0},
        {"sequence_mask": "product", "sequence_mask_low": 0.5, "sequence_mask_high": 2.0},
    ],
)
def test_each_correction_counts_as_one(given: dict[str, Any]) -> None:
    assert ObjectiveConfig(**given).corrects


def test_a_dry_run_writes_every_objective_with_its_constants() -> None:
    def lines(**given: Any) -> str:
        config = Config(
            ModelConfig("m"), data=DataConfig(prompts="p"), objective=ObjectiveConfig(**given)
        )
        return "\n".join(_objective(config))

    for name in OBJECTIVE_FIELDS:
        assert lines(objective=name).startswith(f"{name}: ")
    assert "stays within [0.5, 1.5]" in lines(drpo_delta=2.0)
    assert "sum_v (pi_v - mu_v)^2" in lines(drpo_penalty="full")
    text = lines(objective="dppo_topk_tv", dppo_delta_high=0.3)
    assert "> 0.3" in text and "> 0.15" in text and "top K" in text
    text = lines(objective="ppo", ppo_clip_high=0.28, ppo_dual_clip=3.0)
    assert "clip(r, 0.8, 1.28)" in text and "at least 3 A" in text
    assert "a function of your own" in lines(objective="mine:f")
    text = lines(
        proximal_policy="trainer", tis_limit=2.0, icepop_low=0.5, sequence_mask="product",
        sequence_mask_low=0.1, sequence_mask_high=9.0, kl_coef=0.01, entropy_coef=0.02,
    )  # fmt: skip
    for part in ("first update", "2 at most", "[0.5, inf]", "product", "[0.1, 9]", "- 0.01 * KL"):
        assert part in text, part
    assert "k3" in text and "+ 0.02 * entropy" in text
    plain = lines()
    assert not any(word in plain for word in ("rho", "KL", "entropy", "trainer"))
