"""A run's drift as arrays: the same from its record and from wandb's file, over requeues, and of what a kill left."""

import json
import time

import numpy as np
import pytest

from distnorm.drift import events, history, record
from distnorm.drift.report import tables
from distnorm.drift.report.verdict import open_alarms, verdict
from distnorm.errors import ConfigError
from distnorm.launch.run_dir import RunFolder
from distnorm.tracking import make_loggers
from tests import logged, told
from tests.runs import composed

pytestmark = pytest.mark.unit

CONFIG = {"data": {"a": [1, 2.5, None]}, "decision": {"kind": "sync"}, "decision_layers": [{"name": "bn1", "was": "x"}]}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with a record and wandb's files, of a run that was requeued and went over two steps again."""
    run = RunFolder(tmp_path_factory.mktemp("both"))
    for first, layers in ((10, ("bn1", "bn2")), (40, ("bn0", "bn2"))):
        made = make_loggers(composed("logger.mode=offline").logger, run, CONFIG, is_first=True)
        taken = [told.watched(*layers, step=first - 10)]
        taken += [told.measured(step, seed=first) for step in range(first, first + 50, 10)]
        taken += [told.alarm(50), told.snapshot(first), told.alarm(50 + first, state="cleared")]
        for event in taken:
            for logger in made:
                logger.take(event)
                logger.log_metrics({"train/loss": first / (event.step + 1), "epoch": 0}, step=event.step)
        for logger in made:
            logger.log_metrics({"val/loss": float("nan")}, step=50)
            logger.finalize("success")
        logged.finish(made[1])
        time.sleep(1)  # wandb names its folders by the second
    return run.path


def test_the_record_and_wandbs_file_give_the_same(both):
    newest = max(both.glob("wandb/offline-run-*"))
    from_record = history.read(both)
    for path in (newest, both / "wandb" / "latest-run"):
        from_wandb = history.read(path)
        for field in vars(from_record):
            np.testing.assert_equal(getattr(from_wandb, field), getattr(from_record, field), err_msg=field)
    assert from_record.name == both.name
    assert from_record.about == {"run": both.name, **CONFIG}
    assert from_record.lost == ()
    assert history.read(both / "record.jsonl").steps.tolist() == from_record.steps.tolist()
    one_of_two = history.read(next(newest.glob("*.wandb")))
    assert one_of_two.steps.tolist() == [40, 50, 60, 70, 80]


