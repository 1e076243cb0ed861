"""The only folder that knows Megatron.

Where it fits: L2. In: the configuration, the architecture and rows of tokens. Out: log-probs,
gradients, updated weights. Importing any module of this package on a machine without a GPU first
installs `mcore.cpu`, so that megatron-core finds its CPU meaning; on a GPU it does nothing.
"""

import torch as _torch

from megatron_drpo.mcore import cpu as _cpu

if not _torch.cuda.is_available():
    _cpu.install()
