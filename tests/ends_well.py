"""A script whose ranks end: run as `python -m tests.ends_well trainer=cpu_ddp`; `LEFT` says where each leaves word."""

import atexit
import os
from pathlib import Path

from distnorm import collectives
from distnorm.launch import main

ROOT = Path(__file__).parent.parent


class Alive:
    """Leaves a file where the interpreter is taken down with it alive."""

    def __init__(self, file, _write=os.open):
        self.file, self._write = str(file), _write

    def __del__(self):
        self._write(self.file, os.O_CREAT)


def train(settings, ranks, run):
    """Make a group, and leave it alive, as Lightning does."""
    left = Path(os.environ["LEFT"])
    collectives.start_ranks(rank=ranks.rank, world_size=ranks.world_size, store_path=str(left / "store"), timeout_s=60)
    collectives.agree(ranks.rank, "that all are here")
    atexit.register((left / f"rank{ranks.rank}.exit").touch)
    globals()["alive"] = Alive(left / f"rank{ranks.rank}.torn")
    return {}


if __name__ == "__main__":
    main(train, config=ROOT / "conf" / "train.yaml")
