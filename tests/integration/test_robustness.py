"""The parts of the soak and fault programs that judge and count: a program that cannot fail proves nothing."""

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from bench import faults, soak
from bench.fault_scene import Row
from bench.fault_worker import proxy
from bench.mutations import spoil_json, spoil_safetensors
from bench.traffic import KINDS, Ask, Mix, Tally, send
from tests.tiny import TINY_NAMES, save_tiny_checkpoint
from text2weight.artifact import read_head
from text2weight.errors import Text2WeightError
from text2weight.generator import Generator
from text2weight_client import AsyncClient

NAMES = tuple(f"class {number}" for number in range(100))
BODY = {"classes": ["apple", "bus"], "seed": 7, "steps": 2}
DOCUMENTED = frozenset({200, 422, 429, 500, 503, 504})


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("head") / "checkpoint"
    save_tiny_checkpoint(folder)
    return Generator.load(folder).generate(TINY_NAMES[:2], seed=7).to_bytes()


def test_the_mix_has_its_shares_sizes_and_repetitions() -> None:
    mix = Mix(NAMES)
    asks = [mix.draw() for _ in range(3000)]
    shares = Counter(ask.kind.name for ask in asks)
    for kind in KINDS:
        assert shares[kind.name] / len(asks) == pytest.approx(kind.share, abs=0.03)
    assert {len(ask.classes) for ask in asks} == set(range(2, 33))
    assert 1 - len(set(asks)) / len(asks) == pytest.approx(0.2, abs=0.03)
    again = Mix(NAMES)
    assert asks[:50] == [again.draw() for _ in range(50)]


async def fate(answer: httpx.Response | Exception) -> Tally:
    """What becomes of one request that the network answers so."""

    def handle(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    tally = Tally()
    async with AsyncClient("http://t2w", max_retries=0, transport=httpx.MockTransport(handle)) as client:
        ask = Ask(KINDS[0], TINY_NAMES[:2], seed=7)
        assert await send(client, ask, tally, DOCUMENTED, time.perf_counter()) is bool(tally.answered)
    counted = sum((tally.errors + tally.undocumented + tally.broken).values())
    assert tally.sent == 1 == tally.answered + counted + tally.lost
    return tally


async def test_each_fate_of_a_request_is_counted_as_what_it_is(head: bytes) -> None:
    assert (await fate(httpx.Response(200, content=head))).answered == 1
    assert (await fate(httpx.Response(200, content=b"no head"))).undocumented.total() == 1
    assert (await fate(httpx.Response(503, json={"title": "Starting"}))).errors == {"503 Starting": 1}
    assert (await fate(httpx.Response(500, json={"title": "Oh"}))).undocumented == {"500 Oh": 1}
    assert (await fate(httpx.Response(418, json={"title": "Tea"}))).undocumented == {"418 Tea": 1}
    assert (await fate(httpx.ConnectError("refused"))).broken == {"ConnectError": 1}
    assert (await fate(httpx.ReadTimeout("silence"))).lost == 1


async def test_a_head_that_nobody_asked_for_is_no_answer(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "checkpoint")
    other = Generator.load(tmp_path / "checkpoint").generate(TINY_NAMES[:2], seed=8).to_bytes()
    assert (await fate(httpx.Response(200, content=other))).undocumented == {"a head that nobody asked for": 1}


def test_spoilt_json_differs_and_repeats_with_its_seed() -> None:
    spoilt = [spoil_json(BODY, random.Random(number)) for number in range(500)]
    assert spoilt == [spoil_json(BODY, random.Random(number)) for number in range(500)]
    assert len(set(spoilt)) > 250
    assert sum(data == json.dumps(BODY).encode() for data in spoilt) < 25


def test_spoilt_heads_are_refused_with_an_error_of_ours(head: bytes) -> None:
    refused = 0
    for number in range(400):
        data = spoil_safetensors(head, random.Random(number))
        try:
            read_head(data)
        except Text2WeightError:
            refused += 1
    assert refused > 300
    assert read_head(head).classes == TINY_NAMES[:2]


def record(*, growth_mb_per_hour: float = 0.0, late_factor: float = 1.0, failed: int = 0) -> soak.Record:
    """An hour of steady load, with what is to be found in it."""
    made = soak.Record()
    noise = random.Random(0)
    for second in range(0, 3600, 10):
        memory = 500 + noise.gauss(0, 2) + growth_mb_per_hour * second / 3600
        made.samples.append(soak.Sample(second, memory, files=20, threads=9))
        latency_s = 0.01 * noise.uniform(1, 2) * (late_factor if second > 2700 else 1)
        made.fates += [soak.Fate(second, latency_s, KINDS[0].name)] * 5
    made.fates += [soak.Fate(1800, None, KINDS[0].name)] * failed
    return made


def test_a_steady_hour_passes() -> None:
    verdict = soak.judge(record(), 3600)
    assert verdict["passed"] is True
    assert verdict["p99_last_quarter_over_first"]["all"] == pytest.approx(1, abs=0.1)  # type: ignore[index]


def test_growing_memory_failed_requests_and_drift_do_not_pass() -> None:
    leak = soak.judge(record(growth_mb_per_hour=60), 3600)
    assert leak["memory_mb_per_hour"]["slope"] == pytest.approx(60, rel=0.1)  # type: ignore[index]
    assert (leak["memory_flat"], leak["passed"]) == (False, False)
    assert soak.judge(record(failed=1), 3600)["passed"] is False
    assert soak.judge(record(late_factor=2), 3600)["passed"] is False


def test_a_leak_outside_the_warm_up_only_counts() -> None:
    made = record()
    for number, sample in enumerate(made.samples[:36]):
        made.samples[number] = soak.Sample(sample.at_s, 100 + 10 * number, sample.files, sample.threads)
    assert soak.judge(made, 3600)["memory_flat"] is True


def test_rows_complain_and_the_table_shows_it() -> None:
    good, bad = Row("good", Tally(sent=2, answered=2, attempts=3, seconds=[0.1, 0.5]), alive=True), Row("bad")
    bad.tally.lost = 1
    for row in (good, bad):
        row.judge()
    assert good.line()["passed"] is True
    assert bad.complaints == ["no worker answers at the end", "1 requests lost"]
    lines = faults.table([good, bad, Row("absent", skipped="no redis-server")]).splitlines()
    assert lines[2] == "| good | 2 | 2 | 0 | 0 | 0 | 1 | 0.5 | yes | passed |"
    assert lines[3].endswith("| **no** | no worker answers at the end; 1 requests lost |")
    assert lines[4].endswith("| not played: no redis-server |")
    assert len({line.count("|") for line in lines}) == 1


async def test_theproxy_takes_turns_and_passes_over_a_worker_that_is_gone() -> None:
    async def backend(name: bytes) -> asyncio.Server:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(name + await reader.readline())
            await writer.drain()
            writer.close()

        return await asyncio.start_server(answer, "127.0.0.1", 0)

    async def ask(url: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"!\n")
        heard = await reader.read()
        writer.close()
        return heard

    backends = [await backend(b"a"), await backend(b"b")]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in backends]
    async with proxy(urls) as url:
        assert sorted([await ask(url), await ask(url)]) == [b"a!\n", b"b!\n"]
        backends[0].close()
        await backends[0].wait_closed()
        assert [await ask(url), await ask(url)] == [b"b!\n", b"b!\n"]
    backends[1].close()


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for main, arguments in ((soak.main, ["--minutes", "0"]), (faults.main, ["--only", "rain"])):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "it must be above 0" in capsys.readouterr().err
