"""The command `distnorm doctor`: the checks of a run's start without the run, and who failed after one.

Started like a run, by srun, torchrun or alone, in the same allocation: `srun distnorm doctor trainer=slurm`.
"""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from distnorm.errors import ConfigError, DistNormError
from distnorm.launch import ranks
from distnorm.launch.comparison import Finding
from distnorm.launch.compose import composed
from distnorm.launch.preflight import Preflight
from distnorm.launch.run_dir import RunFolder, open_run

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
    if not config.is_file():
        raise ConfigError(f"There is no {config} in {Path.cwd()}. Start distnorm doctor in the project's folder.")
    settings = composed(config, changes)
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
    launch = f"{found.world_size} {found.accelerator.upper()} ranks, {of}, {who}"
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
