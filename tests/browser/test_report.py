"""The report in a real headless browser: `make browser` (needs Chromium on the machine; outside `make test`).

Looks at what only a browser can tell: that nothing is requested, no hostile text runs, nothing overflows a phone, light and
dark have contrast, and keyboard and filter work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from atoms.manifest import Effect
from atoms.package import Package
from offline.report import render_report

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
HOSTILE = (
    "</script><script>document.title='owned'</script>"
    "\"><img src=x onerror=\"document.title='owned'\"><svg/onload=document.title='owned'>"
    "' onmouseover='document.title=\"owned\"' x='<iframe srcdoc=\"<script>parent.document.title='owned'</script>\">"
    "<a href=\"javascript:document.title='owned'\">x</a><style>body{display:none}</style>"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    assert path, f"no browser: install Chromium so that one of {', '.join(names)} is on the PATH"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def html(tiny_package: Package) -> str:
    """The report of the tiny package, with hostile text wherever text comes from documents."""
    atoms = [
        card.model_copy(update={"keywords": [HOSTILE, f"word{n}"], "effects": [
            Effect(detector="yes-no", coefficient=c, n=20, rate_unsteered=0.2, rate=0.2 + c / 10) for c in (-2.0, 2.0)]})
        for n, card in enumerate(tiny_package.manifest.atoms)
    ]  # fmt: skip
    manifest = tiny_package.manifest.model_copy(update={"atoms": atoms})
    evidence = [{"atom": line["atom"], "documents": [d | {"id": HOSTILE, "prompt": HOSTILE} for d in line["documents"]]}
                for line in tiny_package.evidence()]  # fmt: skip
    return render_report(manifest, evidence, tiny_package.projection_tensors, tiny_package.drift)


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, html: str, tmp_path: Path) -> Iterator[Open]:
    """`opened(viewport=…, color_scheme=…)`: the page; requests and console messages are kept in `page.seen`."""
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    contexts = []

    def open_page(**settings: object) -> Page:
        context = browser.new_context(**settings)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.seen = []  # type: ignore[attr-defined]
        page.on("request", lambda request: page.seen.append(request.url))  # type: ignore[attr-defined]
        page.on("console", lambda message: page.seen.append(message.text))  # type: ignore[attr-defined]
        page.on("pageerror", lambda error: page.seen.append(str(error)))  # type: ignore[attr-defined]
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def test_nothing_is_requested_and_nothing_hostile_runs(opened: Open, tiny_package: Package) -> None:
    page = opened()
    for link in page.locator("article, svg a, blockquote").all()[:40]:
        link.hover(force=True)
    assert len(page.seen) == 1 and page.seen[0].startswith("file:"), page.seen  # type: ignore[attr-defined]
    assert page.title() == f"{tiny_package.manifest.name} {tiny_package.manifest.version} · atomsteer"
    assert page.locator("iframe, img").count() == 0
    assert page.locator("blockquote .ask").first.inner_text() == HOSTILE


def test_the_policy_holds_even_if_escaping_failed(browser: Browser, html: str, tmp_path: Path) -> None:
    broken = html.replace(
        "<main>", "<main><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    )
    assert broken != html
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "broken.html").as_uri())
    assert "owned" not in page.title()
    page.close()


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_the_page_never_scrolls_sideways(opened: Open, width: int) -> None:
    page = opened(viewport={"width": width, "height": 800})
    beyond = page.evaluate(
        """(width) => [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > width + 1
             && !e.closest(".scroll, nav")).map((e) => e.tagName + " " + e.textContent.slice(0, 40))""", width,
    )  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth") <= width, beyond


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened: Open, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 against the background behind it, for every kind of text."""
    page = opened(color_scheme=scheme)
    worst = page.evaluate(
        """() => {
          const canvas = document.createElement("canvas"), pen = canvas.getContext("2d", {willReadFrequently: true});
          const rgb = (c) => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data]; };
          const light = (c) => { const [r, g, b] = rgb(c).map((v) => v / 255).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                                 return .2126 * r + .7152 * g + .0722 * b; };
          const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (rgb(c)[3] === 255) return c; } return "white"; };
          const found = [];
          for (const e of document.querySelectorAll("p, dt, dd, th, td, h1, h2, h3, h4, figcaption, summary, li, label, text.tick, text.name, text.axis")) {
            const style = getComputedStyle(e), ink = e.ownerSVGElement ? style.fill : style.color;
            const [a, b] = [light(ink), light(behind(e.ownerSVGElement || e))].sort((x, y) => y - x);
            found.push([(a + .05) / (b + .05), e.tagName + "." + e.getAttribute("class")]);
          }
          return found.sort((x, y) => x[0] - y[0]).slice(0, 3);
        }"""
    )
    assert worst and worst[0][0] >= 4.5, worst


def test_light_and_dark_differ(opened: Open) -> None:
    shades = {
        s: opened(color_scheme=s).evaluate("getComputedStyle(document.body).backgroundColor") for s in ("light", "dark")
    }
    assert shades["light"] != shades["dark"]


def test_the_keyboard_reaches_atoms_from_the_map(opened: Open, tiny_package: Package) -> None:
    page = opened()
    ids = {card.id for card in tiny_package.manifest.atoms}
    for _ in range(40):
        page.keyboard.press("Tab")
        target = page.evaluate("document.activeElement.closest('svg') && document.activeElement.getAttribute('href')")
        if target:
            break
    assert target and target.removeprefix("#") in ids, "Tab never reaches an atom of the map"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == target
    assert page.locator(target).is_visible()


def test_finding_and_sorting_cards(opened: Open, tiny_package: Package) -> None:
    page = opened()
    cards = tiny_package.manifest.atoms
    assert page.locator("article").count() == len(cards) > 1
    page.fill("#find", "word1")
    assert page.locator("article:visible").count() == page.locator("#overview tbody tr:visible").count() == 1
    assert page.locator("#count").inner_text() == f"1 of {len(cards)} atoms"
    page.fill("#find", "")
    page.select_option("#sort", label="by documents")
    shown = page.locator("article").evaluate_all("all => all.map(card => Number(card.dataset.documents))")
    assert shown == sorted(shown, reverse=True)


def test_it_reads_without_scripts(browser: Browser, html: str, tmp_path: Path, tiny_package: Package) -> None:
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("article:visible").count() == len(tiny_package.manifest.atoms)
    assert not page.locator(".tools").is_visible(), "controls that do nothing are shown"
    assert json.dumps(page.locator("h1").inner_text())
    context.close()
