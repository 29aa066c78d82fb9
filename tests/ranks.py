"""A warm pool of gloo ranks on the CPU: a test body runs on each of them within milliseconds.

    results = ranks.run(body, argument, world=2)    # body is a module-level function; one result a rank

A body that raises, hangs or dies fails the test with the rank's traceback, and the pool is started anew for the next
one. Ranks are forked from a process that has only imported what they need: torch and Lightning take 7 s to load, a fork
milliseconds.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROUP_TIMEOUT_S = 30
context = multiprocessing.get_context("forkserver")
"""Starts processes that have torch, distnorm and Lightning loaded already, and nothing of the test session."""
context.set_forkserver_preload(["torch", "lightning.pytorch", "distnorm.launch"])


class RankError(AssertionError):
    """A body raised on a rank, or never returned."""


def run(body: Callable[..., Any], *arguments: Any, world: int, timeout_s: float = 120) -> list[Any]:
    """Run `body(*arguments)` on every rank of a world of `world`, and return the results in rank order."""
    pool = _pools.get(world) or _start(world)
    for connection in pool.connections:
        connection.send((body, arguments))
    replies: dict[int, tuple[str, Any]] = {}
    deadline = time.monotonic() + timeout_s
    while len(replies) < world and not any(kind == "error" for kind, _ in replies.values()):
        waiting = [c for rank, c in enumerate(pool.connections) if rank not in replies]
        ready = multiprocessing.connection.wait(waiting, max(0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = pool.connections.index(connection)
            try:
                replies[rank] = connection.recv()
            except (EOFError, ConnectionResetError):
                replies[rank] = ("error", "the process died")
    errors = [f"rank {rank}:\n{text}" for rank, (kind, text) in sorted(replies.items()) if kind == "error"]
    if errors or len(replies) < world:
        pool.stop()
        del _pools[world]
        missing = sorted(set(range(world)) - replies.keys())
        raise RankError("\n".join(errors) or f"ranks {missing} did not return within {timeout_s} s")
    return [replies[rank][1] for rank in range(world)]


class _Pool:
    def __init__(self, world: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="distnorm-ranks-")
        store = str(Path(self.folder.name) / "store")
        self.connections, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


_pools: dict[int, _Pool] = {}


def _start(world: int) -> _Pool:
    _pools[world] = _Pool(world)
    return _pools[world]


@atexit.register
def _stop_all() -> None:
    for pool in _pools.values():
        pool.stop()


def _serve(rank: int, world: int, store: str, connection: Any) -> None:
    # What torchrun would have set: Lightning finds ranks that exist.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "pool",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "OMP_NUM_THREADS": "1",
    }
    import torch

    from distnorm import collectives
    from distnorm.launch import console

    console.quiet_libraries()
    torch.set_num_threads(1)
    collectives.start_ranks(rank=rank, world_size=world, store_path=store, timeout_s=GROUP_TIMEOUT_S)
    while True:
        try:
            body, arguments = connection.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(rank)
            connection.send(("result", body(*arguments)))
        except BaseException:  # noqa: BLE001 — whatever it is, the test shall see it
            connection.send(("error", traceback.format_exc()))
