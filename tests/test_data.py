"""Digits, loaders and the data module under Lightning: against scikit-learn and numpy."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits

from distnorm.data import DigitsData, GlobalBatchSampler
from distnorm.errors import ConfigError

pytestmark = pytest.mark.unit


def placed(rank, world_size, device="cpu"):
    """What a data module reads of a trainer."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)


def test_batches_for_a_gpu_are_pinned_and_others_are_not():
    data = DigitsData(device_batch=16)
    for device, pinned in (("cpu", False), ("cuda", True)):
        data.trainer = placed(0, 1, device)
        assert data.train_dataloader().pin_memory is pinned


def split_images(data, loader):
    return torch.cat([inputs for inputs, _ in loader()]).numpy(), torch.cat(
        [targets for _, targets in loader()]
    ).numpy()


def test_digits_splits_are_untouched_disjoint_and_complete():
    data = DigitsData(device_batch=50)
    digits = load_digits()
    labelled = Counter(zip((image.tobytes() for image in digits.images), digits.target.tolist(), strict=True))
    found = Counter()
    for split, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        samples = data.samples(split)
        raw = (samples.images[:, 0] * 16).astype(np.float64)
        found += Counter(zip((image.tobytes() for image in raw), samples.targets.tolist(), strict=True))
        per_class = np.bincount(samples.targets) - share * np.bincount(digits.target)
        assert np.abs(per_class).max() < 1
    assert found == labelled
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [1078, 362, 357]


def test_evaluation_digits_lie_untouched_in_the_centre():
    data = DigitsData(device_batch=50, seed=3)
    known = {image.tobytes(): target for image, target in zip(load_digits().images, load_digits().target, strict=True)}
    for loader, count in ((data.val_dataloader, 362), (data.test_dataloader, 357)):
        inputs, targets = split_images(data, loader)
        assert inputs.shape == (count, *data.input_shape)
        assert inputs.dtype == np.float32
        assert targets.dtype == np.int64
        border = inputs.copy()
        border[:, :, 2:-2, 2:-2] = 0
        assert not border.any()
        inside = (inputs[:, 0, 2:-2, 2:-2] * 16).astype(np.float64)
        assert [known[image.tobytes()] for image in inside] == targets.tolist()


def test_split_does_not_depend_on_the_seed():
    first, second = DigitsData(device_batch=4, seed=0), DigitsData(device_batch=4, seed=1)
    assert first.samples("test").targets.tolist() == second.samples("test").targets.tolist()


def test_training_digits_are_the_same_with_workers_and_differ_between_epochs_and_seeds():
    def epoch(number, **options):
        loader = DigitsData(device_batch=256, **options).train_dataloader()
        loader.batch_sampler.sampler.set_epoch(number)
        return torch.cat([inputs for inputs, _ in loader])

    alone = epoch(1)
    assert torch.equal(alone, epoch(1, num_workers=2))
    assert alone.shape == (1024, 1, 12, 12)
    assert not torch.equal(alone, epoch(2))
    assert not torch.equal(alone, epoch(1, seed=1))


def test_one_sample_is_the_same_by_itself():
    dataset = DigitsData(device_batch=4).train_dataloader().dataset
    inputs, targets = dataset.__getitems__([(2, 8), (2, 5)])
    assert torch.equal(dataset[2, 5][0], inputs[1])
    assert int(dataset[2, 5][1]) == int(targets[1]) == int(dataset.samples.targets[5])
    assert not torch.equal(dataset[3, 5][0], inputs[1])


def test_loading_leaves_torch_own_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(DigitsData(device_batch=512).train_dataloader())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_rank_without_samples_gets_an_empty_batch(num_workers):
    data = DigitsData(device_batch=1, last_batch="keep", num_workers=num_workers)
    data.trainer = placed(1077, 1079)
    train = list(data.train_dataloader())
    assert [batch[0].shape for batch in train] == [(1, 1, 12, 12)]
    data.trainer.global_rank = 1078
    for loader in (data.train_dataloader, data.test_dataloader):
        [(inputs, targets)] = loader()
        assert (inputs.shape, inputs.dtype) == ((0, 1, 12, 12), torch.float32)
        assert (targets.shape, targets.dtype) == ((0,), torch.int64)
    assert data.global_count(0) == 1078


