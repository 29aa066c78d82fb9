"""The README's promises: its example runs and prints what it says, its table is true, its links and commands exist."""

import re
import subprocess
import sys

import pytest

from distnorm import decide
from distnorm.spec import KINDS
from tests.runs import ROOT

pytestmark = pytest.mark.unit

README = (ROOT / "README.md").read_text()


def test_the_example_prints_what_it_says():
    code, output = re.findall(r"```(?:python|text)\n(.*?)```", README, re.DOTALL)[:2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == output


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
