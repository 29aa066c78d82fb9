"""The random streams of this process: seeded, taken down as plain numbers and tensors, and put back.

Three streams are drawn from: torch's (the CPU's, and the current GPU's), numpy's legacy one and Python's. A state is
what `torch.load(weights_only=True)` reads; `numpy.random.get_state()` as it comes is not.
"""

import random
from typing import Any

import numpy as np
import torch


def seed_weights(seed: int) -> None:
    """Seed what must be alike on all ranks: the initial weights."""
    _seed_all(seed, seed)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed what must differ from rank to rank: dropout, and whatever else a model draws in training.

    Args:
        seed: the run's.
        rank: this process.
        step: from which a training goes on that cannot have its old streams: there are other ranks now.
    """
    words = [seed, rank, step] if step else [seed, rank]
    stream = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
    _seed_all(stream, stream % 2**32)


def take() -> dict[str, Any]:
    """Take all streams down as they are; nothing is drawn."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }
    found = np.random.get_state(legacy=False)
    if found["bit_generator"] == "MT19937":  # else somebody has put another generator there, and knows its state
        key, position = found["state"]["key"], found["state"]["pos"]
        state["numpy"] = {
            "key": torch.from_numpy(key.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(found["has_gauss"]),
            "gauss": float(found["gauss"]),
        }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def put(state: dict[str, Any]) -> None:
    """Put streams back that `take` took down; one that the state lacks stays as it is."""
    torch.set_rng_state(state["torch"].cpu())
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if "numpy" in state:
        kept = state["numpy"]
        key = kept["key"].cpu().numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, kept["position"], kept["has_gauss"], kept["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _seed_all(seed: int, short: int) -> None:
    """Seed the three streams; numpy's takes 32 bits."""
    random.seed(seed)
    np.random.seed(short)
    torch.manual_seed(seed)
