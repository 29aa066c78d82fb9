"""Convolutions with standardized filters, forward and transposed, against numpy and torch's own convolution."""

import copy
import pickle

import pytest
import torch
from torch import nn

from distnorm.norms.weight import STANDARDIZED, standardized, standardized_transposed
from tests import reference_norms

pytestmark = pytest.mark.unit

OPTIONS = [{}, {"groups": 2, "stride": 2}, {"bias": False, "dilation": 2, "padding": 1}]


def filters_of(weight, groups, transposed):
    """A filter a row [O, fan-in], gathered one by one."""
    rows = []
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    for o in range(outputs):
        if transposed:
            per_group, inputs = weight.shape[1], weight.shape[0] // groups
            first = o // per_group * inputs
            rows.append(weight[first : first + inputs, o % per_group].reshape(-1))
        else:
            rows.append(weight[o].reshape(-1))
    return torch.stack(rows).numpy()


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("plain", STANDARDIZED, ids=lambda cls: cls.__name__)
def test_each_filter_has_mean_0_and_variance_1_and_torch_convolves_with_it(plain, options):
    transposed, groups = "Transpose" in plain.__name__, options.get("groups", 1)
    torch.manual_seed(0)
    ours = STANDARDIZED[plain](4, 6, 3, dtype=torch.float64, **options)
    theirs = plain(4, 6, 3, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    truth = torch.from_numpy(reference_norms.standardized_filters(filters_of(ours.weight.detach(), groups, transposed)))
    used = standardized_transposed(ours.weight, groups) if transposed else standardized(ours.weight)
    close(torch.from_numpy(filters_of(used.detach(), groups, transposed)), truth)
    with torch.no_grad():
        theirs.weight.copy_(used)
    x = torch.randn(2, 4, *[6] * len(ours.kernel_size), dtype=torch.float64)
    close(ours(x), theirs(x))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        close(twin(x), ours(x))


def test_gradients_through_the_standardization():
    for weight, function in ((torch.randn(4, 2, 3), standardized), (torch.randn(4, 3, 2), standardized_transposed)):
        assert torch.autograd.gradcheck(function, weight.double().requires_grad_())
    weight = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: standardized_transposed(w, 2), weight)


@pytest.mark.parametrize("plain", STANDARDIZED, ids=lambda cls: cls.__name__)
def test_it_compiles_and_its_scale_cannot_grow(plain):
    torch._dynamo.reset()
    ours = STANDARDIZED[plain](2, 4, 3, dtype=torch.float64)
    x = torch.randn(2, 2, *[4] * len(ours.kernel_size), dtype=torch.float64)
    close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))
    with torch.no_grad():
        ours.weight.mul_(100)  # eps is nothing to it
        y = ours(x)
        ours.weight.mul_(10).add_(3)
    torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-5)


def test_a_transposed_convolution_is_told_the_size_of_its_output():
    ours = STANDARDIZED[nn.ConvTranspose1d](2, 4, 3, stride=2)
    assert ours(torch.randn(1, 2, 5), output_size=[12]).shape == (1, 4, 12)


def test_filters_of_one_weight_stay_as_they_are():
    depthwise = STANDARDIZED[nn.Conv2d](4, 4, 1, groups=4)
    assert torch.equal(standardized(depthwise.weight), depthwise.weight)
    assert torch.equal(standardized_transposed(depthwise.weight, 4), depthwise.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(16, 8, 3, 3) * 1e-2 + 0.5).to(dtype)
    truth = torch.from_numpy(reference_norms.standardized_filters(weight.double().flatten(1).numpy())).view(
        weight.shape
    )
    found = standardized(weight)
    assert found.dtype == dtype
    error = (found.double() - truth).abs().max() / truth.abs().max()
    assert error <= torch.finfo(dtype).eps / 2 * 1.01
