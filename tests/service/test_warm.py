"""`t2w warm`: what lands in Redis, what a worker makes of it, and which tables are refused."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.patience import PATIENCE_S
from tests.service.fakes import FakeModel, FakeTextEncoder, unit_vector
from tests.service.live import serve, wait_for
from tests.service.redis_server import RedisServer, needs_redis
from tests.service.tiny import NAMES, write_tiny_checkpoint
from text2weight.text_encoder import EmbeddingTable, write_embedding_tables
from text2weight_service import warm as warm_module
from text2weight_service.warm import Source, WarmError, names_source, table_source, warm
from text2weight_service.warm_cli import warm_app

CLASSES = [f"class {i}" for i in range(300)]


def write_table(
    folder: Path, names: Sequence[str], rows: torch.Tensor | None = None, template: str = "a {}", **more: object
) -> str:
    if rows is None:
        rows = torch.stack([unit_vector(template.format(name)) for name in names])
    table = EmbeddingTable(template, tuple(names), rows, **more)  # type: ignore[arg-type]
    write_embedding_tables(folder / "table.safetensors", {"names": table})
    return f"{folder / 'table.safetensors'}#names"


def fill(server: RedisServer, model: FakeModel, source: Source) -> tuple[int, int]:
    steps: list[int] = []
    done = asyncio.run(warm(server.url, 1000, model, source, steps.append))
    assert sum(steps) == len(source.prompts) == done.there + done.added
    return done.there, done.added


@needs_redis
def test_names(server: RedisServer, model: FakeModel, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("\n".join([*CLASSES, "", "  class_7 ", "caf\u00e9"]), encoding="utf-8")
    assert fill(server, model, names_source(model, file)) == (0, 301)
    assert server.keys() == 301
    model.text_encoder.encoded.clear()
    with server.connected() as client:
        key = next(client.scan_iter())
        client.expire(key, 10)
        assert fill(server, model, names_source(model, file)) == (301, 0)
        assert client.ttl(key) > 900
    assert model.text_encoder.encoded == []
    other = FakeModel()
    with serve(lambda _: other, redis_url=server.url, redis_timeout_s=PATIENCE_S) as live:
        assert live.generate("class 1", "class_7", "cafe\u0301").status_code == 200
    assert set(other.text_encoder.encoded) <= {"a cat", "a dog"}  # the warm-up


class SizedTextEncoder(FakeTextEncoder):
    """Its last bits depend on how many texts a call has, as those of real ones do."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        return super().encode(texts) + 1e-6 * len(texts)


@needs_redis
def test_names_get_the_bits_that_workers_compute(server: RedisServer, tmp_path: Path) -> None:
    """Of 11 names, which fill no whole number of calls, and which a worker meets in another order and company."""
    model = FakeModel()
    model.text_encoder = SizedTextEncoder()
    names = CLASSES[:11]
    with serve(lambda _: model, redis_url=server.url, redis_timeout_s=PATIENCE_S) as live:
        for some in (names[9:], names[4:9], names[:4]):
            assert live.generate(*some).status_code == 200
        wait_for(lambda: len(embeddings(server)) == 11, "the embeddings in Redis")
    computed = embeddings(server)
    with server.connected() as client:
        client.flushall()
    file = tmp_path / "names.txt"
    file.write_text("\n".join(names))
    assert fill(server, model, names_source(model, file)) == (0, 11)
    assert embeddings(server) == computed


def embeddings(server: RedisServer) -> dict[bytes, bytes | None]:
    with server.connected() as client:
        return {key: client.get(key) for key in client.scan_iter("t2w:embedding:*")}


@needs_redis
def test_table(server: RedisServer, model: FakeModel, tmp_path: Path) -> None:
    source = table_source(model, write_table(tmp_path, CLASSES))
    assert len(model.text_encoder.encoded) <= 2 * 32
    model.text_encoder.encoded.clear()
    assert fill(server, model, source) == (0, 300)
    assert model.text_encoder.encoded == []
    with serve(lambda _: model, redis_url=server.url, redis_timeout_s=PATIENCE_S) as live:
        assert live.generate("class 1", "class 299").status_code == 200
    assert set(model.text_encoder.encoded) <= {"a cat", "a dog"}


@needs_redis
def test_wrong_values_are_replaced(server: RedisServer, model: FakeModel, tmp_path: Path) -> None:
    source = table_source(model, write_table(tmp_path, CLASSES[:3]))
    assert fill(server, model, source) == (0, 3)
    with server.connected() as client:
        client.set(next(client.scan_iter()), b"nonsense")
    assert fill(server, model, source) == (2, 1)
    assert fill(server, model, source) == (3, 0)


def slightly_wrong(names: Sequence[str]) -> torch.Tensor:
    rows = torch.stack([unit_vector(f"a {name}") for name in names])
    return torch.nn.functional.normalize(rows + 1e-3 * torch.randn(rows.shape), dim=-1)


