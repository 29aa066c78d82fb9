"""Progress where there is no terminal: what a line says, and how often there is one."""

import re

import pytest

from distnorm.progress import duration
from tests import runs

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("seconds", "read"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (125, "2:05 min"),
        (3599.4, "59:59 min"),
        (3600, "1:00 h"),
        (11040, "3:04 h"),
        (360000, "100:00 h"),
    ],
)
def test_a_time_is_written_as_one_reads_it(seconds, read):
    assert duration(seconds) == read


LINE = re.compile(r"step (\d+)/6  epoch (\d+)  loss \d+\.\d{4}  .*?(\d+) samples/s  \d+ s left")


def test_a_line_says_step_loss_speed_and_the_time_left(tmp_path):
    _, console = runs.in_pool(tmp_path / "run", 1, "trainer.max_steps=6", "trainer.progress_every_s=1.0e-6")
    steps = [int(found.group(1)) for found in LINE.finditer(console)]
    assert steps == [4, 5, 6, 6]  # the first three are not timed yet, and training's end has a line


def test_lines_come_at_most_as_often_as_asked_and_from_the_first_rank(tmp_path):
    _, console = runs.in_pool(tmp_path / "run", 2, "trainer.max_steps=6", "trainer.progress_every_s=1000")
    assert len(re.findall(r"^step ", console, re.MULTILINE)) == 1
    assert "step 6/6" in console
