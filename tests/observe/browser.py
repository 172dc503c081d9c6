"""A headless Chromium for tests of pages: opens a file as a phone or a desktop would, and says what it saw.

Source: Chrome DevTools Protocol, domains Page, Runtime, Network, Log, Emulation.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import struct
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import aiohttp
import anyio
import anyio.abc

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Without the background flags it looks for its maker's servers; those requests would be mistaken for the page's.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A screenshot as pixels."""

    width: int
    height: int
    rows: tuple[bytes, ...]
    channels: int

    def at(self, x: float, y: float) -> tuple[int, int, int]:
        """The colour at a place, both 0 to 1 from the upper left."""
        column = min(self.width - 1, int(x * self.width)) * self.channels
        red, green, blue = self.rows[min(self.height - 1, int(y * self.height))][column : column + 3]
        return red, green, blue


@dataclass(slots=True)
class Page:
    """One opened page. Talks to the browser one request at a time.

    Attributes:
        requests: every URL that the browser asked for.
        complaints: errors and warnings of the console and the log.
    """

    socket: aiohttp.ClientWebSocketResponse
    requests: list[str]
    complaints: list[str]
    _number: int = 0

    async def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Load a local page on a screen this wide, and wait until it is drawn."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")
        phone = width < 600
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": phone}
        await self._call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self._call("Emulation.setEmulatedMedia", features=[scheme])
        await self._call("Page.navigate", url=path.as_uri())
        await self._until("Page.loadEventFired")

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives on the page."""
        answer = await self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def picture(self, selector: str) -> Picture:
        """A screenshot of the first element that the selector finds."""
        box = await self.value(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1} })()"
        )
        return decode_png(await self.screenshot(clip=box))

    async def screenshot(self, **options: Any) -> bytes:
        """The whole page as PNG."""
        answer = await self._call("Page.captureScreenshot", captureBeyondViewport=True, **options)
        return base64.b64decode(answer["data"])

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self.socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found

    async def _until(self, method: str) -> None:
        while (await self._next()).get("method") != method:
            pass

    async def _next(self) -> dict[str, Any]:
        with anyio.fail_after(30):
            message: dict[str, Any] = await self.socket.receive_json()
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.complaints.append(json.dumps(message["params"]))
            case _:
                pass
        return message


@contextlib.asynccontextmanager
async def opened_browser(profile: Path) -> AsyncIterator[Page]:
    """A page of a fresh browser; it ends with the block."""
    assert PROGRAM is not None, "tests skip without it"
    command = [PROGRAM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    async with await anyio.open_process(command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE) as process:
        try:
            address = await _address(process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{address}/json/list") as answer:
                    targets = await answer.json(content_type=None)
                target = next(one for one in targets if one["type"] == "page")
                url = target["webSocketDebuggerUrl"]
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    yield Page(socket, [], [])
        finally:
            process.terminate()


async def _address(process: anyio.abc.Process) -> str:
    """Where it listens; it says so on stderr."""
    assert process.stderr is not None, "asked for"
    said = b""
    with anyio.fail_after(30):
        async for chunk in process.stderr:
            said += chunk
            for line in said.splitlines(keepends=True):
                if b"DevTools listening on ws://" in line and line.endswith(b"\n"):
                    return line.split(b"ws://")[1].split(b"/")[0].decode()
    raise AssertionError(f"the browser ended: {said.decode(errors='replace')}")


def decode_png(data: bytes) -> Picture:
    """Pixels of a PNG of 8 bits a channel. Source: PNG Specification (Third Edition), sections 7.3, 9.2, 11.2.1."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n", "no PNG"
    position, packed = 8, b""
    width = height = channels = 0
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            channels = {2: 3, 6: 4}[colour]
            assert (depth, interlaced) == (8, 0), "a screenshot is plain"
        elif kind == b"IDAT":
            packed += body
        position += length + 12
    raw = zlib.decompress(packed)
    stride = width * channels
    rows: list[bytes] = []
    before = bytes(stride)
    for row in range(height):
        start = row * (stride + 1)
        before = _unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + stride]), before, channels)
        rows.append(before)
    return Picture(width=width, height=height, rows=tuple(rows), channels=channels)


def _unfiltered(kind: int, line: bytearray, above: bytes, step: int) -> bytes:
    for index in range(len(line)):
        left = line[index - step] if index >= step else 0
        up, corner = above[index], above[index - step] if index >= step else 0
        if kind == 1:
            line[index] = (line[index] + left) & 255
        elif kind == 2:
            line[index] = (line[index] + up) & 255
        elif kind == 3:
            line[index] = (line[index] + (left + up) // 2) & 255
        elif kind == 4:
            guess = left + up - corner
            nearest = min((left, up, corner), key=lambda one: abs(guess - one))
            line[index] = (line[index] + nearest) & 255
    return bytes(line)
