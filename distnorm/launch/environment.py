"""The ranks that srun has started, as Lightning asks for them.

Lightning's own `SLURMEnvironment` raises where srun was given `--ntasks` and no `--ntasks-per-node`, or a step has
other tasks or fewer nodes than its job; how many there are and whether they fit is known by now.
"""

import os

from lightning.fabric.plugins.environments import ClusterEnvironment

from distnorm.launch.ranks import Ranks, meeting_place


class FoundRanks(ClusterEnvironment):
    """Answer Lightning from the ranks that were found.

    Args:
        ranks: of srun.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        """They are there."""
        return True

    @property
    def main_address(self) -> str:
        """Where they meet."""
        return meeting_place(os.environ)[0]

    @property
    def main_port(self) -> int:
        """Where they meet."""
        return meeting_place(os.environ)[1]

    @staticmethod
    def detect() -> bool:
        """Say no: it is given, never looked for."""
        return False

    def world_size(self) -> int:
        """All ranks."""
        return self._ranks.world_size

    def set_world_size(self, size: int) -> None:
        """Ignore what Lightning would like."""

    def global_rank(self) -> int:
        """This process among all."""
        return self._ranks.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignore what Lightning has reckoned: srun may deal ranks out in turn over the nodes."""

    def local_rank(self) -> int:
        """This process on its node."""
        return self._ranks.local_rank

    def node_rank(self) -> int:
        """The node, among those of the step."""
        return int(os.environ.get("SLURM_NODEID", "0"))
