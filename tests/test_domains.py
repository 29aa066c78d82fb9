"""Several sets of statistics by name: measured on unlabelled target data, saved, loaded, used, refused."""

import pytest
import torch
from torch import nn

from distnorm import ConfigError, evaluation_statistics
from distnorm.calibration import calibrate
from distnorm.domains import load_statistics, save_statistics

pytestmark = pytest.mark.unit


def classes_of(domain_shift, count=400):
    """Two classes far apart in one direction; the whole domain is shifted and stretched."""
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(count) % 2
    x = torch.randn(count, 2, generator=generator) * 0.3
    x[:, 0] += 2.0 * y - 1
    return x * (1 + domain_shift) + 5 * domain_shift, y


def test_statistics_of_the_target_restore_the_accuracy(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        model[1].bias.zero_()
    (source, y), (sketch, _) = classes_of(0.0), classes_of(1.0)
    named = {"source": calibrate(model, source.split(50)), "sketch": calibrate(model, sketch.split(50))}
    save_statistics(tmp_path / "statistics.pt", named)
    loaded = load_statistics(tmp_path / "statistics.pt")

    def accuracy(x, name):
        with evaluation_statistics(model.eval(), loaded[name]):
            return (model(x).argmax(1) == y).float().mean().item()

    assert accuracy(source, "source") == pytest.approx(1, abs=0.01)
    assert accuracy(sketch, "source") == pytest.approx(0.5, abs=0.05)
    assert accuracy(sketch, "sketch") == pytest.approx(1, abs=0.01)
    assert model[0].running_mean.tolist() == [0, 0]
    assert list(loaded) == ["source", "sketch"]
    for name, statistics in named.items():
        assert all(torch.equal(loaded[name][key], value) for key, value in statistics.items())


def test_a_write_that_is_cut_short_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "statistics.pt"
    save_statistics(path, {"a": {"0.running_mean": torch.ones(2)}})

    def torn(content, place):
        place.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        save_statistics(path, {"b": {"0.running_mean": torch.ones(2)}})
    assert list(load_statistics(path)) == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.pt"]


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path):
    save_statistics(tmp_path / "s.pt", {"source": {}, "sketch": {}})
    with pytest.raises(ConfigError, match=r"named 'sketches', only 'source', 'sketch'\. Did you mean 'sketch'.*\nMeas"):
        load_statistics(tmp_path / "s.pt")["sketches"]


def test_statistics_of_another_model_are_refused_and_listed():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))
    other = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(4))
    other.add_module("head", nn.BatchNorm1d(1))
    found = calibrate(other, [torch.randn(5, 2)], forward=lambda m, x: m[0](x)) | {
        "1.running_mean": torch.zeros(4),
        "head.running_var": torch.ones(1),
    }
    with (
        pytest.raises(
            ConfigError,
            match=r"fit Sequential: 1\.running_mean is \[4\], in the model \[3\]; head\.running_var is not in the model"
            r"\.\nUse those of calibrate\(\) on the same model",
        ),
        evaluation_statistics(model, found),
    ):
        pass
    assert model[0].running_mean.tolist() == [0, 0], "nothing was written"


def test_many_differences_are_counted():
    with (
        pytest.raises(ConfigError, match=r"a3 is not in the model, and 5 more\.\n"),
        evaluation_statistics(nn.Sequential(nn.BatchNorm1d(2)), {f"a{n}": torch.zeros(1) for n in range(9)}),
    ):
        pass


@pytest.mark.parametrize(
    ("statistics", "words"),
    [({}, "no statistics"), ({"0.running_mean": torch.ones(2)}, "statistics without a name")],
)
def test_nameless_statistics_are_refused(tmp_path, statistics, words):
    with pytest.raises(ConfigError, match=rf'got {words}\. Name them: {{"source": statistics}}'):
        save_statistics(tmp_path / "s.pt", statistics)


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no file '.*absent\.pt'\. Give the path that save_statistics"):
        load_statistics(tmp_path / "absent.pt")
    text, weights = tmp_path / "notes.md", tmp_path / "weights.pt"
    text.write_text("# notes")
    torch.save({"state_dict": {}}, weights)
    for path in (text, weights):
        with pytest.raises(
            ConfigError, match=r"holds no statistics by name\. Give a file of save_statistics\(\); a run"
        ):
            load_statistics(path)


GOOD = {"a": {"0.running_mean": torch.ones(2)}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD, "file.pt"), r"got a str for the statistics\. Give it the file first"),
        ((GOOD, GOOD), r"got a dict for the path\. Give it the file first"),
        (("nowhere/file.pt", GOOD), r"no folder 'nowhere' to save statistics in\. Make it before"),
        (
            ("file.pt", {"a": {"0.running_mean": [1.0]}}),
            r"got a list for '0.running_mean' of 'a'\. Give it the tensors",
        ),
    ],
    ids=["swapped", "path", "folder", "values"],
)
def test_what_cannot_be_saved_is_refused_in_words(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        save_statistics(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "image,label\n", "# text", "c__main__\nx\n"])
def test_a_text_file_is_refused_in_words(tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"labels\.csv' holds no statistics by name\. Give a file of save_statistics"):
        load_statistics(tmp_path / "labels.csv")


def test_a_name_that_is_missing_never_becomes_pooled_statistics(tmp_path):
    save_statistics(tmp_path / "statistics.pt", {"sketch": GOOD["a"]})
    loaded = load_statistics(tmp_path / "statistics.pt")
    with pytest.raises(ConfigError, match=r"no statistics named 'skech', only 'sketch'\. Did you mean 'sketch'"):
        loaded.get("skech")
    assert loaded.get("skech", None) is None
    assert loaded.get("sketch") is loaded["sketch"]


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ("sketch", r"got 'sketch', that is no dictionary of statistics\. Give it.*\[name\]"),
        ({"0.running_mean": 1.0}, r"0\.running_mean is a float, no tensor\.\nUse those of calibrate"),
    ],
)
def test_evaluation_takes_statistics_only(statistics, message):
    with pytest.raises(ConfigError, match=message), evaluation_statistics(nn.Sequential(nn.BatchNorm1d(1)), statistics):
        pass
