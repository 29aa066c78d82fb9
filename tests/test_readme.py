"""The README's promises: its example runs and prints what it says, its table is true, its links and commands exist."""

import os
import re
import subprocess
import sys

import pytest
import torch

from distnorm import decide
from distnorm.spec import KINDS
from tests.runs import ROOT

pytestmark = pytest.mark.unit

README = (ROOT / "README.md").read_text()


CODE, OUTPUT = re.findall(r"```(?:python|text)\n(.*?)```", README, re.DOTALL)[:2]
RUNNER = """
import os, sys, torch
inputs, statistics = {}, {}
def record(module, args):
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
        inputs.setdefault(module, []).append(args[0].detach().double().clone())
torch.nn.modules.module.register_module_forward_pre_hook(record)
found = {}
torch.manual_seed(int(os.environ.get("RANK", 0)))
exec(compile(open(sys.argv[1]).read(), "README.md", "exec"), found)
modules = found["net"].named_modules()
norms = {f"{name}.": (module.momentum, inputs[module]) for name, module in modules if module in inputs}
torch.save((norms, found["state"]), f"{sys.argv[2]}/{os.environ.get('RANK', 0)}.pt")
"""


def run_the_example(folder, *launcher):
    """Run the very text, and collect what its norms were given and what would be saved."""
    (folder / "example.py").write_text(CODE)
    (folder / "runner.py").write_text(RUNNER)
    command = [sys.executable, *launcher, str(folder / "runner.py"), str(folder / "example.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout, [torch.load(file) for file in sorted(folder.glob("*.pt"))]


def running(batches, momentum):
    """Mean and variance [C] of a running average over batches, by its formula."""
    mean, var = 0, 1
    for x in batches:
        values = x.transpose(0, 1).flatten(1)
        mean, var = (1 - momentum) * mean + momentum * values.mean(1), (1 - momentum) * var + momentum * values.var(1)
    return mean, var


def test_the_example_runs_alone(tmp_path):
    printed, [(norms, state)] = run_the_example(tmp_path)
    assert re.search(r"^mean -?0.0, variance 1.0$", printed, re.MULTILINE)
    for name, (momentum, inputs) in norms.items():
        mean, var = running(inputs, momentum)
        torch.testing.assert_close(state[f"{name}running_mean"].double(), mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state[f"{name}running_var"].double(), var, rtol=1e-4, atol=1e-4)


def test_the_example_on_two_ranks_prints_what_it_says_and_has_the_joined_datas_statistics(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    printed, ((first, state), (second, other)) = run_the_example(tmp_path, *launcher)
    assert printed == OUTPUT
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    momentum = first["0."][0]
    ranks = [running(norms["0."][1], momentum) for norms in (first, second)]
    mean = sum(m for m, _ in ranks) / 2
    expected = {"0.": (mean, sum(v + (m - mean).square() for m, v in ranks) / 2)}
    joined = [torch.cat(together) for together in zip(first["3."][1], second["3."][1], strict=True)]
    expected["3."] = running(joined, first["3."][0])
    for name, (mean, var) in expected.items():
        torch.testing.assert_close(state[f"{name}running_mean"].double(), mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state[f"{name}running_var"].double(), var, rtol=1e-4, atol=1e-4)
    data = torch.cat([x for norms in (first, second) for x in norms["0."][1]]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(state["0.running_mean"].double(), data.mean(1), rtol=0, atol=0.1)
    torch.testing.assert_close(state["0.running_var"].double(), data.var(1), rtol=0, atol=0.2)


def test_it_is_short_and_shows_code_early():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert lines.index("```python") < 25


@pytest.mark.parametrize(
    ("device_batch", "ranks", "kind", "sync_ranks"),
    [
        (16, 1, "batch", 1),
        (16, 64, "batch", 1),
        (8, 4, "sync", 4),
        (8, 64, "sync", 4),
        (4, 4, "sync", 4),
        (2, 8, "sync", 8),
        (2, 4, "group_ws", 1),
        (1, 8, "group_ws", 1),
    ],
)
def test_the_table_of_decisions_is_true(device_batch, ranks, kind, sync_ranks):
    spec = decide(device_batch, ranks)
    assert (spec.kind, spec.sync_ranks) == (kind, sync_ranks)


def test_every_choice_it_names_is_there():
    for group in ("norm", "trainer"):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{group}`"))
        named = set(re.findall(r"`(\w+)`", line)) - {group}
        assert named == {file.stem for file in (ROOT / "conf" / group).glob("[!_]*.yaml")}
    assert {file.stem for file in (ROOT / "conf" / "norm").glob("[!_]*.yaml")} == set(KINDS)


def test_links_lead_somewhere():
    for file in ROOT.glob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text()):
            assert (ROOT / link).exists(), f"{file.name}: {link}"


def test_the_command_line_tool_decides():
    command = [sys.executable, "-m", "distnorm.cli", "decide", "--device-batch", "2", "--ranks"]
    done = subprocess.run([*command, "8"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("decision      sync over 8 ranks, normalization batch 16")
    refused = subprocess.run([*command, "0"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("world_size=0 must be at least 1")
