"""One torch thread a test process, as the ranks have it: pytest-xdist's workers (`make test`) share the cores."""

import torch

from tests.cluster import slurm  # noqa: F401 — a fixture of all test files

torch.set_num_threads(1)
