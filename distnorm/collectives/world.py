"""This process among all ranks: its number, how many there are, how they start and where they leave word."""

import atexit
import contextlib
import datetime as dt
import gc
import os
import sys
import threading
from typing import Any, NoReturn

import torch
import torch.distributed as dist


def is_running() -> bool:
    """Tell whether this process is one of several that share a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among all ranks; 0 without a process group."""
    return dist.get_rank() if is_running() else 0


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if is_running() else 1


def start_ranks(*, rank: int, world_size: int, store_path: str, timeout_s: float) -> None:
    """Start a gloo process group over a file both small scripts and tests can share, with no port to choose.

    Args:
        rank: this process.
        world_size: how many processes call this.
        store_path: a file on a disk that all of them see; it must not exist before the first call.
        timeout_s: how long any exchange may take, in seconds.
    """
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store_path, world_size),
        rank=rank,
        world_size=world_size,
        timeout=dt.timedelta(seconds=timeout_s),
    )


def end_ranks() -> None:
    """End what `start_ranks` began: once all ranks have come, each lets go of the groups and waits for their threads.

    A group that something else still holds, such as a DDP model, keeps its threads: see `end_process`.

    Collective: 1 barrier over all ranks.
    """
    dist.barrier()
    gc.collect()  # a DDP model in a reference cycle, freed later, would wait for the threads with Python's lock held
    dist.destroy_process_group()


def end_process(exit_code: int = 0) -> NoReturn:
    """End this process as Python does, except that the interpreter is not taken down: for ranks.

    A thread of gloo's keeps the tensors of the exchange it has carried until after the result was taken, and needs
    Python's lock to release them. Where the interpreter is being taken down by then, Python ends that thread, and C++
    aborts the process: "terminate called without an active exception". On a loaded machine 1 end in 40 did so.

    Threads that are not daemons are waited for, exit functions run, and output is written.
    """
    getattr(threading, "_shutdown")()  # noqa: B009 — as Python's own end does, and multiprocessing's
    getattr(atexit, "_run_exitfuncs")()  # noqa: B009
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # none, closed, or nobody reads it
            stream.flush()
    os._exit(exit_code)


def agreed_through_launcher(value: str, *, key: str, rank: int, address: str, port: int, timeout_s: float = 60) -> str:
    """Agree on rank 0's `value` before there is a process group, through the store that torchrun keeps for its ranks.

    The first answer stands: ranks that torchrun has started again get the one that was agreed on before.

    Args:
        value: what rank 0 proposes; ignored on the others.
        key: names the question.
        rank: this process.
        address: torchrun's MASTER_ADDR.
        port: torchrun's MASTER_PORT.
        timeout_s: how long to wait for rank 0, in seconds.

    Collective: rank 0 writes, all read; no training collective.
    """
    store = dist.TCPStore(address, port, is_master=False, timeout=dt.timedelta(seconds=timeout_s))
    if rank == 0:
        store.compare_set(key, "", value)
    return bytes(store.get(key)).decode()


def store() -> Any:
    """Give the key-value store that the process group was started over: it outlives a collective that failed."""
    return getattr(dist.distributed_c10d, "_get_default_store")()  # noqa: B009


def timeout() -> dt.timedelta:
    """Read the timeout the world was started with: `new_group` would fall back to the backend's 10 or 30 minutes."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    options = getattr(dist.group.WORLD, "_get_backend")(device).options  # noqa: B009
    return options._timeout if options is not None else dt.timedelta(minutes=10)  # noqa: SLF001
