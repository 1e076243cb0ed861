"""Read responses on a terminal: what was asked, what was answered, and what it was worth.

    python tools/show_rollouts.py RUN [--step 12] [--min-reward 1] [--finish-reason length]

reads a run (its saved rollouts, else the samples of its evaluations), a rollouts file or a
directory of such files (docs/rollouts.md; .jsonl or .jsonl.gz, also one that is still being
written), or a samples.jsonl. Filters are joined by "and". `--tokens` shows the log-prob of every
token and marks the improbable ones; `--json` prints the lines themselves for other tools.
"""

from __future__ import annotations

import heapq
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_drpo.cli import exit_status
from megatron_drpo.errors import ConfigError, DataError
from megatron_drpo.prompts import load_tokenizer, parse_lines, read_lines
from megatron_drpo.rollout.files import complete_lines, step_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sort = Literal["file", "reward", "length", "logprob", "lowest"]

_PLAIN_WIDTH = 120
"""Columns where there is no terminal."""
_TEXT = 600
"""Characters of a text that are shown without --full."""
_PER_TOKEN = ("response_ids", "behaviour_logprobs", "loss_mask")
"""Fields of a line that have one value per token of the response."""
_IDS = 1 << 31
"""More token ids than any tokenizer has."""


@dataclass(frozen=True)
class Show:
    """Read responses on a terminal: what was asked, what was answered, and what it was worth."""

    path: tyro.conf.Positional[tuple[str, ...]]
    """Runs, rollouts files, directories of them, or samples.jsonl."""
    step: int | None = None
    """Of a run or of samples.jsonl: this step only."""
    min_reward: float | None = None
    """Rewards of at least this."""
    max_reward: float | None = None
    """Rewards of at most this."""
    failed: bool = False
    """Only responses whose reward failed."""
    finish_reason: Literal["stop", "length"] | None = None
    """Only responses that ended so."""
    id: str | None = None
    """Only the prompt of this id."""
    search: str | None = None
    """Only responses with this in prompt, response or answer: a regular expression; capitals count
    only if it has some."""
    sort: Sort = "file"
    """As in the file; or by reward, by length in tokens, or by the mean or the lowest log-prob of a
    response, the smallest first."""
    reverse: bool = False
    """The other way round."""
    limit: int = 10
    """Responses shown; 0 is all."""
    full: bool = False
    """Show long texts whole."""
    tokens: bool = False
    """Show every token of the responses with its log-prob."""
    rare: float = 0.01
    """Mark tokens that were less probable than this."""
    tokenizer: str | None = None
    """Directory of the tokenizer that --tokens shows texts by; of a run it is known."""
    json: bool = False
    """Print the chosen lines as JSON, one per line, with `file` and `line` added."""

    def problems(self) -> list[str]:
        """Values that mean nothing."""
        problems = []
        if not self.path:
            problems.append("PATH: give a run, a rollouts file, a directory of them")
        if self.limit < 0:
            problems.append(f"--limit {self.limit}: must be 0 (all) or more")
        if not 0 <= self.rare <= 1:
            problems.append(f"--rare {self.rare}: must be a probability, 0 to 1")
        if self.search is not None:
            try:
                re.compile(self.search)
            except re.error as error:
                problems.append(f"--search {self.search}: is no regular expression ({error})")
        if self.failed and not (self.min_reward is None and self.max_reward is None):
            problems.append("--failed: has no reward to compare with --min-reward, --max-reward")
        if self.json and self.tokens:
            problems.append("--json: has every token's log-prob as it is; drop --tokens")
        if self.json and self.full:
            problems.append("--json: has long texts whole; drop --full")
        problems += [
            f"--{name} {getattr(self, name)}: is read by --tokens only; give that, or drop it"
            for name in ("rare", "tokenizer")
            if not self.tokens and getattr(self, name) != getattr(Show, name)
        ]
        return problems


