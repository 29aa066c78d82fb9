"""The command `distnorm`: small questions answered without a run."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import distnorm
from distnorm.errors import ConfigError
from distnorm.launch import console
from distnorm.policy import TASKS, render
from distnorm.spec import EVALUATIONS, KINDS

_FLAG = {"action": "store_true"}
DECIDE: Mapping[str, Mapping[str, Any]] = {
    "--device-batch": {"type": int, "required": True, "help": "samples one device sees per forward"},
    "--ranks": {"dest": "world_size", "type": int, "required": True, "help": "devices over all nodes"},
    "--ranks-per-node": {"type": int, "help": "devices of one node; all on one, if left out"},
    "--kind": {"help": f"one of {', '.join(KINDS)}"},
    "--task": {"help": f"what is trained: one of {', '.join(TASKS)}"},
    "--normalization-batch": {"type": int, "help": "samples that shall share statistics (32)"},
    "--min-normalization-batch": {"type": int, "help": "the fewest worth batch statistics (16)"},
    "--exact": {**_FLAG, "help": "hit the normalization batch exactly or refuse"},
    "--sync-ranks": {"type": int, "help": "ranks that pool together"},
    "--pretrained": {**_FLAG, "help": "the weights come from a batch norm model and are fine-tuned"},
    "--sorted-shards": {"dest": "iid", "action": "store_false", "help": "the ranks' samples differ in kind"},
    "--foldable": {**_FLAG, "help": "inference needs norms that fold into the layer before"},
    "--memory-bound": {**_FLAG, "help": "activations fill the memory"},
    "--max-overhead": {"type": float, "help": "largest share of a step for exchanges between nodes (0.1)"},
    "--internode-latency-us": {"type": float, "help": "one hop between nodes (5; up to 20 is fast)"},
    "--step-ms": {"type": float, "help": "a step without synchronization (44)"},
    "--channels": {"help": "of each batch norm of the model, 64,128,…; ResNet-50's, if left out"},
    "--momentum": {"help": "of the running statistics: auto, none (the layers' own) or a number"},
    "--evaluation": {"help": f"auto, {', '.join(EVALUATIONS)}"},
    "--frozen-last": {"type": float, "help": "share of training, at its end, with constant statistics"},
    "--layers": {"help": 'overrides by name, as JSON: {"layer4.*": "group"}'},
    "--groups": {"type": int, "help": "the most groups of a GroupNorm (32)"},
    "--renorm": {"help": 'limits of batch renormalization, as JSON: {"r_max": 3, "d_max": 5}'},
    "--include": {"nargs": "+", "help": "globs of the layers that may be converted"},
    "--exclude": {"nargs": "+", "help": "globs of the layers that stay as they are"},
}
"""Flags of `distnorm decide`: the arguments of `distnorm.decide`."""

CALIBRATE: Mapping[str, Mapping[str, Any]] = {
    "run": {"help": "the run's folder"},
    "data": {"nargs": "*", "help": "what differs in its data: data.root=/other/images"},
    "--name": {"required": True, "help": "of the domain, to find its statistics by"},
    "--num-samples": {"type": int, "default": 1024, "help": "samples to measure on (1024)"},
}
"""Arguments of `distnorm calibrate`: those of `distnorm.launch.adaptation.adapt`."""

REPORT: Mapping[str, Mapping[str, Any]] = {
    "runs": {"nargs": "+", "metavar": "run", "help": "a run's folder, its record.jsonl, or an offline .wandb file"},
    "--out": {"metavar": "FILE", "help": "the page (report.html in the run's folder; of several runs, in this one)"},
    "--png": {"metavar": "DIR", "help": "a folder for figures too, as papers want them"},
}
"""Arguments of `distnorm report`: those of `distnorm.drift.report.command.report`."""

DOCTOR: Mapping[str, Mapping[str, Any]] = {
    "changes": {"nargs": "*", "metavar": "override", "help": "as train.py takes them: trainer=slurm norm=sync"},
    "--after": {**_FLAG, "help": "name the rank that failed first, of this job's run or of a run's folder"},
}
"""Arguments of `distnorm doctor`: those of `distnorm.launch.doctor`."""


SUBMIT: Mapping[str, Mapping[str, Any]] = {
    "overrides": {"nargs": "*", "help": "what train.py is given, after --: norm=sync data.device_batch=8"},
    "--script": {"choices": ("train", "sweep", "torchrun", "search"), "help": "of slurm/ (train)"},
    "--dry-run": {**_FLAG, "help": "print the script, and submit nothing"},
    "--nodes": {"help": "machines"},
    "--ntasks-per-node": {"help": "tasks on one node, a device each"},
    "--gpus-per-node": {"help": "devices of one node; 0: the job takes no GPU"},
    "--cpus-per-task": {"help": "cores of a rank"},
    "--time": {"help": "limit: 12:00:00"},
    "--partition": {"help": "your site's"},
    "--account": {"help": "your site's"},
    "--array": {"help": "tasks of a sweep: 0-5, 0-99%%8, counted if left out; or jobs of a search"},
    "--sbatch": {"action": "append", "metavar": "OPTION", "help": "any other option of sbatch: --sbatch=--qos=high"},
}
"""Arguments of `distnorm submit`: those of `distnorm.launch.slurm.submit`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer `distnorm --version` and the commands."""
    parser = argparse.ArgumentParser(prog="distnorm", description=distnorm.__doc__)
    parser.add_argument("--version", action="version", version=f"distnorm {distnorm.__version__}")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(_COMMANDS))
    for name, (words, usage, table, answer) in _COMMANDS.items():
        command = commands.add_parser(name, help=words, usage=usage and f"distnorm {name} {usage}")
        for argument, options in table.items():
            command.add_argument(argument, **{"default": argparse.SUPPRESS, **options})
        command.set_defaults(answer=answer)
    asked = vars(parser.parse_args(arguments))
    try:
        asked.pop("answer")(**asked)
    except distnorm.DistNormError as error:
        console.fail(error)


def _decide(*, json: bool, **asked: Any) -> None:
    for name in ("layers", "renorm"):
        if name in asked:
            asked[name] = _json(name, asked[name])
    for name, read in {"channels": _numbers, "momentum": _number_or_word}.items():
        if name in asked:
            asked[name] = read(asked[name])
    spec = distnorm.decide(**asked)
    print(_dumps(spec.to_dict()) if json else render(spec))


def _calibrate(**asked: Any) -> None:
    from distnorm.launch.adaptation import adapt  # noqa: PLC0415 — loads Hydra, that `decide` does without

    console.quiet_libraries()
    print(f"statistics {asked['name']!r} are in {adapt(**asked)}")


def _report(**asked: Any) -> None:
    from distnorm.drift import history  # noqa: PLC0415 — numpy, that `decide` does without
    from distnorm.drift.report.command import report  # noqa: PLC0415 — likewise

    print(*report(read=history.read, **asked), sep="\n")


def _doctor(*, changes: Sequence[str] = (), after: bool = False) -> None:
    from distnorm.launch import doctor as doctors  # noqa: PLC0415 — loads Hydra

    console.quiet_libraries()
    if after:
        print(doctors.after(changes), file=sys.stderr)
    elif not doctors.report(changes):
        raise SystemExit(2)


def _submit(*, overrides: Sequence[str] = (), **asked: Any) -> None:
    from distnorm.launch.slurm import submit  # noqa: PLC0415 — loads Hydra, that `decide` does without

    console.quiet_libraries()
    print(submit(overrides, **asked).rstrip("\n"))


def _dumps(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        example = {"layers": '{"layer4.*": "group"}', "renorm": '{"r_max": 3}'}[name]
        raise ConfigError(f"--{name} {text!r} is no JSON: {error}. Use e.g. --{name} '{example}'.") from None


def _numbers(text: str) -> list[Any]:
    return [int(part) if part.strip().isdigit() else part for part in text.split(",")]


def _number_or_word(text: str) -> Any:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        return text


_COMMANDS: Mapping[str, tuple[str, str | None, Mapping[str, Mapping[str, Any]], Callable[..., None]]] = {
    "decide": (
        "say which samples share statistics, and why",
        "--device-batch N --ranks N [more; see distnorm decide --help]",
        {"--json": {**_FLAG, "default": False, "help": "print the decision as JSON"}, **DECIDE},
        _decide,
    ),
    "calibrate": ("measure a trained model's statistics on other data, by name", None, CALIBRATE, _calibrate),
    "report": ("show how the statistics of runs drifted, on one page", None, REPORT, _report),
    "doctor": (
        "check a launch as the start of a run does: srun distnorm doctor …",
        "[--after] [overrides]",
        DOCTOR,
        _doctor,
    ),
    "submit": (
        "submit a run, a sweep or a search to SLURM",
        "[options; see distnorm submit --help] -- overrides",
        SUBMIT,
        _submit,
    ),
}


if __name__ == "__main__":
    main()
