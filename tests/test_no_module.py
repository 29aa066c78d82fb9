"""What takes a model says so where it is given something else."""

import pytest
from torch import nn

import distnorm

pytestmark = pytest.mark.unit

CALLS = {
    "convert": lambda model: distnorm.convert(model, distnorm.decide(8, 2)),
    "check_ranks": distnorm.check_ranks,
    "pool_running_stats": distnorm.pool_running_stats,
    "evaluation_statistics": lambda model: distnorm.evaluation_statistics(model).__enter__(),
    "load": lambda model: distnorm.load(model, nn.Linear(1, 1)),  # the arguments in the wrong order
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("given", "said"),
    [("runs/mine", r"got 'str'.*Give it the model"), (nn.Linear, r"got the class Linear.*Linear\(…\)")],
)
def test_another_thing_than_a_model_is_refused(name, given, said):
    with pytest.raises(distnorm.ConfigError, match=rf"^{name}\(\) {said}"):
        CALLS[name](given)
