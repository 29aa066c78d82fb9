"""Models that make surgery hard, stand-ins for classes of packages that need not be installed, and pictures of both."""

import copy
import sys
import types

import torch
from torch import nn
from torch.nn import functional

from distnorm import NormSpec
from distnorm.models import ResNet
from distnorm.norms.surgery import register_norm

KINDS = {
    "batch": NormSpec("batch", 8),
    "sync": NormSpec("sync", 32, sync_ranks=4, world_size=4, device_batch=8),
    "ghost": NormSpec("ghost", 2, ghost_batch=2),
    "renorm": NormSpec("renorm", 8),
    "frozen": NormSpec("frozen", 1),
    "group": NormSpec("group", 1, groups=4),
    "group_ws": NormSpec("group_ws", 1, groups=4),
    "layer": NormSpec("layer", 1),
    "instance": NormSpec("instance", 1),
    "response": NormSpec("response", 1),
    "none": NormSpec("none", 1),
}


def _module(name, **classes):
    """Put classes where the real package has them, by name alone."""
    module = types.ModuleType(name)
    for cls_name, cls in classes.items():
        cls.__module__, cls.__qualname__ = name, cls_name
        setattr(module, cls_name, cls)
    sys.modules.setdefault(name, module)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm 1.0.31 has it, less what it does for TorchScript: an activation that works in place."""

    def __init__(self, num_features, act_layer=nn.ReLU, drop_layer=None, **kwargs):
        super().__init__(num_features, **kwargs)
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        self.act = act_layer(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm 1.0.31 has it: its conversion hands `act` and `drop` over."""

    def forward(self, x):
        x = super().forward(x)
        if hasattr(self, "drop"):
            x = self.drop(x)
        if hasattr(self, "act"):
            x = self.act(x)
        return x


class FrozenBatchNorm2d(nn.Module):
    """As torchvision 0.29 has it: four buffers."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        w, b, var, mean = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


_module("timm.layers.norm_act", BatchNormAct2d=BatchNormAct2d, SyncBatchNormAct=SyncBatchNormAct)
_module("torchvision.ops.misc", FrozenBatchNorm2d=FrozenBatchNorm2d)


class Constants(nn.Module):
    """Four buffers, as every detection library has them."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def wide(self):
        return (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var))


class DetrFrozenBatchNorm2d(Constants):
    """As transformers 4.57 has it, in DETR and a dozen models that copy it: eps in the code."""

    def forward(self, x):
        weight, bias, mean, var = self.wide()
        epsilon = 1e-5
        scale = weight * (var + epsilon).rsqrt()
        return x * scale + (bias - mean * scale)


class MaskFrozenBatchNorm2d(Constants):
    """As maskrcnn-benchmark has it: no eps."""

    def forward(self, x):
        if x.dtype == torch.float16:
            self.weight = self.weight.half()
        weight, bias, mean, var = self.wide()
        scale = weight * var.rsqrt()
        return x * scale + (bias - mean * scale)


class Detectron2FrozenBatchNorm2d(Constants):
    """As detectron2 has it: two ways, and a variance that with eps is 1."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__(num_features)
        self.num_features, self.eps = num_features, eps
        self.running_var = torch.ones(num_features) - eps

    def forward(self, x):
        if x.requires_grad:
            weight, bias, mean, var = self.wide()
            scale = weight * (var + self.eps).rsqrt()
            return x * scale.to(x.dtype) + (bias - mean * scale).to(x.dtype)
        held = self.running_mean, self.running_var, self.weight, self.bias
        return functional.batch_norm(x, *held, training=False, eps=self.eps)


FROZEN = {"DETR": DetrFrozenBatchNorm2d, "maskrcnn": MaskFrozenBatchNorm2d, "detectron2": Detectron2FrozenBatchNorm2d}


def trained_constants(layer):
    """A frozen norm with values, its variances so small that eps shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            getattr(layer, name).normal_()
        layer.running_var.uniform_(1e-3, 2e-3)
    return layer


