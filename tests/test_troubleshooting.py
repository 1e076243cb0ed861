"""The documentation says what is true: the messages that it quotes, the metrics and flags that it
names are the program's, and each page can be found."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_drpo.arguments import Options, types_of
from megatron_drpo.config import Config, flag

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SCRIPTS = [
    *(ROOT / "tools").glob("*.py"),
    *(ROOT / "examples").rglob("*.py"),
    ROOT / "examples" / "train_drpo_gpt.sh",  # Python to Python
]
SOURCES = [*(ROOT / "megatron_drpo").rglob("*.py"), *SCRIPTS]

HOLE = "\0"
"""Stands in a message of the source for a value."""
PREFIXES = ("error: ", "failed: prompt ..., sample ...: ")
"""What stands before a message by the time it is seen, but not in its source."""
QUOTING_COLUMNS = ("it begins with", "it says")
"""Tables whose first column quotes a part of a message."""
METRICS = "|".join(
    (
        *("time", "memory", "tokens_per_second", "packing", "response_length", "finish", "reward"),
        *("weight", "ratio", "divergence", "drift", "entropy", "objective", "eval", "servers"),
        *("engine_gap", "staleness", "dynamic_sampling", "advantage", "tokens", "tflop", "moe"),
    )
)
TORCHRUN = (
    *("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"),
    *("--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--standalone", "--max-restarts"),
    "--signals-to-handle",
)
SERVERS = ("--model", "--port", "--logprobs-mode", "--worker-extension-cls", "--api-key")
MEGATRON_LM = (
    *("--seq-length", "--tensorboard-dir", "--use-mup"),
    *("--ckpt-format", "--dist-ckpt-strictness", "--use-checkpoint-args", "--use-rope-scaling"),
    *("--rope-scaling-factor", "--window-size", "--window-attn-skip-freq"),
    "--calculate-per-token-loss",
)
SLIME = ("--colocate", "--log-probs-chunk-size")
CLUSTERS = (
    *("--gpus", "--ipc", "--ulimit", "--shm-size", "--rm"),
    *("--build-arg", "--user", "--start-interval"),  # docker
    *("--signal", "--requeue", "--nodes", "--ntasks", "--ntasks-per-node", "--gres", "--time"),
    *("--container-image", "--container-mounts", "--container-workdir", "--export"),
    "--cpu-bind",  # Slurm
)
CHROMIUM = ("--headless", "--hide-scrollbars", "--screenshot", "--virtual-time-budget")
TENSORBOARD = ("--logdir", "--bind_all")
ELSEWHERE = {*TORCHRUN, *SERVERS, *MEGATRON_LM, *SLIME, *CLUSTERS, *CHROMIUM, *TENSORBOARD}
"""Flags of other programs."""


def template(node: ast.AST) -> str | None:
    """The text that an expression makes, with `HOLE` for what is known only when it runs; None for
    what makes no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = template(node.left), template(node.right)
        return None if parts == (None, None) else "".join(part or HOLE for part in parts)
    return None


def messages_of(source: str) -> Iterator[str]:
    """All texts of a module but its docstrings, in one line each; parts of a text as well."""
    tree = ast.parse(source)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = None if id(node) in said else template(node)
        if text:
            yield " ".join(text.split())


def quotes_of(page: str) -> list[str]:
    """The messages in the fences `text` of a page: each begins at the margin, and goes on in lines
    that do not."""
    quotes: list[str] = []
    for fence in re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        quotes += re.findall(r"^\S.*(?:\n .*)*", fence, re.MULTILINE)
    return [" ".join(quote.split()) for quote in quotes]


def parts_of(page: str) -> list[str]:
    """What the columns that quote say a message contains."""
    rows: list[str] = []
    quoting = False
    for line in page.splitlines():
        cell = line[1:].partition("|")[0].strip() if line.startswith("|") else None
        quoting = cell is not None and (quoting or cell in QUOTING_COLUMNS)
        if quoting and cell and cell.startswith("`"):
            rows.append(f"... {cell.strip('`')} ...")
    return rows


def pattern(quote: str) -> re.Pattern[str]:
    """`...` stands for any text, and all else for itself."""
    parts = [re.escape(part) for part in re.split(r"\s*\.{3,}\s*", quote)]
    return re.compile(".*".join(parts))


