"""Folders of images: against small files with known pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from distnorm.data import ImageFolderData
from distnorm.errors import ConfigError

pytestmark = pytest.mark.unit


def message_of(call, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        call(*arguments, **options)
    text = str(error.value)
    assert text.count("\n") <= 2
    return text


def write(path, colour=(0, 0, 0), size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def folder(root, **options):
    return ImageFolderData(root=root, device_batch=2, image_size=(4, 6), mean=(0.5,) * 3, std=(0.25,) * 3, **options)


def test_folder_reads_resizes_and_standardises(tmp_path):
    write(tmp_path / "train/cat/1.png", (255, 0, 51))
    write(tmp_path / "train/dog/1.jpg", (255, 255, 255), size=(30, 20))
    write(tmp_path / "train/dog/2.BMP", (0, 0, 0))
    (tmp_path / "train/dog/notes.txt").write_text("not an image")
    half = np.zeros((40, 60), np.uint8)
    half[:20] = 255
    (tmp_path / "val/dog").mkdir(parents=True)
    Image.fromarray(half).save(tmp_path / "val/dog/grey.png")
    data = folder(tmp_path, augmentation="none")
    assert (data.num_classes, data.classes, data.input_shape) == (2, ("cat", "dog"), (3, 4, 6))
    inputs, targets = data.train_dataloader().dataset.__getitems__([(0, 0), (0, 1), (0, 2)])
    assert targets.tolist() == [0, 1, 1]
    assert inputs.shape == (3, 3, 4, 6)
    expected = torch.tensor([[2, -2, (0.2 - 0.5) / 0.25], [2, 2, 2], [-2, -2, -2]])
    torch.testing.assert_close(inputs, expected[:, :, None, None].expand(3, 3, 4, 6))
    [(grey, target)] = data.val_dataloader()
    assert target.tolist() == [1]
    torch.testing.assert_close(grey[0, :, 0], torch.full((3, 6), 2.0))
    torch.testing.assert_close(grey[0, :, 3], torch.full((3, 6), -2.0))
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert "test is val (no test folder)" in data.describe()
    assert "fifth" not in data.describe()


def test_folder_without_val_holds_out_a_fixed_stratified_fifth(tmp_path):
    for name, count in (("a", 10), ("b", 15), ("c", 1)):
        for number in range(count):
            write(tmp_path / "train" / name / f"{number}.png")
    data = folder(tmp_path)
    train, val = data.samples("train"), data.samples("val")
    assert set(train.paths) | set(val.paths) == set((tmp_path / "train").rglob("*.png"))
    assert not set(train.paths) & set(val.paths)
    assert np.bincount(val.targets).tolist() == [2, 3]
    assert np.bincount(train.targets).tolist() == [8, 12, 1]
    assert folder(tmp_path, seed=9).samples("val").paths == val.paths
    assert [path.parent.name for path in val.paths] == ["a", "a", "b", "b", "b"]
    assert "val is a fixed fifth of train (no val folder); test is val (no test folder)" in data.describe()


def test_folder_with_all_splits_uses_them(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for number in range(count):
            write(tmp_path / split / "a" / f"{number}.png")
    data = folder(str(tmp_path))
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [4, 2, 1]
    assert data.notes == ()
    assert {path.parent.parent.name for path in data.samples("test").paths} == {"test"}
    assert all(inputs.shape == (2, 3, 4, 6) for inputs, _ in data.train_dataloader())


@pytest.mark.parametrize(
    ("options", "value", "remedy"),
    [
        ({"image_size": (32,)}, "data.image_size=[32]", "data.image_size=[224,224]"),
        ({"image_size": (0, 32)}, "data.image_size=[0, 32]", "at least 1 pixel"),
        ({"mean": (0.5,)}, "data.mean=[0.5]", "data.mean=[0.5,0.5,0.5]"),
        ({"std": (1, 0, 1)}, "data.std=[1.0, 0.0, 1.0]", "above 0"),
        ({"augmentation": "flipcrop"}, "data.augmentation='flipcrop'", "Did you mean 'flip_crop'?"),
    ],
)
def test_wrong_folder_settings_are_refused(tmp_path, options, value, remedy):
    write(tmp_path / "train/a/1.png")
    text = message_of(ImageFolderData, root=tmp_path, device_batch=1, **options)
    assert value in text
    assert remedy in text


def test_wrong_layouts_are_refused_with_path_rule_and_remedy(tmp_path):
    layout = "Expected <root>/train/<class>/<image>."
    assert message_of(folder, "/nowhere") == (
        f"data.root='/nowhere' does not exist. {layout} Give an existing folder: data.root=..."
    )
    text = message_of(folder, tmp_path)
    assert f"data.root='{tmp_path}' has no folder 'train'. {layout} Create {tmp_path}/train" in text
    (tmp_path / "train").mkdir()
    text = message_of(folder, tmp_path)
    assert f"'{tmp_path}/train' has no class folder. {layout} Put the images of each class" in text
    (tmp_path / "train/cat").mkdir()
    text = message_of(folder, tmp_path)
    assert f"'{tmp_path}/train/cat' holds no image (.png, .jpg, .jpeg, .bmp, .webp). {layout} Add images" in text
    write(tmp_path / "train/cat/1.png")
    text = message_of(folder, tmp_path)
    assert f"'{tmp_path}/train' has one image a class" in text
    assert f"add {tmp_path}/val/<class>/<image>" in text
    (tmp_path / "val").mkdir()
    assert f"'{tmp_path}/val' has no class folder. Expected {tmp_path}/val/<class>" in message_of(folder, tmp_path)
    write(tmp_path / "val/cats/1.png")
    text = message_of(folder, tmp_path)
    assert f"'{tmp_path}/val/cats' is a class that {tmp_path}/train does not have" in text
    assert "Did you mean 'cat'?" in text
    assert "Rename or remove the folder" in text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_file_is_named_when_it_is_read(tmp_path, num_workers):
    write(tmp_path / "train/a/1.png")
    write(tmp_path / "val/a/1.png")
    (tmp_path / "train/a/2.png").write_bytes(b"no image at all")
    loader = folder(tmp_path, num_workers=num_workers).train_dataloader()
    with pytest.raises(ConfigError) as error:
        list(loader)
    assert f"cannot read image '{tmp_path}/train/a/2.png'" in str(error.value)
    assert "Replace or remove it" in str(error.value)


def test_a_truncated_file_is_named_too(tmp_path):
    write(tmp_path / "train/a/1.png", size=(64, 64))
    write(tmp_path / "val/a/1.png")
    path = tmp_path / "train/a/1.png"
    path.write_bytes(path.read_bytes()[:60])
    text = message_of(folder(tmp_path, last_batch="keep").train_dataloader().dataset.__getitem__, (0, 0))
    assert f"cannot read image '{path}'" in text
