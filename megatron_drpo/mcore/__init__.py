"""The only folder that knows Megatron.

Where it fits: L2. In: the configuration, the architecture and rows of tokens. Out: log-probs,
gradients, updated weights. Importing any module of this package on a machine without a GPU first
installs `mcore.cpu`, so that megatron-core finds its CPU meaning; on a GPU it does nothing.
"""

import warnings as _warnings

import torch as _torch

from megatron_drpo.mcore import cpu as _cpu

if not _torch.cuda.is_available():
    _cpu.install()

# Megatron calls collectives by names that torch is about to rename; nothing a user could mend.
_warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
