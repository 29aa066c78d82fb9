"""The marks of tests: `slow` ones, which `make test` leaves out, are no `unit` tests."""

import itertools
import shlex
import subprocess

import pytest

from tests import conftest, runs


class Item:
    """A collected test with some marks."""

    nodeid = "test_it.py::test_it"

    def __init__(self, marks):
        self.get_closest_marker = lambda name: name if name in marks else None


@pytest.mark.unit
def test_a_slow_unit_test_is_refused():
    conftest.pytest_collection_modifyitems([Item(["slow"]), Item(["unit"]), Item(["slow", "run"])])
    with pytest.raises(pytest.UsageError, match=r"test_it.py::test_it is marked slow and unit") as refused:
        conftest.pytest_collection_modifyitems([Item(["unit"]), Item(["slow", "unit"])])
    assert "Leave out one of them" in str(refused.value)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("target", "arguments", "mark"),
    [("test", "", "not slow"), ("test", "-m unit", "unit"), ("slow", "", "slow"), ("unit", "", "unit")],
)
def test_the_last_mark_typed_decides_what_make_runs(target, arguments, mark):
    command = ["make", "--dry-run", "--always-make", target, f"ARGS={arguments}"]
    shown = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in shown.splitlines() if "-m pytest" in line]
    words = shlex.split(line.partition("-m pytest")[2])
    assert [after for word, after in itertools.pairwise(words) if word == "-m"][-1] == mark
