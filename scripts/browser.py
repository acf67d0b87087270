"""A headless Chromium to look at pages with: over its DevTools protocol, for the tests of the dashboard and for its pictures."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run")
_PATIENCE = 60.0
"""Seconds that a browser on a busy machine may need for one thing."""


class Page:
    """One open page. Owns the connection to it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        """What the page complained of: exceptions, and what its policy refused."""
        self._socket = socket
        self._numbers = itertools.count(1)

    def __repr__(self) -> str:
        return f"Page({len(self.problems)} problems)"

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Raises RuntimeError with what the browser says against it."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(_PATIENCE):
            while True:
                message = await self._socket.receive_json()
                if message.get("id") == number:
                    break
                self._note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.problems.append(str(details.get("exception", {}).get("description") or details["text"]))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] in ("security", "violation", "javascript"):
            self.problems.append(str(message["params"]["entry"]["text"]))

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise what it resolves to."""
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 60.0) -> Any:
        """The value of the expression once it is true. Raises TimeoutError that says what the page shows instead."""
        try:
            async with asyncio.timeout(seconds):
                while not (value := await self.evaluate(expression)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"not within {seconds:g} s: {expression}; the page: {await self.evaluate('document.body.innerText')!r}") from None
        return value

    async def resize(self, width: int, height: int, *, is_dark: bool = False) -> None:
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = "dark" if is_dark else "light"
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def picture(self, *, is_whole: bool = False) -> bytes:
        """A PNG of what is in view, or of the whole page."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        return base64.b64decode(answer["data"])


@asynccontextmanager
async def open_browser(url: str) -> AsyncIterator[Page]:
    """A page of a browser of its own, which ends with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
                async with client.get("/json/list") as answer:
                    targets = await answer.json()
                address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
                async with client.ws_connect(address, max_msg_size=0) as socket:
                    page = Page(socket)
                    await page.open(url)
                    yield page
                    await page.call("Browser.close")
        finally:
            if process.returncode is None:
                try:
                    async with asyncio.timeout(5):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> int:
    """Chromium writes it when it listens."""
    async with asyncio.timeout(_PATIENCE):
        while not file.exists() or not file.read_text():
            if process.returncode is not None:
                raise RuntimeError(f"{CHROMIUM} ended with {process.returncode}")
            await asyncio.sleep(0.05)
    return int(file.read_text().splitlines()[0])