def test_after_a_requeue_the_later_values_hold_and_layers_are_aligned_by_name(both):
    read = history.read(both)
    assert [layer.name for layer in read.layers] == ["bn0", "bn2", "bn1"]
    assert read.steps.tolist() == [10, 20, 30, 40, 50, 60, 70, 80]
    first = {step: told.measured(step, seed=10) for step in (10, 20, 30, 40, 50)}
    second = {step: told.measured(step, seed=40) for step in (40, 50, 60, 70, 80)}
    for key in ("jeffreys", "between_ranks"):
        expected = np.full((3, 8), np.nan)
        for place, layer, runs in ((2, 0, (first,)), (1, 1, (first, second)), (0, 0, (second,))):
            for run in runs:
                for step, measured in run.items():
                    expected[place, step // 10 - 1] = measured.values[key][layer]
        np.testing.assert_allclose(read.values[key], expected, rtol=6e-4)
    worst = read.worst_channels["jeffreys"]
    assert worst.dtype == np.int64
    assert worst[0, :3].tolist() == [-1, -1, -1]
    assert worst[0, 3] == second[40].worst_channels["jeffreys"][0]
    assert read.alarms == (told.alarm(50), told.alarm(90, state="cleared"))  # and not the first run's of step 60
    assert [snapshot.step for snapshot in read.snapshots] == [10, 40]
    steps, losses = read.scalars["train/loss"]
    assert steps.tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    np.testing.assert_allclose(losses, [(10 if step < 30 else 40) / (step + 1) for step in steps])
    assert np.isnan(read.scalars["val/loss"][1]).all()
    assert set(read.scalars) == {"train/loss", "val/loss", "epoch"}


def test_alarms_of_before_a_requeue_have_ended_and_those_of_steps_it_went_back_over_are_gone(tmp_path):
    writer = record.Record(tmp_path / "record.jsonl")
    before, gone, again = told.alarm(20), told.alarm(50, "bn2"), told.alarm(60, "bn2")
    for event in (told.watched("bn1", "bn2"), before, gone, told.watched("bn1", "bn2", step=40)):
        writer.take(event)
    read = history.read(tmp_path)
    assert (read.alarms, read.ended) == ((before,), (before,))
    assert (open_alarms(read), verdict(read).state) == ([], "recovered")
    assert verdict(read).sentence.endswith("(worst 0.7 in bn1), and no alarm was raised again after a requeue")
    assert "raised, before a requeue" in tables.alarms([read])
    writer.take(again)
    read = history.read(tmp_path)
    assert (read.alarms, read.ended) == ((before, again), (before,))
    assert (open_alarms(read), verdict(read).state) == (["lag"], "alarm")
    assert [state in tables.alarms([read]) for state in (">raised, before a requeue<", ">raised<")] == [True, True]


def test_an_alarm_before_the_first_list_of_layers_stands(tmp_path):
    writer = record.Record(tmp_path / "record.jsonl")
    for event in (told.alarm(5), told.watched("bn1", step=10), told.measured(10, 1)):
        writer.take(event)
    assert open_alarms(history.read(tmp_path)) == ["lag"]


def test_what_is_not_finite_or_not_there_is_nan(tmp_path):
    writer = record.Record(tmp_path / "record.jsonl")
    writer.take(told.watched("a", "b"))
    writer.take(events.Measurement(10, {"lag": [float("nan"), float("-inf")]}, {"lag": [-1, 3]}))
    writer.take(events.Measurement(20, {"kl": [9.0, 9.0]}))
    writer.take(events.Measurement(20, {"kl": [1.0, 2.0]}))  # the later one holds
    writer.take(events.Measurement(10, {"kl": [3.0, 4.0]}))  # a second measurement of one step, of other measures
    read = history.read(tmp_path)
    np.testing.assert_equal(read.values["lag"], [[np.nan, np.nan], [-np.inf, np.nan]])
    np.testing.assert_equal(read.values["kl"], [[3, 1], [4, 2]])
    np.testing.assert_equal(read.worst_channels["lag"], [[-1, -1], [3, -1]])
    assert read.world_size == 2


def test_what_a_kill_or_a_bad_disk_left_is_read_and_the_loss_told(tmp_path):
    path = tmp_path / "record.jsonl"
    writer = record.Record(path)
    writer.take(told.measured(5))  # before the list of layers
    writer.take(told.watched("a", "b"))
    writer.take(told.measured(10))
    writer.take(told.measured(20, layers=3))  # of layers whose list is lost
    path.write_bytes(path.read_bytes() + b'{"step": 30, "watched": {"x": 1}}\n{"step": 40, "dri')
    read = history.read(path)
    assert read.steps.tolist() == [10]
    torn, unread = read.lost
    assert torn == "record.jsonl: 1 of 7 lines cannot be read, the last one, cut short."
    assert unread == "3 events could not be read, or the list of their layers is lost."


def test_a_record_of_numbers_alone_has_no_layers(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_text('{"schema": 1, "time": 1.0, "run": "old"}\n{"step": 2, "time": 2.0, "loss": 1.5}\n')
    read = history.read(tmp_path)
    assert (read.name, read.layers, read.values, len(read.steps)) == ("old", (), {}, 0)
    np.testing.assert_equal(read.scalars["loss"], ([2], [1.5]))


def test_a_hundred_layers_and_all_measures_are_read(tmp_path):
    layers, keys = [f"layer{index}" for index in range(100)], [f"measure{index}" for index in range(60)]
    writer = record.Record(tmp_path / "record.jsonl")
    writer.take(told.watched(*layers))
    event = told.measured(10, 100, keys)
    for step in range(10, 2010, 10):
        writer.take(events.Measurement(step, event.values, event.worst_channels))
    read = history.read(tmp_path)
    assert {array.shape for array in read.values.values()} == {(100, 200)}
    np.testing.assert_allclose(read.values["measure7"][:, -1], event.values["measure7"], rtol=6e-4)


def test_wandbs_own_pictures_and_tables_are_no_numbers_of_the_run(both):
    from distnorm.drift import wandb_file

    rows = wandb_file.read(next(both.glob("wandb/*/*.wandb"))).rows
    assert any("drift/layers.nrows" in row for row in rows)
    assert not any("." in name for name in history.read(max(both.glob("wandb/offline-run-*"))).scalars)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path / "nowhere", "nowhere does not exist"),
        (lambda path: path, "has no record.jsonl and no run-….wandb in it"),
        (lambda path: written(path / "empty.jsonl", ""), "empty.jsonl is not a record: it is empty"),
        (lambda path: written(path / "record.jsonl", "").parent, "record.jsonl is not a record: it is empty"),
        (lambda path: written(path / "x.json", json.dumps([1])), "x.json is not a record: it starts with b'\\[1\\]'"),
    ],
)
def test_what_is_no_run_is_refused_with_what_would_be_one(tmp_path, make, said):
    with pytest.raises(ConfigError, match=rf"{said}(.|\n)*Give a run folder, its record.jsonl, a run-….wandb file, or"):
        history.read(make(tmp_path))


def written(path, text):
    path.write_text(text)
    return path
