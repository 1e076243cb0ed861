"""The proof of a conversion: logits of transformers against those of Megatron, on fixed token ids.

In: the same model as a Hugging Face and as a Megatron checkpoint. Out: the largest difference of
their logits. Each side holds one layer at a time: a model of a single layer, of transformers' own
class and of the trainer's `PolicyModel`, takes the weights of one layer after the other. The hidden
states of the two sides travel apart, so that differences add up as they do in the whole models.
Everything is computed in fp32 on the CPU, whatever the stored dtype.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from megatron_drpo.checkpoint.families import Architecture, Entry, family_of
from megatron_drpo.checkpoint.manifest import Weights
from megatron_drpo.config import ModelConfig, ParallelConfig
from megatron_drpo.device import Device
from megatron_drpo.errors import CheckpointError
from megatron_drpo.mcore import attention, model, parallel

NUM_TOKENS = 64
TOLERANCE = 1e-5
"""Of the logits, unless rounding alone moves them further."""
ROUNDING_FACTOR = 3.0
"""How many times further the two sides may be apart than transformers' two implementations of
attention are from each other: by that much rounding moves the logits of this very model. Correct
conversions were seen at up to 1.1 times; a norm epsilon of 1e-5 for 1e-6, the smallest known
mistake, at 3.5 times in the steepest network tried, and from 10 times on in others."""
LARGEST_TOLERANCE = 1e-3
"""Of the largest logit: where rounding alone does more, nothing can be proven."""

_TIE = 1e-4
"""Rounding may order router logits either way that are closer, relative to the largest."""
_OUTPUT_ROWS = 8192


@dataclass(frozen=True)
class LogitsComparison:
    """How far apart the logits of the two models are.

    Example: LogitsComparison(max_abs_diff=1.9e-6, rounding=1.1e-5, scale=12.3, tolerance=3.3e-5,
        layers=(0, 1), num_tokens=64, num_ties=0, departs_at=None)
    """

    max_abs_diff: float
    """Over all tokens and the whole vocabulary."""
    rounding: float
    """The same between transformers' two implementations of attention."""
    scale: float
    """The largest logit of transformers, without its sign."""
    tolerance: float
    """What `max_abs_diff` may be."""
    layers: tuple[int, ...]
    """The layers that were run, in order; the others were skipped on both sides."""
    num_tokens: int
    num_ties: int
    """Tokens, counted per layer, for which the two sides chose another of experts that were equal
    to within rounding: they continue with the hidden state of transformers."""
    departs_at: str | None
    """The first place where the two sides are further apart than by rounding; None if nowhere."""

    @property
    def agrees(self) -> bool:
        """Within the tolerance (NaN is not), and ties the rare exception that they should be."""
        few = max(1, self.num_tokens * len(self.layers) // 100)
        return self.max_abs_diff <= self.tolerance and self.num_ties <= few


def compare_logits(
    hf: Weights,
    megatron: Weights,
    architecture: Architecture,
    config_dir: str | Path,
    *,
    layers: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> LogitsComparison:
    """Run both models on the same token ids and compare their logits.

    Uses one process; starts a process group of that one, and ends it, unless torch.distributed is
    initialised already (then it is collective, and every rank does the same). On a machine with
    GPUs call `device.choose_device("cpu")` before megatron_drpo.mcore is imported.

    Args:
        hf, megatron: the two checkpoints; what is tested is what is stored in them.
        architecture: what Megatron's model is built from.
        config_dir: the directory of the config.json that transformers' model is built from.
        layers: numbers of the layers to run, ascending: all of them, or [0, last] for a quick look.
        progress: called with 1 after each layer.

    Raises:
        CheckpointError: transformers finds a tensor missing or left over.
    """
    num_tokens = min(NUM_TOKENS, architecture.max_position_embeddings)
    # Multiplicative hashing: ids from all over the vocabulary, the same on every machine.
    tokens = [number * 2654435761 % 2**32 % architecture.vocab_size for number in range(num_tokens)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _one_rank() as layout:
        left = _Transformers(hf, architecture, Path(config_dir))
        right = _Megatron(megatron, architecture, layout)
        a, b = left.embed(tokens), right.embed(tokens)
        # c is transformers again, rounded otherwise: how far that takes it from a is the yardstick.
        c = a
        departs_at = None if torch.equal(a, b) else "the embedding"
        num_ties = 0
        for layer in layers:
            b = right.run(layer, b)
            a, c, tied = left.run(layer, a, c)
            rerouted = tied & (_apart(a, b) > TOLERANCE)
            num_ties += int(rerouted.sum())
            b = torch.where(rerouted[:, None], a, b)
            c = torch.where(tied[:, None], a, c)
            if departs_at is None and _departs(a, b, c):
                departs_at = f"layer {layer}"
            if progress:
                progress(1)
        (a, c), b = left.norm(a, c), right.norm(b)
        if departs_at is None and _departs(a, b, c):
            departs_at = "the final norm"
        scale = max_abs_diff = rounding = torch.tensor(0.0)
        first, second = left.output_weight(), right.output_weight()
        for start in range(0, architecture.vocab_size, _OUTPUT_ROWS):
            rows = slice(start, min(start + _OUTPUT_ROWS, architecture.vocab_size))
            weight = first[rows].float().T
            logits = a @ weight
            # `maximum` keeps NaN.
            scale = scale.maximum(logits.abs().max())
            rounding = rounding.maximum((c @ weight - logits).abs().max())
            diff = b @ second[rows].float().T - logits
            max_abs_diff = max_abs_diff.maximum(diff.abs().max())
    tolerance = min(
        max(TOLERANCE, ROUNDING_FACTOR * float(rounding)),
        LARGEST_TOLERANCE * max(1.0, float(scale)),
    )
    if departs_at is None and not max_abs_diff <= tolerance:
        departs_at = "the output layer"
    return LogitsComparison(
        max_abs_diff=float(max_abs_diff),
        rounding=float(rounding),
        scale=float(scale),
        tolerance=tolerance,
        layers=tuple(layers),
        num_tokens=num_tokens,
        num_ties=num_ties,
        departs_at=departs_at,
    )


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """[T]: how far hidden states [T, H] of a token are apart, relative to their size."""
    return (a - b).norm(dim=1) / a.norm(dim=1).clamp(min=torch.finfo(a.dtype).tiny)


def _departs(a: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether b is further from a than rounding takes c."""
    limit = ROUNDING_FACTOR * float(_apart(a, c).max().clamp(min=torch.finfo(a.dtype).eps))
    return not _apart(a, b).max() <= limit


@contextmanager
def _one_rank() -> Iterator[parallel.Layout]:
    """Megatron's process groups without model parallelism, gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        owns_world = not dist.is_initialized()
        if owns_world:
            store = FileStore(str(Path(scratch) / "store"), 1)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            layout = parallel.initialize(ParallelConfig(), _CPU, seed=1)
            try:
                yield layout
            finally:
                parallel.destroy(layout)
        finally:
            if owns_world:
                dist.destroy_process_group()


_CPU = Device("cpu", "gloo", 0, "weights are compared on the CPU")


class _Transformers:
    """The Hugging Face checkpoint in transformers' own model."""

    def __init__(self, weights: Weights, architecture: Architecture, config_dir: Path) -> None:
        import transformers

        self._weights, self._architecture = weights, architecture
        self._family = family_of(architecture)
        config: Any = transformers.AutoConfig.from_pretrained(config_dir)
        (name,) = config.architectures
        self._class: Any = getattr(transformers, name.replace("ForCausalLM", "Model"))
        config.num_hidden_layers, config.vocab_size = 1, 1
        # They would be no ids of that vocabulary.
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        self._layer_types = getattr(config, "layer_types", None)
        self._config = config

    def embed(self, tokens: list[int]) -> Tensor:
        (embedding,) = self._weights.hf(self._family.first[0])
        return torch.cat([embedding[token : token + 1] for token in tokens]).float()

    def output_weight(self) -> Any:
        """[V, H], indexable by rows."""
        return self._weights.hf(_output(self._architecture))[0]

    def run(self, layer: int, eager: Tensor, sdpa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [T, H] after one layer, under either implementation of attention.

        The third result is bool [T]: which expert the token took was up to rounding.
        """
        model = self._model(layer)
        model.norm = torch.nn.Identity()
        num_taken = self._architecture.num_experts_per_token
        routes = 0 < num_taken < self._architecture.num_experts
        kwargs = {"output_router_logits": True} if routes else {}
        results = []
        for hidden, implementation in ((sdpa, "sdpa"), (eager, "eager")):
            model.set_attn_implementation(implementation)
            results.append(model(inputs_embeds=hidden[None], use_cache=False, **kwargs))
        tied = torch.zeros(len(eager), dtype=torch.bool)
        if routes:
            (logits,) = results[-1].router_logits
            top = logits.topk(num_taken + 1).values
            tied = top[:, -2] - top[:, -1] < _TIE * logits.abs().max().clamp(min=1)
        return results[1].last_hidden_state[0], results[0].last_hidden_state[0], tied

    def norm(self, *hidden: Tensor) -> tuple[Tensor, ...]:
        model = self._model(0)
        return tuple(model.norm(each) for each in hidden)

    def _model(self, layer: int) -> Any:
        family, architecture = self._family, self._architecture
        sources = family.of_layer(architecture, layer)
        targets = family.of_layer(architecture, 0)
        state = {
            name: value[:]
            for source, target in zip(sources, targets, strict=True)
            for name, value in zip(target.hf, self._weights.hf(source), strict=True)
        }
        norm = family.last[0]
        state[norm.hf[0]] = self._weights.hf(norm)[0][:]
        state[family.first[0].hf[0]] = torch.zeros(1, architecture.hidden_size)
        if self._layer_types:
            self._config.layer_types = [self._layer_types[layer]]
        with _quiet():
            # This also brings tensors into the form that transformers computes with (the experts
            # of a layer in one tensor).
            model, info = self._class.from_pretrained(
                None,
                config=self._config,
                state_dict=state,
                dtype=torch.float32,
                output_loading_info=True,
            )
        if any(info.values()):
            raise CheckpointError(
                f"{self._weights.directory}: transformers does not take layer {layer} as its own: "
                + ", ".join(f"{problem} {names}" for problem, names in info.items() if names)
            )
        return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar for each layer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Megatron:
    """The Megatron checkpoint in the trainer's model."""

    def __init__(self, weights: Weights, architecture: Architecture, layout: Any) -> None:
        self._weights, self._architecture = weights, architecture
        self._family = family_of(architecture)
        self._layout = layout
        self._config = ModelConfig(hf_model=str(weights.directory), transformer_impl="local")
        self._build(slides=False)

    def _build(self, *, slides: bool) -> None:
        """The model of one layer whose attention slides or is full."""
        one_layer = dataclasses.replace(
            self._architecture, num_layers=1, vocab_size=1, sliding_layers=(0,) if slides else ()
        )
        (built,) = model.build_model(one_layer, self._config, self._layout, _CPU)
        # As in the middle of a pipeline: hidden states in, hidden states out.
        built.pre_process = built.decoder.pre_process = False
        self._norm: Any = built.decoder.final_layernorm
        built.decoder.final_layernorm = torch.nn.Identity()
        self._model, self._slides = built, slides

    def embed(self, tokens: list[int]) -> Tensor:
        return self._weights.load(self._family.first[0].name)[tokens].float()

    def output_weight(self) -> Tensor:
        """[V, H]"""
        return self._weights.load(_output(self._architecture).name)

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states [T, H] after one layer."""
        slides = self._architecture.window_of(layer) is not None
        if slides != self._slides:
            self._build(slides=slides)
        sources = self._family.of_layer(self._architecture, layer)
        targets = self._family.of_layer(self._architecture, 0)
        stored = {
            name: source.name
            for source, target in zip(sources, targets, strict=True)
            for name in target.megatron
        }
        # On one rank the whole tensor is the parameter: no table stands between what is stored
        # and what is computed.
        for name, parameter in self._model.decoder.layers.named_parameters():
            parameter.copy_(self._weights.load(stored[f"decoder.layers.{name}"]))
        count = len(hidden)
        self._model.set_input_tensor(hidden[:, None])
        row = attention.row_layout(torch.tensor([0, count], dtype=torch.int32), count)
        positions = torch.arange(count)
        return self._model(torch.zeros(count, dtype=torch.int64), positions, row)[:, 0]

    def norm(self, hidden: Tensor) -> Tensor:
        self._norm.weight.copy_(self._weights.load(self._family.last[0].name))
        return self._norm(hidden)


def _output(architecture: Architecture) -> Entry:
    """The entry of the output layer: the embedding's if they are tied."""
    family = family_of(architecture)
    return family.first[0] if architecture.tie_word_embeddings else family.last[1]
