"""Models that go wrong on one rank, for `model._target_=tests.faulty.…`."""

import os
import time

from torch import Tensor

from distnorm.models import ResNet


def _is_rank_1() -> bool:
    return os.environ.get("SLURM_PROCID", os.environ.get("RANK")) == "1"


class RaisesOnRank1(ResNet):
    """Raises in rank 1's fifth training forward."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 5 and _is_rank_1():
            raise ValueError("the label file is corrupt")
        return super().forward(x)


class DiesOnRank1(ResNet):
    """Ends rank 1 without a word before the second stage of its fifth training forward."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 5 and _is_rank_1():
            self.stages[1].register_forward_pre_hook(lambda *_: os._exit(7))
        return super().forward(x)


class BranchesOnRank1(ResNet):
    """Runs its layers twice in rank 1's third training forward."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 3 and _is_rank_1():
            super().forward(x)
        return super().forward(x)


class SlowOnRank1(ResNet):
    """Keeps rank 1 a second longer in three training forwards, from number `DISTNORM_TEST_SLOW_FROM` on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        first = int(os.environ.get("DISTNORM_TEST_SLOW_FROM", "-1"))
        if self.training and _is_rank_1() and 0 < first <= self.calls < first + 3:
            time.sleep(1)
        return super().forward(x)
