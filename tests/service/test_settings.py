"""Settings: names, types, secrets, and typing mistakes in the environment."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError

from tests.service.fakes import FakeModel
from tests.service.live import serve, wait_for
from text2weight.condition import MAX_CLASSES
from text2weight_service.model import Model
from text2weight_service.schemas import MAX_SAMPLES
from text2weight_service.settings import Settings, unknown_variables, variable_name


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2W_HTTP_PORT", "9000")
    monkeypatch.setenv("T2W_REQUEST_TIMEOUT_S", "2.5")
    monkeypatch.setenv("T2W_QUEUE_SIZE", "")
    settings = Settings()
    assert settings.http_port == 9000
    assert settings.request_timeout_s == 2.5
    assert settings.queue_size == 256


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("T2W_HTTP_PORT", "http"),
        ("T2W_HTTP_PORT", "70000"),
        ("T2W_MAX_BATCH_SIZE", "0"),
        ("T2W_QUEUE_SIZE", str(MAX_SAMPLES - 1)),
        ("T2W_MAX_CLASSES", str(MAX_CLASSES + 1)),
        ("T2W_REQUEST_TIMEOUT_S", "0"),
        ("T2W_LOG_LEVEL", "loud"),
        ("T2W_REDIS_URL", "localhost:6379"),
    ],
)
def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert [variable_name(str(error["loc"][0])) for error in caught.value.errors()] == [name]


def test_the_smallest_queue_holds_the_most_samples(model: FakeModel) -> None:
    with serve(lambda _: model, queue_size=MAX_SAMPLES) as live:
        assert live.client.get("/info").json()["limits"]["max_samples"] == MAX_SAMPLES
        model.gate.clear()  # or the first would be finished before the last has come
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(live.generate, "apple", "bus", samples=MAX_SAMPLES)
            wait_for(lambda: live.metric("t2w_queue_waiting") + live.metric("t2w_running") == MAX_SAMPLES, "samples")
            model.gate.set()
        assert asked.result().status_code == 200
    with pytest.raises(ValidationError, match="must be at least 16: one request may ask for so many samples"):
        Settings(queue_size=MAX_SAMPLES - 1)


def test_default_allows_as_many_classes_as_the_model_library() -> None:
    assert Settings().max_classes == MAX_CLASSES


def test_secrets_are_masked() -> None:
    settings = Settings(redis_url="redis://:hunter2@cache:6379/0")  # type: ignore[arg-type]
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings.shown())


def test_unknown_variables() -> None:
    environment = {"T2W_QUEUE_SIZ": "1", "T2W_QUEUE_SIZE": "1", "t2w_portt": "1", "PATH": "/bin"}
    assert unknown_variables(environment) == ["T2W_QUEUE_SIZ", "t2w_portt"]


def test_start_prints_settings_and_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: FakeModel
) -> None:
    monkeypatch.setenv("T2W_QUEUE_SIZ", "64")

    def load(_: object) -> Model:
        return model

    with serve(load, redis_url="redis://:hunter2@127.0.0.1:1/0"):
        pass
    printed = capsys.readouterr().out
    assert "max_batch_size" in printed
    assert "hunter2" not in printed
    assert "T2W_QUEUE_SIZ" in printed