@dataclass(frozen=True)
class Response:
    """A line of a file.

    Example: Response(file=Path("rollouts/step-000001.jsonl"), number=2, line={"id": "a:7", ...})
    """

    file: Path
    number: int
    """From 1."""
    line: dict[str, Any]
    """As it is in the file."""

    @property
    def reward(self) -> float | None:
        """None: there is none; NaN: it failed."""
        if "reward" not in self.line:
            return None
        value = self.line["reward"]
        return math.nan if value is None else float(value)

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens that the policy wrote; none in samples.jsonl."""
        values = self.line.get("behaviour_logprobs") or []
        # A mask alone has nothing to say.
        return [float(value) for value, own in zip(values, self.mask, strict=False) if own]

    @property
    def mask(self) -> list[bool]:
        """Which tokens the policy wrote."""
        return self.line.get("loss_mask") or [True] * self.length

    @property
    def length(self) -> int:
        """Tokens, or in samples.jsonl, which has none, characters."""
        lists = (self.line.get(name) for name in _PER_TOKEN)
        return len(next((each for each in lists if each is not None), self.line["response"]))

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else math.nan

    @property
    def lowest_logprob(self) -> float:
        return min(self.logprobs, default=math.nan)


@dataclass
class Seen:
    """What is kept of all responses: themselves they need not fit into memory."""

    laws: dict[str, None] = field(default_factory=dict)
    """What files have in common, by their headers; each once."""
    rewards: list[float] = field(default_factory=list)
    """Those that there are and that did not fail."""
    num_responses: int = 0
    num_chosen: int = 0
    """Of these, how many the filters let through."""


def main(argv: Sequence[str] | None = None) -> int:
    """Show; the exit status."""
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Parse, read, filter, print.

    Raises:
        DrpoError: whatever the user has to mend.
    """
    asked = tyro.cli(Show, args=argv, prog="show_rollouts.py", config=(tyro.conf.OmitArgPrefixes,))
    problems = asked.problems()
    if problems:
        raise ConfigError("\n".join(problems))
    seen = Seen()
    every = (each for path in asked.path for each in read(Path(path), asked.step, seen))
    shown = select(every, asked, seen)
    if asked.json:
        for each in shown:
            print(json.dumps({"file": str(each.file), "line": each.number} | each.line))
        return
    console = Console(
        highlight=False, markup=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH
    )
    _Page(console, asked, seen).show(shown)


# Reading.


def read(path: Path, step: int | None, seen: Seen) -> Iterator[Response]:
    """The responses of what a path names, in order, one at a time in memory.

    Less is asked of a line than training asks: only what is shown has to be there.

    Args:
        seen: receives what the headers of the files say, and what all responses come to.

    Raises:
        DataError: there is nothing to read, or a line is damaged, or does not say its step.
    """
    for file in _files(path, step):

        def parse(number: int, line: dict[str, Any], file: Path = file) -> Response | None:
            if "rollouts" in line and number == 1:
                seen.laws[_law(line)] = None
                return None
            return _checked(Response(file, number, line))

        for each in parse_lines(file, _lines(file), parse):
            if each is not None and (step is None or _is_of(each, step)):
                seen.num_responses += 1
                if each.reward is not None and not math.isnan(each.reward):
                    seen.rewards.append(each.reward)
                yield each


def _lines(file: Path) -> Iterator[bytes]:
    """Of a file that is being written, or whose writer was killed, those that are complete."""
    if not (file.name.endswith(".partial") or file.name == "samples.jsonl"):
        yield from read_lines(file, "rollouts or samples")
        return
    try:
        with file.open("rb") as opened:
            for _, line in complete_lines(opened):
                yield line
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give a file that can be read") from error


def _is_of(each: Response, step: int) -> bool:
    if each.file.name == step_file(step):
        return True
    if "step" not in each.line:
        raise DataError(
            f"--step {step}: {each.file} does not say the step of its responses; give the run, or "
            "drop --step"
        )
    return each.line["step"] == step


def _checked(response: Response) -> Response:
    """DataError if the line is no response."""
    line = response.line
    for name in ("prompt", "response"):
        if not isinstance(line.get(name), str):
            raise DataError(f"`{name}` must be text; this is neither a rollout nor a sample")
    reward = line.get("reward")
    # NaN and infinity, which Python's reader takes, fail the comparison.
    if reward is not None and not (_is_number(reward) and abs(reward) <= sys.float_info.max):
        raise DataError("`reward` must be a number, or null where it failed")
    lists = [value for name in _PER_TOKEN if (value := line.get(name)) is not None]
    if not all(isinstance(value, list) for value in lists) or len({*map(len, lists)}) > 1:
        raise DataError(f"`{'`, `'.join(_PER_TOKEN)}` must be lists, equally long")
    for index, value in enumerate(line.get("response_ids") or ()):
        if type(value) is not int or not 0 <= value < _IDS:
            raise DataError(f"`response_ids` holds {value!r:.40} at index {index}; give token ids")
    logprobs = line.get("behaviour_logprobs") or ()
    for index, (value, own) in enumerate(zip(logprobs, response.mask, strict=False)):
        if own and not (_is_number(value) and -sys.float_info.max <= value <= 0):
            raise DataError(
                f"`behaviour_logprobs` holds {value!r:.40} at index {index}; the log-prob of a "
                "token that the policy wrote is a number, at most 0"
            )
    return response


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _files(path: Path, step: int | None) -> list[Path]:
    """The files that a path names."""
    if not path.exists():
        raise DataError(f"{path}: is not there; give a run, a rollouts file, a directory of them")
    if not path.is_dir():
        return [path]
    if (path / "config.json").is_file() and (path / "metrics.jsonl").exists():
        return _files_of_run(path, step)
    endings = (".jsonl", ".jsonl.gz", ".partial")
    found = sorted(each for each in path.iterdir() if each.name.endswith(endings))
    found = [each for each in found if not each.name.startswith(".")]
    if not found:
        raise DataError(f"{path}: holds neither *.jsonl nor *.jsonl.gz")
    return found


