"""Safetensors folders, whole or in shards: read a tensor at a time, written a shard at a time, so that a model need not fit in memory.

Three layouts are read: STEM.safetensors; the Hub's shards with model.safetensors.index.json (a tensor is never cut); and the checkpoints of
several ranks with STEM.index.json, where a tensor is cut into stretches of its flattened elements that lie in different files; several of one file
lie there one behind the other, under the tensor's name.

Nothing is ever unpickled: a folder that holds a pickle is refused, and so is an index that names files outside its folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import UserError
from data.files import save_tensors

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
INDEX = "model.safetensors.index.json"
BLOCK = 1 << 24  # bytes hashed and written at once


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON; fetch or export the folder again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; fetch or export the folder again.")
    return value


def refuse_pickles(folder: Path) -> None:
    """Raises UserError if the folder holds a file that would have to be unpickled."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UserError(f"{folder} holds a pickle ({pickles[0]}), which can run code when read; convert it to safetensors and remove it.")


class Weights:
    """The tensors of a folder by name, read when asked for. Raises UserError for a missing, unreadable or escaping file.

    stem: model, or optimizer for the moments of a checkpoint.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        refuse_pickles(folder)
        self.folder = folder
        self.files: dict[str, tuple[Any, set[str]]] = {}
        self.cut: dict[str, tuple[tuple[int, ...], list[tuple[str, int, int]]]] = {}  # shape, and (file, first, end) of each stretch
        if (folder / f"{stem}.index.json").exists():
            self._read_cut(folder / f"{stem}.index.json")
        elif stem == "model" and (folder / INDEX).exists():
            table = read_object(folder / INDEX).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
                raise UserError(f"{folder / INDEX} has no weight_map of file names; fetch or export the folder again.")
            for file in sorted(set(table.values())):
                escapes = Path(file).name != file or (folder / file).resolve().parent != folder.resolve()
                if escapes and not (Path(file).name == file and _blob(folder, file)):
                    raise UserError(f"{folder / INDEX} names {file!r}, which lies outside its folder; this folder is not safe to load.")
            self.where = {str(k): str(v) for k, v in table.items()}
        elif (folder / f"{stem}.safetensors").exists():
            self.where = dict.fromkeys(self._open(f"{stem}.safetensors").keys(), f"{stem}.safetensors")
        else:
            raise UserError(f"{folder} holds neither {stem}.safetensors nor {INDEX if stem == 'model' else f'{stem}.index.json'}.")
        for name, file in [*self.where.items(), *((n, part[0]) for n, (_, parts) in self.cut.items() for part in parts)]:
            if name not in self._names(file):
                raise UserError(
                    f"{folder / file} does not hold the tensor {name} that the index promises; fetch or export the folder again."
                )

    def _read_cut(self, path: Path) -> None:
        """The index of a checkpoint of several ranks; every element has to be there once."""
        try:
            for name, entry in read_object(path)["tensors"].items():
                parts = sorted((str(f), int(a), int(b)) for f, a, b in entry["parts"])
                parts.sort(key=lambda part: part[1])
                ends = [0, *(b for _, _, b in parts)]
                whole = ends[-1] == math.prod(entry["shape"]) and all(a == end for (_, a, _), end in zip(parts, ends))
                if not whole or any(Path(f).name != f for f, _, _ in parts):
                    raise ValueError
                self.cut[str(name)] = (tuple(int(n) for n in entry["shape"]), parts)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is not the index of a checkpoint; use another checkpoint of the run.") from error
        self.where = {name: parts[0][0] for name, (_, parts) in self.cut.items() if parts}

    def _names(self, file: str) -> Any:
        if file not in self.files:
            self._open(file)
        return self.files[file][1]

    def _open(self, file: str) -> Any:
        if file not in self.files:
            try:
                handle = safe_open(self.folder / file, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / file} cannot be read: {error}.") from error
            self.files[file] = (handle, set(handle.keys()))
        return self.files[file][0]

    def names(self) -> list[str]:
        return list(self.where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.cut[name][0] if name in self.cut else tuple(self._open(self.where[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor that is not cut, as torch calls it; its own name for one that torch reads as something else."""
        stored = str(self._open(self.where[name]).get_slice(name).get_dtype())
        return {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(stored, stored)

    def tensor(self, name: str) -> Tensor:
        if name not in self.cut:
            return self._open(self.where[name]).get_tensor(name)
        shape, _ = self.cut[name]
        return self.stretch(name, 0, math.prod(shape)).view(shape)

    def stretch(self, name: str, first: int, end: int) -> Tensor:
        """The elements first .. end-1 of the flattened tensor; only the pages that hold them are read."""
        if name not in self.cut:
            return self.tensor(name).view(-1)[first:end]
        pieces, passed = [], dict[str, int]()
        for file, a, b in self.cut[name][1]:
            begin = passed.get(file, 0)
            passed[file] = begin + b - a
            if a < end and first < b:
                pieces.append(self._open(file).get_tensor(name).view(-1)[begin + max(first - a, 0) : begin + min(end, b) - a])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)


def _blob(folder: Path, file: str) -> bool:
    """Whether a link leads into the blob store of the Hub's own cache, as snapshots there do."""
    store = folder.resolve().parent.parent / "blobs"
    return folder.resolve().parent.name == "snapshots" and (folder / file).resolve().parent == store


def parse_size(text: str) -> int:
    """Bytes of '5GB', '200MB', '12KB' or a number. Raises UserError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    number, unit = text.strip().upper(), 1
    for name, value in units.items():
        if number.endswith(name):
            number, unit = number[: -len(name)], value
            break
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"The shard size is {text!r}; write it as 5GB, 200MB or a number of bytes.")
    return size


def write_shards(folder: Path, sizes: dict[str, int], get: Callable[[str], Tensor], limit: int) -> list[str]:
    """Writes tensors `sizes` (bytes by name) as model.safetensors, or shards of at most `limit` bytes with an index (a tensor is never cut). Raises
    UserError where a tensor holds NaN or infinity: nobody can do anything with a model of these."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for file, names in zip(files, groups):
        save_tensors(folder / file, {name: _finite(name, get(name)).contiguous() for name in names}, {"format": "pt"})
        (folder / file).chmod(0o644)  # the library writes for the owner alone
    if len(groups) > 1:
        table = {name: file for file, names in zip(files, groups) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": table}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        narrow = ", or a dtype of a wider range than fp16" if tensor.dtype == torch.float16 else ""
        raise UserError(f"The tensor {name} would hold values that are not finite, so nothing is written; take another checkpoint{narrow}.")
    return tensor


def write_tensors(path: Path, tensors: dict[str, Tensor], cancel: threading.Event | None = None) -> dict[str, Any]:
    """Writes fp32 or uint8 CPU tensors as a safetensors file and returns its {bytes, sha256}, hashed on the way out.

    The library would first copy everything, and the file would have to be read again for its hash. `cancel` ends it early with an OSError.
    """
    kinds, header, offset = {torch.float32: "F32", torch.uint8: "U8"}, {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in (
            len(text).to_bytes(8, "little") + text,
            *(tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors.values()),
        ):
            view = memoryview(part)
            for i in range(0, len(view), BLOCK):
                if cancel is not None and cancel.is_set():
                    raise OSError("given up")
                block = view[i : i + BLOCK]
                digest.update(block)
                while len(block):
                    block = block[file.write(block) or 0 :]
            size += len(view)
    return {"bytes": size, "sha256": digest.hexdigest()}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
