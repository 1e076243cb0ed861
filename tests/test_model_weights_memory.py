"""Import and export hold one parameter besides the model, however many there are."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.checkpoint.hf import HfWeights
from megatron_drpo.checkpoint.model_weights import Places, export_hf, load_weights
from tests.plain_chunks import plain_chunk

LAYERS, HIDDEN, FFN, VOCAB = 16, 512, 2048, 1024
MIB = 1 << 20
LARGEST = 2 * FFN * HIDDEN * 4
ARCHITECTURE = Architecture(
    family="llama",
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=8,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    tie_word_embeddings=False,
    qk_layernorm=False,
    add_qkv_bias=False,
    hf_dtype="float32",
)


def _chunk() -> Any:
    """A model whose equal parameters share their storage, so that it takes the place of a layer."""
    shapes = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
        "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, FFN),
    }
    parameters: dict[str, Tensor] = {
        "embedding.word_embeddings.weight": torch.ones(VOCAB, HIDDEN),
        "decoder.final_layernorm.weight": torch.ones(HIDDEN),
        "output_layer.weight": torch.ones(VOCAB, HIDDEN),
    }
    for kind, shape in shapes.items():
        value = torch.ones(shape)
        parameters |= {f"decoder.layers.{n}.{kind}": value for n in range(LAYERS)}
    return plain_chunk(parameters, LAYERS)


def _peak() -> int:
    """Bytes of the process's largest resident memory so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(root: Path, results: Any) -> None:
    torch.set_num_threads(1)
    chunks = [_chunk()]
    before = _peak()
    export_hf(
        root / "out",
        root / "in",
        ARCHITECTURE,
        chunks,
        Places(),
        max_shard_bytes=64 * MIB,
    )
    exported = _peak()
    with HfWeights(root / "out", ARCHITECTURE) as weights:
        load_weights(weights, ARCHITECTURE, chunks, Places())
    results.put((exported - before, _peak() - exported))


def test_memory_is_that_of_one_parameter(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    context = multiprocessing.get_context("spawn")  # a fresh process has no peak of its own yet
    results = context.Queue()
    process = context.Process(target=_measure, args=(tmp_path, results))
    process.start()
    exported, loaded = results.get(timeout=120)
    process.join()
    total = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert total > 30 * LARGEST
    # The halves of fc1 are put together once more on either way; allocators round.
    limit = 4 * LARGEST + 8 * MIB
    assert exported < limit and loaded < limit, (exported / MIB, loaded / MIB, total / MIB)
