"""Threads about what is measured: masks, precision, and the statistics of evaluation."""

import copy

import numpy as np
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from distnorm import (
    GhostBatchNorm,
    NormSpec,
    SyncBatchNorm,
    calibrate,
    collectives,
    convert,
    decide,
    evaluation_statistics,
)
from distnorm.norms import BatchRenorm
from tests import reference
from tests.threads import equal, joined, own, settles, torch_still


@settles("pytorch/pytorch#70529", "freewym/espresso#46", "Tomiinek/Multilingual_Text_to_Speech#81")
def padding_has_no_part_in_statistics():
    """Padded steps of shorter sequences count in torch's statistics as if they were data."""
    x, lengths = joined(9, 3, 5), torch.tensor([5, 2, 1, 3, 5, 4, 1, 1, 2])
    mask = torch.arange(5) < lengths[:, None]
    padded = x.masked_fill(~mask[:, None], 0.0)
    torchs, ours = nn.BatchNorm1d(3).double(), SyncBatchNorm(3).double()
    values = x.transpose(1, 2)[mask]
    torchs(padded)
    torch_still(bool((torchs.running_mean - 0.1 * values.mean(0)).abs().max() > 0.05), "BatchNorm1d counts padding")
    y = ours(own(padded), mask=own(mask))
    alone = nn.BatchNorm1d(3).double()
    truth = torch.zeros_like(x).transpose(1, 2).masked_scatter(mask[..., None], alone(values)).transpose(1, 2)
    equal(y, own(truth))
    equal(ours.running_var, alone.running_var)


@settles("pytorch/pytorch#70901", "hpcaitech/ColossalAI#258")
def counts_of_a_half_precision_model_are_exact():
    """torch casts the counts to float16, where 70,000 is infinity: means become 0 or nan."""
    torch_still(bool(torch.tensor(70_000.0).half().isinf()), "70,000 is infinite in half precision")
    x = joined(21, 2, 100, 100)
    ours, whole = SyncBatchNorm(2).half(), nn.BatchNorm2d(2).double()
    y, truth = ours(own(x).half()), whole(x)
    equal(y, own(truth), 5e-3)
    equal(ours.running_mean, whole.running_mean, 1e-3)
    equal(ours.running_var, whole.running_var, 2e-3)


