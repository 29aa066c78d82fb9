"""Handwritten digits that come inside scikit-learn: 1797 images of 8 x 8 pixels, made hard by augmentation."""

from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import numpy as np

from distnorm.data.augmentation import Domain, Transform, brighten, centre, flatten_contrast, invert, shift_and_fade
from distnorm.data.datasets import ArraySamples, stratify
from distnorm.data.module import AbstractClassificationData, check_name
from distnorm.errors import ConfigError

_ROUNDS = {
    "60-20-20": ("train", "val", "train", "test", "train"),
    "50-10-40": ("train", "test", "train", "test", "train", "test", "train", "test", "train", "val"),
}


class DigitsData(AbstractClassificationData):
    """Digits on a 12 x 12 canvas, parted in train, val and test: stratified, always in the same way.

    Args:
        device_batch: samples one device sees per forward.
        seed: what order and augmentation depend on; the split does not.
        augmentation: `"strong"` shifts, fades and adds noise (`shift_and_fade`); `"none"` leaves the digit in the
            centre.
        last_batch: `"drop"` leaves an incomplete global batch out, `"keep"` deals it unevenly.
        num_workers: processes that load batches ahead.
        evaluation_augmentation: the same of validation and test images; every run sees the same ones.
        split: per cent of train, val and test: `"60-20-20"` or `"50-10-40"`, for smaller errors of the test error.
        shards: `"shuffled"`: every rank may get any training sample; `"sorted"`: each rank has its own classes.
        num_classes: the digits from 0 on that there are, 2 … 10.
        domain: `"source"`, or what another camera would show: `"inverted"`, `"low_contrast"` or `"bright"`.
        evaluation_domain: the same of validation and test images; `None`: as training's.

    Raises:
        ConfigError: an argument is out of range or unknown.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """

    augmentations: ClassVar[Mapping[str, Transform]] = {"strong": shift_and_fade, "none": centre}
    domains: ClassVar[Mapping[str, Domain]] = {
        "inverted": invert,
        "low_contrast": flatten_contrast,
        "bright": brighten,
    }
    input_shape = (1, 12, 12)

    def __init__(
        self,
        *,
        device_batch: int,
        seed: int = 0,
        augmentation: str = "strong",
        last_batch: str = "drop",
        num_workers: int = 0,
        evaluation_augmentation: str = "none",
        split: str = "60-20-20",
        shards: str = "shuffled",
        num_classes: int = 10,
        domain: str = "source",
        evaluation_domain: str | None = None,
    ) -> None:
        super().__init__(
            device_batch=device_batch,
            seed=seed,
            augmentation=augmentation,
            last_batch=last_batch,
            num_workers=num_workers,
            evaluation_augmentation=evaluation_augmentation,
            shards=shards,
            domain=domain,
            evaluation_domain=evaluation_domain,
        )
        check_name("split", split, _ROUNDS)
        if not 2 <= num_classes <= 10:
            raise ConfigError(f"data.num_classes={num_classes} must be in 2..10: digits from 0 on. Use e.g. 10.")
        self.split, self.num_classes = split, num_classes

    def samples(self, split: str) -> ArraySamples:
        """Give the digits of one split, values in 0 … 1. Shape: images [N, 1, 8, 8].

        Args:
            split: `"train"`, `"val"` or `"test"`.
        """
        return _splits(self.split, self.num_classes)[split]


@cache
def _splits(split: str, num_classes: int) -> dict[str, ArraySamples]:
    from sklearn.datasets import load_digits  # noqa: PLC0415  a second to import; only who trains on digits pays it

    digits = load_digits()
    images_NCHW = (digits.images / 16).astype(np.float32)[:, None]
    targets_N = digits.target.astype(np.int64)
    parts = {name: part[targets_N[part] < num_classes] for name, part in stratify(targets_N, _ROUNDS[split]).items()}
    return {name: ArraySamples(images_NCHW[part], targets_N[part]) for name, part in parts.items()}
