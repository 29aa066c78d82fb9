"""Threads about compilers, checkpointing, gradients, copies, and ranks that do not see the same amount of data."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from distnorm import EvenLoader, GroupError, ShapeError, SyncBatchNorm, check_ranks, collectives
from tests.threads import equal, joined, own, same_buffers, same_step, settles, torch_raises, torch_still


def net(norm: type[nn.Module] = SyncBatchNorm, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm(4, **options), nn.Tanh(), nn.Linear(4, 2)).double()


@settles("pytorch/pytorch#161302", "pytorch/pytorch#156680")
def one_graph_holds_the_exchange():
    """torch's synchronized layer breaks the graph, and cannot be compiled with fullgraph=True."""
    torch._dynamo.reset()
    compiled, whole = torch.compile(net(), fullgraph=True, backend="aot_eager"), net(nn.BatchNorm1d)
    for size in (9, 12):
        same_step(compiled, whole, joined(size, 3, seed=size))


@settles("pytorch/pytorch#107372", "pytorch/pytorch#100239")
def compile_and_ddp_go_in_either_order():
    """torch.compile of a DDP model with synchronized layers ends in an internal error of Dynamo."""
    for order in ("compile(DDP)", "DDP(compile)"):
        torch._dynamo.reset()
        wrap = [lambda m: torch.compile(m, backend="aot_eager"), DistributedDataParallel]
        model, whole = net(), net(nn.BatchNorm1d)
        for step in wrap if order == "DDP(compile)" else reversed(wrap):
            model = step(model)
        x = joined(9, 3)
        model(own(x)).square().sum().backward(), whole(x).square().sum().backward()
        for found, truth in zip(model.parameters(), whole.parameters(), strict=True):
            equal(found.grad * 2, truth.grad)
        same_buffers(model, whole)


@settles("pytorch/pytorch#194504", "pytorch/pytorch#195827")
def a_cumulative_average_compiles():
    """With momentum=None torch's layers read a tensor on the host, which no full graph can."""
    torch._dynamo.reset()
    with torch_raises("data-dependent"):
        torch.compile(net(nn.BatchNorm1d, momentum=None), fullgraph=True, backend="eager")(joined(9, 3))
    compiled = torch.compile(net(momentum=None), fullgraph=True, backend="aot_eager")
    whole = net(nn.BatchNorm1d, momentum=None)
    for seed in range(3):
        same_step(compiled, whole, joined(9, 3, seed=seed))


class Checkpointed(nn.Module):
    """A model whose forward runs again in its backward."""

    def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@settles("pytorch/pytorch#96136", "Tencent/YOLO-Master#262", "deepinsight/insightface#2053")
def a_checkpointed_layer_counts_once():
    """Activation checkpointing runs a batch norm's forward twice, and its running statistics move twice."""
    for reentrant in (True, False):
        torchs = nn.BatchNorm1d(3).double()
        Checkpointed(torchs, reentrant=reentrant)(joined(9, 3).requires_grad_()).sum().backward()
        torch_still(int(torchs.num_batches_tracked) == 2, "checkpointing moves running statistics twice")
        same_step(Checkpointed(net(), reentrant=reentrant), net(nn.BatchNorm1d), joined(9, 3))


@settles("facebookresearch/fairscale#1035")
def a_checkpointed_layer_counts_in_its_first_forward():
    """fairscale's patch counts in the second forward: none is counted where no backward follows."""
    x, whole = joined(9, 3), net(nn.BatchNorm1d)
    whole(x)
    for reentrant in (True, False):
        model = net()
        Checkpointed(model, reentrant=reentrant)(own(x))
        same_buffers(model, whole)


@settles("pytorch/pytorch#61222")
def a_gradient_penalty_trains_under_ddp():
    """torch's layer has no second derivative: "derivative for batch_norm_backward_elemt is not implemented"."""
    x, ours, whole = joined(9, 3), DistributedDataParallel(net()), net(nn.BatchNorm1d)

    def penalized(model, x):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        grad.square().sum().backward()
        return grad.detach()

    equal(penalized(ours, own(x)), own(penalized(whole, x)))
    for found, truth in zip(ours.parameters(), whole.parameters(), strict=True):
        if truth.grad is not None:
            equal(found.grad * 2, truth.grad, 1e-9)


