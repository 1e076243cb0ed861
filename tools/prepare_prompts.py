"""Make a prompts file of a data set of mathematics that is on disk.

    python tools/prepare_prompts.py gsm8k --inputs train.jsonl --out prompts/gsm8k.jsonl

In: the files of GSM8K, MATH, DAPO-Math or AIME as they are published (JSONL, JSON, Parquet). Out:
what `--prompts` and `--eval-prompts` take, one JSON object a line. Problems that occur twice are
written once; those with two different answers, or of `--exclude`, are left out and named; a line
that is not of the data set is refused (docs/data.md).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from megatron_drpo import disk
from megatron_drpo.cli import exit_status
from megatron_drpo.errors import ConfigError, DataError

Row = dict[str, Any]
"""A line of a data set; names of fields in lower case."""

INSTRUCTIONS = {
    "boxed": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\n{problem}\n\nRemember to put your answer on its own line after "Answer:".'
    ),
    "none": "{problem}",
}
"""Words around a problem: boxed as on Qwen's model cards, dapo as in the files of DAPO-Math-17k."""

_SUFFIXES = (".json", ".jsonl", ".parquet", ".jsonl.gz")
_PROBLEM_FIELDS = ("problem", "question", "prompt")
_FIELDS_OF = {"gsm8k": ("question",), "math": ("problem",)}
"""Of data sets whose files all have the same name for it: lines of others are known by that."""
_METADATA = {"level": ("level",), "subject": ("subject", "type")}
"""What reaches rewards and rollouts files, and the fields that it is taken from."""
_NUM_NAMED = 3


@dataclass(frozen=True)
class Prepare:
    """Make a prompts file (JSONL) of a data set of mathematics that is on disk."""

    dataset: tyro.conf.Positional[Literal["gsm8k", "math", "dapo", "aime"]]
    """Whose files these are: GSM8K, MATH (and MATH-500), DAPO-Math-17k, or AIME of any year."""
    inputs: tuple[str, ...]
    """JSONL, JSON or Parquet files, or directories of them."""
    out: str
    """Receives the prompts."""
    template: Literal["chat", "raw"] = "chat"
    """chat: a list of messages, for the tokenizer's chat template; raw: text, for a base model."""
    instruction: str = "boxed"
    r"""boxed (asks for \boxed{}), dapo (asks for a line "Answer: ..."), none, or a text of your own
    that holds {problem}."""
    system: str | None = None
    """Text of a system message that comes first, with --template chat."""
    holdout: int = 0
    """Problems that go to --eval-out instead, chosen by --seed and their own text, not by their
    order."""
    eval_out: str | None = None
    """Receives the held-out prompts."""
    seed: int | None = None
    """Of the choice of --holdout; by default 1234."""
    exclude: tuple[str, ...] = ()
    """Files (or directories) of problems that must not be in --out: those of the evaluation."""

    @property
    def wording(self) -> str:
        """The text that holds {problem}."""
        return INSTRUCTIONS.get(self.instruction, self.instruction)

    def problems(self) -> list[str]:
        """What is at odds."""
        found = []
        if "{problem}" not in self.wording:
            found.append(
                f"--instruction {self.instruction!r}: must be {', '.join(INSTRUCTIONS)}, or a text "
                "that holds {problem}"
            )
        if not self.inputs:
            found.append("--inputs: give the files of the data set")
        if self.system is not None and self.template == "raw":
            found.append("--system: is a chat message; drop it, or use --template chat")
        if self.holdout < 0:
            found.append(f"--holdout {self.holdout}: must be 0 (none) or more")
        if (self.holdout > 0) != (self.eval_out is not None):
            found.append(
                f"--holdout {self.holdout} --eval-out {self.eval_out}: give both, or neither"
            )
        if self.seed is not None and not self.holdout:
            found.append(
                f"--seed {self.seed}: is of the choice of --holdout; drop it, or give both"
            )
        for flag, name in (("--out", self.out), ("--eval-out", self.eval_out)):
            if name and Path(name).is_dir():
                found.append(f"{flag} {name}: is a directory; name a file")
        outputs = [Path(name).resolve() for name in (self.out, self.eval_out) if name]
        read = {path.resolve() for name in (*self.inputs, *self.exclude) for path in files_of(name)}
        if len(set(outputs)) < len(outputs) or read & set(outputs):
            found.append("--out, --eval-out: must be other files than those read, and than another")
        return found