class Swish(nn.BatchNorm2d):
    """What a user registers."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.gate = nn.SiLU()

    def forward(self, x):
        return self.gate(super().forward(x))


register_norm(Swish, after=("gate",))


class Renamed(nn.BatchNorm2d):
    """A subclass that only says how it is built: it needs no registration."""

    def __init__(self, num_features):
        super().__init__(num_features, eps=1e-3, momentum=0.03)


class OwnForward(nn.BatchNorm2d):
    """One that nobody registered."""

    def forward(self, x):
        return super().forward(x).relu()


class Nasty(nn.Module):
    """Shared norms, norms in a list, a dict and a plain python list, a frozen one, an unaffine one, tied weights."""

    def __init__(self):
        super().__init__()
        self.shared = nn.BatchNorm2d(8)
        self.again = self.shared
        self.in_list = nn.ModuleList([nn.Conv2d(3, 8, 3), self.shared, nn.BatchNorm2d(8, affine=False)])
        self.in_dict = nn.ModuleDict({"norm": nn.BatchNorm2d(8, momentum=None).eval()})
        self.in_dict["norm"].weight.requires_grad_(False)
        self.held = [self.in_dict["norm"]]
        self.tied = nn.BatchNorm2d(8)
        self.tied.weight = self.shared.weight
        self.deep = nn.Sequential(nn.Sequential(nn.ModuleDict({"a": nn.Sequential(Swish(8), Renamed(8))})["a"]))

    def forward(self, x):
        for layer in self.in_list:
            x = layer(x)
        return self.tied(self.deep(self.again(self.held[0](x)))).mean((2, 3))


class Watched(nn.Module):
    """Hooks of every sort on a norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), []
        self.norm.register_forward_hook(lambda *_: self.calls.append("forward"))
        self.norm.register_forward_hook(lambda *_, **__: self.calls.append("kwargs"), with_kwargs=True)
        self.norm.register_forward_pre_hook(lambda *_: self.calls.append("pre"))
        self.norm.register_full_backward_hook(lambda *_: self.calls.append("backward"))
        self.norm.register_state_dict_post_hook(lambda *_: self.calls.append("state_dict"))
        self.norm.register_load_state_dict_pre_hook(lambda *_: self.calls.append("load"))

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))


def with_statless():
    """A norm without running statistics, that can be no constants."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8))


MODELS = {
    "nasty": Nasty,
    "watched": Watched,
    "statless": with_statless,
    "resnet": lambda: ResNet(widths=(8, 16), in_channels=3),
    "root": lambda: nn.BatchNorm2d(3),
    "weight only": lambda: nn.Sequential(nn.BatchNorm2d(3, bias=False)),
    "torchs synchronized": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.SyncBatchNorm(8)).eval(),
    "timm": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct2d(8, nn.ReLU6, drop_layer=nn.Dropout2d)).eval(),
    "constants": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8), nn.BatchNorm2d(8)),
    "double": lambda: ResNet(widths=(4, 8), in_channels=3).double(),
    "half": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).to(torch.bfloat16),
    "meta": lambda: ResNet(widths=(4, 8), in_channels=3).to("meta"),
}


def input_of(model):
    """A batch for a model above, in its dtype and on its device."""
    like = next(iter(model.parameters()))
    return torch.randn(4, 3, 12, 12).to(like)


def trained(model):
    """The model once it has seen data, and has something to lose."""
    if not next(model.parameters()).is_meta:
        modes = {m: m.training for m in model.modules()}
        synchronized = any(isinstance(m, nn.SyncBatchNorm) for m in modes)
        for _ in range(0 if synchronized else 2):
            model(input_of(model) * 2 + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter) * 0.1)
        assert modes == {m: m.training for m in model.modules()}
    return model


def picture(model):
    """All that must survive: classes, attributes, objects, their order, hooks, modes."""
    return {
        name: (
            type(module),
            {k: v for k, v in module.__dict__.items() if k not in {"_parameters", "_buffers", "_modules", "calls"}},
            [(k, id(p), None if p is None else p.requires_grad) for k, p in module._parameters.items()],
            [(k, id(b)) for k, b in module._buffers.items()],
            [(k, id(m)) for k, m in module._modules.items()],
            {k: list(v) for k, v in module.__dict__.items() if k.endswith("_hooks") and v is not None},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def values(model):
    """The state, bit for bit."""
    return {k: copy.deepcopy(v) for k, v in model.state_dict().items()}


def same_values(found, expected):
    """Tell whether two states have the same entries in the same order, and the same bits."""
    same = [a.is_meta or torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True)]
    return list(found) == list(expected) and all(same)
