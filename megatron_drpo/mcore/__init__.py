"""The only folder that knows Megatron.

Where it fits: L2. In: the configuration, the architecture and rows of tokens. Out: log-probs,
gradients, updated weights. Importing any module of this package on a machine without a GPU first
installs `mcore.cpu`, so that megatron-core finds its CPU meaning; on a GPU it does nothing.
"""

import logging as _logging
import warnings as _warnings

import torch as _torch

from megatron_drpo.mcore import cpu as _cpu

if not _torch.cuda.is_available():
    _cpu.install()

# How Megatron calls torch.distributed is about to change; nothing a user could mend.
_warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
_warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\.")

# Advice to the authors of training programs, from 0.17 to 0.19 on, that 0.16 has no answer to.
for _module, _advice in (
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("distributed.distributed_data_parallel", "full_param_layout not provided"),
    ("dist_checkpointing.strategies.torch", "async save is deprecated"),
):
    _logging.getLogger(f"megatron.core.{_module}").addFilter(
        lambda record, advice=_advice: advice not in record.getMessage()
    )
