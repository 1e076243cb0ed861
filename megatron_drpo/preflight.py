"""Everything that can be checked before processes talk to each other, and all of it at once.

L3, between the command line and the loop. In: the configuration and the number of ranks. Out: the
`Inputs` of the run, read and checked, or one error that lists every problem. Neither megatron nor
torch.distributed is touched. Every rank reads the same files for itself, so that all of them fail
alike; only what would be done twice for nothing is left to rank 0.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from megatron_drpo import hardware
from megatron_drpo.checkpoint.families import Architecture, differences, read_architecture
from megatron_drpo.checkpoint.resume import LATEST, check_same_run, latest
from megatron_drpo.checkpoint.torch_dist import find_torch_dist, open_weights
from megatron_drpo.config import Config, DataConfig
from megatron_drpo.device import Device, choose_device
from megatron_drpo.errors import ConfigError, DrpoError
from megatron_drpo.objectives import Needs, build_objective
from megatron_drpo.plan import layouts
from megatron_drpo.prompts import PromptSampler, load_tokenizer, read_prompts, stop_ids
from megatron_drpo.rewards import check_prompts
from megatron_drpo.rewards.pool import check_reward
from megatron_drpo.rollout.environment import load_environment
from megatron_drpo.rollout.files import check_header, read_header, read_rollouts, tokenizer_sha256
from megatron_drpo.rollout.memory import planned_slots
from megatron_drpo.types import Prompt, Rollout
from megatron_drpo.vocab_parallel.gemm import round_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a run works on; read once, the same on every rank."""

    device: Device
    model: Path
    """Directory of the model's config.json and tokenizer."""
    weights: Path
    """Directory of the checkpoint whose weights training starts from."""
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    """Token ids that end a response: the model's own and `--rollout-stop-ids`."""
    prompts: Sequence[Prompt]
    """Training prompts; empty with `--rollouts-file`."""
    eval_prompts: Sequence[Prompt]
    """Held-out prompts; empty without `--eval-prompts`."""
    reference: tuple[Architecture, Path] | None
    """Of the frozen reference model, with its weights; None where the objective needs none."""
    rollouts: Sequence[tuple[Rollout, float | None]] | None
    """Rollouts of `--rollouts-file`, each with its reward if recorded; None: they are generated."""

    @property
    def generates(self) -> bool:
        """Whether an engine is needed, to train on what it generates or to evaluate."""
        return self.rollouts is None or bool(self.eval_prompts)


