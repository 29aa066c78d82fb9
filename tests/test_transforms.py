"""`torch.func` and forward-mode differentiation through a training forward, on one rank: torch's values."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd import functional as autograd_functional
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves, tree_map

from distnorm import GhostBatchNorm, ShapeError, SyncBatchNorm
from distnorm.norms import BatchRenorm, RecurrentBatchNorm

pytestmark = pytest.mark.unit

X = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 + 1
DOUBLE = {"dtype": torch.float64}


class AtTimeZero(RecurrentBatchNorm):
    """A recurrent norm of one time step that takes an input alone, with torch's initial weight."""

    def __init__(self, **options):
        super().__init__(3, 1, **options)
        nn.init.ones_(self.weight)

    def forward(self, x):
        return super().forward(x, 0)


LAYERS = {
    "sync": lambda **options: SyncBatchNorm(3, **DOUBLE, **options),
    "renorm": lambda **options: BatchRenorm(3, warmup=10**6, **DOUBLE, **options),
    "ghost": lambda **options: GhostBatchNorm(3, len(X), **DOUBLE, **options),
    "recurrent": lambda **options: AtTimeZero(**DOUBLE, **options),
}
OPTIONS = [
    {},
    {"track_running_stats": False},
    {"affine": False},
    {"bias": False},
    {"momentum": None, "eps": 0.1},
    {"track_running_stats": False, "affine": False},
]


_NOT_RECURRENT = {"affine", "track_running_stats"}


def loss_of(y):
    return y.square().sin().sum()


def doubled(state):
    return {key: torch.stack([value, value + 1]) for key, value in state.items()}


def with_fresh_buffers(layer):
    """A layer as a function of its parameters and input, whose buffers are given and given up in each call."""
    buffers = {key: value.clone() for key, value in layer.named_buffers()}

    def call(parameters, x):
        return functional_call(layer, (parameters, {k: v.clone() for k, v in buffers.items()}), (x,))

    return call


def by_function(layer):
    """Each transform's result, for torch's layer and ours alike."""
    call = with_fresh_buffers(layer)
    parameters = {key: value.detach().clone() for key, value in layer.named_parameters()}
    buffers = {key: value.clone() for key, value in layer.named_buffers()}
    tangents = tree_map(torch.cos, parameters)
    stacked = torch.stack([X, X.flip(0) + 1])

    def given(parameters, buffers, x):
        return functional_call(layer, (parameters, buffers), (x,))

    def moved(parameters, x):
        own = {key: value.clone() for key, value in buffers.items()}
        return grad(lambda p, b: loss_of(given(p, b, x)))(parameters, own), own

    def stacked_buffers():
        return {key: torch.stack([value, value]) for key, value in buffers.items()}

    def ensemble():
        own = stacked_buffers()
        return vmap(grad(lambda p, b, x: loss_of(given(p, b, x))))(doubled(parameters), own, stacked), own

    yield "grad", lambda: grad(lambda p, x: loss_of(call(p, x)), argnums=(0, 1))(parameters, X)
    yield "grad, and buffers", lambda: moved(parameters, X)
    yield "vjp", lambda: vjp(call, parameters, X)[1](torch.cos(X))
    yield "jvp", lambda: jvp(call, (parameters, X), (tangents, torch.cos(X)))
    yield "linearize", lambda: linearize(lambda x: call(parameters, x), X)[1](torch.cos(X))
    yield "jacrev", lambda: jacrev(call, argnums=(0, 1))(parameters, X)
    yield "jacfwd", lambda: jacfwd(call, argnums=(0, 1))(parameters, X)
    yield "hessian", lambda: hessian(lambda x: loss_of(call(parameters, x)))(X)
    yield "reverse twice", lambda: jacrev(jacrev(lambda p: loss_of(call(p, X))))(parameters)
    yield "vmap", lambda: vmap(call, in_dims=(None, 0))(parameters, stacked)
    yield "vmap over members", lambda: vmap(given, in_dims=(0, 0, None))(doubled(parameters), stacked_buffers(), X)
    yield "ensemble", ensemble
    yield "per sample", lambda: vmap(grad(lambda p, x: loss_of(call(p, x))), in_dims=(None, 0))(parameters, X[:, None])


