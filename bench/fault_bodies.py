"""Random and spoilt bodies for every POST route that the worker's OpenAPI document names, beside normal traffic."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode

from bench.fault_scene import PATIENT_RETRIES, Row, Scene, answers
from bench.mutations import NASTY, spoil_json, spoil_safetensors
from bench.traffic import CLIENT_TIMEOUT_S, Tally
from demo.service_process import ServiceProcess

SENDERS = 16
SCHEMA_SHARE = 0.2  # of the JSON bodies, those that Schemathesis makes; it takes longer over each
UPLOAD_SHARE = 0.2  # spoilt uploads for each spoilt JSON body
MOST_STEPS = "20"  # a random body that happens to be right should not take minutes
SHOWN_SURPRISES = 5
EVERYWHERE = frozenset({404, 405})
MEGABYTE = 2**20
JSON, MULTIPART = "application/json", "multipart/form-data"
REQUEST_FIELDS = ("url", "headers", "json", "data", "files", "params", "cookies")

# A value for each field of the requests; a route gets those that its schema has.
FIELDS: dict[str, Any] = {
    "classes": ["apple", "bus", "lizard"],
    "tasks": [{"classes": ["apple", "bus"], "weight": 2.0}, {"classes": ["bus", "lizard"]}],
    "seed": 7,
    "steps": 2,
    "sampler": "ddim",
    "prompt_template": "a photo of a {}",
    "descriptions": {"apple": "a round fruit", "bus": ["a long vehicle", "it is red"], "lizard": "a small reptile"},
    "describe_classifier": False,
    "guidance_scale": 1.5,
    "samples": 2,
    "precision": "fp16",
    "deadline_ms": 5000,
    "heads_every": 1,
    "method": "text",
}
# The JSON part and the number of heads and pictures of each route that takes files.
UPLOADS: dict[str, tuple[dict[str, Any] | None, int, int]] = {
    "/enhance": ({"strength": 0.5, "method": "noise", "seed": 7, "steps": 2, "sampler": "ddim"}, 1, 0),
    "/fuse": ({"tasks": FIELDS["tasks"], "method": "average"}, 2, 0),
    "/classify": (None, 1, 1),
}
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@dataclass(frozen=True)
class Shot:
    """One HTTP request of an attack."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes


async def json_bodies(scene: Scene) -> Row:
    """Bodies by Schemathesis, right and wrong by the schema, and bodies spoilt by hand, to every JSON route."""
    worker = scene.worker(T2W_MAX_STEPS=MOST_STEPS)
    document = _document(worker)
    by_schema = round(SCHEMA_SHARE * scene.sizes.bodies)
    cases = [case for case in _schema_cases(worker.url, document, by_schema) if case.method == "POST"]
    bases = _json_bases(document)
    shots = [*cases, *_spoilt_json(worker.url, bases, scene.sizes.bodies - len(cases))]
    row = await _attack(scene, worker, document, shots)
    row.facts["routes"] = sorted(bases)
    row.facts["made by Schemathesis"] = len(cases)
    return row


async def uploads(scene: Scene) -> Row:
    """Spoilt safetensors files, and whole ones beside a spoilt request or picture, to every route that takes files."""
    worker = scene.worker(T2W_MAX_STEPS=MOST_STEPS)
    document = _document(worker)
    routes = [path for path in UPLOADS if MULTIPART in _content(document, path)]
    if not routes:
        return Row(skipped=f"the worker has none of the routes {', '.join(UPLOADS)}")
    head = await asyncio.to_thread(_head, worker.url, scene.names)
    source = random.Random(0)
    count = round(UPLOAD_SHARE * scene.sizes.bodies)
    shots = [_spoilt_upload(worker.url, routes[turn % len(routes)], head, source) for turn in range(count)]
    row = await _attack(scene, worker, document, shots)
    row.facts["routes"] = routes
    return row


