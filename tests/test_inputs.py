"""What no layer computes with is refused, in training and evaluation, with the call that makes it an input."""

import pytest
import torch

from distnorm import ShapeError
from tests.test_arguments import BATCH, LAYERS

pytestmark = pytest.mark.unit

INPUTS = {
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "torch.float8_e4m3fn; .*input.bfloat16()"),
    "float8 of another kind": (lambda x: x.to(torch.float8_e5m2), "torch.float8_e5m2; .*input.bfloat16()"),
    "integers": (lambda x: x.long(), "torch.int64; .*input.float()"),
    "booleans": (lambda x: x > 0, "torch.bool; .*input.float()"),
    "complex": (lambda x: x.to(torch.complex64), "torch.complex64; .*input.real, input.imag"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "torch.quint8; .*\n.*conversion.revert()",
    ),
    "sparse": (lambda x: x.to_sparse(), "torch.sparse_coo; .*input.to_dense()"),
    "compressed": (lambda x: x[..., 0].to_sparse_csr(), "torch.sparse_csr; .*input.to_dense()"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "nested tensor; .*\n.*to_padded_tensor"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested tensor; .*\n.*padded"),
    "a list": (lambda x: x.tolist(), "a list; .*torch.as_tensor(input)"),
    "an array": (lambda x: x.numpy(), "a ndarray; .*torch.as_tensor(input)"),
}


@pytest.mark.filterwarnings("ignore:.*(quantiz|Sparse|prototype)")
@pytest.mark.parametrize("given_as", INPUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*BATCH, "recurrent", "frozen", "response", "threshold"])
def test_an_input_that_no_layer_computes_with_is_refused_with_the_call_that_mends_it(kind, training, given_as):
    make, message = INPUTS[given_as]
    layer = LAYERS[kind]().train(training)
    layer.layer_name = "head.bn"
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(ShapeError, match="head.bn got .*" + message.replace("(", r"\(").replace(")", r"\)")):
        layer(make(torch.randn(4, 3, 2)), *([0] if kind == "recurrent" else []))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
