"""The batches of a Lightning training once more, beside it: for statistics that are measured anew."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.utils.data import DataLoader

from distnorm.calibration import Forward, input_of
from distnorm.errors import ConfigError
from distnorm.lightning_names import is_lightnings_own
from distnorm.uneven import EvenLoader


def model_of(pl_module: pl.LightningModule) -> nn.Module:
    """Find what maps an input to an output: the module itself, or its `model`.

    Raises:
        ConfigError: it has neither.
    """
    if not is_lightnings_own(type(pl_module).forward):
        return pl_module
    model = getattr(pl_module, "model", None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"Precise statistics need a model to run, and {type(pl_module).__name__} has neither a forward nor a model."
            "\nGive it forward(self, inputs), or use norm.evaluation=pooled.",
        )
    return model


def again(loader: Any) -> Iterable[Any]:
    """Give the batches of a training loader from the beginning; whoever goes through it now notices nothing.

    A copy has samplers, generator and workers of its own; the data set is the same.

    Raises:
        ConfigError: it is no DataLoader, and cannot be copied.
    """
    loader = loader.loader if isinstance(loader, EvenLoader) else loader
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"Precise statistics cannot take batches from a training loader of type {type(loader).__name__} without "
            "disturbing it.\nGive EvaluationStatistics(spec, batches=…) a loader of its own.",
        )
    names = ("sampler", "batch_sampler", "generator")
    theirs = {name: getattr(loader, name) for name in names}
    ours = copy.deepcopy(theirs, {id(loader.dataset): loader.dataset})
    copied = copy.copy(loader)
    for sampler in (ours["batch_sampler"], ours["sampler"]):
        if hasattr(sampler, "start_at"):  # a training that has just resumed begins later
            sampler.start_at(0)
    vars(copied).update(ours, persistent_workers=False, _iterator=None)  # a DataLoader refuses to be set otherwise
    return copied


def has_training_loader(trainer: pl.Trainer) -> bool:
    """Tell whether the data module, else the module, can give a training loader."""
    return not is_lightnings_own(_source_of(trainer).train_dataloader)


def training_loader(trainer: pl.Trainer) -> Any:
    """Make a training loader for a trainer that does not train."""
    return _source_of(trainer).train_dataloader()


def _source_of(trainer: pl.Trainer) -> Any:
    return getattr(trainer, "datamodule", None) or trainer.lightning_module


def training_inputs(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    """Give the inputs of batches as training has them: through the hooks of module and data module, on the device."""
    for batch in batches:
        converted = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))  # noqa: SLF001
        yield input_of(trainer.strategy.batch_to_device(converted))


def training_forward(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Forward:
    """Give what runs the model on an input in the trainer's precision.

    Raises:
        ConfigError: the module has neither a forward nor a model.
    """
    model = model_of(pl_module)

    def run(_: nn.Module, x: Any) -> Any:
        with trainer.precision_plugin.forward_context():
            return model(x.to(trainer.strategy.root_device))

    return run