def test_a_table_of_another_encoder(model: FakeModel, tmp_path: Path) -> None:
    with pytest.raises(WarmError, match="not made by the checkpoint's text encoder"):
        table_source(model, write_table(tmp_path, CLASSES, slightly_wrong(CLASSES)))


def test_a_table_of_another_size(model: FakeModel, tmp_path: Path) -> None:
    with pytest.raises(WarmError, match="has 5 numbers a row, not 8"):
        table_source(model, write_table(tmp_path, CLASSES, torch.eye(300, 5) + 1))


def test_a_table_with_another_template(model: FakeModel, tmp_path: Path) -> None:
    with pytest.raises(WarmError, match="the checkpoint asks for 'a "):
        table_source(model, write_table(tmp_path, CLASSES, template="one {}"))


def test_a_table_of_descriptions(model: FakeModel, tmp_path: Path) -> None:
    model.config.template = "{}"
    descriptions = tuple(("something round",) for _ in CLASSES)
    with pytest.raises(WarmError, match="descriptions"):
        table_source(model, write_table(tmp_path, CLASSES, template="{}", descriptions=descriptions))


def test_a_name_spelt_otherwise_is_checked(model: FakeModel, tmp_path: Path) -> None:
    """The row of "sea_lion" may be that of a prompt with the underscore, which no request asks for."""
    with pytest.raises(WarmError, match="'a sea lion' differs"):
        table_source(model, write_table(tmp_path, [*CLASSES, "sea_lion"]))
    rows = torch.stack([unit_vector(f"a {name}") for name in [*CLASSES, "sea lion"]])
    assert "a sea lion" in table_source(model, write_table(tmp_path, [*CLASSES, "sea_lion"], rows)).prompts


def test_names_that_no_request_could_have(model: FakeModel, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    for text, expected in (("apple\nbus\x00\n", "line 2: .*control"), ("\n \n", "no names"), ("x" * 201, "line 1")):
        file.write_text(text)
        with pytest.raises(WarmError, match=expected):
            names_source(model, file)
    with pytest.raises(WarmError, match="cannot be read"):
        names_source(model, tmp_path / "nothing")


@needs_redis
def test_a_redis_that_is_full_or_away(
    server: RedisServer, model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = table_source(model, write_table(tmp_path, CLASSES))
    server.fill()
    with pytest.raises(WarmError, match="does not take the embeddings: OutOfMemoryError"):
        fill(server, model, source)
    server.make_room()
    monkeypatch.setattr(warm_module, "_REDIS_TIMEOUT_S", 0.2)
    server.pause()
    try:
        with pytest.raises(WarmError, match="does not answer: TimeoutError"):
            fill(server, model, source)
    finally:
        server.resume()


def run(*arguments: str, **variables: str) -> Result:
    return CliRunner().invoke(warm_app, arguments, env=variables)


@needs_redis
def test_command(server: RedisServer, tmp_path: Path) -> None:
    """A checkpoint with a table for its text encoder takes the rows of that very table."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    table = f"{tmp_path / 'model' / 'table.safetensors'}#names"
    result = run("--table", table, T2W_CHECKPOINT=str(checkpoint), T2W_REDIS_URL=server.url)
    assert (result.exit_code, result.stdout) == (0, "0 of 40 embeddings were in Redis already, 40 added\n")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES[:10]))
    result = run("--names", str(names), "--checkpoint", str(checkpoint), T2W_REDIS_URL=server.url)
    assert (result.exit_code, result.stdout) == (0, "10 of 10 embeddings were in Redis already, 0 added\n")
    names.write_text("something else")
    result = run("--names", str(names), "--checkpoint", str(checkpoint), T2W_REDIS_URL=server.url)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("t2w warm: no embedding for ")


def test_command_says_what_is_missing() -> None:
    for arguments, variables, expected in (
        (["--names", "x"], {}, "T2W_REDIS_URL"),
        ([], {"T2W_REDIS_URL": "redis://127.0.0.1:1"}, "either --names or --table"),
        (["--names", "x"], {"T2W_REDIS_URL": "127.0.0.1"}, "T2W_REDIS_URL: must start with"),
        (["--names", "x", "--checkpoint", "/nowhere"], {"T2W_REDIS_URL": "redis://127.0.0.1:1"}, "/nowhere"),
    ):
        result = run(*arguments, **variables)
        assert result.exit_code == 2
        assert result.stderr.startswith("t2w warm: ")
        assert expected in result.stderr
        assert result.stderr.count("\n") == 1


def test_help_has_an_example() -> None:
    result = run("--help", COLUMNS="200", NO_COLOR="1")
    for part in ("--names", "--table", "--checkpoint", "Example:"):
        assert part in result.stdout
