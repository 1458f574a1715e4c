"""A headless Chromium that tests talk to through a pipe; nothing but Chromium is needed.

The DevTools protocol over ``--remote-debugging-pipe``: JSON messages that end in a zero
byte, to file descriptor 3 and from file descriptor 4 of the browser.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
SECONDS = 60.0
"""That one answer may take."""


def find_chromium() -> str | None:
    """Path of a Chromium on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a running Chromium.

    Args:
        process: the browser.
        to: file descriptor that it reads.
        back: file descriptor that it writes.
    """

    def __init__(self, process: subprocess.Popen, to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        """Everything the browser said by itself."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=0,
            uploadThroughput=0,
        )

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result; raises ``RuntimeError`` where Chromium refuses it."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != self._last:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                return answer["result"]

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + SECONDS
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} did not load in {SECONDS:g} s")
            self.events.append(self._receive())

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression on the page."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        """Set the size of the window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def media(self, *, scheme: str = "light", kind: str = "") -> None:
        """Ask for a colour scheme, and a medium such as ``print``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def picture(self, selector: str = "html") -> np.ndarray:
        """(height, width, 3) uint8: what an element looks like."""
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return {x: b.x + scrollX, y: b.y + scrollY, "
            "width: b.width, height: b.height, scale: 1}; })()"
        )
        shot = self.call(
            "Page.captureScreenshot", format="png", clip=box, captureBeyondViewport=True
        )
        data = BytesIO(base64.b64decode(shot["data"]))
        return np.asarray(Image.open(data).convert("RGB"))

    def complaints(self) -> list[str]:
        """Errors and warnings on the console, and exceptions, since the page opened."""
        found = []
        for event in self.events:
            method, details = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(details["exceptionDetails"]))
            if method == "Runtime.consoleAPICalled":
                found.append(str(details["args"]))
            if method == "Log.entryAdded":
                found.append(str(details["entry"]["text"]))
        return found

    def requests(self) -> list[str]:
        """Addresses that the page asked for, without what it carries itself."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._back], [], [], left)[0]:
                raise TimeoutError(f"chromium said nothing for {SECONDS:g} s")
            piece = os.read(self._back, 1 << 16)
            if not piece:
                raise RuntimeError(f"chromium ended with {self._process.poll()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, offline; ended when the block ends.

    Args:
        profile: a folder that does not exist yet.
    """
    path = find_chromium()
    assert path is not None, "no chromium on this machine"
    theirs_in, to = os.pipe()
    back, theirs_out = os.pipe()
    redirected = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    flags = (*FLAGS, f"--user-data-dir={profile}", "about:blank")
    process = subprocess.Popen(
        ["bash", "-c", redirected, path, *flags],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        browser = Browser(process, to, back)
        yield browser
        browser._session = None
        browser.call("Browser.close")
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(to)
        os.close(back)
