"""Recording by Ray actors, in processes of their own so that no test leaves a cluster behind."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.config import ExtractConfig
from pipeline.extract import extract
from storage_schemas.recipe import read_recipe
from storage_schemas.store import FeatureStore
from tests.recording import committed_objects, make_shard, problems

ROOT = Path(__file__).parents[2]
SECONDS = 90
BINARIES = Path(sys.executable).parent
# Actors have one thread each here, and the number of threads decides the last bits of a convolution.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    "PATH": f"{BINARIES}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
}


def write_recipe(folder: Path, shards: int, images: int = 6) -> Path:
    """Two small real teachers over so many shards."""
    for number in range(shards):
        make_shard(folder / "shards" / f"s{number}.tar", images)
    teacher = {"family": "timm", "weights": "random", "seed": 0, "resolution": 64}
    recipe = {
        "store": {"url": str(folder / "store"), "views_per_image": 2},
        "data": {"train": str(folder / "shards/*.tar")},
        "teachers": {
            "cnn": {**teacher, "model": "test_efficientnet"},
            "vit": {**teacher, "model": "test_vit", "codec": "int8"},
        },
        "extract": {"batch_size": 4, "device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def inline(recipe: Path, url: Path) -> dict[str, str]:
    """What one process with one thread records, elsewhere."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = ExtractConfig.from_recipe(read_recipe(recipe, [f"store.url={url}"]))
        assert extract(config).failed == {}
    finally:
        torch.set_num_threads(threads)
    return without_moments(FeatureStore.open(str(url)))


def without_moments(store: FeatureStore) -> dict[str, str]:
    """Digests of all committed objects but the moments, whose last bits are a matrix product's."""
    found = committed_objects(store)
    return {path: digest for path, digest in found.items() if "/moments/" not in path and digest[0] != "{"}


def descendants(pid: int) -> dict[int, str]:
    """Command lines of the living processes below one."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for one in task.read_text().split():
            try:
                found[int(one)] = Path(f"/proc/{one}/cmdline").read_text().replace("\0", " ")
                found |= descendants(int(one))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and whatever it started."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def test_two_actors_one_killed_at_work_make_the_same_store(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards=6, images=24)
    command = [sys.executable, "-m", "cli", "extract", str(recipe), "--executor", "ray", "--workers", "2"]
    driver = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline, killed = time.monotonic() + SECONDS, 0
        while not killed and driver.poll() is None and time.monotonic() < deadline:
            if list(tmp_path.glob("store/teachers/*/parts/*")):
                below = descendants(driver.pid)
                at_work = [pid for pid, line in below.items() if line.startswith("ray::_Worker.record")]
                if at_work:
                    killed = at_work[0]
                    os.kill(killed, signal.SIGKILL)
            time.sleep(0.01)
        output, _ = driver.communicate(timeout=SECONDS)
    finally:
        end(driver)
    assert killed
    assert driver.returncode == 0, output
    assert "attempt 1 of 3: shard 's" in output
    assert "shards: 6 recorded, 0 were done, 0 failed" in output
    store = FeatureStore.open(str(tmp_path / "store"))
    assert problems(store) == []
    assert without_moments(store) == inline(recipe, tmp_path / "inline")


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A cluster's head on the loopback, started as an operator would; the environment that finds its jobs."""
    ports = [free_port() for _ in range(5)]
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    names += ["ray-client-server-port"]
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder:  # sockets need short paths
        command = [f"{BINARIES}/ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        command += ["--num-cpus=2", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
        command += [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        log = Path(folder) / "head.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                command, env=ENVIRONMENT, stdout=sink, stderr=subprocess.STDOUT, text=True, cwd=folder
            )
        try:
            wait_for_port(ports[1], process, log)
            yield {**ENVIRONMENT, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
        finally:
            end(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_a_batch_job_records_what_one_process_does(tmp_path: Path, head: dict[str, str]) -> None:
    recipe = write_recipe(tmp_path, shards=2)
    submit = [f"{BINARIES}/ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "cli"]
    done = subprocess.run(
        [*submit, "extract", str(recipe), "--workers", "2"],
        cwd=ROOT,
        env=head,
        timeout=SECONDS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "shards: 2 recorded" in done.stdout
    store = FeatureStore.open(str(tmp_path / "store"))
    assert problems(store) == []
    assert without_moments(store) == inline(recipe, tmp_path / "inline")
