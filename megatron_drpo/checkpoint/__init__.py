"""Checkpoints: what enters a run and what it leaves behind.

In: a Hugging Face directory (config.json, safetensors) or Megatron's distributed checkpoint, and
the training state of an earlier run. Out: filled Megatron parameters, a directory of either kind,
or what a resumed run needs to know. `families` reads config.json and declares how weights convert;
`hf` reads and writes Hugging Face directories, `torch_dist` Megatron's; `model_weights` moves
weights between either and model chunks, `convert` between the two, without a model; `manifest` says
what a directory holds and whether it still does; `resume` which training state a run continues
from.
"""
