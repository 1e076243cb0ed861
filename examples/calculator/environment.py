"""An environment: a calculator that the policy may call, as it does its sums.

    python -m examples.calculator.make_model build/calculator
    bash examples/train_drpo_gpt.sh --config examples/recipes/calculator_cpu.yaml

In: a turn that ends in a call, such as `calc(47*85)`. Out: `=3995 `, which the policy goes on from;
any other turn is its last, and earns 1 if it is the boxed product. (An environment that gives no
rewards leaves the whole response to `--reward`.) Of the base model's responses one in five calls,
the others guess: it is right on 0.13 of the held-out prompts. After 15 steps it should call nearly
always and be right on 0.85; what is left is digits copied wrongly.
"""

from __future__ import annotations

import re

from megatron_drpo.rollout.environment import Observation, Turn
from megatron_drpo.types import Prompt

CALL = re.compile(r"calc\((\d{1,9})\*(\d{1,9})\)\Z")


class Calculator:
    """Multiplies what it is asked to. One for each conversation."""

    def __init__(self, prompt: Prompt) -> None:
        self.answer = prompt.answer

    def step(self, turn: Turn) -> Observation:
        """The product, if that was asked for; else what the answer is worth."""
        call = CALL.search(turn.text)
        if call is not None:
            return Observation(f"={int(call[1]) * int(call[2])} ", reward=0.0)
        return Observation(reward=float(turn.text == f"\\boxed{{{self.answer}}}"), done=True)
