"""Everything that a run needs, tiny: a model with its tokenizer, and prompts."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import save_tiny

NUM_PROMPTS = 8


def make_tiny_run(directory: Path) -> list[str]:
    """Fill DIRECTORY; returns the flags of a valid run there, on relative paths.

    The model has 8 heads in 4 groups, 4 layers and a context of 64 tokens; one character is one
    token.
    """
    save_tiny(directory / "model", "qwen3")
    vocab = {
        token: number for number, token in enumerate(["<pad>", "<unk>", "</s>", *"0123456789+="])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(directory / "model")
    lines = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(NUM_PROMPTS)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        *("--hf-model", "model", "--prompts", "prompts.jsonl", "--reward", "exact"),
        *("--rollout-prompts-per-step", "4", "--rollout-samples-per-prompt", "2"),
        *("--updates-per-rollout", "2", "--rollout-max-response-length", "8"),
        *("--train-iters", "2", "--output-dir", "out"),
    ]
