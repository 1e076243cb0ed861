"""Prompts: the first arrow of the data flow, from a JSONL file to token ids, and their order.

In: a JSONL file, and the tokenizer of the Hugging Face directory. Out: `types.Prompt` records, the
ids that end a response, and which prompts each training step takes.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2
import numpy as np
import torch

from megatron_drpo.errors import ConfigError, DataError
from megatron_drpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = TypeVar("Record")

MAX_PROBLEMS = 10
"""Problems listed by one error; the rest is counted."""


def raise_problems(problems: list[str]) -> None:
    """One DataError that lists up to `MAX_PROBLEMS` of the problems; nothing if there are none."""
    if problems:
        more = len(problems) - MAX_PROBLEMS
        rest = [f"... and {more} more"] if more > 0 else []
        raise DataError("\n".join(problems[:MAX_PROBLEMS] + rest))


def read_jsonl(
    path: str | Path, parse: Callable[[int, dict[str, Any]], Record], what: str
) -> list[Record]:
    """The objects of a JSONL file, each through `parse`; blank lines are skipped.

    A file that begins as gzip files do is decompressed, whatever its name.

    Args:
        path: the file, UTF-8.
        parse: takes the line's number (from 1) and its object; raises DataError, without the
            place, for an object it cannot use.
        what: what the file should hold and the flag that names it, for messages.

    Raises:
        DataError: the file cannot be read or holds nothing, or the problems of all lines at once.
    """
    records = [*parse_lines(path, read_lines(path, what), parse)]
    if not records:
        raise DataError(f"{path}: is empty; give a JSONL file of {what}")
    return records


def read_lines(path: str | Path, what: str) -> Iterator[bytes]:
    """The lines of a file, one at a time in memory; see `read_jsonl`."""
    try:
        with Path(path).open("rb") as file:
            compressed = file.peek(2).startswith(b"\x1f\x8b")
            yield from gzip.GzipFile(fileobj=file) if compressed else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: is damaged or not complete ({error}); copy or write it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a JSONL file of {what}") from error


def parse_lines(
    path: str | Path, lines: Iterable[bytes], parse: Callable[[int, dict[str, Any]], Record]
) -> Iterator[Record]:
    """What `read_jsonl` makes of the lines of `path`, as they come; the problems of all lines are
    raised after the last."""
    problems = []
    for number, line in enumerate(lines, start=1):
        # Without its end, too: JSON's reader would count columns from there.
        line = line.rstrip()
        if not line:
            continue
        try:
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"malformed JSON in column {error.colno}: {error.msg}; "
                    "each line must be one JSON object"
                ) from error
            except ValueError as error:  # not UTF-8, or an absurdly long integer
                raise DataError(f"malformed JSON: {error}") from error
            if not isinstance(value, dict):
                raise DataError(f"must be a JSON object, found {_kind(value)}")
            record = parse(number, value)
        except DataError as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            yield record
    raise_problems(problems)


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def read_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    apply_chat_template: bool,
    max_prompt_length: int,
    context_flag: str,
) -> tuple[Prompt, ...]:
    """The prompts of a JSONL file, one object per line, tokenized and checked.

    Fields of a line: `prompt`, text or a list of chat messages `{"role", "content"}`; optionally
    `answer`, text or a number; optionally `id`; whatever else there is becomes the metadata.

    Chat messages go through the tokenizer's chat template with the generation prompt added. Text is
    encoded with the tokenizer's defaults (a tokenizer that adds a BOS adds one, unless the text
    itself begins with it), but never with an EOS at its end.

    Args:
        path: the file.
        tokenizer: of the model, as `load_tokenizer` gives it.
        apply_chat_template: treat text as the message of a user.
        max_prompt_length: tokens that the context has room for, the response taken off.
        context_flag: the flag and value that the response took, such as
            "--rollout-max-response-length 256", for the message of a prompt that is too long.

    Raises:
        ConfigError: `apply_chat_template` and the tokenizer has no chat template.
        DataError: the file is missing or empty, or FILE:LINE of everything that cannot be used.
    """
    if apply_chat_template and not tokenizer.chat_template:
        raise ConfigError(
            "--apply-chat-template: the tokenizer has no chat template; drop the flag, or add "
            "chat_template.jinja to the directory of --hf-model"
        )
    first_line: dict[str, int] = {}

    def parse(number: int, line: dict[str, Any]) -> Prompt:
        prompt = line.pop("prompt", None)
        answer = _text_of(line.pop("answer", None), "answer")
        name = _text_of(line.pop("id", None), "id") or f"{Path(path).name}:{number}"
        if first_line.setdefault(name, number) != number:
            raise DataError(f"id {name!r} is also that of line {first_line[name]}; ids are unique")
        text, ids = _encode(prompt, tokenizer, apply_chat_template)
        if len(ids) > max_prompt_length:
            raise DataError(
                f"the prompt has {len(ids)} tokens and the context has room for "
                f"{max_prompt_length}; shorten or remove it, or lower {context_flag}"
            )
        return Prompt(name, text, torch.tensor(ids, dtype=torch.int64), answer, line)

    return tuple(read_jsonl(path, parse, "prompts (--prompts, --eval-prompts)"))


def _text_of(value: object, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"`{name}` must be text or a number, found {_kind(value)}")


def _encode(
    prompt: object, tokenizer: PreTrainedTokenizerBase, apply_chat_template: bool
) -> tuple[str, list[int]]:
    """The text that the model sees and its ids; DataError for a prompt that gives none."""
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise DataError("`prompt` is missing or empty; give text or a list of chat messages")
    if isinstance(prompt, str):
        if not apply_chat_template:
            return prompt, _encode_text(prompt, tokenizer)
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list):
        messages = prompt
        for index, message in enumerate(messages):
            fields = message if isinstance(message, dict) else {}
            if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
                raise DataError(f"message {index} of `prompt` needs the texts `role` and `content`")
        if not tokenizer.chat_template:
            raise DataError(
                "`prompt` is a list of chat messages, but the tokenizer has no chat template; "
                "give text"
            )
    else:
        raise DataError(f"`prompt` must be text or a list of chat messages, found {_kind(prompt)}")
    try:
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except jinja2.TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses `prompt`: {error}") from error
    return text, tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    # A second BOS, or an end before the response begins, is a prompt the model has never seen.
    special = not (bos and text.startswith(bos))
    # Not verbose: `read_prompts` has its own words, with the line, for a prompt that is too long.
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids = ids[:-1]
    if not ids:
        raise DataError("`prompt` encodes to no tokens; give text that the tokenizer knows")
    return ids


_REPLACEMENTS = 1 << 32
"""Stands where an epoch's number would: a sequence of random numbers of their own."""


