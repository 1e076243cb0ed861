"""Make a prompts file of a data set of mathematics that is on disk.

    python tools/prepare_prompts.py gsm8k --inputs train.jsonl --out prompts/gsm8k.jsonl

In: the files of GSM8K, MATH, DAPO-Math or AIME as they are published (JSONL, JSON, Parquet). Out:
what `--prompts` and `--eval-prompts` take, one JSON object a line. Problems that occur twice are
written once; those with two different answers, or of `--exclude`, are left out and named; a line
that is not of the data set is refused (docs/data.md).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from megatron_drpo import disk
from megatron_drpo.cli import exit_status
from megatron_drpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow.parquet

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
    seed: int = 1234
    """Of the choice of --holdout."""
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
    read = _Reader(settings.dataset)
    for name in settings.inputs:
        read.add(name)
    kept, removed = read.problems, {"with two different answers": read.contradictory}
    kept, removed["of --exclude"] = _without(kept, settings.exclude)
    if settings.holdout >= len(kept):
        raise DataError(
            f"--holdout {settings.holdout}: {len(kept)} problems are left of --inputs, and --out "
            "must get at least one; hold out or exclude less"
        )
    print(f"{read.num_rows} lines, {read.num_repeated} of them repeat an earlier one")
    for reason, problems in removed.items():
        if problems:
            print(f"{len(problems)} {reason} left out: {_named(problems)}")
    held = {id(problem) for problem in sorted(kept, key=_order(settings.seed))[: settings.holdout]}
    _write(settings, settings.out, [problem for problem in kept if id(problem) not in held])
    if settings.eval_out is not None:
        _write(settings, settings.eval_out, [problem for problem in kept if id(problem) in held])


# --- Reading ------------------------------------------------------------------------------------


class _Reader:
    """Collects the problems of files, each once."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._found: dict[str, Problem] = {}
        self._contradictory: dict[str, Problem] = {}
        self.num_rows = self.num_repeated = 0

    def add(self, name: str) -> None:
        """Read a file, or the files of a directory.

        Raises:
            DataError: FILE:LINE of everything that cannot be used.
        """
        for path in files_of(name):
            shown = path.name if path == Path(name) else str(path.relative_to(name))

            def take(number: int, row: Row, shown: str = shown) -> None:
                self._take(parse_problem(self._dataset, row, f"{shown}:{number}"))

            read_rows(path, take)

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


def read_rows(path: Path, take: Callable[[int, Row], None]) -> None:
    """Call `take` with the number and the fields of each line (JSONL), or of each row (a JSON
    array or object, Parquet), counted from 1.

    Raises:
        DataError: the file cannot be read, or FILE:LINE of each row that `take` raised it for.
    """
    from megatron_drpo.prompts import raise_problems, read_jsonl

    def lowered(row: Row) -> Row:
        return {str(name).lower(): value for name, value in row.items()}

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if magic == b"PAR1":
        rows = _parquet_rows(path)
    else:
        rows = _json_rows(path) if path.suffix == ".json" else None
    if rows is None:
        read_jsonl(path, lambda number, row: take(number, lowered(row)), "problems (--inputs)")
        return
    problems, number = [], 0
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, dict):
                raise DataError("must be a JSON object with the fields of a problem")
            take(number, lowered(row))
        except DataError as error:
            problems.append(f"{path}:{number}: {error}")
    raise_problems(problems)
    if not number:
        raise DataError(f"{path}: is empty")


def _json_rows(path: Path) -> Iterator[Any] | None:
    """Elements of an array, or the one object; None for what may be JSONL of another name."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None  # read_jsonl names the line
    return iter(value if isinstance(value, list) else [value])


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, those columns only that are read."""
    file = _open_parquet(path)
    wanted = {*_PROBLEM_FIELDS, "answer", "solution", "reward_model"}
    wanted.update(name for names in _METADATA.values() for name in names)
    columns = [name for name in file.schema_arrow.names if name.lower() in wanted]
    for batch in file.iter_batches(batch_size=4096, columns=columns):
        yield from batch.to_pylist()


def _open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: is a Parquet file, which is read with pyarrow; install it: "
            "python -m pip install pyarrow"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); copy it again") from error


# --- What the data sets look like ---------------------------------------------------------------


def parse_problem(dataset: str, row: Row, source: str) -> Problem:
    """One line of a data set.

    Raises:
        DataError: it is not of that data set.
    """
    text = problem_text(row)
    metadata = {
        name: row[field] for name, fields in _METADATA.items() for field in fields if row.get(field)
    }
    return Problem(text, _ANSWERS[dataset](row), source, metadata)


def problem_text(row: Row) -> str:
    """The bare problem, without the words that DAPO-Math-17k puts around it.

    Raises:
        DataError: there is none, or it cannot be told from its instruction.
    """
    name = next((name for name in _PROBLEM_FIELDS if row.get(name)), None)
    value = None if name is None else row[name]
    messages = isinstance(value, list)
    if messages:
        users = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == "user"]
        value = users[0] if len(value) == len(users) == 1 else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"found no text of a problem; one of {', '.join(_PROBLEM_FIELDS)} must hold it (of "
            f"chat messages, only a single one of a user can be used); there is {_fields(row)}"
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
    braces; None without any or where braces do not match."""
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|[^\s${}\\]+)", solution))
    if not found:
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
    answer = _answer_dapo({name: value for name, value in row.items() if name != "solution"})
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


def _without(problems: list[Problem], names: Sequence[str]) -> tuple[list[Problem], list[Problem]]:
    """The problems that are not in these files, and those that are.

    Compared are letters and digits only: a copy is often set with other signs, and a problem too
    many that is left out does no harm.
    """
    excluded: set[str] = set()
    for name in names:
        for path in files_of(name):
            read_rows(path, lambda number, row: excluded.add(_loose(problem_text(row))))
    inside = [_loose(problem.text) in excluded for problem in problems]
    pairs = list(zip(problems, inside, strict=True))
    return [p for p, found in pairs if not found], [p for p, found in pairs if found]


def _loose(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()


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


def _write(settings: Prepare, name: str, problems: Sequence[Problem]) -> None:
    lines = [json.dumps(prompt_line(settings, p), ensure_ascii=False) + "\n" for p in problems]
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomically(path, "".join(lines))
    except OSError as error:
        raise DataError(f"{name}: cannot be written ({error.strerror}); write elsewhere") from error
    print(f"{name}: {len(lines)} prompts")


if __name__ == "__main__":
    sys.exit(main())
