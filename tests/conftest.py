"""How the suite is dealt to pytest-xdist's workers (`make test`); without them it runs in one process, as it stands.

A file is a group: its fixtures and its pool of ranks serve one worker. A whole run of train.py needs neither, so each
is a group of its own, unless its tests say otherwise.
"""

import pytest
import torch

torch.set_num_threads(1)  # as the ranks have it: workers that share cores slow each other down


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            whole_run = item.get_closest_marker("run")
            item.add_marker(pytest.mark.xdist_group(item.name if whole_run else item.path.stem))
