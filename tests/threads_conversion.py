"""Threads about devices, and about what a conversion keeps and gives back."""

import copy
import datetime as dt
import tempfile

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distnorm import ConfigError, NormSpec, SyncBatchNorm, collectives, convert, register_norm
from distnorm.layer_sync import LayerSync
from tests import nasty
from tests.threads import equal, joined, own, same_step, settles, torch_raises, torch_still

SYNC = NormSpec("sync", 9, sync_ranks=2, world_size=2)


def small_net(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 2)).double()


@settles("pytorch/pytorch#78078")
def trains_on_the_cpu():
    """torch's layer refuses CPU tensors, before it looks at how many ranks there are."""
    x = joined(9, 3, 4)
    with torch_raises("expected input tensor to be on GPU"):
        nn.SyncBatchNorm(3)(x.float())
    same_step(SyncBatchNorm(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64), x)


class Lit(pl.LightningModule):
    """Somebody's module, which knows nothing of distnorm."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer_on_two_cpus(plugin: LayerSync) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=dt.timedelta(seconds=60)),
        plugins=[plugin, TorchElasticEnvironment()],
        max_steps=1,
        default_root_dir=tempfile.gettempdir(),
        **quiet,
    )


@settles("QData/spacetimeformer#90")
def a_trainer_synchronizes_on_the_cpu():
    """`Trainer(sync_batchnorm=True)` on CPUs ends in DDP's constructor."""
    with torch_raises("SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(TorchSyncBatchNorm().apply(small_net()))
    model, whole, x = Lit(), small_net(), joined(8, 3)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    trainer_on_two_cpus(LayerSync(SYNC)).fit(model, batches)
    whole(x)
    assert type(model.net[1]) is nn.BatchNorm1d
    equal(model.net[1].running_var, whole[1].running_var)


@settles("czczup/ViT-Adapter#59", "open-mmlab/mmocr#398")
def a_model_that_names_torchs_layer_runs_on_the_cpu():
    """A model written with `nn.SyncBatchNorm` cannot train without a GPU until its code is changed."""
    x, model = joined(9, 3), small_net(nn.SyncBatchNorm)
    with torch_raises("expected input tensor to be on GPU"):
        copy.deepcopy(model)(x)  # of a copy, since it counts the batch before it refuses it
    same_step(SyncBatchNorm.convert_sync_batchnorm(model), small_net(), x)


@settles("huggingface/accelerate#268", "huggingface/accelerate#791")
def a_conversion_comes_before_the_wrapper():
    """Accelerate's `prepare` converts nothing; and torch converts inside a wrapped model, silently."""
    wrapped = DistributedDataParallel(small_net())
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(wrapped))
    torch_still(type(torchs.module[1]) is nn.SyncBatchNorm, "torch converts a model that DDP has wrapped")
    with pytest.raises(ConfigError, match=r"DistributedDataParallel model\. Convert before wrapping"):
        convert(wrapped, SYNC)
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, SYNC)
    same_step(DistributedDataParallel(model), small_net(), joined(9, 3))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))


