"""What tests of the report do with a page in a browser."""

from pathlib import Path

ARTEFACTS = Path(__file__).parent.parent / "test-artefacts"
OPENED = "document.getElementById('layer').dataset.drawn === '' && document.querySelectorAll('#lines svg').length > 0"
DRAWN = "!document.querySelector('.overview .value:empty')"


def shown(browser, path, name=None, **how):
    """Open a page, see that nothing went wrong in it, and keep its picture."""
    browser.open(path, **how)
    browser.wait(DRAWN)
    assert browser.problems == []
    assert [url for url in browser.urls if not url.startswith(("file:", "data:"))] == []
    assert browser.value("document.documentElement.scrollWidth") <= how.get("width", 1280), "the page scrolls sideways"
    if name:
        browser.screenshot(ARTEFACTS / f"{name}.png")


def choose(browser, key, stat="median"):
    browser.value(f"document.getElementById('tab-{key}').click()")
    browser.wait(f"document.documentElement.dataset.ready === '{key}'")
    if stat != "median":
        browser.value(f"document.querySelector('input[value={stat}]').click()")
        browser.wait(f"document.documentElement.dataset.ready === '{key}.{stat}'")


def place_of(browser, run, row, t, which=0):
    """The middle of a cell in the window, by the page's own geometry alone: rows and steps are even."""
    browser.value(f"document.querySelectorAll('.cells')[{which}].scrollIntoView({{block: 'center'}})")
    box = f"document.querySelectorAll('.cells')[{which}].getBoundingClientRect()"
    left, top, width, height = browser.value(f"(r => [r.left, r.top, r.width, r.height])({box})")
    return left + (t + 0.5) * width / len(run.steps), top + (row + 0.5) * height / len(run.layers)


def readout(browser):
    return browser.value("document.getElementById('readout').textContent")


def in_words(step):
    return f"step {step:,}".replace(",", "\u2009")
