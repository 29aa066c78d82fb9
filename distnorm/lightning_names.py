"""Lightning has two names, `lightning.pytorch` and `pytorch_lightning`: one code, two packages, classes of their own.

The classes of this library subclass those of `lightning.pytorch`, and a Trainer of the other package would refuse them.
"""

import abc
import sys
from typing import Any, Self, TypeGuard, TypeVar

from distnorm.errors import ConfigError

_NAME, _OTHER = "lightning.pytorch.", "pytorch_lightning."
_BASES = ("LightningModule", "LightningDataModule")
_Class = TypeVar("_Class")


class EitherName:
    """A Lightning class of this library whose instances the Trainers of both packages accept.

    The other package is never imported here. Where the program has loaded it by the time that an instance is made, the
    class subclasses, or is registered with, the class of the same name there.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make an instance."""
        _join_other(cls)
        return super().__new__(cls)


def is_either(instance: object, lightning_class: type[_Class]) -> TypeGuard[_Class]:
    """Tell whether an object is an instance of a Lightning class or of its counterpart in the other package."""
    return isinstance(instance, tuple(filter(None, (lightning_class, counterpart(lightning_class)))))


def is_lightnings_own(method: Any) -> bool:
    """Tell whether a method of a module or data module is that of Lightning's base class, under either name.

    Classes that Lightning ships, such as its `BoringModel`, override methods as a user's do.
    """
    function = getattr(method, "__func__", method)
    packages = (sys.modules.get(name.rstrip(".")) for name in (_NAME, _OTHER))
    bases = [getattr(package, base, None) for package in packages for base in _BASES]
    return any(function is getattr(base, getattr(function, "__name__", ""), None) for base in bases)


def check_trainer(trainer: Any, ours: object) -> None:
    """Refuse a Trainer of the other package for a class of this library that could not work with it.

    Raises:
        ConfigError: it is of the other package.
    """
    if any(one.__module__.startswith(_OTHER) for one in type(trainer).__mro__):
        name = type(ours).__name__
        raise ConfigError(
            f"{name} is made of lightning.pytorch, and this Trainer is pytorch_lightning's: that takes {name}'s hooks "
            "for others.\nChange the import of the Trainer: import lightning.pytorch as pl"
        )


def counterpart(lightning_class: type) -> Any:
    """Give the class of the same name in the other package; `None` where that is not loaded."""
    module = sys.modules.get(lightning_class.__module__.replace(_NAME, _OTHER, 1))
    return getattr(module, lightning_class.__name__, None)


def _join_other(cls: type) -> None:
    base = next(one for one in cls.__mro__ if one.__module__.startswith(_NAME))
    other = counterpart(base)
    if other is None or issubclass(cls, other):
        return
    if isinstance(other, abc.ABCMeta):
        other.register(cls)
        return
    ours = next(one for one in reversed(cls.__mro__) if base in one.__bases__ and issubclass(one, EitherName))
    ours.__bases__ = (*ours.__bases__, other)