@pytest.fixture(scope="module")
def known() -> list[str]:
    return sorted({text for path in SOURCES for text in messages_of(path.read_text("utf-8"))})


def is_said(quote: str, known: list[str]) -> bool:
    stripped = [quote.removeprefix(prefix) for prefix in PREFIXES]
    wanted = [pattern(text) for text in {quote, *stripped}]
    return any(each.fullmatch(text) for each in wanted for text in known)


def test_a_quote_is_a_whole_message_of_the_source() -> None:
    source = (
        'def f(n):\n    """a docstring is no message"""\n    raise E(\n        f"--rows {n}: '
        'must be {n + 1}"\n        + " or " + str(n)\n    )\n'
    )
    known = [*messages_of(source)]
    assert is_said("error: --rows ...: must be ... or ...", known)
    assert is_said("... must be ...", known)
    assert not is_said("error: --rows ...: must be 3 or ...", known)
    assert not is_said("error: --rows ...: should be ... or ...", known)
    assert not is_said("error: --rows ...: must", known)
    assert not is_said("a docstring is no message", known)


def test_each_message_quoted_is_in_the_source(known: list[str]) -> None:
    quotes, parts = quotes_of(PAGE), parts_of(PAGE)
    assert len(quotes) > 50 and len(parts) > 10
    empty = [quote for quote in quotes + parts if len(quote.replace("...", "").strip()) < 10]
    assert not empty, "these would match nearly anything"
    wrong = [quote for quote in quotes + parts if not is_said(quote, known)]
    assert not wrong, "quoted in docs/troubleshooting.md, but said nowhere:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_metric_named_is_in_the_source(path: Path, known: list[str]) -> None:
    named = {*re.findall(rf"`((?:{METRICS})/[a-z0-9_]+)`", path.read_text("utf-8"))}
    made = [text for text in known if re.match(f"(?:{METRICS})/", text)]
    logged = [pattern(text.replace(HOLE, "...")) for text in made]
    wrong = [name for name in named if not any(each.fullmatch(name) for each in logged)]
    assert not wrong, f"{path.name} names metrics that nobody logs: {sorted(wrong)}"


@functools.cache
def flags_of_tools() -> set[str]:
    """Of argparse, and the fields of dataclasses that tyro makes flags of."""
    found = set()
    for path in [*SCRIPTS, *(ROOT / "benchmarks").glob("__main__.py"), *ROOT.glob("*/doctor.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"--[a-z][a-z0-9-]+", node.value):
                    found.add(node.value)
            elif isinstance(node, ast.ClassDef) and node.decorator_list:
                for item in node.body:
                    if isinstance(item, ast.AnnAssign):
                        name = ast.unparse(item.target)
                        found |= {flag(name), flag(f"no_{name}")}
    return found


@functools.cache
def flags_of_training() -> set[str]:
    groups = types_of([Config]).values()
    types = types_of([*groups, Options])
    negated = {flag(f"no_{name}") for name, kind in types.items() if kind is bool}
    return {flag(name) for name in types} | negated | {"--help"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_flag_named_exists(path: Path) -> None:
    text = re.sub(r"[^\s(]+://[^\s)]+", "", path.read_text("utf-8"))
    known = flags_of_training() | flags_of_tools() | ELSEWHERE
    wrong = set()
    for match in re.finditer(r"(?<![\w-])--[a-z][\w-]+", text):
        name, after = match[0], text[match.end() : match.end() + 1]
        # `--decoder-first/last-...`, `--recompute-` and `--sglang-*` name several at once.
        several = name.endswith("-") or after == "/"
        if not (name in known or several and any(each.startswith(name) for each in known)):
            wrong.add(name)
    assert not wrong, f"{path.name}: no such flags (of other programs: ELSEWHERE): {sorted(wrong)}"


def test_each_page_is_linked() -> None:
    linked = set()
    for page in [ROOT / "README.md", *PAGES]:
        links = re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
        linked |= {(page.parent / link).resolve() for link in links} - {page.resolve()}
    lost = [page.name for page in PAGES if page not in linked]
    assert not lost, f"no page links to {lost}: add them to the README"