@settles("pytorch/pytorch#124680")
def two_ranks_train_as_one():
    """One step on two GPUs differs by 8e-4 from the same step on one; 1e-5 is expected."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5))
    whole, x = copy.deepcopy(model).double(), joined(9, 3, 4, 4)
    convert(model, NormSpec("sync", 9, sync_ranks=2, world_size=2))
    runs = [(DistributedDataParallel(model), own(x).float(), 4.5), (whole, x, 9)]
    for run, batch, share in runs:
        optimizer = torch.optim.SGD(run.parameters(), 0.1)
        (nn.functional.cross_entropy(run(batch), torch.arange(len(batch)) * 0, reduction="sum") / share).backward()
        optimizer.step()
    for found, truth in zip(model.parameters(), whole.parameters(), strict=True):
        assert (found - truth).abs().max() < 1e-6


@settles("NVIDIA/apex#1768")
def channels_last_needs_no_power_of_two():
    """apex's layer measures wrong means and variances of 65 channels in channels-last memory."""
    x = joined(3, 65, 100, 100)
    ours, whole = SyncBatchNorm(65), nn.BatchNorm2d(65).double()
    y, truth = ours(own(x).float().contiguous(memory_format=torch.channels_last)), whole(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    equal(y, own(truth), 1e-5)
    equal(ours.running_mean, whole.running_mean, 1e-6)
    equal(ours.running_var, whole.running_var, 1e-6)


@settles("pytorch/pytorch#66073", "pgniewko/gt-pyg#112", "pytorch/pytorch#10856")
def a_frozen_layer_stays_frozen():
    """`norm.eval()` lasts until the next `model.train()`, which every loop calls once per epoch."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), joined(9, 3)
    model(x)
    model[1].eval(), model.train()
    torch_still(model[1].training, "model.train() wakes a layer that was put to evaluation")
    before, expected = copy.deepcopy(model[1].state_dict()), copy.deepcopy(model).eval()(x)
    convert(model, NormSpec("frozen", 1))
    wrapped = DistributedDataParallel(model.train())
    y = wrapped(own(x))
    equal(y, own(expected))
    y.square().sum().backward()
    torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5).step()
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())


@settles("Lightning-AI/pytorch-lightning#15062")
def a_frozen_backbone_normalizes_in_training_as_in_evaluation():
    """Lightning's `freeze(train_bn=False)` stops the averages, but normalizes with each batch's own statistics."""
    x, backbone = joined(9, 3), nn.BatchNorm1d(3).double()
    backbone(x)
    truth, lightnings = copy.deepcopy(backbone).eval()(x), copy.deepcopy(backbone)
    BaseFinetuning.freeze(lightnings, train_bn=False)
    torch_still(not torch.allclose(lightnings(x), truth), "Lightning's frozen layer normalizes with batch statistics")
    equal(convert(backbone, NormSpec("frozen", 1)).model(own(x)), own(truth))


def spread(rank: int, step: int) -> torch.Tensor:
    """A batch of a rank whose data is N(0, 1), or N(4, 1)."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(64, 2, generator=generator, dtype=torch.float64) + 4 * rank


@settles(
    "huggingface/pytorch-image-models#110",
    "huggingface/pytorch-image-models#235",
    "pytorch/pytorch#13711",
    "open-mmlab/mmpose#998",
)
def all_ranks_evaluate_with_the_statistics_of_all():
    """Each rank validates with running statistics of its own, or DDP leaves those of rank 0's data alone."""
    wrapped = DistributedDataParallel(convert(nn.Sequential(nn.BatchNorm1d(2)).double(), decide(64, 2)).model)
    torchs, kept = DistributedDataParallel(nn.BatchNorm1d(2).double()), [nn.BatchNorm1d(2).double() for _ in (0, 1)]
    for step in range(60):
        for run in (wrapped, torchs):
            run(spread(collectives.rank(), step)).sum().backward()
        [kept[rank](spread(rank, step)) for rank in (0, 1)]
    means, variances = (np.stack([getattr(norm, name) for norm in kept]) for name in ("running_mean", "running_var"))
    mean, var = reference.pooled(means, variances)
    with evaluation_statistics(torchs.module):
        torch_still(bool((torchs.module.running_var - 5).abs().max() > 2), "DDP leaves rank 0's statistics alone")
    with evaluation_statistics(wrapped.module):
        equal(wrapped.module[0].running_mean, torch.from_numpy(mean))
        equal(wrapped.module[0].running_var, torch.from_numpy(var))
        assert (wrapped.module[0].running_var - 5).abs().max() < 0.5


@settles("facebookresearch/fvcore#152", "facebookresearch/detectron2#5398", "facebookresearch/detectron2#5409")
def precise_statistics_are_of_all_ranks():
    """fvcore's precise batch norm measures each rank's own batches: ranks end with different statistics."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(), joined(32, 3)
    mine = [x[10:16], x[16:32]] if collectives.rank() else [x[:3], x[3:10]]
    statistics = calibrate(model, mine, num_samples=32)
    features = model[0](x).detach()
    equal(statistics["1.running_mean"], features.mean(0))
    equal(statistics["1.running_var"], features.var(0))


@settles("timgaripov/swa#22")
def an_average_of_weights_is_measured_over_all_ranks():
    """After weight averaging `update_bn` measures with one rank's data, and averages variances of batches."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(), joined(36, 3)
    averaged = AveragedModel(model)
    with torch.no_grad():
        model[0].weight.mul_(3)
    averaged.update_parameters(model)
    features, batches = averaged.module[0](x).detach(), own(x).split(6)
    update_bn(batches, averaged)
    error = (averaged.module[1].running_var - features.var(0)).abs().max()
    torch_still(bool(error > 0.1), "update_bn measures one rank's data")
    with evaluation_statistics(averaged.module, calibrate(averaged.module, batches, num_samples=36)):
        equal(averaged.module[1].running_mean, features.mean(0))
        equal(averaged.module[1].running_var, features.var(0))


@settles("lucidrains/ema-pytorch#29", "Megvii-BaseDetection/YOLOX#1176", "huggingface/pytorch-image-models#245")
def an_average_of_statistics_is_replaced():
    """An average of weights that averages the buffers too has statistics of no model, and other ones on each rank."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(), joined(36, 3)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for step in range(6):
        with torch.no_grad():
            model[0].weight.mul_(1.2)
        model(own(x).roll(step, 0)[:6])
        averaged.update_parameters(model)
    norm, features = averaged.module[1], averaged.module[0](x).detach()
    torch_still(bool((norm.running_var - features.var(0)).abs().max() > 0.1), "an average of buffers is off")
    with evaluation_statistics(averaged.module, calibrate(averaged.module, own(x).split(6), num_samples=36)):
        equal(norm.running_mean, features.mean(0)), equal(norm.running_var, features.var(0))


@settles("pytorch/pytorch#64730", "google/flax#3822", "constantinpape/torch-em#499")
def training_normalizes_with_running_statistics():
    """With few samples per device a layer should train with the statistics of evaluation; torch's cannot."""
    x, ours = joined(9, 3), BatchRenorm(3, r_max=1e3, d_max=1e3, warmup=0, ramp=0, dtype=torch.float64)
    whole, mine, everything = nn.BatchNorm1d(3).double(), *(t.clone().requires_grad_() for t in (own(x), x))
    expected = copy.deepcopy(ours).eval()(mine.detach())
    y = ours(mine)
    equal(y, expected)
    whole(x)
    equal(ours.running_var, whole.running_var)
    std, running_std = x.var(0, correction=0).add(1e-5).sqrt(), np.sqrt(1 + 1e-5)
    truth = (everything - everything.mean(0)) / everything.var(0, correction=0).add(1e-5).sqrt() * (std / running_std)
    y.pow(2).sum().backward(), (truth + x.mean(0) / running_std).pow(2).sum().backward()
    equal(mine.grad, own(everything.grad))


@settles("meta-pytorch/opacus#390", "Res2Net/Res2Net-PretrainedModels#74", "qubvel/segmentation_models#425")
def group_norm_takes_over_whatever_the_channels():
    """Replacing BatchNorm by GroupNorm(32) by hand fails at 72 channels; one sample per device needs it."""
    model, x = nn.Sequential(nn.Conv2d(3, 72, 1), nn.BatchNorm2d(72)), joined(2, 3, 4, 4).float()
    convert(model, decide(device_batch=1, world_size=2))
    norm = model[1]
    assert type(norm) is nn.GroupNorm
    assert 72 % norm.num_groups == 0
    mine = x[collectives.rank() :][:1]
    features = model[0](mine).double().view(norm.num_groups, -1)
    centred = features - features.mean(1, keepdim=True)
    truth = centred / features.var(1, correction=0, keepdim=True).add(1e-5).sqrt()
    equal(model(mine).view(norm.num_groups, -1), truth.detach(), 1e-5)


@settles("keras-team/keras#15790", "tensorflow/tensorflow#23050")
def virtual_batches_are_for_training_only():
    """Keras' virtual_batch_size was applied in inference too, where other sizes of a batch then fail."""
    layer, x = GhostBatchNorm(3, ghost_batch=4, dtype=torch.float64), joined(24, 3)[collectives.rank() * 8 :][:8]
    y = layer(x)
    for ghost in (slice(0, 4), slice(4, 8)):
        equal(y[ghost], nn.BatchNorm1d(3).double()(x[ghost]))
    mean, var = layer.running_mean, layer.running_var
    for size in (1, 3, 7):
        equal(layer.eval()(x[:size]), (x[:size] - mean) / (var + 1e-5).sqrt())