@settles("pytorch/pytorch#175024", "pytorch/pytorch#110363", "pytorch/pytorch#22095")
def two_forwards_and_one_backward_under_ddp():
    """DDP writes into the buffers before each forward: "modified by an inplace operation" (up to torch 2.12)."""
    ours, whole = DistributedDataParallel(net()), net(nn.BatchNorm1d)
    fake, real = joined(9, 3), joined(9, 3, seed=1)
    (ours(own(fake)).square().sum() - ours(own(real)).sin().sum()).backward()
    (whole(fake).square().sum() - whole(real).sin().sum()).backward()
    for found, truth in zip(ours.parameters(), whole.parameters(), strict=True):
        equal(found.grad * 2, truth.grad)
    same_buffers(ours, whole)


@settles("pytorch/pytorch#65907")
def an_attack_in_evaluation_mode_trains_under_ddp():
    """The same error in evaluation mode, where a second forward follows the one to be differentiated."""
    ours, whole, x = DistributedDataParallel(net()).eval(), net(nn.BatchNorm1d).eval(), joined(9, 3)
    grads = []
    for model, batch in ((ours, own(x)), (whole, x)):
        first = batch.clone().requires_grad_()
        y = model(first)
        model(batch + 1)
        grads += torch.autograd.grad(y.square().sum(), first)
    equal(grads[0], own(grads[1]))


@settles("pytorch/pytorch#76927", "open-mmlab/mmengine#1664", "ultralytics/yolov5#279")
def a_model_with_a_process_group_is_copied():
    """A layer with a group has no deepcopy, no moving average and no torch.save: "cannot pickle ProcessGroup"."""
    group, x = dist.new_group([0, 1]), joined(9, 3)
    with torch_raises("pickle"):
        copy.deepcopy(nn.SyncBatchNorm(3, process_group=group))
    model, whole = SyncBatchNorm.convert_sync_batchnorm(net(nn.BatchNorm1d), group), net(nn.BatchNorm1d)
    same_step(DistributedDataParallel(model), whole, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), AveragedModel(model, use_buffers=True), torch.load(buffer, weights_only=False)]
    truth = whole(x)
    for twin in copies:
        equal(twin(own(x)), own(truth))


@settles("pytorch/pytorch#48804", "huggingface/accelerate#2282")
def ranks_are_grouped_by_a_number():
    """A group of ranks is made by hand: every rank calls `new_group` for every group, in the same order."""
    x = joined(9, 3)
    for sync_ranks, shared in ((1, own(x)), (2, x)):
        ours, whole = SyncBatchNorm(3, sync_ranks=sync_ranks).double(), nn.BatchNorm1d(3).double()
        y, truth = ours(own(x)), whole(shared)
        equal(y, own(truth) if sync_ranks == 2 else truth)
        same_buffers(ours, whole)
        equal(pickle.loads(pickle.dumps(ours))(own(x)), y)


@settles("pytorch/pytorch#75478", "Lightning-AI/pytorch-lightning#18802")
def a_sharded_model_measures_in_float32():
    """FSDP's mixed precision gives a batch norm weights and inputs of another dtype than its buffers have."""
    policy, mesh = MixedPrecisionPolicy(torch.bfloat16, torch.float32), init_device_mesh("cpu", (2,))
    model, whole, x = net().float(), net(nn.BatchNorm1d), joined(9, 3)
    with torch_raises("expected scalar type"):
        fully_shard(net(nn.BatchNorm1d).float(), mesh=mesh, mp_policy=policy)(own(x).float())
    y, truth = fully_shard(model, mesh=mesh, mp_policy=policy)(own(x).float()), whole(x)
    y.float().square().sum().backward(), truth.square().sum().backward()
    equal(y, own(truth), 0.05)
    for found, value in zip(model[1].buffers(), whole[1].buffers(), strict=True):
        equal(found, value, 0.01)
    equal(model[3].weight.grad.full_tensor() * 2, whole[3].weight.grad, 0.3)


