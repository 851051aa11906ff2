"""API keys: who is let in, who is not, and what is never shown."""

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.patience import PATIENCE_S
from tests.service.fakes import FakeModel
from tests.service.live import Live, serve, wait_for
from tests.service.test_bad_input import assert_problem
from text2weight_service import auth
from text2weight_service.auth import KeyRing, KeysError, bearer_secret, check_exposure, create_key, parse_keys
from text2weight_service.cli import serve_app
from text2weight_service.key_cli import key_app

ALICE, ALICE_ENTRY = create_key("alice")
BOB, BOB_ENTRY = create_key("bob")
BODY = {"classes": ["apple", "bus"]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def closed() -> Iterator[Live]:
    """A service with keys."""
    with serve(lambda _: FakeModel(), api_keys=f"{ALICE_ENTRY},{BOB_ENTRY}") as running:
        yield running


def test_a_key_lets_in(closed: Live, capsys: pytest.CaptureFixture[str]) -> None:
    for name, key in (("alice", ALICE), ("bob", BOB)):
        before = closed.metric("t2w_client_requests_total", client=name, result="accepted")
        assert closed.client.post("/generate", json=BODY, headers=bearer(key)).status_code == 200
        assert closed.metric("t2w_client_requests_total", client=name, result="accepted") == before + 1
    assert closed.client.get("/info", headers={"Authorization": f"bearer   {ALICE}"}).status_code == 200
    printed = capsys.readouterr().out
    assert "client=alice" in printed
    assert ALICE not in printed


REFUSED = {
    "no key": [],
    "an unknown key": [("Authorization", "Bearer t2w_" + "A" * 43)],
    "the hash of a key": [("Authorization", f"Bearer {ALICE_ENTRY.partition(':')[2]}")],
    "the entry of a key": [("Authorization", f"Bearer {ALICE_ENTRY}")],
    "another scheme": [("Authorization", f"Basic {ALICE}")],
    "no scheme": [("Authorization", ALICE)],
    "nothing after the scheme": [("Authorization", "Bearer")],
    "two keys": [("Authorization", f"Bearer {ALICE}"), ("Authorization", f"Bearer {BOB}")],
    "more after the key": [("Authorization", f"Bearer {ALICE} {ALICE}")],
    "other bytes": [("Authorization", b"Bearer \xff\xfe")],
    "a long one": [("Authorization", "Bearer " + "x" * 8000)],
    "the key elsewhere": [("X-API-Key", ALICE)],
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(closed: Live, case: str) -> None:
    for method, path in (("POST", "/generate"), ("GET", "/info"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/x")):
        response = closed.client.request(method, path, headers=REFUSED[case])
        assert_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


def test_probes_need_no_key(closed: Live) -> None:
    assert closed.client.get("/health/live").status_code == 200
    assert closed.client.get("/health/ready").status_code == 200
    for path in ("/", "/playground/app.js"):
        assert closed.client.get(path).status_code == 200
    for path in ("//health/live", "/health/../info", "/health", "/metrics/", "/%2e/info"):
        assert closed.client.get(path).status_code in (401, 404), path


def test_metrics_may_be_public() -> None:
    with serve(lambda _: FakeModel(), api_keys=ALICE_ENTRY, public_metrics=True) as live:
        live.client.get("/info", headers=bearer(ALICE))
        metrics = live.client.get("/metrics")
        assert metrics.status_code == 200
        assert 'client="alice"' in metrics.text
        assert live.client.get("/info").status_code == 401


def test_a_refused_request_is_not_read(closed: Live) -> None:
    """The answer comes before the body, and the connection still works after it or is closed in good order."""
    with socket.create_connection(("127.0.0.1", closed.port), timeout=PATIENCE_S) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_keys_and_hashes_are_shown_nowhere(closed: Live, capsys: pytest.CaptureFixture[str]) -> None:
    shown = closed.client.get("/info", headers=bearer(ALICE)).text
    shown += closed.client.get("/metrics", headers=bearer(ALICE)).text + capsys.readouterr().out
    for secret in (ALICE, BOB, ALICE_ENTRY.partition(":")[2]):
        assert secret not in shown


def test_a_key_file_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "RELOAD_CHECK_S", 0.01)
    file = tmp_path / "keys"
    file.write_text(f"# who may\n{ALICE_ENTRY}  # since May\n\n")

    def replace(text: str) -> None:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(file)

    with serve(lambda _: FakeModel(), api_keys_file=str(file)) as live:

        def status(key: str) -> int:
            return live.client.get("/info", headers=bearer(key)).status_code

        assert (status(ALICE), status(BOB)) == (200, 401)
        replace(f"{ALICE_ENTRY}\n{BOB_ENTRY}\n")
        wait_for(lambda: status(BOB) == 200, "the new key")
        replace("not an entry\n")
        time.sleep(0.05)
        assert (status(ALICE), status(BOB)) == (200, 200)
        file.unlink()
        time.sleep(0.05)
        assert (status(ALICE), status(BOB)) == (200, 200)
        replace(f"{BOB_ENTRY}\n")
        wait_for(lambda: status(ALICE) == 401, "the end of the old key")
        assert status(BOB) == 200
        replace("")
        wait_for(lambda: status(BOB) == 401, "the end of all keys")


def test_a_mounted_file_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes mounts a link to a link to a folder, and swaps the inner link."""
    monkeypatch.setattr(auth, "RELOAD_CHECK_S", 0.0)
    for version, entry in (("v1", ALICE_ENTRY), ("v2", BOB_ENTRY)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(entry)
        os.utime(tmp_path / version / "keys", (1, 1))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys").symlink_to("..data/keys")
    ring = KeyRing(None, str(tmp_path / "keys"))
    assert ring.name_of(ALICE.encode()) == "alice"
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").replace(tmp_path / "..data")
    assert ring.name_of(ALICE.encode()) is None
    assert ring.name_of(BOB.encode()) == "bob"


def test_broken_file_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auth, "RELOAD_CHECK_S", 0.0)
    file = tmp_path / "keys"
    file.write_text(ALICE_ENTRY)
    ring = KeyRing(None, str(file))
    file.write_text(f"{ALICE}\n")
    for _ in range(5):
        assert ring.name_of(ALICE.encode()) == "alice"
    printed = capsys.readouterr().out
    assert printed.count("keys not reloaded") == 1
    assert ALICE not in printed
    file.write_text(BOB_ENTRY)
    assert ring.name_of(BOB.encode()) == "bob"


def test_two_keys_of_one_client() -> None:
    second, second_entry = create_key("alice")
    ring = KeyRing(f"{ALICE_ENTRY} {second_entry}", None)
    assert [ring.name_of(key.encode()) for key in (ALICE, second, BOB)] == ["alice", "alice", None]


def test_keys_are_random_and_only_hashes_are_kept() -> None:
    made = [create_key("x") for _ in range(50)]
    assert len({secret for secret, _ in made}) == 50
    for secret, entry in made:
        assert secret.startswith("t2w_")
        assert len(secret) >= 40
        assert secret not in entry
        assert repr(parse_keys(entry, "test")).find(secret) == -1


HASH = "0" * 64
UNUSABLE = ["alice", ALICE, f"alice:{ALICE}", f"alice:{HASH[1:]}", f":{HASH}", f"a b:{HASH}", f"\u00e9:{HASH}"]
UNUSABLE += [f"{'x' * 33}:{HASH}", f"alice:{'A' * 64}", f"a\x1b[31m:{HASH}"]


@pytest.mark.parametrize("entry", UNUSABLE, ids=range(len(UNUSABLE)))  # a key is a new one each time
def test_unusable_entries(entry: str) -> None:
    with pytest.raises(KeysError, match="entry 2 is not NAME:SHA256") as caught:
        parse_keys(f"{BOB_ENTRY}\n{entry}", "the keys")
    assert ALICE not in str(caught.value)


def test_the_number_of_names_is_bounded() -> None:
    entries = [f"n{i}:{i:064x}" for i in range(257)]
    assert len(parse_keys("\n".join(entries[:256]), "the keys")) == 256
    with pytest.raises(KeysError, match="at most 256"):
        parse_keys("\n".join(entries), "the keys")


def test_the_number_of_names_is_bounded_over_both_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "RELOAD_CHECK_S", 0.0)
    fixed = ",".join(f"n{i}:{i:064x}" for i in range(200))
    file = tmp_path / "keys"
    file.write_text("\n".join(f"m{i}:{i:064x}" for i in range(57)))
    with pytest.raises(KeysError, match="257 keys given, at most 256"):
        KeyRing(fixed, str(file))
    file.write_text(ALICE_ENTRY)
    ring = KeyRing(fixed, str(file))
    file.write_text("\n".join([BOB_ENTRY, *(f"m{i}:{i:064x}" for i in range(56))]))
    assert ring.name_of(BOB.encode()) is None
    assert ring.name_of(ALICE.encode()) == "alice"


def test_a_name_without_keys_leaves_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "RELOAD_CHECK_S", 0.0)
    file = tmp_path / "keys"
    file.write_text(f"{ALICE_ENTRY}\n{BOB_ENTRY}\n")
    with serve(lambda _: FakeModel(), api_keys_file=str(file)) as live:
        for key in (ALICE, BOB):
            assert live.client.get("/info", headers=bearer(key)).status_code == 200
        assert b'client="alice"' in live.engine.metrics.render()
        file.write_text(f"{BOB_ENTRY}\n")
        assert live.client.get("/info", headers=bearer(BOB)).status_code == 200
        assert b'client="alice"' not in live.engine.metrics.render()
        assert live.metric("t2w_client_requests_total", client="bob", result="accepted") == 2


def test_authorization_header() -> None:
    assert bearer_secret([b"Bearer abc"]) == b"abc"
    assert bearer_secret([b"BEARER  abc "]) == b"abc"
    for wrong in ([], [b""], [b"Bearer"], [b"Bearer  "], [b"abc"], [b"Basic abc"], [b"Bearer a", b"Bearer a"]):
        assert bearer_secret(wrong) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(host, keys=False, allow_anonymous=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "", "example.org", "localhost.example.org"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(KeysError, match="T2W_ALLOW_ANONYMOUS=true"):
        check_exposure(host, keys=False, allow_anonymous=False)
    check_exposure(host, keys=True, allow_anonymous=False)
    check_exposure(host, keys=False, allow_anonymous=True)


REFUSED_STARTS = {
    "reachable without a key": (["--host", "0.0.0.0"], {}, "T2W_API_KEYS_FILE"),
    "no such file": ([], {"T2W_API_KEYS_FILE": "/nowhere/keys"}, "T2W_API_KEYS_FILE /nowhere/keys cannot be read"),
    "a key in place of its hash": ([], {"T2W_API_KEYS": ALICE}, "T2W_API_KEYS: entry 1 is not NAME:SHA256"),
    "keys and everybody": (
        [],
        {"T2W_API_KEYS": ALICE_ENTRY, "T2W_ALLOW_ANONYMOUS": "true"},
        "T2W_ALLOW_ANONYMOUS: must not be true where keys are set",
    ),
    "a file without keys": ([], {"T2W_API_KEYS_FILE": "/dev/null"}, "hold no key"),
    "an unknown rate": ([], {"T2W_RATE_LIMIT": "fast"}, "T2W_RATE_LIMIT"),
}


@pytest.mark.parametrize("case", REFUSED_STARTS)
def test_refused_starts(case: str) -> None:
    flags, variables, expected = REFUSED_STARTS[case]
    result = CliRunner().invoke(serve_app, [*flags, "--port", "0"], env=variables)
    assert result.exit_code == 2
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("t2w serve: ")
    assert expected in line
    assert ALICE not in result.output


def test_key_command() -> None:
    result = CliRunner().invoke(key_app, ["alice"])
    assert result.exit_code == 0
    secret = result.stderr.split()[-1]
    assert result.stdout.count("\n") == 1
    assert KeyRing(result.stdout, None).name_of(secret.encode()) == "alice"
    assert secret not in result.stdout


def test_key_command_refuses_a_name() -> None:
    result = CliRunner().invoke(key_app, ["a b"])
    assert result.exit_code == 2
    assert "1 to 32 characters" in result.output


def test_key_command_help() -> None:
    result = CliRunner().invoke(key_app, ["--help"])
    assert "Example: t2w key alice" in result.output


def test_an_entry_can_be_made_without_the_command() -> None:
    assert f"alice:{hashlib.sha256(ALICE.encode()).hexdigest()}" == ALICE_ENTRY
