"""What makes `torch.fx` take a layer as one node of its graph, as it takes torch's own."""

from typing import Any, Self

AS_TORCHS = {"__module__": "torch.nn, by distnorm"}
"""Attributes of a layer that is one node.

Every tracer of torch's, torchvision's and timm's asks an *instance* where it comes from: `torch.nn…` is a leaf. The
class keeps its true `__module__`, which pickle needs. Not `torch.nn.modules…`: `torch.compile` would leave out the
guards on the layer's settings.
"""


class TracedAsLeaf:
    """A layer that `torch.fx.symbolic_trace` calls, rather than traces: its forward decides on values and shapes."""

    def __new__(cls, *_args: Any, **_settings: Any) -> Self:
        """Mark the layer; so do a copy and an unpickled one."""
        layer = super().__new__(cls)
        layer.__dict__.update(AS_TORCHS)
        return layer
