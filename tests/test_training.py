"""What surrounds the training: random streams of the ranks, decay of norms."""

import functools

import pytest
import torch
from torch import nn

from distnorm import ConfigError
from distnorm.launch.ranks import find
from distnorm.launch.run_dir import RunFolder
from distnorm.launch.trainer import check_passthrough, make_trainer, set_threads
from distnorm.models import ResNet
from distnorm.random_state import seed_rank, seed_weights
from distnorm.tasks import Classification
from tests.runs import composed

pytestmark = pytest.mark.unit


def drawn(seed, rank):
    seed_weights(seed)
    weight = nn.Linear(3, 3).weight.detach().clone()
    seed_rank(seed, rank)
    return weight, torch.rand(4)


def test_weights_are_alike_on_all_ranks_and_dropout_differs():
    first, second = drawn(5, 0), drawn(5, 1)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(drawn(5, 1)[1], second[1])
    assert not torch.equal(drawn(6, 0)[0], first[0])


def task(**options):
    optimizer = functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.5)
    made = Classification(ResNet(), optimizer, num_classes=10, **options)
    made._trainer = type("Trainer", (), {"estimated_stepping_batches": 100})()
    return made


def test_norms_and_biases_do_not_decay_unless_told_to():
    for told, decay in (({}, 0.0), ({"norm_weight_decay": 0.25}, 0.25)):
        made = task(**told)
        decays = {
            id(p): g["weight_decay"] for g in made.configure_optimizers()["optimizer"].param_groups for p in g["params"]
        }
        for module in made.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                plain = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
                assert decays[id(parameter)] == (0.5 if plain else decay)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    made = task(warmup_fraction=0.1)
    scheduler = made.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.05)  # halfway down
    assert rates[-1] < 1e-3
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(
        ConfigError, match=r"task\.schedule='cosin' is not one of cosine, constant\. Did you mean 'cosine'"
    ):
        task(schedule="cosin")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"max_epoch": 3},
            "trainer.lightning.max_epoch=3 is no argument of lightning.Trainer. Did you mean 'max_epochs'?",
        ),
        ({"max_epochs": 3}, "trainer.lightning.max_epochs=3 has a setting of its own. Use trainer.max_epochs=3."),
        ({"strategy": "fsdp"}, "trainer.lightning.strategy='fsdp' is what distnorm sets itself. Leave it out."),
    ],
)
def test_what_is_passed_to_lightning_is_checked(extra, message):
    with pytest.raises(ConfigError) as caught:
        check_passthrough(extra)
    assert str(caught.value) == message
    check_passthrough({"deterministic": True})


SETTINGS = [
    ("accumulate_grad_batches", 3, lambda t: t.accumulate_grad_batches),
    ("gradient_clip_val", 0.5, lambda t: t.gradient_clip_val),
    ("check_val_every_n_epoch", 4, lambda t: t.check_val_every_n_epoch),
    ("max_epochs", 7, lambda t: t.max_epochs),
    ("max_steps", 9, lambda t: t.max_steps),
    ("log_every_n_steps", 6, lambda t: t.log_every_n_steps),
    ("precision", "64-true", lambda t: t.precision),
    ("precision", "bf16", lambda t: t.precision.removesuffix("-mixed")),
    ("lightning", {"limit_val_batches": 2}, lambda t: {"limit_val_batches": t.limit_val_batches}),
]


@pytest.mark.parametrize(("key", "value", "of"), SETTINGS, ids=[f"{key}={value}" for key, value, _ in SETTINGS])
def test_each_setting_of_the_trainer_arrives(tmp_path, key, value, of):
    override = (
        f"+trainer.{key}={value}".replace("'", "").replace(" ", "") if key == "lightning" else f"trainer.{key}={value}"
    )
    settings = composed("trainer=cpu", override.replace("+", "++")).trainer
    trainer = make_trainer(settings, find(settings, {}), RunFolder(tmp_path), [], [], None)
    assert of(trainer) == value


def test_threads_of_a_rank_are_set(tmp_path):
    before = torch.get_num_threads()
    for override, threads in (("trainer.threads_per_rank=2", 2), ("trainer=cpu", 1)):
        settings = composed("trainer=cpu", override).trainer
        set_threads(settings, find(settings, {}))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
