"""Models that go wrong on one rank, for `model._target_=tests.faulty.…`."""

import os

from torch import Tensor

from distnorm.models import ResNet


class RaisesOnRank1(ResNet):
    """Raises in rank 1's fifth training forward."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 5 and os.environ.get("RANK") == "1":
            raise ValueError("the label file is corrupt")
        return super().forward(x)
