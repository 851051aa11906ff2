"""Shards trained by several Ray workers: the same files as by one process, also after a kill."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PROCESS_S
from tests.training.conftest import Toy
from tests.training.test_zoo import assert_same_files, kill_when_half_written
from tests.training.toy import write_preset
from text2weight_training.distributed import run_jobs
from text2weight_training.files import TrainingDataError
from text2weight_training.zoo import build_zoo, load_speed, load_zoo

# Processes of their own: what Ray starts and warns of stays out of the other tests.
HANG_AFTER_ONE_SHARD = """
import sys, time
from pathlib import Path
from text2weight_training import zoo
from text2weight_training.presets import load_preset
from text2weight_training.tasks import load_task_data
features, text, preset, out = sys.argv[1:]
save = zoo._save_tensors
def hang(tensors, path):
    save(tensors, path)
    if "heads-" in path.name:
        Path(out, "half").touch()
        time.sleep(600)
zoo._save_tensors = hang
zoo.build_zoo(load_task_data([Path(features)], text), load_preset(preset), Path(out), workers=2)
"""
FINISH_THEN_FAIL = """
import sys
from pathlib import Path
from text2weight_training.distributed import run_jobs
from text2weight_training.files import TrainingDataError
from text2weight_training.presets import load_preset
from text2weight_training.tasks import load_task_data
from text2weight_training.zoo import build_zoo
features, text, preset, out = sys.argv[1:]
build_zoo(load_task_data([Path(features)], text), load_preset(preset), Path(out), workers=2)
def fail(shared, job):
    raise TrainingDataError(f"{shared} of {job}")
try:
    list(run_jobs(fail, "divergence", ["shard 3"], 2))
except TrainingDataError as error:
    print("caught:", error)
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: distributed)")
def test_two_workers_killed_and_resumed_give_the_files_of_one_process(toy: Toy, tmp_path: Path) -> None:
    out, preset = tmp_path / "zoo", write_preset(tmp_path / "toy.yaml")
    arguments = [str(toy.features), toy.text, str(preset), str(out)]
    kill_when_half_written(HANG_AFTER_ONE_SHARD, arguments, out / "half")
    assert len(list(out.glob("heads-*"))) == 1
    with pytest.raises(TrainingDataError, match="12 of 36 heads: run `t2w zoo` again"):
        load_zoo(out)
    finished = subprocess.run(
        [sys.executable, "-c", FINISH_THEN_FAIL, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert_same_files(out, toy.zoo_folder)
    speed = load_speed(out)
    assert speed is not None
    assert (speed.heads, speed.workers) == (24, 2)
    # What goes wrong in a worker is the error of the run.
    assert finished.stdout.endswith("caught: divergence of shard 3\n")


def test_one_worker_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it now fails
    assert list(run_jobs(lambda shared, job: shared + job, 10, [1, 2], 1)) == [(1, 11), (2, 12)]
    with pytest.raises(TrainingDataError, match=r"2 workers need Ray: install text2weight\[distributed\]"):
        list(run_jobs(lambda shared, job: shared + job, 10, [1, 2], 2))
    assert list(run_jobs(lambda shared, job: shared + job, 10, [], 2)) == []


def test_workers_do_not_share_a_gpu(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"2 workers train on cpu, not cuda: on a GPU, raise zoo\.stack"):
        build_zoo(toy.data, toy.preset, tmp_path / "zoo", "cuda", workers=2)
    assert not (tmp_path / "zoo").exists()
