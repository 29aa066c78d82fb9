"""Which samples a rank sees in which step: the same samples in every step, however many ranks share them.

A batch is a list of `(epoch, sample index)` pairs, so that whoever loads a sample, in this process or in a loader
worker, knows everything its augmentation depends on.
"""

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from distnorm.data.order import Order, check_same_order
from distnorm.data.stream import check_seed, stream
from distnorm.errors import ConfigError, did_you_mean

Pair = tuple[int, int]

LAST_BATCH = ("drop", "keep")
SHARDS = ("shuffled", "sorted")


class GlobalBatchSampler(Sampler[list[Pair]]):
    """Deal the training samples of an epoch to the ranks, one global batch after the other.

    With G = device_batch · world_size, global batch i is `order[i·G : (i+1)·G]`, where `order` is a permutation that
    depends on (seed, epoch) alone; rank r takes the r-th contiguous chunk of it. Two worlds with the same G therefore
    train on the same global batches.

    With `classes` the shards are sorted: rank r takes its samples from the r-th part of the data set in the order of
    the classes, whose sizes differ by at most one, and from no other. The global batches then depend on the world.

    Args:
        num_samples: samples in the data set.
        device_batch: samples one device sees per forward.
        rank: this process, 0 … world_size - 1.
        world_size: number of ranks.
        seed: what the order depends on, besides the epoch.
        shuffle: a new order each epoch; `False`: the order of the data set.
        last_batch: what becomes of the samples that do not fill a global batch. `"drop"`: they are left out (others
            each epoch, by the shuffle). `"keep"`: they make one more, smaller batch, dealt as evenly as possible; with
            fewer samples than ranks the last ranks get an empty list.
        classes: the class of each sample, for sorted shards; `None`: every rank may get any sample.

    Raises:
        ConfigError: an argument is out of range, or there is not even one batch.

    Example:
        >>> sampler = GlobalBatchSampler(
        ...     num_samples=5, device_batch=1, rank=1, world_size=2, seed=0, shuffle=False, last_batch="keep"
        ... )
        >>> list(sampler)
        [[(0, 1)], [(0, 3)], []]
        >>> [sampler.global_count(step) for step in range(len(sampler))]
        [2, 2, 1]
    """

    def __init__(
        self,
        *,
        num_samples: int,
        device_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        last_batch: str = "drop",
        classes: Sequence[int] | None = None,
    ) -> None:
        check_device_batch(device_batch)
        check_last_batch(last_batch)
        check_seed(seed)
        _check_rank(rank, world_size)
        self.num_samples, self.device_batch = num_samples, device_batch
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.last_batch = seed, shuffle, last_batch
        self.classes = classes
        self.epoch = self._start = 0
        self._check_one_batch()

    @property
    def global_batch(self) -> int:
        """Samples of a full step over all ranks."""
        return self.device_batch * self.world_size

    @property
    def left_out(self) -> int:
        """Samples that an epoch leaves out."""
        return self.num_samples % self.global_batch if self.last_batch == "drop" else 0

    @property
    def order(self) -> Order:
        """What decides which samples each global batch of an epoch has, besides the global batch."""
        found: Order = {
            "seed": self.seed,
            "num_samples": self.num_samples,
            "shuffle": self.shuffle,
            "last_batch": self.last_batch,
            "shards": "shuffled" if self.classes is None else "sorted",
        }
        return found if self.classes is None else {**found, "world_size": self.world_size}

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """This sampler: Lightning announces an epoch to `batch_sampler.sampler`, not to `batch_sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration deals.

        Args:
            epoch: 0 for the first.
        """
        if epoch != self.epoch:
            self._start = 0
        self.epoch = epoch

    def check_continues(self, before: Order) -> None:
        """Refuse to go on in the middle of an epoch that was dealt in another order.

        Args:
            before: `order` of the sampler that dealt its first steps; what it does not name is not compared.

        Raises:
            ConfigError: the orders differ.
        """
        check_same_order(before, self.order)

    def start_at(self, step: int) -> None:
        """Let the next iteration of this epoch begin at a step; later ones, and other epochs, begin at the first.

        What a training needs that resumes in the middle of an epoch. `len` stays the whole epoch's.

        Args:
            step: batches of the epoch that are done, 0 … len.

        Raises:
            ConfigError: the epoch has fewer steps.
        """
        if not 0 <= step <= len(self):
            raise ConfigError(
                f"start_at({step}) is beyond this epoch, that has {len(self)} steps. Give one of 0..{len(self)}, "
                "or resume with the data the checkpoint was made with."
            )
        self._start = step

    def global_count(self, batch_index: int) -> int:
        """Count the samples of one step over all ranks.

        Args:
            batch_index: step of the epoch, 0 … len - 1.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= batch_index < len(self):
            raise IndexError(
                f"batch_index={batch_index} is not a step of this epoch. It has the steps 0..{len(self) - 1}."
            )
        return min(self.global_batch, self.num_samples - batch_index * self.global_batch)

    def __len__(self) -> int:
        full, rest = divmod(self.num_samples, self.global_batch)
        return full + (rest > 0 and self.last_batch == "keep")

    def __iter__(self) -> Iterator[list[Pair]]:
        epoch, order = self.epoch, self._order()
        first, self._start = self._start, 0
        shard = None if self.classes is None else self._shard(order, self.classes)
        for step in range(first, len(self)):
            share = chunk(self.global_count(step), self.rank, self.world_size)
            if shard is None:
                start = step * self.global_batch
                yield [(epoch, order[start + position]) for position in share]
            else:
                start = step * self.device_batch
                yield [(epoch, index) for index in shard[start : start + len(share)]]

    def _order(self) -> Sequence[int]:
        if not self.shuffle:
            return range(self.num_samples)
        order: list[int] = stream(self.seed, self.epoch).permutation(self.num_samples).tolist()
        return order

    def _shard(self, order: Sequence[int], classes: Sequence[int]) -> list[int]:
        """Find this rank's part of the data set in the order of the classes; it keeps the epoch's order."""
        by_class = sorted(range(self.num_samples), key=lambda index: classes[index])
        own = {by_class[position] for position in chunk(self.num_samples, self.rank, self.world_size)}
        return [index for index in order if index in own]

    def _check_one_batch(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(
                "The training data has 0 samples; a run needs at least one. Check the data set's path and split."
            )
        if len(self) == 0:
            raise ConfigError(
                f"{self.num_samples} training samples do not fill one global batch of {self.global_batch} "
                f"(device_batch={self.device_batch} x {self.world_size} ranks). "
                "Lower data.device_batch or use data.last_batch=keep."
            )


class EvaluationBatchSampler(Sampler[list[Pair]]):
    """Deal every sample to exactly one rank: no padding, no shuffle, nothing counted twice.

    Rank r takes the r-th of `world_size` contiguous parts, whose sizes differ by at most one, in batches of
    `device_batch`. A rank without samples gets one empty batch, because Lightning refuses a rank without a batch.

    Args:
        num_samples: samples in the data set; 0 is allowed.
        device_batch: samples one device sees per forward.
        rank: this process, 0 … world_size - 1.
        world_size: number of ranks.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> list(EvaluationBatchSampler(num_samples=5, device_batch=2, rank=0, world_size=2))
        [[(0, 0), (0, 1)], [(0, 2)]]
    """

    def __init__(self, *, num_samples: int, device_batch: int, rank: int, world_size: int) -> None:
        check_device_batch(device_batch)
        _check_rank(rank, world_size)
        self.device_batch = device_batch
        self.share = chunk(num_samples, rank, world_size)

    def __len__(self) -> int:
        return max(1, -(-len(self.share) // self.device_batch))

    def __iter__(self) -> Iterator[list[Pair]]:
        for batch in range(len(self)):
            start = batch * self.device_batch
            yield [(0, index) for index in self.share[start : start + self.device_batch]]


def chunk(count: int, rank: int, world_size: int) -> range:
    """Find the positions that one rank takes when `count` samples are dealt in contiguous parts as evenly as possible.

    The first ranks get the larger parts.

    Args:
        count: samples to deal.
        rank: who takes them.
        world_size: number of parts.
    """
    size, larger = divmod(count, world_size)
    start = rank * size + min(rank, larger)
    return range(start, start + size + (rank < larger))


def check_device_batch(device_batch: int) -> None:
    """Refuse a batch without samples.

    Raises:
        ConfigError: `device_batch` is below 1.
    """
    if device_batch < 1:
        raise ConfigError(
            f"data.device_batch={device_batch} must be at least 1. "
            "Give the samples one device sees per forward, e.g. data.device_batch=16."
        )


def check_last_batch(last_batch: str) -> None:
    """Refuse an unknown way to treat the last batch.

    Raises:
        ConfigError: `last_batch` is neither `"drop"` nor `"keep"`.
    """
    if last_batch not in LAST_BATCH:
        raise ConfigError(
            f"data.last_batch='{last_batch}' is not one of {', '.join(LAST_BATCH)}."
            f"{did_you_mean(last_batch, LAST_BATCH)} Use drop (leave an incomplete global batch out) or keep."
        )


def check_shards(shards: str) -> None:
    """Refuse an unknown way to part the data set among the ranks.

    Raises:
        ConfigError: `shards` is neither `"shuffled"` nor `"sorted"`.
    """
    if shards not in SHARDS:
        raise ConfigError(
            f"data.shards='{shards}' is not one of {', '.join(SHARDS)}.{did_you_mean(shards, SHARDS)} "
            "Use shuffled (every rank may get any sample) or sorted (each rank has its own classes)."
        )


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"rank={rank} must lie in 0..world_size-1 with world_size={world_size}. Pass the trainer's own numbers."
        )
