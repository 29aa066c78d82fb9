"""One interruption of each kind on a real SLURM; `make campaign` makes ten, at other steps."""

import pytest

from tests.campaign import KINDS, Campaign, main

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def campaign(slurm, tmp_path_factory):
    return Campaign(slurm, tmp_path_factory.mktemp("campaign"))


@pytest.mark.parametrize("times", ["0", "-1", "ten"])
def test_no_times_at_all_is_refused_at_once(capsys, times):
    with pytest.raises(SystemExit):
        main([f"--times={times}"])
    assert f"{times!r} must be a whole number of at least 1, e.g. 10" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_ends_like_one_left_alone(campaign, kind):
    trial = campaign.interrupt(kind, at=45, rank=1)
    assert trial.wrong == ""
    assert trial.is_equal
    assert trial.saved_at >= (1 if kind == "kill" else 45)
