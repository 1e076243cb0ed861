"""Arguments: from flags and a YAML file to a checked `Config`.

L3, used by `cli`. In: the words of the command line. Out: `Config` and `Options`, or one
ConfigError that lists what is wrong. Flags, their types and their help are read off `config.py` by
tyro; a YAML file becomes arguments that stand before the user's own. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import operator
import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from megatron_drpo.config import Config, flag
from megatron_drpo.errors import ConfigError

_GROUPS: dict[str, Any] = typing.get_type_hints(Config)


@dataclass(frozen=True)
class Options:
    """What belongs to one start of the program, not to the run that it describes."""

    config: str | None = None
    """YAML file of `flag: value` lines, without the dashes in front; the command line wins, and
    with another --objective there the file's constants for its own are left out."""
    dry_run: bool = False
    """Check everything, print the run's configuration and its consequences, and exit."""
    verify_layout: bool = False
    """Compute one batch under the run's layout and again under the smallest that fits, one sequence
    at a time; print how loss, log-probs and the gradient of every parameter differ; and exit, with
    a status other than 0 beyond --verify-layout-tolerance. Nothing is trained or written."""
    verify_layout_tolerance: float | None = None
    """Largest relative difference of loss, log-probs and norms of gradients; single tokens and the
    directions of gradients may differ by 5 times as much. By default 1e-5 in fp32, 0.05 in bf16 and
    0.2 in FP8, where every layout rounds otherwise: the sharp check of a bf16 run is its start
    without --bf16."""
    verify_layout_num_layers: int | None = None
    """Take the first layers of the model only, on both sides, where the whole model fits no smaller
    layout."""
    verify_layout_json: str | None = None
    """Write what was compared to this file as well, every parameter included."""

    def __post_init__(self) -> None:
        given = [name for name in _OF_VERIFICATION if getattr(self, name) is not None]
        problems = []
        if not self.verify_layout:
            problems += [
                f"{flag(name)}: is read with --verify-layout only; drop it" for name in given
            ]
        elif self.dry_run:
            problems.append("--verify-layout: --dry-run starts nothing; give one of them")
        tolerance, layers = self.verify_layout_tolerance, self.verify_layout_num_layers
        if tolerance is not None and not 0 < tolerance < math.inf:
            problems.append(f"--verify-layout-tolerance {tolerance}: must be above 0 and finite")
        if layers is not None and layers < 1:
            problems.append(f"--verify-layout-num-layers {layers}: must be at least 1")
        if problems:
            raise ConfigError("\n".join(problems))


_OF_VERIFICATION = (
    *("verify_layout_tolerance", "verify_layout_num_layers"),
    "verify_layout_json",
)


def types_of(groups: Iterable[type]) -> dict[str, Any]:
    """Of each field of some dataclasses, by its name."""
    return {name: kind for group in groups for name, kind in typing.get_type_hints(group).items()}


_ALL: dict[str, Any] = {"start": Options} | _GROUPS
_TYPES = types_of(_GROUPS.values())