def test_ranks_of_the_trainer_share_an_epoch():
    seen = []
    for rank in range(3):
        data = DigitsData(device_batch=5)
        data.trainer = placed(rank, 3)
        seen += data.val_dataloader()
    targets = torch.cat([targets for _, targets in seen])
    assert targets.tolist() == DigitsData(device_batch=5).samples("val").targets.tolist()


def test_description_says_what_the_last_batch_does():
    text = DigitsData(device_batch=32).describe()
    assert "train 1078, val 362, test 357" in text
    assert "33 steps an epoch of 32 samples" in text
    assert "the last 22 of 1078 training samples are left out each epoch, other ones each time" in text
    assert "data.last_batch=drop" in text
    kept = DigitsData(device_batch=32, last_batch="keep").describe()
    assert "34 steps" in kept
    assert "the last step has 22 samples" in kept
    assert "every training sample is seen once" in DigitsData(device_batch=49).describe()
    assert "\n" not in text + kept


class Recorder(LightningModule):
    """Trains one number and remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown = {}

    def training_step(self, batch, batch_index):
        self.shown.setdefault(self.current_epoch, []).append(batch[0])
        return self.weight * batch[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, path, epochs, **options):
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(recorder, datamodule=data, **options)
    trainer.save_checkpoint(path / f"{epochs}.ckpt")
    return recorder.shown


def order_of(epoch):
    sampler = GlobalBatchSampler(num_samples=1078, device_batch=256, rank=0, world_size=1, seed=4)
    sampler.set_epoch(epoch)
    return [pair for batch in sampler for pair in batch]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lightning_shows_each_epoch_its_own_samples_also_after_a_resume(tmp_path, num_workers):
    dataset = DigitsData(device_batch=256, seed=4).train_dataloader().dataset
    order = {epoch: order_of(epoch) for epoch in range(3)}
    assert order[0] != order[1] != order[2]
    settings = {"device_batch": 256, "seed": 4, "num_workers": num_workers}
    shown = fit(DigitsData(**settings), tmp_path, 2)
    shown |= fit(DigitsData(**settings), tmp_path, 3, ckpt_path=tmp_path / "2.ckpt")
    assert set(shown) == {0, 1, 2}
    for epoch, inputs in shown.items():
        assert torch.equal(torch.cat(inputs), dataset.__getitems__(order[epoch])[0])


def message_of(call, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        call(*arguments, **options)
    text = str(error.value)
    assert text.count("\n") <= 2
    return text


@pytest.mark.parametrize(
    ("options", "value", "remedy"),
    [
        ({"device_batch": -1}, "data.device_batch=-1 must be at least 1", "e.g. data.device_batch=16"),
        ({"augmentation": "stong"}, "data.augmentation='stong'", "Did you mean 'strong'?"),
        ({"augmentation": "x"}, "data.augmentation='x' is not one of strong, none", "Use data.augmentation=strong"),
        ({"last_batch": "dorp"}, "data.last_batch='dorp' is not one of drop, keep", "Did you mean 'drop'?"),
        ({"num_workers": -2}, "data.num_workers=-2", "data.num_workers=0"),
        ({"evaluation_augmentation": "stong"}, "data.evaluation_augmentation='stong'", "Did you mean 'strong'?"),
        ({"shards": "sortd"}, "data.shards='sortd' is not one of shuffled, sorted", "Did you mean 'sorted'?"),
        ({"domain": "brigt"}, "data.domain='brigt'", "Did you mean 'bright'?"),
        ({"evaluation_domain": "brigt"}, "data.evaluation_domain='brigt'", "Did you mean 'bright'?"),
        ({"split": "60-20"}, "data.split='60-20' is not one of 60-20-20, 50-10-40", "Use data.split=60-20-20"),
        ({"num_classes": 11}, "data.num_classes=11 must be in 2..10", "e.g. 10"),
        ({"seed": -1}, "seed=-1 must lie in 0..4294967295", "e.g. seed=0"),
    ],
)
def test_wrong_settings_are_refused_at_once(options, value, remedy):
    text = message_of(DigitsData, **{"device_batch": 4, **options})
    assert value in text
    assert remedy in text


def test_an_unknown_split_is_refused():
    text = message_of(DigitsData(device_batch=4).num_samples, "tset")
    assert "split='tset'" in text
    assert "Did you mean 'test'?" in text


def test_a_batch_larger_than_the_data_is_refused():
    data = DigitsData(device_batch=512)
    data.trainer = placed(0, 4)
    assert message_of(data.train_dataloader) == (
        "1078 training samples do not fill one global batch of 2048 (device_batch=512 x 4 ranks). "
        "Lower data.device_batch or use data.last_batch=keep."
    )
    options = {"device_batch": 1, "rank": 0, "world_size": 1, "seed": 0, "last_batch": "keep"}
    assert "0 samples" in message_of(GlobalBatchSampler, num_samples=0, **options)


def test_sorted_shards_give_each_rank_its_own_digits():
    seen = []
    for rank in range(5):
        data = DigitsData(device_batch=8, shards="sorted", last_batch="keep")
        data.trainer = placed(rank, 5)
        _, targets = split_images(data, data.train_dataloader)
        seen.append(targets)
    assert sum(map(len, seen)) == 1078
    assert all(len(set(targets)) <= 3 for targets in seen)
    assert [int(targets.min()) for targets in seen] == sorted(int(targets.min()) for targets in seen)


def test_augmented_evaluation_images_are_the_same_in_every_run_and_on_every_number_of_ranks():
    options = {"device_batch": 50, "evaluation_augmentation": "strong"}
    alone, targets = split_images(DigitsData(seed=0, **options), DigitsData(seed=0, **options).test_dataloader)
    assert np.array_equal(alone, split_images(None, DigitsData(seed=7, **options).test_dataloader)[0])
    parts = []
    for rank in range(3):
        data = DigitsData(seed=1, **options)
        data.trainer = placed(rank, 3)
        parts.append(split_images(data, data.test_dataloader)[0])
    assert np.array_equal(alone, np.concatenate(parts))
    clean, same = split_images(None, DigitsData(device_batch=50).test_dataloader)
    assert np.array_equal(targets, same)
    assert np.abs(alone - clean).mean() > 0.1


@pytest.mark.parametrize(
    ("domain", "seen_as"),
    [("inverted", lambda x: 1 - x), ("low_contrast", lambda x: x / 4), ("bright", lambda x: x + 1)],
)
def test_a_domain_shows_the_same_images_by_another_camera(domain, seen_as):
    source = DigitsData(device_batch=64, evaluation_augmentation="strong")
    other = DigitsData(device_batch=64, evaluation_augmentation="strong", domain=domain)
    for before, after in (
        (source.test_dataloader, other.test_dataloader),
        (source.train_dataloader, other.train_dataloader),
    ):
        images, targets = split_images(None, before)
        shown, same = split_images(None, after)
        assert np.array_equal(targets, same)
        assert shown.dtype == np.float32
        np.testing.assert_allclose(shown, seen_as(images.astype(np.float64)), atol=1e-6)
    shifted = DigitsData(device_batch=64, evaluation_augmentation="strong", evaluation_domain=domain)
    for name, data in (("train_dataloader", source), ("val_dataloader", other), ("test_dataloader", other)):
        ours, theirs = (split_images(None, getattr(each, name))[0] for each in (shifted, data))
        np.testing.assert_array_equal(ours, theirs)


def test_the_other_split_and_fewer_digits():
    half = DigitsData(device_batch=4, split="50-10-40")
    assert [half.num_samples(split) for split in ("train", "val", "test")] == [901, 176, 720]
    few = DigitsData(device_batch=4, num_classes=3)
    counts = np.bincount(load_digits().target)[:3].sum()
    assert sum(few.num_samples(split) for split in ("train", "val", "test")) == counts
    assert set(few.samples("test").targets) == {0, 1, 2}
    assert few.num_classes == 3
