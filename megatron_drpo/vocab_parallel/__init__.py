"""Everything that is computed on vocab-parallel logits [T, V/tp].

Where it fits: L1, on the last pipeline stage, between the output layer and the objective, and in
the sampler. Each function takes an explicit tensor-parallel process group; None means one rank,
which skips the collectives and nothing else, so each function is its own reference. Ids from
`vocab_size` on are padding of the vocabulary and never receive probability mass.
"""

from megatron_drpo.vocab_parallel.logprobs import TokenLogprobs, vocab_parallel_logprobs
from megatron_drpo.vocab_parallel.sampling import counter_uniforms, sample

__all__ = ["TokenLogprobs", "counter_uniforms", "sample", "vocab_parallel_logprobs"]
