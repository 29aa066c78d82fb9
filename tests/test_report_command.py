"""`distnorm report` on the command line, from records on disk."""

import dataclasses
import json

import pytest

from distnorm import cli
from distnorm.drift import events, history
from tests.histories import history as make_history

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not hasattr(history, "read"), reason="nothing reads records yet"),
]


def write(folder, run):
    """Keep a run as a record has it."""
    folder.mkdir()
    told = [events.Watched(0, run.layers, run.world_size, 20), *run.snapshots, *run.alarms]
    for index, step in enumerate(run.steps):
        values = {key: found[:, index].tolist() for key, found in run.values.items()}
        channels = {key: found[:, index].tolist() for key, found in run.worst_channels.items()}
        told.append(events.Measurement(int(step), values, channels))
    rows = [{"schema": 2, "time": 0.0, **run.about}, *({**events.to_row(one), "time": 0.0} for one in told)]
    (folder / "record.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path):
    run = make_history(layers=3, steps=600, sorted_shards=True, keys=["between_ranks", "jeffreys"])
    return write(tmp_path / "sorted", dataclasses.replace(run, scalars={}))


def asked(*arguments):
    cli.main(["report", *map(str, arguments)])


def test_a_run_gives_a_page_and_its_verdict(folder, capsys):
    asked(folder)
    page, said = capsys.readouterr().out.splitlines()
    assert page == str(folder / "report.html")
    assert said.startswith("sorted: Shards differ by rank: between-rank ratio above 2 in 2 of 3 layers, worst 2")
    assert said.endswith("in layers.0.bn3.")
    assert "layers.0.bn3" in (folder / "report.html").read_text()


def test_several_runs_and_figures(folder, tmp_path, capsys):
    other = write(tmp_path / "shuffled", make_history(layers=3, steps=600, keys=["between_ranks"]))
    asked(folder, other, "--out", tmp_path / "new" / "both.html", "--png", tmp_path / "png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "new" / "both.html")
    assert lines[1] == f"{len(list((tmp_path / 'png').glob('*.png')))} figures in {tmp_path / 'png'}"
    assert lines[3].startswith("shuffled: Healthy")


def test_mistakes_end_in_three_lines_and_code_2(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    wrong = {
        "nowhere": [tmp_path / "nowhere"],
        "empty": [tmp_path / "empty"],
        "Give each once": [folder, folder],
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
