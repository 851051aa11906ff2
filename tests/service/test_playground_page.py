"""The playground in headless Chromium, with the bundled model behind it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image, ImageStat
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.patience import HELD_S, PATIENCE_S, PROCESS_S
from tests.service.backbones import encoded, picture
from tests.service.heads import same_head
from tests.service.live import Live, serve
from text2weight.artifact import read_head
from text2weight_service.model import load_model

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
SCHEMES = ("light", "dark")
SCREENSHOTS = Path(__file__).resolve().parents[2] / "demo" / "screenshots.py"

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    # A thousand steps are let in, however busy the machine is.
    with serve(load_model, request_timeout_s=HELD_S) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=1000 * PATIENCE_S)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, timeout=1000 * PATIENCE_S)
        yield running
        running.close()


@pytest.fixture
def open_page(service: Live, browser: Browser) -> Iterator[OpenPage]:
    """Opens the page; in the end it must have asked nobody else for anything, and its scripts not have failed."""
    base, asked, failures, contexts = f"http://127.0.0.1:{service.port}/", [], [], []

    def opened(routes: dict[str, Callable[[Route], None]] | None = None, **options: object) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda message: failures.append(message.text) if "Policy" in message.text else None)
        for path, answer in (routes or {}).items():
            page.route(f"{base}{path}", answer)
        page.goto(base)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert failures == []
    assert [url for url in asked if not url.startswith((base, f"blob:{base}"))] == []
    assert f"{base}playground/app.js" in asked


def ready(page: Page) -> Page:
    expect(page.locator("#worker")).to_contain_text("ready")
    return page


def problem(status: int, **fields: object) -> Callable[[Route], None]:
    """An answer with problem details."""
    content = {"type": "urn:text2weight:problem:x", "title": "A title", "status": status, "detail": "the detail"}
    headers = {"Retry-After": "3"} if status == 429 else {}

    def answer(route: Route) -> None:
        body = json.dumps({**content, "request_id": "id-1", "errors": [], **fields})
        route.fulfill(status=status, body=body, headers=headers, content_type="application/problem+json")

    return answer


def type_classes(page: Page, *names: str) -> None:
    page.locator("#classes-input").focus()
    for name in names:
        page.keyboard.type(name)
        page.keyboard.press("Enter")


def generated(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#news")).to_have_text("The head is ready.")


def downloaded(page: Page) -> bytes:
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the head").click()
    return Path(download.value.path()).read_bytes()


def test_keyboard_alone_gets_a_head(open_page: OpenPage, service: Live) -> None:
    page = ready(open_page())
    page.keyboard.press("Tab")
    expect(page.get_by_label("Class name")).to_be_focused()
    type_classes(page, "apple", "bus", "school bus")
    visited = []
    while page.evaluate("document.activeElement.id") != "seed-input":
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", visited
        assert len(visited) < 15
    assert visited[:4] == ["Add", "Remove apple", "Remove bus", "Remove school bus"]
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    expect(page.locator("#news")).to_have_text("The head is ready.")
    expect(page.locator("#facts")).to_contain_text("apple, bus, school bus")
    page.get_by_role("link", name="Download the head").focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "head-7.safetensors"
    expected = service.generate("apple", "bus", "school bus", seed=7, sampler="mean", steps=1)
    assert same_head(Path(download.value.path()).read_bytes(), expected.content)


def test_list_of_classes(open_page: OpenPage, service: Live) -> None:
    info = service.client.get("/info").json() | {"known_classes": ["apple", "bus", "rocket", "clock"]}
    page = ready(open_page({"info": lambda route: route.fulfill(json=info)}))
    chips = page.locator("#chips li span")
    page.locator("#classes-input").fill(" apple, sea_lion;bus,, Apple")
    page.get_by_role("button", name="Add").click()
    expect(chips).to_have_text(["apple", "sea lion", "bus"])
    expect(page.locator("#classes-error")).to_have_text("Apple is there already.")
    expect(page.locator("#unknown")).to_contain_text("sea lion")
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.setData("text", "rocket\\nclock\\n");
        const paste = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
        document.getElementById("classes-input").dispatchEvent(paste);
    }""")
    expect(chips).to_have_text(["apple", "sea lion", "bus", "rocket", "clock"])
    page.get_by_role("button", name="Remove sea lion").press("Enter")
    expect(page.get_by_role("button", name="Remove bus")).to_be_focused()
    expect(page.locator("#unknown")).to_be_hidden()
    page.get_by_role("button", name="Pets").click()
    expect(chips).to_have_text(["tabby", "golden retriever", "goldfish"])


