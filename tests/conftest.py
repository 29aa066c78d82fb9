"""One torch thread a test process, as the ranks have it: pytest-xdist's workers (`make test`) share the cores."""

import torch

torch.set_num_threads(1)

pytest_plugins = ["tests.cluster"]