@dataclass(frozen=True)
class Problem:
    """One problem. Example: Problem("What is 1+1?", "2", "train.jsonl:7", {"level": 1})"""

    text: str
    answer: str
    source: str
    """File and line that it was read from."""
    metadata: dict[str, Any]

    @property
    def key(self) -> str:
        """What two copies have in common: all but white space and case."""
        return "".join(self.text.split()).casefold()


def main(argv: Sequence[str] | None = None) -> int:
    """Make the files; the exit status."""
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Parse, read, check, write.

    Raises:
        DrpoError: whatever the user has to mend; then nothing is written.
    """
    settings = tyro.cli(Prepare, args=argv, prog="prepare_prompts.py")
    found = settings.problems()
    if found:
        raise ConfigError("\n".join(found))
    read, excluded = _Reader(settings.dataset), set[str]()
    refused = [line for name in settings.inputs for line in read.add(name)]
    for path in [path for name in settings.exclude for path in files_of(name)]:
        refused += read_rows(path, lambda _, row: excluded.add(_loose(problem_text(row))))
    if refused:
        from megatron_drpo.prompts import raise_problems

        raise_problems(refused)
    kept, of_exclude = _apart(read.problems, excluded)
    order = _order(1234 if settings.seed is None else settings.seed)
    chosen = {problem.key for problem in sorted(kept, key=order)[: settings.holdout]}
    held = [problem for problem in kept if problem.key in chosen]
    rest = [problem for problem in kept if problem.key not in chosen]
    rest, like_held = _apart(rest, {_loose(problem.text) for problem in held})
    if not rest:
        raise DataError(
            f"--holdout {settings.holdout}: {len(kept)} problems are left of --inputs, "
            f"{len(like_held)} of them like a held-out one, and --out must get at least one; hold "
            "out or exclude less"
        )
    outputs = {settings.out: rest}
    if settings.eval_out is not None:
        outputs[settings.eval_out] = held
    _write({name: _lines(settings, problems) for name, problems in outputs.items()})
    print(f"{read.num_rows} lines, {read.num_repeated} of them repeat an earlier one")
    for reason, problems in (
        ("with two different answers", read.contradictory),
        ("of --exclude", of_exclude),
        ("like a held-out one", like_held),
    ):
        if problems:
            print(f"{len(problems)} {reason} left out: {_named(problems)}")
    for name, problems in outputs.items():
        print(f"{name}: {len(problems)} prompts")


# --- Reading ------------------------------------------------------------------------------------


class _Reader:
    """Collects the problems of files, each once."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._found: dict[str, Problem] = {}
        self._contradictory: dict[str, Problem] = {}
        self.num_rows = self.num_repeated = 0

    def add(self, name: str) -> list[str]:
        """Read a file, or the files of a directory; what cannot be used of them (`read_rows`)."""
        refused = []
        for path in files_of(name):
            shown = path.name if path == Path(name) else str(path.relative_to(name))

            def take(number: int, row: Row, shown: str = shown) -> None:
                self._take(parse_problem(self._dataset, row, f"{shown}:{number}"))

            refused += read_rows(path, take)
        return refused

    def _take(self, problem: Problem) -> None:
        self.num_rows += 1
        first = self._found.setdefault(problem.key, problem)
        if first is problem:
            return
        self.num_repeated += 1
        if "".join(first.answer.split()) != "".join(problem.answer.split()):
            self._contradictory.setdefault(problem.key, problem)

    @property
    def problems(self) -> list[Problem]:
        """In the order of the files, without the contradictory ones."""
        found = self._found.items()
        return [problem for key, problem in found if key not in self._contradictory]

    @property
    def contradictory(self) -> list[Problem]:
        """Problems that were given another answer somewhere else, from there."""
        return list(self._contradictory.values())


def files_of(name: str) -> list[Path]:
    """The file itself, or those of a directory and below that may hold a data set, by name.

    Raises:
        DataError: there is none.
    """
    path = Path(name)
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{name}: no such file or directory")
        return [path]
    found = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
    if not found:
        raise DataError(f"{name}: holds no file that ends in {', '.join(_SUFFIXES)}")
    return found


