"""Threads about graphs, transforms and other kinds of tensors: torch.fx, torch.func, DTensor."""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx import symbolic_trace

from distnorm import SyncBatchNorm, collectives, convert
from tests import nasty
from tests.threads import equal, joined, own, same_step, settles
from tests.threads_conversion import SYNC, small_net


@settles("pytorch/pytorch#44802")
def a_converted_model_is_traced():
    """torch.fx traces into a batch norm that is not torch's own, and fails at its checks."""
    model, whole, x = small_net(), small_net(), joined(9, 3)
    convert(model, SYNC)
    traced = symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    same_step(traced, whole, x)


@settles("huggingface/pytorch-image-models#1910")
def a_fused_layer_stays_a_node_of_the_graph():
    """Traced into, timm's fused layer keeps the settings of that moment: it cannot be frozen afterwards."""
    model, x = nn.Sequential(nasty.BatchNormAct2d(3)).double(), joined(9, 3, 2, 2)
    model(x)
    truth = copy.deepcopy(model).eval()(x)
    traced = symbolic_trace(convert(model, SYNC).model)
    equal(traced.eval()(own(x)), own(truth))


@settles("pytorch/functorch#867", "pytorch/functorch#115")
def a_layer_works_under_torch_func():
    """vmap and jacrev of a batch norm, and gradients of a function of its parameters."""
    x, whole = joined(9, 3), nn.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64)
    ours, alone = (
        SyncBatchNorm(3, track_running_stats=False, sync_ranks=ranks, dtype=torch.float64) for ranks in (2, 1)
    )

    def loss(layer):
        return lambda weight, batch: functional_call(layer, {"weight": weight}, (batch,)).sin().sum()

    weight, models = torch.ones(3, dtype=torch.float64), joined(4, 5, 3)
    equal(grad(loss(ours), argnums=1)(weight, own(x)), own(grad(loss(whole), argnums=1)(weight, x)))
    equal(vmap(alone)(models), vmap(whole)(models))
    equal(jacrev(alone)(own(x)), jacrev(whole)(own(x)))


@settles("pytorch/pytorch#182739")
def a_batch_sharded_tensor_is_normalized():
    """Batch norm of a DTensor that is sharded over samples has no rule in torch; of channels its backward hung."""
    x, mesh = joined(8, 3, 2, 2), init_device_mesh("cpu", (2,))
    mine = DTensor.from_local(x[collectives.rank() * 4 :][:4].clone(), mesh, [Shard(0)])
    y, truth = SyncBatchNorm(3).double()(mine), nn.BatchNorm2d(3).double()(x)
    equal(y.full_tensor(), truth)
