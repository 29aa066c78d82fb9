"""Ranks that come together over a key-value store, before there is a process group: they compare, and hear one verdict.

Every answer goes to rank 0, that judges once for all; so as many messages as ranks, and nobody hears anything else.
"""

import contextlib
import datetime as dt
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from distnorm.errors import ConfigError, GroupError

_ANSWER_S = 10  # a store answers in milliseconds; what listens for that long without a word is none
_hosted: list[Any] = []
"""Stores that this process keeps: torch finds them again, by their port, when it starts its process group."""


class Meeting:
    """Ranks that share a store.

    Args:
        store: torch's; `None` for a rank that is alone.
        rank: this process.
        world_size: how many come.
        timeout_s: how long they wait for each other, in seconds.
        keeps_store: the store ends with this process.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float, *, keeps_store: bool = False) -> None:
        self._store, self._rank, self._world_size, self._timeout_s = store, rank, world_size, timeout_s
        self._keeps_store = keeps_store

    def ask(self, what: str, own: Any, judge: Callable[[Mapping[int, Any]], Any]) -> Any:
        """Give rank 0 an answer of every rank, and all ranks its verdict.

        Args:
            what: names the question, alike on all ranks; each is asked once.
            own: this rank's answer, of what JSON can hold.
            judge: called on rank 0 with the answers by rank, of those who came in time; its verdict is JSON too.

        Returns:
            The verdict, alike on all ranks.

        Collective: rank 0 reads and all hear, over the store; no training collective.

        Raises:
            GroupError: the store is gone, and rank 0 with it.
        """
        if self._store is None:
            return json.loads(json.dumps(judge({self._rank: own})))
        try:
            self._store.set(f"{what}/{self._rank}", json.dumps(own))
            if self._rank == 0:
                self._store.set(f"{what}/verdict", json.dumps(judge(self._answers(what))))
            self._wait([f"{what}/verdict"], self._timeout_s + _ANSWER_S)
            return json.loads(self._store.get(f"{what}/verdict"))
        except (RuntimeError, TimeoutError) as error:
            said = (str(error).splitlines() or ["no words"])[0][:100]
            raise GroupError(
                f"rank {self._rank} heard nothing of rank 0 about {what}: {said}.\n"
                "Rank 0 keeps the ranks' meeting place: its own output says why it left."
            ) from None

    def _answers(self, what: str) -> dict[int, Any]:
        keys = [f"{what}/{rank}" for rank in range(self._world_size)]
        with contextlib.suppress(TimeoutError):
            self._wait(keys, self._timeout_s)
        came = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        return {rank: json.loads(self._store.get(keys[rank])) for rank in came}

    def _wait(self, keys: list[str], timeout_s: float) -> None:
        """Look ever less often, up to five times a second: the store's own wait writes warnings when it ends."""
        deadline, pause = time.monotonic() + timeout_s, 0.001
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing within {timeout_s:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def leave(self) -> None:
        """Let the others read the verdict before the store ends with this process; 5 s at most."""
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):
            self._store.add("left", 1)
            deadline = time.monotonic() + 5
            while self._keeps_store and self._store.add("left", 0) < self._world_size and time.monotonic() < deadline:
                time.sleep(0.02)


def come_together(
    rank: int, world_size: int, *, address: str, port: int, hosts: bool, name: str, timeout_s: float
) -> Meeting:
    """Come to the store at `address:port`, which rank 0 opens where no launcher keeps one.

    torch's process group, started later at the same place, takes the store that rank 0 has opened: the port is bound
    once.

    Args:
        rank: this process.
        world_size: how many come.
        address: MASTER_ADDR.
        port: MASTER_PORT.
        hosts: rank 0 opens the store; else torchrun keeps one there.
        name: of this meeting, for a store may see several.
        timeout_s: how long to wait for each other, in seconds.

    Collective: every rank comes; they wait for each other where they ask.

    Raises:
        ConfigError: the address is unknown, the port is taken, or nothing answers there.
    """
    if world_size == 1:
        return Meeting(None, rank, 1, timeout_s)
    keeps_store = hosts and rank == 0
    _resolve(address)
    if keeps_store:
        _hosted.append(_open(port, timeout_s))
    _reach(address, port, _ANSWER_S if keeps_store else timeout_s, rank)
    store = dist.PrefixStore(f"distnorm/{name}", _connect(address, port, timeout_s))
    return Meeting(store, rank, world_size, timeout_s, keeps_store=keeps_store)


def _resolve(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={address} is no machine that {socket.gethostname()} knows ({error.strerror}), and the ranks "
            "meet there.\nSet it to a name or an address of the first node that every node can reach: "
            "export MASTER_ADDR=<address>"
        ) from None


def _open(port: int, timeout_s: float) -> Any:
    try:
        return dist.TCPStore(
            "localhost",
            port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=dt.timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "EACCES" not in str(error):
            raise
        reason = "another program has it" if "EADDRINUSE" in str(error) else "it is not yours to open"
        raise ConfigError(
            f"MASTER_PORT={port} cannot be opened on {socket.gethostname()}, where rank 0 keeps the ranks' meeting "
            f"place: {reason}.\nSet a free one: export MASTER_PORT={_free_port()}"
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _reach(address: str, port: int, timeout_s: float, rank: int) -> None:
    """Wait until something listens there: torch's own attempts print a page of frames when they fail."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank {rank} on {socket.gethostname()} found nobody at MASTER_ADDR={address}, MASTER_PORT={port} "
                    f"within {timeout_s:g} s: {error.strerror or error}.\n"
                    "Did rank 0 start? Does the first node have that address, and its firewall let the port through? "
                    "Set both to what every node reaches."
                ) from None
            time.sleep(0.2)


def _connect(address: str, port: int, timeout_s: float) -> Any:
    """Connect in a thread of its own: with anything but a store at the other end torch waits for ever."""
    found: list[Any] = []
    timeout = dt.timedelta(seconds=max(timeout_s, 1))

    def connect() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(dist.TCPStore(address, port, is_master=False, timeout=timeout))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    if not found:
        raise ConfigError(
            f"What listens at MASTER_ADDR={address}, MASTER_PORT={port} is no meeting place of ranks: no answer within "
            f"{_ANSWER_S} s.\nAnother program has the port. Set a free one: export MASTER_PORT={_free_port()}"
        )
    return found[0]
