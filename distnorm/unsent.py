"""The fast way to keep running statistics each rank's own: name them to DDP, which leaves them out of what it sends.

DDP reads the names from the very module that it wraps, when it is constructed, and leaves them out there too: constants
must stay in, for a user who loads weights on rank 0 alone relies on that first sending.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import collectives
from distnorm.norms.apart import STATISTICS, has_hook, is_ours, look_again, set_hook, would_share

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where DDP looks for names to leave out; torch has no public name for it."""

OURS = "_running_stats_to_ignore"
"""Which of the names there a conversion put there."""

_WRAPPED = ("", "_orig_mod.", "_checkpoint_wrapped_module.")
"""What wrapping the model puts before its names: nothing, `torch.compile`, `checkpoint_wrapper`."""


class Unsent:
    """The running statistics of a converted model that DDP leaves alone; can be undone.

    The names of statistics that may differ between ranks go into the list that DDP reads, beside the user's own; norms
    that stay torch's get a forward pre-hook, which watches where the names do not reach, if there are several ranks.

    Args:
        model: as the conversion left it.
        world_size: how many ranks the decision was made for, where no process group says it; 1 if it may be any number.
    """

    def __init__(self, model: nn.Module, world_size: int) -> None:
        self.module = model
        self._before = {key: vars(model)[key] for key in (IGNORED, OURS) if key in vars(model)}
        running = collectives.world_size()
        world = world_size if running == 1 else running
        earlier = vars(model).get(OURS, ())
        users = [name for name in getattr(model, IGNORED, ()) if name not in earlier]
        self._names = tuple(dict.fromkeys(name for name in _names(model, world) if name not in users))
        if self._names or earlier:
            vars(model).update({IGNORED: [*users, *self._names], OURS: self._names})
        self._hooked = {norm: has_hook(norm) for norm in model.modules() if has_hook(norm) != _needs_hook(norm, world)}
        for norm, was in self._hooked.items():
            set_hook(norm, on=not was)
        look_again()

    def changed_since(self) -> str:
        """Say nothing: a list that the user has changed meanwhile is no obstacle."""
        return ""

    def restore(self, follow: Callable[[Tensor], Tensor]) -> None:
        """Give the model its list back: the very object, unless the user has changed it meanwhile."""
        for norm, was in self._hooked.items():
            set_hook(norm, on=was)
        look_again()
        state: dict[str, Any] = vars(self.module)
        if OURS not in state:
            return
        earlier = self._before.get(OURS, ())
        users = [name for name in state.get(IGNORED, ()) if name not in self._names]
        del state[OURS]
        state.pop(IGNORED, None)
        state.update(self._before)
        if set(users) != set(getattr(self.module, IGNORED, ())) - set(earlier):
            state[IGNORED] = [*users, *earlier]


def _names(model: nn.Module, world: int) -> Iterator[str]:
    """Name the statistics that move and that not all ranks share, as DDP will call them."""
    for name, module in model.named_modules(remove_duplicate=False):
        if _differs(module, world) and module.momentum != 0 and (module.training or not model.training):
            buffers = (f"{name}.{key}".lstrip(".") for key in STATISTICS if module._buffers.get(key) is not None)  # noqa: SLF001
            yield from (f"{prefix}{buffer}" for buffer in buffers for prefix in _WRAPPED)


def _needs_hook(module: nn.Module, world: int) -> bool:
    return world > 1 and _differs(module, world) and not is_ours(module)


def _differs(module: nn.Module, world: int) -> bool:
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return False
    return not would_share(module, None if world == 1 else world)
