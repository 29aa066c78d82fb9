"""Train with the normalization batch you choose: config → data → model → decide → convert → fit → evaluate → report.

python train.py                                     # one device: a GPU if there is one
python train.py trainer=cpu_ddp norm=sync           # two CPU ranks, synchronized batch norm
python train.py --help                              # the groups of conf/ and their choices
"""

from pathlib import Path
from typing import Any

from distnorm import convert
from distnorm.convert import normalization_layers
from distnorm.launch import main
from distnorm.launch.ranks import Ranks
from distnorm.launch.run_dir import RunFolder
from distnorm.settings import Settings
from distnorm.targets import build


def train(settings: Settings, ranks: Ranks, run: RunFolder) -> dict[str, Any]:
    """Run one experiment on this rank, and return its metrics."""
    from distnorm.callbacks import EvaluationStatistics
    from distnorm.diagnosis import RankDiagnosis
    from distnorm.drift.monitor import DriftMonitor
    from distnorm.launch import report
    from distnorm.launch.checkpoints import test
    from distnorm.launch.trainer import make_trainer
    from distnorm.progress import Throughput, make_progress
    from distnorm.random_state import seed_rank, seed_weights
    from distnorm.resume import ExactResume
    from distnorm.tracking import make_loggers

    data = build(settings.data)
    seed_weights(settings.seed)
    model = build(settings.model)
    channels = [layer.num_features for _, layer in normalization_layers(model)]
    conversion = convert(model, settings.decide(ranks.world_size, ranks.per_node, channels))
    spec = conversion.spec
    drift = DriftMonitor(**settings.drift.model_dump(), evaluation=spec.evaluation)
    drift.check(model)
    report.announce(settings, ranks, run, data, conversion)

    throughput = Throughput(settings.device_batch * ranks.world_size)
    callbacks: list[Any] = [EvaluationStatistics(spec, num_samples=settings.norm.calibration_samples)]
    callbacks += [throughput, make_progress(settings.trainer.progress_every_s, throughput)]
    callbacks += [RankDiagnosis(conversion, run.ranks, debug=settings.debug)]
    callbacks += [drift, ExactResume(settings.seed, settings.device_batch * ranks.world_size, settings.optimizer)]
    loggers = make_loggers(settings.logger, run, report.config(settings, conversion), is_first=ranks.is_first)
    trainer = make_trainer(settings.trainer, ranks, run, loggers, callbacks, settings.ckpt_path)
    task = build(settings.task, model=model, optimizer=build(settings.optimizer))

    seed_rank(settings.seed, ranks.rank)
    trainer.fit(task, datamodule=data, ckpt_path=settings.ckpt_path)
    tested, metrics = test(trainer, task, data, run)
    return report.finish(settings, ranks, run, spec, tested, metrics, throughput.samples_per_s, drift)


if __name__ == "__main__":
    main(train, config=Path(__file__).parent / "conf" / "train.yaml")
