"""One torch thread a test process, as the ranks have it: pytest-xdist's workers (`make test`) share the cores."""

import pytest
import torch

from tests.cluster import slurm  # noqa: F401 — a fixture of all test files

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Refuse a slow test among the quick ones: `make unit` would run it, and `make test` would not."""
    for item in items:
        if item.get_closest_marker("slow") and item.get_closest_marker("unit"):
            raise pytest.UsageError(
                f"{item.nodeid} is marked slow and unit, and unit tests take seconds.\n"
                "Leave out one of them; where the whole file is marked unit, move the test to another file."
            )
