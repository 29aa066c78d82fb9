"""Submit runs to SLURM: a script of slurm/ with other options, its overrides checked before it waits in a queue."""

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from distnorm import sweep
from distnorm.errors import ConfigError
from distnorm.launch import overrides as mistakes
from distnorm.launch.compose import composed
from distnorm.search import design as search
from distnorm.search import folder as search_folder
from distnorm.settings import Settings

SCRIPTS = ("train", "sweep", "torchrun", "search")
_CONF = Path("conf") / "train.yaml"
_ANSWER_S = 60
_WHOLE = ("--nodes", "--ntasks-per-node", "--cpus-per-task")


def submit(
    overrides: Sequence[str],
    *,
    script: str = "train",
    dry_run: bool = False,
    sbatch: Sequence[str] = (),
    **options: str,
) -> str:
    """Submit a run, a sweep as an array, or a search, from the project's folder; does not wait for it.

    Args:
        overrides: what `train.py` is given.
        script: `train` (srun starts the ranks), `sweep` (an array, a job a task), `torchrun`, or `search`.
        dry_run: give the script, and submit nothing.
        sbatch: any other options of sbatch, as typed: `--qos=high`, `--exclusive`.
        options: options of sbatch by name: `nodes="4"`, `ntasks_per_node="8"`. One task a device: of tasks and GPUs a
            node one number is enough, except for torchrun and a search, whose one task starts the ranks;
            `gpus_per_node="0"` is a job without GPUs. The `array` of a sweep is counted from the overrides.

    Returns:
        The script, or the job's id, its log and its folder, a line each.

    Raises:
        ConfigError: an override names nothing, an option is no number, the settings are not good on so many ranks or
            not what the script runs, or sbatch refuses.
    """
    path = Path("slurm") / f"{script}.sbatch"
    if not (path.is_file() and _CONF.is_file()):
        raise ConfigError(f"There is no {path} and {_CONF} in {Path.cwd()}. Submit from the project's folder.")
    jobs = multiplied(overrides)
    if len(jobs) > 1 and script != "sweep":
        remedy = "Give one value a key; search.space has ranges." if script == "search" else "Use --script sweep."
        raise ConfigError(f"{' '.join(overrides)} is {len(jobs)} runs, and slurm/{script}.sbatch is one. {remedy}")
    asked = {"--" + name.replace("_", "-"): value for name, value in options.items()}
    _check_options(asked)
    if script == "sweep":
        asked.setdefault("--array", f"0-{len(jobs) - 1}")
    if script in ("train", "sweep"):
        _pair_tasks_and_gpus(asked)
    text = render(path.read_text(), asked | _parted(sbatch), overrides)
    first = "trainer.ranks_from=local" if script == "search" else "trainer=slurm"
    settings = [composed(_CONF, [first, *job]) for job in jobs]
    for one in settings:
        _check(one, text, script, overrides)
    if dry_run:
        return text
    job = _sbatch(text)
    log = str(_value(text, "--output")).replace("%j", job).replace("%A", job).replace("%a", "*")
    folder = Path(settings[0].runs_dir) / f"slurm-{job}-0"
    if script == "search":
        folder = search_folder.locate(search.read(settings[0].search or {}), settings[0])
    elif script == "sweep":
        folder = sweep.plan([*zip(settings, jobs, strict=True)], Path(settings[0].runs_dir))[0].run.path.parents[1]
    return f"job  {job}\nlog  {log}\nrun  {folder}"


def multiplied(overrides: Sequence[str]) -> list[list[str]]:
    """Multiply overrides with several values out, as `-m` does: the runs of a sweep, in its order.

    Example:
        >>> multiplied(["norm=batch,sync", "seed=1", "data.device_batch=2,4"])[1]
        ['norm=batch', 'seed=1', 'data.device_batch=4']

    Raises:
        ConfigError: one cannot be read.
    """
    values = []
    try:
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if override.is_sweep_override():
                each = override.sweep_string_iterator()
                values.append([f"{override.get_key_element()}={value}" for value in each])
            else:
                values.append([str(override.input_line)])
    except HydraException as error:
        raise ConfigError(mistakes.in_words(error, _CONF.parent)) from None
    return [list(job) for job in itertools.product(*values)]


