"""The report without a browser: tables, size, figures, and that text stays text."""

import dataclasses
import html.parser
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm.drift.catalogue import MEASURES
from distnorm.drift.events import Alarm, Snapshot, WatchedLayer
from distnorm.drift.report.command import report
from distnorm.drift.report.figures import figures
from distnorm.drift.report.payload import payload, safe_json
from distnorm.drift.report.render import render
from distnorm.drift.report.verdict import number, verdict
from distnorm.errors import ConfigError
from tests.histories import history

pytestmark = pytest.mark.unit


EVIL = "<script>alert(1)</script>"


class Texts(html.parser.HTMLParser):
    """The texts of a page, and its tags."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            self.inside = self.inside[: len(self.inside) - 1 - self.inside[::-1].index(tag)]

    def handle_data(self, data):
        if "script" not in self.inside:
            self.texts.append(data)


def test_names_stay_text(tmp_path):
    run = history(layers=3, sorted_shards=True, names=[EVIL, '"><img src=x onerror=alert(2)>', "line\u2028sep&amp;"])
    told = Alarm(40, "between_ranks", EVIL, 9.0, 2.0, "raised", f"between-rank ratio 9 in {EVIL}")
    run = dataclasses.replace(run, name=f"run {EVIL}", alarms=(told,), lost=(f"lost {EVIL}",))
    decision = {**run.about["decision"], "reasons": [f"because {EVIL}"]}
    run = dataclasses.replace(run, about={"decision": decision})
    page = render([run], tmp_path / "page.html").read_text()
    parsed = Texts()
    parsed.feed(page)
    assert parsed.tags.count("script") == 2
    assert "img" not in parsed.tags
    text = " ".join(parsed.texts)
    for said in (
        f"run {EVIL}",
        f"lost {EVIL}",
        f"because {EVIL}",
        f"between-rank ratio 9 in {EVIL}",
    ):
        assert said in text
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert [layer["name"] for layer in data["runs"][0]["layers"]] == [layer.name for layer in run.layers]


@settings(deadline=None, max_examples=40)
@given(st.recursive(st.text() | st.floats() | st.none(), lambda kids: st.dictionaries(st.text(), kids)))
def test_json_may_stand_in_a_script(value):
    text = safe_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    if isinstance(value, str):
        assert json.loads(text) == value


def test_a_large_page_stays_small_and_quick(tmp_path):
    large = history(layers=100, steps=20_000, every=20, keys=[m.key for m in MEASURES], sorted_shards=True)
    assert len(large.steps) == 1000
    assert {f"{m.key}.max" for m in MEASURES if m.over_channels} <= set(large.values)
    begun = time.process_time()
    page = render([large], tmp_path / "page.html")
    assert time.process_time() - begun < 10
    assert page.stat().st_size < 6_000_000
    found = payload([large])
    assert found["thinned"][0] == 1, "medians have every measurement"


def test_pages_are_the_same_each_time(tmp_path):
    runs = [history(layers=4, steps=400), history(name="other", layers=4, steps=400, sorted_shards=True)]
    assert render(runs, tmp_path / "a.html").read_bytes() == render(runs, tmp_path / "b.html").read_bytes()


def test_the_tables_hold_what_the_maps_show(tmp_path):
    run = history(layers=14, sorted_shards=True)
    text = render([run], tmp_path / "page.html").read_text()
    row = int(run.values["between_ranks"][:, 4:].max(1).argmax())
    worst = number(float(run.values["between_ranks"][row, 4:].max()))
    assert re.search(
        rf'<th scope="row">{re.escape(run.layers[row].name)}</th><td class="beyond">{re.escape(worst)}</td>', text
    )
    assert "2 more layers" in text
    assert "Shuffle before sharding" in text
    assert "<noscript>" in text
    assert "sync over 8 ranks, normalization batch 32" in text
    assert "<dt>data.device_batch</dt><dd>4</dd>" in text


def test_what_differs_by_layer_is_told(tmp_path):
    run = history(layers=2, steps=200, keys=["lag"])
    decision = {**run.about["decision"], "layers": {"layers.0.*": {"kind": "group", "groups": 8}}}
    run = dataclasses.replace(run, about={"decision": decision})
    assert "<li>layers.0.*: kind=group, groups=8</li>" in render([run], tmp_path / "page.html").read_text()


def test_runs_are_compared_in_a_table(tmp_path):
    text = render([history(), history(name="sorted", sorted_shards=True)], tmp_path / "page.html").read_text()
    rows = re.findall(r'<th scope="row">between-rank ratio</th>(.*?)</tr>', text)
    assert ['class="beyond"' in cell for cell in re.findall(r"<td.*?</td>", rows[0])] == [False, True]


def test_figures_for_papers(tmp_path):
    runs = [
        history(layers=4, steps=400, keys=["jeffreys", "between_ranks"]),
        history(name="a $b$", layers=4, steps=400, keys=["jeffreys"]),
    ]
    files = figures(runs, tmp_path / "new")
    names = {file.stem for file in files}
    assert names == {"map_jeffreys", "map_between_ranks", "lines", "channels_1", "channels_2", "gap"}
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 8000 for file in files)


def test_layers_without_running_statistics_have_no_channels_to_compare(tmp_path):
    run = history(layers=1, steps=200, keys=["lag"])
    only_batch = {"batch_mean": [0.0, 1.0], "batch_var": [1.0, 1.0], "rank_means": [[0.0, 1.0], [0.0, 1.0]]}
    run = dataclasses.replace(run, snapshots=(Snapshot(200, {"layers.0.bn1": only_batch}),))
    assert {file.stem for file in figures([run], tmp_path)} == {"map_lag", "lines", "gap"}


def test_the_command_names_page_figures_and_verdict(tmp_path):
    run = history(layers=2, steps=200, keys=["lag"])
    (tmp_path / "run").mkdir()
    lines = report([str(tmp_path / "run")], lambda _: run, png=str(tmp_path / "png"))
    assert lines[0] == str(tmp_path / "run" / "report.html")
    assert lines[1].endswith(f"figures in {tmp_path / 'png'}")
    assert lines[2] == f"shuffled: {verdict(run).sentence}."
    assert (tmp_path / "run" / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path):
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    lines = report(runs, lambda _: history(layers=2, steps=200, keys=["lag"]), out=str(tmp_path / "page.html"))
    assert [line.split(": ")[0] for line in lines[1:]] == runs


def test_mistakes_are_told_with_their_remedy(tmp_path):
    run = history(layers=2, steps=200, keys=["lag"])
    with pytest.raises(ConfigError, match=r"the run 'x/\.' twice.*Give each once"):
        report(["x/.", "x"], lambda _: run)
    with pytest.raises(ConfigError, match=r"no run.*Give each once"):
        render([], tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"two runs of the name 'shuffled'.*Give each once"):
        render([run, run], tmp_path / "page.html")
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(ConfigError, match=r"(?s)cannot be written to .*--out report\.html"):
            render([run], bad)
    with pytest.raises(ConfigError, match=r"(?s)figures cannot be written to .*--png figures"):
        figures([run], tmp_path / "file" / "png")


def test_an_unknown_measure_and_a_layer_of_before_do_no_harm(tmp_path):
    run = history(layers=2, steps=200, keys=["lag"])
    run.values["of_a_later_version"] = np.ones_like(run.values["lag"])
    gone = Alarm(40, "of_a_later_version", "gone", 3.0, 2.0, "raised", "what it means")
    run = dataclasses.replace(run, alarms=(gone,), layers=(*run.layers[:1], WatchedLayer("b", "GroupNorm", 4, 1)))
    assert "what it means" in render([run], tmp_path / "page.html").read_text()


def test_a_column_that_says_one_number_is_folded_into_a_line(tmp_path):
    run = history(layers=3, steps=400, keys=["lag", "dead_channels", "non_finite", "rank_spread"])
    values = {**run.values, "non_finite": np.full_like(run.values["lag"], 2.0), "rank_spread": run.values["lag"] * 1e-4}
    run = dataclasses.replace(run, values=values)
    text = render([run], tmp_path / "page.html").read_text()
    assert "The same in all layers throughout. dead channels: 0.</p>" in text  # nan and inf are: beyond their limit
    heads = re.findall(r'<th scope="col">(.*?)</th>', text)
    assert [head for head in heads if "channels" in head] == ["channels that are nan or inf (channels)"]
    row = re.search(rf'<th scope="row">{re.escape(run.layers[0].name)}</th>(.*?)</tr>', text)[1]
    assert re.findall(r"<td(.*?)>", row) == ["", ' class="quiet"', ' class="beyond"']
