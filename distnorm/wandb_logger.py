"""wandb: numbers, what the drift monitor tells, pictures and tables; one run id through all requeues of a run."""

import contextlib
import logging
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from distnorm.drift import catalogue, events
from distnorm.drift.history import EVENT
from distnorm.launch.run_dir import RunFolder, write_whole
from distnorm.lightning_names import EitherName
from distnorm.settings import LoggerSettings
from distnorm.wandb_media import Media

_log = logging.getLogger(__name__)
_FLUSH_S = 0.5
_STEP = "trainer/global_step"
_FULL: dict[type[Any], int] = {events.Measurement: 1000, events.Snapshot: 8}


class DriftWandbLogger(EitherName, WandbLogger):
    """Lightning's wandb logger, that also takes what the drift monitor tells.

    An event is logged as a text under the hidden key `distnorm/event`: `distnorm report` reads it back. The first 1000
    measurements are all logged, of the next 1000 every 2nd, of the next 2000 every 4th, and so on; and the last one;
    those of other measures, e.g. at evaluations alone, are counted apart. At 100 layers x 60 measures 230 MB in
    1,000,000 steps, measured every 10. After 100, 300, 900, … of them, and at the end, pictures `drift/heatmap/…` and
    the table `drift/layers` follow. A raised alarm is a `wandb.alert`, online.
    Whatever fails here, training goes on, with one warning.

    Args:
        experiment: wandb's run; `None` on all ranks but the first, where the logger does nothing.
    """

    def __init__(self, experiment: Any) -> None:
        super().__init__(experiment=experiment)
        self._media = Media()
        self._rarer: dict[Hashable, _Rarer] = {}
        self._unsaid: dict[Hashable, events.Event] = {}
        self._has_warned = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a step."""
        with self._training_goes_on():
            super().log_metrics(dict(metrics), step)

    @rank_zero_only
    def take(self, event: events.Event) -> None:
        """Keep what the drift monitor tells."""
        with self._training_goes_on():
            kind = _kind(event)
            full = _FULL.get(type(event))
            if full is None or self._rarer.setdefault(kind, _Rarer(full)).is_due():
                self._log_event(event)
            else:
                self._unsaid[kind] = event
            self._media.take(event)
            if isinstance(event, events.Measurement) and self._media.is_due:
                self._log_media()
            if isinstance(event, events.Alarm) and event.state == "raised" and not self.experiment.offline:
                self.experiment.alert(title=_title(event), text=event.message, level="WARN")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log the last measurement, the pictures and the table as they are at the end."""
        with self._training_goes_on():
            for event in [*self._unsaid.values()]:
                self._log_event(event)
            if self._media.has_news:
                self._log_media()
            super().finalize(status)

    def _log_event(self, event: events.Event) -> None:
        self._unsaid.pop(_kind(event), None)
        self.experiment.log({EVENT: events.to_text(event), _STEP: event.step})

    def _log_media(self) -> None:
        columns, rows = self._media.table()
        pictures = {key: wandb.Image(picture) for key, picture in self._media.draw().items()}
        table = wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)
        self.experiment.log({**pictures, "drift/layers": table, _STEP: self._media.step})

    @contextlib.contextmanager
    def _training_goes_on(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 — whatever wandb raises, training is worth more than its log
            if not self._has_warned:
                _log.warning("wandb failed, and may lack what follows; record.jsonl has it all: %r", error)
            self._has_warned = True


def _kind(event: events.Event) -> Hashable:
    """Say what an event is thinned with: its like, and a measurement with those of the same measures."""
    return (type(event), frozenset(event.values) if isinstance(event, events.Measurement) else None)


class _Rarer:
    """Picks of many the first `full`, of the next `full` every 2nd, of the next 2 `full` every 4th, …"""

    def __init__(self, full: int) -> None:
        self._full, self._seen = full, 0

    def is_due(self) -> bool:
        """Tell whether the next one is picked."""
        doublings = (self._seen // self._full).bit_length()
        self._seen += 1
        return (self._seen - 1) % (1 << doublings) == 0


def start_wandb(settings: LoggerSettings, run: RunFolder, config: Mapping[str, Any], *, offline: bool) -> Any:
    """Start wandb's run here: Lightning's logger would pass a setting that wandb warns of.

    The run's id is kept in the run folder, as `wandb/run_id`: a requeue in the same folder goes on with it.
    """
    kept = run.path / "wandb" / "run_id"
    known = kept.read_text().strip() if kept.exists() else None
    started = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or run.path.name,
        group=settings.group,
        tags=settings.tags,
        config=dict(config),
        dir=run.path,
        id=known or None,
        resume="allow" if known and not offline else None,  # offline wandb warns that there is nothing to resume from
        mode="offline" if offline else "online",
        settings=wandb.Settings(x_transaction_log_flush_interval=_FLUSH_S, silent=True, console="off"),
    )
    if known != started.id:
        write_whole(kept, started.id)
    started.define_metric(_STEP)
    started.define_metric("*", step_metric=_STEP, step_sync=True)
    started.define_metric(EVENT, step_metric=_STEP, hidden=True, summary="none")
    layers = config.get("decision_layers")
    if layers:
        table = wandb.Table(columns=list(layers[0]), data=[list(row.values()) for row in layers])
        started.log({"decision/layers": table, _STEP: 0})
    return started


def _title(alarm: events.Alarm) -> str:
    titles = {measure.key: measure.title for measure in catalogue.MEASURES}
    titles |= {measure.key: measure.title for measure in catalogue.OF_THE_MODEL}
    return f"{titles.get(alarm.measure, alarm.measure)} in {alarm.layer or 'the model'}"
