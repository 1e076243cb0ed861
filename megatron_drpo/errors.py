"""Errors a user can mend. Each message names the file, line, field or flag, and the remedy.

`megatron_drpo.cli` prints them without a traceback, on one rank, and exits with status 2. Anything
else that escapes is a defect of this program and keeps its traceback.
"""


class DrpoError(Exception):
    """Base of every error that is the input's or the environment's, not this program's."""


class ConfigError(DrpoError, ValueError):
    """A flag or configuration key is unknown, unused, out of range, or at odds with another."""


class DataError(DrpoError, ValueError):
    """A prompts or rollouts file holds something that cannot be used; names file and line."""


class CheckpointError(DrpoError, ValueError):
    """A model or training checkpoint is missing, damaged, or of another architecture or run."""


class RewardError(DrpoError, RuntimeError):
    """A reward is unknown, could not be loaded, raised, or returned something unusable."""


class RolloutError(DrpoError, RuntimeError):
    """Generation or its log-probs failed a check, such as too large a gap to the trainer's."""


class ServersError(RolloutError):
    """Servers have failed, and every rank raises this alike: together they can still save."""


class VerificationError(DrpoError, ArithmeticError):
    """`--verify-layout` found numbers that two layouts do not have in common."""
