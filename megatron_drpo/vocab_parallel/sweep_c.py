"""The vocabulary sweep in C: compiled once by the system's compiler, then called through ctypes.

Where it fits: `sweep` asks `load` once per process for a faster pair of kernels on the CPU, checks
them against its own, and keeps its own where there is no compiler. The library is kept in the
user's cache under a name that says what it was made from and for, so that nodes of different kinds
may share a home directory; where that directory is not the user's alone, it is built in a temporary
one for this process. Threads are Python's, which ctypes lets run at once: an OpenMP runtime
beside torch's own would spin on the cores that torch wants.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_SOURCE = Path(__file__).with_name("sweep.c")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
_TARGETS = (("-march=native",), ())
"""Flags to try in turn: not every compiler knows the machine that it runs on."""
_COMPILER_SECONDS = 120
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""As `enum kind` in the source."""
_THREAD_ELEMENTS = 1 << 19
"""Logits that are worth starting a thread for: a fraction of a millisecond."""

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS = {
    "sweep_partials": (
        *(_INT, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _POINTER),
        *(_LONG, _LONG, _LONG, _LONG),
    ),
    "sweep_gradient": (
        *(_INT, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER),
        *(_POINTER, _POINTER, _POINTER, _INT, _POINTER, _LONG, _POINTER),
        *(_LONG, _LONG, _LONG, _LONG),
    ),
}


class BuildError(Exception):
    """Why there is no compiled sweep on this machine."""


