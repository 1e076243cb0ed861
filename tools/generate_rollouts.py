"""Generate rollouts files: responses to prompts, with all that training on them needs.

    torchrun --nproc-per-node 2 tools/generate_rollouts.py --hf-model DIR --prompts FILE --out DIR

Every data-parallel replica writes a shard, which has its name once it is complete; `--resume`
continues after a kill with whole groups (docs/rollouts.md has the format). A response depends on
the seed and on its prompt's place in the file: neither replicas, nor batches, nor a resume change
it. Train on the result with `--rollouts-file DIR`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megatron_drpo import disk
from megatron_drpo.arguments import given_names, refuse_unused, types_of
from megatron_drpo.cli import exit_status
from megatron_drpo.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OutputConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
    WeightSyncConfig,
    flag,
)
from megatron_drpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_drpo.mcore.parallel import Layout
    from megatron_drpo.preflight import Inputs
    from megatron_drpo.rewards.pool import RewardPool
    from megatron_drpo.rollout.engine import RolloutEngine
    from megatron_drpo.rollout.files import FileHeader, Pair, RolloutWriter
    from megatron_drpo.types import Prompt

_TRAINING_ONLY = (
    *("rollouts_file", "save_rollouts", "max_engine_gap", "rollout_lag", "rollout_extra_prompts"),
    *("dynamic_sampling", "dynamic_sampling_rounds", "environment", "environment_max_turns"),
    *("eval_prompts", "shuffle_prompts"),
)
_LAYOUT = [
    each
    for each in dataclasses.fields(ParallelConfig)
    if each.name not in ("device", "distributed_timeout_minutes")
]
_UNJUDGED = "megatron_drpo.rewards.exact:exact"
"""Stands for `--reward none` where a reward is looked for, as MODULE:FUNCTION, which no prompt
needs an answer for. It is never called."""
_SYNCED = WeightSyncConfig(weight_sync="disk", weight_sync_timeout_seconds=1e-3)
"""Where training would demand that servers be given new weights; here there are none."""
_SERVER_START_SECONDS = 60.0


@dataclass(frozen=True)
class Generate:
    """What is written, and where to."""

    out: str
    """Directory of the shards, rollouts-00000-of-0000N.jsonl of N data-parallel replicas."""
    compress: bool = False
    """Write .jsonl.gz."""
    resume: bool = False
    """Continue the shards that are there, which must be of the same settings."""
    seed: int = 1234
    """Of all draws."""


@dataclass(frozen=True)
class Arguments:
    """Generate rollouts files: responses to prompts, with all that training on them needs. Start it
    by torchrun; --reward none leaves the rewards to the training run."""

    generate: Generate
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Generate; the exit status."""
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Parse, check, generate.

    Raises:
        DrpoError: whatever the user has to mend.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "0"))
    groups = [Generate, ModelConfig, ParallelConfig, MoEConfig]
    groups += [DataConfig, RolloutConfig, RewardConfig]
    given = given_names(argv, types_of(groups))
    arguments = tyro.cli(
        Arguments,
        args=argv,
        prog="generate_rollouts.py",
        console_outputs=rank == 0,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    _refuse_unread(arguments, given)
    config = _config(arguments, world_size)
    refuse_unused(config, given, {})
    if not world_size:
        raise ConfigError(
            "RANK and WORLD_SIZE are not set: start this with torchrun --nproc-per-node N "
            "tools/generate_rollouts.py [flags]"
        )
    # Imported here, since they take seconds: a mistyped flag is answered at once.
    from megatron_drpo.mcore import parallel
    from megatron_drpo.preflight import preflight

    inputs = preflight(config, world_size, rank)
    layout = parallel.initialize(config.parallel, inputs.device, config.train.seed)
    with disk.users_errors(f"--out {arguments.generate.out}", "continue with --resume"):
        _Generation(arguments, config, inputs, layout).generate()
    parallel.destroy(layout)


def _refuse_unread(arguments: Arguments, given: set[str]) -> None:
    """Raise for flags that only training reads, or not this engine."""
    rollout, parallel = arguments.rollout, arguments.parallel
    problems = [
        f"{flag(name)}: is read in training only; drop it"
        for name in _TRAINING_ONLY
        if name in given
    ]
    if arguments.moe.moe_routing_replay == "score":
        problems.append(
            "--moe-routing-replay score: nothing is scored here; use rollout to record the experts "
            "that tokens are routed to, or drop it"
        )
    if rollout.uses_servers:
        problems += [
            f"{flag(each.name)} {getattr(parallel, each.name)}: the layout of --rollout-engine "
            f"{rollout.rollout_engine} is the servers' own; drop it"
            for each in _LAYOUT
            if getattr(parallel, each.name) != each.default
        ]
        if arguments.moe.moe_routing_replay == "rollout":
            problems.append(
                f"--moe-routing-replay rollout: --rollout-engine {rollout.rollout_engine} does not "
                "return the experts that tokens were routed to; drop it"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _config(arguments: Arguments, world_size: int) -> Config:
    """A run over the same model and prompts, for the checks that training makes.

    What only training limits is set aside: groups of one, small files, the budget of a row, the
    weights of servers, which stay as they are.
    """
    parallel, rollout = arguments.parallel, arguments.rollout
    reward = arguments.reward
    if reward.reward == "none":
        reward = dataclasses.replace(reward, reward=_UNJUDGED)
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return Config(
        model=arguments.model,
        parallel=parallel,
        moe=arguments.moe,
        data=arguments.data,
        rollout=dataclasses.replace(
            rollout,
            rollout_prompts_per_step=max(world_size // model_ranks, 1),
            rollout_samples_per_prompt=max(rollout.rollout_samples_per_prompt, 2),
        ),
        weight_sync=_SYNCED if rollout.uses_servers else WeightSyncConfig(),
        reward=reward,
        train=TrainConfig(
            seed=arguments.generate.seed, updates_per_rollout=1, max_tokens_per_microbatch=1 << 40
        ),
        output=OutputConfig(output_dir=arguments.generate.out),
    )


class _Generation:
    """One start of the tool on this rank."""

    def __init__(
        self, arguments: Arguments, config: Config, inputs: Inputs, layout: Layout
    ) -> None:
        from megatron_drpo.rollout.engine import sampling_of

        self.arguments, self.config, self.inputs, self.layout = arguments, config, inputs, layout
        self.samples = arguments.rollout.rollout_samples_per_prompt
        self.sampling = sampling_of(
            arguments.rollout,
            inputs.stop_ids,
            seed=arguments.generate.seed,
            record_experts=arguments.moe.moe_routing_replay == "rollout",
        )

    def generate(self) -> None:
        """All that is left of this replica's shard; collective."""
        started, layout = time.perf_counter(), self.layout
        with ExitStack() as stack:
            engine, text = self._engine(stack)
            header = self._header(text)
            writer = pool = None
            if layout.is_replica_source:
                writer = stack.enter_context(self._writer(header))
                if self.arguments.reward.reward != "none":
                    from megatron_drpo.rewards.pool import RewardPool

                    pool = stack.enter_context(RewardPool(self.arguments.reward))
            rewards, tokens = self._shard(engine, writer, pool)
        found = layout.gather_objects((rewards, tokens) if layout.is_replica_source else None)
        if layout.rank == 0:
            _tell(
                self.arguments.generate.out,
                [reward for values, _ in found for reward in values],
                sum(count for _, count in found),
                time.perf_counter() - started,
            )

    def _engine(self, stack: ExitStack) -> tuple[RolloutEngine, str]:
        """The engine, ready, and what it is called; `stack` ends it."""
        from megatron_drpo.mcore.policy import Policy
        from megatron_drpo.rollout.engines import build_engine, server_engine

        rollout, inputs = self.arguments.rollout, self.inputs
        if rollout.uses_servers:
            servers = server_engine(rollout, inputs.tokenizer)
            stack.callback(servers.close)
            servers.ready(_SERVER_START_SECONDS)
            return servers, rollout.rollout_engine
        policy = Policy.load(
            self.config,
            inputs.architecture,
            self.layout,
            inputs.device,
            weights=inputs.weights,
            training=False,
        )
        built = build_engine(rollout, policy, inputs.tokenizer)
        assert built.generator is not None
        return built.generator, built.text

    def _header(self, engine: str) -> FileHeader:
        from megatron_drpo.rollout.files import make_header, tokenizer_sha256

        return make_header(
            self.sampling,
            engine=engine,
            tokenizer_sha256=tokenizer_sha256(self.inputs.tokenizer),
            weights_sha256=_weights_sha256(self.inputs.weights, self.layout),
            policy=str(self.inputs.weights),
        )

    def _writer(self, header: FileHeader) -> RolloutWriter:
        from megatron_drpo.rollout.files import RolloutWriter, shard_name

        generate, layout = self.arguments.generate, self.layout
        names = [
            shard_name(number, layout.num_replicas, compress=generate.compress)
            for number in range(layout.num_replicas)
        ]
        out = Path(generate.out)
        expected = {name + end for name in names for end in ("", ".partial")}
        others = sorted(p.name for p in out.glob("rollouts-*") if p.name not in expected)
        if others:
            raise DataError(
                f"--out {out}: holds {others[0]}, which is no shard of this run ({names[0]}); "
                "continue it with as many replicas and the same --compress, or write elsewhere"
            )
        writer = RolloutWriter(
            out / names[layout.replica_rank],
            header,
            samples_per_prompt=self.samples,
            resume=generate.resume,
        )
        known = {prompt.id: prompt.token_ids.tolist() for prompt in self._mine.values()}
        strange = [name for name, ids in writer.done.items() if known.get(name) != ids]
        if strange:
            raise DataError(
                f"--resume: {writer.path} holds prompt {strange[0]!r}, which --prompts "
                f"{self.arguments.data.prompts} does not have for it, or not with these token ids; "
                "continue with the same prompts, or write elsewhere"
            )
        return writer

    @property
    def _mine(self) -> dict[int, Prompt]:
        """This replica's prompts, by their place in the file."""
        layout = self.layout
        places = range(layout.replica_rank, len(self.inputs.prompts), layout.num_replicas)
        return {place: self.inputs.prompts[place] for place in places}

    def _shard(
        self, engine: RolloutEngine, writer: RolloutWriter | None, pool: RewardPool | None
    ) -> tuple[list[float], int]:
        """Rewards and number of tokens of what was generated now."""
        from tqdm import tqdm

        layout = self.layout
        done = layout.share(None if writer is None else set(writer.done))
        left = [place for place, prompt in self._mine.items() if prompt.id not in done]
        size = max(self.arguments.rollout.rollout_prompts_per_step // layout.num_replicas, 1)
        batches = [left[i : i + size] for i in range(0, len(left), size)]
        rewards: list[float] = []
        num_tokens = 0
        bar = tqdm(
            total=len(self._mine) * self.samples,
            initial=(len(self._mine) - len(left)) * self.samples,
            desc="this shard" if layout.num_replicas > 1 else "responses",
            unit="response",
            disable=layout.rank != 0,
        )
        # Replicas that share experts out generate together, if some of them only for the others.
        for number in range(max(layout.gather_objects(len(batches)))):
            pairs, failures = self._batch(engine, batches[number : number + 1], pool)
            for failure in failures:
                tqdm.write(f"reward failed: {failure}")
            if writer is not None and pairs:
                writer.write(pairs)
            rewards += [reward for _, reward in pairs if reward is not None]
            num_tokens += sum(rollout.response_ids.numel() for rollout, _ in pairs)
            bar.update(len(pairs))
        bar.close()
        return rewards, num_tokens

    def _batch(
        self, engine: RolloutEngine, batch: Sequence[list[int]], pool: RewardPool | None
    ) -> tuple[list[Pair], list[str]]:
        """The groups of one batch of prompts (none once this replica has finished)."""
        from megatron_drpo.collect import generate_rollouts

        jobs = [(i, sample) for places in batch for i in places for sample in range(self.samples)]
        rollouts = generate_rollouts(
            engine,
            [(self.inputs.prompts[i], sample) for i, sample in jobs],
            [i * self.samples + sample for i, sample in jobs],
            self.sampling,
            self.inputs.tokenizer,
            policy_version=0,
        )
        if pool is None or not rollouts:
            return [(rollout, None) for rollout in rollouts], []
        scored = pool.score(rollouts)
        return [*zip(rollouts, scored.values, strict=True)], scored.failures


def _weights_sha256(directory: Path, layout: Layout) -> str:
    """SHA-256 of the list of weight files as sha256sum prints it; the ranks share the work."""
    from megatron_drpo.checkpoint.manifest import file_digest

    files = sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".distcp"))
    mine = {path.name: file_digest(path) for path in files[layout.rank :: layout.world_size]}
    digests: dict[str, str] = {}
    for found in layout.gather_objects(mine):
        digests |= found
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _tell(out: str, rewards: Sequence[float], num_tokens: int, seconds: float) -> None:
    """The last lines for people."""
    worth = [reward for reward in rewards if not math.isnan(reward)]
    mean = f", mean reward {sum(worth) / len(worth):.3f}" if worth else ""
    failed = f", {len(rewards) - len(worth)} rewards failed" if len(rewards) > len(worth) else ""
    print(f"{num_tokens} tokens in {seconds:.1f} s{mean}{failed}; train with --rollouts-file {out}")


if __name__ == "__main__":
    sys.exit(main())