def _files_of_run(run: Path, step: int | None) -> list[Path]:
    """A run's saved rollouts, else the samples that it logged."""
    saved = sorted((run / "rollouts").glob("step-*.jsonl"))
    if step is not None and saved:
        saved = [file for file in saved if file.name == step_file(step)]
        if not saved:
            raise DataError(f"--step {step}: {run}/rollouts has no rollouts of this step")
    samples = run / "samples.jsonl"
    if not saved and not samples.is_file():
        raise DataError(
            f"{run}: has neither rollouts nor samples.jsonl; train with --save-rollouts, or with "
            "--eval-prompts"
        )
    return saved or [samples]


# Choosing.


def select(responses: Iterable[Response], asked: Show, seen: Seen) -> list[Response]:
    """The responses that are asked for, in the order that is asked for, up to the limit.

    Reads all, and keeps no more than the limit. `seen` receives how many there were to choose from.
    """
    wanted, key = _filter(asked), _order(asked)

    def chosen() -> Iterator[tuple[int, Response]]:
        for each in filter(wanted, responses):
            seen.num_chosen += 1
            yield seen.num_chosen, each

    # Both leave what is equal in the order of the file.
    pairs = (
        heapq.nsmallest(asked.limit, chosen(), key) if asked.limit else sorted(chosen(), key=key)
    )
    return [each for _, each in pairs]


def _filter(asked: Show) -> Callable[[Response], bool]:
    search = None
    if asked.search is not None:
        capitals = asked.search != asked.search.lower()
        search = re.compile(asked.search, 0 if capitals else re.IGNORECASE)
    low, high = asked.min_reward, asked.max_reward

    def wanted(each: Response) -> bool:
        line, reward = each.line, each.reward
        answer = line.get("answer")
        texts = (line["prompt"], line["response"], "" if answer is None else str(answer))
        known = math.nan if reward is None else reward
        return (
            (low is None or known >= low)
            and (high is None or known <= high)
            and (not asked.failed or (reward is not None and math.isnan(reward)))
            and asked.finish_reason in (None, line.get("finish_reason"))
            and asked.id in (None, line.get("id"))
            and (search is None or any(search.search(text) for text in texts))
        )

    return wanted


def _order(asked: Show) -> Callable[[tuple[int, Response]], tuple[bool, float]]:
    """What (place in the file, response) is sorted by."""
    keys: dict[Sort, Callable[[int, Response], float | None]] = {
        "file": lambda place, each: place,
        "reward": lambda place, each: each.reward,
        "length": lambda place, each: each.length,
        "logprob": lambda place, each: each.mean_logprob,
        "lowest": lambda place, each: each.lowest_logprob,
    }

    def key(pair: tuple[int, Response]) -> tuple[bool, float]:
        value = keys[asked.sort](*pair)
        # What has no number comes last either way.
        if value is None or math.isnan(value):
            return True, 0.0
        return False, -value if asked.reverse else value

    return key


# Showing.


def visible(text: str) -> str:
    """The text with control characters spelt out: what a file holds must not command a terminal.

    So are halves of surrogate pairs, which JSON can hold and no terminal takes. Line feeds and tabs
    stay.
    """
    controls = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(controls, lambda found: f"\\x{ord(found[0]):02x}", text)


