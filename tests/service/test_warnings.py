"""Names that the text encoder was not trained on are marked by every route that answers with a head."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.service.forms import post
from tests.service.live import Live, serve
from tests.service.test_stream import events
from tests.service.tiny import write_tower_checkpoint
from text2weight.strict_safetensors import read_header
from text2weight_service.model import load_model

KNOWN, STRANGE = ["apple", "bus"], ["apple", "quokka", "okapi"]
DESCRIPTIONS = {"apple": "a round red fruit", "quokka": "a small animal"}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service around a tiny random checkpoint with a text tower, which knows apple and bus."""
    with serve(load_model, checkpoint=str(write_tower_checkpoint(tmp_path_factory.mktemp("tower")))) as running:
        yield running


def head_of(live: Live, *classes: str, **fields: Any) -> bytes:
    return live.generate(*classes, seed=1, **fields).content


def fuse_text(live: Live, classes: list[str]) -> httpx.Response:
    return live.client.post("/fuse", json={"tasks": [{"classes": KNOWN}, {"classes": classes}], "seed": 1})


def fuse_merged(live: Live, classes: list[str]) -> httpx.Response:
    body = {"tasks": [{"classes": KNOWN}, {"classes": classes}], "method": "average"}
    return post(live.client, "/fuse", body, head_of(live, *KNOWN), head_of(live, *classes))


def enhance(live: Live, classes: list[str]) -> httpx.Response:
    return post(live.client, "/enhance", {"strength": 0.5, "seed": 1}, head_of(live, *classes))


ROUTES = {"fuse, text": fuse_text, "fuse, merged": fuse_merged, "enhance": enhance}


def warnings_in(head: bytes) -> list[str]:
    found: list[str] = json.loads(read_header(head).metadata.get("warnings", "[]"))
    return found


@pytest.mark.parametrize("route", ROUTES)
def test_strange_names_are_marked(tower: Live, route: str) -> None:
    response = ROUTES[route](tower, STRANGE)
    assert response.status_code == 200, response.text
    assert response.headers["x-t2w-warnings"] == "2"
    assert warnings_in(response.content) == warnings_in(head_of(tower, *STRANGE))
    assert all(name in warning for name, warning in zip(STRANGE[1:], warnings_in(response.content), strict=True))


@pytest.mark.parametrize("route", ROUTES)
def test_known_names_are_not(tower: Live, route: str) -> None:
    response = ROUTES[route](tower, KNOWN)
    assert response.status_code == 200, response.text
    assert "x-t2w-warnings" not in response.headers
    assert warnings_in(response.content) == []


def test_stream(tower: Live) -> None:
    body = {"classes": STRANGE, "seed": 1, "sampler": "ddim", "steps": 2, "heads_every": 1}
    with tower.client.stream("POST", "/generate/stream", json=body) as response:
        assert response.headers["x-t2w-warnings"] == "2"
        heads = {name: base64.b64decode(data["head"]) for name, data in events(response) if name in ("head", "done")}
    assert "done" in heads
    assert all(len(warnings_in(head)) == 2 for head in heads.values())


def test_merging_what_descriptions_were_read_for(tower: Live) -> None:
    described = head_of(tower, *DESCRIPTIONS, descriptions=DESCRIPTIONS, describe_classifier=True)
    classes = list(DESCRIPTIONS)
    same = {"tasks": [{"classes": classes}] * 2, "method": "average"}
    assert warnings_in(post(tower.client, "/fuse", same, described, described).content) == warnings_in(described)
    both = {"tasks": [{"classes": classes[1:]}, {"classes": ["bus"]}], "method": "average"}
    mixed = warnings_in(post(tower.client, "/fuse", both, described, head_of(tower, *KNOWN)).content)
    assert ["'quokka'" in mixed[0], "no descriptions" in mixed[1]] == [True, True]


def test_merging_heads_of_a_strange_template(tower: Live) -> None:
    head = head_of(tower, *KNOWN, prompt_template="one {}")
    body = {"tasks": [{"classes": KNOWN}] * 2, "method": "ties"}
    (warning,) = warnings_in(post(tower.client, "/fuse", body, head, head).content)
    assert "prompt_template 'one {}'" in warning
