"""A trained student as a file that runs without this project. Each is checked when it is written."""

from __future__ import annotations

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
    height, width = resolution or student.card.resolution
    student.grid(height, width)  # UserError where they do not fit
    sizes = [(height, width)]
    if dynamic:
        sizes.append((height + student.patch_size, width + 2 * student.patch_size))
    module = _Tuple(student if teacher is None else student.adapt(teacher)).eval()
    if to == "safetensors":
        write_student(student, out)
        loaded = load_student(out)
        run: Run = _Tuple(loaded if teacher is None else loaded.adapt(teacher))
    else:
        run = _write(module, to, _file(out, SUFFIXES[to]), torch.rand(1, 3, height, width), dynamic)
    for size in sizes:
        _compare(module, run, size, to)
    return out


class _Tuple(nn.Module):
    """Exporters take tuples of tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Pair:
        output: StudentOutput | TeacherOutput = self.module(images)
        return output.summary, output.spatial


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


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
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        remedy = "leave out --dynamic, or choose" if dynamic else "choose"
        raise UserError(
            f"--to {to}: the exporter cannot take this student ({_one_line(error)}); {remedy} another of "
            f"safetensors, {', '.join(SUFFIXES)}"
        ) from error


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
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
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
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"--to {to}: what was written does not run at {size[0]} x {size[1]} "
                f"({_one_line(error)}); leave out --dynamic"
            ) from error
        for name, expected, other in zip(NAMES, module(images), found, strict=True):
            error_norm = (expected - other).norm() / expected.norm().clamp(min=1e-12)
            if expected.shape != other.shape or not error_norm <= TOLERANCE:
                raise UserError(
                    f"--to {to}: at {size[0]} x {size[1]} the written student's {name} is off by "
                    f"{float(error_norm):.2g} of its norm; do not use the file, choose another format"
                )
