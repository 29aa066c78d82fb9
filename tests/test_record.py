"""The record file: whole lines after any kill, few enough on a long run, old ones readable."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm.drift import events, record
from distnorm.drift.thinning import kept
from distnorm.errors import ConfigError
from tests import runs, told

pytestmark = pytest.mark.unit


def test_rows_are_read_back_with_numbers_that_json_has_no_word_for(tmp_path):
    path = tmp_path / "record.jsonl"
    writer = record.Record(path, {"run": "one"})
    writer.append(10, {"loss": 0.5, "nan": float("nan")})
    writer.append(20, {"up": float("inf"), "down": float("-inf")})
    first, second = record.read(path)  # before it is closed
    assert (first["step"], first["loss"], second["step"]) == (10, 0.5, 20)
    assert np.isnan(first["nan"])
    assert (second["up"], second["down"]) == (float("inf"), float("-inf"))
    assert abs(first["time"] - path.stat().st_mtime) < 60
    writer.close()
    about, *rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert (about["schema"], about["run"]) == (2, "one")
    assert len(rows) == 2
    assert record.load(path).about == {"run": "one"}


def test_events_are_read_back_in_order_between_the_numbers(tmp_path):
    path = tmp_path / "record.jsonl"
    writer = record.Record(path)
    taken = [told.watched("bn1", "bn2"), told.measured(10), told.snapshot(10), told.alarm(20)]
    for event in taken:
        writer.take(event)
        writer.append(event.step, {"drift/model/gap": 0.1})
    contents = record.load(path)
    back = [events.from_row(row) for row in contents.rows if record.is_event(row)]
    assert back == [events.from_row(events.to_row(event)) for event in taken]
    assert [row["step"] for row in record.read(path)] == [0, 10, 10, 20]
    assert all(abs(row["time"] - time.time()) < 60 for row in contents.rows)
    assert contents.lost == ()


NUMBERS = st.lists(st.floats() | st.floats(width=16), max_size=4) | st.lists(st.integers(), max_size=3)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=4), NUMBERS, max_size=4), st.integers(0, 10**9))
def test_an_events_text_is_the_json_of_its_row(values, step):
    for event in (
        events.Measurement(step, values),
        events.Snapshot(step, {"<b>": values, "k": {"rank_means": list(values.values())}}),
        events.Alarm(step, "lag", '"é', 0.123456789, float("inf"), "raised", "a\nb"),
        told.watched("a", "b", step=step),
    ):
        assert json.loads(events.to_text(event), parse_constant=pytest.fail) == events.to_row(event)


LAYERS = ("bn1", "stages.0.bn<é>")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "record.jsonl"
    writer = record.Record(path, {"run": "é"})
    writer.take(told.watched(*LAYERS))
    for step in range(10, 60, 10):
        writer.take(told.measured(step))
        writer.append(step, {"train/loss": 1 / step})
    writer.take(told.alarm(50))
    return path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 10**9))
def test_a_record_cut_at_any_byte_gives_every_whole_line_and_one_line_of_loss(whole, tmp_path_factory, cut):
    cut %= len(whole) + 1
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(whole[:cut])
    contents = record.load(path)
    lines = whole[:cut].count(b"\n")
    at_the_brink = whole[cut : cut + 1] == b"\n"  # a whole line that lacks nothing but its end
    in_a_line = not at_the_brink and not whole[:cut].endswith(b"\n") and cut > 0
    assert len(contents.rows) == max(0, lines - 1 + at_the_brink)
    expected = f"cut.jsonl: 1 of {lines + 1} lines cannot be read, the last one, cut short."
    assert contents.lost == ((expected,) if in_a_line else ())


def test_a_torn_line_stays_alone_when_the_record_goes_on(whole, tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_bytes(whole[:-9])
    writer = record.Record(path, {"run": "other"})
    writer.append(60, {"train/loss": 2.0})
    contents = record.load(path)
    assert contents.about == {"run": "é"}
    assert contents.rows[-1]["train/loss"] == 2.0
    assert len(contents.rows) == 12
    assert contents.lost == ("record.jsonl: 1 of 14 lines cannot be read, the first of them line 13.",)


def test_a_record_of_schema_1_is_read_and_goes_on(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_text('{"schema": 1, "time": 1.0, "run": "old"}\n{"step": 1, "time": 2.0, "loss": "inf"}\n')
    record.Record(path).take(told.measured(2))
    assert record.read(path) == [{"step": 1, "time": 2.0, "loss": float("inf")}]
    assert record.load(path).about == {"run": "old"}
    assert len(record.load(path).rows) == 2


@pytest.mark.parametrize("opened", [record.load, record.read, record.Record])
def test_a_record_of_a_newer_distnorm_is_refused_and_left_alone(tmp_path, opened):
    path = tmp_path / "record.jsonl"
    path.write_text('{"schema": 3}\n')
    with pytest.raises(ConfigError, match=r"schema 3, and this distnorm reads 1 to 2.*\nUpgrade distnorm"):
        opened(path)
    assert path.read_text() == '{"schema": 3}\n'


def test_so_few_rows_that_the_ends_have_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"max_rows=9, and 10 is the least.*Give e.g. 1000"):
        record.Record(tmp_path / "record.jsonl", max_rows=9)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=400), st.integers(3, 60))
def test_the_ends_stay_and_the_rest_is_even_and_within_the_limit(gaps, limit):
    steps = np.cumsum(gaps).tolist()
    chosen = kept(steps, limit)
    edge = max(1, limit // 10)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= max(limit, 0)
    ends = min(edge, len(steps))
    assert chosen[:ends] == list(range(ends))
    assert chosen[-ends:] == list(range(len(steps) - ends, len(steps)))
    if len(steps) <= limit:
        assert chosen == list(range(len(steps)))


def steps_kept(path, of):
    return [row["step"] for row in record.load(path).rows if of in row]


def test_a_long_run_keeps_its_ends_and_an_even_middle_and_what_is_rare(tmp_path):
    path = tmp_path / "record.jsonl"
    about = {"run": "long", "drift": {"kind": "light"}}  # as the settings have
    writer = record.Record(path, about, max_rows=20)
    most = 0
    for step in range(10, 40_010, 10):
        if step == 10:
            writer.take(told.watched("bn1", "bn2"))
        writer.take(told.measured(step))
        writer.append(step, {"train/loss": 1 / step, "epoch": 0})
        if step % 50 == 0:
            writer.append(step, {"val/loss": 2.0, "epoch": 0})
        if step % 1000 == 0:
            writer.take(told.alarm(step))
            writer.take(told.snapshot(step))
            writer.take(told.measured(step, keys=("precise_jeffreys",)))
        if step == 20_000:  # a requeue
            writer.close()
            writer = record.Record(path, {"run": "again"}, max_rows=20)
        most = max(most, path.stat().st_size)
    assert record.load(path).about == about
    by_key = {key: [] for key in ("jeffreys", "precise_jeffreys")}
    for row in record.load(path).rows:
        for key in by_key:
            by_key[key] += [row["step"]] if key in row.get("drift", {}).get("values", {}) else []
    for steps, interval in ((by_key["jeffreys"], 10), (by_key["precise_jeffreys"], 1000)):
        assert 10 <= len(steps) < 40
        assert steps[:2] == [interval, 2 * interval]
        assert steps[-2:] == [40_000 - interval, 40_000]
        gaps = np.diff(steps)
        assert gaps.max() <= 2 * 40_000 / 10  # nowhere twice as rare as 10 even ones would be
        assert steps == sorted(set(steps))
    assert steps_kept(path, "alarm") == list(range(1000, 40_010, 1000))
    assert steps_kept(path, "val/loss") == list(range(50, 40_010, 50))
    snapshots = steps_kept(path, "snapshot")
    assert (snapshots[0], snapshots[-1]) == (1000, 40_000)
    assert 4 <= len(snapshots) < 16
    assert 100 <= len(steps_kept(path, "train/loss")) < 400
    assert steps_kept(path, "watched") == [0]
    assert most < 200_000
    assert [file.name for file in tmp_path.iterdir()] == ["record.jsonl"]


def test_of_rows_that_a_requeue_wrote_again_the_later_ones_stay(tmp_path):
    path = tmp_path / "record.jsonl"
    writer = record.Record(path, max_rows=10)
    for attempt, first in ((1, 0), (2, 3)):
        for step in range(first, 13):
            writer.append(step, {"drift/model/gap": attempt})
    thinned = [row for row in record.read(path) if 3 <= row["step"] <= 9]  # the 20th row was the second of step 9
    assert len(thinned) >= 3
    assert {row["drift/model/gap"] for row in thinned} == {2}


def test_where_there_is_no_room_to_thin_the_record_goes_on_whole(tmp_path, monkeypatch, caplog):
    path = tmp_path / "record.jsonl"
    writer = record.Record(path, max_rows=10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for step in range(25):
            writer.take(told.measured(step))
    assert len(record.load(path).rows) == 25
    assert [message.count("No space left on device") for message in caplog.messages] == [1]
    for step in range(25, 45):
        writer.take(told.measured(step))
    assert len(record.load(path).rows) < 20
    assert [file.name for file in tmp_path.iterdir()] == ["record.jsonl"]


def write_for_ever(path, max_rows, count):
    writer = record.Record(path, {"run": "killed"}, max_rows=max_rows)
    while True:
        count.value += 1
        writer.take(told.measured(count.value, layers=40))
        writer.append(count.value, {"train/loss": 1.0, "val/loss": 1.0})


@pytest.mark.parametrize("max_rows", [10, 1000])
def test_a_process_killed_at_any_moment_leaves_every_row_also_while_it_thins(tmp_path, max_rows):
    fork, draw = multiprocessing.get_context("fork"), np.random.default_rng(0)
    for attempt in range(15):
        path = tmp_path / str(attempt) / "record.jsonl"
        path.parent.mkdir()
        count = fork.RawValue("i", 0)
        writer = fork.Process(target=write_for_ever, args=(path, max_rows, count))
        writer.start()
        runs.wait_for(lambda: count.value > 60)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        contents = record.load(path)
        assert contents.about == {"run": "killed"}
        steps = [row["step"] for row in record.read(path)]
        assert steps in (list(range(1, count.value)), list(range(1, count.value + 1)))
        drift = steps_kept(path, "drift")
        assert drift[0] == 1
        assert drift[-1] in {count.value - 1, count.value}
        assert 5 <= len(drift) <= 20 if max_rows == 10 else len(drift) >= len(steps)
        record.Record(path, max_rows=max_rows).close()
        assert [file.name for file in path.parent.iterdir()] == ["record.jsonl"]
