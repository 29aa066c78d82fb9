"""Measures that are made rarely, alarms that fall together, and what a chart says of its points."""

import dataclasses

import numpy as np
import pytest

from distnorm.drift.events import Alarm, Snapshot
from distnorm.drift.report.figures import figures
from distnorm.drift.report.render import render
from tests.browser import Browser
from tests.histories import history
from tests.report_pages import ARTEFACTS, OPENED, choose, in_words, place_of, readout, shown

pytestmark = pytest.mark.unit

CLEAR = """(() => {
  const canvas = document.querySelector('.cells canvas');
  const row = canvas.getContext('2d').getImageData(0, 8, canvas.width, 1).data;
  const alphas = Array.from({ length: canvas.width }, (_, x) => row[4 * x + 3]);
  return alphas.filter((alpha) => alpha === 0).length / canvas.width;
})()"""
CHOSEN = [3, 14, 15, 92]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def run():
    """`shift` is of each seventh measurement, `precise_ratio` of the last, `lag` of all others; channels are chosen."""
    base = history(layers=4, steps=1400, keys=["lag", "shift", "precise_ratio"])
    lag, shift, ratio = (base.values[key].copy() for key in ("lag", "shift", "precise_ratio"))
    evaluated = np.arange(lag.shape[1]) % 7 == 6
    lag[:, evaluated] = np.nan
    shift[:, evaluated] = np.random.default_rng(0).uniform(0.1, 3, (4, int(evaluated.sum())))
    shift[:, ~evaluated] = np.nan
    ratio[:] = np.nan
    ratio[:, -1] = [1.0, 1.2, 0.9, 1.9]
    arrays = {key: [1.0, 2.0, 3.0, 4.0] for key in ("running_mean", "batch_mean", "running_var", "batch_var")}
    ranks = {"rank_means": [[0.0, 1.0, 2.0, 3.0], [1.0, 2.5, 4.0, 6.0]]}
    snapshot = {base.layers[0].name: {"channel": CHOSEN, **arrays, **ranks}}
    values = {"lag": lag, "shift": shift, "precise_ratio": ratio}
    alarms = tuple(Alarm(700, key, base.layers[1].name, 9.0, 1.0, "raised", f"of {key}") for key in ("lag", "shift"))
    return dataclasses.replace(
        base, values=values, worst_channels={}, alarms=alarms, snapshots=(Snapshot(1400, snapshot),)
    )


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return render([run], tmp_path_factory.mktemp("rare") / "page.html")


def test_cells_reach_to_the_next_of_their_kind(browser, page, run):
    shown(browser, page)
    for key, open_at_the_start in (("lag", 0.0), ("shift", 0.05)):
        choose(browser, key)
        assert browser.value(CLEAR) == pytest.approx(open_at_the_start, abs=0.02), key
    browser.mouse(*place_of(browser, run, 2, 15))  # between the measurements 13 and 20: 13 is nearer
    assert in_words(int(run.steps[13])) in readout(browser)
    assert f"{run.values['shift'][2, 13]:.3g}" in readout(browser)
    browser.value("document.querySelector('.cells').focus()")
    browser.press("End")
    browser.press("ArrowLeft")
    assert in_words(int(run.steps[62])) in readout(browser)  # the last but one of its kind: 6, 13, … 62, 69


def test_what_was_measured_once_is_a_bar_a_layer(browser, page, run):
    shown(browser, page)
    choose(browser, "precise_ratio")
    said = browser.value("document.querySelector('.axis-x').textContent")
    assert said == "measured once, at " + in_words(int(run.steps[-1]))
    assert browser.value("[...document.querySelectorAll('.over text')].map((t) => t.textContent)") == [
        "1",
        "1.2",
        "0.9",
        "1.9",
    ]
    ends = browser.value("[...document.querySelectorAll('.over text')].map((t) => Number(t.getAttribute('x')))")
    assert ends[0] < ends[2] < ends[1] < ends[3]  # as far as they are off 1, on either side
    browser.mouse(*place_of(browser, run, 3, 10))
    assert "precise variance 1.9" in readout(browser)
    browser.screenshot(ARTEFACTS / "report-measured-once.png", whole=False)
    choose(browser, "lag")
    assert browser.value("document.querySelectorAll('.over text').length") == 0


def test_alarms_of_one_step_stand_below_each_other(browser, page):
    shown(browser, page)
    places = browser.value(
        "[...document.querySelectorAll('.axis-x .alarm')].map((a) => (b => [b.x, b.y])(a.getBBox()))"
    )
    assert len(places) == 2
    assert places[0][0] == places[1][0]
    assert abs(places[0][1] - places[1][1]) >= 9


def test_a_point_says_its_channel_by_its_number_in_the_layer(browser, page, run):
    shown(browser, page)
    choose(browser, "lag")
    browser.mouse(*place_of(browser, run, 0, 3), click=True)
    browser.wait(OPENED)
    for panel, lines in ((0, ["channel 92", "running 4", "batch 4"]), (2, ["channel 92", "rank 0", "−0.75 σ"])):
        svg = f"document.querySelectorAll('#snapshot svg')[{panel}]"
        browser.value(f"{svg}.scrollIntoView({{ block: 'center' }})")
        box = browser.value(f"(r => [r.left, r.top, r.width, r.height])({svg}.getBoundingClientRect())")
        x, y = point(browser, svg, 3 if panel == 0 else 0, box)
        browser.mouse(x, y)
        said = browser.value("document.getElementById('tip').innerText").split("\n")
        assert [line[: len(wanted)] for line, wanted in zip(said, lines, strict=True)] == lines
    browser.mouse(5, 5)
    assert browser.value("document.getElementById('tip').hidden")


def point(browser, svg, index, box):
    """Where the point of an index of a scatter's first path is in the window."""
    drawn = browser.value(f"{svg}.querySelector('path.points').getAttribute('d')")
    x, y = map(float, drawn.split("M")[1 + index].removesuffix("h0").split())
    return box[0] + x * box[2] / 300, box[1] + y * box[3] / 250


def test_figures_of_rare_measures(run, tmp_path):
    assert {file.stem for file in figures([run, dataclasses.replace(run, name="b")], tmp_path)} >= {
        "map_shift",
        "map_precise_ratio",
    }