class _Page:
    """What is printed; colours are those of rewards between the lowest and the highest read."""

    def __init__(self, console: Console, asked: Show, seen: Seen) -> None:
        self.console, self.asked, self.seen = console, asked, seen
        self.low, self.high = min(seen.rewards, default=0.0), max(seen.rewards, default=0.0)
        self._tokenizers: dict[Path, PreTrainedTokenizerBase | None] = {}

    def show(self, shown: Sequence[Response]) -> None:
        seen = self.seen
        for law in seen.laws:
            self._print(law, "dim")
        for each in shown:
            self._response(each)
        told = f"{len(shown)} of {seen.num_chosen} chosen, of {seen.num_responses} responses"
        if seen.rewards:
            told += f", mean reward of all {sum(seen.rewards) / len(seen.rewards):.4g}"
        self._print(f"\n{told}", "dim")

    def _response(self, each: Response) -> None:
        line = each.line
        self.console.rule(style="dim")
        head = Text(visible(f"{each.file}:{each.number}"), style="dim")
        for name, start in (("step", "step "), ("id", ""), ("sample", "sample ")):
            if name in line:
                head.append(f"  {start}{visible(str(line[name]))}", style="bold")
        self.console.print(head, soft_wrap=True)
        facts = Text("reward " if each.reward is not None else "no reward")
        if each.reward is not None:
            facts.append(*self._worth(each.reward))
        if line.get("answer") is not None:
            facts.append(f"  answer {visible(str(line['answer']))}")
        if "finish_reason" in line:
            cut = line["finish_reason"] == "length"
            facts.append(f"  {visible(str(line['finish_reason']))}", "yellow" if cut else "")
        if each.logprobs:
            facts.append(
                f"  {each.length} tokens, mean log-prob {each.mean_logprob:.3f}, "
                f"lowest {each.lowest_logprob:.3f}"
            )
        if "policy_version" in line:
            facts.append(f"  policy version {visible(str(line['policy_version']))}", "dim")
        tokens = bool(each.logprobs) and line.get("response_ids") is not None
        if self.asked.tokens and not tokens:
            facts.append("  no tokens with log-probs", "dim")
        self.console.print(facts, soft_wrap=True)
        self._print(self._text(line["prompt"]), "cyan")
        if self.asked.tokens and tokens:
            self._tokens(each)
        else:
            self._print(self._text(line["response"]), "")

    def _tokens(self, each: Response) -> None:
        line = each.line
        ids, values = line["response_ids"], line["behaviour_logprobs"]
        tokenizer = self._tokenizer(each.file)
        texts = [""] * len(ids)
        if tokenizer is not None:
            texts = [json.dumps(text) for text in tokenizer.batch_decode([[i] for i in ids])]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("token", "id", "text", "log-prob", "prob", ""):
            table.add_column(title, justify="left" if title in ("text", "") else "right")
        rows = zip(ids, texts, values, each.mask, strict=True)
        for number, (token, text, value, own) in enumerate(rows):
            start, style = [str(number), str(token), text], ""
            if own:
                probability = math.exp(value)
                rare = probability < self.asked.rare
                style = "bold red" if rare else _shade(probability)
                cells = [*start, f"{value:.4f}", f"{probability:.4g}", "<- rare" if rare else ""]
            else:
                style, cells = "dim", [*start, "", "", "not the policy's"]
            table.add_row(*(Text(visible(cell)) for cell in cells), style=style)
        self.console.print(table)

    def _tokenizer(self, file: Path) -> PreTrainedTokenizerBase | None:
        """The one that was named, else that of the run which the file lies in, if it does."""
        named = self.asked.tokenizer
        directory = Path(named) if named else file.parent.parent / "model"
        if directory not in self._tokenizers:
            found = None
            if named or (directory / "tokenizer_config.json").is_file():
                found = _load_tokenizer(directory)
            self._tokenizers[directory] = found
        return self._tokenizers[directory]

    def _worth(self, reward: float) -> tuple[str, str]:
        """A reward and its colour."""
        if math.isnan(reward):
            return "failed", "bold magenta"
        if self.low == self.high:
            return f"{reward:g}", "bold"
        third = int(3 * (reward - self.low) / (self.high - self.low))
        return f"{reward:g}", ("bold red", "bold yellow", "bold green", "bold green")[third]

    def _text(self, text: str) -> str:
        left = len(text) - _TEXT
        if self.asked.full or left <= 0:
            return text
        # Both ends: a response's answer is at its end.
        half = _TEXT // 2
        return f"{text[:half]} [... {left} characters; --full shows them ...] {text[-half:]}"

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(visible(text), style=style), soft_wrap=True)


def _law(header: dict[str, Any]) -> str:
    """What all responses of a file have in common."""
    names = ("temperature", "top_p", "top_k", "max_response_length", "engine")
    return ", ".join(f"{name} {header[name]}" for name in names if name in header)


def _shade(probability: float) -> str:
    return "yellow" if probability < 0.1 else "" if probability < 0.9 else "green"


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(directory, sys.maxsize)
    except DataError as error:
        raise DataError(str(error).replace("--hf-model", "--tokenizer", 1)) from error


if __name__ == "__main__":
    sys.exit(main())