def render(text: str, options: Mapping[str, str], overrides: Sequence[str] = ()) -> str:
    """Write a script with other options: each replaces its line, a commented one too, or is added below the others.

    Args:
        text: of the script.
        options: by name, `{"--nodes": "4", "--exclusive": ""}`; without GPUs a node their line is left out.
        overrides: what the script's arguments shall be; none: what it is submitted with.
    """
    lines = text.splitlines()
    for name, value in options.items():
        same = [index for index, line in enumerate(lines) if re.match(rf"#+SBATCH {name}(=|\s|$)", line)]
        at = same[0] if same else 1 + max(index for index, line in enumerate(lines) if line.startswith("#SBATCH "))
        new = f"#SBATCH {name}={shlex.quote(value)}" if value else f"#SBATCH {name}"
        lines[at : at + len(same)] = [] if (name, value) == ("--gpus-per-node", "0") else [new]
    if overrides:
        at = lines.index("set -euo pipefail") + 1
        lines.insert(at, f"set -- {shlex.join(overrides)}")
    return "\n".join(lines) + "\n"


def _pair_tasks_and_gpus(asked: dict[str, str]) -> None:
    """Ask for a task for each GPU, where only one of the two numbers was given."""
    gpus, tasks = asked.get("--gpus-per-node"), asked.get("--ntasks-per-node")
    if gpus is not None and tasks is None:
        number = gpus.rpartition(":")[2]  # a100:4
        asked["--ntasks-per-node"] = number if number != "0" else "1"
    elif tasks is not None and gpus is None:
        asked["--gpus-per-node"] = tasks


def _parted(typed: Iterable[str]) -> dict[str, str]:
    found = {}
    for option in typed:
        name, _, value = option.partition("=")
        if not re.fullmatch(r"--[a-z][a-z0-9-]*", name):
            raise ConfigError(f"--sbatch={option!r} is no long option of sbatch. Write e.g. --sbatch=--qos=high.")
        found[name] = value
    return found


def _value(text: str, name: str) -> str | None:
    found = re.search(rf"^#SBATCH {name}=(\S+)", text, re.MULTILINE)
    return found.group(1) if found else None


def _check_options(asked: Mapping[str, str]) -> None:
    for name, value in asked.items():
        if not value.strip():
            raise ConfigError(f"{name}={value!r} is empty. Give a value, or leave {name} out: the script has its own.")
        if name in _WHOLE and not re.fullmatch(r"0*[1-9][0-9]*", value):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1. Use e.g. {name}=2")


def _check(settings: Settings, text: str, script: str, overrides: Sequence[str]) -> None:
    """Hold settings against the script, and let the policy decide for its ranks where it says how many."""
    if settings.study is not None:
        raise ConfigError(
            "This experiment is a study of many runs, and starts their ranks itself. Start it with: python train.py …"
        )
    if script == "search":
        _check_search(settings, text, overrides)
        return
    if settings.search is not None:
        raise ConfigError(
            f"search.kind={settings.search['kind']} is a search of many runs, and slurm/{script}.sbatch starts the "
            "ranks of one. Use --script search, or leave out search=…"
        )
    per_node = _value(text, "--gpus-per-node" if "torch.distributed.run" in text else "--ntasks-per-node") or ""
    nodes, tasks = _value(text, "--nodes") or "", per_node.rpartition(":")[2]
    if nodes.isdigit() and tasks.isdigit():
        world = int(nodes) * int(tasks)
        settings.with_batches(world).decide(world, int(tasks))


def _check_search(settings: Settings, text: str, overrides: Sequence[str]) -> None:
    if settings.search is None:
        raise ConfigError(
            "slurm/search.sbatch is for a search, and there is none. Add search=random, or leave out --script."
        )
    search.check_free(search.read(settings.search), list(overrides))
    for name in ("--nodes", "--ntasks-per-node"):
        if (_value(text, name) or "1") != "1":
            raise ConfigError(
                f"{name}={_value(text, name)}: a search is one task on one node. "
                "Use --array=0-3 for four jobs that take part, or search.workers=4."
            )
    devices = settings.trainer.devices
    if devices != "auto":
        settings.with_batches(devices).decide(devices, devices)


def _sbatch(text: str) -> str:
    """Hand a script to sbatch; the job's id."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=text, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except FileNotFoundError:
        raise ConfigError(
            "There is no sbatch on this machine. Submit on a machine of the cluster; --dry-run prints the script here."
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"sbatch did not answer within {_ANSWER_S} s: is slurmctld up? Look with: sinfo") from None
    if done.returncode:
        said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines() if line]
        raise ConfigError(
            f"sbatch refused the script: {'; '.join(said)[:300]}\n"
            "Give another option, or mend the script in slurm/; --dry-run prints what was refused."
        )
    return done.stdout.strip().split(";")[0]
