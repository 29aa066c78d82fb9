"""Random numbers that depend on what they are for, never on who draws them or when."""

import numpy as np

from distnorm.errors import ConfigError

MAX_SEED = 2**32 - 1


def stream(seed: int, epoch: int, index: int | None = None) -> np.random.Generator:
    """Open the random stream of one sample in one epoch, or of the epoch itself.

    Philox takes a key of two 64-bit words and streams of different keys are independent; the three numbers fill the key
    without overlap, so no two of them ever share a stream.

    Args:
        seed: the run's seed, 0 … 2^32 - 1.
        epoch: 0 … 2^32 - 1.
        index: position of the sample in its data set, 0 … 2^32 - 2; `None` for what concerns the whole epoch.
    """
    position = 0 if index is None else index + 1
    return np.random.Generator(np.random.Philox(key=(seed << 64) | (epoch << 32) | position))


def check_seed(seed: int) -> None:
    """Refuse a seed that a stream cannot take.

    Raises:
        ConfigError: `seed` is not in 0 … 2^32 - 1, the range that torch, numpy and Lightning share.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed={seed} must lie in 0..{MAX_SEED}. Give such a number, e.g. seed=0.")
