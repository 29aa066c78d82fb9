"""Every docstring's example runs, and every layer has the sections that a reader needs."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from torch import nn

import distnorm
from distnorm import norms

pytestmark = pytest.mark.unit

MODULES = [importlib.import_module(f"distnorm.norms.{found.name}") for found in pkgutil.iter_modules(norms.__path__)]
LAYERS = [
    layer
    for module in MODULES
    for layer in vars(module).values()
    if inspect.isclass(layer) and issubclass(layer, nn.Module) and layer.__module__ == module.__name__
]


ROOT = Path(distnorm.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(("distnorm", *file.relative_to(ROOT).with_suffix("").parts))
    for file in ROOT.rglob("*.py")
    if ">>> " in file.read_text()
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if not layer.__name__.startswith("Abstract")], ids=lambda layer: layer.__name__
)
def test_a_layer_says_what_it_takes_exchanges_shows_and_comes_from(layer):
    for section in ("Shape:", "Collective:", "Example:", "Source:"):
        assert section in layer.__doc__, section
