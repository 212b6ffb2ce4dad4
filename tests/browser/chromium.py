"""A headless Chromium under its own remote protocol: as much of it as the tests of a page need."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.waiting import wait_for

NAMES = ("chromium", "chromium-browser", "google-chrome")
EXECUTABLE = next((path for path in map(shutil.which, NAMES) if path), "")
FLAGS = [
    "--headless",
    "--no-sandbox",  # needed where the tests run as root
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]
LIMIT_S = 600  # a guard against a hang


class Chromium:
    """One page at a time. `problems`: what the console said, exceptions, and requests for anything but a file."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self._loaded: set[str] = set()
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(LIMIT_S))
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                return message["result"]
            self._note(message)

    def open(self, path: Path, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Loads a file, and waits until its first responses are there, or whatever stands in their place."""
        self.problems.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        loader = self.send("Page.navigate", url=path.resolve().as_uri())["loaderId"]
        while loader not in self._loaded:
            self._note(json.loads(self._socket.recv(LIMIT_S)))
        self.wait("document.querySelector('#traces :is(.trace, .note, .empty)')")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript condition holds."""
        looks = f"""new Promise((done, fail) => {{
            const end = performance.now() + {500 * LIMIT_S};
            const look = () => ({condition}) ? done() :
                performance.now() > end ? fail(new Error("never true")) : setTimeout(look, 20);
            look();
        }})"""
        self.run(looks)

    def hover(self, selector: str) -> None:
        """The mouse over the first element that matches."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")  # its scroll event is over
        box = self.run(f"{place}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def _note(self, event: dict[str, Any]) -> None:
        kind, parameters = event["method"], event["params"]
        if kind == "Page.lifecycleEvent" and parameters["name"] == "load":
            self._loaded.add(parameters["loaderId"])
        if kind == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            self.problems += [] if url.startswith(("file:", "about:")) else [f"request {url}"]
        if kind in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(parameters))


def _page(port: str) -> dict[str, Any] | None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=LIMIT_S) as answer:
        return next((target for target in json.load(answer) if target["type"] == "page"), None)


@contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """Args: profile: an empty folder for what the browser writes."""
    command = [EXECUTABLE, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "DevTools listening on" in line)
            port = line.split("/devtools")[0].rpartition(":")[2]
            target = wait_for(lambda: _page(port), "the browser's page")
            with connect(target["webSocketDebuggerUrl"], max_size=None, open_timeout=LIMIT_S) as socket:
                yield Chromium(socket)
        finally:
            process.terminate()
