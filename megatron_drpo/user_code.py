"""The user's own functions, named MODULE:FUNCTION: how they are found, and what they did wrong.

L0. In: a name from the command line. Out: the function, or one error that a user can act on.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from megatron_drpo.errors import DrpoError


def load_function(option: str, target: str, error: type[DrpoError]) -> Callable[..., Any]:
    """The function MODULE:FUNCTION; its module is looked up on PYTHONPATH and where we are.

    Args:
        option: as the user wrote it, such as `--reward mine:f`; messages begin with it.
        target: MODULE:FUNCTION, neither part empty.
        error: class of what is raised.

    Raises:
        error: no such module or function, no plain function, or the module failed to import.
    """
    module_name, _, function_name = target.partition(":")
    if os.getcwd() not in sys.path:  # torchrun puts the script's directory there instead
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as cause:
        if isinstance(cause, ModuleNotFoundError) and cause.name in _parents(module_name):
            raise error(
                f"{option}: no module {cause.name!r} in {os.getcwd()} or on PYTHONPATH"
            ) from cause
        raise error(f"{option}: importing {module_name} raised {described(cause)}") from cause
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise error(
            f"{option}: {module_name} has no function {function_name!r}"
            + did_you_mean(function_name, functions)
        )
    if inspect.iscoroutinefunction(function):
        raise error(f"{option}: is async; give a plain function")
    return function


def described(error: BaseException) -> str:
    """An error of the user's code, and where in it: `KeyError: 'x' (my_rewards.py:3)`."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


_NOT_THEIRS = (
    os.path.dirname(__file__) + os.sep,  # this package
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")),
    "<frozen",
)


def _parents(module_name: str) -> set[str]:
    """`a.b.c` -> {a, a.b, a.b.c}."""
    parts = module_name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` with the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
