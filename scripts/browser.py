"""A headless Chromium to look at pages with: over its DevTools protocol, for the tests of the dashboard and for its pictures."""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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

    async def call(self, method: str, patience: float = _PATIENCE, **parameters: Any) -> dict[str, Any]:
        """Raises RuntimeError with what the browser says against it."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(patience):
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

    async def evaluate(self, expression: str, patience: float = _PATIENCE) -> Any:
        """The value of a JavaScript expression; of a promise what it resolves to."""
        answer = await self.call("Runtime.evaluate", patience, expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 60.0) -> Any:
        """The value of the expression once it is true. Raises TimeoutError that says what the page shows instead."""
        looking = f"""new Promise((found, fail) => {{
          const end = performance.now() + {seconds * 1000};
          const look = () => {{
            const value = ({expression});
            if (value) found(value); else if (performance.now() > end) found(null); else setTimeout(look, 50);
          }};
          look();
        }})"""
        value = await self.evaluate(looking, seconds + _PATIENCE)
        if not value:
            shown = await self.evaluate("document.body.innerText")
            raise TimeoutError(f"not within {seconds:g} s: {expression}; the page: {shown!r}; its problems: {self.problems}")
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
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr is not None
        reading: asyncio.Task[None] | None = None
        try:
            address = await _address(process.stderr)
            reading = asyncio.create_task(_read_on(process.stderr))
            async with aiohttp.ClientSession(f"http://{address}") as client:
                async with client.get("/json/list") as answer:
                    targets = await answer.json()
                socket_address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
                async with client.ws_connect(socket_address, max_msg_size=0) as socket:
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
            if reading is not None:
                await reading


async def _address(errors: asyncio.StreamReader) -> str:
    """HOST:PORT, which Chromium writes when it listens."""
    said = []
    async with asyncio.timeout(_PATIENCE):
        async for line in errors:
            said.append(line.decode(errors="replace"))
            found = re.search(r"DevTools listening on ws://([^/]+)/", said[-1])
            if found:
                return found[1]
    raise RuntimeError(f"{CHROMIUM} ended: {''.join(said[-5:])}")


async def _read_on(errors: asyncio.StreamReader) -> None:
    """What nobody reads would fill the pipe, and the browser would wait."""
    async for _ in errors:
        pass
