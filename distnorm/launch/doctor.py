"""The command `distnorm doctor`: the checks of a run's start without the run, and after one, who failed first.

Started like a run, by srun, torchrun or alone, in the same allocation: `srun distnorm doctor trainer=slurm`.
"""

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from distnorm.errors import ConfigError, DistNormError
from distnorm.launch import failures, ranks
from distnorm.launch.comparison import Finding
from distnorm.launch.compose import composed
from distnorm.launch.preflight import Preflight
from distnorm.launch.run_dir import RunFolder, job_name, open_run
from distnorm.settings import Settings

CONFIG = Path("conf/train.yaml")


def examine(changes: Sequence[str], config: Path = CONFIG) -> tuple[list[Finding], bool]:
    """Check what a run with these settings would check at its start, on every rank there is, and leave nothing behind.

    Args:
        changes: overrides, as train.py takes them.
        config: the root of the configuration.

    Returns:
        What was found, alike on all ranks; and whether this rank is the one to say it.

    Collective: the ranks meet over a store; no training collective.

    Raises:
        DistNormError: the settings are wrong, the launch is, or a rank could not look.
    """
    settings = _composed(changes, config)
    found = ranks.find(settings.trainer)
    with Preflight(found, settings.trainer.timeout_s) as preflight:
        complete = settings.with_batches(found.world_size)
        name = preflight.agree(f"doctor-{secrets.token_hex(4)}")
        run = RunFolder((Path(settings.runs_dir) / name).resolve())
        open_run(complete, found, run)
        findings = preflight.look(complete, run)
        preflight.leave()
    if found.is_first:
        shutil.rmtree(run.path, ignore_errors=True)
    started_by = {"nobody": "this process", "distnorm": "to be started here", "slurm": "started by srun"}
    of = f"{found.per_node} on each of {found.num_nodes} nodes" if found.num_nodes > 1 else "on one node"
    who = started_by.get(found.started_by, f"started by {found.started_by}")
    launch = f"{found.world_size} {found.accelerator.upper()} rank{'s' * (found.world_size > 1)}, {of}, {who}"
    return [Finding("launch", "ok", launch), *findings], found.is_first


def report(changes: Sequence[str], config: Path = CONFIG) -> bool:
    """Print one line a check.

    Args:
        changes: overrides, as train.py takes them.
        config: the root of the configuration.

    Returns:
        Whether a run would start.
    """
    try:
        findings, aloud = examine(changes, config)
    except DistNormError as error:
        findings, aloud = [Finding("launch", "failure", str(error))], error.aloud
    if aloud:
        for check, verdict, words in findings:
            print(f"{verdict:8} {check:11} {words}".replace("\n", "\n" + 21 * " "))
    return all(finding.verdict != "failure" for finding in findings)


def find_run(asked: Sequence[str], config: Path = CONFIG, environ: Mapping[str, str] = os.environ) -> RunFolder | None:
    """Find the run that has just ended: the folder that is named, or the newest of this SLURM job.

    Args:
        asked: a run's folder, or overrides, as train.py took them: `runs_dir=` says where run folders are.
        config: the root of the configuration.
        environ: where SLURM has left the job's number; without one the newest run of all is taken.

    Returns:
        Its folder; `None` where it has ended before it had one.

    Raises:
        ConfigError: the overrides are wrong, or a folder is named that is no run's.
    """
    if len(asked) == 1 and (Path(asked[0]) / "ranks").is_dir():
        return RunFolder(Path(asked[0]).resolve())
    if len(asked) == 1 and _is_path(asked[0]):
        raise ConfigError(
            f"{asked[0]} is no run's folder: there is no {Path(asked[0]) / 'ranks'}. "
            "Give one, e.g. runs/<run>, or runs_dir=… for the newest there."
        )
    runs = Path(_composed([change for change in asked if change.startswith("runs_dir=")], config).runs_dir)
    job = job_name(environ) if "SLURM_JOB_ID" in environ else None
    found = [path for path in runs.glob(f"{job}-*" if job else "*") if (path / "ranks").is_dir()]
    if job:
        found += [path for path in runs.glob("sweep-*/jobs/*") if failures.job_of(RunFolder(path)) == job]
    return RunFolder(max(found, key=lambda path: (path / "ranks").stat().st_mtime).resolve()) if found else None


def _is_path(typed: str) -> bool:
    return "=" not in typed and not typed.startswith("~") and ("/" in typed or Path(typed).exists())


def after(asked: Sequence[str], config: Path = CONFIG) -> str:
    """Say which rank of the run that has just ended failed first, with its traceback; see `find_run`."""
    run = find_run(asked, config)
    if run is None:
        return "This job has no run folder: it ended before it made one, and what ended it stands above."
    return f"\n--- {run.path}\n{failures.after(run)}"


def _composed(changes: Sequence[str], config: Path) -> Settings:
    if not config.is_file():
        raise ConfigError(f"There is no {config} in {Path.cwd()}. Start distnorm doctor in the project's folder.")
    return composed(config, changes)
