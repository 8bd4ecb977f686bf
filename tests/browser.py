"""A page in headless Chromium, driven over the DevTools protocol; what it asked for and complained about is kept."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_S = 60.0


class Page:
    """One tab. `requests` are the URLs asked for, `complaints` what the console and the engine had to say."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            message = self._receive(TIMEOUT_S)
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def open(self, file: Path) -> None:
        self.loaded = False
        self.call("Page.navigate", url=file.resolve().as_uri())
        deadline = time.monotonic() + TIMEOUT_S
        while not self.loaded:
            self._receive(deadline - time.monotonic())
        self.settle()

    def settle(self) -> None:
        """Let two frames pass, and take in what was said meanwhile."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def centre(self, expression: str) -> tuple[float, float]:
        """Where an element is, scrolled into view."""
        x, y = self.evaluate(
            f"(() => {{ const e = {expression}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return x, y

    def move(self, expression: str) -> None:
        x, y = self.centre(expression)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def click(self, expression: str) -> None:
        x, y = self.centre(expression)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
        self.settle()

    def _receive(self, timeout: float) -> dict[str, Any]:
        message = json.loads(self._socket.recv(timeout=max(timeout, 0.01)))
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"console.{params['type']}: {params['args']}")
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(str(params["entry"]))
            case "Page.loadEventFired":
                self.loaded = True
        return message


@contextlib.contextmanager
def chromium(profile: Path, *, width: int = 1200, height: int = 900) -> Iterator[Page]:
    """A fresh browser with one blank tab, gone when the block ends."""
    command = [str(CHROMIUM), "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    command += ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
    command += [f"--window-size={width},{height}", *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        ready = profile / "DevToolsActivePort"
        while not (ready.exists() and "\n" in ready.read_text()):
            assert process.poll() is None, f"{CHROMIUM} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{CHROMIUM} was not ready after {TIMEOUT_S:.0f} s"
            time.sleep(0.05)
        port = ready.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=TIMEOUT_S) as reply:
            tab = next(target for target in json.load(reply) if target["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=TIMEOUT_S) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
