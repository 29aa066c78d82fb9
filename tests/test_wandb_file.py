"""The reader of wandb's offline files, on files that wandb wrote, and on damaged ones."""

import json
import random
import signal
import struct
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm.drift import events, history, record, wandb_file
from distnorm.errors import ConfigError
from tests import logged, told

pytestmark = pytest.mark.unit

ROWS = 400  # more than one block of the file
STEPS = list(range(10, 10 * ROWS + 1, 10))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run folder after SIGKILL, and wandb's file as it was at that moment."""
    folder = tmp_path_factory.mktemp("killed")
    with logged.start(folder, "offline", ROWS, "hang") as process:
        assert process.stdout.readline().startswith("logged")
        time.sleep(2)
        [path] = (folder / "run").glob("wandb/offline-*/*.wandb")
        left = path.read_bytes()  # nothing that wandb's own process may still add when it sees the kill
        process.send_signal(signal.SIGKILL)
    (folder / path.name).write_bytes(left)
    assert len(left) > 3 * 32 * 1024
    return folder / "run", folder / path.name


def steps_of(run, key="train/loss"):
    return [row["trainer/global_step"] for row in run.rows if key in row]


def test_a_killed_run_has_left_every_row_in_the_record_and_in_wandbs_file(killed):
    run, path = killed
    numbers = [row["step"] for row in record.read(run / "record.jsonl")]
    read = wandb_file.read(path)
    assert numbers == steps_of(read) == STEPS
    assert steps_of(wandb_file.read(next(run.glob("wandb/offline-*/*.wandb")))) == STEPS
    told_there = [events.from_row(json.loads(row[history.EVENT])) for row in read.rows if history.EVENT in row]
    assert told_there == [
        told.watched("bn1", "bn2"),
        *(events.from_row(events.to_row(told.measured(s))) for s in STEPS),
    ]
    assert read.lost == ()


def test_the_run_its_configuration_and_its_metrics_are_read(killed):
    read = wandb_file.read(killed[1])
    assert read.name == "mine"
    assert killed[1].name == f"run-{read.id}.wandb"
    assert read.config["norm"]["normalization_batch"] == 32
    assert read.config["decision_layers"] == [{"name": "bn1", "was": "BatchNorm2d", "normalization_batch": None}]
    assert not [key for key in read.config if key.startswith("_")]
    assert read.step_metrics["*"] == "trainer/global_step"
    assert read.hidden == {history.EVENT}
    [table] = [row for row in read.rows if "decision/layers._type" in row]
    assert (table["decision/layers.nrows"], table["trainer/global_step"]) == (1, 0)


class Whole:
    """A file's bytes, its rows, and where damaged copies go."""

    def __init__(self, path, copies):
        self.data, self.rows, self.path = path.read_bytes(), wandb_file.read(path).rows, copies / "run-x.wandb"


@pytest.fixture(scope="module")
def whole(killed, tmp_path_factory):
    return Whole(killed[1], tmp_path_factory.mktemp("copies"))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 10**9))
def test_a_file_cut_at_any_byte_gives_every_whole_row_and_one_line_of_loss(whole, cut):
    data, rows, path = whole.data, whole.rows, whole.path
    cut = 1 + cut % len(data)
    path.write_bytes(data[:cut])
    read = wandb_file.read(path)
    assert read.rows == rows[: len(read.rows)]
    assert len(read.lost) <= 1
    if read.lost:  # at most the one record that was being written
        at = int(read.lost[0].removesuffix(" on.").rpartition(" ")[2])
        assert cut - 20_000 < at < cut
    path.write_bytes(data[: cut + 20_000])  # and all that were written before it are there
    assert read.rows == wandb_file.read(path).rows[: len(read.rows)]


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10**9), length=st.integers(1, 500), seed=st.integers(0, 9))
def test_damage_in_the_middle_costs_a_block_and_is_told_in_one_line(whole, at, length, seed):
    data, rows, path = whole.data, whole.rows, whole.path
    at = 7 + at % (len(data) - 7 - length)
    damaged = bytearray(data)
    damaged[at : at + length] = bytes(byte ^ random.Random(seed).randint(1, 255) for byte in data[at : at + length])
    path.write_bytes(damaged)
    read = wandb_file.read(path)
    block, end = at // 32768 * 32768, (at + length) // 32768 * 32768 + 32768
    path.write_bytes(data[: max(7, block)])
    before = len(wandb_file.read(path).rows)
    assert read.rows[:before] == rows[:before]
    after = [row["_step"] for row in read.rows[before:]]
    assert after == sorted(set(after))
    assert set(after) <= {row["_step"] for row in rows}
    if end + 32768 < len(data):
        assert read.rows[-1] == rows[-1]
    padding = at % 32768 > 32768 - 7 and at + length <= end  # bytes that mean nothing
    if not padding:
        [line] = read.lost
        assert "run-x.wandb: " in line
        assert f"of {len(data)} bytes cannot be read, from byte " in line


def written(messages):
    """An independent writer of the format."""
    data = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for message in messages:
        left, kind_before = message, 0
        while left or not kind_before:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                continue
            piece, left = left[: room - 7], left[room - 7 :]
            kind = (3 if left else 4) if kind_before else (2 if left else 1)
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            kind_before = kind
    return bytes(data)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 100) | st.integers(32_600, 32_800) | st.integers(65_000, 99_000), max_size=8))
def test_records_of_any_length_are_put_together_over_blocks(tmp_path_factory, lengths):
    from wandb.proto.wandb_internal_pb2 import Record

    messages = []
    for step, length in enumerate(lengths):
        message = Record()
        message.history.item.add(key="_step", value_json=str(step))
        message.history.item.add(nested_key=["a", "b"], value_json=json.dumps("x" * length))
        messages.append(message.SerializeToString())
    path = tmp_path_factory.getbasetemp() / "lengths.wandb"
    path.write_bytes(written(messages))
    read = wandb_file.read(path)
    assert read.rows == [{"_step": step, "a.b": "x" * length} for step, length in enumerate(lengths)]
    assert read.lost == ()


@pytest.mark.parametrize("data", [b"", b"{}\n", b":W&C\xe1\xbe\x00"])
def test_another_file_is_refused(tmp_path, data):
    path = tmp_path / "run-x.wandb"
    path.write_bytes(data)
    with pytest.raises(
        ConfigError, match=r"run-x.wandb is not an offline file of wandb(.|\n)*Give the file run-….wandb"
    ):
        wandb_file.read(path)
