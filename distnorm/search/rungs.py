"""Trials that stop early: at each rung only the best of those that came so far go on.

It is asynchronous successive halving, ASHA. Optuna decides, by what all trials have told its journal, a file in the
search's folder. Everything else of a search does without it; it is installed with `distnorm[search]`.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from distnorm import collectives
from distnorm.errors import ConfigError
from distnorm.launch.run_dir import RunFolder, write_json

_FILE = "rungs.json"


def check_installed() -> None:
    """Refuse to begin without Optuna.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna  # noqa: F401, PLC0415 — an extra
    except ImportError:
        raise ConfigError(
            "search=asha stops trials by Optuna's word, and optuna is not installed. "
            "Run: pip install 'distnorm[search]'; or use search=random."
        ) from None


def begin(run: RunFolder, journal: Path, values: dict[str, Any], rules: dict[str, Any]) -> None:
    """Open a trial in the journal, and leave word of it in the run's folder, where `callbacks` finds it.

    A trial that was begun before, and cut short, goes on as the same one.

    Args:
        run: the trial's.
        journal: Optuna's file.
        values: key → value, for whoever reads the journal.
        rules: `metric`, `mode`, `min_resource`, `reduction_factor`.
    """
    if (run.path / _FILE).exists():
        return
    from optuna.distributions import FloatDistribution  # noqa: PLC0415

    numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
    trial = _study(journal, rules).ask({k: FloatDistribution(v, v) for k, v in numbers.items()})
    for key in values.keys() - numbers.keys():
        trial.set_user_attr(key, values[key])
    trial.set_user_attr("folder", run.path.name)
    write_json(run.path / _FILE, {"journal": str(journal), "trial": trial.number, "pruned_after": None, **rules})


def end(run: RunFolder, value: float | None) -> bool:
    """Tell the journal what came of a trial; say whether it was pruned."""
    from optuna.trial import TrialState  # noqa: PLC0415

    about = json.loads((run.path / _FILE).read_text())
    pruned = about["pruned_after"] is not None
    state = TrialState.FAIL if value is None else TrialState.PRUNED if pruned else TrialState.COMPLETE
    told = value if state == TrialState.COMPLETE else None
    _study(Path(about["journal"]), about).tell(about["trial"], told, state, skip_if_finished=True)
    return pruned


def has_ended(run: RunFolder) -> bool:
    """Tell whether the journal has what a trial came to: it was cut short after that, and nothing is left to run."""
    from optuna.trial import TrialState  # noqa: PLC0415

    if not (run.path / _FILE).exists():
        return False
    about = json.loads((run.path / _FILE).read_text())
    trials = _study(Path(about["journal"]), about).get_trials(deepcopy=False)
    return any(t.number == about["trial"] and t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)


def callbacks(run: RunFolder) -> list[Callback]:
    """Give the callback that stops a run at its rungs; none for a run that is no trial of ASHA."""
    return [Rungs(run)] if (run.path / _FILE).exists() else []


class Rungs(Callback):
    """Tell the journal each epoch's validation, and end training where the trial does not go on.

    The run then tests its best checkpoint as any other does.

    Args:
        run: the folder that `begin` has left word in.

    Collective: 1 agreement a validation: the first rank decides for all.
    """

    def __init__(self, run: RunFolder) -> None:
        self._file = run.path / _FILE
        self._about = json.loads(self._file.read_text())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End at once where the trial was stopped before it was cut short."""
        trainer.should_stop = self._about["pruned_after"] is not None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell, and ask."""
        if trainer.sanity_checking:
            return
        epoch = trainer.current_epoch + 1
        stops = trainer.is_global_zero and self._is_out(epoch, float(trainer.callback_metrics[self._about["metric"]]))
        if collectives.agree(stops, "the word whether this trial goes on")[0]:
            trainer.should_stop = True
            if trainer.is_global_zero:
                write_json(self._file, {**self._about, "pruned_after": epoch})

    def _is_out(self, epoch: int, value: float) -> bool:
        import optuna  # noqa: PLC0415

        study = _study(Path(self._about["journal"]), self._about)
        frozen = next(t for t in study.get_trials(deepcopy=False) if t.number == self._about["trial"])
        trial = optuna.trial.Trial(study, frozen._trial_id)  # noqa: SLF001 — there is no public way back to a trial
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an epoch that an earlier attempt has told already
            trial.report(value, epoch)
        return trial.should_prune()


def _study(journal: Path, rules: dict[str, Any]) -> Any:
    import optuna  # noqa: PLC0415
    from optuna.storages import JournalStorage  # noqa: PLC0415
    from optuna.storages.journal import JournalFileBackend  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(
        study_name="distnorm",
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="minimize" if rules["mode"] == "min" else "maximize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(rules["min_resource"], rules["reduction_factor"]),
        load_if_exists=True,
    )
