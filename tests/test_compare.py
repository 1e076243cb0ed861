"""The proof of logits: right conversions agree, and every known mistake is far from doing so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from megatron_drpo.checkpoint.convert import hf_to_megatron
from megatron_drpo.checkpoint.families import Architecture, Entry, RopeScaling, read_architecture
from megatron_drpo.checkpoint.hf import HfWeights
from megatron_drpo.checkpoint.torch_dist import MegatronWeights
from megatron_drpo.errors import CheckpointError
from megatron_drpo.mcore.compare import LogitsComparison, compare_logits
from tests.tiny_models import (
    CHANNELS,
    GROUPS,
    HEADS,
    LAYERS,
    VOCAB,
    save_tiny,
)

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
TOKENS = torch.tensor([number * 2654435761 % 2**32 % VOCAB for number in range(64)])
Edit = Callable[[Tensor], Tensor]


class Edited:
    """A checkpoint with some tensors changed: `edits` by name, as stored."""

    def __init__(self, weights: Any, edits: dict[str, Edit]) -> None:
        self._weights, self._edits = weights, edits
        self.directory, self.kind, self.tensors = weights.directory, weights.kind, weights.tensors
        assert edits.keys() <= self.tensors.keys(), edits.keys() - self.tensors.keys()

    def __exit__(self, *_: object) -> None: ...

    def load(self, name: str) -> Tensor:
        tensor = self._weights.load(name)
        return self._edits[name](tensor.clone()) if name in self._edits else tensor

    def hf(self, entry: Entry) -> list[Any]:
        assert self.kind == "hf"
        return [self.load(name) for name in entry.hf]


class Pair:
    """A tiny model of a family in both forms."""

    def __init__(self, directory: Path, family: str, **kwargs: Any) -> None:
        self.directory = directory
        save_tiny(directory / "hf", family, **kwargs)
        hf_to_megatron(directory / "hf", directory / "megatron")
        self.architecture = read_architecture(directory / "hf")
        self.hf = HfWeights(directory / "hf", self.architecture)
        self.megatron = MegatronWeights(directory / "megatron", self.architecture)

    def compare(
        self,
        edits: dict[str, Edit] | None = None,
        *,
        hf_edits: dict[str, Edit] | None = None,
        layers: Any = range(LAYERS),
        architecture: Architecture | None = None,
    ) -> LogitsComparison:
        hf: Any = Edited(self.hf, hf_edits) if hf_edits else self.hf
        megatron: Any = Edited(self.megatron, edits or {})
        return compare_logits(
            hf,
            megatron,
            architecture or self.architecture,
            self.directory / "hf",
            layers=layers,
        )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("pairs")
    return {family: Pair(root / family, family) for family in FAMILIES}


# --- Right conversions --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_conversion_agrees(pairs: dict[str, Pair], family: str) -> None:
    found = pairs[family].compare()
    assert found.agrees and found.departs_at is None and found.num_ties == 0
    assert found.max_abs_diff < 1e-5
    # What was run layer by layer is what transformers computes from the whole model.
    model = transformers.AutoModelForCausalLM.from_pretrained(pairs[family].directory / "hf")
    with torch.no_grad():
        expected = model(TOKENS[None]).logits.abs().max()
    assert found.scale == pytest.approx(float(expected), abs=1e-5)
    assert 0 < found.rounding < 1e-5
    assert found.tolerance < 3e-5
    assert found.layers == tuple(range(LAYERS)) and found.num_tokens == 64


@pytest.mark.parametrize("tie", [False, True])
def test_half_precision_is_compared_in_fp32(tmp_path: Path, tie: bool) -> None:
    pair = Pair(tmp_path, "llama", tie=tie, dtype=torch.bfloat16)
    found = pair.compare()
    assert found.agrees and found.max_abs_diff < 1e-5 and found.tolerance < 3e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS[None]).logits.abs().max()
    assert found.scale == pytest.approx(float(expected), abs=1e-5)


def test_nothing_is_left_behind(pairs: dict[str, Pair]) -> None:
    from megatron.core import parallel_state

    state = torch.get_rng_state()
    done: list[int] = []
    pair = pairs["qwen3"]
    arguments = (pair.hf, pair.megatron, pair.architecture, pair.directory / "hf")
    compare_logits(*arguments, layers=[0, 3], progress=done.append)
    assert done == [1, 1]
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    assert torch.equal(torch.get_rng_state(), state)
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_process_group_of_the_caller_is_used_and_left_alone(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    store = FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert pairs["llama"].compare().agrees
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


# --- Mistakes -----------------------------------------------------------------------------------

QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
EXPERT_FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
EXPERT_FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
ROUTER = "decoder.layers.mlp.router.weight"


def q_then_k_then_v(rows: Tensor) -> Tensor:
    """The order of a plain concatenation, instead of by group."""
    q, k, v = rows.unflatten(0, (GROUPS, -1)).split(
        [HEADS // GROUPS * CHANNELS, CHANNELS, CHANNELS], dim=1
    )
    return torch.cat([part.flatten(0, 1) for part in (q, k, v)])


def interleaved_rope(rows: Tensor) -> Tensor:
    """Channels of each head as pairs (0, 1), (2, 3), ..., instead of halves."""
    heads = rows.unflatten(0, (-1, 2, CHANNELS // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def swap_halves(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def one_value(tensor: Tensor) -> Tensor:
    tensor.view(-1)[5] += 0.05
    return tensor


CORRUPTIONS = [
    ("llama", "layer 0", {f"{QKV}[0]": q_then_k_then_v}),
    ("qwen2", "layer 2", {f"{QKV[:-6]}bias[2]": q_then_k_then_v}),
    ("qwen3", "layer 1", {f"{QKV}[1]": interleaved_rope}),
    ("mistral", "layer 2", {f"{FC1}[2]": swap_halves}),
    ("qwen3", "layer 1", {"decoder.layers.self_attention.k_layernorm.weight[1]": torch.ones_like}),
    ("llama", "layer 1", {f"{QKV[:-7]}.layer_norm_weight[1]": torch.ones_like}),
    ("llama", "layer 3", {"decoder.layers.mlp.linear_fc2.weight[3]": one_value}),
    ("mixtral", "layer 3", {f"{EXPERT_FC1}[3,2]": swap_halves}),
    ("qwen3_moe", "layer 0", {f"{EXPERT_FC2}[0,1]": torch.zeros_like}),
    ("mixtral", "layer 1", {f"{ROUTER}[1]": lambda rows: rows.roll(1, 0)}),
    ("llama", "the embedding", {"embedding.word_embeddings.weight": lambda rows: rows.roll(1, 0)}),
    ("llama", "the final norm", {"decoder.final_layernorm.weight": torch.ones_like}),
    ("llama", "the output layer", {"output_layer.weight": lambda rows: rows.roll(1, 0)}),
    ("llama", "the final norm", {"decoder.final_layernorm.weight": lambda w: w * torch.nan}),
]


@pytest.mark.parametrize(
    ("family", "place", "edits"), CORRUPTIONS, ids=[next(iter(case[2])) for case in CORRUPTIONS]
)
def test_a_wrong_tensor_is_seen_and_located(
    pairs: dict[str, Pair], family: str, place: str, edits: dict[str, Edit]
) -> None:
    found = pairs[family].compare(edits)
    assert not found.agrees
    assert found.departs_at == place
    assert not found.max_abs_diff < 100 * found.tolerance


def test_two_experts_in_each_others_place_are_seen(pairs: dict[str, Pair]) -> None:
    pair = pairs["qwen3_moe"]
    one, other = (pair.megatron.load(f"{EXPERT_FC1}[2,{expert}]") for expert in (0, 3))
    found = pair.compare(
        {f"{EXPERT_FC1}[2,0]": lambda _: other, f"{EXPERT_FC1}[2,3]": lambda _: one}
    )
    assert not found.agrees and found.departs_at == "layer 2"


SETTINGS = [
    ("llama", {"norm_epsilon": 1e-6}),  # is 1e-5
    ("qwen3_moe", {"norm_epsilon": 1e-6}),
    ("llama", {"rotary_base": 10000.0}),  # is 5000
    ("mixtral", {"normalize_router_weights": False}),
    ("qwen3_moe", {"normalize_router_weights": False}),
    ("qwen3_moe", {"num_experts_per_token": 3}),
]


@pytest.mark.parametrize(("family", "changes"), SETTINGS)
def test_a_wrong_setting_is_seen(
    pairs: dict[str, Pair], family: str, changes: dict[str, Any]
) -> None:
    pair = pairs[family]
    found = pair.compare(architecture=dataclasses.replace(pair.architecture, **changes))
    assert not found.agrees and found.departs_at == "layer 0"
    assert found.max_abs_diff > 25 * found.tolerance


SPECIAL: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        {"sliding_layers": (1, 2)},
        "layer 2",
    ),
    ("mistral", {"sliding_window": 12}, {"sliding_window": 13}, "layer 0"),
    (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=64)},
        "layer 0",  # the factor of the scores is missing
    ),
]


@pytest.mark.parametrize(
    ("family", "changes", "wrong", "place"), SPECIAL, ids=["windows", "window", "yarn"]
)
def test_windows_and_scaling_are_compared_layer_by_layer(
    tmp_path: Path, family: str, changes: dict[str, Any], wrong: dict[str, Any], place: str
) -> None:
    pair = Pair(tmp_path, family, **changes)
    found = pair.compare()
    assert found.agrees and found.max_abs_diff < 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = model(TOKENS[None]).logits.abs().max()
    assert found.scale == pytest.approx(float(expected), abs=1e-5)
    found = pair.compare(architecture=dataclasses.replace(pair.architecture, **wrong))
    assert not found.agrees and found.departs_at == place
    assert found.max_abs_diff > 25 * found.tolerance


def test_biases_are_compared(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    found = pair.compare()
    assert found.agrees and found.max_abs_diff < 1e-5
    for name, edit in (
        ("self_attention.linear_proj.bias[1]", torch.zeros_like),
        ("mlp.linear_fc1.bias[1]", swap_halves),
        ("mlp.linear_fc2.bias[1]", torch.zeros_like),
    ):
        found = pair.compare({f"decoder.layers.{name}": edit})
        assert not found.agrees and found.departs_at == "layer 1"


def test_only_the_layers_asked_for_are_compared(pairs: dict[str, Pair]) -> None:
    pair, first_and_last = pairs["llama"], [0, LAYERS - 1]
    found = pair.compare({f"{FC1}[1]": swap_halves}, layers=first_and_last)
    assert found.agrees and found.layers == (0, LAYERS - 1)
    found = pair.compare({f"{FC1}[{LAYERS - 1}]": swap_halves}, layers=first_and_last)
    assert not found.agrees and found.departs_at == f"layer {LAYERS - 1}"


def test_tensors_that_transformers_lacks_are_refused(pairs: dict[str, Pair]) -> None:
    llama, another = pairs["llama"], pairs["qwen3"].directory / "hf"
    with pytest.raises(CheckpointError, match=r"layer 0 as its own: missing_keys .*q_norm"):
        compare_logits(llama.hf, llama.megatron, llama.architecture, another, layers=[0])


# --- Experts that are a tie ---------------------------------------------------------------------


def tied_rows(rows: Tensor) -> Tensor:
    rows[2] = rows[1]
    return rows


def tied_rows_the_other_way(rows: Tensor) -> Tensor:
    rows[1] = rows[2] = rows[1] * (1 - 1e-6)
    rows[2] *= 1 + 2e-6
    return rows


def test_ties_between_experts_are_counted_and_do_not_spread(pairs: dict[str, Pair]) -> None:
    hf_name = "model.layers.1.block_sparse_moe.gate.weight"
    found = pairs["mixtral"].compare(
        {f"{ROUTER}[1]": tied_rows_the_other_way}, hf_edits={hf_name: tied_rows}
    )
    assert 0 < found.num_ties <= 64
    assert found.max_abs_diff <= found.tolerance, "the other tokens are not touched"
    assert not found.agrees, "ties are rare: so many are a wrong router"


def test_a_rare_tie_is_no_disagreement() -> None:
    found = LogitsComparison(
        max_abs_diff=1e-6,
        rounding=1e-6,
        scale=1.0,
        tolerance=1e-5,
        layers=tuple(range(48)),
        num_tokens=64,
        num_ties=30,
        departs_at=None,
    )
    assert found.agrees
    assert not dataclasses.replace(found, num_ties=31).agrees
    assert not dataclasses.replace(found, max_abs_diff=1.1e-5).agrees
    assert not dataclasses.replace(found, max_abs_diff=float("nan")).agrees
