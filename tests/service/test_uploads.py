"""Room for uploads: those under way are bounded in bytes and in number, worked on one by one, and in time."""

import contextlib
import gc
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from starlette.requests import Request

from tests.patience import HELD_S, PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.forms import a_head, post
from tests.service.live import Live, serve, wait_for
from tests.service.test_bad_input import assert_problem
from text2weight_service import fuse_routes
from text2weight_service.engine import BusyError
from text2weight_service.uploads import LARGEST_AT_ONCE, Uploads, run_in_time
from text2weight_service.work_queue import DeadlineError

HEAD = a_head("apple", "bus").to_bytes()
MAX_UPLOAD_BYTES = 3_000_000
TASKS = [{"classes": ["apple"]}, {"classes": ["bus"]}]
MERGE = {"tasks": TASKS, "method": "average"}
START = (
    b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n"
    b'--b\r\nContent-Disposition: form-data; name="head"; filename="x"\r\n\r\n'
)


@contextmanager
def begun(live: Live, path: bytes, announced: int) -> Iterator[socket.socket]:
    """An upload that announces its length and goes no further than its first part."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as connection:
        connection.sendall(START % (path, announced))
        yield connection


@pytest.mark.parametrize("path", ["/enhance", "/fuse"])
@pytest.mark.parametrize(
    ("queue_size", "announced", "most"),
    [(256, MAX_UPLOAD_BYTES, LARGEST_AT_ONCE), (16, 1000, 16)],
    ids=["bytes", "number"],
)
def test_uploads_under_way_are_bounded(model: FakeModel, path: str, queue_size: int, announced: int, most: int) -> None:
    with serve(lambda _: model, queue_size=queue_size, max_upload_bytes=MAX_UPLOAD_BYTES) as live:

        def upload() -> Any:
            request = {"strength": 0.5} if path == "/enhance" else MERGE
            return post(live.client, path, request, *[HEAD] * (1 if path == "/enhance" else 2))

        with ExitStack() as open_ones:
            for _ in range(most):
                open_ones.enter_context(begun(live, path.encode(), announced))
            wait_for(lambda: upload().status_code == 429, "a full house")
            refused = upload()
            assert "leave no room" in assert_problem(refused, 429, "queue-full")
            assert int(refused.headers["retry-after"]) > 0
            assert live.generate("apple", "bus").status_code == 200
        wait_for(lambda: upload().status_code == 200, "room again")


@pytest.mark.parametrize("beside", [b"", b"Content-Length: 1\r\n"], ids=["chunks", "chunks and a length"])
def test_uploads_in_chunks(model: FakeModel, beside: bytes) -> None:
    """They hold as much room as the largest; a length beside the chunks is refused, as proxies differ in reading it."""
    start = START.replace(b"Content-Length: %d\r\n", beside + b"Transfer-Encoding: chunked\r\n")
    head, _, part = (start % b"/enhance").partition(b"\r\n\r\n")
    with (
        serve(lambda _: model, max_upload_bytes=MAX_UPLOAD_BYTES) as live,
        ExitStack() as open_ones,
    ):
        for _ in range(LARGEST_AT_ONCE):
            one = open_ones.enter_context(socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S))
            one.sendall(b"%s\r\n\r\n%x\r\n%s\r\n" % (head, len(part), part))
            assert not beside or one.recv(4096).startswith(b"HTTP/1.1 400 ")
        full = 200 if beside else 429
        wait_for(lambda: post(live.client, "/enhance", {"strength": 0.5}, HEAD).status_code == full, "a full house")


def test_a_length_beside_chunks_is_not_believed() -> None:
    """Where another server than ours took such a request."""
    both = [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]
    request = Request({"type": "http", "headers": both})
    uploads = Uploads(MAX_UPLOAD_BYTES, 256)
    with ExitStack() as places:
        for _ in range(LARGEST_AT_ONCE):
            places.enter_context(uploads.place(request))
        with pytest.raises(BusyError):
            places.enter_context(uploads.place(request))


async def test_work_that_was_not_begun_in_time_is_let_go() -> None:
    class Upload:
        pass

    async def run_late(upload: Upload) -> None:
        with contextlib.suppress(DeadlineError):
            await run_in_time(thread, partial(id, upload), time.monotonic() + 0.05)

    go_on, upload = threading.Event(), Upload()
    gone = weakref.ref(upload)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(go_on.wait, HELD_S)
        try:
            await run_late(upload)
            del upload
            gc.collect()
            assert gone() is None
        finally:
            go_on.set()


def test_merges_keep_their_deadline_and_their_number(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def merge(_: object, method: str, heads: torch.Tensor) -> torch.Tensor:
        assert go_on.wait(HELD_S)
        return heads.mean(0)

    monkeypatch.setattr(fuse_routes, "merge", merge)
    with serve(lambda _: model, queue_size=16) as live, ThreadPoolExecutor(16) as pool:
        try:
            assert_problem(post(live.client, "/fuse", {**MERGE, "deadline_ms": 1000}, HEAD, HEAD), 504, "deadline")

            def merged() -> int:
                while (status := post(live.client, "/fuse", MERGE, HEAD, HEAD).status_code) == 429:
                    time.sleep(0.01)  # a probe from below was there first
                return status

            held = [pool.submit(merged) for _ in range(16)]
            soon = {**MERGE, "deadline_ms": 1000}
            wait_for(lambda: post(live.client, "/fuse", soon, HEAD, HEAD).status_code == 429, "a full house")
        finally:
            go_on.set()
        assert [one.result(PATIENCE_S) for one in held] == [200] * 16
