"""Callbacks of users' own, and Lightning's other one, that swap weights round an evaluation: right, or said."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging

from distnorm import ConfigError
from distnorm.population import own_running_stats
from tests import ranks
from tests.averaged import Averaged, weights_of
from tests.test_callbacks import fit, spec_of

pytestmark = pytest.mark.unit

SAID = "does not use the precise statistics of its weights: the weights"


class OwnAverage(Callback):
    """An average as people write it: a copy of the model, whose state is loaded for the validation."""

    def __init__(self, swaps_at, buffers):
        self._buffers = buffers
        start, end = (f"on_validation_{'epoch_' if swaps_at == 'epoch' else ''}{side}" for side in ("start", "end"))
        setattr(self, start, self._in)
        setattr(self, end, self._out)

    def on_fit_start(self, trainer, pl_module):
        """Copy the model."""
        self._average = copy.deepcopy(pl_module.model)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Average, also the buffers if they say so."""
        state = pl_module.model.state_dict() if self._buffers else dict(pl_module.model.named_parameters())
        with torch.no_grad():
            for key, value in self._average.state_dict().items():
                if key in state and value.is_floating_point():
                    value.lerp_(state[key], 0.2)

    def _state(self, model):
        return model.state_dict() if self._buffers else {k: v.detach() for k, v in model.named_parameters()}

    def _in(self, trainer, pl_module):
        self._kept = {key: value.clone() for key, value in self._state(pl_module.model).items()}
        pl_module.model.load_state_dict(self._state(self._average), strict=False)

    def _out(self, trainer, pl_module):
        pl_module.model.load_state_dict(self._kept, strict=False)


def trained(folder, order, swaps_at, buffers):
    task, own = Averaged(), OwnAverage(swaps_at, buffers)
    listed = [own] if order == "before" else []
    if not listed:
        task.configure_callbacks = lambda: [own]
    fit(spec_of("precise"), task, *listed, folder=folder, max_steps=6)
    plain, _ = fit(spec_of("precise"), Averaged(), max_steps=6)
    return task.met, task.steps, task.truth(), plain.steps


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("swaps_at", ["start", "epoch"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_an_average_of_ones_own_is_evaluated_right_or_it_is_said(tmp_path, caplog, order, swaps_at, buffers):
    met, steps, truth, plain = trained(str(tmp_path), order, swaps_at, buffers)
    right = order == "before" and swaps_at == "start"
    for _, (mean, _), expected in met:
        assert np.allclose(mean, expected.mean(0), rtol=1e-5, atol=1e-6) == right
    assert caplog.text.count(SAID) == (not right), "said once"
    assert "before EvaluationStatistics in callbacks=[…] and let it swap in on_validation_start" in caplog.text or right
    for (weights, statistics), (plain_weights, plain_statistics) in zip(steps, plain, strict=True):
        assert torch.equal(weights, plain_weights), "training is not moved by a bit"
        assert all(torch.equal(value, plain_statistics[key]) for key, value in statistics.items())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(
        saved["state_dict"]["model.1.running_mean"].double(), truth.mean(0), rtol=1e-5, atol=1e-6
    )
    own = saved["distnorm"]["rank_statistics"][0]
    assert all(torch.equal(own[f"model.{key}"], value) for key, value in steps[-1][1].items())


def test_nothing_is_said_where_nothing_swaps(caplog):
    fit(spec_of("precise"), Averaged(), max_steps=6)
    assert SAID not in caplog.text


def test_weights_that_are_not_numbers_are_no_other_weights(caplog):
    """A training that diverged has nan, which differs from itself."""
    task = Averaged()
    task.x = task.x * float("nan")
    fit(spec_of("pooled"), task, max_steps=4)
    assert not torch.isfinite(weights_of(task.model)).all()
    assert "does not use" not in caplog.text
    assert len(task.met) == 2


def stochastic(evaluation):
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1, device=None)
    task = Averaged()
    ends = []
    task.on_train_epoch_end = lambda: ends.append(weights_of(task.model))
    _, trainer = fit(spec_of(evaluation), task, averaging, max_epochs=4, max_steps=-1, val_check_interval=1.0)
    trainer.test(task, verbose=False)
    return weights_of(task.model), ends, task.met[-1], own_running_stats(task.model)


@pytest.mark.parametrize("evaluation", ["precise", "pooled"])
def test_lightnings_stochastic_average_is_evaluated_with_its_own_statistics(evaluation):
    """It averages the starts of epochs, and its last epoch measures the statistics of each rank with that average."""
    found = ranks.run(stochastic, evaluation, world=2)
    left = [own for *_, own in found]
    for weights, _, (tested, (mean, var), _), _ in found:
        assert torch.equal(weights, tested)
        if evaluation == "precise":
            truth = np.concatenate([met[2].numpy() for *_, met, _ in found])
            expected = truth.mean(0), truth.var(0, ddof=1)
        else:
            means, variances = (torch.stack([own[f"1.running_{k}"] for own in left]).double() for k in ("mean", "var"))
            expected = means.mean(0), (variances + (means - means.mean(0)).square()).mean(0)
        np.testing.assert_allclose(mean, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(var, expected[1], rtol=1e-5)
        assert torch.equal(mean, found[0][2][1][0])


def test_constants_and_a_last_epoch_that_measures_them_are_refused():
    with pytest.raises(
        ConfigError, match=r"norm\.frozen_last=0\.2 keeps.*StochasticWeightAveraging resets.*\n.*EMAWeig"
    ):
        fit(spec_of("pooled", 0.2), Averaged(), StochasticWeightAveraging(0.05), max_epochs=3, max_steps=-1)
