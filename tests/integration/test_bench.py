"""The benchmarks run and print what they promise; how fast anything is, no test says."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
from safetensors.torch import save_file
from torch import nn

from bench import (
    device_rate,
    faults,
    http_overhead,
    latency,
    mixed_load,
    run,
    sampler_cost,
    soak,
    throughput,
    timing,
    traced_call,
    zoo_rate,
)
from tests.patience import PROCESS_S
from tests.tiny import TINY_DIM, TINY_NAMES, save_tiny_checkpoint
from text2weight import checkpoint as checkpoint_module
from text2weight.checkpoint import TextEncoderConfig, load_checkpoint
from text2weight.denoiser import DenoiserConfig
from text2weight.diffusion import NoiseSchedule
from text2weight.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
TINY_SIZES = {
    "latency": latency.Sizes(repeats=2, warmup=1),
    "throughput": throughput.Sizes(rounds=1, requests_alone=2, requests_together=40),
    "mixed_load": mixed_load.Sizes(seconds=0.3, calls=2, most_per_s=100, mix=((0.5, "mean", 1), (0.5, "ddim", 3))),
    "http_overhead": http_overhead.Sizes(rounds=1, requests=70),
    "sampler_cost": sampler_cost.Sizes(
        ddpm_steps=3, repeats=2, warmup=1, denoiser=DenoiserConfig(tokens="chunk", width=16, depth=1, heads=2)
    ),
    "traced_call": traced_call.Sizes(alone=2, beside=1),
    "device_rate": device_rate.Sizes(2, 2, 1, 64, 64, ways=(("mean", 1), ("ddim", 3), ("ddpm", 101))),
    "zoo_rate": zoo_rate.Sizes(heads=3, steps=2, features_per_class=2, repeats=2, warmup=1),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "checkpoint"
    # Enough steps for the longest requests of the soak.
    save_tiny_checkpoint(folder, classes=TINY_NAMES, schedule=NoiseSchedule(num_timesteps=1000))
    return folder


def measured(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """The one JSON line that a benchmark prints with tiny sizes."""
    monkeypatch.setattr(importlib.import_module(f"bench.{name}"), "QUICK", TINY_SIZES[name])
    code = run.main([name, "--quick", "--checkpoint", str(model)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    lines = printed.out.splitlines()
    assert len(lines) == 1
    result: dict[str, Any] = json.loads(lines[0])
    assert result["benchmark"] == name
    assert result["quick"] is True
    assert result["ratio"] is None or result["ratio"] > 0
    assert result["cores"] >= 1
    assert result["threads"] >= 1
    assert result["torch"]
    return result


@pytest.fixture
def model_with_text_tower(tmp_path: Path) -> Path:
    """A model that takes any name, not only those of a table."""
    layers = {"width": 16, "layers": 1}
    tower = {
        "embed_dim": TINY_DIM,
        "vision_cfg": {"image_size": 32, "head_width": 8, "patch_size": 16, **layers},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "heads": 2, **layers},
    }
    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": tower, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**tower).state_dict(), folder / "open_clip_model.safetensors")
    encoder = TextEncoderConfig(source="dir:text_encoder", name="tiny tower")
    save_tiny_checkpoint(
        tmp_path / "checkpoint", parts={"text_encoder": folder}, text_encoder=encoder, classes=TINY_NAMES
    )
    return tmp_path / "checkpoint"


def test_latency(
    model_with_text_tower: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measured("latency", model_with_text_tower, monkeypatch, capsys)
    assert set(result["cases"]) == {"mean/1", "ddim/20"}
    for case in result["cases"].values():
        assert case["ratio"] == pytest.approx(case["request_ms"]["median"] / case["sampler_ms"]["median"], rel=1e-3)
        assert case["request_new_names_ms"]["median"] > 0
    assert result["ratio"] == result["cases"]["mean/1"]["ratio"]


def test_throughput(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured("throughput", model, monkeypatch, capsys)
    rates = result["requests_per_s"]
    assert result["ratio"] == pytest.approx(rates["32"] / rates["1"], rel=1e-2)
    assert result["requests_per_round"] == {"1": 2, "32": 40}


def test_mixed_load(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # LitServe is there on some machines only
    result = measured("mixed_load", model, monkeypatch, capsys)
    assert result["service"]["answered"] == result["requests"] > 0
    assert result["service"]["failed"] == 0
    assert result["service"]["short_ms"]["p99"] >= result["service"]["short_ms"]["p50"] > 0
    assert result["ratio"] is None


def test_http_overhead(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured("http_overhead", model, monkeypatch, capsys)
    rates = result["answers_per_s"]
    assert result["ratio"] == pytest.approx(rates["http_uncached"] / rates["engine"], rel=1e-2)
    assert result["ratio_cached"] == pytest.approx(rates["http_cached"] / rates["engine"], rel=1e-2)


def test_sampler_cost(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured("sampler_cost", model, monkeypatch, capsys)
    assert result["ddpm_steps_timed"] == 3
    assert result["ddpm_s_is_extrapolated"] is True
    assert result["ratio"] == pytest.approx(result["default_ms"]["median"] / 1000 / result["ddpm_s"], rel=1e-2)
    assert result["denoiser"]["tokens"] == "unit"
    assert result["paper_denoiser"] == {"tokens": "chunk", "width": 16, "depth": 1, "heads": 2}


def test_sampler_cost_takes_all_steps_unless_quick() -> None:
    assert sampler_cost.FULL.ddpm_steps == 1000
    paper = sampler_cost.FULL.denoiser
    assert (paper.tokens, paper.chunk_size, paper.width, paper.depth) == ("chunk", 576, 1024, 6)


def test_traced_call(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured("traced_call", model, monkeypatch, capsys)
    assert set(result["cases"]) == {f"{rows} {how}" for rows in (1, 8, 32) for how in ("alone", "beside")}
    for case in result["cases"].values():
        assert case["ratio"] == pytest.approx(case["plain_ms"]["median"] / case["traced_ms"]["median"], rel=1e-2)
    assert result["ratio"] == result["cases"]["32 beside"]["ratio"]


def test_device_rate(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured("device_rate", model, monkeypatch, capsys)
    assert list(result["rates"]) == ["mean/1", "ddim/3", "ddpm/101"]
    for name, rate in result["rates"].items():
        calls = rate["heads_per_s"] * int(name.partition("/")[2])
        share = calls * result["gflops_per_row"] / (1000 * result["peak_tflops"])
        assert rate["share_of_peak"] == pytest.approx(share, rel=1e-2)
        assert rate["latency_ms"] > 0
    assert result["ratio"] == pytest.approx(
        result["call_ms"]["plain"]["median"] / result["call_ms"]["served"]["median"], rel=1e-2
    )
    assert result["memory_mb"] > 100


def test_device_rate_takes_the_steps_that_were_asked_for() -> None:
    assert [steps for _, steps in device_rate.FULL.ways] == [1, 4, 20, 1000]


def test_operations_of_the_network_are_counted(model: Path) -> None:
    """A row's linear layers alone take two operations for each of their weights."""
    loaded = load_checkpoint(model)
    weights = sum(layer.weight.numel() for layer in loaded.denoiser.modules() if isinstance(layer, nn.Linear))
    assert device_rate._flops_per_row(loaded) > 2 * weights


