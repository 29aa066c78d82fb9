"""`distnorm calibrate`: another domain's statistics for a trained run, by name, in its folder."""

import numpy as np
import pytest
import torch

import distnorm
from distnorm import ConfigError, cli
from distnorm.data import DigitsData
from distnorm.domains import load_statistics
from distnorm.launch.adaptation import adapt
from distnorm.models import ResNet
from tests import runs

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    runs.in_pool(folder, 1, "norm=batch", "norm.evaluation=running")
    runs.RunFolder(folder).write_settings(runs.composed("norm=batch").with_batches(1))
    return folder


def test_the_first_layer_holds_the_moments_of_what_it_was_given(run, capsys):
    cli.main(["calibrate", str(run), "data.augmentation=none", "--name", "clean", "--num-samples", "64"])
    cli.main(["calibrate", str(run), "--name", "hard", "--num-samples", "32"])
    assert "statistics 'hard' are in" in capsys.readouterr().out
    sets = load_statistics(run / "statistics.pt")
    assert set(sets) == {"clean", "hard"}
    model = distnorm.load(ResNet(), run)
    data = DigitsData(device_batch=16, augmentation="none")
    data.setup("fit")
    images = torch.cat([images for (images, _), _ in zip(data.train_dataloader(), range(4), strict=False)])
    first = model.conv(images).detach().double().numpy().transpose(1, 0, 2, 3).reshape(16, -1)
    np.testing.assert_allclose(sets["clean"]["bn.running_mean"], first.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sets["clean"]["bn.running_var"], first.var(1, ddof=1), rtol=1e-4)
    assert not torch.allclose(sets["clean"]["bn.running_var"], sets["hard"]["bn.running_var"], rtol=0.1)
    with distnorm.evaluation_statistics(model, sets["hard"]):
        assert torch.equal(model.bn.running_var, sets["hard"]["bn.running_var"])


@pytest.mark.parametrize(
    ("data", "value", "remedy"),
    [
        (["augmentation=none"], "'augmentation=none' is no override of the data", "data.<key>=<value>"),
        (["data.augmentatoin=none"], "data.augmentatoin", "Did you mean"),
        (["data.augmentation"], "'data.augmentation' is no override", "data.<key>=<value>"),
        (["data.augmentation=[a"], "data.augmentation=[a", "Give each key a plain value"),
    ],
)
def test_what_is_no_override_of_the_data_is_refused(run, data, value, remedy):
    with pytest.raises(ConfigError) as error:
        adapt(run, "x", data)
    assert value in str(error.value)
    assert remedy in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.yaml\. Give one that train.py printed"):
        adapt(tmp_path, "x")
