"""The report in a real Chromium: what it shows, by pointer and by keys, at any width, in light and in dark."""

import dataclasses
import json

import numpy as np
import pytest

from distnorm.drift.alarms import measures
from distnorm.drift.catalogue import MEASURES
from distnorm.drift.events import Snapshot
from distnorm.drift.report.render import render
from distnorm.drift.report.verdict import number
from tests.browser import REQUIRED, Browser, find
from tests.histories import history
from tests.report_pages import ARTEFACTS, DRAWN, OPENED, choose, in_words, place_of, readout, shown

pytestmark = pytest.mark.unit

EVIL = "<script>alert(1)</script>"
PLACES = ("#layer-h", "#readout", "#tip", "#verdict", "#alarms", "#worst", ".labels", "#compare", ".map figcaption")
SECTIONS = ("verdict", "drift", "gap", "alarms", "worst", "decision")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def run():
    return history(name="sorted shards", sorted_shards=True)


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return render([run], tmp_path_factory.mktemp("one") / "page.html")


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    return render([history(seed=1), run], tmp_path_factory.mktemp("two") / "page.html")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1600, False), (1600, True)])
def test_the_page_works_at_any_width_in_light_and_dark(browser, page, run, width, dark):
    how = {"height": 844, "scale": 2, "mobile": True} if width == 390 else {}
    shown(browser, page, f"report-{width}-{'dark' if dark else 'light'}", width=width, dark=dark, **how)
    for section in SECTIONS:
        box = browser.value(f"(r => [r.width, r.height])(document.getElementById('{section}').getBoundingClientRect())")
        assert min(box[0], 5 * box[1]) > 300, section
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, background[4:-1].split(","))) < 60) == dark
    assert browser.value("document.querySelectorAll('.chart svg path.line').length") >= 4
    browser.mouse(*place_of(browser, run, 7, 140), click=True)
    browser.wait(OPENED)
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_pointing_at_a_cell_says_layer_step_value_and_worst_channel(browser, page, run):
    shown(browser, page)
    for key, stat in (("between_ranks", "median"), ("lag", "p95"), ("effective_samples", "max")):
        choose(browser, key, stat)
        values = run.values[key + {"median": ""}.get(stat, f".{stat}")]
        for row, t in ((8, 149), (0, 5), (4, 77)):
            browser.mouse(*place_of(browser, run, row, t))
            said = readout(browser).split(" · ")
            assert said[0] == run.layers[row].name
            assert said[1] == in_words(int(run.steps[t]))
            assert said[3] == f"worst channel {run.worst_channels[key][row, t]}"
            digits = next(word for word in said[2].split() if word.replace(".", "").isdigit())
            assert float(digits) == float(f"{values[row, t]:.3g}")
    assert run.layers[4].name in browser.value("document.getElementById('tip').innerText")


def test_a_click_opens_the_layer(browser, page, run):
    shown(browser, page)
    browser.mouse(*place_of(browser, run, 7, 140), click=True)
    browser.wait(OPENED)
    assert browser.value("document.getElementById('layer-h').textContent") == run.layers[7].name
    measures_made = {key.partition(".")[0] for key in run.values}
    assert browser.value("document.querySelectorAll('#lines svg').length") == len(measures_made)
    assert "64 channels" in browser.value("document.getElementById('layer-about').textContent")
    count = run.layers[7].channels
    points = browser.value(
        "[...document.querySelectorAll('#snapshot path.points')].map(p => p.getAttribute('d').split('M').length - 1)"
    )
    assert points == [count, count] + [count] * run.world_size  # means, deviations, and each rank's means
    assert browser.value("document.querySelectorAll('#snapshot-step option').length") == len(run.snapshots)
    before = browser.value("document.querySelector('#snapshot path.points').getAttribute('d')")
    browser.value(
        "(s => { s.value = '0'; s.dispatchEvent(new Event('change')); })(document.getElementById('snapshot-step'))"
    )
    browser.wait(f"document.querySelector('#snapshot path.points').getAttribute('d') !== {json.dumps(before)}")
    browser.screenshot(ARTEFACTS / "report-layer.png")
    said = browser.value("document.getElementById('snapshot').textContent")
    assert f"channel {run.worst_channels['between_ranks'][7, 140]}" in said
    browser.press("Escape")
    assert browser.value("document.getElementById('layer').hidden")
    assert browser.problems == []


