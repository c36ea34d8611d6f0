"""The page at `/` in a real browser: choose a file, type, press the button, watch the answer arrive."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loadtest import media
from tests.e2e import browser
from tests.e2e.server import EngineServer
from tests.service.server import Server

IMAGE = Path(__file__).parents[2] / "model/demo/media/scene.png"

pytestmark = pytest.mark.skipif(browser.BINARY is None, reason="no Chromium here")


def test_a_user_uploads_types_presses_and_reads(demo_server: EngineServer, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(media.video(0, 128, 96).data)
    with browser.browser_page(tmp_path / "profile") as page:
        page.open(demo_server.url)
        page.wait("document.querySelector('#status').innerText === 'ready'")

        page.choose_files("#files", IMAGE)
        page.wait("document.querySelector('#previews img').naturalWidth > 0")
        page.type_over("#prompt", "Describe the image.")
        page.type_over("#max_tokens", "60")
        page.click("#go")
        page.wait("document.querySelector('#runs tbody').rows.length === 1")
        answer = page.text("#answer")
        assert len(answer) > 20
        assert page.value("document.querySelectorAll('#answer .target, #answer .draft').length") > 5, "token by token"
        figures = {name: page.text(f"#{name}") for name in ("speed", "acceptance", "share", "ttft")}
        assert re.fullmatch(r"\d+", figures["speed"]), figures
        assert re.fullmatch(r"\d+\.\d\d", figures["acceptance"]), figures
        assert re.fullmatch(r"\d+ %", figures["share"]), figures
        assert re.fullmatch(r"\d+\.\d\d s", figures["ttft"]), figures
        assert page.text("#runs tbody td:nth-child(2)") == "on"

        page.click(".switch")
        page.click("#go")
        page.wait("document.querySelector('#runs tbody').rows.length === 2")
        assert page.text("#answer") == answer, "the same text without speculation"
        assert page.text("#runs tbody td:nth-child(2)") == "off"
        assert page.text("#acceptance") == "–"
        page.click(".switch")
        page.click("#go")
        page.wait("document.querySelector('#runs tbody').rows.length === 3")
        page.screenshot(tmp_path / "playground.png")
        assert (tmp_path / "playground.png").stat().st_size > 10_000

        page.choose_files("#files", clip)
        page.wait("document.querySelector('#previews video')?.readyState >= 2")
        page.click("#go")
        page.wait("document.querySelector('#runs tbody').rows.length === 4")
        assert page.text("#answer") not in ("", answer)
        assert page.complaints == [], "neither errors nor breaches of the page's own policy"
        page.value("document.body.append(Object.assign(new Image(), {src: 'https://elsewhere.invalid/x.png'})), 0")
        page.wait("true")
        assert any("Content Security Policy" in one for one in page.complaints), "a breach would have been seen"

        page.type_over("#temperature", "7")
        page.click("#temperature")
        page.value("document.querySelector('#form').noValidate = true")
        page.click("#go")
        page.wait("document.querySelector('#answer .error')")
        assert "temperature" in page.text("#answer .error"), "a refusal is shown in the service's own words"


def test_the_page_passes_over_comments_that_keep_its_stream_open(tmp_path: Path) -> None:
    """It took each block of a stream for JSON."""
    server = Server(tmp_path, {"delay": 0.2}, {"sse_keepalive_seconds": 0.05})
    try:
        with browser.browser_page(tmp_path / "profile") as page:
            page.open(server.url)
            page.wait("document.querySelector('#status').innerText === 'ready'")
            page.type_over("#prompt", "go on")
            page.type_over("#max_tokens", "9")
            page.click("#go")
            page.wait("document.querySelector('#runs tbody').rows.length === 1")
            whole = server.chat("go on", max_tokens=9).json()["choices"][0]["message"]["content"]
            assert page.text("#answer").split() == whole.split()
            assert page.complaints == []
    finally:
        assert server.close() == 0