@settles("pytorch/pytorch#187298")
def a_forward_of_its_own_is_not_dropped():
    """torch's conversion drops what a subclass does in its forward, silently."""

    class BatchNormReLU(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu()

    x, model = joined(9, 3), nn.Sequential(BatchNormReLU(3)).double()
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    torch_still(bool((torchs(x) < 0).any()), "convert_sync_batchnorm drops a subclass's forward")
    with pytest.raises(ConfigError, match=r"layer '0' is a BatchNormReLU"):
        SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is BatchNormReLU


class BatchNormMish(nn.BatchNorm1d):
    """A fused layer, as users write them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.Mish()

    def forward(self, x):
        return self.act(super().forward(x))


@settles("huggingface/pytorch-image-models#1254")
def a_fused_activation_is_applied_on_all_ranks():
    """torch's conversion of timm's `BatchNormAct2d` skips the activation."""
    register_norm(BatchNormMish, after=("act",))
    for fused, act, shape in ((nasty.BatchNormAct2d, nn.ReLU(), (9, 3, 2, 2)), (BatchNormMish, nn.Mish(), (9, 3))):
        plain = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
        torchs = nn.SyncBatchNorm.convert_sync_batchnorm(fused(3)).eval()
        torch_still(bool((torchs(-torch.ones(shape)) < -0.9).all()), "convert_sync_batchnorm drops an activation")
        ours = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fused(3)).double())
        same_step(ours, nn.Sequential(plain(3), act).double(), joined(*shape))


@settles("pytorch/pytorch#187771")
def lazy_layers_hooks_and_aliases_are_kept():
    """torch's conversion makes a layer of 0 channels of a lazy one, drops hooks, and unties a shared layer."""
    lazy = nn.SyncBatchNorm.convert_sync_batchnorm(nn.LazyBatchNorm1d())
    torch_still(lazy.num_features == 0, "convert_sync_batchnorm takes a lazy layer")
    with pytest.raises(ConfigError, match="Run one batch through the model first, then convert"):
        convert(nn.Sequential(nn.LazyBatchNorm1d()), SYNC)
    shared, seen = nn.BatchNorm1d(3), []
    shared.register_forward_hook(lambda *_: seen.append(collectives.rank()))
    model = nn.Sequential(shared, nn.Tanh(), shared).double()
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    torch_still(torchs[0] is not torchs[2] and not torchs[0]._forward_hooks, "it drops hooks and unties layers")
    convert(model, SYNC)
    assert model[0] is model[2] is shared
    whole = nn.BatchNorm1d(3).double()
    same_step(model, nn.Sequential(whole, nn.Tanh(), whole), joined(9, 3))
    assert len(seen) == 2


@settles("pytorch/pytorch#41081", "pytorch/pytorch#48075")
def a_conversion_is_undone():
    """torch has no way back; Lightning's and mmengine's gives another class, and wakes layers that were frozen."""
    model, x = nn.Sequential(small_net(), nn.BatchNorm1d(2).double().eval()), joined(9, 3)
    plugin = TorchSyncBatchNorm()
    theirs = plugin.revert(plugin.apply(copy.deepcopy(model)))
    torch_still(theirs[1].training, "Lightning's revert wakes frozen layers")
    torch_still(type(theirs[0][1]) is not nn.BatchNorm1d, "Lightning's revert gives another class")
    whole, norms = copy.deepcopy(model), (model[0][1], model[1])
    conversion = convert(model, SYNC)
    same_step(model, whole, x)
    assert conversion.revert() is model
    assert (model[0][1], model[1]) == norms
    assert {type(norm) for norm in norms} == {nn.BatchNorm1d}
    assert not model[1].training
    equal(model.eval()(x), whole.eval()(x))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        model[1](torch.zeros(1, 2, 3, 4))


@settles("pytorch/pytorch#89116", "Lightning-AI/pytorch-lightning#11076")
def a_trained_model_is_exported_without_ranks():
    """A model that was synchronized cannot be scripted, and is hard to export, for inference by one process."""
    model, whole, x = small_net(), small_net(), joined(9, 3)
    with torch_raises("'SyncBatchNorm.forward'"):
        torch.jit.script(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    conversion = convert(model, SYNC)
    same_step(model, whole, x)
    program = torch.export.export(conversion.revert().eval(), (own(x),), strict=True)
    equal(program.module()(own(x)), whole.eval()(own(x)))
    equal(torch.jit.script(model)(own(x)), whole(own(x)))


@settles("pytorch/pytorch#43592", "pytorch/pytorch#33646")
def a_trained_model_is_fused_for_quantization():
    """A synchronized layer has no fuser: quantization-aware training needs the plain one back, trained."""
    from torch.ao.quantization import fuse_modules_qat

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).double(), joined(9, 3, 5)
    whole = copy.deepcopy(model)
    with torch_raises("did not find fuser method"):
        fuse_modules_qat(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), ["0", "1"])
    conversion = convert(model, SYNC)
    same_step(model, whole, x)
    fused = fuse_modules_qat(conversion.revert(), ["0", "1"])
    equal(fused.eval()(x), whole.eval()(x))
