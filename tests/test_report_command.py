"""`distnorm report` on the command line, from records on disk."""

import dataclasses
import re

import pytest

from distnorm import cli
from distnorm.drift import events
from distnorm.drift.record import Record
from distnorm.drift.report.verdict import verdict
from tests.histories import history

pytestmark = pytest.mark.unit


def write(folder, run):
    """Keep a run as a record has it."""
    folder.mkdir()
    told = [events.Watched(0, run.layers, run.world_size, 20), *run.snapshots, *run.alarms]
    for index, step in enumerate(run.steps):
        values = {key: found[:, index].tolist() for key, found in run.values.items()}
        channels = {key: found[:, index].tolist() for key, found in run.worst_channels.items()}
        told.append(events.Measurement(int(step), values, channels))
    record = Record(folder / "record.jsonl", run.about)
    for one in told:
        record.take(one)
    record.close()
    return folder


RUN = dataclasses.replace(
    history(layers=3, steps=600, sorted_shards=True, keys=["between_ranks", "jeffreys"]), scalars={}
)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "sorted", RUN)


def asked(*arguments):
    cli.main(["report", *map(str, arguments)])


def test_a_run_gives_a_page_and_its_verdict(folder, capsys):
    asked(folder)
    page, said = capsys.readouterr().out.splitlines()
    assert page == str(folder / "report.html")
    assert said == f"sorted: {verdict(RUN).sentence}."  # of the run that was written
    assert re.match(r"sorted: Shards differ by rank: between-rank ratio above [\d.]+ in \d of 3 layers, worst 2", said)
    assert said.endswith("in layers.0.bn3.")
    assert "layers.0.bn3" in (folder / "report.html").read_text()


def test_a_record_cut_short_gives_what_is_left_and_a_line_on_the_rest(folder, capsys):
    record = folder / "record.jsonl"
    rows = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(rows[:-5]) + rows[-5][:40])
    asked(folder)
    _, said, told = capsys.readouterr().out.splitlines()
    assert "Shards differ by rank" in said
    assert re.fullmatch(r"sorted: record.jsonl: 1 of \d+ lines cannot be read, .*cut short.", told)
    lost = re.findall('<p class="note lost">(.*?)</p>', (folder / "report.html").read_text())
    assert len(lost) == 1
    assert "cut short" in lost[0]


def test_several_runs_and_figures(folder, tmp_path, capsys):
    other = write(tmp_path / "shuffled", history(layers=3, steps=600, keys=["between_ranks"]))
    asked(folder, other, "--out", tmp_path / "new" / "both.html", "--png", tmp_path / "png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "new" / "both.html")
    assert lines[1] == f"{len(list((tmp_path / 'png').glob('*.png')))} figures in {tmp_path / 'png'}"
    assert lines[3].startswith("shuffled: Healthy")


def test_mistakes_end_in_three_lines_and_code_2(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "record.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    wrong = {
        "it is empty.\nGive a run folder": [tmp_path / "begun"],
        "nowhere": [tmp_path / "nowhere"],
        "empty": [tmp_path / "empty"],
        "It compares different runs. Give each once": [folder, folder],
        "record.jsonl' twice": [folder / "record.jsonl", folder],
        "--out report.html": [folder, "--out", tmp_path / "file" / "page.html"],
        "--png figures": [folder, "--png", tmp_path / "file" / "png"],
    }
    for said, arguments in wrong.items():
        with pytest.raises(SystemExit) as ended:
            asked(*arguments)
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert said in message
        assert len(message.splitlines()) <= 3
