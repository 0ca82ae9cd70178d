"""A page in a real browser: Chromium from the system, spoken to through two pipes."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60


def find() -> str:
    """The browser; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is installed")
    return found


class Page:
    """One open page."""

    def __init__(self, to: int, back: int):
        self._to, self._back, self._buffer = to, back, b""
        self._numbers = itertools.count(1)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session: str | None = attached["sessionId"]

    _session = None

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._back], [], [], deadline - time.monotonic())
                part = os.read(self._back, 1 << 20) if ready else b""
                assert part, f"no answer to {method}"
                self._buffer += part
            answer, _, self._buffer = self._buffer.partition(b"\0")
            found = json.loads(answer)
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def open(self, path: pathlib.Path, *, width: int, dark: bool) -> None:
        """Load a file as a screen of this width shows it, without any network."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Network.enable")
        self._call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0,
            uploadThroughput=0,
        )  # fmt: skip
        self._call("Page.enable")
        self._call("Page.navigate", url=path.absolute().as_uri())
        deadline = time.monotonic() + SECONDS
        while self.run("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < deadline, "the page is never complete"
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])


# Elements that are wider than the screen, or than the nearest part that scrolls by itself allows.
OVERFLOWING = """
(() => {
  const wide = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > wide) found.push("the page");
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  for (const e of document.body.querySelectorAll("*")) {
    let above = e.parentElement;
    while (above && !scrolls(above)) above = above.parentElement;
    const box = e.getBoundingClientRect();
    if (!above && box.width && (box.right > wide + 1 || box.left < -1))
      found.push(e.tagName + " " + e.textContent.trim().slice(0, 40));
    const cut = getComputedStyle(e).overflowX === "visible" && e.scrollWidth > e.clientWidth + 1;
    if (!above && cut && e.clientWidth) found.push("in " + e.tagName + " " + e.className);
  }
  return found;
})()
"""


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[Page]:
    """A browser with a profile of its own in a folder."""
    binary = find()
    to_read, to_write = os.pipe()
    back_read, back_write = os.pipe()

    def connect() -> None:  # the protocol's pipes are descriptors 3 and 4
        os.dup2(to_read, 103)
        os.dup2(back_write, 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    process = subprocess.Popen(
        [
            binary, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run",
            "--disable-background-networking", "--disable-dev-shm-usage", "about:blank",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=connect,
    )  # fmt: skip
    os.close(to_read)
    os.close(back_write)
    try:
        yield Page(to_write, back_read)
    finally:
        os.close(to_write)
        os.close(back_read)
        process.terminate()
        process.wait()