async def _attack(scene: Scene, worker: ServiceProcess, document: dict[str, Any], shots: list[Shot]) -> Row:
    """Send all of it while normal traffic goes on; the row counts the attack."""
    row, bystanders = Row(), Row()
    process = psutil.Process(worker.process.pid)
    memory = [process.memory_info().rss]
    surprises: list[str] = []
    waiting = iter(shots)
    async with (
        scene.load(worker.url, bystanders, PATIENT_RETRIES),
        httpx.AsyncClient(timeout=CLIENT_TIMEOUT_S) as http,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(SENDERS):
            group.create_task(_send_all(http, waiting, document, row.tally, surprises))
    row.alive = answers(worker.url, scene.names)
    row.expect(row.alive and worker.process.poll() is None, "the worker's process ended")
    if worker.process.poll() is None:
        memory.append(process.memory_info().rss)
    normal = bystanders.tally
    row.facts["memory before and after, MB"] = [round(size / MEGABYTE) for size in memory]
    row.facts["normal traffic"] = f"{normal.answered} of {normal.sent} answered, worst {normal.worst_s} s"
    row.expect(normal.answered == normal.sent, f"normal traffic suffered: {normal.summary()}")
    if surprises:
        row.facts["surprises"] = surprises
    return row


async def _send_all(
    http: httpx.AsyncClient,
    waiting: Iterator[Shot],
    document: dict[str, Any],
    tally: Tally,
    surprises: list[str],
) -> None:
    for shot in waiting:
        tally.sent += 1
        tally.attempts += 1
        started = time.perf_counter()
        try:
            response = await http.request(shot.method, shot.url, headers=shot.headers, content=shot.body)
        except httpx.TimeoutException:
            tally.lost += 1
        except httpx.RequestError as error:
            tally.broken[type(error).__name__] += 1
        else:
            known = _record(response, document, tally, time.perf_counter() - started)
            if not known and len(surprises) < SHOWN_SURPRISES:
                surprises.append(f"{response.status_code} {response.text[:200]!r} for {shot.body[:300]!r}")


def _record(response: httpx.Response, document: dict[str, Any], tally: Tally, seconds: float) -> bool:
    """Count an answer; returns whether it is one that the OpenAPI document promises."""
    path, status = response.request.url.path, response.status_code
    operation = document["paths"].get(path, {}).get(response.request.method.lower(), {})
    promised = EVERYWHERE | {int(code) for code in operation.get("responses", {})}
    if response.is_success and status in promised:
        tally.add_answer(seconds)
        return True
    kind = _problem_kind(response)
    if status in promised and kind is not None and status != httpx.codes.INTERNAL_SERVER_ERROR:
        tally.errors[f"{status} {kind}"] += 1
        return True
    tally.undocumented[f"{path} {status} {kind}"] += 1
    return False


def _problem_kind(response: httpx.Response) -> str | None:
    """The last word of a problem's type; None where the body is not a problem of this service."""
    if response.headers.get("Content-Type") != "application/problem+json":
        return None
    problem = response.json()
    whole = problem.get("status") == response.status_code and problem.get("detail") and problem.get("request_id")
    return str(problem["type"]).rpartition(":")[2] if whole else None


def _document(worker: ServiceProcess) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{worker.url}/openapi.json", timeout=CLIENT_TIMEOUT_S).json()
    return document


def _content(document: dict[str, Any], path: str) -> dict[str, Any]:
    """What the POST operation of a path takes, by media type."""
    content: dict[str, Any] = document["paths"].get(path, {}).get("post", {}).get("requestBody", {}).get("content", {})
    return content


def _json_bases(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A right body, or nearly, with every field that its schema has, for each route that takes JSON."""
    bases = {}
    for path in document["paths"]:
        schema = _content(document, path).get(JSON, {}).get("schema", {})
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        fields = {name: FIELDS[name] for name in schema.get("properties", {}) if name in FIELDS}
        if fields:
            bases[path] = fields
    return bases


def _schema_cases(url: str, document: dict[str, Any], count: int) -> list[Shot]:
    """Requests that Schemathesis draws from the document, half of them wrong by it."""
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    each = max(1, count // (len(posts) * len(GenerationMode)))
    shots: list[Shot] = []
    for operation in posts:
        for mode in GenerationMode:

            @seed(0)
            @settings(
                max_examples=each,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def collect(case: Case) -> None:
                shots.append(_prepared(case, url))

            collect()
    return shots


def _prepared(case: Case, url: str) -> Shot:
    """A case as it goes over the wire."""
    fields = case.as_transport_kwargs(base_url=url)
    request = requests.Request(case.method, **{name: fields[name] for name in REQUEST_FIELDS if name in fields})
    prepared = request.prepare()
    body = prepared.body or b""
    headers = {name: value for name, value in prepared.headers.items() if name.lower() == "content-type"}
    return Shot(case.method, str(prepared.url), headers, body.encode() if isinstance(body, str) else bytes(body))


def _spoilt_json(url: str, bases: dict[str, dict[str, Any]], count: int) -> Iterable[Shot]:
    source = random.Random(0)
    for _ in range(count):
        path = source.choice(sorted(bases))
        kept = {name: value for name, value in bases[path].items() if name in ("classes", "tasks") or _coin(source)}
        kind = JSON
        if source.random() < 0.02:
            kind = source.choice(("", "text/plain", "application/json; charset=utf-16", "multipart/form-data", "a/b/c"))
        yield Shot("POST", url + path, {"Content-Type": kind}, spoil_json(kept, source))


def _spoilt_upload(url: str, path: str, head: bytes, source: random.Random) -> Shot:
    """One upload; mostly a head is spoilt, sometimes the JSON part, the picture, or which parts there are."""
    fields, heads, pictures = UPLOADS[path]
    what = source.choices(("head", "request", "picture", "parts"), (0.7, 0.1, 0.1, 0.1))[0]
    parts: list[tuple[str, tuple[str, bytes, str]]] = []
    if fields is not None:
        data = spoil_json(fields, source) if what == "request" else json.dumps(fields).encode()
        parts.append(("request", ("request.json", data, JSON)))
    for turn in range(heads):
        data = spoil_safetensors(head, source) if what == "head" and turn == heads - 1 else head
        parts.append(("head", ("head.safetensors", data, "application/octet-stream")))
    for _ in range(pictures):
        cut = PICTURE[: source.randrange(len(PICTURE))] if what == "picture" else PICTURE
        parts.append(("image", (str(source.choice(NASTY))[:50].encode(errors="replace").decode(), cut, "image/png")))
    if what == "parts":
        parts = source.choice((parts[:-1], parts * 2, parts * 20, [("extra", parts[0][1]), *parts], parts[::-1]))
    request = requests.Request("POST", url + path, files=parts or {"extra": b""}).prepare()
    body = request.body or b""
    return Shot("POST", url + path, {"Content-Type": request.headers["Content-Type"]}, bytes(body))


def _head(url: str, names: tuple[str, ...]) -> bytes:
    """A head that the worker made, as its client would save it."""
    with httpx.Client(timeout=CLIENT_TIMEOUT_S) as http:
        response = http.post(f"{url}/generate", json={"classes": list(names[:3]), "seed": 0})
    return response.raise_for_status().content


def _coin(source: random.Random) -> bool:
    return source.random() < 0.5
