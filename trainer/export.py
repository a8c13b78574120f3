"""A trained student as a file that runs without this project. Each is checked when it is written."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError
from storage_schemas.features import TeacherOutput
from trainer.students import StudentOutput
from trainer.trained import load_student, read_checkpoint, write_student

Format = Literal["safetensors", "torchscript", "onnx", "torch-export"]
Pair = tuple[Tensor, Tensor]
Run = Callable[[Tensor], Sequence[Tensor]]

SUFFIXES: dict[str, str] = {"torchscript": ".ts", "onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-3  # of the norm of a whole output: other kernels round otherwise
NAMES = ["summary", "spatial"]


def export_student(
    checkpoint: Path,
    to: Format,
    out: str,
    resolution: tuple[int, int] | None = None,
    dynamic: bool = False,
    teacher: str | None = None,
) -> str:
    """Write the student of a checkpoint's folder to `out`, and compare what was written with it on random
    images; the path.

    `safetensors` is a folder or URL that `load_student` reads; the others are files, from float images in
    [0, 1], 1 3 height width, to (summary, spatial). resolution: the training one if not given. dynamic: any
    resolution that the student takes. teacher: export the features as this teacher's, not the student's own.
    UserError with the exporter's message where it cannot.
    """
    student = read_checkpoint(checkpoint)
    size = resolution or student.card.resolution
    student.grid(*size)  # UserError where they do not fit
    module = _Tuple(student if teacher is None else student.adapt(teacher)).eval()
    if to == "safetensors":
        write_student(student, out)
        loaded = load_student(out)
        _compare(module, _Tuple(loaded if teacher is None else loaded.adapt(teacher)), size, to)
        return out
    images = torch.rand(1, 3, *size)
    with torch.no_grad():
        module(images)  # UserError where its windows do not fit
    path = _file(out, SUFFIXES[to])
    partial = path.with_name(f".{path.name}")
    try:
        run = _write(module, to, partial, images, dynamic)
        for other in _sizes(module, size, student.patch_size) if dynamic else [size]:
            _compare(module, run, other, to)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _sizes(module: nn.Module, size: tuple[int, int], patch: int) -> list[tuple[int, int]]:
    """What a dynamic export is tried at: its own size, one wider, one taller, and one of another grid where
    the student takes it (its windows may not divide that).
    """
    height, width = size
    other = (height + patch, width + 2 * patch)
    try:
        with torch.no_grad():
            module(torch.rand(1, 3, *other))
    except UserError:
        return [size, (height, 2 * width), (2 * height, width)]
    return [size, (height, 2 * width), (2 * height, width), other]


class _Tuple(nn.Module):
    """Exporters take tuples of tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Pair:
        output: StudentOutput | TeacherOutput = self.module(images)
        return output.summary, output.spatial


def _reason(error: BaseException) -> str:
    """The first cause's message, on one line: exporters wrap it in advice, with colours, about themselves."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error) or type(error).__name__)
    return " ".join(plain.split())[:500]


def _file(out: str, suffix: str) -> Path:
    path = Path(out)
    if path.suffix != suffix:
        raise UserError(f"--out: {out!r} must end in {suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(module: nn.Module, to: Format, path: Path, images: Tensor, dynamic: bool) -> Run:
    """Export to `path`; what was written, loaded again."""
    writers = {"torchscript": _torchscript, "onnx": _onnx, "torch-export": _torch_export}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            return writers[to](module, path, images, dynamic)
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever an exporter raises: its own classes share no base
        raise UserError(
            f"--to {to}: the exporter cannot take this student ({_reason(error)}); "
            f"{'leave out --dynamic, or ' if dynamic else ''}choose {_others(to)}"
        ) from error


def _others(to: Format) -> str:
    return " or ".join(other for other in ("safetensors", *SUFFIXES) if other != to)


def _torchscript(module: nn.Module, path: Path, images: Tensor, dynamic: bool) -> Run:
    if dynamic:
        raise UserError("--dynamic: torchscript records one resolution; choose onnx or torch-export")
    traced: Any = torch.jit.trace(module, images, check_trace=False)  # type: ignore[no-untyped-call]
    traced.save(str(path))
    run: Run = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return run


def _torch_export(module: nn.Module, path: Path, images: Tensor, dynamic: bool) -> Run:
    torch.export.save(torch.export.export(module, (images,), dynamic_shapes=_shapes(dynamic)), path)
    run: Run = torch.export.load(path).module()
    return run


def _onnx(module: nn.Module, path: Path, images: Tensor, dynamic: bool) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--to onnx: {error.name} is missing; install rebroadcast[onnx]") from error
    torch.onnx.export(
        module,
        (images,),
        path,
        input_names=["images"],
        output_names=NAMES,
        dynamo=True,
        dynamic_shapes=_shapes(dynamic),
        external_data=False,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised; it would be printed too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(x) for x in session.run(NAMES, {"images": images.numpy()})]


def _shapes(dynamic: bool) -> dict[str, dict[int, Any]] | None:
    auto = torch.export.Dim.AUTO
    return {"images": {2: auto, 3: auto}} if dynamic else None


def _compare(module: nn.Module, run: Run, size: tuple[int, int], to: Format) -> None:
    """UserError unless what was written gives what the module gives, on random images."""
    images = torch.rand(1, 3, *size)
    with torch.no_grad():
        try:
            found = run(images)
        except Exception as error:  # of another runtime, whose classes share no base
            raise UserError(
                f"--to {to}: what was exported does not run at {size[0]} x {size[1]} ({_reason(error)}); "
                f"leave out --dynamic if it was given, or choose {_others(to)}"
            ) from error
        for name, expected, other in zip(NAMES, module(images), found, strict=True):
            if expected.shape == other.shape:
                error_norm = float((expected - other).norm() / expected.norm().clamp(min=1e-12))
            else:
                error_norm = math.inf
            if not error_norm <= TOLERANCE:
                raise UserError(
                    f"--to {to}: at {size[0]} x {size[1]} the exported student's {name} is off by "
                    f"{error_norm:.2g} of its norm, so it was not kept; choose {_others(to)}"
                )
