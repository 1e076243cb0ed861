"""Rules of the repository that matter, read off its source."""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from megatron_drpo.arguments import parse

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_drpo"
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
SCRIPTS = sorted(path for name in ("tools", "examples") for path in (ROOT / name).glob("*.py"))
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))

LAYERS = (
    {"__init__", "types", "config", "errors", "device", "disk", "metrics", "user_code"}
    | {"dashboard"},
    {"objectives", "vocab_parallel", "advantages", "rewards", "packing", "prompts", "row_loss"}
    | {"context_parallel"},
    {"mcore", "rollout", "weight_sync", "checkpoint", "plan"},
    {
        "train",
        "collect",
        "gate",
        "hardware",
        "serving",
        "arguments",
        "preflight",
        "dry_run",
        "verify_layout",
        "cli",
        "report",
        "__main__",
        "launch",
        "doctor",
        "installation",
        "replay",
        "megatron_lm",
    },
)
CUDA_ONLY = {
    *("transformer_engine", "triton", "apex", "flash_attn", "vllm", "sglang", "pynvml"),
    *("cuda", "cupy", "bitsandbytes", "nvidia", "fused_weight_gradient_mlp_cuda"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything a module imports, wherever in it, as far as modules can be told."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def layer_of(module: str) -> int:
    unit = module.removeprefix(PACKAGE).lstrip(".").partition(".")[0] or "__init__"
    found = [number for number, units in enumerate(LAYERS) if unit in units]
    assert found, f"{module}: belongs to no layer; add it to LAYERS and to the README"
    return found[0]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    module = module_name(path)
    above = [
        name
        for name in imported(ast.parse(path.read_text()))
        if name.partition(".")[0] == PACKAGE and layer_of(name) > layer_of(module)
    ]
    assert not above, f"layer {layer_of(module)} must not import {above}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        name: {other for other in imported(ast.parse(path.read_text())) if other in MODULES}
        for name, path in MODULES.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(MODULES)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_mcore_imports_megatron(path: Path) -> None:
    module = module_name(path)
    if any(name.partition(".")[0] == "megatron" for name in imported(ast.parse(path.read_text()))):
        assert module.startswith("megatron_drpo.mcore")


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_for_cuda_only_is_imported_with_a_module(path: Path) -> None:
    """Such a package may be asked for inside a function, or in a `try` at the top of a module."""
    plain = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.stmt) and isinstance(node, ast.Import | ast.ImportFrom)
    ]
    for node in plain:
        assert not {name.partition(".")[0] for name in imported(node)} & CUDA_ONLY


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_where_it_fits_in_ascii(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(ast.get_docstring(ast.parse(text)) or "") > 40


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_explains_each_line(path: Path) -> None:
    config, _ = parse(["--config", str(path)])
    settings = yaml.safe_load(path.read_text())
    values = config.flat()
    for key, value in settings.items():
        found = values[key.replace("-", "_")]
        # YAML 1.1 reads 3e-4 as text.
        assert found == (float(value) if isinstance(found, float) else value)
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(" # " in line for line in lines)


def test_recipes_exist() -> None:
    assert RECIPES


def test_constraints_are_inside_what_the_package_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    allowed = {Requirement(text).name: Requirement(text) for text in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert {"torch", "megatron-core"} <= {pin.name for pin in pins}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert allowed[pin.name].specifier.contains(exact.version)