@dataclass(frozen=True)
class CompiledSweep:
    """The two kernels of `sweep.Sweep` for fp32 and bf16 logits, and where they came from."""

    library: ctypes.CDLL
    origin: str

    def partials(
        self, logits: Tensor, ids: Tensor, temperature: Tensor, real: int, mask: Tensor | None
    ) -> Tensor:
        """See `sweep.Sweep.partials`."""
        rows, num_ids = ids.shape
        inputs = _inputs(logits, ids, temperature, real, mask)
        out = temperature.new_empty((3 + num_ids, rows))

        def run(first: int, last: int) -> None:
            self.library.sweep_partials(
                *inputs.arguments, _pointer(out), rows, num_ids, first, last
            )

        _run_rows(run, *logits.shape)
        return out

    def gradient(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        real: int,
        mask: Tensor | None,
        top: Tensor,
        log_total: Tensor,
        entropy: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        """See `sweep.Sweep.gradient`."""
        if out.dtype not in _KINDS:
            wide = torch.empty_like(out, dtype=torch.float32)
            self.gradient(
                logits, ids, temperature, real, mask, top, log_total, entropy,
                grad_logprobs, grad_entropy, wide,
            )  # fmt: skip
            out.copy_(wide)
            return
        (rows, columns), num_ids = logits.shape, ids.size(1)
        assert out.shape == logits.shape
        inputs = _inputs(logits, ids, temperature, real, mask)
        slopes = (
            *(_checked(x, torch.float32, rows) for x in (top, log_total, entropy)),
            _checked(grad_logprobs, torch.float32, rows, num_ids),
            _checked(grad_entropy, torch.float32, rows),
        )
        scratch = temperature.new_empty((rows, num_ids))

        def run(first: int, last: int) -> None:
            self.library.sweep_gradient(
                *inputs.arguments, *map(_pointer, slopes), *_matrix(out), _pointer(scratch),
                columns, num_ids, first, last,
            )  # fmt: skip

        _run_rows(run, rows, columns)
        increment_version(out)  # autograd cannot see a write through a pointer


class _Inputs(NamedTuple):
    """What both kernels are told first, and the tensors that their pointers lead to."""

    arguments: tuple[int | None, ...]
    owners: tuple[Tensor | None, ...]


def _inputs(
    logits: Tensor, ids: Tensor, temperature: Tensor, real: int, mask: Tensor | None
) -> _Inputs:
    rows, columns = logits.shape
    # The library does not look where it reads.
    assert 0 <= real <= columns and (not ids.numel() or int(ids.max()) < columns)
    owners = (
        _checked(ids, torch.int64, rows, ids.size(1)),
        _checked(temperature, torch.float32, rows),
        _checked(mask, torch.bool, rows),
    )
    where_ids, temperatures, masks = map(_pointer, owners)
    return _Inputs((*_matrix(logits), where_ids, temperatures, real, masks), owners)


def _checked(x: Tensor | None, dtype: torch.dtype, *shape: int) -> Tensor | None:
    """`x` without gaps; its type and shape are what the library takes for granted."""
    if x is None:
        return None
    assert x.dtype == dtype and x.shape == shape and x.device.type == "cpu"
    return x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _matrix(x: Tensor) -> tuple[int, int, int]:
    """Kind, address and row stride of a [T, C] tensor."""
    assert x.size(1) <= 1 or x.stride(1) == 1, "columns must lie beside each other"
    return _KINDS[x.dtype], x.data_ptr(), x.stride(0)


def _run_rows(run: Callable[[int, int], None], rows: int, columns: int) -> None:
    """Call `run(first, last)` for all rows, on as many threads as torch may use."""
    threads = min(torch.get_num_threads(), rows, rows * columns // _THREAD_ELEMENTS)
    if threads <= 1:
        return run(0, rows)
    # A few pieces per thread: masked rows take no time. A pool per call survives a fork.
    step = -(-rows // (4 * threads))
    starts = range(0, rows, step)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first: run(first, min(first + step, rows)), starts))


def load() -> CompiledSweep:
    """Build the library if the cache has none for this machine, and load it.

    Raises:
        BuildError: there is no compiler, or the library cannot be built or loaded.
    """
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")
        flags, name = _flags_and_name(compiler)
        directory = _cache_directory()
        if directory is not None:
            path = directory / name
            if not path.exists():
                _compile(compiler, flags, path)
            return _open(path)
        # Once loaded, the file may go.
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            _compile(compiler, flags, path)
            return _open(path)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BuildError(f"no compiled sweep: {error}") from error


def _flags_and_name(compiler: list[str]) -> tuple[tuple[str, ...], str]:
    """The flags that the compiler takes, and a file name for what it makes with them here.

    The macros that a compiler predefines name its version and every instruction set of the target,
    which is all that decides whether a library made on one node may run on another.
    """
    refusals = []
    for target in _TARGETS:
        flags = (*_FLAGS, *target)
        macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
        if macros.returncode == 0:
            made_of = (*compiler, *flags, macros.stdout, _SOURCE.read_text())
            key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
            return flags, f"sweep-{key[:24]}.so"
        refusals.append(_last_line(macros))
    raise BuildError(f"{shlex.join(compiler)} fails: {refusals[-1]}; $CC names another compiler")


def _cache_directory() -> Path | None:
    """A directory that no other user can write into: what lies there is run as code."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        return None
    directory = Path(base) / "megatron_drpo"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError:
        return None
    private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return directory if private and os.access(directory, os.W_OK | os.X_OK) else None


def _compile(compiler: list[str], flags: tuple[str, ...], path: Path) -> None:
    """Write the library to `path`, at once: ranks that start together build the same file."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix="building-", suffix=".so")
    os.close(handle)
    try:
        done = _run([*compiler, *flags, "-o", partial, str(_SOURCE), "-lm"])
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(compiler)} fails: {_last_line(done)}")
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _open(path: Path) -> CompiledSweep:
    library = ctypes.CDLL(str(path))  # releases the interpreter's lock while it runs
    for function, arguments in _ARGUMENTS.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = None
    return CompiledSweep(library, str(path))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_COMPILER_SECONDS)


def _last_line(process: subprocess.CompletedProcess[str]) -> str:
    lines = process.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {process.returncode}"
