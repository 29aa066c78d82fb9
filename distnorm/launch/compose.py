"""Compose settings from conf/ outside Hydra's own main, as often as one likes."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from distnorm import settings
from distnorm.errors import ConfigError
from distnorm.launch import overrides, ranks
from distnorm.settings import Settings


def composed(config: Path, changes: Sequence[str]) -> Settings:
    """Compose and check settings, as a command line with these changes would.

    Args:
        config: the root of the configuration: `conf/train.yaml`.
        changes: what one would type: `norm=sync`, `data.device_batch=2`; the last of two for the same key counts.

    Raises:
        ConfigError: a change that names nothing, or settings that are not good.
    """
    try:
        with initialize_config_dir(str(config.parent.resolve()), version_base="1.3"):
            found = compose(config.stem, list(changes))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if isinstance(error, ValueError) and overrides.NO_CHOICE not in str(error):
            raise
        raise ConfigError(overrides.in_words(error, config.parent)) from None
    return settings.check(found)


def completed(found: Settings) -> Settings:
    """Fill in what follows from the ranks, and let the policy decide once, to see that it can.

    Raises:
        ConfigError: the batches disagree with the ranks, or the policy refuses.
    """
    there = ranks.find(found.trainer)
    complete = found.with_batches(there.world_size)
    complete.decide(there.world_size, there.per_node)
    return complete