_OF_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
_IN_BF16 = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_UNUSED = (
    (
        "bf16",
        lambda config: not config.model.bf16,
        ("fp32_output_layer",),
        "is read with --bf16 only, as everything is fp32 without it; drop it",
    ),
    (
        "fp8_format",
        lambda config: config.precision.fp8_format is None,
        ("fp8_recipe", "fp8_param_gather", "first_last_layers_bf16") + _OF_DELAYED + _IN_BF16,
        "is read with --fp8-format only; drop it, or use --fp8-format hybrid",
    ),
    (
        "fp8_recipe",
        lambda config: config.precision.fp8_format and config.precision.fp8_recipe != "delayed",
        _OF_DELAYED,
        "is read with --fp8-recipe delayed only; drop it",
    ),
    (
        "first_last_layers_bf16",
        lambda config: config.precision.fp8_format and not config.precision.first_last_layers_bf16,
        _IN_BF16,
        "is read with --first-last-layers-bf16 only; drop it",
    ),
    (
        "recompute_granularity",
        lambda config: config.memory.recompute_granularity != "full",
        ("recompute_method", "recompute_num_layers"),
        "is read with --recompute-granularity full only; drop it",
    ),
    (
        "recompute_granularity",
        lambda config: config.memory.recompute_granularity != "selective",
        ("recompute_modules",),
        "is read with --recompute-granularity selective only; drop it",
    ),
    (
        "fine_grained_activation_offloading",
        lambda config: not config.memory.fine_grained_activation_offloading,
        ("offload_modules",),
        "is read with --fine-grained-activation-offloading only; drop it",
    ),
    (
        "optimizer_cpu_offload",
        lambda config: not config.optimizer.optimizer_cpu_offload,
        ("optimizer_offload_fraction",),
        "is read with --optimizer-cpu-offload only; drop it",
    ),
    (
        "eval_prompts",
        lambda config: config.data.eval_prompts is None,
        ("eval_interval", "eval_samples_per_prompt")
        + ("eval_temperature", "eval_top_p", "eval_top_k"),
        "is not used without --eval-prompts; give held-out prompts, or drop it",
    ),
    (
        "rollouts_file",
        lambda config: config.rollout.rollouts_file is not None,
        ("shuffle_prompts", "max_engine_gap", "rollout_topk") + ("rollout_lag", "dynamic_sampling"),
        "is not used with --rollouts-file, which is taken as it is and in its own order; drop it",
    ),
    (
        "rollouts_file",
        lambda config: config.rollout.rollouts_file and not config.data.eval_prompts,
        ("apply_chat_template", "rollout_stop_ids", "rollout_stop_strings", "rollout_engine")
        + ("environment", "environment_max_turns")
        + ("rollout_servers", "rollout_max_slots", "rollout_kv_cache_gib", "rollout_exact"),
        "is not used with --rollouts-file and without --eval-prompts, as nothing is generated; "
        "drop it",
    ),
    (
        "dynamic_sampling",
        lambda config: not config.rollout.dynamic_sampling,
        ("dynamic_sampling_rounds", "rollout_extra_prompts"),
        "is read with --dynamic-sampling only; drop it",
    ),
    (
        "environment",
        lambda config: config.rollout.environment is None,
        ("environment_max_turns",),
        "is read with --environment only; drop it",
    ),
    (
        "rollout_engine",
        lambda config: config.rollout.uses_servers,
        ("rollout_kv_cache_gib", "rollout_exact"),
        "is the server's own affair with --rollout-engine vllm and sglang; drop it",
    ),
    (
        "rollout_engine",
        lambda config: not config.rollout.uses_servers,
        ("rollout_server_timeout_seconds", "rollout_server_retries"),
        "is read with --rollout-engine vllm and sglang only; drop it",
    ),
    (
        "reward",
        lambda config: config.reward.is_service,
        ("reward_memory_gib",),
        "is the service's own affair where --reward is an address; drop it",
    ),
    (
        "weight_sync",
        lambda config: config.weight_sync.weight_sync != "disk",
        ("weight_sync_dir",),
        "is read with --weight-sync disk only; drop it",
    ),
    (
        "weight_sync",
        lambda config: config.weight_sync.weight_sync != "collective",
        ("weight_sync_address", "weight_sync_port"),
        "is read with --weight-sync collective only; drop it",
    ),
    (
        "weight_sync",
        lambda config: config.weight_sync.weight_sync == "none",
        ("weight_sync_timeout_seconds",),
        "is read with --weight-sync disk and collective only; drop it",
    ),
)
"""(flag that decides, when it does, flags that then do nothing, what to say about each)."""


