"""What decides which samples the steps of an epoch have, and whether a training may go on in the middle of one."""

from distnorm.errors import ConfigError

Order = dict[str, int | str | bool]
"""By name: the seed, the number of samples and whatever else the order depends on; plain values for a checkpoint."""

_WORDS = {
    "seed": "seed={}",
    "num_samples": "data of {} training samples",
    "shuffle": "shuffle={}",
    "last_batch": "data.last_batch={}",
    "shards": "data.shards={}",
    "world_size": "sorted shards on {} ranks",
}


def check_same_order(before: Order, now: Order) -> None:
    """Refuse to go on in the middle of an epoch that was begun in another order.

    Args:
        before: of its first steps; what it does not name, as in an older checkpoint, is not compared.
        now: of the steps to come.

    Raises:
        ConfigError: the orders differ.
    """
    differ = [key for key in now if key in before and before[key] != now[key]]
    if differ:
        was, has = (", ".join(_WORDS[key].format(of[key]) for key in differ) for of in (before, now))
        raise ConfigError(
            f"The checkpoint is from the middle of an epoch with {was}, and this run has {has}.\n"
            "Its steps have other samples: some would be lost, others repeated.\n"
            f"Use {was} to go on, or a checkpoint from the end of an epoch."
        )
