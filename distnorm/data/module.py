"""What classification data modules share: settings checked, ranks known, loaders built, the data described."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from distnorm.data.augmentation import Domain, Transform, in_domain
from distnorm.data.datasets import AbstractSamples, Batch, ClassificationDataset, as_is
from distnorm.data.order import Order
from distnorm.data.sampler import (
    EvaluationBatchSampler,
    GlobalBatchSampler,
    Pair,
    check_device_batch,
    check_last_batch,
    check_shards,
)
from distnorm.data.stream import check_seed
from distnorm.errors import ConfigError, did_you_mean
from distnorm.lightning_names import EitherName

SPLITS = ("train", "val", "test")
EVALUATION_SEED = 2**32 - 1
"""Seeds the augmentation of validation and test images, where there is any: the same images in every run."""


class AbstractClassificationData(EitherName, LightningDataModule, ABC):
    """Training, validation and test images for a classification task.

    Global batches are the same however many ranks share them (`GlobalBatchSampler`), evaluation counts every sample
    once (`EvaluationBatchSampler`), and augmentation is a pure function of (seed, epoch, sample). The ranks are the
    trainer's; without a trainer there is one. The samplers do the dealing, so pass `use_distributed_sampler=False` to
    the trainer (with several ranks it refuses to train otherwise).

    Args:
        device_batch: samples one device sees per forward.
        seed: what order and augmentation depend on, 0 … 2^32 - 1.
        augmentation: name of the training transform, one of `augmentations`.
        last_batch: `"drop"` leaves an incomplete global batch out, `"keep"` deals it unevenly.
        num_workers: processes that load batches ahead, a loader; 0 loads in the training process.
        evaluation_augmentation: name of the transform of validation and test images; what is random in it depends on
            the sample alone, so that every run and every number of ranks sees the same images.
        shards: `"shuffled"`: every rank may get any training sample; `"sorted"`: each rank has its own classes.
        domain: name of what every image goes through at last, one of `domains`; `"source"` changes nothing.
        evaluation_domain: the same of validation and test images; `None`: as training's.

    Attributes:
        augmentations: the transforms by name; `"none"` has nothing random in it.
        domains: what another camera would do to the pixels, by name, besides `"source"`.
        num_classes: number of classes.
        input_shape: channels, height and width of one input.
        notes: what `describe` adds about this data.

    Raises:
        ConfigError: an argument is out of range or unknown.
    """

    augmentations: ClassVar[Mapping[str, Transform]]
    domains: ClassVar[Mapping[str, Domain]] = {}
    num_classes: int
    input_shape: tuple[int, int, int]
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        device_batch: int,
        augmentation: str,
        seed: int = 0,
        last_batch: str = "drop",
        num_workers: int = 0,
        evaluation_augmentation: str = "none",
        shards: str = "shuffled",
        domain: str = "source",
        evaluation_domain: str | None = None,
    ) -> None:
        super().__init__()
        check_device_batch(device_batch)
        check_last_batch(last_batch)
        check_shards(shards)
        check_seed(seed)
        _check_num_workers(num_workers)
        check_name("augmentation", augmentation, self.augmentations)
        check_name("evaluation_augmentation", evaluation_augmentation, self.augmentations)
        check_name("domain", domain, ("source", *self.domains))
        check_name("evaluation_domain", evaluation_domain or domain, ("source", *self.domains))
        self.device_batch, self.seed, self.augmentation = device_batch, seed, augmentation
        self.last_batch, self.num_workers, self.shards = last_batch, num_workers, shards
        self.evaluation_augmentation, self.domain = evaluation_augmentation, domain
        self.evaluation_domain = evaluation_domain or domain

    @abstractmethod
    def samples(self, split: str) -> AbstractSamples:
        """Give the samples of one split; cheap when called again.

        Args:
            split: `"train"`, `"val"` or `"test"`.
        """

    def num_samples(self, split: str) -> int:
        """Count the samples of one split.

        Args:
            split: `"train"`, `"val"` or `"test"`.

        Raises:
            ConfigError: there is no such split.
        """
        if split not in SPLITS:
            raise ConfigError(f"split='{split}' is not one of {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")
        return len(self.samples(split).targets)

    def global_count(self, batch_index: int) -> int:
        """Count the samples that all ranks together see in one training step.

        A task weights the loss of an uneven last batch with it.

        Args:
            batch_index: step of the epoch.
        """
        return self._train_sampler().global_count(batch_index)

    def check_continues(self, order: Order, world_size: int) -> None:
        """Refuse to go on in the middle of an epoch that was dealt in another order.

        Args:
            order: of the sampler that dealt its first steps.
            world_size: ranks that share an epoch now.

        Raises:
            ConfigError: the orders differ.
        """
        self._train_sampler(world_size).check_continues(order)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Build this rank's loader of augmented training batches: [n, C, H, W] float32 and [n] int64; n may be 0."""
        return self._loader("train", self.augmentation, self.seed, self._train_sampler())

    def val_dataloader(self) -> DataLoader[Batch]:
        """Build this rank's loader of validation batches; shapes as in `train_dataloader`."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Build this rank's loader of test batches; shapes as in `train_dataloader`."""
        return self._evaluation_loader("test")

    def describe(self, world_size: int | None = None) -> str:
        """Say in one line how many samples there are, how many steps an epoch has and what its last batch does.

        Args:
            world_size: ranks that share an epoch; `None` asks the trainer.

        Raises:
            ConfigError: the training samples do not fill one global batch.
        """
        counts = ", ".join(f"{split} {self.num_samples(split)}" for split in SPLITS)
        sampler = self._train_sampler(world_size)
        steps = f"{len(sampler)} steps an epoch of {sampler.global_batch} samples"
        return "; ".join([f"{counts} samples", steps, _last_batch_in_words(sampler), *self.notes])

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _train_sampler(self, world_size: int | None = None) -> GlobalBatchSampler:
        rank, world_size = self._ranks() if world_size is None else (0, world_size)
        return GlobalBatchSampler(
            num_samples=self.num_samples("train"),
            device_batch=self.device_batch,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            last_batch=self.last_batch,
            classes=self.samples("train").targets.tolist() if self.shards == "sorted" else None,
        )

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        rank, world_size = self._ranks()
        sampler = EvaluationBatchSampler(
            num_samples=self.num_samples(split), device_batch=self.device_batch, rank=rank, world_size=world_size
        )
        return self._loader(split, self.evaluation_augmentation, EVALUATION_SEED, sampler)

    def _loader(self, split: str, augmentation: str, seed: int, sampler: Sampler[list[Pair]]) -> DataLoader[Batch]:
        transform = self.augmentations[augmentation]
        domain = self.domain if split == "train" else self.evaluation_domain
        if domain != "source":
            transform = partial(in_domain, first=transform, then=self.domains[domain])
        return _LateLoader(
            ClassificationDataset(self.samples(split), transform, seed),
            batch_sampler=sampler,
            collate_fn=as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # its own generator: else every epoch takes a number from the stream that the model's dropout uses
            generator=torch.Generator().manual_seed(self.seed),
        )


