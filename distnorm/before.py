"""What stands before each norm of a model: vectors or maps, and a convolution that it alone takes.

By `torch.fx` where it can trace, the model or a part of it; by the order in which layers are registered elsewhere.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from torch import nn

from distnorm.changes import channels_of, dimension_of
from distnorm.feeding import MAPS, VECTORS, fed_by_order
from distnorm.flow import certain_pairs, traced_parts
from distnorm.norms.weight import STANDARDIZED


@dataclasses.dataclass(frozen=True)
class Before:
    """What stands before the norms of a model.

    Attributes:
        pairs: of a norm, the layer whose output it takes, alone, and nothing else.
        fed: of a norm, what it takes; left out where nobody knows.
    """

    pairs: dict[nn.Module, nn.Module]
    fed: dict[nn.Module, str]

    @classmethod
    def of(cls, model: nn.Module, norms: list[nn.Module]) -> "Before":
        """Look at a model.

        Args:
            model: is not run, nor changed.
            norms: those of its norms that are asked for; without any, nothing is traced.
        """
        if not norms:
            return cls({}, {})
        pairs: dict[nn.Module, nn.Module] = {}
        fed: dict[nn.Module, str] = {}
        covered: set[nn.Module] = set()
        for part, flows in traced_parts(model):
            covered.update(part.modules())
            pairs |= {after: layer for layer, after in certain_pairs(flows)}
            for flow in flows:
                fed |= {norm: VECTORS if VECTORS in found else MAPS for norm, found in flow.fed.items() if any(found)}
        leaves = [module for module in model.modules() if not any(True for _ in module.children())]
        for norm in norms:
            if norm not in fed and norm in leaves:
                fed[norm] = fed_by_order(norm, leaves)
        pairs |= {after: layer for layer, after in _registered_pairs(model) if not covered & {layer, after}}
        return cls({norm: layer for norm, layer in pairs.items() if norm in norms}, fed)

    def dimension(self, norm: nn.Module) -> str:
        """Tell the dimension for `NormSpec.of`: `vector`, `1d`, `2d`, `3d`, or empty.

        A batch norm of vectors is one by its class (`nn.BatchNorm1d`), unless it is fed maps; one of any dimension is,
        where it is fed vectors.
        """
        own, fed = dimension_of(norm), self.fed.get(norm, "")
        if own in {"2d", "3d"} or fed == MAPS:
            return own
        return "vector" if own or fed == VECTORS else ""

    def convolution(self, norm: nn.Module) -> tuple[nn.Module | None, str]:
        """Give the convolution before a norm, whose scale the norm takes out; or `None`, and why there is none."""
        layer = self.pairs.get(norm)
        if layer is None:
            return None, "no convolution stands alone before it"
        if type(layer) not in STANDARDIZED:
            return None, f"the {type(layer).__name__} before it keeps its weights"
        if channels_of(layer) != channels_of(norm):
            return None, f"the {type(layer).__name__} before it has {channels_of(layer)} channels"
        if layer.get_parameter("weight").numel() <= channels_of(layer):  # a filter of one weight has no variance
            return None, f"the {type(layer).__name__} before it has filters of one weight"
        return layer, ""


def _registered_pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Guess which layer's output another takes: registered right before it, in the same module."""
    for parent in model.modules():
        children = list(parent.children())
        yield from itertools.pairwise(children)
