"""Where a Lightning training is, as a checkpoint should say it: counters that go on exactly where they were taken.

Lightning counts in steps of its own: what is saved in a callback's `on_train_batch_end` has a batch that was processed
and is not completed, and what is saved at the end of an epoch one that stands between two. Resumed from there (2.6.6)
it leaves out a validation that was due, and counts the epoch twice where `max_steps` is set. `settle` finishes what was
begun, in the checkpoint alone.
"""

from typing import Any

import lightning.pytorch as pl

_BATCHES, _EPOCHS = "epoch_loop.batch_progress", "epoch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"


def settle(trainer: pl.Trainer, loops: dict[str, Any]) -> tuple[int, int]:
    """Make the fit loop's counters in a checkpoint those of a training that stands between two batches.

    Args:
        trainer: whose training is saved: at the end of a batch, of a validation, of an epoch or of the training.
        loops: the state of the fit loop in the checkpoint; it is changed.

    Returns:
        The epoch that training goes on with, 0 for the first, and how many of its batches are done.
    """
    batches, epochs = loops[_BATCHES], loops[_EPOCHS]
    if epochs["current"]["processed"] == epochs["current"]["started"]:
        return _settle_epoch(trainer, batches, epochs)
    if batches["total"]["completed"] < batches["total"]["processed"]:
        for counts in (batches["total"], batches["current"]):
            counts["completed"] = counts["processed"]
        if _validation_is_due(trainer):
            total = loops[_VALIDATION]["total"]
            total["ready"] = total["started"] = total["completed"] + 1  # as if it had begun: Lightning then begins it
            total["processed"] = total["completed"]
            loops[_VALIDATION]["current"] = dict.fromkeys(loops[_VALIDATION]["current"], 0)
        elif is_between_steps(trainer):
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    return epochs["current"]["processed"], batches["current"]["completed"]


def _settle_epoch(trainer: pl.Trainer, batches: dict[str, Any], epochs: dict[str, Any]) -> tuple[int, int]:
    """Settle an epoch that has ended: whole, or, by `max_steps` or an early stop, in its middle, where it goes on."""
    is_whole = batches["is_last_batch"] or batches["current"]["ready"] >= trainer.num_training_batches
    for counts in (epochs["total"], epochs["current"]):
        if not is_whole:
            counts["processed"] = counts["started"] - 1
        counts["completed"] = counts["processed"]
    if is_whole:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
    return epochs["current"]["processed"], batches["current"]["completed"]


def is_between_steps(trainer: pl.Trainer) -> bool:
    """Tell whether the optimizer has just stepped, so that no gradients wait for further batches."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()  # noqa: SLF001


def begin_epoch_anew(trainer: pl.Trainer) -> None:
    """Let a resumed training begin its next epoch where the last one was whole; call it when training starts.

    With `max_steps` Lightning always believes to be in the middle of one.
    """
    epochs = trainer.fit_loop.epoch_progress.state_dict()["current"]
    if epochs["processed"] == epochs["started"]:
        trainer.fit_loop.epoch_loop.restarting = False


def _validation_is_due(trainer: pl.Trainer) -> bool:
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher  # noqa: SLF001
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)  # noqa: SLF001
