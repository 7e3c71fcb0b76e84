"""A page in a headless Chromium, driven over a pipe by the DevTools protocol.

No driver is installed for it and no port is opened: Chromium reads commands from its file
descriptor 3 and writes answers and events to 4, each a JSON object that a NUL ends.
https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WHY_NOT = "chromium is not installed (Debian: apt-get install chromium)"
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
QUIET += ("--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars")
# Gives the browser its two pipes under the numbers that it expects.
START = """
import os, sys
commands, answers, *program = sys.argv[1:]
os.dup2(int(commands), 3)
os.dup2(int(answers), 4)
os.execv(program[0], program)
"""
LONGEST_S = 120.0
KEYS = {
    "Enter": {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    "Escape": {"code": "Escape", "windowsVirtualKeyCode": 27},
    "Tab": {"code": "Tab", "windowsVirtualKeyCode": 9},
    "ArrowRight": {"code": "ArrowRight", "windowsVirtualKeyCode": 39},
}


class Chromium:
    """One page. Whatever it asks of a network, opens or complains of is kept.

    Attributes:
        requests: addresses of everything that was loaded or tried.
        trouble: dialogs, new windows, exceptions, errors and warnings on the console.
    """

    def __init__(self, profile: Path):
        self.requests: list[str] = []
        self.trouble: list[str] = []
        self._answers: dict[int, dict] = {}
        self._number, self._unread, self._session = 0, b"", None
        self._process = self._start(profile)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def _start(self, profile: Path) -> subprocess.Popen:
        commands, self._commands = os.pipe()
        self._events, answers = os.pipe()
        program = [CHROMIUM, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(commands), str(answers), *program, "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        return process

    def close(self) -> None:
        """End the browser."""
        self._session = None
        with contextlib.suppress(OSError, TimeoutError):
            self.send("Browser.close")
        os.close(self._commands)
        os.close(self._events)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, method: str, **parameters) -> dict:
        """One command; returns its result.

        Raises:
            TimeoutError: no answer came.
            RuntimeError: the browser refuses the command.
        """
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        end = time.monotonic() + LONGEST_S
        while self._number not in self._answers:
            self._read(end)
        answer = self._answers.pop(self._number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self, end: float) -> None:
        """Wait for what the browser says next, and keep it."""
        ready, _, _ = select.select([self._events], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"chromium did not answer within {LONGEST_S:.0f} s")
        if not (block := os.read(self._events, 2**20)):
            raise OSError(f"chromium ended with {self._process.poll()}")
        *messages, self._unread = (self._unread + block).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._keep(message["method"], message["params"])

    def _keep(self, event: str, said: dict) -> None:
        match event:
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])
            case "Page.javascriptDialogOpening" | "Page.windowOpen" | "Runtime.exceptionThrown":
                self.trouble.append(f"{event}: {json.dumps(said)[:400]}")
            case "Log.entryAdded" if said["entry"]["level"] in ("error", "warning"):
                self.trouble.append(f"{event}: {said['entry']['text']}")
            case "Runtime.consoleAPICalled":
                self.trouble.append(f"{event}: {json.dumps(said)[:400]}")

    def look(
        self, *, width: int, height: int = 900, scheme: str = "light", media: str = ""
    ) -> None:
        """Width and height in CSS pixels, `light` or `dark`, `print` or the screen."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def open(self, path: Path, fragment: str = "") -> None:
        """Open a local page and wait until it is loaded."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.as_uri() + fragment)
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page, as plain data."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.send("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true.

        Raises:
            TimeoutError: it never was.
        """
        end = time.monotonic() + LONGEST_S
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press and release keys, one after the other: `j`, `Enter`."""
        for key in keys:
            known = KEYS.get(key, {"text": key})
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **known)
            known = {name: value for name, value in known.items() if name != "text"}
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **known)

    def write(self, text: str) -> None:
        """Put text into the field that has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click in the middle of the first element that the selector names."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"{found}.getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def screenshot(self, path: Path) -> None:
        """A PNG of what is in view."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
