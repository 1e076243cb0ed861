"""Rollouts: sampled responses with the log-probs of the law they were drawn from.

In: `types.Prompt` records and the training weights, or a file of rollouts. Out: `types.Rollout`
records, or such a file.
"""