def parse(argv: Sequence[str]) -> tuple[Config, Options]:
    """The configuration that the arguments and the YAML file named by `--config` describe.

    Raises:
        ConfigError: a flag or key is unknown, repeated in the file, of the wrong type, out of range
            or unused; lists all of them where they can be told apart.
        SystemExit: with status 0 after `--help`.
    """
    given = given_names(argv, types_of([*_GROUPS.values(), Options]))
    yaml_argv: list[str] = []
    origin: dict[str, str] = {}
    start = _run_tyro(_unchecked(Options), argv, return_unknown_args=True, add_help=False)[0]
    file = start.config
    if file is not None:
        yaml_argv, lines = _read_yaml(Path(file))
        origin = {name: f"{file}:{line}" for name, line in lines.items() if name not in given}
    try:
        # Of a repeated flag the last one counts.
        raw = _run_tyro(_arguments(), [*yaml_argv, *argv], description=_DESCRIPTION)
        its_own = f"{flag('objective')}={raw.objective.objective}" in yaml_argv
        if "objective" in given and not its_own:
            raw = _without_unread(raw, origin)
        config, options = _build(raw)
        refuse_unused(config, given, origin)
    except ConfigError as error:
        lines = [_with_origin(line, origin) for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from None
    return config, options


def parse_over(values: Mapping[str, Any], argv: Sequence[str]) -> tuple[Config, set[str]]:
    """The configuration of an earlier run with the flags of `argv` in place of its own.

    What the run had set for an objective, and the one that is asked for does not read, is left out.

    Args:
        values: of the run (`Config.flat`, as its config.json has them); a setting that is newer
            than the run has its default.

    Returns:
        The configuration, and the names of the flags in `argv`.

    Raises:
        ConfigError: as of `parse`, or a setting of the run is not known any more.
    """
    given = given_names(argv, _TYPES)
    unknown = sorted(values.keys() - _TYPES.keys())
    if unknown:
        raise ConfigError(
            f"config.json: has `{unknown[0]}`, which this version does not know; use the version "
            "that the run was made with"
        )
    arguments = _arguments()
    groups = {item.name: item.type for item in dataclasses.fields(arguments)}
    own = {name: _of_json(groups[name], values) for name in _GROUPS}
    raw = _run_tyro(arguments, argv, default=arguments(**own))
    config, _ = _build(_without_unread(raw, set(_TYPES) - given))
    refuse_unused(config, given, {})
    return config, given


def _without_unread(raw: Any, names: Collection[str]) -> Any:
    """Arguments without the constants of an objective, of these names, that another one's run does
    not read: who asks for another objective does not mean them."""
    left = {
        item.name: item.default
        for item in dataclasses.fields(raw.objective)
        if item.name in raw.objective.unread and item.name in names
    }
    return dataclasses.replace(raw, objective=dataclasses.replace(raw.objective, **left))


def _of_json(group: Any, values: Mapping[str, Any]) -> Any:
    """A group with those of `values` that are its own; a list becomes the tuple that it was."""
    own = {
        item.name: values[item.name] for item in dataclasses.fields(group) if item.name in values
    }
    return group(**{name: tuple(v) if isinstance(v, list) else v for name, v in own.items()})


_DESCRIPTION = (
    "Reinforcement learning of a language model with DRPO on Megatron-core. It starts its ranks "
    "itself, or is one of torchrun's; every flag may also stand in a YAML file (--config)."
)


def given_names(argv: Sequence[str], types: Mapping[str, Any]) -> set[str]:
    """Field names of the flags in `argv`; a flag is known by its whole name or not at all.

    Args:
        types: of the fields that there are, by name.

    Raises:
        ConfigError: lists the flags that are unknown.
    """
    known = {*types, "help"} | {f"no_{name}" for name, kind in types.items() if kind is bool}
    names = [arg[2:].partition("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")]
    problems = [
        f"{flag(name)}: unknown flag; {_closest(flag(name), map(flag, known))}--help lists all"
        for name in names
        if name not in known
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return {name if name in types else name.removeprefix("no_") for name in names}


def _closest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {match[0]}? " if match else ""


def _read_yaml(path: Path) -> tuple[list[str], dict[str, int]]:
    """A YAML file as arguments, and the line of each field.

    Values are taken as they are written and typed like arguments, so that `lr: 1e-6` is a number
    (YAML 1.1 reads it as text) and no object is ever constructed.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error}); give a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"--config {path}:{line}: is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: is not YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ConfigError(f"--config {path}: must hold lines of `flag: value`, such as `lr: 1e-6`")
    argv: list[str] = []
    lines: dict[str, int] = {}
    problems: list[str] = []
    for key, value in root.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        where = f"--config {path}:{line}: {key.value}:"
        if name not in _TYPES:
            close = _closest(name, _TYPES).replace("_", "-")
            problems.append(f"{where} unknown key; {close}--help lists all, without the dashes")
        elif name in lines:
            problems.append(f"{where} is given twice, first in line {lines[name]}; drop one")
        else:
            lines[name] = line
            try:
                argv += _as_arguments(name, value)
            except ConfigError as error:
                problems.append(f"{where} {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return argv, lines


def _as_arguments(name: str, node: yaml.Node) -> list[str]:
    kind = _TYPES[name]
    if typing.get_origin(kind) is tuple:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if all(isinstance(item, yaml.ScalarNode) for item in items):
            return [flag(name), *(item.value for item in items)]
    elif isinstance(node, yaml.ScalarNode):
        if kind is bool:
            if node.value not in ("true", "false"):
                raise ConfigError(f"{node.value!r} must be true or false")
            return [flag(name if node.value == "true" else f"no_{name}")]
        return [f"{flag(name)}={'None' if node.tag.endswith(':null') else node.value}"]
    raise ConfigError("must be one value, not a list or a mapping")


def _run_tyro(kind: Any, argv: Sequence[str], **options: Any) -> Any:
    """`tyro.cli` with its errors as ConfigError; help is printed on rank 0 only."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            return tyro.cli(
                kind,
                args=argv,
                prog="megatron-drpo",
                console_outputs=os.environ.get("RANK", "0") == "0",
                config=(tyro.conf.OmitArgPrefixes,),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_without_box(screen.getvalue())) from None


def _without_box(text: str) -> str:
    """The message of a tyro error: what stands in its box between the title and the first rule."""
    rows = (
        re.sub(r"[\u2500-\u257f]|^ *-{3,} *$", "", row).strip() for row in text.splitlines()[1:]
    )
    message = " ".join(itertools.takewhile(bool, itertools.dropwhile(operator.not_, rows)))
    return re.sub(r"^Error parsing (--[\w-]+)", r"\1", message) + " (--help shows every flag)"


def _arguments() -> type:
    """What tyro fills: the groups of `Config`, without their own checks, and `Options`.

    The checks come after all is parsed (`_build`), so that the user sees every problem at once.
    """
    groups = {name: _unchecked(kind) for name, kind in _ALL.items()}
    return dataclasses.make_dataclass(
        "Arguments",
        [(name, kind, dataclasses.field(default_factory=kind)) for name, kind in groups.items()],
    )


def _unchecked(group: type) -> type:
    methods = {"__post_init__": lambda self: None, "__doc__": group.__doc__}
    return type(group.__name__, (group,), methods)


def _build(raw: Any) -> tuple[Config, Options]:
    """What was asked for, checked, or one ConfigError with the problems of all groups."""
    groups: dict[str, Any] = {}
    problems = []
    for name, kind in _ALL.items():
        groups[name] = getattr(raw, name)
        values = {item.name: getattr(groups[name], item.name) for item in dataclasses.fields(kind)}
        try:
            groups[name] = kind(**values)
        except ConfigError as error:
            problems.append(str(error))
    # The checks across groups calculate with the loop's numbers, so those must hold.
    options = groups.pop("start")
    if type(groups["train"]) is _GROUPS["train"]:
        try:
            config = Config(**groups)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return config, options


def refuse_unused(config: Config, given: set[str], origin: Mapping[str, str]) -> None:
    """Raise for flags that do nothing; a key of the file may be left idle by the command line."""
    problems = []
    decides: Callable[[Config], bool]
    for switch, decides, names, message in _UNUSED:
        if decides(config):
            named = given if switch in given else given | origin.keys()
            problems += [f"{flag(name)}: {message}" for name in names if name in named]
    unread = config.objective.unread.items()
    problems += [f"{flag(name)}: {reason}; drop it" for name, reason in unread if name in given]
    if problems:
        raise ConfigError("\n".join(problems))


def _with_origin(problem: str, origin: Mapping[str, str]) -> str:
    """`problem` with FILE:LINE of the first flag that it names, if that came from the file."""
    found = re.search(r"--([\w-]+)", problem)
    where = origin.get(found[1].replace("-", "_")) if found else None
    return f"{problem} ({where})" if where else problem
