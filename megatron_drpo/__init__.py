"""Megatron-DRPO: reinforcement learning with DRPO (arXiv 2606.09821) on Megatron-core."""

__version__ = "0.1.0"
