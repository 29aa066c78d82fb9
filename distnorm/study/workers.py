"""Processes that stay warm from run to run: a run that fails, or dies, takes no other with it."""

import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from distnorm.errors import DistNormError
from distnorm.launch import console, local

Task = TypeVar("Task")
_context = multiprocessing.get_context("spawn")


class CellError(DistNormError):
    """A run of a study failed; the message says why."""

    exit_code = 1


class Workers(Generic[Task]):
    """Some processes, one thread each, that do one task after the other.

    Args:
        body: does a task, in a worker; a module's function.
        number: how many processes; they start with the first task.
    """

    def __init__(self, body: Callable[[Task], Any], number: int) -> None:
        self._body, self._number = body, number
        self._idle: list[_Worker] = []
        self._running = dict[Any, tuple[_Worker, Task]]()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Do all tasks.

        Yields:
            Each task with its result, or with the `CellError` that it ended with, as they end.
        """
        waiting = deque(tasks)
        while waiting or self._running:
            while waiting and self.free:
                self.start(waiting.popleft())
            yield from self.ended()

    @property
    def free(self) -> int:
        """How many processes have nothing to do."""
        return self._number - len(self._running)

    def start(self, task: Task) -> None:
        """Begin a task; some process must be free."""
        worker = self._idle.pop() if self._idle else _Worker()
        worker.connection.send((self._body, task))
        self._running[worker.connection] = worker, task

    def ended(self, timeout_s: float | None = None) -> list[tuple[Task, Any]]:
        """Wait until some tasks have ended, or for so long; give them with their results, as `run` does."""
        results = []
        for connection in multiprocessing.connection.wait(list(self._running), timeout_s):
            worker, task = self._running.pop(connection)
            results.append((task, worker.receive()))
            if worker.process.is_alive():
                self._idle.append(worker)
        return results

    def stop(self) -> None:
        """End the processes, and with them the tasks that they do."""
        for worker in [*self._idle, *(worker for worker, _ in self._running.values())]:
            worker.process.kill()
        self._idle.clear()
        self._running.clear()


class _Worker:
    def __init__(self) -> None:
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return CellError(f"its process ended with exit code {self.process.exitcode}, without a word")


def _serve(connection: Any) -> None:
    local.end_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"
    console.quiet_libraries()
    while True:
        try:
            body, task = connection.recv()
        except EOFError:
            return
        try:
            result = body(task)
        except BaseException as error:  # noqa: BLE001 — whatever ends a run, it is that run's
            result = CellError(in_words(error))
        connection.send(result)


def in_words(error: BaseException) -> str:
    """Say what ended a run: its message, and where it came from unless the mistake is the user's."""
    if isinstance(error, DistNormError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first} ({os.path.basename(frame.filename)}:{frame.lineno})"  # noqa: PTH119
