"""`torch.func` over ranks: `grad` and `vjp` as on the joined batch; the others refused, alike, before a wait."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from distnorm import ConfigError, SyncBatchNorm, collectives
from distnorm.norms import BatchRenorm
from tests import ranks, reference, steps
from tests.test_transforms import DOUBLE, LAYERS, X, loss_of, with_dual_numbers, with_fresh_buffers

pytestmark = pytest.mark.unit


def both_ways(layer, x, mask=None):
    """Gradients by `torch.func.grad`, and by autograd with the layer's own backward; and where buffers moved."""
    twin, rest = copy.deepcopy(layer), () if mask is None else (mask,)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    found = grad(lambda p, b, x: loss_of(functional_call(layer, (p, b), (x, *rest))), argnums=(0, 2))(
        parameters, buffers, x
    )
    own = x.clone().requires_grad_()
    loss_of(twin(own, *rest)).backward()
    truth = ({key: value.grad for key, value in twin.named_parameters()}, own.grad), dict(twin.named_buffers())
    return [[leaf.detach() for leaf in tree_leaves(both)] for both in ((found, buffers), truth)]


def moved(layer):
    """A renormalization with open limits, whose running statistics are not the batch's."""
    with torch.no_grad():
        for buffer, value in zip(layer.buffers(), (0.5, 2.0, 900), strict=True):
            buffer.fill_(value)
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return layer


def grads_over_ranks(kind, x, masks):
    """Body: this rank's gradients, both ways."""
    rank = collectives.rank()
    layer = moved({"sync": SyncBatchNorm, "renorm": BatchRenorm}[kind](3, **DOUBLE))
    return both_ways(layer, x[rank], None if masks is None else masks[rank])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [[5], [3, 2], [0, 4], [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("kind", ["sync", "renorm"])
def test_grad_over_ranks_is_the_layers_own_backward(kind, sizes, masked):
    x, _, _, _ = steps.shards(sizes, (4,), 1.0)
    masks = [torch.arange(4) < torch.tensor([[1 + n % 4] for n in range(len(part))]).view(-1, 1) for part in x]
    for found, truth in ranks.run(grads_over_ranks, kind, x, masks if masked else None, world=len(sizes)):
        for own, wanted in zip(found, truth, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9)


def vjp_over_ranks(x, dy, weight, bias, by):
    """Body: as `steps.train`, through `torch.func.vjp`; if asked, by the parameters alone on odd ranks."""
    rank = collectives.rank()
    layer = steps.layer_with(weight, bias)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    if by == "parameters" and rank % 2:
        y, pull = vjp(lambda p: functional_call(layer, (p, with_copies(buffers)), (x[rank],)), parameters)
        (dparameters,), dx = pull(dy[rank]), None
    else:
        y, pull = vjp(lambda p, x: functional_call(layer, (p, with_copies(buffers)), (x,)), parameters, x[rank])
        dparameters, dx = pull(dy[rank])
    found = {"y": y, "dx": dx, "dweight": dparameters["weight"], "dbias": dparameters["bias"]}
    return {key: None if value is None else value.detach() for key, value in found.items()}


def with_copies(buffers):
    return {key: value.clone() for key, value in buffers.items()}


@pytest.mark.parametrize("by", ["all", "parameters"])
@pytest.mark.parametrize("sizes", [[4, 4], [3, 1], [0, 5, 2, 1]], ids=str)
def test_vjp_over_ranks_is_torchs_on_the_joined_batch(sizes, by):
    x, dy, weight, bias = steps.shards(sizes, (4,), 1.0)
    found = ranks.run(vjp_over_ranks, x, dy, weight, bias, by, world=len(sizes))
    truth = reference.batch_norm(torch.cat(x), torch.cat(dy), weight, bias)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([own["y"] for own in found]), truth["y"], **close)
    for key in ("dweight", "dbias"):
        torch.testing.assert_close(sum(own[key] for own in found), truth[key], **close)
    for own, wanted in zip(found, truth["dx"].split(sizes), strict=True):
        if own["dx"] is not None:
            torch.testing.assert_close(own["dx"], wanted, **close)


def batched(layer):
    """The second half of `jacrev`, on a graph that autograd made: the forward saw no transform."""
    x = X.clone().requires_grad_()
    return torch.autograd.grad(layer(x), [x], torch.stack([X, X]), is_grads_batched=True)


REFUSED = {
    "vmap": lambda call, _: vmap(call)(torch.stack([X, X])),
    "jvp": lambda call, _: jvp(call, (X,), (X,)),
    "jacrev": lambda call, _: jacrev(call)(X),
    "jacfwd": lambda call, _: jacfwd(call)(X),
    "hessian": lambda call, _: hessian(lambda x: loss_of(call(x)))(X),
    "forward_ad": lambda _, layer: with_dual_numbers(layer),
    "is_grads_batched": lambda _, layer: batched(layer),
}


def refused_over_ranks(kind, transform):
    layer = LAYERS[kind]()
    layer.layer_name = "head.bn"
    parameters, call = {k: v.detach() for k, v in layer.named_parameters()}, with_fresh_buffers(layer)
    with pytest.raises(ConfigError) as caught:
        REFUSED[transform](lambda x: call(parameters, x), layer)
    y = LAYERS[kind]()(X + collectives.rank())  # the ranks are still in step
    return str(caught.value), float(y.detach().mean().abs())


@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("kind", ["sync", "renorm", "recurrent"])
def test_other_transforms_are_refused_over_ranks_alike(kind, transform):
    (message, mean), (other, _) = ranks.run(refused_over_ranks, kind, transform, world=2)
    assert message == other
    assert message.startswith("head.bn")
    assert "pools over 2 ranks inside " in message
    assert "over ranks torch.func.grad and vjp work, and vmap, jvp, jacfwd, jacrev and hessian do not" in message
    assert "convert with sync_ranks=1 (norm=batch), or in evaluation: model.eval()" in message
    assert mean > 0.05  # of the joined batch the mean is 0, and of this rank's part not
