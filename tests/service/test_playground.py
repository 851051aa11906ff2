"""The page's files: how they are served, and that they keep to themselves."""

import re
import threading
from pathlib import Path

import pytest

import text2weight_service
from tests.patience import HELD_S
from tests.service.fakes import FakeModel
from tests.service.live import Live, serve
from text2weight_service.playground_routes import assets
from text2weight_service.settings import Settings

FOLDER = Path(text2weight_service.__file__).parent / "playground"
FILES = sorted(path.name for path in FOLDER.iterdir())
MAX_LINES = 500


def path_of(name: str) -> str:
    return "/" if name == "index.html" else f"/playground/{name}"


@pytest.mark.parametrize("name", FILES)
def test_file_is_served_as_it_is(shared_live: Live, name: str) -> None:
    response = shared_live.client.get(path_of(name))
    assert response.status_code == 200
    assert response.content == (FOLDER / name).read_bytes()
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert response.headers["content-type"].startswith(kinds[Path(name).suffix])
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_content_security_policy(shared_live: Live) -> None:
    for name in FILES:
        header = shared_live.client.get(path_of(name)).headers["content-security-policy"]
        policy = dict(directive.split(" ", 1) for directive in header.split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in header


@pytest.mark.parametrize("name", ["index.html", "app.js"])
def test_unchanged_file_is_not_sent_again(shared_live: Live, name: str) -> None:
    first = shared_live.client.get(path_of(name))
    tag = first.headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', tag)
    assert first.headers["cache-control"] == "no-cache"
    for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = shared_live.client.get(path_of(name), headers={"If-None-Match": given})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert shared_live.client.get(path_of(name), headers={"If-None-Match": '"other"'}).status_code == 200


def test_files_differ_in_their_tags() -> None:
    assert len({asset.etag for asset in assets().values()}) == len(FILES)


@pytest.mark.parametrize("path", ["/playground/", "/playground/none.js", "/playground/..%2fapp.py", "/playground/%00"])
def test_nothing_else_is_served(shared_live: Live, path: str) -> None:
    response = shared_live.client.get(path)
    assert response.status_code == 404
    assert response.json()["type"] == "urn:text2weight:problem:not-found"


def test_page_is_there_before_the_model() -> None:
    gate = threading.Event()

    def load(_: Settings) -> FakeModel:
        assert gate.wait(HELD_S)
        return FakeModel()

    with serve(load, wait_until_ready=False) as starting:
        assert starting.client.get("/health/ready").status_code == 503
        assert starting.client.get("/").status_code == 200
        gate.set()


def test_page_needs_nothing_from_outside() -> None:
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|//[a-z0-9-]+\.[a-z]", text), name
        assert "@import" not in text, name


def test_page_has_no_inline_code() -> None:
    text = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", text)
    assert re.findall(r"<script[^>]*>([^<]*)</script>", text) == [""]


def test_every_file_is_used() -> None:
    texts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
    named = set(re.findall(r'playground/([\w.]+)"', texts["index.html"]))
    for name in FILES:
        if name.endswith(".js"):
            named |= set(re.findall(r'from "\./([\w.]+)"', texts[name]))
    assert named | {"index.html"} == set(FILES)


def test_every_element_that_the_scripts_name_is_on_the_page() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([\w-]+)"', page)
    assert len(ids) == len(set(ids))
    scripts = "".join((FOLDER / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".js"))
    assert set(re.findall(r'\$\("([\w-]+)"\)', scripts)) <= set(ids)
    assert set(re.findall(r'(?:for|aria-labelledby|list)="([\w-]+)"', page)) <= set(ids)
    described = " ".join(re.findall(r'aria-describedby="([\w -]+)"', page)).split()
    assert set(described) <= set(ids)


def test_no_file_is_too_long() -> None:
    lengths = {name: len((FOLDER / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
