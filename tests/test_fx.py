"""`torch.fx`: a converted model traces as before, node by node, and the traced one trains as the converted one."""

import copy
import io

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from distnorm import convert, decide, fold
from distnorm.models import ResNet
from distnorm.norms import (
    BatchNormLSTMCell,
    BatchRenorm,
    FilterResponseNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    RecurrentBatchNorm,
    SyncBatchNorm,
    ThresholdedLinearUnit,
)
from distnorm.norms.weight import STANDARDIZED
from tests import ranks
from tests.nasty import KINDS, BatchNormAct2d, Swish

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


def net():
    torch.manual_seed(0)
    return ResNet(widths=(4, 8))


def nodes(graph):
    return [(node.op, node.name, str(node.target), str(node.args)) for node in graph.nodes]


def batch(seed=1):
    return torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_traces_to_the_same_nodes(kind, training):
    model = net().train(training)
    expected = nodes(fx.symbolic_trace(model).graph)
    conversion = convert(model, KINDS[kind])
    traced = fx.symbolic_trace(model)
    assert nodes(traced.graph) == expected
    assert torch.equal(copy.deepcopy(traced)(batch()), copy.deepcopy(model)(batch()))
    stored = io.BytesIO()
    torch.save(traced, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert nodes(fx.symbolic_trace(loaded).graph) == expected
    conversion.revert()
    assert nodes(fx.symbolic_trace(model).graph) == expected
    assert not any("__module__" in vars(module) for module in model.modules())


class Plain(fx.Tracer):
    """As torchvision 0.29's NodePathTracer asks: its own leaves, then torch's rule; it names nodes by module path."""

    def __init__(self):
        super().__init__(autowrap_functions=())
        self.path, self.named = "", {}

    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, ()) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        before, self.path = self.path, self.path_of_module(m)
        try:
            if not self.is_leaf_module(m, self.path):
                return forward(*args, **kwargs)
            return self.create_proxy("call_module", self.path, args, kwargs)
        finally:
            self.path = before

    def create_proxy(self, kind, target, args, kwargs, name=None, type_expr=None, *_):
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        self.named[proxy.node] = f"{self.path}.{proxy.node}".lstrip(".") if kind != "call_module" else self.path
        return proxy


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_found_by_node_name(kind):
    model = net()
    convert(model, KINDS[kind])
    model.eval()
    tracer = Plain()
    graph = tracer.trace(model)
    wanted = next(node for node, name in tracer.named.items() if name == "stages.1.0.bn2")
    graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
    graph.output(wanted)
    seen = []
    model.stages[1][0].bn2.register_forward_hook(lambda *given: seen.append(given[2].clone()))
    model(batch())
    features = fx.GraphModule(model, graph)
    features.graph.eliminate_dead_code()
    features.recompile()
    assert torch.equal(features(batch()), seen[0])


def test_each_layer_is_one_node_wherever_it_comes_from():
    layers = [SyncBatchNorm(4), BatchRenorm(4), GhostBatchNorm(4, 2), FrozenBatchNorm(4), FilterResponseNorm(4)]
    layers += [ThresholdedLinearUnit(4), *(cls(4, 4, 1) for cls in STANDARDIZED.values())]
    layers += [SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))]
    for kind in KINDS:
        model = nn.Sequential(BatchNormAct2d(4), Swish(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        convert(model, KINDS[kind])
        layers += [model[2], model[3], *((model[0], model[1]) if kind != "batch" else ())]
    for layer in layers:
        stored = io.BytesIO()
        torch.save(layer, stored)
        stored.seek(0)
        for one in (layer, copy.deepcopy(layer), torch.load(stored, weights_only=False)):
            graph = fx.symbolic_trace(nn.Sequential(one)).graph
            assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"], one
        assert type(layer).__module__.startswith(("distnorm.", "torch.nn."))


class Steps(nn.Module):
    """Layers that take a time step."""

    def __init__(self):
        super().__init__()
        self.norm, self.cell = RecurrentBatchNorm(3, 2), BatchNormLSTMCell(3, 4, 2)

    def forward(self, x):
        state = None
        for time in range(2):
            state = self.cell(self.norm(x, time), state, time)
        return state[0]


def test_recurrent_layers_are_one_node_a_step():
    model, x = Steps(), torch.randn(5, 3)
    traced = fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == ["norm", "cell"] * 2
    assert torch.equal(copy.deepcopy(model)(x), traced(x))


def test_a_folded_layer_forgets_that_it_was_ours():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    convert(model, KINDS["sync"])
    fold(model.eval())
    assert [type(m) for m in model] == [nn.Conv2d, nn.Identity]
    assert not any("__module__" in vars(m) for m in model)


def trained(traces):
    """Body: three steps on two ranks, traced or as converted; all that is learned, and the statistics."""
    model = net()
    convert(model, decide(4, 2, kind="sync"))
    model = fx.symbolic_trace(model) if traces else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(seed=step + 10 * torch.distributed.get_rank())).square().sum().backward()
        optimizer.step()
    return {key: value.tolist() for key, value in sorted(model.state_dict().items())}


def test_a_traced_model_trains_over_ranks_as_the_converted_one():
    found, expected = ranks.run(trained, True, world=2), ranks.run(trained, False, world=2)
    assert found == expected
    assert found[0]["bn.running_mean"] == found[1]["bn.running_mean"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_tracers_continue_to_work(kind):
    """`make_fx` sees through a layer, and `torch.jit.trace` records it."""
    model = net()
    convert(model, KINDS[kind])
    model(batch())
    model.eval()
    expected = model(batch())
    torch.testing.assert_close(make_fx(model)(batch())(batch()), expected)
    torch.testing.assert_close(torch.jit.trace(model, batch())(batch()), expected)