class PromptSampler:
    """Which prompts each step takes: a function of the step's number, so a resume needs no state.

    Epochs follow each other without a gap, each in an order given by (seed, epoch), and steps cut
    that stream into equal pieces. A step that lies across the end of an epoch takes from the next
    one those prompts first that it does not hold yet, so that no step holds a prompt twice and
    every epoch still holds each prompt once.

    Example: 5 prompts, 2 per step, not shuffled: [0, 1] [2, 3] [4, 0] [1, 2] [3, 4] [0, 1] ...

    Raises:
        ConfigError: a step takes more prompts than there are.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int, shuffle: bool) -> None:
        if prompts_per_step > num_prompts:
            raise ConfigError(
                f"--rollout-prompts-per-step {prompts_per_step}: the prompts file has "
                f"{num_prompts} prompts, and a step takes each at most once; lower it or add "
                "prompts"
            )
        self._num_prompts = num_prompts
        self._per_step = prompts_per_step
        self._seed = seed
        self._shuffle = shuffle

    def indices(self, step: int) -> list[int]:
        """The prompts of a step (from 0), as indices into the file: [prompts_per_step]."""
        epoch, start = divmod(step * self._per_step, self._num_prompts)
        picked = self._order(epoch)[start : start + self._per_step]
        missing = self._per_step - len(picked)
        if missing:
            picked = np.concatenate([picked, self._order(epoch + 1)[:missing]])
        return picked.tolist()

    def replacements(self, step: int, count: int, taken: Iterable[int]) -> list[int]:
        """Up to `count` further prompts for a step, in an order given by (seed, step).

        Args:
            taken: prompts that the step has used already; there are fewer than `count` only where
                none are left besides these.
        """
        bits = np.random.Philox(np.random.SeedSequence([self._seed, _REPLACEMENTS, step]))
        order = np.random.Generator(bits).permutation(self._num_prompts)
        left = order[~np.isin(order, list(taken))]
        return left[:count].tolist()

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._num_prompts)
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        return np.random.Generator(bits).permutation(self._num_prompts)

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation, what its first step already holds moved out of that step."""
        n, per_step = self._num_prompts, self._per_step
        # Reordering an epoch depends on the end of the one before it, back to an epoch that begins
        # with a step; only the first `per_step` places change, so in a long epoch never the end.
        first = epoch - epoch % (per_step // math.gcd(n, per_step))
        if n >= 2 * per_step:
            first = max(first, epoch - 1)
        order = self._permutation(first)
        for number in range(first + 1, epoch + 1):
            head = -number * n % per_step  # places of this epoch in a step begun in the last one
            held = order[n - (per_step - head) :] if head else order[:0]
            order = self._permutation(number)
            taken = np.flatnonzero(~np.isin(order, held))[:head]
            order = np.concatenate([order[taken], np.delete(order, taken)])
        return order


def load_tokenizer(directory: str | Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory; neither the network nor remote code is used.

    Args:
        directory: holds tokenizer.json or a SentencePiece model.
        vocab_size: `vocab_size` of the model's config.json.

    Raises:
        DataError: no usable tokenizer, or one with an id that the model has no row for.
    """
    from transformers import AutoTokenizer  # seconds to import

    if not Path(directory).is_dir():
        raise DataError(f"--hf-model {directory}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception on a damaged file
        raise DataError(
            f"--hf-model {directory}: no usable tokenizer there (tokenizer.json and "
            f"tokenizer_config.json): {error}"
        ) from error
    # Without any of its files, transformers makes up one that knows special tokens only.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(
            f"--hf-model {directory}: no usable tokenizer there (tokenizer.json or a SentencePiece "
            "tokenizer.model); copy the files of the model's tokenizer into it"
        )
    largest = _largest_id(tokenizer)
    if largest >= vocab_size:
        raise DataError(
            f"--hf-model {directory}: the tokenizer's largest id is {largest}, but vocab_size in "
            f"config.json is {vocab_size}: they are not of the same model; restore its tokenizer"
        )
    return tokenizer


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values())


def stop_ids(
    directory: str | Path, tokenizer: PreTrainedTokenizerBase, extra: Iterable[int]
) -> tuple[int, ...]:
    """The token ids that end a response, ascending.

    They are `eos_token_id` of generation_config.json, else of config.json, else of the tokenizer,
    and `extra` (--rollout-stop-ids).

    Raises:
        DataError: one of the two files is not JSON.
        ConfigError: an id is not one of the tokenizer's, or there is none at all.
    """
    extra = list(extra)
    largest = _largest_id(tokenizer)
    found: Any = tokenizer.eos_token_id
    origin = "the tokenizer"
    for value in extra:
        if not 0 <= value <= largest:
            raise ConfigError(
                f"--rollout-stop-ids {value}: the tokenizer's ids are 0 to {largest}; give ids of "
                "these"
            )
    for name in ("config.json", "generation_config.json"):  # the later one wins
        value = _eos_of(Path(directory) / name)
        if value is not None:
            found, origin = value, str(Path(directory) / name)
    ids = {i for i in (found if isinstance(found, list) else [found]) if i is not None}
    for value in ids:
        if not isinstance(value, int) or not 0 <= value <= largest:
            raise ConfigError(
                f"eos_token_id {value} of {origin}: the tokenizer's ids are 0 to {largest}; mend "
                "it there (--rollout-stop-ids only adds to it)"
            )
    if not ids and not extra:
        raise ConfigError(
            f"--rollout-stop-ids: neither {directory} nor its tokenizer names an eos_token_id; "
            "give the ids that end a response"
        )
    return tuple(sorted({*ids, *extra}))


def _eos_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: malformed JSON: {error}; restore the file") from error
