"""Labelled images, in memory or in files, and the data set that hands them out by `(epoch, index)`.

Legend: N samples, C channels, H rows, W columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distnorm.data.augmentation import Images, Transform
from distnorm.data.sampler import Pair
from distnorm.data.stream import stream
from distnorm.errors import ConfigError

Targets = npt.NDArray[np.int64]
Batch = tuple[Tensor, Tensor]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SPLIT_SEED = 1997


class AbstractSamples(ABC):
    """Images and the class of each.

    Attributes:
        targets: class of each sample, 0 … classes - 1. Shape [N].
    """

    targets: Targets

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Images:
        """Read some images.

        Args:
            indices: which samples; may be none.

        Shape: result [len(indices), C, H, W], float32.
        """


@dataclass(frozen=True, eq=False)
class ArraySamples(AbstractSamples):
    """Images in memory.

    Attributes:
        images: all images, float32. Shape [N, C, H, W].
        targets: class of each. Shape [N].
    """

    images: Images
    targets: Targets

    def read(self, indices: Sequence[int]) -> Images:
        """Copy some images. See `AbstractSamples.read`."""
        return self.images[np.asarray(indices, np.int64)]


@dataclass(frozen=True, eq=False)
class FileSamples(AbstractSamples):
    """Images in files: read as RGB, resized to one size, scaled to 0 … 1 and standardised when they are asked for.

    Attributes:
        paths: one file a sample.
        targets: class of each. Shape [N].
        image_size: height and width after resizing, pixels.
        mean: subtracted from each of the three channels, after scaling to 0 … 1.
        std: each of the three channels is divided by it.
    """

    paths: Sequence[Path]
    targets: Targets
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def read(self, indices: Sequence[int]) -> Images:
        """Read some files. See `AbstractSamples.read`.

        Raises:
            ConfigError: a file is not a readable image.
        """
        images_NHWC = np.empty((len(indices), *self.image_size, 3), np.float32)
        for n, index in enumerate(indices):
            images_NHWC[n] = _pixels(self.paths[index], self.image_size)
        images_NHWC /= 255
        images_NHWC -= np.asarray(self.mean, np.float32)
        images_NHWC /= np.asarray(self.std, np.float32)
        return np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))


class ClassificationDataset(Dataset[Batch]):
    """Samples by `(epoch, index)`: what comes back is a pure function of seed, epoch and index.

    `__getitems__` is what torch's loader calls with a whole batch; it returns the batch already collated, so the loader
    takes `as_is` for its `collate_fn`.

    Args:
        samples: the images and their classes.
        transform: what is done to the images, from `distnorm.data.augmentation` or with the same signature.
        seed: what the transform's randomness depends on, besides epoch and index.
    """

    def __init__(self, samples: AbstractSamples, transform: Transform, seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples.targets)

    def __getitem__(self, pair: Pair) -> Batch:
        inputs_NCHW, targets_N = self.__getitems__([pair])
        return inputs_NCHW[0], targets_N[0]

    def __getitems__(self, pairs: Sequence[Pair]) -> Batch:
        """Read and transform a batch.

        Args:
            pairs: (epoch, index) of each sample; may be none.

        Shape: result [N, C, H, W] float32 and [N] int64.
        """
        indices = [index for _, index in pairs]
        streams = (stream(self.seed, epoch, index) for epoch, index in pairs)
        inputs_NCHW = self.transform(self.samples.read(indices), streams)
        targets_N = self.samples.targets[np.asarray(indices, np.int64)]
        return torch.from_numpy(inputs_NCHW), torch.from_numpy(targets_N)


def as_is(batch: Any) -> Any:
    """Leave a batch that is collated already: the loader's `collate_fn`."""
    return batch


def stratify(targets_N: Targets, parts: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
    """Divide samples so that every class has the same share in every part, within one sample.

    Each class is shuffled (always in the same way) and dealt in rounds: `("train", "val", "train", "test", "train")`
    gives 60 % train, 20 % val and 20 % test. A class with a single sample lands in the first part.

    Args:
        targets_N: class of each sample. Shape [N].
        parts: one round.

    Returns:
        The indices of each part, ascending. They are disjoint and cover all samples.
    """
    rng = stream(SPLIT_SEED, 0)
    dealt = {part: np.zeros(len(targets_N), bool) for part in parts}
    for target in np.unique(targets_N):
        members = rng.permutation(np.flatnonzero(targets_N == target))
        for turn, part in enumerate(parts):
            dealt[part][members[turn :: len(parts)]] = True
    return {part: np.flatnonzero(chosen_N) for part, chosen_N in dealt.items()}


def _pixels(path: Path, image_size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    H, W = image_size
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f"cannot read image '{path}': {error}\n"
            f"Every {', '.join(SUFFIXES)} file of a class folder must be an image. Replace or remove it."
        ) from error
