"""The diagnosis names the cause of a gap that was made on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_drpo.rollout.diagnosis import diagnose

T = 400
CAUSES = (
    "other weights",
    "numerics",
    "temperature:",
    "truncation",
    "another law",
    "different tokens",
    "log-probs in the wrong place",
)


def only(text: str, cause: str) -> bool:
    """The sentence names this cause first, and no other."""
    assert text.startswith(f"It looks like {cause}"), text
    return sum(f"It looks like {other}" in text for other in CAUSES) == 1


def law(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.double() / temperature).log_softmax(-1)


def nucleus(log_law: Tensor, top_p: float) -> Tensor:
    """The law renormalised over its nucleus, written out row by row."""
    out = torch.full_like(log_law, -torch.inf)
    for row, target in zip(log_law, out, strict=True):
        mass, kept = 0.0, []
        for index in row.argsort(descending=True).tolist():
            kept.append(index)
            mass += float(row[index].exp())
            if mass >= top_p:
                break
        target[kept] = row[kept] - row[kept].logsumexp(0)
    return out


def entropy(log_law: Tensor) -> Tensor:
    return -(log_law.exp() * log_law.nan_to_num(neginf=0)).sum(-1)


def draw(log_law: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(log_law.exp(), 1, generator=generator)[:, 0]


def at(log_law: Tensor, ids: Tensor) -> Tensor:
    return log_law.gather(1, ids[:, None])[:, 0].float()


# Flat and peaked, few ids and many.
@pytest.fixture(params=[(61, 1.0), (1000, 3.0)], ids=["flat", "peaked"])
def logits(request: pytest.FixtureRequest) -> Tensor:
    size, scale = request.param
    return scale * torch.randn(T, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_raw_log_probs_are_those_of_temperature_1(
    logits: Tensor, generator: torch.Generator, temperature: float
) -> None:
    ids = draw(law(logits, temperature), generator)
    noise = 0.01 * torch.randn(T, generator=generator)
    candidates = {
        "the trainer's law": at(law(logits, temperature), ids),
        "without truncation": at(law(logits, temperature), ids) - 1,
        "temperature 1": at(law(logits), ids),
    }
    text = diagnose(at(law(logits), ids) + noise, candidates)
    assert only(text, "another law") and "law, temperature 1:" in text


@pytest.mark.parametrize("temperature", [0.7, 0.9, 1.1, 1.5])
def test_a_temperature_nobody_asked_for_is_estimated(
    logits: Tensor, generator: torch.Generator, temperature: float
) -> None:
    mu, pi = law(logits, temperature), law(logits)
    ids = draw(mu, generator)
    text = diagnose(at(mu, ids), {"the trainer's law": at(pi, ids)}, entropy=entropy(pi))
    assert only(text, "temperature:")
    estimate = float(text.partition("at about ")[2].partition(" times")[0])
    assert estimate == pytest.approx(temperature, rel=0.15)


@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_truncation_that_the_trainer_does_not_know_of(
    logits: Tensor, generator: torch.Generator, top_p: float
) -> None:
    mu = nucleus(law(logits), top_p)
    ids = draw(mu, generator)
    noise = 0.002 * torch.randn(T, generator=generator)
    candidates = {"the trainer's law": at(law(logits), ids)}
    text = diagnose(at(mu, ids) + noise, candidates, entropy=entropy(law(logits)))
    assert only(text, "truncation")
    kept = float(text.partition("that keeps ")[2].partition("%")[0]) / 100
    assert kept == pytest.approx(top_p, abs=0.02)


def test_log_probs_before_truncation(logits: Tensor, generator: torch.Generator) -> None:
    pi = nucleus(law(logits), 0.9)
    ids = draw(pi, generator)
    expected, raw = {"the trainer's law": at(pi, ids)}, at(law(logits), ids)
    text = diagnose(raw, expected, entropy=entropy(pi))
    assert only(text, "truncation") and "not renormalised" in text
    text = diagnose(raw, expected | {"without truncation": raw})
    assert only(text, "another law") and "law, without truncation:" in text


@pytest.mark.parametrize("drift", [0.3, 1.0])
def test_weights_of_another_version(
    logits: Tensor, generator: torch.Generator, drift: float
) -> None:
    mu = law(logits + drift * torch.randn(logits.shape, generator=generator))
    ids = draw(mu, generator)
    candidates = {
        "the trainer's law": at(law(logits), ids),
        "temperature 1": at(law(logits, 0.7), ids),
    }
    text = diagnose(at(mu, ids), candidates, entropy=entropy(law(logits)))
    assert only(text, "other weights")


def test_small_differences_are_numerics_only_where_rounding_can_make_them(
    logits: Tensor, generator: torch.Generator
) -> None:
    rounded = law(logits.bfloat16())
    ids = draw(rounded, generator)
    behaviour, candidates = at(rounded, ids), {"the trainer's law": at(law(logits), ids)}
    text = diagnose(behaviour, candidates, entropy=entropy(law(logits)))
    assert only(text, "numerics")
    assert only(diagnose(behaviour, candidates, rounding=1e-4), "other weights")


def test_ids_that_mean_something_else(logits: Tensor, generator: torch.Generator) -> None:
    ids = draw(law(logits), generator)
    permuted = torch.randperm(logits.size(1), generator=generator)[ids]
    candidates = {
        "the trainer's law": at(law(logits), permuted),
        "temperature 1": at(law(logits, 1.5), permuted),
    }
    text = diagnose(at(law(logits), ids), candidates, entropy=entropy(law(logits)))
    assert only(text, "different tokens")


@pytest.mark.parametrize(("by", "side"), [(1, "before"), (-1, "after")])
def test_log_probs_of_the_neighbour(
    logits: Tensor, generator: torch.Generator, by: int, side: str
) -> None:
    logprobs = at(law(logits), draw(law(logits), generator))
    text = diagnose(logprobs.roll(by), {"the trainer's law": logprobs})
    assert only(text, "log-probs in the wrong place") and f"the token {side} it" in text


def test_one_sign_alone_is_no_truncation(generator: torch.Generator) -> None:
    """As where the engine sees a part of the prompt that the trainer does not."""
    pi = -0.1 - 5 * torch.rand(T, generator=generator)
    mu = pi * torch.rand(T, generator=generator)
    assert only(diagnose(mu, {"the trainer's law": pi}), "other weights")


def test_a_law_without_features_is_not_taken_for_different_tokens(
    generator: torch.Generator,
) -> None:
    pi = torch.full((T,), -4.1) + 1e-4 * torch.randn(T, generator=generator)
    mu = torch.full((T,), -4.1) + 1e-4 * torch.randn(T, generator=generator)
    assert only(diagnose(mu, {"the trainer's law": pi}, rounding=1e-3), "numerics")


def test_few_outliers_on_both_sides_are_no_truncation(logits: Tensor) -> None:
    pi = law(logits).max(-1).values.float()
    difference = torch.zeros(T)
    difference[:4], difference[4:6] = 0.4, -0.4
    text = diagnose(pi + difference, {"the trainer's law": pi}, rounding=1e-3)
    assert only(text, "other weights")


def test_equal_log_probs_and_few_tokens() -> None:
    few = torch.tensor([-1.0, -2.0])
    assert (
        diagnose(few, {"the trainer's law": few}) == "Behaviour log-probs equal the trainer's law."
    )
    assert only(diagnose(few, {"the trainer's law": few - 0.02}), "truncation")
    with pytest.raises(ValueError, match="no token"):
        diagnose(few[:0], {"the trainer's law": few[:0]})
