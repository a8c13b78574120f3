"""Checkpoints: a folder that is either whole or not there.

`step-00000100/` holds the student's and the adaptors' weights, and where there are any the balancing's and
the averaged ones (safetensors), the optimiser's state (torch, loaded with `weights_only`), and
`checkpoint.json`: step, meta, and the size and digest of every other file.
All is written and synced in a hidden sibling folder, then renamed. No random state is kept: whoever trains
derives it from (seed, step, rank).

One process writes to a folder of checkpoints at a time.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from storage_schemas.errors import DataDamage, UserError
from storage_schemas.manifest import canonical_json

RECORD = "checkpoint.json"
STUDENT, ADAPTORS, OPTIMIZER = "student.safetensors", "adaptors.safetensors", "optimizer.pt"
WEIGHTS = ".safetensors"

# The `~` marks a checkpoint that another of the same step is about to replace; until then it counts.
FOLDER = re.compile(r"step-(\d{8,})(~?)")
TEMPORARY = ".step-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was saved: state dicts on the CPU, and whatever `meta` the trainer gave (position, recipe...).

    `weights` by name: student, adaptors, and where there are any balancing and ema.
    """

    step: int
    weights: dict[str, dict[str, Tensor]]
    optimizer_state: dict[str, Any]
    meta: dict[str, Any]

    @property
    def student(self) -> dict[str, Tensor]:
        """As training goes on from it."""
        return self.weights["student"]

    @property
    def adaptors(self) -> dict[str, Tensor]:
        """As training goes on from them."""
        return self.weights["adaptors"]

    def evaluated(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The student's and the adaptors' weights to be used: the averaged ones, if the run averages them."""
        if "ema" not in self.weights:
            return self.student, self.adaptors
        student, adaptors = (
            {
                key.removeprefix(f"{name}."): value
                for key, value in self.weights["ema"].items()
                if key.startswith(f"{name}.")
            }
            for name in ("student", "adaptors")
        )
        return student, adaptors


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer_state: dict[str, Any],
    meta: dict[str, Any],
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of `step` and return its folder; then remove all others but the newest `keep` - 1.

    `weights` are state dicts by name, `meta` is anything that JSON takes. A failure leaves earlier
    checkpoints as they were: OSError where the files cannot be written, UserError where two weights share
    memory, which safetensors cannot say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{step:08d}.", dir=folder))
    temporary.chmod(0o755)  # mkdtemp's own 0o700 would hide the checkpoint from everyone else
    try:
        _write_tensors(temporary, weights, optimizer_state)
        _write_record(temporary, step, meta)
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        final = _replace(temporary, folder / f"step-{step:08d}")
    except OSError as error:
        full = "disk full: " if error.errno == errno.ENOSPC or "os error 28" in str(error) else ""
        raise OSError(f"checkpoint {temporary}: {full}{error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep is not None:
        _remove_old(folder, final, keep)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step: a whole record, and every file of its recorded size."""
    return next(complete_checkpoints(folder), None)


def complete_checkpoints(folder: Path) -> Iterator[Path]:
    """Newest first."""
    return (path for path in reversed(_checkpoints(folder)) if _is_complete(path))


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at `path`: itself, or the newest of a folder of them."""
    return path if (path / RECORD).is_file() else newest_checkpoint(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; DataDamage names the file whose digest does not hold."""
    record = _read_record(path)
    for name, expected in record["files"].items():
        _check(path / name, expected["sha256"])
    return Checkpoint(
        step=record["step"],
        weights={
            name.removesuffix(WEIGHTS): safetensors.torch.load_file(path / name)
            for name in record["files"]
            if name.endswith(WEIGHTS)
        },
        optimizer_state=torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True),
        meta=record["meta"],
    )


def _write_tensors(
    folder: Path, weights: Mapping[str, Mapping[str, Tensor]], optimizer_state: dict[str, Any]
) -> None:
    plain = {name: _plain(name, tensors) for name, tensors in weights.items()}
    try:
        for name, tensors in plain.items():
            safetensors.torch.save_file(tensors, folder / f"{name}{WEIGHTS}")
        with (folder / OPTIMIZER).open("wb") as file:  # given the path, torch hides the system's own error
            torch.save(optimizer_state, file)
    except (SafetensorError, RuntimeError) as error:  # so the two libraries report a full disk
        hidden = error.__context__  # torch complains of what the failed write left undone
        if isinstance(hidden, OSError | KeyboardInterrupt):
            raise hidden from None
        raise OSError(str(error).splitlines()[0]) from error


def _plain(what: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of one storage."""
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in weights.items():
        if not tensor.numel():
            continue
        owner = owners.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), name)
        if owner != name:
            raise UserError(
                f"{what} weights {owner!r} and {name!r} share memory: a checkpoint cannot hold both"
            )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _write_record(folder: Path, step: int, meta: dict[str, Any]) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
    }
    record = {"step": step, "meta": meta, "files": files}
    record["sha256"] = sha256(canonical_json(record)).hexdigest()
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _read_record(path: Path) -> dict[str, Any]:
    """The record of the checkpoint at `path`, held against its own digest."""
    try:
        record = json.loads((path / RECORD).read_bytes())
    except (OSError, ValueError) as error:
        raise DataDamage(f"checkpoint {path}: {RECORD} cannot be read ({error})") from error
    stated = record.pop("sha256", None) if isinstance(record, dict) else None
    found = sha256(canonical_json(record)).hexdigest()
    if stated != found:
        raise DataDamage(f"checkpoint {path}: {RECORD} has digest {found}, recorded {stated}")
    assert isinstance(record, dict)
    return record


def _replace(temporary: Path, final: Path) -> Path:
    """Rename `temporary` to `final`; a checkpoint that stands there is kept aside until it is replaced."""
    aside = final.with_name(f"{final.name}~")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def _checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, oldest step first; of one step, the one being replaced first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: (int(pair[0][1]), not pair[0][2]))]


def _is_complete(path: Path) -> bool:
    try:
        files = _read_record(path)["files"]
    except DataDamage:
        return False
    return all(
        (path / name).is_file() and (path / name).stat().st_size == expected["bytes"]
        for name, expected in files.items()
    )


def _remove_old(folder: Path, saved: Path, keep: int) -> None:
    others = [path for path in _checkpoints(folder) if path != saved]
    for path in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(path)


def _check(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataDamage(f"checkpoint file {path} is missing, recorded with digest {expected}")
    if (found := _digest(path)) != expected:
        raise DataDamage(f"checkpoint file {path} has digest {found}, recorded {expected}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
