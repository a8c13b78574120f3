"""Ranks as workers of Ray Train: on a cluster, or on a Ray started here for the run. The loop is the same.

The only module of the trainer that imports Ray. Ray Train gives each worker the environment that torchrun
would, and joins them into a process group. Nothing else of it is used: metrics and errors come back through a
queue, checkpoints are the trainer's own, and so is going on after a failure (`resume`), for which all workers
must end together.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from storage_schemas.errors import DataDamage, UserError
from trainer.config import TrainConfig
from trainer.metrics import StepMetrics
from trainer.run import require_writable
from trainer.train import train

POLL_SECONDS = 0.5


def train_by_ray(
    recipe: dict[str, Any],
    resume: bool = False,
    on_metrics: Callable[[StepMetrics], None] = lambda metrics: None,
    workers: int = 1,
    address: str | None = None,
) -> Path:
    """`train` in so many workers of Ray Train; the folder of the last checkpoint.

    address: of a cluster, else RAY_ADDRESS, else Ray is started here. A worker has a CPU, and a GPU where
    `training.device` says so. UserError and DataDamage are those of the workers; ChildProcessError where a
    worker died.
    """
    config = TrainConfig.from_recipe(recipe)
    output = Path(config.training.output)
    require_writable(output)
    ray = _import_ray()
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address:
        _require_absolute(config)
    own = not ray.is_initialized()
    if own:
        _connect(ray, address, workers)
    try:
        gpus = _require_room(ray, config.training.device, workers)
        storage = output.absolute() / f".ray-{uuid4().hex}"
        return _run(ray, recipe, resume, on_metrics, workers, gpus, storage)
    finally:
        if own:
            ray.shutdown()


def _run(
    ray: Any,
    recipe: dict[str, Any],
    resume: bool,
    on_metrics: Callable[[StepMetrics], None],
    workers: int,
    gpus: bool,
    storage: Path,
) -> Path:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options={"num_cpus": 0})
    # Ray Train wants a folder that all nodes share: one within the output, removed after the run.
    trainer = TorchTrainer(
        _work,
        train_loop_config={"recipe": recipe, "resume": resume, "queue": queue},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        # Ranks count on the CPU, whatever they compute on; see `distributed.launch`.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name="run", storage_path=str(storage), failure_config=FailureConfig(max_failures=0)
        ),
    )
    ended: list[Exception | None] = []
    # In a thread, where Ray leaves SIGINT to Python, so that Ctrl-C ends this as it does any command.
    fitting = threading.Thread(target=lambda: ended.append(_fit(ray, trainer)), daemon=True)
    fitting.start()
    errors: dict[int, Exception] = {}
    saved: Path | None = None
    try:
        while fitting.is_alive() or not queue.empty():
            try:
                rank, said = queue.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if isinstance(said, Exception):
                errors[rank] = said
            elif isinstance(said, Path):
                saved = said
            else:
                on_metrics(said)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if errors:
        raise errors[min(errors)]
    if ended[0] is not None:
        raise ended[0]
    assert saved is not None
    return saved


def _work(given: dict[str, Any]) -> None:
    """What a worker does. Errors of one line go to the driver by the queue: Ray makes tracebacks of them."""
    rank, queue = int(os.environ["RANK"]), given["queue"]
    try:
        saved = train(given["recipe"], given["resume"], lambda metrics: queue.put((rank, metrics)))
    except (UserError, DataDamage, OSError) as error:
        queue.put((rank, error))
        raise
    if rank == 0:
        queue.put((rank, saved))


def _fit(ray: Any, trainer: Any) -> Exception | None:
    """Why the run failed, if it did: a worker that died, or an error in the code, with its traceback."""
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        # Of a worker that is gone, Ray Train wraps what Ray itself says.
        causes = {
            rank: getattr(failure, "health_check_failure", failure)
            for rank, failure in error.worker_failures.items()
        }
        died = {rank: why for rank, why in causes.items() if isinstance(why, ray.exceptions.RayError)}
        if not died:
            return error  # type: ignore[no-any-return]
        rank, failure = min(died.items())
        reason = str(failure).strip().partition("\n")[0]
        return ChildProcessError(f"worker {rank} died ({reason}); run it again with --resume to go on")
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        return error  # type: ignore[no-any-return]
    return None


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.train
    except ImportError as error:
        raise UserError(
            "--launcher: 'ray' needs Ray Train; install it with `pip install 'rebroadcast[ray]'`"
        ) from error
    return ray


def _connect(ray: Any, address: str | None, workers: int) -> None:
    """To the cluster, or to a Ray that is started here with a CPU for each worker."""
    # Workers stay in their folder instead of Ray's, so that relative paths mean there what they mean here.
    # Nor does Ray start a run again by itself, as it would after a node was taken away: `resume` does.
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    if address is None:
        ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
        return
    try:
        ray.init(address, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--address: {address!r}: {reason}") from error


def _require_room(ray: Any, device: str, workers: int) -> bool:
    """Whether each worker has a GPU; UserError where the cluster has too few CPUs or GPUs for all."""
    there = ray.cluster_resources()
    gpus = device.startswith("cuda") or (device == "auto" and there.get("GPU", 0) >= workers)
    for kind in ("CPU", "GPU") if gpus else ("CPU",):
        if (has := math.floor(there.get(kind, 0))) < workers:
            raise UserError(f"--workers: {workers} need a {kind} each, and there are {has}; give fewer")
    return gpus


def _require_absolute(config: TrainConfig) -> None:
    fields = {
        "store.url": [config.store.url],
        "data": [*config.data.train, *config.data.held_out],
        "training.output": [config.training.output],
        "training.start_from": [config.training.start_from] if config.training.start_from else [],
    }
    for field, urls in fields.items():
        for url in urls:
            if not urlsplit(url).scheme and not Path(url).is_absolute():
                raise UserError(
                    f"{field}: {url!r} is relative, and workers on a cluster have other folders; make it "
                    f"absolute"
                )