def test_the_map_is_read_by_keys(browser, page, run):
    shown(browser, page)
    browser.value("document.querySelector('.overview [aria-selected=true]').focus()")
    for _ in range(5):  # tab, statistic, map
        browser.press("Tab", "\t")
        if browser.value("document.activeElement.className") == "cells":
            break
    assert browser.value("document.activeElement.className") == "cells"
    browser.press("Home")
    browser.press("ArrowDown")
    for _ in range(30):
        browser.press("ArrowRight")
    said = readout(browser).split(" · ")
    assert said[:2] == [run.layers[1].name, in_words(int(run.steps[4 + 30]))]  # the ratio is made from the 5th on
    assert f"{run.values['between_ranks'][1, 4 + 30]:.3g}" in said[2]
    browser.press("Enter", "\r")
    browser.wait("!document.getElementById('layer').hidden && document.activeElement.id === 'layer-h'")
    assert browser.value("document.getElementById('layer-h').textContent") == run.layers[1].name


def test_measures_are_chosen_by_arrow_keys(browser, page):
    shown(browser, page)
    browser.value("document.querySelector('.overview [aria-selected=true]').focus()")
    assert browser.value("document.activeElement.id") == "tab-between_ranks"  # the headline's
    browser.press("ArrowRight")
    browser.wait("document.documentElement.dataset.ready === 'lag'")
    assert browser.value("document.querySelector('#measure-title').textContent") == "Lag of the running mean, σ"
    assert f"limit {number(measures(8)['lag'].limit.at)}" in browser.value(
        "document.getElementById('legend').textContent"
    )


def test_an_alarm_shows_its_cell(browser, page, run):
    shown(browser, page)
    alarm = run.alarms[-1]
    places = browser.value("[...document.querySelectorAll('.axis-x .alarm')].map((a) => a.getAttribute('d'))")
    assert len(set(places)) == len(places) == len(run.alarms)
    raised = sum(alarm.state == "raised" for alarm in run.alarms)
    assert browser.value("document.querySelectorAll('.axis-x .alarm.raised').length") == raised
    browser.value("[...document.querySelectorAll('button[data-alarm]')].at(-1).click()")
    browser.wait(f"document.getElementById('readout').textContent.startsWith({json.dumps(alarm.layer)})")
    assert in_words(alarm.step) in readout(browser)


