"""Models leave for other programs: torch.export and ONNX, after `revert`, after `fold`, and as they are converted."""

import io

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from distnorm import convert
from distnorm.fold import fold
from distnorm.models import ResNet
from tests.nasty import KINDS

pytestmark = pytest.mark.unit

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(kind):
    torch.manual_seed(0)
    model = ResNet(widths=(4, 6), num_classes=3)
    conversion = convert(model, KINDS[kind])
    for _ in range(2):
        model(torch.randn(8, 1, 8, 8) * 2)
    return model.eval(), conversion


def check_onnx(model):
    expected = model(X).detach()
    file = io.BytesIO()
    torch.onnx.export(model, (X,), dynamo=True, verbose=False).save(file)
    written = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(written)
    (found,) = ReferenceEvaluator(written).run(None, {written.graph.input[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def check_export(model):
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), model(X))


@pytest.mark.parametrize("kind", ["sync", "none"])
def test_a_reverted_model_exports(kind):
    model, conversion = trained(kind)
    conversion.revert()
    check_export(model)
    check_onnx(model)


def test_a_folded_model_exports():
    model, _ = trained("sync")
    assert len(fold(model).folded) == 6
    check_export(model)
    check_onnx(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_exports_in_eval_mode(kind):
    check_export(trained(kind)[0])