def test_denoising_is_seen_live(open_page: OpenPage, service: Live) -> None:
    page = ready(open_page())
    page.evaluate("""() => {
        globalThis.seen = { steps: [], maps: new Set() };
        const look = () => {
            seen.steps.push(document.getElementById("progress").value);
            seen.maps.add(document.getElementById("map").toDataURL());
        };
        new MutationObserver(look).observe(document.getElementById("step"), { childList: true });
    }""")
    type_classes(page, "apple", "bus")
    page.get_by_label("Sampler").select_option("ddim")
    page.get_by_label("Seed").fill("3")
    generated(page)
    steps = page.evaluate("seen.steps.filter((step) => step > 0)")
    assert len(steps) > 5
    assert steps == sorted(steps)
    assert page.evaluate("seen.maps.size") > 5, "the heat map did not change"
    expect(page.locator("#running")).to_be_hidden()
    assert same_head(downloaded(page), service.generate("apple", "bus", seed=3, sampler="ddim", steps=20).content)


def test_stop(open_page: OpenPage) -> None:
    page = ready(open_page())
    type_classes(page, "apple", "bus")
    page.get_by_label("Sampler").select_option("ddpm")
    page.get_by_label("Steps").fill("1000")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#step")).to_contain_text("of 1000")
    page.get_by_role("button", name="Stop").press("Enter")
    expect(page.locator("#news")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    expect(page.locator("#result")).to_be_hidden()


STREAMS = {
    "absent": problem(404),
    "cut short": lambda route: route.fulfill(
        body='event: progress\ndata: {"step": 1, "steps": 2, "timestep": 9}\n\n', content_type="text/event-stream"
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_without_the_stream_a_plain_request_is_made(open_page: OpenPage, service: Live, case: str) -> None:
    page = ready(open_page({"generate/stream": STREAMS[case]}))
    type_classes(page, "apple", "bus")
    page.get_by_label("Seed").fill("3")
    generated(page)
    assert same_head(downloaded(page), service.generate("apple", "bus", seed=3).content)


def test_errors_stand_beside_their_fields(open_page: OpenPage) -> None:
    page = ready(open_page({"generate/stream": problem(404)}))
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#classes-error")).to_have_text("Add at least 2 classes.")
    expect(page.get_by_label("Class name")).to_be_focused()
    type_classes(page, "apple", "b\u0007us")
    page.get_by_label("Seed").fill("-1")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#seed-error")).to_contain_text("A whole number from 0")
    expect(page.get_by_label("Seed")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#classes-error")).to_contain_text("control character")
    expect(page.locator("#chips .fault")).to_contain_text("us")
    expect(page.get_by_label("Class name")).to_be_focused()
    expect(page.locator("#seed-error")).to_be_hidden()
    expect(page.locator("#news")).to_have_text("No new head.")


def test_other_errors_are_told_in_words(open_page: OpenPage) -> None:
    fault = {"errors": [{"field": "classes[1]", "message": "is wrong"}]}
    answers = [problem(429), problem(422, **fault), lambda route: route.abort()]
    page = ready(open_page({"generate/stream": lambda route: answers.pop(0)(route)}))
    type_classes(page, "apple", "bus")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#problem")).to_have_text("the detail. Try again in 3 s. (request id-1)")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#chips .fault")).to_have_text(re.compile("bus"))
    expect(page.locator("#classes-error")).to_have_text("is wrong")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#problem")).to_have_text("The service cannot be reached.")


def test_key_is_asked_for_and_kept_nowhere(open_page: OpenPage) -> None:
    sent = []

    def guarded(route: Route) -> None:
        sent.append(route.request.headers.get("authorization"))
        route.continue_() if sent[-1] == "Bearer right" else problem(401)(route)

    page = open_page({"info": guarded, "generate/stream": guarded})
    key = page.get_by_label("Key of this service")
    expect(key).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The service does not accept this key.")
    key.fill("right")
    page.keyboard.press("Enter")
    expect(page.locator("#key-section")).to_be_hidden()
    expect(page.get_by_role("link", name="API documentation", include_hidden=True)).to_be_hidden()
    type_classes(ready(page), "apple", "bus")
    generated(page)
    assert sent == [None, "Bearer wrong", "Bearer right", "Bearer right"]
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    assert "right" not in kept
    assert page.context.cookies() == []
    for code in ("#curl", "#python"):
        expect(page.locator(code)).to_contain_text("TEXT2WEIGHT_KEY")
        expect(page.locator(code)).not_to_contain_text("right")


def test_pictures_are_classified(open_page: OpenPage, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(picture()))
    bad.write_bytes(b"no picture")
    page = ready(open_page())
    page.locator("#image-input").set_input_files([good])
    expect(page.locator("#picture-news")).to_contain_text("Generate a head")
    type_classes(page, "apple", "bus", "rocket")
    generated(page)
    expect(page.locator("#picture-news")).to_have_text("1 picture classified.")
    rows = page.locator("#gallery ol li")
    expect(rows).to_have_count(3)
    shares = [float(text) for text in re.findall(r"([\d.]+)\s%", " ".join(rows.all_text_contents()))]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    widths = [
        row.locator(".bar").evaluate("bar => bar.offsetWidth / bar.parentElement.offsetWidth") for row in rows.all()
    ]
    assert widths == pytest.approx([share / 100 for share in shares], abs=0.02)
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File(["no picture"], "dropped.png", { type: "image/png" }));
        data.items.add(new File(["GIF89a"], "moving.gif", { type: "image/gif" }));
        const drop = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
        document.getElementById("drop").dispatchEvent(drop);
    }""")
    expect(page.locator("#image-error")).to_have_text("A picture cannot be used.")
    expect(page.locator("#gallery > li", has_text="dropped.png").locator(".error")).to_contain_text("not a whole JPEG")
    expect(page.locator("#gallery > li")).to_have_count(2)


def test_limits_of_the_service_are_the_pages(open_page: OpenPage, service: Live, tmp_path: Path) -> None:
    info = service.client.get("/info").json()
    info["limits"] |= {"exact_steps": {"ddpm": 3}, "max_pictures": 1}
    page = ready(open_page({"info": lambda route: route.fulfill(json=info)}))
    page.get_by_label("Sampler").select_option("ddpm")
    expect(page.locator("#steps-input")).to_be_disabled()
    expect(page.locator("#steps-input")).to_have_value("3")
    expect(page.locator("#steps-hint")).to_have_text("ddpm takes exactly 3.")
    page.get_by_label("Sampler").select_option("mean")
    expect(page.locator("#steps-input")).to_be_enabled()
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file in files:
        file.write_bytes(encoded(picture()))
    page.locator("#image-input").set_input_files(files)
    expect(page.locator("#image-error")).to_have_text("At most 1 pictures: 1 are left out.")
    expect(page.locator("#gallery > li")).to_have_count(1)


def test_worker_without_backbone(open_page: OpenPage, service: Live) -> None:
    info = service.client.get("/info").json()
    info["features"]["classify"] = False
    page = ready(open_page({"info": lambda route: route.fulfill(json=info)}))
    expect(page.locator("#no-backbone")).to_be_visible()
    expect(page.locator("#image-input")).to_be_hidden()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accessible(open_page: OpenPage, scheme: str, tmp_path: Path) -> None:
    """axe finds nothing: names, roles, contrast, landmarks, headings; also with errors and results on the page."""
    page = ready(open_page(color_scheme=scheme))
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#classes-error")).to_be_visible()
    assert_no_violations(page)
    (tmp_path / "good.png").write_bytes(encoded(picture()))
    page.locator("#image-input").set_input_files([tmp_path / "good.png"])
    type_classes(page, "apple", "bus", "zorkmid")
    generated(page)
    expect(page.locator("#picture-news")).to_have_text("1 picture classified.")
    page.evaluate("document.getElementById('key-section').hidden = false")
    assert_no_violations(page)


def assert_no_violations(page: Page) -> None:
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()


def test_small_screen(open_page: OpenPage) -> None:
    page = ready(open_page(viewport={"width": 320, "height": 600}))
    type_classes(page, "apple", "a name that is rather long", "x" * 60)
    generated(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    heights = page.evaluate("[...document.querySelectorAll('button, select, .row > input')].map((e) => e.offsetHeight)")
    assert min(height for height in heights if height) >= 36


def test_screenshots(service: Live, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{service.port}/"
    command = [sys.executable, SCREENSHOTS, "--url", address, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_S, check=False)
    assert done.returncode == 0, done.stderr
    views = {name: Image.open(tmp_path / f"{name}.png") for name in (*SCHEMES, "narrow")}
    assert {name: view.width for name, view in views.items()} == {"light": 960, "dark": 960, "narrow": 360}
    assert min(view.height for view in views.values()) > 900, "the whole page is longer than its window"
    brightness = {name: ImageStat.Stat(view.convert("L")).mean[0] for name, view in views.items()}
    assert brightness["dark"] < 100 < 200 < brightness["light"]


def test_code_on_the_page_runs(
    open_page: OpenPage, service: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ready(open_page(permissions=["clipboard-read", "clipboard-write"]))
    names = ("it's", 'a "quoted" bus', "Käse $HOME \\")
    type_classes(page, *names)
    page.get_by_label("Sampler").select_option("ddim")
    page.get_by_label("Steps").fill("3")
    page.get_by_label("Seed").fill("5")
    expected = service.generate(*names, seed=5, sampler="ddim", steps=3).content
    monkeypatch.chdir(tmp_path)

    def copied(button: str) -> str:
        page.get_by_role("button", name=button).click()
        expect(page.locator("#copy-news")).to_contain_text("copied")
        return str(page.evaluate("navigator.clipboard.readText()"))

    exec(compile(copied("Copy the Python program"), "page", "exec"), {})
    assert same_head(Path("head.safetensors").read_bytes(), expected)
    Path("head.safetensors").unlink()
    subprocess.run(["bash", "-c", copied("Copy the curl command")], check=True, capture_output=True, timeout=PROCESS_S)
    assert same_head(Path("head.safetensors").read_bytes(), expected)
    assert read_head(expected).classes == names
