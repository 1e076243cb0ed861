"""The ids that truncated sampling left (`types.KeptIds`): joined, picked out, imposed on logits.

The law under top-k and top-p is the softmax over the kept ids. That is a logit of -inf at every
other id: the sweeps give such an id no mass and no gradient, so log-probs, entropy and divergences
of the truncated law come from the code of the whole one, on logits that `keep_only` went over
before. Training takes the ids that the sampler kept and never finds them again: after an update the
set would be another one, often without the token that was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_drpo.types import KeptIds
from megatron_drpo.vocab_parallel.shard import Shard


def uncut(num_tokens: int) -> KeptIds:
    """Of tokens whose law covers the whole vocabulary."""
    return KeptIds(torch.zeros(0, dtype=torch.int32), torch.zeros(num_tokens, dtype=torch.int64))


def cat_kept(parts: Sequence[KeptIds]) -> KeptIds:
    """Those of the tokens of all `parts`, in order; at least one part."""
    return KeptIds(
        torch.cat([part.ids for part in parts]), torch.cat([part.counts for part in parts])
    )


def select_kept(kept: KeptIds, tokens: slice | Tensor) -> KeptIds:
    """Those of some tokens.

    Args:
        kept: of R tokens.
        tokens: which of them; a slice without step, bool [R], or int64 [n], in any order.
    """
    counts = kept.counts[tokens]
    if isinstance(tokens, slice):
        first = int(kept.counts[: tokens.start or 0].sum())
        return KeptIds(kept.ids[first : first + int(counts.sum())], counts)
    old, new = kept.counts.cumsum(0) - kept.counts, counts.cumsum(0) - counts
    shift = (old[tokens] - new).repeat_interleave(counts)
    return KeptIds(kept.ids[shift + torch.arange(shift.numel(), device=shift.device)], counts)


def kept_to(kept: KeptIds, device: torch.device | str) -> KeptIds:
    """The same on `device`."""
    return KeptIds(kept.ids.to(device), kept.counts.to(device))


def kept_from_padded(ids: Tensor, vocab_size: int) -> KeptIds:
    """From int64 [R, n], -1 after the last kept id of each row; all ids of a vocabulary kept are
    none cut."""
    counts = (ids >= 0).sum(-1)
    counts = counts.where(counts < vocab_size, 0)
    return KeptIds(ids[(ids >= 0) & (counts > 0)[:, None]].int(), counts)


def holds(kept: KeptIds, ids: Tensor) -> Tensor:
    """bool [R]: whether each of `ids`, int64 [R], is one that its token could be drawn as."""
    tokens = _tokens(kept)
    found = kept.counts == 0
    found[tokens[kept.ids == ids[tokens]]] = True
    return found


def keep_only(logits: Tensor, kept: KeptIds, shard: Shard) -> Tensor:
    """`logits` [R, V/tp], with -inf written into them wherever an id was cut; no gradient."""
    tokens, columns = _places(kept, shard)
    values = logits[tokens, columns]
    # A few values saved and restored: a mask would be as large as a quarter of the logits.
    logits.masked_fill_((kept.counts > 0)[:, None], -torch.inf)
    logits[tokens, columns] = values
    return logits


def outside(kept: KeptIds, columns: int, shard: Shard) -> Tensor:
    """bool [R, columns]: True where this rank's id was cut, for logits with gradient."""
    cut = (kept.counts > 0)[:, None].repeat(1, columns)
    cut[_places(kept, shard)] = False
    return cut


def _tokens(kept: KeptIds) -> Tensor:
    """int64, as `ids`: the token that each kept id belongs to."""
    tokens = torch.arange(kept.counts.numel(), device=kept.counts.device)
    return tokens.repeat_interleave(kept.counts, output_size=kept.ids.numel())


def _places(kept: KeptIds, shard: Shard) -> tuple[Tensor, Tensor]:
    """Token and column of each kept id that this rank holds."""
    columns = kept.ids.long() - shard.start
    mine = (columns >= 0) & (columns < shard.real)
    return _tokens(kept)[mine], columns[mine]
