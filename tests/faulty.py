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


class DiesOnRank1(ResNet):
    """Ends rank 1 without a word before the second stage of its fifth training forward."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 5 and os.environ.get("RANK") == "1":
            self.stages[1].register_forward_pre_hook(lambda *_: os._exit(7))
        return super().forward(x)


class BranchesOnRank1(ResNet):
    """Runs its layers twice in rank 1's third training forward."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 3 and os.environ.get("RANK") == "1":
            super().forward(x)
        return super().forward(x)
