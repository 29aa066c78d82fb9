"""For people who own a Lightning Trainer and nothing else: its plug for synchronized layers, with ours in it."""

from lightning.pytorch.plugins import layer_sync
from torch import nn

from distnorm import collectives
from distnorm.conversion import Conversion
from distnorm.convert import convert
from distnorm.errors import ConfigError
from distnorm.lightning_names import EitherName
from distnorm.policy import decide
from distnorm.spec import NormSpec


class LayerSync(EitherName, layer_sync.LayerSync):
    """Convert the batch norms of whatever model a Trainer fits, and give them their classes back afterwards.

        Trainer(strategy="ddp", devices=4, plugins=[LayerSync(device_batch=8)])

    What `Trainer(sync_batchnorm=True)` does with torch's layer, which needs a GPU, forgets hooks and aliases, and wakes
    frozen layers up when it reverts. Leave `sync_batchnorm` out: Lightning takes one such plugin. Lightning calls it in
    `fit` alone, before the optimizers are made and the model is wrapped, and only on strategies with several ranks.
    Where you can, call `distnorm.convert` on the model before `fit` instead: it prints what it does.

    DDP sends rank 0's buffers to all ranks before each forward. Running statistics that ranks do not share (`batch`,
    `ghost`, groups) are left out of that: they stay each rank's own under DDPStrategy's defaults.

    Args:
        spec: the decision; `None` makes it when the ranks are known.
        device_batch: samples one device sees per forward: `decide` then chooses, with its defaults. `None`, without
            `spec`: all ranks share statistics.

    Collective: none; the layers' own afterwards.

    Raises:
        ConfigError: both arguments are given; or the model cannot be converted.
    """

    def __init__(self, spec: NormSpec | None = None, *, device_batch: int | None = None) -> None:
        if spec is not None and not isinstance(spec, NormSpec):
            raise ConfigError(
                f"LayerSync got {spec!r}, that is no NormSpec. Give it device_batch=…, or what decide() made."
            )
        if spec is not None and device_batch is not None:
            raise ConfigError(
                f"LayerSync got a spec and device_batch={device_batch}. Give the decision, or what it depends on."
            )
        self._spec, self._device_batch = spec, device_batch
        self._conversion: Conversion | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the model, in place."""
        spec, ranks = self._spec, collectives.world_size()
        if spec is None and self._device_batch is not None:
            spec = decide(device_batch=self._device_batch, world_size=ranks)
        if spec is None:
            # nobody said how many samples a device sees: one at the least
            spec = NormSpec(kind="sync", normalization_batch=ranks, sync_ranks=ranks, world_size=ranks)
        self._conversion = convert(model, spec)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Give every layer its class back; weights and running statistics stay."""
        if self._conversion is not None:
            self._conversion.revert()
        self._conversion = None
        return model
