"""Handwritten digits that come inside scikit-learn: 1797 images of 8 x 8 pixels, made hard by augmentation."""

from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import numpy as np

from distnorm.data.augmentation import Transform, centre, shift_and_fade
from distnorm.data.datasets import ArraySamples, stratify
from distnorm.data.module import AbstractClassificationData


class DigitsData(AbstractClassificationData):
    """Ten classes of digits on a 12 x 12 canvas; 60 % train, 20 % val, 20 % test, stratified, always the same split.

    Args:
        device_batch: samples one device sees per forward.
        seed: what order and augmentation depend on; the split does not.
        augmentation: `"strong"` shifts, fades and adds noise (`shift_and_fade`); `"none"` leaves the digit in the
            centre, as in validation and test.
        last_batch: `"drop"` leaves an incomplete global batch out, `"keep"` deals it unevenly.
        num_workers: processes that load batches ahead.

    Raises:
        ConfigError: an argument is out of range or unknown.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """

    augmentations: ClassVar[Mapping[str, Transform]] = {"strong": shift_and_fade, "none": centre}
    num_classes = 10
    input_shape = (1, 12, 12)

    def __init__(
        self,
        *,
        device_batch: int,
        seed: int = 0,
        augmentation: str = "strong",
        last_batch: str = "drop",
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            device_batch=device_batch,
            seed=seed,
            augmentation=augmentation,
            last_batch=last_batch,
            num_workers=num_workers,
        )

    def samples(self, split: str) -> ArraySamples:
        """Give the digits of one split, values in 0 … 1. Shape: images [N, 1, 8, 8].

        Args:
            split: `"train"`, `"val"` or `"test"`.
        """
        return _splits()[split]


@cache
def _splits() -> dict[str, ArraySamples]:
    from sklearn.datasets import load_digits  # noqa: PLC0415  a second to import; only who trains on digits pays it

    digits = load_digits()
    images_NCHW = (digits.images / 16).astype(np.float32)[:, None]
    targets_N = digits.target.astype(np.int64)
    parts = stratify(targets_N, ("train", "val", "train", "test", "train"))
    return {split: ArraySamples(images_NCHW[part], targets_N[part]) for split, part in parts.items()}
