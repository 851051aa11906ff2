"""Shards trained by several Ray workers: the same files as by one process, also after a kill."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S, PROCESS_S
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
# Two machines of one core, as Ray sees them. Each lends a worker; the second is gone once a shard is finished.
ON_A_CLUSTER = """
import os, sys, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from text2weight_training import zoo
from text2weight_training.distributed import run_jobs
from text2weight_training.files import TrainingDataError
from text2weight_training.presets import load_preset
from text2weight_training.tasks import load_task_data
features, text, preset, out, patience_s = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
def meet(folder, job):
    Path(folder, f"met-{job}").touch()
    end = time.monotonic() + float(patience_s)
    while len(list(Path(folder).glob("met-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    return ray.get_runtime_context().get_node_id()
print("machines:", len({machine for _, machine in run_jobs(meet, str(Path(out).parent), [1, 2], 2)}))
save = zoo._save_tensors
def lose_a_machine(tensors, path):
    save(tensors, path)
    global second
    if "heads-" in path.name and second is not None:
        cluster.remove_node(second, allow_graceful=False)
        second = None
zoo._save_tensors = lose_a_machine
zoo.build_zoo(load_task_data([Path(features)], text), load_preset(preset), Path(out), workers=2)
import torch
torch.set_num_threads(2)
try:
    list(run_jobs(meet, str(Path(out).parent), [1, 2], 2))
except TrainingDataError as error:
    print("caught:", error)
cluster.shutdown()
"""

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: distributed)"
)


def run(script: str, *arguments: str) -> str:
    """What the script printed, in a process of its own with one thread."""
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@needs_ray
def test_two_workers_killed_and_resumed_give_the_files_of_one_process(toy: Toy, tmp_path: Path) -> None:
    out, preset = tmp_path / "zoo", write_preset(tmp_path / "toy.yaml")
    arguments = [str(toy.features), toy.text, str(preset), str(out)]
    kill_when_half_written(HANG_AFTER_ONE_SHARD, arguments, out / "half")
    assert len(list(out.glob("heads-*"))) == 1
    with pytest.raises(TrainingDataError, match="12 of 36 heads: run `t2w zoo` again"):
        load_zoo(out)
    printed = run(FINISH_THEN_FAIL, *arguments)
    assert_same_files(out, toy.zoo_folder)
    speed = load_speed(out)
    assert speed is not None
    assert (speed.heads, speed.workers) == (24, 2)
    # What goes wrong in a worker is the error of the run.
    assert printed.endswith("caught: divergence of shard 3\n")


@needs_ray
def test_a_cluster_that_loses_a_machine_gives_the_files_of_one_process(toy: Toy, tmp_path: Path) -> None:
    out, preset = tmp_path / "zoo", write_preset(tmp_path / "toy.yaml")
    printed = run(ON_A_CLUSTER, str(toy.features), toy.text, str(preset), str(out), str(PATIENCE_S))
    assert_same_files(out, toy.zoo_folder)
    assert printed.startswith("machines: 2\n")
    assert "caught: a worker takes 2 cores, and no machine of the Ray cluster" in printed
    assert printed.endswith("has more than 1: set OMP_NUM_THREADS to at most 1\n")


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_no_cluster(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        TrainingDataError, match=rf"no Ray cluster answers at RAY_ADDRESS '{address}' .*ray start --head"
    ):
        list(run_jobs(lambda shared, job: shared + job, 10, [1, 2], 2))


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
