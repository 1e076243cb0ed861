"""Make the small base model and the prompts of the CPU default job: a file to run, or to import.

In: nothing but a directory name. Out: an ordinary Hugging Face directory (Qwen3, 0.8M parameters,
SentencePiece tokenizer) that also holds `prompts.jsonl` and `eval_prompts.jsonl`; whoever trains on
it needs to know nothing of this file.

The task is column arithmetic on two numbers of two digits, shown the way a pupil works it, from the
right, the carry included; the answer stands in the box that math graders read:

    47+85=   ->   12 13 \\boxed{132}          7+5 = 12, 4+8+1 = 13
    85-47=   ->   8 3 \\boxed{38}             15-7 = 8, 8-1-4 = 3

**The supervised corpus is of mixed quality on purpose, as text from the web is.** Its worked
columns are right but for a few slips; of the boxed answers, stated shares (`Recipe`) are only rough
(rounded down to tens, 130) or cut short (13). A model that imitates it knows the arithmetic, and
yet its own samples are wrong more often than right: what reinforcement learning can mend, quickly
for the answers, slowly for the slips. pass@8 is high from the start.

Held-out prompts share no pair of operands, in either order or operation, with the training prompts,
and neither shares one with the supervised corpus.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and transformers take seconds to import: only a build needs them
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD, UNK, EOS = 0, 1, 2
METADATA_FILE = "base_model.json"


@dataclass(frozen=True)
class Recipe:
    """All that decides what is built; its hash tells whether a directory can be reused."""

    version: int = 1
    """Raised with every change of the code below that changes what is built."""
    seed: int = 0
    """Seed of the splits, the corpus, the initial weights and the order of training."""
    steps: int = 900
    """Optimizer updates of the supervised training."""
    batch_size: int = 16
    """Worked solutions per update."""
    lr: float = 1.5e-3
    """Peak learning rate; 50 updates of warm-up, then linear to 0."""
    slip_share: float = 0.05
    """Share of the corpus's solutions that have a mistake in a column."""
    rough_share: float = 0.32
    """Share of the corpus's solutions whose boxed answer is rounded down to tens."""
    cut_share: float = 0.29
    """Share of the corpus's solutions whose boxed answer lacks its last digit (if it has two)."""
    num_prompts: int = 3072
    """Training prompts."""
    num_eval_prompts: int = 256
    """Held-out prompts."""

    @property
    def hash(self) -> str:
        """Hex digest of every field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Problem:
    """Two numbers of two digits and what to do with them; `left` >= `right` for `-`."""

    left: int
    operation: str
    right: int

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"{self.left}{self.operation}{self.right}="

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.left + self.right if self.operation == "+" else self.left - self.right


@dataclass(frozen=True)
class Splits:
    """Problems by use; no pair of operands occurs in two of the lists."""

    eval_prompts: list[Problem]
    prompts: list[Problem]
    corpus: list[Problem]


def make_splits(recipe: Recipe) -> Splits:
    """Every pair of two-digit operands, once added and once subtracted, in one of three lists."""
    rng = random.Random(f"splits {recipe.seed}")
    pairs = [(high, low) for high in range(10, 100) for low in range(10, high + 1)]
    rng.shuffle(pairs)
    problems = [
        problem
        for high, low in pairs
        for problem in (
            Problem(*((high, "+", low) if rng.random() < 0.5 else (low, "+", high))),
            Problem(high, "-", low),
        )
    ]
    first, second = recipe.num_eval_prompts, recipe.num_eval_prompts + recipe.num_prompts
    if first % 2 or second % 2 or second >= len(problems):
        raise ValueError(
            f"num_eval_prompts {first} and num_prompts {recipe.num_prompts} must be even (a pair "
            f"of operands makes two problems) and sum to less than the {len(problems)} there are"
        )
    return Splits(problems[:first], problems[first:second], problems[second:])


def work_out(problem: Problem, slips: tuple[int, int] = (0, 0)) -> str:
    """The worked solution: the columns from the right, then the boxed answer that they give.

    `slips` is added to the column of the ones and of the tens; all that follows is consistent.
    """
    sign = 1 if problem.operation == "+" else -1
    ones = problem.left % 10 + sign * (problem.right % 10) + slips[0]
    carry, last_digit = divmod(ones, 10)  # -1 is a borrow
    tens = problem.left // 10 + sign * (problem.right // 10) + carry + slips[1]
    # A sum is written with its carry; a difference as the digit that stays after borrowing.
    return f"{ones if sign > 0 else last_digit} {tens} \\boxed{{{10 * tens + last_digit}}}"


def mistaken_solution(problem: Problem, rng: random.Random) -> str:
    """A worked solution with one column off by one, never below zero; its answer is wrong."""
    column, slip = rng.randrange(2), rng.choice((-1, 1))
    solution = work_out(problem, (slip, 0) if column == 0 else (0, slip))
    if "-" in solution:
        solution = work_out(problem, (-slip, 0) if column == 0 else (0, -slip))
    return solution


def make_corpus(problems: list[Problem], recipe: Recipe) -> list[tuple[str, str]]:
    """(prompt, worked solution) for each training example, in the order of training."""
    rng = random.Random(f"corpus {recipe.seed}")
    corpus = []
    for _ in range(recipe.steps * recipe.batch_size):
        problem = rng.choice(problems)
        solution = work_out(problem)
        if rng.random() < recipe.slip_share:
            solution = mistaken_solution(problem, rng)
        answer = rng.random()
        if answer < recipe.rough_share:
            solution = solution[:-2] + "0}"
        elif answer < recipe.rough_share + recipe.cut_share and solution[-3].isdigit():
            solution = solution[:-2] + "}"
        corpus.append((problem.prompt, solution))
    return corpus


def train_tokenizer(corpus: list[tuple[str, str]]) -> tuple[bytes, PreTrainedTokenizerFast]:
    """Train a SentencePiece unigram model; return its file and the same as a fast HF tokenizer.

    Lines of printable ASCII survive encoding and decoding unchanged: no normalization, no space in
    front, no space dropped, and a piece for every character. Digits stand alone.
    """
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter

    characters = "\n" + "".join(map(chr, range(33, 127)))
    model_file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompt + solution for prompt, solution in corpus[:4000]),
        model_writer=model_file,
        model_type="unigram",
        vocab_size=100,
        required_chars=characters,
        split_digits=True,
        split_by_unicode_script=False,  # so that "\boxed{" can be one piece
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=PAD,
        unk_id=UNK,
        bos_id=-1,
        eos_id=EOS,
        pad_piece="<pad>",
        unk_piece="<unk>",
        eos_piece="</s>",
        num_threads=1,
        minloglevel=2,
    )
    proto = ModelProto.FromString(model_file.getvalue())
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=SpmConverter.build_tokenizer_from_spm_proto(proto, vocab),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    return model_file.getvalue(), tokenizer


def build_model(vocab_size: int) -> Qwen3ForCausalLM:
    """A fresh model; heads, groups, feed-forward width and layers can be halved by TP and PP."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=384,
            max_position_embeddings=128,
            initializer_range=0.05,  # learns sooner than the usual 0.02 at this width
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model