def test_the_theme_is_chosen_and_remembered(browser, page):
    shown(browser, page)
    light = browser.value("getComputedStyle(document.body).backgroundColor")
    pixel = "[...document.querySelector('.cells canvas').getContext('2d').getImageData(400, 4, 1, 1).data].slice(0, 3)"
    cell = browser.value(pixel)
    browser.value("document.getElementById('theme').click()")
    dark = browser.value("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    browser.wait(f"JSON.stringify({pixel}) !== {json.dumps(json.dumps(cell, separators=(',', ':')))}")
    browser.open(page)
    assert browser.value("getComputedStyle(document.body).backgroundColor") == dark
    browser.value("localStorage.clear()")


CONTRAST = """(() => {
  const rgb = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (e) => {
    const back = e ? rgb(getComputedStyle(e).backgroundColor) : [255, 255, 255, 1];
    return back[3] === 1 ? back : behind(e.parentElement);
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest("script,.hidden,.skip")) continue;
    const style = getComputedStyle(e);
    const back = behind(e);
    const ink = rgb(e instanceof SVGElement ? style.fill : style.color);
    const seen = [0, 1, 2].map((i) => ink[i] * ink[3] + back[i] * (1 - ink[3]));
    const [a, b] = [light(seen), light(back)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walk.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_contrast(browser, pages, run, dark):
    shown(browser, pages, dark=dark)
    browser.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    browser.mouse(*place_of(browser, run, 7, 140, which=1), click=True)
    browser.wait(OPENED)
    found = browser.value(CONTRAST)
    assert len(found) > 300
    assert [one for one in found if one[0] < 4.5] == []


def test_runs_stand_side_by_side_with_one_scale_and_one_cursor(browser, pages, run):
    shown(browser, pages, "report-two-runs", width=1600)
    boxes = browser.value("[...document.querySelectorAll('.cells')].map((c) => c.getBoundingClientRect().top)")
    assert len(boxes) == 2
    assert len(set(boxes)) == 1
    browser.mouse(*place_of(browser, run, 6, 100, which=1))
    assert readout(browser).startswith("sorted shards · layers.2.bn1 · step 2\u2009020")
    frames = browser.value(
        "[...document.querySelectorAll('.over .cell')].map((r) => [r.getAttribute('y'), r.getAttribute('visibility')])"
    )
    assert frames == [[frames[0][0], "visible"]] * 2
    assert browser.value("document.querySelectorAll('#compare tbody tr').length") > 10


def test_a_name_that_is_markup_shows_as_text(browser, tmp_path):
    run = history(layers=3, steps=1000, names=[EVIL, "a", "b" * 300], sorted_shards=True)
    message = f"between-rank ratio 9 in {EVIL}"
    alarms = tuple(dataclasses.replace(one, layer=EVIL, message=message) for one in run.alarms)
    run = dataclasses.replace(run, name=EVIL, alarms=alarms, lost=(f"lost {EVIL}",))
    snapshot = {EVIL: {"batch_mean": [1.0, 2.0], "batch_var": [1.0, 1.0], "rank_means": [[1.0, 1.0], [1.0, 3.0]]}}
    run = dataclasses.replace(run, snapshots=(Snapshot(1000, snapshot),))  # as of a GroupNorm
    other = dataclasses.replace(run, name="other")
    shown(browser, render([run, other], tmp_path / "page.html"))
    browser.mouse(*place_of(browser, run, 0, 40), click=True)
    browser.wait(OPENED)
    for place in PLACES:
        assert EVIL in browser.value(f"document.querySelector('{place}').textContent"), place
    assert browser.value("document.querySelectorAll('script').length") == 2
    assert browser.value("document.querySelectorAll('#snapshot path.points').length") == 2  # the ranks' means alone
    assert browser.problems == []


def test_a_large_page_is_usable_soon(browser, tmp_path):
    large = history(layers=100, steps=20_000, keys=[m.key for m in MEASURES], sorted_shards=True)
    page = render([large], tmp_path / "page.html")
    browser.open(page)
    assert browser.busy_s() < 10  # under 2 s when nothing else runs
    browser.wait(DRAWN)
    browser.screenshot(ARTEFACTS / "report-100-layers.png", whole=False)
    browser.mouse(*place_of(browser, large, 99, 900))
    t = int(np.argmin(np.abs(large.steps - int("".join(filter(str.isdigit, readout(browser).split(" · ")[1]))))))
    assert abs(t - 900) <= 1
    assert f"{large.values['between_ranks'][99, t]:.3g}" in readout(browser)


def test_without_chromium_tests_skip_and_fail_where_it_is_required(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no chromium"):
        find()
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(AssertionError, match="there is no chromium"):
        find()


def test_without_scripts_the_tables_are_there(browser, page, run):
    browser.open(page, scripts=False)
    text = browser.value("document.body.innerText")
    assert "switched off here" in text
    assert all(layer.name in text for layer in run.layers)
    assert "Shuffle before sharding" in text
    assert "Point at a cell" not in text
    browser.screenshot(ARTEFACTS / "report-without-scripts.png")


def test_a_run_without_measurements_has_a_page(browser, tmp_path):
    empty = dataclasses.replace(history(layers=0, keys=[]), steps=np.zeros(0, dtype=np.int64), snapshots=(), scalars={})
    browser.open(render([empty], tmp_path / "page.html"))
    assert browser.problems == []
    assert "Nothing was measured" in browser.value("document.getElementById('panel').textContent")