def read_rows(path: Path, take: Callable[[int, Row], None]) -> list[str]:
    """Call `take` with the number and the fields of each line (JSONL), or of each row (a JSON
    array or object, Parquet), counted from 1.

    Returns:
        What cannot be used, for `raise_problems`: `FILE:LINE: ...` of each line that is no object
        or that `take` raised a DataError for, `FILE: ...` where the file cannot be read.
    """
    refused, number = [], 0
    try:
        for number, value in _values(path):
            try:
                row = _parsed(value) if isinstance(value, bytes) else value
                if not isinstance(row, dict):
                    raise DataError("must be a JSON object with the fields of a problem")
                take(number, {str(name).lower(): field for name, field in row.items()})
            except DataError as error:
                refused.append(f"{path}:{number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        refused.append(f"{path}: cannot be read ({error}); copy it again")
    except DataError as error:
        refused.append(f"{path}: {error}")
    else:
        if not number:
            refused.append(f"{path}: is empty")
    return refused


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbers and rows of a file; lines of JSONL as bytes, for one of them may be malformed."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        yield from enumerate(_parquet_rows(path), start=1)
        return
    if path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError:
            pass  # may be JSONL of that name; if not, the line is named
        else:
            yield from enumerate(value if isinstance(value, list) else [value], start=1)
            return
    with gzip.open(path) if magic.startswith(b"\x1f\x8b") else path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"malformed JSON in column {error.colno}: {error.msg}; each line must be one object"
        ) from error
    except ValueError as error:  # not UTF-8, or an absurdly long integer
        raise DataError(f"malformed JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, those columns only that are read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: is a Parquet file, which is read with pyarrow; install it: "
            "python -m pip install pyarrow"
        ) from error
    wanted = {*_PROBLEM_FIELDS, "answer", "solution", "reward_model"}
    wanted.update(name for names in _METADATA.values() for name in names)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name.lower() in wanted]
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            yield from batch.to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot be read as Parquet ({error}); copy it again") from error


# --- What the data sets look like ---------------------------------------------------------------


def parse_problem(dataset: str, row: Row, source: str) -> Problem:
    """One line of a data set.

    Raises:
        DataError: it is not of that data set.
    """
    text = problem_text(row, _FIELDS_OF.get(dataset, _PROBLEM_FIELDS))
    metadata = {
        name: row[field] for name, fields in _METADATA.items() for field in fields if row.get(field)
    }
    return Problem(text, _ANSWERS[dataset](row), source, metadata)


def problem_text(row: Row, fields: Sequence[str] = _PROBLEM_FIELDS) -> str:
    """The bare problem, of the first of these fields that is there, without the words that
    DAPO-Math-17k puts around it.

    Raises:
        DataError: there is none, or it cannot be told from its instruction.
    """
    name = next((name for name in fields if row.get(name)), None)
    value = None if name is None else row[name]
    messages = isinstance(value, list)
    if messages:
        users = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == "user"]
        value = users[0] if len(value) == len(users) == 1 else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"found no text of a problem; {' or '.join(f'`{field}`' for field in fields)} must "
            f"hold it (of chat messages, only a single one of a user can be used); there is "
            f"{_fields(row)}; if this is another data set, name that one"
        )
    text = value.strip()
    before, after = INSTRUCTIONS["dapo"].split("{problem}")
    if text.startswith(before.strip()) and text.endswith(after.strip()):
        text = text.removeprefix(before.strip()).removesuffix(after.strip()).strip()
        if text:
            return text
    elif not messages:
        return text
    raise DataError(
        f"`{name}` does not have the words of DAPO-Math-17k around a problem, so the problem "
        "cannot be told from its instruction; give a file with the bare problem as `problem`"
    )


