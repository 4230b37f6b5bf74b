"""A headless Chromium, driven over its DevTools protocol through a pipe: nothing to install but Chromium itself."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",  # containers give it little
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


def program() -> str | None:
    """Where Chromium is, if anywhere."""
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


class Browser:
    """One page of a fresh Chromium.

    Attributes:
        events: everything the page reported so far, as (method, parameters).
    """

    def __init__(self, folder: Path):
        """folder: an empty one, for the profile."""
        chromium = program()
        assert chromium is not None
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()

        def arrange() -> None:  # Chromium reads commands from descriptor 3 and answers on 4
            low, high = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self.process = subprocess.Popen(
            [chromium, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            close_fds=False,
            preexec_fn=arrange,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._rest, self._number, self._session = b"", 0, None
        page = next(t for t in self("Target.getTargets", seconds=120)["targetInfos"] if t["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self(f"{domain}.enable")

    def __call__(self, method: str, *, seconds: float = 60, **parameters: Any) -> dict[str, Any]:
        """Carries out one command of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        give_up = time.monotonic() + seconds
        while True:
            found = self._receive(give_up, method)
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def _receive(self, give_up: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert time.monotonic() < give_up, f"Chromium did not answer {what}"
            if select.select([self.into], [], [], 0.2)[0]:
                data = os.read(self.into, 65536)
                assert data, "Chromium has ended"
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, address: str) -> None:
        self("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, script: str, seconds: float = 90) -> Any:
        """Waits until the expression is true, and returns it."""
        give_up = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < give_up, f"waited for {script}; the page shows: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def media(self, **features: str) -> None:
        """Media features, such as prefers_color_scheme="dark"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self("Emulation.setEmulatedMedia", features=named)

    def press(self, key: str, *, modifiers: int = 0) -> None:
        """One key, by its DOM name; modifiers: 2 is Ctrl, 8 is Shift."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        described = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(key)
        self("Input.dispatchKeyEvent", type="keyDown", **described, **({"text": text} if text else {}))
        self("Input.dispatchKeyEvent", type="keyUp", **described)

    def point_at(self, selector: str) -> None:
        """Moves the mouse to the middle of an element's first line."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        taken = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.into)
