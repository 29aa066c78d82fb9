"""Threads of torch and its neighbours that distnorm settles: which body shows which, and what the bodies share.

    @settles("pytorch/pytorch#78078")
    def trains_on_the_cpu(): ...

A body runs on each of two ranks. The first line of its docstring says what goes wrong today.
"""

import contextlib
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distnorm import collectives

Body = Callable[[], None]


def settles(*threads: str) -> Callable[[Body], Body]:
    """Name the threads that a body settles, as GitHub writes them: `owner/repository#number`."""

    def mark(body: Body) -> Body:
        body.threads = threads  # type: ignore[attr-defined]
        return body

    return mark


def cases_of(*modules: types.ModuleType) -> dict[Body, tuple[str, ...]]:
    """Collect the bodies of modules, in their order, and the threads of each."""
    bodies = (value for module in modules for value in vars(module).values() if hasattr(value, "threads"))
    return {body: body.threads for body in bodies}


def joined(*shape: int, seed: int = 0) -> Tensor:
    """All ranks' samples, [N, C, *]: the same float64 values on every rank; rank 1's have another mean."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1
    x[shape[0] // 3 :] += 3
    return x


def own(x: Tensor) -> Tensor:
    """Take this rank's samples: the first third on rank 0, the rest on rank 1."""
    first = len(x) // 3
    return x[first:] if collectives.rank() else x[:first]


def equal(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance, check_dtype=False)


def same_buffers(ours: nn.Module, whole: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, found), truth in zip(ours.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


def same_step(ours: nn.Module, whole: nn.Module, x: Tensor) -> None:
    """Hold a training step on this rank's part against `whole`'s on the joined batch: outputs, gradients and buffers.

    DDP averages over two ranks what one process sums, so parameters' gradients are compared under DDP only.
    """
    part, everything = own(x).clone().requires_grad_(), x.clone().requires_grad_()
    y, truth = ours(part), whole(everything)
    y.square().sin().sum().backward(), truth.square().sin().sum().backward()
    equal(y, own(truth)), equal(part.grad, own(everything.grad))
    same_buffers(ours, whole)
    if isinstance(ours, DistributedDataParallel):
        for found, of_whole in zip(ours.parameters(), whole.parameters(), strict=True):
            equal(found.grad * 2, of_whole.grad)


def torch_still(is_so: bool, what: str) -> None:
    """Check that torch still behaves as the page says."""
    assert is_so, f"It is no longer so that {what}: change docs/threads.md and this test."


@contextlib.contextmanager
def torch_raises(message: str) -> Iterator[None]:
    """Check that torch still raises the error that the page quotes."""
    said = "nothing"
    try:
        yield
    except Exception as error:  # noqa: BLE001 — of whatever class, it is the message that people search for
        said = str(error)
    torch_still(message in said, f"torch raises {message!r} (it raises: {said})")