class _Problems:
    """Collects errors, so that the user mends all of them in one go."""

    def __init__(self) -> None:
        self.errors: list[DrpoError] = []

    def add(self, message: str) -> None:
        self.errors.append(ConfigError(message))

    def attempt(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `call` returns, or None when it raised an error of the user's."""
        try:
            return call(*args, **kwargs)
        except DrpoError as error:
            self.errors.append(error)
            return None

    def raise_all(self) -> None:
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            # Once, what two flags lead to: one file as --prompts and --eval-prompts.
            raise ConfigError("\n".join(dict.fromkeys(map(str, self.errors))))


def preflight(
    config: Config, world_size: int, rank: int = 0, *, replay: Path | None = None
) -> Inputs:
    """Check the configuration against files, machine and number of ranks; read what the run needs.

    Args:
        replay: the file of rollouts that a step of this run trained on, to be computed once more:
            they are read instead of prompts, and no directory to write to is asked for.

    Raises:
        DrpoError: of the problem's own class when there is one, a ConfigError that lists all of
            them when there are several.
    """
    problems = _Problems()
    device = problems.attempt(choose_device, config.parallel.device)
    _check_transformer_engine(config, device, problems)
    _check_exactness(config, device, problems)
    if rank == 0:
        if replay is None:
            _check_output_directory(config, problems)
        problems.attempt(check_reward, config.reward)
    if config.rollout.environment:
        problems.attempt(load_environment, config.rollout.environment)
    objective = problems.attempt(build_objective, config.objective)
    needs = Needs() if objective is None else objective.needs
    _check_needs(config, needs, problems)
    places = _model(config, problems)
    architecture = None if places is None else problems.attempt(read_architecture, places[0])
    if device is not None:
        for problem in hardware.problems(config, architecture, hardware.look(device)):
            problems.add(problem)
    inputs = reference = None
    if places is not None and architecture is not None:
        weights = places[1]
        _check_same_model(config, architecture, weights, problems)
        _check_context("the model", config, architecture, problems)
        if config.moe.moe_routing_replay != "off" and not architecture.num_experts:
            problems.add(
                f"--moe-routing-replay {config.moe.moe_routing_replay}: the model has no experts "
                "(config.json); drop it"
            )
        if rank == 0:
            problems.attempt(_check_weights, weights, architecture)
        reference = _reference(config, needs, (architecture, weights), rank, problems)
        _check_experts_on_gpu(device, (architecture, reference and reference[0]), problems)
        reading = config if replay is None else _from_file(config, replay)
        inputs = _read(reading, device, places, architecture, reference, problems)
        if inputs is not None:
            _check_topk(reading, needs, inputs, problems)
    for problem in layouts.problems(config, world_size, architecture, reference and reference[0]):
        problems.add(problem)
    problems.raise_all()
    assert inputs is not None, "without a problem, everything was read"
    return inputs


def _from_file(config: Config, rollouts: Path) -> Config:
    """The run, as far as reading goes, with a file in place of what it generates."""
    rollout = replace(
        config.rollout, rollouts_file=str(rollouts), save_rollouts=False, rollout_topk=0
    )
    return replace(config, data=DataConfig(), rollout=rollout)


def _check_needs(config: Config, needs: Needs, problems: _Problems) -> None:
    """What the objective reads must be there to be had."""
    name, rollout, model = config.objective.objective, config.rollout, config.objective
    if rollout.rollouts_file and needs.behaviour_l2:
        full = "--drpo-penalty full" if name == "drpo" else f"--objective {name}"
        problems.add(
            f"{full}: needs the whole distribution of the weights that generated, which "
            f"--rollouts-file {rollout.rollouts_file} does not hold; generate, or use another"
        )
    if rollout.rollout_lag and needs.behaviour_l2:
        full = "--drpo-penalty full" if name == "drpo" else f"--objective {name}"
        problems.add(
            f"{full} --rollout-lag {rollout.rollout_lag}: needs the whole distribution of the "
            "weights that generated, which are older than those in training then; use 0, or another"
        )
    if model.reference_model and not (needs.reference_logprobs or needs.reference_kl):
        problems.add(
            f"--reference-model {model.reference_model}: --objective {name} does not read it; drop "
            "it, or use --kl-coef"
        )


def _reference(
    config: Config,
    needs: Needs,
    policy: tuple[Architecture, Path],
    rank: int,
    problems: _Problems,
) -> tuple[Architecture, Path] | None:
    """The reference model's architecture and weights, where the objective needs one."""
    if not (needs.reference_logprobs or needs.reference_kl):
        return None
    model = config.objective.reference_model
    if model is None:
        return policy
    directory = _directory("--reference-model", model, problems)
    architecture = None if directory is None else problems.attempt(read_architecture, directory)
    if directory is None or architecture is None:
        return None
    if architecture.vocab_size != policy[0].vocab_size:
        problems.add(
            f"--reference-model {model}: has {architecture.vocab_size} token ids, "
            f"{policy[1]} {policy[0].vocab_size}; a divergence compares probabilities of "
            "the same ids, so use a model of the same tokenizer"
        )
    _check_context("the reference model", config, architecture, problems)
    if rank == 0:
        problems.attempt(_check_weights, directory, architecture)
    return architecture, directory


def _model(config: Config, problems: _Problems) -> tuple[Path, Path] | None:
    """The policy's directories: of config.json and tokenizer, and of the weights.

    Resolved here once: a run that is still going moves its newest checkpoint.
    """
    hf_model, load = config.model.hf_model, config.model.load
    given = _directory("--hf-model", hf_model, problems) if hf_model else None
    loaded = _directory("--load", load, problems) if load else None
    if load and loaded is None:
        return None
    if hf_model:
        return given and (given, loaded or given)
    assert loaded is not None, "the configuration demands one of both"
    if not (loaded / "config.json").is_file():
        problems.add(
            f"--load {load}: holds no config.json to say what model it is; name the Hugging Face "
            "directory of the model with --hf-model, for its config.json and tokenizer"
        )
        return None
    return loaded, loaded


def _directory(name: str, model: str, problems: _Problems) -> Path | None:
    """The directory that a flag names or, of Megatron's, the checkpoint that it points to."""
    if not Path(model).is_dir():
        problems.add(
            f"{name} {model}: no such directory; give one on this machine (a model of the hub "
            "has to be downloaded first: hf download)"
        )
        return None
    found = problems.attempt(find_torch_dist, model)
    if name == "--hf-model" and found is not None:
        problems.add(
            f"{name} {model}: is a Megatron checkpoint (torch_dist); that belongs to --load, and "
            "--hf-model can be left out where it holds config.json and a tokenizer"
        )
        return None
    if name == "--load" and found is None:
        problems.add(
            f"{name} {model}: is no Megatron checkpoint of the format torch_dist; a Hugging Face "
            "directory belongs to --hf-model"
        )
        return None
    return found or Path(model)


def _check_same_model(
    config: Config, architecture: Architecture, weights: Path, problems: _Problems
) -> None:
    """Two config.json of one run must say the same; equal shapes alone prove little."""
    if not (config.model.load and config.model.hf_model and (weights / "config.json").is_file()):
        return
    own = problems.attempt(read_architecture, weights)
    found = [] if own is None else differences(architecture, own)
    if found:
        problems.add(
            f"--hf-model {config.model.hf_model} --load {config.model.load}: each has a "
            f"config.json, and they differ in {', '.join(found)}; drop --hf-model"
        )


def _check_weights(source: Path, architecture: Architecture) -> None:
    """By the checkpoint's own index, without reading a tensor.

    Raises:
        CheckpointError: lists every tensor that is missing, left over or of another shape.
    """
    with open_weights(source, architecture):
        pass


def _check_transformer_engine(config: Config, device: Device | None, problems: _Problems) -> None:
    if config.model.transformer_impl != "transformer_engine":
        return
    if device is not None and device.kind == "cpu":
        problems.add(
            f"--transformer-impl transformer_engine: needs a GPU, but this run is on the CPU "
            f"({device.reason}); use local or auto"
        )
    elif not _have_transformer_engine():
        problems.add(
            "--transformer-impl transformer_engine: Transformer Engine is not installed; "
            "use an NGC PyTorch container, or local or auto"
        )


def _check_exactness(config: Config, device: Device | None, problems: _Problems) -> None:
    """On a GPU, bits are the same in any company with Megatron's batch-invariant kernels only."""
    if config.rollout.rollout_exact != "on" or device is None or device.kind == "cpu":
        return
    if not _have_transformer_engine():
        problems.add(
            "--rollout-exact on: on a GPU it needs Megatron's batch-invariant kernels, and these "
            "Transformer Engine, which is not installed; use an NGC PyTorch container, or auto"
        )
    if config.model.transformer_impl != "local":
        problems.add(
            f"--rollout-exact on --transformer-impl {config.model.transformer_impl}: generation "
            "has not the attention of Transformer Engine; use --transformer-impl local"
        )


def _check_context(
    whose: str, config: Config, architecture: Architecture, problems: _Problems
) -> None:
    """A response and a prompt of one token at least have to fit into the model."""
    response, context = (
        config.rollout.rollout_max_response_length,
        architecture.max_position_embeddings,
    )
    if response >= context:
        problems.add(
            f"--rollout-max-response-length {response}: leaves no room for a prompt in "
            f"max_position_embeddings {context} of {whose} (config.json); use at most "
            f"{context - 1}, less the longest prompt"
        )


def _check_experts_on_gpu(
    device: Device | None, architectures: Sequence[Architecture | None], problems: _Problems
) -> None:
    if device is None or device.kind == "cpu" or _have_transformer_engine():
        return
    if any(architecture and architecture.num_experts for architecture in architectures):
        problems.add(
            "--device cuda: the model has experts (config.json), and Megatron routes tokens to "
            "those on a GPU with Transformer Engine, which is not installed; use an NGC PyTorch "
            "container, or --device cpu"
        )


def _have_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _check_output_directory(config: Config, problems: _Problems) -> None:
    output = Path(config.output.output_dir)
    # A new directory is made by the run; here it is enough that its parent lets us, and a dry run
    # leaves nothing behind.
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        problems.add(
            f"--output-dir {output}: {existing} cannot be written to ({error.strerror}); choose a "
            "directory that can, or mend its permissions"
        )
    checkpoint = problems.attempt(latest, output / "checkpoints")
    if checkpoint and not config.output.resume:
        problems.add(
            f"--output-dir {output}: holds the checkpoints of an earlier run; continue that run "
            "with --resume, or choose another directory"
        )
    if config.output.resume and checkpoint:
        problems.attempt(check_same_run, checkpoint, config)
        _check_steps_left(config, checkpoint, problems)
    if config.output.resume and not (output / "checkpoints" / LATEST).exists():
        problems.add(
            f"--resume: there are no checkpoints in {output / 'checkpoints'}; drop it to start "
            "anew, or name the earlier run's --output-dir"
        )


def _check_steps_left(config: Config, checkpoint: Path, problems: _Problems) -> None:
    """A run that is complete may be resumed, for its export and report; one beyond it may not."""
    done, steps = int(checkpoint.name.rpartition("-")[2]), config.train.train_iters
    if steps < done:
        problems.add(
            f"--train-iters {steps}: {checkpoint} has {done} steps already; use at least {done}"
        )


def _read(
    config: Config,
    device: Device | None,
    places: tuple[Path, Path],
    architecture: Architecture,
    reference: tuple[Architecture, Path] | None,
    problems: _Problems,
) -> Inputs | None:
    """The files that need the model's tokenizer; None if one of them cannot be used."""
    rollout, model = config.rollout, places[0]
    room = architecture.max_position_embeddings - rollout.rollout_max_response_length
    tokenizer = problems.attempt(load_tokenizer, model, architecture.vocab_size)
    if tokenizer is None or room < 1:
        return None
    ends = problems.attempt(stop_ids, model, tokenizer, rollout.rollout_stop_ids)

    def prompts_of(path: str | None) -> Sequence[Prompt]:
        if path is None:
            return ()
        prompts = problems.attempt(
            read_prompts,
            path,
            tokenizer,
            apply_chat_template=config.data.apply_chat_template,
            max_prompt_length=room,
            context_flag=f"--rollout-max-response-length {rollout.rollout_max_response_length}",
        )
        if rollout.environment is None:  # which may give the rewards itself
            problems.attempt(check_prompts, config.reward.reward, prompts or ())
        return prompts or ()

    prompts, eval_prompts = prompts_of(config.data.prompts), prompts_of(config.data.eval_prompts)
    rollouts = None
    if rollout.rollouts_file is not None:
        rollouts = problems.attempt(
            read_rollouts,
            rollout.rollouts_file,
            vocab_size=architecture.vocab_size,
            max_length=architecture.max_position_embeddings,
            samples_per_prompt=rollout.rollout_samples_per_prompt,
        )
        _check_rollouts(config, architecture, rollouts or (), problems)
        header = None if rollouts is None else read_header(rollout.rollouts_file)
        if header is not None:
            for problem in check_header(header, config, tokenizer_sha256(tokenizer)):
                problems.add(problem)
    elif prompts:
        per_step, seed = rollout.rollout_prompts_per_step, config.train.seed
        shuffle = config.data.shuffle_prompts
        problems.attempt(PromptSampler, len(prompts), per_step, seed, shuffle)
    _check_row_budget(config, prompts, rollouts or (), problems)
    if prompts or eval_prompts:
        longest = max(prompt.token_ids.numel() for prompt in (*prompts, *eval_prompts))
        problems.attempt(planned_slots, config, architecture, longest)
    if ends is None or device is None:
        return None
    return Inputs(
        device, *places, architecture, tokenizer, ends, prompts, eval_prompts, reference, rollouts
    )


def _check_rollouts(
    config: Config,
    architecture: Architecture,
    rollouts: Sequence[tuple[Rollout, float | None]],
    problems: _Problems,
) -> None:
    """A step takes each recorded group at most once; without rewards there must be answers."""
    rollout = config.rollout
    groups = len(rollouts) // rollout.rollout_samples_per_prompt
    if rollouts and groups < rollout.rollout_prompts_per_step:
        problems.add(
            f"--rollout-prompts-per-step {rollout.rollout_prompts_per_step}: "
            f"{rollout.rollouts_file} holds {groups} prompts, and a step takes each at most once; "
            "lower it, or record more"
        )
    lacking = sum(taken.kept_ids is None for taken, _ in rollouts)
    if rollouts and rollout.truncated and lacking:
        problems.add(
            f"--rollout-top-p {rollout.rollout_top_p} --rollout-top-k {rollout.rollout_top_k}: "
            f"{lacking} of {len(rollouts)} rollouts of {rollout.rollouts_file} have no `kept_ids`, "
            "so they were drawn from the whole distribution; use 1 and 0"
        )
    if rollouts and not rollout.truncated and lacking < len(rollouts):
        problems.add(
            f"--rollouts-file {rollout.rollouts_file}: {len(rollouts) - lacking} of "
            f"{len(rollouts)} rollouts have `kept_ids`, so they were drawn from a truncated "
            "distribution; give the --rollout-top-p and --rollout-top-k that they were drawn with"
        )
    if rollouts and architecture.num_experts and config.moe.moe_routing_replay == "rollout":
        shape = architecture.num_layers, architecture.num_experts_per_token
        bad = sum(
            taken.experts is None
            or (*taken.experts.shape[1:],) != shape
            or int(taken.experts.max()) >= architecture.num_experts
            for taken, _ in rollouts
        )
        if bad:
            problems.add(
                f"--moe-routing-replay rollout: {bad} of {len(rollouts)} rollouts of "
                f"{rollout.rollouts_file} have no `experts` of this model ({shape[0]} layers, "
                f"{shape[1]} of {architecture.num_experts} experts per token); use score, or "
                "record them with --moe-routing-replay rollout --save-rollouts"
            )
    if any(reward is None for _, reward in rollouts):
        recorded = [taken.prompt for taken, _ in rollouts]
        problems.attempt(check_prompts, config.reward.reward, recorded)


def _check_topk(config: Config, needs: Needs, inputs: Inputs, problems: _Problems) -> None:
    """An objective over the behaviour policy's likeliest ids needs rollouts that carry them."""
    name, asked = config.objective.objective, config.rollout.rollout_topk
    needed, rollouts = needs.topk, inputs.rollouts
    if asked > inputs.architecture.vocab_size:
        problems.add(
            f"--rollout-topk {asked}: the model has {inputs.architecture.vocab_size} token ids; "
            "use at most as many"
        )
    if rollouts and needed and rollouts[0][0].topk_ids is None:
        problems.add(
            f"--rollouts-file {config.rollout.rollouts_file}: --objective {name} needs the "
            "behaviour policy's likeliest ids, but its lines have no `topk_ids` and "
            "`topk_logprobs`; record them with --rollout-topk 20 --save-rollouts"
        )
    if config.rollout.rollouts_file is None and needed and not asked:
        problems.add(
            f"--objective {name}: needs the behaviour policy's likeliest ids; use --rollout-topk 20"
        )
    if asked and not needed and not config.rollout.save_rollouts:
        problems.add(
            f"--rollout-topk {asked}: neither --objective {name} reads it nor --save-rollouts "
            "writes it; drop it (to truncate sampling is --rollout-top-k)"
        )


def _check_row_budget(
    config: Config,
    prompts: Sequence[Prompt],
    rollouts: Sequence[tuple[Rollout, float | None]],
    problems: _Problems,
) -> None:
    """A sequence is never cut, so the longest possible one has to fit into a row."""
    response, budget = (
        config.rollout.rollout_max_response_length,
        config.train.max_tokens_per_microbatch,
    )
    lengths = [prompt.token_ids.numel() + response for prompt in prompts]
    lengths += [rollout.num_tokens for rollout, _ in rollouts]
    cp = config.parallel.context_parallel_size
    longest = max(lengths, default=0)
    place = round_up(longest, 2 * cp) if cp > 1 else longest
    if place > budget:
        padded = f", padded to {place} for --context-parallel-size {cp}," if place > longest else ""
        problems.add(
            f"--max-tokens-per-microbatch {budget}: the longest sequence may have {longest} "
            f"tokens{padded} and has to fit into one row; use at least {place}"
        )
