"""Checkpoints on the disk: whole, the one before kept, damage found, a full disk survived."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm import ConfigError, NormSpec, checkpoint
from distnorm.launch import checkpoints
from distnorm.launch.checkpoint_files import AtomicCheckpointIO
from distnorm.launch.run_dir import RunFolder
from tests import interrupted

pytestmark = pytest.mark.unit


def content(step):
    """A checkpoint of ours, as small as they get."""
    entry = checkpoint.entry(NormSpec("batch", 8), [{}])
    weights = torch.arange(300.0) + step
    return {"step": step, "state_dict": {"model.weight": weights}, checkpoint.ENTRY: entry}


def folder_of(tmp_path, *steps):
    """A run folder in which these were saved one after the other; returns its folder of checkpoints."""
    io = AtomicCheckpointIO()
    for step in steps:
        io.save_checkpoint(content(step), tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path / "checkpoints"


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def test_the_checkpoint_before_is_kept(tmp_path):
    folder = folder_of(tmp_path, 1, 2, 3)
    assert {file.name: step_of(file) for file in folder.iterdir()} == {"last.ckpt": 3, "previous.ckpt": 2}
    AtomicCheckpointIO().save_checkpoint(content(4), folder / "best.ckpt")
    assert {file.name: step_of(file) for file in folder.iterdir()} == {
        "last.ckpt": 3,
        "previous.ckpt": 2,
        "best.ckpt": 4,
    }


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_found_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    path = folder_of(folder, 1) / "last.ckpt"
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="length")])
    else:
        bit = data.draw(st.integers(0, 8 * len(whole) - 1), label="bit")
        whole[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole)
    if checkpoint.damage_of(path) is None:
        assert interrupted.differences(torch.load(path, weights_only=True), content(1)) == []


DAMAGES = {
    "empty": lambda _: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "flipped": lambda whole: whole.replace(torch.arange(300.0)[7].add(2).numpy().tobytes(), b"\0\0\1\0", 1),
    "zeros": lambda whole: bytes(len(whole)),
}


@pytest.mark.parametrize("by", ["folder", "file"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_to_the_checkpoint_before(tmp_path, caplog, damage, by):
    folder = folder_of(tmp_path, 1, 2)
    last = folder / "last.ckpt"
    last.write_bytes(DAMAGES[damage](last.read_bytes()))
    assert checkpoint.find(tmp_path if by == "folder" else last) == folder / "previous.ckpt"
    [said] = caplog.messages
    assert f"{last} is damaged (" in said
    assert f"Going on from the checkpoint before it, {folder / 'previous.ckpt'}." in said
    caplog.clear()
    assert step_of(checkpoint.find(last, warn=False)) == 1
    assert caplog.messages == []
    (folder / "previous.ckpt").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"last.ckpt is damaged .*previous.ckpt is damaged .*ckpt_path=.*best.ckpt"):
        checkpoint.find(tmp_path)


def test_a_missing_last_checkpoint_is_replaced_too(tmp_path, caplog):
    folder = folder_of(tmp_path, 1, 2)
    (folder / "last.ckpt").unlink()
    assert checkpoint.find(tmp_path) == folder / "previous.ckpt"
    assert "last.ckpt is missing" in caplog.text


def test_a_damaged_file_of_another_name_has_no_substitute(tmp_path):
    folder = folder_of(tmp_path, 1, 2)
    best = folder / "best.ckpt"
    best.write_bytes((folder / "last.ckpt").read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"best.ckpt is damaged .*Give another checkpoint"):
        checkpoint.find(best)


def test_a_damaged_best_checkpoint_is_not_tested(tmp_path, caplog):
    folder, run = folder_of(tmp_path, 1, 2), RunFolder(tmp_path)
    best = folder / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1), best)
    assert checkpoints._good(best, run, None) == best
    best.write_bytes(best.read_bytes()[:-9])
    assert checkpoints._good(best, run, None) == folder / "last.ckpt"
    assert f"{best} is damaged (" in caplog.text
    assert f"{folder / 'last.ckpt'} is tested instead." in caplog.text
    assert checkpoints._good(None, run, None) == folder / "last.ckpt"


class Killed(BaseException):
    """What no code catches."""


def test_there_is_a_good_checkpoint_whenever_a_save_is_killed(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, 1, 2)
    calls = []

    def dying(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            if len(calls) == dies_at:
                raise Killed
            return function(*arguments, **options)

        return call

    for owner, name in ((os, "link"), (os, "fsync"), (Path, "replace"), (torch, "save")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    for dies_at in range(1, 7):
        calls.clear()
        with pytest.raises(Killed):
            AtomicCheckpointIO().save_checkpoint(content(3), folder / "last.ckpt")
        assert checkpoint.damage_of(checkpoint.find(tmp_path, warn=False)) is None
        assert step_of(folder / "last.ckpt") == (3 if dies_at == 6 else 2)
    assert calls == ["save", "fsync", "link", "replace", "replace", "fsync"]  # flushed before it has the name


def test_a_file_system_without_links_keeps_both_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = folder_of(tmp_path, 1, 2)
    assert [step_of(folder / name) for name in ("last.ckpt", "previous.ckpt")] == [2, 1]


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path):
    folder = folder_of(tmp_path, 1, 2)
    (folder / "last.ckpt").write_bytes(b"torn")
    AtomicCheckpointIO().save_checkpoint(content(5), folder / "last.ckpt")
    assert [step_of(folder / name) for name in ("last.ckpt", "previous.ckpt")] == [5, 1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place  # warm ranks may have files open there still
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_leaves_what_was_there(small_disk, caplog):
    folder = folder_of(small_disk, 1, 2)
    io = AtomicCheckpointIO()
    large = {**content(3), "large": torch.zeros(2**20)}
    io.save_checkpoint(large, folder / "last.ckpt")
    [said] = caplog.messages
    assert f"{folder / 'last.ckpt'} could not be saved: No space left on device, 1.5 MiB free" in said
    assert f" in {folder}. The one before it stays; training goes on. Make room there." in said
    assert io.failure == said
    assert {file.name: step_of(file) for file in folder.iterdir()} == {"last.ckpt": 2, "previous.ckpt": 1}
    io.save_checkpoint(content(4), folder / "last.ckpt")
    assert io.failure is None


def test_what_is_no_fault_of_the_disk_is_raised(tmp_path):
    with pytest.raises(AttributeError, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: None}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0.5, 1.5])
def test_a_run_on_a_full_disk_ends_readable(small_disk, tmp_path, room):
    options = ("data.device_batch=56", "trainer.max_epochs=2", "drift=none", "model.widths=[64,128]")
    interrupted.in_pool(tmp_path / "before", 2, *options)
    a_checkpoint = interrupted.last(tmp_path / "before").stat().st_size
    (small_disk / "data").write_bytes(bytes(1_400 * 1024 - int(room * a_checkpoint)))
    _, said = interrupted.in_pool(small_disk / "run", 2, *options)
    if room > 1:
        [saved] = (small_disk / "run" / "checkpoints").iterdir()
        assert checkpoint.damage_of(saved) is None
        assert "Result on the test set" in said
    else:
        folder = small_disk / "run" / "checkpoints"
        assert said == f"ConfigError: {folder} holds no checkpoint to test: none could be saved. Make room there first."
