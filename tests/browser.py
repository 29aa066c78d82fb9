"""A headless Chromium that a test drives over the DevTools protocol, through two pipes: no port, no package."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time

import pytest

REQUIRED = "DISTNORM_REQUIRE_BROWSER"
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def find():
    """Chromium's path; without it the test is skipped, or fails where a browser is required."""
    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        assert not os.environ.get(REQUIRED), f"{REQUIRED} is set, and there is no chromium"
        pytest.skip("no chromium on this machine")
    return path


def _high(fd):
    """Move a descriptor above those that Chromium's pipes have, 3 and 4."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


class Browser:
    """One Chromium, one page in it at a time; what goes wrong in the page is in `problems`, its requests in `urls`."""

    def __init__(self, folder):
        to_read, self._write = map(_high, os.pipe())
        self._read, to_write = map(_high, os.pipe())
        path = find()
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        pipes = [(os.POSIX_SPAWN_DUP2, to_read, 3), (os.POSIX_SPAWN_DUP2, to_write, 4)]
        self._process = os.posix_spawn(
            path,
            [path, *_FLAGS, f"--user-data-dir={folder}", "about:blank"],
            os.environ,
            file_actions=[*null, *pipes],
            setsid=True,
        )
        os.close(to_read)
        os.close(to_write)
        self._rest, self._count, self._session = b"", 0, None
        self.problems, self.urls, self._events = [], [], []

    def close(self):
        with contextlib.suppress(Exception):
            self.call("Browser.close", session=False)
        os.close(self._write)
        os.close(self._read)
        until = time.monotonic() + 10
        while os.waitpid(self._process, os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                os.killpg(self._process, signal.SIGKILL)
            time.sleep(0.02)

    def call(self, method, session=True, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session and self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(time.monotonic() + 30)
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, path, *, width=1280, height=900, dark=False, scale=1, mobile=False, scripts=True):
        """Open a file in a new page, and wait until its script has drawn."""
        if self._session:
            self.call("Target.closeTarget", session=False, targetId=self._target)
            self._session = None
        self.problems, self.urls, self._events = [], [], []
        self._target = self.call("Target.createTarget", session=False, url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", session=False, targetId=self._target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Performance.enable", timeDomain="threadTicks")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        media = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in media.items()])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready" if scripts else "!!document.querySelector('footer')")

    def busy_s(self):
        """Seconds of the processor that the page has taken."""
        found = self.call("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in found if one["name"] == "TaskDuration")

    def wait(self, expression, seconds=20):
        """Wait until an expression is true in the page, and give its value."""
        until = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < until, f"{expression} did not come true; {self.problems}"
            time.sleep(0.03)
        return value

    def value(self, expression):
        """Evaluate an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, x, y, *, click=False):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text if kind == "keyDown" else "")

    def screenshot(self, path, *, whole=True):
        """Keep a picture of the page, the whole of it or what is in view."""
        if whole:
            self.value("scrollTo(0, 0)")
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data["data"]))

    def _clip(self, whole):
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _next(self, until):
        """Read one message; keep what an event tells."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "Chromium has ended"
            self._rest += chunk
        raw, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(raw)
        self._keep(message.get("method"), message.get("params", {}))
        return message

    def _keep(self, method, params):
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}:
            self.problems.append(params["args"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])