class _LateLoader(DataLoader[Batch]):
    """A loader that asks its sampler at the first batch, not at `iter()`.

    On resume Lightning calls `iter()` before it announces the epoch, and workers would load epoch 0 once more:
    https://github.com/Lightning-AI/pytorch-lightning/issues/21938
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()


def _last_batch_in_words(sampler: GlobalBatchSampler) -> str:
    setting = f"(data.last_batch={sampler.last_batch})"
    if sampler.left_out:
        return (
            f"the last {sampler.left_out} of {sampler.num_samples} training samples are left out each epoch, "
            f"other ones each time {setting}"
        )
    last = sampler.global_count(len(sampler) - 1)
    if last < sampler.global_batch:
        return f"the last step has {last} samples, dealt as evenly as possible {setting}"
    return f"every training sample is seen once an epoch {setting}"


def _check_num_workers(num_workers: int) -> None:
    if num_workers < 0:
        raise ConfigError(
            f"data.num_workers={num_workers} must be at least 0. "
            "Give the number of loading processes, or data.num_workers=0 to load in the training process."
        )


def check_name(key: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that the data module does not know.

    Raises:
        ConfigError: `name` is not one of `known`.
    """
    if name not in known:
        raise ConfigError(
            f"data.{key}='{name}' is not one of {', '.join(known)}.{did_you_mean(name, known)} "
            f"Use data.{key}={next(iter(known))}."
        )
