"""How a run ends before its time, and the exit codes that say so to a shell, a batch script and the launcher."""

from distnorm.errors import DistNormError

STOPPED = 75
"""Exit code of a run that was told to stop, and has saved: start it again with `ckpt_path=` (sysexits: EX_TEMPFAIL)."""
REQUEUE = 76
"""The same where the job wanted to be requeued and could not do it itself; the batch script then does."""


class RunInterruptedError(DistNormError):
    """A run was told to stop, and has saved at a step that all ranks agreed on; the message says how to go on.

    Args:
        message: what stopped it, where it is saved, how to go on.
        exit_code: `STOPPED` or `REQUEUE`.
        wants_requeue: a SLURM job should be requeued.
    """

    def __init__(self, message: str, exit_code: int = STOPPED, *, wants_requeue: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.wants_requeue = exit_code, wants_requeue


class RefusedError(DistNormError):
    """A run was refused before it began, on all ranks alike.

    Args:
        message: what is wrong, and what to type instead.
        aloud: this rank says it; of those that share a console one is enough.
    """

    def __init__(self, message: str, *, aloud: bool = True) -> None:
        super().__init__(message)
        self.aloud = aloud
