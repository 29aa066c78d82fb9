"""On CUDA: torch's synchronized function against ours, both on a one-rank nccl group, both on their synchronized path.

At world size 1 torch's module is plain batch norm, so its function is called directly. Ours goes native when it is
alone in its group, so its synchronized path is entered below that decision, by the method that `FORCED` names:
`layer._normalize_with_ranks((0,), x)`. There it makes no collective for one rank, so the bench adds both exchanges.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchSynchronized

from bench.rows import FORMATS, SHAPES, Step
from bench.timing import Spread
from distnorm import SyncBatchNorm

FORCED = "_normalize_with_ranks"
STEPS = 20
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def run(folder: Path, repetitions: int, pattern: str) -> list[dict[str, Any]]:
    """Time torch's function and ours for each shape and memory format; to be called in a process of its own."""
    if not hasattr(SyncBatchNorm, FORCED):
        print(f"cuda rows left out: SyncBatchNorm has no {FORCED}", flush=True)
        return []
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.FileStore(str(folder / "nccl"), 1), rank=0, world_size=1)
    try:
        names = [(shape, name) for shape in SHAPES for name in FORMATS if pattern in f"{_title(shape)} {name}"]
        return [_measure(shape, name, repetitions) for shape, name in names]
    finally:
        dist.destroy_process_group()


def _measure(shape: tuple[int, ...], memory_format: str, repetitions: int) -> dict[str, Any]:
    steps = {
        "torch": _step(torchs(shape[1]), shape, memory_format),
        "ours": _step(ours(shape[1]), shape, memory_format),
    }
    for step in steps.values():
        _sample_ms(step)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions):
        for name in list(steps)[:: 1 if repetition % 2 else -1]:
            samples[name].append(_sample_ms(steps[name]))
    ms = {name: torch.tensor(values) for name, values in samples.items()}
    ratio = Spread.of(ms["torch"] / ms["ours"])
    print(f"cuda {_title(shape)} {memory_format}: torch / ours {ratio.median:.2f}", flush=True)
    return {
        "name": f"{_title(shape)} {memory_format}",
        "ms": {name: asdict(Spread.of(values)) for name, values in ms.items()},
        "torch_to_ours": asdict(ratio),
    }


def torchs(channels: int) -> Callable[[Tensor], Tensor]:
    """Make torch's synchronized function, with its parameters and running statistics."""
    weight, bias = (torch.ones(channels, device="cuda", requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")

    def normalize(x: Tensor) -> Tensor:
        weight.grad = bias.grad = None
        y: Tensor = TorchSynchronized.apply(x, weight, bias, mean, var, 1e-5, 0.1, dist.group.WORLD, 1)
        return y

    return normalize


def ours(channels: int) -> Callable[[Tensor], Tensor]:
    """Make our layer's synchronized path, and the two exchanges it would make."""
    layer = SyncBatchNorm(channels, device="cuda")
    forced = getattr(layer, FORCED)
    gathered = torch.zeros(2 * channels + 1, dtype=torch.float64, device="cuda")
    summed = torch.zeros(2 * channels, device="cuda")

    def add_sum(_: Tensor) -> None:
        dist.all_reduce(summed)

    def normalize(x: Tensor) -> Tensor:
        layer.zero_grad(set_to_none=True)
        _all_gather(torch.empty_like(gathered), gathered)
        y: Tensor = forced((0,), x)
        y.register_hook(add_sum)
        return y

    return normalize


def _step(normalize: Callable[[Tensor], Tensor], shape: tuple[int, ...], memory_format: str) -> Step:
    x, dy = (torch.randn(shape, device="cuda").contiguous(memory_format=FORMATS[memory_format]) for _ in range(2))
    x.requires_grad_()

    def step() -> None:
        x.grad = None
        normalize(x).backward(dy)

    return step


def _sample_ms(step: Step) -> float:
    """Take the mean time of a step from an idle device to an idle device."""
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started_s) * 1e3 / STEPS


def _title(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