def encode_corpus(
    corpus: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Input ids and labels, int64 [examples, S]: padded right, labels -100 outside the response."""
    import torch

    prompts = tokenizer([prompt for prompt, _ in corpus]).input_ids
    responses = tokenizer([solution for _, solution in corpus]).input_ids
    width = max(len(p) + len(r) + 1 for p, r in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(corpus), width), PAD)
    labels = torch.full((len(corpus), width), -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response) + 1
        input_ids[row, :end] = torch.tensor([*prompt, *response, EOS])
        labels[row, start:end] = input_ids[row, start:end]
    return input_ids, labels


def train(model: Qwen3ForCausalLM, input_ids: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """Supervised training, one pass over the examples in their order."""
    import torch
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1 - step / recipe.steps)
    )
    model.train()
    progress = tqdm(range(recipe.steps), desc="base model", unit="step", mininterval=2)
    for step in progress:
        batch = slice(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        loss = model(input_ids=input_ids[batch], labels=labels[batch], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]
) -> dict[str, float]:
    """Held-out accuracy: greedy, and of 8 samples at temperature 1 (mean, and any right)."""
    import torch

    # Every prompt has the same length (two digits each side), so there is nothing to pad.
    inputs = torch.tensor(tokenizer([problem.prompt for problem in problems]).input_ids)

    def right(**how: Any) -> Tensor:
        limit = {"max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": PAD}
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **limit, **how)
        texts = tokenizer.batch_decode(output[:, inputs.shape[1] :], skip_special_tokens=True)
        samples = len(texts) // len(problems)
        return torch.tensor(
            [
                text.endswith(f"\\boxed{{{problems[index // samples].answer}}}")
                for index, text in enumerate(texts)
            ]
        ).view(len(problems), samples)

    greedy = right(do_sample=False)
    sampled = right(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=8)
    return {
        "greedy_accuracy": greedy.float().mean().item(),
        "sampled_accuracy": sampled.float().mean().item(),
        "sampled_pass_at_8": sampled.any(dim=1).float().mean().item(),
    }


def _write_jsonl(path: Path, problems: list[Problem]) -> None:
    lines = [json.dumps({"prompt": p.prompt, "answer": str(p.answer)}) for p in problems]
    path.write_text("\n".join(lines) + "\n")


@contextmanager
def _torch_state(seed: int) -> Iterator[None]:
    """Seeded random numbers and one thread for a while; the caller's are put back.

    One thread, because that makes the result independent of the number of cores, and because two
    threads are many times slower than one as soon as another process takes one of two cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _build(directory: Path, recipe: Recipe) -> dict[str, Any]:
    """Fill the empty `directory`; return the metadata written to it."""
    start = time.perf_counter()
    splits = make_splits(recipe)
    corpus = make_corpus(splits.corpus, recipe)
    model_file, tokenizer = train_tokenizer(corpus)
    with _torch_state(recipe.seed):
        model = build_model(len(tokenizer))
        train(model, *encode_corpus(corpus, tokenizer), recipe)
        accuracy = measure(model, tokenizer, splits.eval_prompts)
    model.save_pretrained(directory)
    # safetensors writes for the owner alone; the checkpoint is as readable as its config.
    shutil.copymode(directory / "config.json", directory / "model.safetensors")
    tokenizer.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(model_file)
    _write_jsonl(directory / "prompts.jsonl", splits.prompts)
    _write_jsonl(directory / "eval_prompts.jsonl", splits.eval_prompts)
    metadata = {
        "recipe_hash": recipe.hash,
        "recipe": asdict(recipe),
        "num_parameters": model.num_parameters(),
        **accuracy,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (directory / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
    return metadata


def _is_built(directory: Path, recipe: Recipe) -> bool:
    """Whether `directory` holds this recipe's model; False if there is nothing yet.

    Raises CheckpointError if it holds anything else.
    """
    from megatron_drpo.errors import CheckpointError

    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    metadata_file = directory / METADATA_FILE
    try:
        found = json.loads(metadata_file.read_text())["recipe_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{directory}: exists but is not a base model made by tools/make_base_model.py (no "
            f"readable {METADATA_FILE}); name another directory, or move this one away"
        ) from None
    if found != recipe.hash:
        raise CheckpointError(
            f"{metadata_file}: base model of recipe {found}, but {recipe.hash} is wanted (another "
            "seed or version); name another directory, or delete this one to have it made again"
        )
    return True


def ensure_base_model(directory: Path, recipe: Recipe | None = None) -> Path:
    """Build the base model into `directory` unless it is there; return `directory`.

    Any number of processes may call this at once: one builds, the others wait and reuse. The
    directory appears complete, by a rename, or not at all; a lock file stays beside it.

    Raises CheckpointError if `directory` holds something else or cannot be written.
    """
    from megatron_drpo.errors import CheckpointError

    recipe = recipe or Recipe()
    if _is_built(directory, recipe):
        print(f"base model: reusing {directory} (recipe {recipe.hash})", flush=True)
        return directory
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = directory.with_name(f".{directory.name}.lock").open("a")
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be made there ({error}); name a directory that can be written"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"base model: waiting for the process that makes {directory}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_built(directory, recipe):
            print(f"base model: reusing {directory} (recipe {recipe.hash})", flush=True)
            return directory
        shutil.rmtree(partial, ignore_errors=True)  # left by a build that was killed
        partial.mkdir()
        try:
            metadata = _build(partial, recipe)
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(
        f"base model: made {directory} in {metadata['seconds']:.0f} s; held-out accuracy "
        f"{metadata['greedy_accuracy']:.0%} greedy, {metadata['sampled_accuracy']:.0%} sampled, "
        f"pass@8 {metadata['sampled_pass_at_8']:.0%}",
        flush=True,
    )
    return directory


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Make the small base model and the prompts of the CPU default job.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole recipe")
    arguments = parser.parse_args()

    from megatron_drpo.errors import DrpoError

    try:
        ensure_base_model(arguments.output, Recipe(seed=arguments.seed))
    except DrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package, if not installed
    main()
