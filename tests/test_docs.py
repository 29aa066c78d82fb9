"""The guides' examples run as they stand, one after the other, and their links lead somewhere."""

import re
import subprocess
import sys

import pytest

from distnorm.drift.catalogue import MEASURES, OF_THE_MODEL
from tests.runs import ROOT

pytestmark = pytest.mark.unit

GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text())


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_examples_run(guide, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_the_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_measure_is_explained():
    page = (ROOT / "docs" / "drift.md").read_text()
    chapter = page[page.index("## The measures") : page.index("## The record")]
    rows = re.findall(r"^\| `(\w+)`", chapter, re.MULTILINE)
    assert sorted(rows) == sorted(measure.key for measure in (*MEASURES, *OF_THE_MODEL))


def test_the_limits_are_the_catalogues():
    page = (ROOT / "docs" / "drift.md").read_text()
    table = page[page.index("| measure | alarm |") : page.index("*Chance*")]
    limits = {measure.key: measure.limit for measure in (*MEASURES, *OF_THE_MODEL) if measure.limit}
    told = {}
    for line in table.splitlines()[2:]:
        if cells := [cell.strip() for cell in line.split("|")[1:-1]]:
            told |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[1:])
    assert told.keys() == limits.keys()
    for key, (alarm, ends, times) in told.items():
        if key != "non_finite":
            numbers = [float(re.search(r"[\d.]+", cell)[0]) for cell in (alarm, ends)]
            assert (alarm.split()[0], *numbers) == (limits[key].side, limits[key].at, limits[key].clear), key
        assert int(times.split()[0]) == limits[key].times, key