def test_zoo_rate(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured("zoo_rate", model, monkeypatch, capsys)
    assert result["heads"] == 3
    assert result["recipe"]["steps"] == 2
    assert result["preset_steps"] > 2
    rates = result["heads_per_s"]
    assert result["ratio"] == pytest.approx(rates["stack"] / rates["single"], rel=1e-2)


def test_actions_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[tuple[str, int]] = []
    times = timing.interleave(
        {"a": lambda turn: calls.append(("a", turn)), "b": lambda turn: calls.append(("b", turn))},
        repeats=2,
        warmup=1,
    )
    assert calls == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert {name: len(spent) for name, spent in times.items()} == {"a": 2, "b": 2}


def test_missing_bundled_model_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Path:
        raise CheckpointError("the bundled reference model is not installed: name a checkpoint folder")

    monkeypatch.setattr(checkpoint_module, "bundled_checkpoint", absent)
    assert run.main(["--quick"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "name a checkpoint folder with --checkpoint DIR, or run only zoo_rate" in printed.err


def test_the_script_that_make_calls_explains_a_bad_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "bench/run.py", "sampler_cost", "--checkpoint", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0] == "bench: sampler_cost ..."
    assert f"{tmp_path} is not a checkpoint" in done.stderr.splitlines()[1]


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["speed"])
    assert (
        "choose among latency, throughput, mixed_load, http_overhead, sampler_cost, traced_call, device_rate, zoo_rate"
        in capsys.readouterr().err
    )


def test_soak_of_three_seconds(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "soak.png"
    code = soak.main(["--minutes", "0.05", "--checkpoint", str(model), "--figure", str(picture)])
    printed = capsys.readouterr()
    *lines, verdict = [json.loads(line) for line in printed.out.splitlines()]
    assert code == (0 if verdict["passed"] else 1), printed.err
    assert len(lines) == 12
    assert all(line["rss_mb"] > 0 and line["files"] > 0 and line["threads"] > 0 for line in lines)
    assert verdict["requests"] >= sum(line["requests"] for line in lines) > 0
    assert verdict["failed"] == 0, verdict["failures"]
    assert verdict["load_per_s"] == pytest.approx(0.8 * verdict["capacity_per_s"], rel=1e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_fault(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Spoilt bodies: as many as asked for, each answered with a head or a documented problem."""
    code = faults.main(["--quick", "--only", "json-bodies", "--checkpoint", str(model)])
    printed = capsys.readouterr()
    [row] = [json.loads(line) for line in printed.out.splitlines()]
    assert (code, row["complaints"]) == (0, []), row
    assert row["sent"] == 60
    assert row["answered"] + sum(row["errors"].values()) + sum(row["broken"].values()) == 60
    assert row["errors"]["422 invalid-input"] > 0
    assert row["facts"]["made by Schemathesis"] > 0
    assert "| json-bodies | 60 |" in printed.err