@settles("pytorch/pytorch#36530", "facebookresearch/detectron2#366")
def a_rank_may_have_nothing():
    """A batch without regions on one rank; and a step without any moves nothing."""
    x, ours, whole = joined(9, 3), net(), net(nn.BatchNorm1d)
    mine = (x[:0] if collectives.rank() else x.clone()).requires_grad_()
    ours(mine).square().sum().backward()
    whole(x).square().sum().backward()
    same_buffers(ours, whole)
    assert mine.grad.shape == mine.shape
    before, weight_grad = copy.deepcopy(ours.state_dict()), ours[1].weight.grad.clone()
    ours(x[:0]).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert torch.equal(ours[1].weight.grad, weight_grad)


@settles("donnyyou/torchcv#141", "NVIDIA/apex#262")
def one_sample_per_rank_is_enough():
    """One sample per device is refused, though all have several: "Expected more than 1 value per channel"."""
    x = joined(2, 3)
    mine = x[collectives.rank() :][:1]
    with torch_raises("Expected more than 1 value per channel when training"):
        nn.BatchNorm1d(3)(mine.float())
    equal(SyncBatchNorm(3).double()(mine), nn.BatchNorm1d(3).double()(x)[collectives.rank() :][:1])
    with pytest.raises(ShapeError, match=r"1 value \w+ channel .*2 ranks"):
        SyncBatchNorm(3)(mine[: 1 - collectives.rank()].float())


@settles("Lightning-AI/pytorch-lightning#20404", "Lightning-AI/pytorch-lightning#3325", "microsoft/PyMarlin#80")
def ranks_with_fewer_batches_go_along():
    """Ranks with different numbers of batches hang; DDP's join cannot help a layer that exchanges in its forward."""
    batches = [[joined(4, 3, seed=10 * rank + step) for step in range((2, 4)[rank])] for rank in (0, 1)]
    together = [torch.cat([own[step] for own in batches if step < len(own)]) for step in range(4)]
    model, whole = net(), net(nn.BatchNorm1d)
    wrapped = DistributedDataParallel(model)
    loader = EvenLoader(batches[collectives.rank()], wrapped)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, whole)]
    for mine, everything in zip(loader, together, strict=True):
        (wrapped(mine).square().sum() / loader.share).backward()
        (whole(everything).square().sum() / len(everything)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for found, truth in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        equal(found, truth)


@settles("horovod/horovod#2241", "NVIDIA/apex#105")
def a_hang_names_its_layer():
    """Training hangs at a synchronized layer, and nothing says at which, or which rank went elsewhere."""
    model = nn.ModuleDict({"stem": SyncBatchNorm(3), "head": SyncBatchNorm(3)})
    x = torch.randn(4, 3)
    try:
        check_ranks(model, debug=True)
        with pytest.raises(GroupError, match=r"rank 0 is at stem forward.*\n?.*rank 1 (is )?at head forward"):
            model["head" if collectives.rank() else "stem"](x)
    finally:
        collectives.set_debug(False)


@settles("pytorch/pytorch#44957")
def a_rank_that_skips_a_branch_takes_part_without_samples():
    """A branch that some ranks skip hangs the others; zeros instead would spoil their statistics."""
    x, branch, alone = joined(9, 3), SyncBatchNorm(3).double(), nn.BatchNorm1d(3).double()
    skips = collectives.rank() == 1
    y = branch(x[:0] if skips else x)
    equal(y, alone(x)[: len(y)])
    same_buffers(branch, alone)


@settles("pytorch/pytorch#48988", "pytorch/pytorch#40147", "NVIDIA/apex#1071")
def one_rank_evaluates_alone():
    """Evaluation on one rank hung, or without running statistics crashed: every forward waited for the others."""
    x = joined(9, 3)
    for track in (True, False):
        ours, whole = (layer(3, track_running_stats=track).double() for layer in (SyncBatchNorm, nn.BatchNorm1d))
        same_step(ours, whole, x)
        if collectives.rank() == 0:
            equal(ours.eval()(x), whole.eval()(x))
