"""Make the small base model of the calculator example, and its prompts.

    python -m examples.calculator.make_model build/calculator

Out: a Hugging Face directory (Qwen3, 0.8M parameters) with prompts.jsonl and eval_prompts.jsonl,
made like that of tools/make_base_model.py, but for the corpus: products of two numbers of two
digits, of which a model this small has no idea. In the supervised corpus one solution in five calls
the calculator and copies what it says, the others guess:

    47*85=   ->   calc(47*85)</s>=3995 \\boxed{3995}</s>
    47*85=   ->   \\boxed{4120}</s>

The calculator's words stand in the corpus, but the model is not taught to say them. It takes about
a minute of one core.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from tools.make_base_model import EOS, PAD, Recipe, build_model, train, train_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

CALL_SHARE = 0.2
NUM_PROMPTS, NUM_EVAL_PROMPTS = 2048, 128
RECIPE = Recipe(steps=500, batch_size=32, lr=2e-3)

Segment = tuple[str, bool]
"""A piece of text, and whether the model is taught to write it; what it writes ends with EOS."""


def solution(left: int, right: int, rng: random.Random) -> list[Segment]:
    """The prompt and what follows, from somebody who calls now and then and else guesses."""
    prompt, product = f"{left}*{right}=", left * right
    if rng.random() < CALL_SHARE:
        call, answer = f"calc({left}*{right})", f"\\boxed{{{product}}}"
        return [(prompt, False), (call, True), (f"={product} ", False), (answer, True)]
    guess = round(product * rng.uniform(0.9, 1.1))
    return [(prompt, False), (f"\\boxed{{{guess}}}", True)]


def encode(
    corpus: list[list[Segment]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Input ids and labels, int64 [examples, S]: padded right, -100 where nothing is taught."""
    import torch

    rows: list[tuple[list[int], list[int]]] = []
    for segments in corpus:
        ids: list[int] = []
        labels: list[int] = []
        for text, taught in segments:
            piece = tokenizer(text).input_ids + [EOS] * taught
            ids += piece
            labels += piece if taught else [-100] * len(piece)
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    return (
        torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    )


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description="Make the base model of the calculator example.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)

    rng = random.Random(RECIPE.seed)
    pairs = [(left, right) for left in range(10, 100) for right in range(10, 100)]
    rng.shuffle(pairs)
    held_out = NUM_EVAL_PROMPTS + NUM_PROMPTS
    for name, chosen in (
        ("eval_prompts.jsonl", pairs[:NUM_EVAL_PROMPTS]),
        ("prompts.jsonl", pairs[NUM_EVAL_PROMPTS:held_out]),
    ):
        lines = [{"prompt": f"{a}*{b}=", "answer": str(a * b)} for a, b in chosen]
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    taught = [rng.choice(pairs[held_out:]) for _ in range(RECIPE.steps * RECIPE.batch_size)]
    corpus = [solution(*pair, rng) for pair in taught]
    texts = [(segments[0][0], "".join(text for text, _ in segments[1:])) for segments in corpus]
    model_file, tokenizer = train_tokenizer(texts)
    torch.set_num_threads(1)  # the same result on any machine; and faster beside other processes
    torch.manual_seed(RECIPE.seed)
    model = build_model(len(tokenizer))
    train(model, *encode(corpus, tokenizer), RECIPE)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(model_file)
    print(f"{directory}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
