"""Checkpoints: what enters a run and what it leaves behind.

In: a Hugging Face directory (config.json, safetensors), or the training state of an earlier run.
Out: filled Megatron parameters, a Hugging Face directory, or training state. `families` reads
config.json and declares how weights convert, `hf` moves them between safetensors and model chunks,
`state` saves and resumes a training run.
"""