def with_dual_numbers(layer):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(X, torch.cos(X))))
        return y.primal, y.tangent


def with_batched_gradients(layer):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(layer(x), [x], torch.stack([torch.cos(X), torch.sin(X)]), is_grads_batched=True)


def by_autograd(layer):
    """What `torch.autograd` has of the kind, outside `torch.func`."""
    twice = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    yield "forward_ad", lambda: with_dual_numbers(layer)
    yield "is_grads_batched", lambda: with_batched_gradients(layer)
    yield "functional.jvp", lambda: autograd_functional.jvp(layer, X, torch.cos(X))
    yield "functional.hvp", lambda: autograd_functional.hvp(lambda x: loss_of(layer(x)), X, torch.cos(X))
    yield "jacobian", lambda: autograd_functional.jacobian(layer, X, vectorize=True)
    yield (
        "forward jacobian",
        lambda: autograd_functional.jacobian(layer, X, vectorize=True, strategy="forward-mode"),
    )
    yield "functional.hessian", lambda: autograd_functional.hessian(lambda x: loss_of(layer(x)), X, vectorize=True)
    yield "forward hessian", lambda: autograd_functional.hessian(lambda x: loss_of(layer(x)), X, **twice)


def outcome(of):
    try:
        return [leaf.detach() for leaf in tree_leaves(of())]
    except Exception as error:  # noqa: BLE001 — whatever torch's layer cannot do
        return error


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of torch's own `linearize`
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (kind, options)
        for kind in LAYERS
        for options in OPTIONS
        if kind != "recurrent" or not _NOT_RECURRENT & {*options}
    ],
    ids=str,
)
def test_alone_every_transform_that_torchs_layer_takes_gives_its_values(kind, options):
    seen = 0
    for calls in (by_function, by_autograd):
        ours, theirs = LAYERS[kind](**options), nn.BatchNorm1d(3, **DOUBLE, **options)
        for (name, ours_of), (_, truth) in zip(calls(ours), calls(theirs), strict=True):
            expected = outcome(truth)
            if isinstance(expected, Exception):
                continue
            results, seen = outcome(ours_of), seen + 1
            assert not isinstance(results, Exception), f"{name}: {results}"
            for own, wanted in zip(results, expected, strict=True):
                found = own.view_as(wanted)  # a recurrent layer's buffers have one time step
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert seen >= 12


def test_an_ensemble_of_models_trains_as_its_members_do():
    members = [nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.Linear(4, 1)).double() for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(6, 3, **DOUBLE)

    def loss(p, b):
        return loss_of(functional_call(members[0], (p, b), (x,)))

    grads = vmap(grad(loss))(parameters, buffers)
    for index, member in enumerate(members):
        loss_of(member(x)).backward()
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(grads[name][index], parameter.grad, rtol=1e-10, atol=1e-10)
        for name, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[name][index], buffer, rtol=1e-10, atol=1e-10)


def test_one_value_per_channel_is_refused_in_a_transform_too():
    layer = SyncBatchNorm(3, track_running_stats=False)
    with pytest.raises(ShapeError, match="has 1 value"):
        grad(lambda x: layer(x).sum())(torch.randn(1, 3))
    with pytest.raises(ShapeError, match="has 1 value"):
        vmap(layer)(torch.randn(5, 1, 3))


def test_no_transform_leaves_a_trace_in_the_layer():
    layer = SyncBatchNorm(3, **DOUBLE)
    before = set(vars(layer))
    grad(lambda p, b: loss_of(functional_call(layer, (p, b), (X,))))(
        dict(layer.named_parameters()), {k: v.clone() for k, v in layer.named_buffers()}
    )
    vmap(layer.eval())(torch.stack([X, X]))
    assert set(vars(layer)) - before <= {"_rank_rows"}
    assert layer._rank_rows is None