def boxed(solution: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...} of a solution, or after a \boxed without
    braces; None without any, where braces do not match, or where a command follows instead."""
    found = list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[^\s${}\\]+)?", solution))
    if not found or found[-1][1] is None:
        return None
    last = found[-1]
    if last[1] != "{":
        return last[1].rstrip(".,;")
    depth, start = 1, last.end()
    for place, char in _unescaped(solution, start):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return solution[start:place].strip()
    return None


def _unescaped(text: str, start: int) -> Iterator[tuple[int, str]]:
    r"""Characters from `start` on with their places, without \{ and the like."""
    place = start
    while place < len(text):
        if text[place] == "\\":
            place += 1
        else:
            yield place, text[place]
        place += 1


def _answer_gsm8k(row: Row) -> str:
    solution, marker, last = str(row.get("answer") or "").rpartition("####")
    answer = last.strip().replace(",", "").removeprefix("$")
    if not marker or not re.fullmatch(r"-?\d+(\.\d+)?", answer):
        raise DataError(
            "`answer` must end in `#### NUMBER`, as GSM8K's solutions do; found "
            f"{(solution + marker + last)[-40:]!r}"
        )
    return answer


def _answer_math(row: Row) -> str:
    answer = _scalar(row.get("answer")) or boxed(str(row.get("solution") or ""))
    if not answer:
        raise DataError(
            "has neither an `answer` nor a `solution` with its answer in \\boxed{}; there is "
            + _fields(row)
        )
    return answer


def _answer_dapo(row: Row) -> str:
    answer = _stated_answer(row)
    if "####" in answer or "\\boxed" in answer:
        raise DataError(
            f"the answer is a whole solution, ...{answer[-40:]!r}; name the data set that this is: "
            "gsm8k has `####` before the answer, math has it in \\boxed{}"
        )
    return answer


def _stated_answer(row: Row) -> str:
    graded = row.get("reward_model")
    truth = graded.get("ground_truth") if isinstance(graded, dict) else None
    if isinstance(truth, list) and len(truth) == 1:
        truth = truth[0]
    answer = next(filter(None, map(_scalar, (truth, row.get("answer"), row.get("solution")))), None)
    if not answer:
        raise DataError(
            "found no answer; `reward_model` with `ground_truth`, `answer` or `solution` must hold "
            f"it; there is {_fields(row)}"
        )
    return answer


def _answer_aime(row: Row) -> str:
    answer = _stated_answer({name: value for name, value in row.items() if name != "solution"})
    whole = re.fullmatch(r"0*(\d{1,3})(\.0+)?", answer)
    if not whole:
        raise DataError(f"`answer` {answer!r}: an answer of AIME is a whole number from 0 to 999")
    return whole[1]


_ANSWERS: dict[str, Callable[[Row], str]] = {
    "gsm8k": _answer_gsm8k,
    "math": _answer_math,
    "dapo": _answer_dapo,
    "aime": _answer_aime,
}


def _scalar(value: object) -> str | None:
    """Text or a number as text; None for anything else, and for empty text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def _fields(row: Row) -> str:
    return ", ".join(f"`{name}`" for name in row) or "nothing"


# --- What is left out, and writing --------------------------------------------------------------


def _apart(problems: list[Problem], others: set[str]) -> tuple[list[Problem], list[Problem]]:
    """The problems that are not among these texts (of `_loose`), and those that are."""
    inside = [problem for problem in problems if _loose(problem.text) in others]
    keys = {problem.key for problem in inside}
    return [problem for problem in problems if problem.key not in keys], inside


def _loose(text: str) -> str:
    r"""Letters and digits outside of LaTeX commands: a copy is often set with other signs and
    commands, and a problem too many that is left out does no harm.

    Where nothing else is there, the text itself: without it, all such would be one. The first
    alternative is a line break, whose second backslash does not begin a command.
    """
    dropped = r"\\\\|\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|[\W_]"
    return (re.sub(dropped, "", text) or "".join(text.split())).casefold()


def _order(seed: int) -> Callable[[Problem], str]:
    """An order of problems by seed and text alone, so that new ones move few of the others."""
    return lambda problem: hashlib.sha256(f"{seed} {problem.key}".encode()).hexdigest()


def _named(problems: Sequence[Problem]) -> str:
    names = [problem.source for problem in problems[:_NUM_NAMED]]
    return ", ".join(names) + (", ..." if len(problems) > _NUM_NAMED else "")


def prompt_line(settings: Prepare, problem: Problem) -> Row:
    """The line of a prompts file."""
    digest = hashlib.sha256(problem.key.encode()).hexdigest()[:16]
    text = settings.wording.replace("{problem}", problem.text)
    system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    return {
        "id": f"{settings.dataset}-{digest}",
        "prompt": text
        if settings.template == "raw"
        else [*system, {"role": "user", "content": text}],
        "answer": problem.answer,
        "problem": problem.text,
        "source": problem.source,
        **problem.metadata,
    }


def _lines(settings: Prepare, problems: Sequence[Problem]) -> str:
    return "".join(
        json.dumps(prompt_line(settings, problem), ensure_ascii=False) + "\n"
        for problem in problems
    )


def _write(texts: Mapping[str, str]) -> None:
    """Write these files, or none of them: each is on the disk before the first gets its name.

    Raises:
        DataError: one of them cannot be written.
    """
    ready: dict[str, Path] = {}
    name = ""
    try:
        for name, text in texts.items():
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.write_atomically(new := path.with_name(path.name + ".new"), text)
            ready[name] = new
        for name, new in ready.items():
            new.replace(name)
    except OSError as error:
        for new in ready.values():
            new.unlink(missing_ok=True)
        raise DataError(f"{name}: cannot be written ({error.strerror}); write elsewhere") from error


if __name__ == "__main__":
    sys.exit(main())
