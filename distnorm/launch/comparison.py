"""What the ranks of a run say of themselves before it starts, compared, and the words for what differs."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypedDict

from distnorm.errors import ranks_in_words

_MISSING = "…"


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        check: what.
        verdict: how it is.
        words: what was found; of a failure, its message.
    """

    check: str
    verdict: Literal["ok", "warning", "failure"]
    words: str


class Answer(TypedDict):
    """What a rank says of itself.

    Attributes:
        host: its machine.
        problems: what it has found wrong by itself: messages by check.
        code: where distnorm's code is, by its hash.
        versions: of python and torch.
        accelerator: what it computes on: cpu or gpu.
        device: names its GPU, no other rank's; empty on the CPU.
        settings: values by their keys.
    """

    host: str
    problems: dict[str, str]
    code: dict[str, str]
    versions: dict[str, str]
    accelerator: str
    device: str
    settings: dict[str, Any]


def compare(answers: Mapping[int, Answer], world_size: int, timeout_s: float) -> list[Finding]:
    """Judge what the ranks have said.

    Args:
        answers: by rank, of those who came.
        world_size: how many should have.
        timeout_s: how long they were waited for, in seconds.

    Returns:
        One finding a check; the first failure is the one to tell.
    """
    missing = sorted(set(range(world_size)) - answers.keys())
    hosts = {rank: answer["host"] for rank, answer in sorted(answers.items())}
    found = [_start(answers, missing, timeout_s), *_own_problems(answers)]
    if found[0].verdict == "failure" or len(found) > 1:
        return found
    return [found[0], _code(answers), _versions(answers), _settings(answers), _devices(answers, hosts)]


def in_words_by_host(hosts: Mapping[int, str]) -> str:
    """Say which ranks are where: `ranks 0, 1 on n1; ranks 2, 3 on n2`."""
    ranks_on: dict[str, list[int]] = defaultdict(list)
    for rank, host in hosts.items():
        ranks_on[host].append(rank)
    return "; ".join(f"{ranks_in_words(ranks)} on {host}" for host, ranks in ranks_on.items())


def _start(answers: Mapping[int, Answer], missing: list[int], timeout_s: float) -> Finding:
    here = in_words_by_host({rank: answer["host"] for rank, answer in sorted(answers.items())})
    if missing:
        return Finding(
            "ranks",
            "failure",
            f"{ranks_in_words(missing)} did not come within trainer.timeout_s={timeout_s:g}; {here} did.\n"
            "Did it end before, or start on a slow disk? Look at its output, or wait longer: trainer.timeout_s=…",
        )
    return Finding("ranks", "ok", here)


def _own_problems(answers: Mapping[int, Answer]) -> Iterator[Finding]:
    """Say each problem once, with the ranks that have it where not all do."""
    ranks_with: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, answer in sorted(answers.items()):
        for check, words in answer["problems"].items():
            ranks_with[check, words].append(rank)
    for (check, words), ranks in ranks_with.items():
        where = in_words_by_host({rank: answers[rank]["host"] for rank in ranks})
        yield Finding(check, "failure", words if len(ranks) == len(answers) else f"{where}: {words}")


def _code(answers: Mapping[int, Answer]) -> Finding:
    hashes = {rank: answer["code"]["hash"] for rank, answer in answers.items()}
    if parts := _who_has(hashes):
        places = [f"{value} in {answers[ranks[0]]['code']['place']} {_on(answers, ranks)}" for value, ranks in parts]
        return Finding(
            "code",
            "failure",
            f"The ranks run different code of distnorm: {', '.join(places)}.\n"
            "Install the same version on every node, or start all from one folder that the nodes share.",
        )
    return Finding("code", "ok", f"the same on all ranks, {hashes[min(hashes)]}")


def _versions(answers: Mapping[int, Answer]) -> Finding:
    own = answers[min(answers)]["versions"]
    for name in own:
        if parts := _who_has({rank: answer["versions"][name] for rank, answer in answers.items()}):
            places = [f"{value} {_on(answers, ranks)}" for value, ranks in parts]
            return Finding(
                "versions",
                "failure",
                f"The ranks run different versions of {name}: {', '.join(places)}.\n"
                "Start the same environment on every node; a node's own module or PATH may come first there.",
            )
    return Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in own.items()))


def _settings(answers: Mapping[int, Answer]) -> Finding:
    keys = list(dict.fromkeys(key for answer in answers.values() for key in answer["settings"]))
    differing = []
    for key in keys:
        values = {rank: str(answer["settings"].get(key, _MISSING)) for rank, answer in answers.items()}
        if parts := _who_has(values):
            differing.append(", ".join(f"{key}={value} on {ranks_in_words(ranks)}" for value, ranks in parts))
    if not differing:
        return Finding("settings", "ok", "the same on all ranks")
    more = f"; and {len(differing) - 2} more keys" if len(differing) > 2 else ""
    return Finding(
        "settings",
        "failure",
        f"The ranks have different settings: {'; '.join(differing[:2])}{more}.\n"
        "Give every rank the same command line and the same conf/: nothing in it may depend on the rank.",
    )


def _devices(answers: Mapping[int, Answer], hosts: Mapping[int, str]) -> Finding:
    on_cpu = {rank: hosts[rank] for rank, answer in sorted(answers.items()) if answer["accelerator"] == "cpu"}
    if 0 < len(on_cpu) < len(answers):
        return Finding(
            "devices",
            "failure",
            f"{in_words_by_host(on_cpu)}: torch finds no GPU there, and the other ranks have one each.\n"
            "Look at the driver with nvidia-smi on that machine and leave it out (--exclude=…), or use trainer=cpu.",
        )
    ranks_on: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, answer in sorted(answers.items()):
        if answer["device"]:
            ranks_on[hosts[rank], answer["device"]].append(rank)
    for (host, device), ranks in ranks_on.items():
        if len(ranks) > 1:
            return Finding(
                "devices",
                "failure",
                f"{ranks_in_words(ranks)} share {device} on {host}, and each rank needs one of its own.\n"
                f"Ask for as many as there are tasks, --gpus-per-node=…, and leave out --gpus-per-task and --gpu-bind.",
            )
    return Finding("devices", "ok", f"{len(ranks_on)} GPUs, one a rank" if ranks_on else "CPU")


def _who_has(values: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Say which ranks have which value, what most have first; nothing where all have the same."""
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, value in sorted(values.items()):
        ranks_of[value].append(rank)
    return sorted(ranks_of.items(), key=lambda item: -len(item[1])) if len(ranks_of) > 1 else []


def _on(answers: Mapping[int, Answer], ranks: list[int]) -> str:
    return f"({in_words_by_host({rank: answers[rank]['host'] for rank in ranks})})"
