"""Images in folders: one folder a split, in it one folder a class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from distnorm.data.augmentation import Transform, flip_and_crop, keep
from distnorm.data.datasets import SUFFIXES, FileSamples, Targets, stratify
from distnorm.data.module import AbstractClassificationData
from distnorm.errors import ConfigError, did_you_mean

LAYOUT = "Expected <root>/train/<class>/<image>."


class ImageFolderData(AbstractClassificationData):
    """Classes from `<root>/{train,val,test}/<class>/*.{png,jpg,jpeg,bmp,webp}`, numbered in the order of their names.

    Images become RGB, are resized to `image_size` (Pillow, bilinear; the aspect is not kept), scaled to 0 … 1 and
    standardised. Without a `val` folder a stratified fifth of `train` is held out, always the same; without a `test`
    folder the validation images are the test images. `describe` says both.

    Args:
        root: the folder that has `train` in it.
        device_batch: samples one device sees per forward.
        image_size: height and width of the input, pixels.
        mean: red, green, blue; subtracted after scaling to 0 … 1. The default is ImageNet's.
        std: red, green, blue; divided by. The default is ImageNet's.
        seed: what order and augmentation depend on; the split does not.
        augmentation: `"flip_crop"` mirrors and crops (`flip_and_crop`); `"none"` shows the images as in evaluation.
        last_batch: `"drop"` leaves an incomplete global batch out, `"keep"` deals it unevenly.
        num_workers: processes that load batches ahead.
        shards: `"shuffled"`: every rank may get any training image; `"sorted"`: each rank has its own classes.

    Raises:
        ConfigError: the folders do not have the expected layout, or an argument is out of range or unknown. A file that
            is not an image raises when it is read.
    """

    augmentations: ClassVar[Mapping[str, Transform]] = {"flip_crop": flip_and_crop, "none": keep}

    def __init__(
        self,
        *,
        root: str | Path,
        device_batch: int,
        image_size: Sequence[int] = (224, 224),
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        seed: int = 0,
        augmentation: str = "flip_crop",
        last_batch: str = "drop",
        num_workers: int = 0,
        shards: str = "shuffled",
    ) -> None:
        super().__init__(
            device_batch=device_batch,
            seed=seed,
            augmentation=augmentation,
            last_batch=last_batch,
            num_workers=num_workers,
            shards=shards,
        )
        self.root = Path(root)
        self.image_size = _checked_size(image_size)
        self.mean, self.std = _checked_colour("mean", mean), _checked_colour("std", std)
        self.classes = _class_names(self.root)
        self.num_classes, self.input_shape = len(self.classes), (3, *self.image_size)
        self._splits = self._read_splits()

    def samples(self, split: str) -> FileSamples:
        """Give the files of one split. Shape: images [N, 3, H, W].

        Args:
            split: `"train"`, `"val"` or `"test"`.
        """
        return self._splits[split]

    def _read_splits(self) -> dict[str, FileSamples]:
        splits = {"train": self._scan("train")}
        if (self.root / "val").is_dir():
            splits["val"] = self._scan("val")
        else:
            splits["train"], splits["val"] = _hold_out(splits["train"], self.root)
            self.notes = (*self.notes, "val is a fixed fifth of train (no val folder)")
        if (self.root / "test").is_dir():
            splits["test"] = self._scan("test")
        else:
            splits["test"] = splits["val"]
            self.notes = (*self.notes, "test is val (no test folder)")
        return splits

    def _scan(self, split: str) -> FileSamples:
        paths: list[Path] = []
        targets: list[int] = []
        for folder in _folders(self.root / split):
            images = _images(folder)
            paths += images
            targets += [self._target(folder)] * len(images)
        if not paths:
            raise ConfigError(
                f"'{self.root / split}' has no class folder. Expected {self.root}/{split}/<class>/<image>. "
                "Add images or remove the folder."
            )
        return FileSamples(paths, np.array(targets, np.int64), self.image_size, self.mean, self.std)

    def _target(self, folder: Path) -> int:
        if folder.name not in self.classes:
            raise ConfigError(
                f"'{folder}' is a class that {self.root / 'train'} does not have ({len(self.classes)} classes)."
                f"{did_you_mean(folder.name, self.classes)}\n{LAYOUT} Rename or remove the folder, or add it to train."
            )
        return self.classes.index(folder.name)


def _class_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise ConfigError(f"data.root='{root}' does not exist. {LAYOUT} Give an existing folder: data.root=...")
    if not (root / "train").is_dir():
        raise ConfigError(
            f"data.root='{root}' has no folder 'train'. {LAYOUT} Create {root / 'train'} or give another data.root=..."
        )
    names = tuple(folder.name for folder in _folders(root / "train"))
    if not names:
        raise ConfigError(
            f"'{root / 'train'}' has no class folder. {LAYOUT} Put the images of each class in a folder of its own."
        )
    return names


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    images = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not images:
        raise ConfigError(
            f"'{folder}' holds no image ({', '.join(SUFFIXES)}). {LAYOUT} Add images or remove the folder."
        )
    return images


def _hold_out(train: FileSamples, root: Path) -> tuple[FileSamples, FileSamples]:
    parts = stratify(train.targets, ("train", "val", "train", "train", "train"))
    if len(parts["val"]) == 0:
        raise ConfigError(
            f"'{root / 'train'}' has one image a class, so no fifth of it can be held out for validation. "
            f"Add images, or add {root / 'val'}/<class>/<image>."
        )
    return _part(train, parts["train"]), _part(train, parts["val"])


def _part(samples: FileSamples, indices: Targets) -> FileSamples:
    paths = [samples.paths[index] for index in indices]
    return FileSamples(paths, samples.targets[indices], samples.image_size, samples.mean, samples.std)


def _checked_size(image_size: Sequence[int]) -> tuple[int, int]:
    size = tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(
            f"data.image_size={list(size)} must be height and width, both at least 1 pixel. "
            "Give e.g. data.image_size=[224,224]."
        )
    return size[0], size[1]


def _checked_colour(name: str, values: Sequence[float]) -> tuple[float, ...]:
    colour = tuple(float(value) for value in values)
    if len(colour) != 3 or (name == "std" and min(colour) <= 0):
        positive = " above 0" if name == "std" else ""
        raise ConfigError(
            f"data.{name}={list(colour)} must be three numbers{positive}: red, green, blue. "
            f"Give e.g. data.{name}=[0.5,0.5,0.5]."
        )
    return colour
