"""Everything that is computed on vocab-parallel logits [T, V/tp].

Where it fits: L1, on the last pipeline stage, between the output layer and the objective, and in
the sampler. Each function takes an explicit tensor-parallel process group; None means one rank,
which skips the collectives and nothing else, so each function is its own reference. Ids from
`vocab_size` on are padding of the vocabulary and never receive probability mass.
"""

from megatron_drpo.vocab_parallel.divergence import Normalizer, divergence, normalizers_of
from megatron_drpo.vocab_parallel.gemm import project
from megatron_drpo.vocab_parallel.kept import (
    cat_kept,
    holds,
    keep_only,
    kept_to,
    outside,
    select_kept,
    uncut,
)
from megatron_drpo.vocab_parallel.linear import (
    Other,
    Scores,
    fused_linear_objective,
    linear_scores,
)
from megatron_drpo.vocab_parallel.logprobs import TokenScores, logprobs_and_entropy
from megatron_drpo.vocab_parallel.sampling import Sample, counter_uniforms, sample
from megatron_drpo.vocab_parallel.topk import TopK, vocab_parallel_topk

__all__ = [
    "Normalizer",
    "Other",
    "Sample",
    "Scores",
    "TokenScores",
    "TopK",
    "cat_kept",
    "counter_uniforms",
    "divergence",
    "fused_linear_objective",
    "holds",
    "keep_only",
    "kept_to",
    "linear_scores",
    "logprobs_and_entropy",
    "normalizers_of",
    "outside",
    "project",
    "sample",
    "select_kept",
    "uncut",
    "vocab_parallel_topk",
]
