"""`distnorm decide`: what it prints, that it takes every argument of `decide`, and how a mistake ends."""

import inspect
import json

import pytest

from distnorm import NormSpec, cli, decide

pytestmark = pytest.mark.unit


def test_the_command_prints_every_part_of_the_decision(capsys):
    cli.main(
        ["decide", "--device-batch", "16", "--ranks", "8", "--layers", '{"stem.*": "group"}', "--exclude", "head.*"]
    )
    printed = capsys.readouterr().out
    starts = [line.split()[0] for line in printed.splitlines() if line[0] != " "]
    assert starts == ["decision", "because", "evidence", "layers", "momentum", "evaluation", "predicted", "instead"]
    assert max(map(len, printed.splitlines())) <= 110
    for part in (
        "decision      local batch norm, normalization batch 16",
        "layers        stem.*: GroupNorm, each sample alone",
        "norms of vectors: sync over 2 ranks, normalization batch 32",
        "all but head.*",
        "momentum      0.0315",
        "evaluation    running statistics of all ranks, pooled",
        "predicted     0.2 points below the best, 0.0 ms a step",
        "0.1     0.8      norm=sync norm.sync_ranks=2: 32 samples",
    ):
        assert part in printed


@pytest.mark.parametrize(
    ("kind", "words"), [("group", "none: no running statistics"), ("frozen", "none: constants"), ("batch", "precise")]
)
def test_what_has_no_running_statistics_is_printed_so(kind, words, capsys):
    asked = f"--device-batch 2 --ranks 4 --kind {kind} --evaluation precise --momentum 0.5"
    cli.main(["decide", *asked.split()])
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] != " ")
    assert rows["evaluation"].startswith(words)
    assert rows["momentum"] == ("0.5" if kind == "batch" else words)


EVERY_FLAG = (
    "--ranks-per-node 4 --kind auto --task dense --normalization-batch 64 --min-normalization-batch 8 --pretrained "
    "--foldable --memory-bound --max-overhead 0.2 --internode-latency-us 3 --step-ms 30 --channels 64,128 "
    "--momentum none --evaluation pooled --frozen-last 0.1 --include layer* --exclude layer1.* layer2.* --groups 16 "
    '--renorm {"r_max":2}'
)


def test_every_argument_of_decide_has_a_flag():
    flags = {options.get("dest", flag.removeprefix("--").replace("-", "_")) for flag, options in cli.DECIDE.items()}
    assert flags == set(inspect.signature(decide).parameters)


def test_the_command_takes_every_argument_of_decide(capsys):
    cli.main(["decide", "--json", "--device-batch", "8", "--ranks", "16", *EVERY_FLAG.split()])
    assert NormSpec.from_dict(json.loads(capsys.readouterr().out)) == decide(
        8, 16, ranks_per_node=4, task="dense", normalization_batch=64, min_normalization_batch=8, pretrained=True,
        foldable=True, memory_bound=True, max_overhead=0.2, internode_latency_us=3.0, step_ms=30.0, channels=[64, 128],
        momentum=None, evaluation="pooled", frozen_last=0.1, include=["layer*"], exclude=["layer1.*", "layer2.*"],
        groups=16, renorm={"r_max": 2},
    )  # fmt: skip
    cli.main(["decide", "--json", "--device-batch", "8", "--ranks", "16", "--sorted-shards", "--momentum", "0.2"])
    assert NormSpec.from_dict(json.loads(capsys.readouterr().out)) == decide(8, 16, iid=False, momentum=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device-batch 8 --ranks 4 --kind synk", "Did you mean 'sync'?"),
        ("--device-batch 8 --ranks 4 --momentum fast", "momentum='fast' must be in (0, 1]"),
        ("--device-batch 8 --ranks 4 --channels 64,x", "channels=[64, 'x'] must be a list"),
        ("--device-batch 8 --ranks 4 --layers {a", "--layers '{a' is no JSON"),
        ("--device-batch 8 --ranks 4 --renorm r", "--renorm 'r' is no JSON"),
        ("--device-batch 8 --ranks 4 --groups 0", "groups=0 must be at least 1"),
        ("--device-batch 8 --ranks 4 --kidn sync", "unrecognized arguments: --kidn"),
        ("--device-batch eight --ranks 4", "invalid int value: 'eight'"),
        ("--ranks 4", "the following arguments are required: --device-batch"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_three_lines(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["decide", *arguments.split()])
    text = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in text
    assert len(text.splitlines()) <= 3
