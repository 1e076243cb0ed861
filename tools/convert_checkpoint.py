"""Convert checkpoints between Hugging Face and Megatron, prove the result, or show what one holds.

    python tools/convert_checkpoint.py hf-to-megatron --hf DIR --out DIR
    python tools/convert_checkpoint.py megatron-to-hf --megatron DIR --out DIR
    python tools/convert_checkpoint.py --inspect DIR

Needs no GPU and one process. OUT appears when everything that `--verify` asks for has been proven;
`--resume` continues from wherever the work stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_drpo.cli import exit_status
from megatron_drpo.errors import ConfigError

Progress = Callable[[int], None]
_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("iB", 1024))
}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert or inspect; the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if (arguments.command is None) == (arguments.inspect is None):
        parser.error("give one of hf-to-megatron, megatron-to-hf or --inspect DIR")
    return exit_status(lambda: _run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(
        description="Convert checkpoints between Hugging Face and Megatron, and prove the result."
    )
    parser.add_argument("--inspect", type=Path, metavar="DIR", help="print what a checkpoint holds")
    commands = parser.add_subparsers(dest="command", title="conversions")
    to_megatron = commands.add_parser(
        "hf-to-megatron", help="a torch_dist checkpoint that loads under any layout"
    )
    to_megatron.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the source")
    to_megatron.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="cut tensors where this size does, so that ranks of Megatron's own loader read "
        "their own bytes only; other sizes load the checkpoint too (default: 1)",
    )
    to_hf = commands.add_parser("megatron-to-hf", help="a complete Hugging Face directory")
    to_hf.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="the source")
    to_hf.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="where config.json and the tokenizer are copied from (default: the source itself; "
        "Megatron-LM's checkpoints hold none)",
    )
    to_hf.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file, such as 500MB or 5GB (default: 5GB)",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for command in (to_megatron, to_hf):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the result")
        command.add_argument(
            "--workers",
            type=int,
            default=min(cores or 1, 8),
            metavar="N",
            help="threads (default: as many as cores, at most 8; here %(default)s)",
        )
        command.add_argument(
            "--resume", action="store_true", help="continue an interrupted conversion to --out"
        )
        command.add_argument(
            "--verify",
            nargs="?",
            choices=("full", "fast", "off"),
            default="full",
            const="full",
            help="full: read the result back (it must convert back bit by bit) and compare its "
            "logits with those of transformers; fast: logits through the first and the last layer "
            "only; off: nothing (default: full)",
        )
    return parser


def _size(text: str) -> int:
    """Bytes: `5GB` are 5,000,000,000, `5GiB` are 5 * 1024**3."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B?)", text)
    if not match or match[2] not in _UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _run(arguments: argparse.Namespace) -> None:
    if arguments.inspect is not None:
        from megatron_drpo.checkpoint.inspect import describe

        print(describe(arguments.inspect))
        return
    _check(arguments)
    try:
        _convert(arguments)
    except KeyboardInterrupt:
        print(
            f"{arguments.out}: not made; the same command with --resume continues", file=sys.stderr
        )
        raise


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that cannot be meant, all at once and before any work."""
    problems = [
        f"{flag} {directory}: is not a directory; give that of a checkpoint"
        for flag in ("--hf", "--megatron")
        if (directory := getattr(arguments, flag[2:], None)) and not directory.is_dir()
    ]
    problems += [
        f"{flag} {value}: must be at least 1"
        for flag in ("--workers", "--tensor-model-parallel-size")
        if (value := getattr(arguments, flag[2:].replace("-", "_"), 1)) < 1
    ]
    out: Path = arguments.out
    source: Path = arguments.hf if arguments.command == "hf-to-megatron" else arguments.megatron
    if out.resolve() == source.resolve():
        problems.append(f"--out {out}: is the source itself; choose another directory")
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        problems.append(f"--out {out}: exists; move it away or choose another --out")
    if problems:
        raise ConfigError("\n".join(problems))


def _convert(arguments: argparse.Namespace) -> None:
    """Convert and prove; the result has its name only then."""
    from megatron_drpo.device import choose_device

    choose_device("cpu")  # before anything asks for a GPU

    import torch

    from megatron_drpo.checkpoint import convert
    from megatron_drpo.checkpoint.families import read_architecture
    from megatron_drpo.checkpoint.inspect import architecture_line, padding_note
    from megatron_drpo.checkpoint.torch_dist import find_torch_dist, open_weights

    out, workers = arguments.out, arguments.workers
    to_megatron = arguments.command == "hf-to-megatron"
    origin: Path = arguments.hf if to_megatron else arguments.megatron
    if not to_megatron:  # once: a run that is still going moves its newest checkpoint
        origin = find_torch_dist(origin) or origin
    settings: Path = arguments.hf or origin
    if not (settings / "config.json").is_file():
        raise ConfigError(
            f"{settings}: has no config.json"
            + ("" if arguments.hf else "; give --hf DIR, that of the same model")
        )
    architecture = read_architecture(settings)
    if to_megatron:
        _check_split(arguments.tensor_model_parallel_size, architecture)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the threads; two kinds of them get in their way

    with open_weights(origin, architecture) as opened, ExitStack() as converting:
        line = f"{architecture_line(architecture)}{padding_note(opened)}"
        _say("converting", f"{opened.directory} ({line})")

        def verify(source: Any, result: Any, manifest: Any) -> dict[str, Any]:
            converting.close()
            with _phase("round trip", result) as progress:
                convert.verify_round_trip(
                    source, result, architecture, manifest, workers=workers, progress=progress
                )
            torch.set_num_threads(min(threads, workers))
            hf, megatron = (source, result) if to_megatron else (result, source)
            logits = _compare(hf, megatron, architecture, arguments.verify)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            return {"at": now, "round_trip": "bit-exact", "logits": logits}

        how = {
            "workers": workers,
            "resume": arguments.resume,
            "progress": converting.enter_context(_phase("converted", opened)),
            "verify": None if arguments.verify == "off" else verify,
        }
        if to_megatron:
            size = arguments.tensor_model_parallel_size
            manifest = convert.hf_to_megatron(origin, out, tp_size=size, **how)
        else:
            limit = arguments.max_shard_size
            manifest = convert.megatron_to_hf(
                origin, out, settings=settings, max_shard_bytes=limit, **how
            )
    unverified = ", unverified" if arguments.verify == "off" else ""
    _say("wrote", f"{out} ({len(manifest.tensors)} tensors{unverified})")


def _check_split(tp_size: int, architecture: Any) -> None:
    sizes = ("num_attention_heads", "ffn_hidden_size")
    uneven = [f"{name} {n}" for name in sizes if (n := getattr(architecture, name)) % tp_size]
    if uneven:
        raise ConfigError(
            f"--tensor-model-parallel-size {tp_size}: does not divide {', '.join(uneven)} of "
            "config.json; use one that does (1 serves every layout)"
        )


def _compare(hf: Any, megatron: Any, architecture: Any, verify: str) -> dict[str, Any]:
    """Compare logits, say how it went, and return what the manifest keeps of it."""
    from megatron_drpo.checkpoint.convert import VerificationError
    from megatron_drpo.mcore.compare import compare_logits

    count = architecture.num_layers
    layers = sorted({0, count - 1}) if verify == "fast" else list(range(count))
    started = time.perf_counter()
    with _bar("logits", len(layers), unit="layer") as progress:
        found = compare_logits(
            hf, megatron, architecture, hf.directory, layers=layers, progress=progress
        )
    through = f"{found.num_tokens} tokens through {len(layers)} of {count} layers"
    differ = (
        f"differ by at most {found.max_abs_diff:.1e}, of {found.scale:.1f} (tolerance "
        f"{found.tolerance:.1e}; transformers against itself {found.rounding:.1e})"
    )
    if not found.agrees:
        raise VerificationError(
            f"{hf.directory} and {megatron.directory} do not compute the same: logits of {through} "
            f"{differ}, tokens whose experts are a tie: {found.num_ties}; they depart at "
            f"{found.departs_at or 'no one place'}. This is a defect of the conversion or of the "
            "machine: please report it with config.json"
        )
    _say("logits", f"{through} {differ}; {time.perf_counter() - started:.1f} s")
    return {
        "max_abs_diff": found.max_abs_diff,
        "tolerance": found.tolerance,
        "num_tokens": found.num_tokens,
        "layers": list(found.layers),
        "num_ties": found.num_ties,
        "versions": {name: metadata.version(name) for name in ("transformers", "megatron-core")},
    }


# --- What is seen meanwhile ---------------------------------------------------------------------


def _say(phase: str, text: str) -> None:
    print(f"{phase:11} {text}", flush=True)


@contextmanager
def _bar(name: str, total: int, **kwargs: Any) -> Iterator[Progress]:
    """A progress bar on a terminal, nothing elsewhere."""
    with tqdm(desc=name, total=total, disable=None, leave=False, **kwargs) as bar:

        def progress(amount: int) -> None:
            bar.update(amount)

        yield progress


@contextmanager
def _phase(name: str, weights: Any) -> Iterator[Progress]:
    """A progress bar over the bytes of a checkpoint, and afterwards a line with the figures."""
    from megatron_drpo.checkpoint.hf import num_bytes

    total = sum(num_bytes(dtype, shape) for dtype, shape in weights.tensors.values())
    started = time.perf_counter()
    with _bar(name, total, unit="B", unit_scale=True) as progress:
        yield progress
    seconds = time.perf_counter() - started
    _say(
        name,
        f"{len(weights.tensors)} tensors, {total:,} bytes in {seconds:.1f} s "
        f"({total / seconds / 1e6:,.0f} MB/s)",
    )


if __name__ == "__main__":
    sys.exit(main())
