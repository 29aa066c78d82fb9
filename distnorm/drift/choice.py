"""Which norms are watched: globs of their names."""

import fnmatch
from collections.abc import Sequence

from torch import nn

from distnorm.drift.capture import WatchedNorm, watched_norms
from distnorm.errors import ConfigError, did_you_mean


def check_globs(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse a choice of layers that names none.

    Raises:
        ConfigError: a glob names no norm that could be watched.
    """
    names = [norm.name for norm in watched_norms(model)]
    for argument, globs in {"include": include, "exclude": exclude}.items():
        if isinstance(globs, str):
            raise ConfigError(f"drift.{argument}={globs!r} must be a list of globs. Give [{globs!r}].")
        for glob in globs:
            if not fnmatch.filter(names, glob):
                some = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
                raise ConfigError(
                    f"drift.{argument}={glob!r} matches no watched layer: there are {some or 'none'}."
                    f"{did_you_mean(glob, names)}\nName a layer or a glob of them: 'drift.{argument}=[layer4.*]'."
                )


def selected(norms: list[WatchedNorm], include: Sequence[str], exclude: Sequence[str]) -> list[WatchedNorm]:
    """Leave out what is not to be watched: what `include`, if it names any, has not, and what `exclude` has."""
    return [
        norm
        for norm in norms
        if (not include or any(fnmatch.fnmatchcase(norm.name, glob) for glob in include))
        and not any(fnmatch.fnmatchcase(norm.name, glob) for glob in exclude)
    ]
