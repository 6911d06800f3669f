"""A server with the demo model and a browser that several tests share; each test has a page whose
browser remembers nothing of the others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import connect

from tests.e2e.page.test_page import Page, run, text

DESKTOP, PHONE, LARGE = (1280, 800), (390, 664), (2560, 1440)


class Visit(Page):
    """A page in a browser context of its own."""

    context: str

    async def go(self, url: str, size: tuple[int, int] = DESKTOP) -> None:
        # The page is closed with the connection.
        made = await self.call("Target.createBrowserContext", disposeOnDetach=True)
        self.context = made["browserContextId"]
        await self.open(url, browserContextId=self.context)
        await self.resize(size)
        await self.loaded()

    async def loaded(self) -> None:
        await self.until("document.readyState === 'complete'")
        await self.until("document.body.dataset.tab === 'chat'")

    async def resize(self, size: tuple[int, int], *, dark: bool = False) -> None:
        width, height = size
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def click(self, selector: str, number: int = 0) -> None:
        await self.until(f"document.querySelectorAll({selector!r}).length > {number}")
        await self.value(f"document.querySelectorAll({selector!r})[{number}].click()")

    async def put(self, element: str, value: str, event: str = "change") -> None:
        """As if it was typed into a field."""
        await self.value(
            f"(() => {{ const e = document.getElementById({element!r}); e.value = {value!r}; "
            f"e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event({event!r})); }})()"
        )

    async def submit(self, form: str, field: str, value: str) -> None:
        await self.put(field, value)
        await self.value(f"document.getElementById({form!r}).requestSubmit()")

    async def says(self, element: str, words: str) -> str:
        """Waits until an element's text holds the words; returns all of it."""
        await self.until(f"{text(element)}.includes({words!r})")
        return str(await self.value(text(element)))


@asynccontextmanager
async def visit(debugger: str) -> AsyncIterator[Visit]:
    async with connect(debugger, max_size=None) as socket:
        page = Visit(socket)
        yield page
        assert page.console == []


def visited(debugger: str, url: str, steps: Callable[[Visit], Coroutine[Any, Any, None]]) -> None:
    """Takes the steps on a fresh page."""

    async def whole() -> None:
        async with visit(debugger) as page:
            await page.go(url)
            await steps(page)

    run(whole())
