"""A checkpoint on disk: which experts it has, and each of them in a device format."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moeaccel.closing import Closing
from moeaccel.formats import WeightFormat, widened
from moeaccel.grid import Squares
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.importers.base import Contents, Family, check_shape
from moeaccel.host.importers.coded import (
    Coded,
    Fit,
    Matrix,
    converted,
    expert_rows,
    expert_squares,
)
from moeaccel.host.importers.errors import (
    CheckpointError,
    ClosedCheckpoint,
    DamagedCheckpoint,
    ForeignCheckpoint,
)
from moeaccel.host.importers.families import families
from moeaccel.host.importers.files import StoredTensor, read_gguf, read_safetensors
from moeaccel.host.options import whole
from moeaccel.image import Expert

__all__ = ["Checkpoint", "ExpertLayer", "ImportedExpert", "in_order", "open_checkpoint"]

_PARTS = {
    "gate_proj": "gate", "w1": "gate", "gate": "gate", "up_proj": "up", "w3": "up", "up": "up",
    "down_proj": "down", "w2": "down", "down": "down", "gate_up_proj": "gate_up",
    "gate_up": "gate_up"}
IMPORTED = "moeaccel-experts"
"""What :mod:`moeaccel.host.importers.quantised_file` names in the metadata of its files."""

_BIASES = (".bias", "_bias")
_Bias = NDArray[np.float32] | None
_STEMS = tuple(re.compile(pattern) for pattern in (
    # One matrix for each expert: Qwen, OLMoE, DeepSeek; Mixtral.
    (r"(?:.*\.)?layers\.(?P<layer>\d{1,6})\.(?:.*\.)?experts\.(?P<expert>\d{1,6})\."
     r"(?P<part>gate_proj|up_proj|down_proj|w[123])"),
    # Stacked: gpt-oss, Llama 4, and what transformers has in memory.
    (r"(?:.*\.)?layers\.(?P<layer>\d{1,6})\.(?:.*\.)?experts\."
     r"(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)"),
    r"blk\.(?P<layer>\d{1,6})\.ffn_(?P<part>gate_up|gate|up|down)_exps"))  # GGUF


@dataclass(frozen=True)
class _Place:
    """Where a matrix, or a stack of them, lies."""

    stem: str
    family: Family
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer.

    Parameters
    ----------
    index : :class:`int`
        As the checkpoint counts layers.
    num_experts, d_model, d_expert : :class:`int`
    families : tuple of :class:`str`
        How its weights are stored.
    biases : tuple of :class:`str`
        Tensors of biases.
    activation, limit
        As :class:`moeaccel.image.Expert` has them.
    """

    index: int
    num_experts: int
    d_model: int
    d_expert: int
    families: tuple[str, ...]
    biases: tuple[str, ...]
    _places: Mapping[tuple[str, int | None], _Place]
    _transposed: bool
    _interleaved: bool
    activation: str = "silu"
    limit: float | None = None

    @property
    def biased(self) -> dict[str, bool]:
        """Whether gate and up, and down, have biases."""
        down = {place.stem + end for (part, _), place in self._places.items() if part == "down"
                for end in _BIASES}
        return {"gate_up": not down.issuperset(self.biases),
                "down": not down.isdisjoint(self.biases)}


@dataclass(frozen=True)
class ImportedExpert:
    """An expert in a device format.

    Parameters
    ----------
    expert : :class:`Expert`
    fit : :class:`Fit`
        How the checkpoint's weights fit the format.
    squares : dict of :class:`Squares`
        Of ``gate_up`` and ``down``: of the checkpoint's weights, and of what changed.
    """

    expert: Expert
    fit: Fit
    squares: dict[str, Squares]


class Checkpoint(Closing):
    """A checkpoint, open; from :func:`open_checkpoint`. Use it in a ``with`` statement.

    Only headers are read at first; weights are read when they are asked for, one expert at a time.
    """

    def __init__(self, path: Path, contents: Contents, layers: dict[int, ExpertLayer],
                 files: contextlib.ExitStack) -> None:
        self.path = path
        self.contents = contents
        self.layers = layers
        self._files = files

    def close(self) -> None:
        """Close its files."""
        self._files.close()

    def matrices(self, layer: int, expert: int) -> tuple[Matrix, Matrix, Matrix]:
        """Read gate, up and down of one expert as the checkpoint has them, (I, H), (I, H), (H, I).

        Raises
        ------
        CheckpointError
            Naming the tensor.
        """
        gate, up, down = self._ordered(layer, expert)[0]
        return _floats(gate), _floats(up), _floats(down)

    def _ordered(self, layer: int, expert: int
                 ) -> tuple[tuple[Matrix, Matrix, Matrix], NDArray[np.integer] | None]:
        """Return the matrices, and in which order the rows of gate and up are other than stored."""
        found = self.layers[layer]

        def read(part: str) -> Matrix | None:
            stacked = found._places.get((part, None))
            place = stacked or found._places.get((part, expert))
            if place is None:
                return None
            matrix = _read(self.contents, place, None if stacked is None else expert)
            if found._transposed:
                if isinstance(matrix, Coded):
                    raise ForeignCheckpoint(
                        f"{place.stem} must have its inputs last to be read from "
                        f"{place.family.name}; convert the checkpoint to bfloat16")
                matrix = np.ascontiguousarray(matrix.T)
            return matrix

        both, down = read("gate_up"), read("down")
        if both is None:
            gate, up = read("gate"), read("up")
        else:
            half = found.d_expert
            rows = (slice(None, None, 2), slice(1, None, 2)) if found._interleaved else (
                slice(half), slice(half, None))
            gate, up = both[rows[0]], both[rows[1]]
        assert gate is not None and up is not None and down is not None
        if not isinstance(down, Coded) or down.order is None:
            return (gate, up, down), None
        # Where the columns of down go, the rows of gate and up go, too: no output changes.
        return (gate[down.order], up[down.order], replace(down, order=None)), down.order

    def _biases(self, layer: int, expert: int, order: NDArray[np.integer] | None
                ) -> tuple[_Bias, _Bias]:
        """Return the biases of gate and up, (2 I,) in the order of images, and of down, (H,); None
        where there are none."""
        found = self.layers[layer]

        def read(part: str, rows: int) -> _Bias:
            stacked = found._places.get((part, None))
            place = stacked or found._places.get((part, expert))
            name = None if place is None else next(
                (place.stem + end for end in _BIASES if place.stem + end in found.biases), None)
            if name is None:
                return None
            tensor = self.contents.need(name)
            check_shape(tensor, (found.num_experts, rows) if stacked else (rows,),
                        f"for the rows of {part}")
            return tensor.float32(expert if stacked else None)

        i = found.d_expert
        both = read("gate_up", 2 * i)
        if both is not None:
            pairs = both.reshape(i, 2) if found._interleaved else both.reshape(2, i).T
        else:
            each = [read(part, i) for part in ("gate", "up")]
            pairs = None if each[0] is each[1] is None else np.stack(
                [np.zeros(i, np.float32) if one is None else one for one in each], axis=1)
        if pairs is not None and order is not None:
            pairs = pairs[order]
        return None if pairs is None else pairs.reshape(-1), read("down", found.d_model)

    def expert(self, layer: int, index: int, weight_format: str | WeightFormat = "int4_g32", *,
               exact: bool = False, quantiser: str = "search", drop_biases: bool = False
               ) -> ImportedExpert:
        """Read one expert in a device format; may be called by several threads.

        Parameters and errors are those of :meth:`experts`.
        """
        found = self.layers[layer]
        names = (f"{part} of expert {index} of layer {layer} of {self.path}"
                 for part in ("gate", "up", "down"))
        stored, order = self._ordered(layer, index)
        (gate, fit, gate_squares), (up, up_fit, up_squares), (down, down_fit, down_squares) = (
            converted(matrix, weight_format, exact=exact, quantiser=quantiser, what=what)
            for matrix, what in zip(stored, names, strict=True))
        biases = (None, None) if drop_biases else self._biases(layer, index, order)
        expert = Expert(expert_rows(gate, up).with_bias(biases[0]), down.with_bias(biases[1]),
                        found.activation, found.limit)
        return ImportedExpert(expert, fit + up_fit + down_fit, {
            "gate_up": expert_squares(gate_squares, up_squares), "down": down_squares})

    def experts(self, layer: int, weight_format: str | WeightFormat = "int4_g32", *,
                exact: bool = False, quantiser: str = "search", drop_biases: bool = False,
                threads: int = 2) -> Iterator[tuple[Expert, Fit]]:
        """Yield the experts of a layer in a device format, and how they fit it.

        Parameters
        ----------
        layer : :class:`int`
            A key of :attr:`layers`.
        weight_format : :class:`str`
        exact : :class:`bool`
            Refuse what the format cannot hold as it is.
        quantiser : :class:`str`
            For what is to be quantised: ``"search"`` or ``"amax"``.
        drop_biases : :class:`bool`
            Leave biases out, for hardware without.
        threads : :class:`int`
            Experts that are converted at once, and kept in memory.

        Raises
        ------
        CheckpointError
            Naming the tensor, or the file where it was closed.
        FormatError
            If a bias is not finite.
        InvalidOption
            If there are not at least one thread.
        """
        threads = whole("threads", threads, least=1)

        def one(index: int) -> tuple[Expert, Fit]:
            found = self.expert(layer, index, weight_format, exact=exact, quantiser=quantiser,
                                drop_biases=drop_biases)
            return found.expert, found.fit

        return in_order(one, range(self.layers[layer].num_experts), threads)


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(call: Callable[[Item], Result], items: Iterable[Item], threads: int
             ) -> Iterator[Result]:
    """Yield what a function returns for each item, in their order, while so many are worked on:
    no more than so many results wait."""
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(call, item) for item in itertools.islice(rest, threads))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting += (pool.submit(call, item) for item in itertools.islice(rest, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def _floats(matrix: Matrix) -> Matrix:
    """Return a matrix, bfloat16 as float32."""
    return matrix if isinstance(matrix, Coded) else widened(matrix)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint: a folder with safetensors files, one such file, or a GGUF file.

    Nothing in it is executed, and pickles are not read.

    Raises
    ------
    DamagedCheckpoint, ForeignCheckpoint
        Naming the file, the tensor and the offset.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        config: dict[str, Any] = {}
        if path.suffix == ".gguf":
            file, tensors, config = read_gguf(path)
            stack.enter_context(file)
        else:
            folder = path if path.is_dir() else path.parent
            for part in _shards(path):
                file, found, metadata = read_safetensors(part)
                stack.enter_context(file)
                if metadata.get("format") == IMPORTED:
                    raise ForeignCheckpoint(
                        f"{part} must be a checkpoint, but is imported already, into "
                        f"{metadata.get('weight_format')}: load it with open_quantised() and "
                        "device.load_quantised(), or import the checkpoint that it was made of")
                if twice := tensors.keys() & found.keys():
                    raise DamagedCheckpoint(f"tensor {min(twice)!r} must be in one file of {path}, "
                                            f"not also in {part.name}")
                tensors |= found
            config = _json(folder / "config.json") if (folder / "config.json").exists() else {}
            if "quantization_config" not in config and (folder / "quantize_config.json").exists():
                config["quantization_config"] = _json(folder / "quantize_config.json")
        contents = Contents(tensors, config)
        return Checkpoint(path, contents, _find_layers(path, contents), stack.pop_all())


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(f"{path} must be a file that can be read: {error.strerror}"
                                ) from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} must be JSON, but: {error}") from error
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path} must be a JSON object, not a {type(found).__name__}")
    return found


def _shards(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = _json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(
                isinstance(name, str) and Path(name).name == name for name in names.values()):
            raise DamagedCheckpoint(f"weight_map of {index} must name a file of its folder for "
                                    "each tensor")
        return [path / name for name in sorted(set(names.values()))]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".gguf", ".bin", ".pt"))
        raise ForeignCheckpoint(
            f"{path} must hold *.safetensors, but has {', '.join(others[:3]) or 'none'}; name a "
            "GGUF file itself, and convert pickles (*.bin, *.pt), which are not read")
    return found


def _read(contents: Contents, place: _Place, expert: int | None) -> Matrix:
    try:
        matrix = place.family.read(contents, place.stem, expert)
    except (DamagedCheckpoint, ClosedCheckpoint):
        raise
    except (CheckpointError, UnsupportedExperts) as error:
        tensor = contents.need(place.stem + place.family.mark)
        raise ForeignCheckpoint(f"{place.family.name} weights of {tensor}: {error}") from error
    shape = matrix.integers.shape if isinstance(matrix, Coded) else matrix.shape
    assert shape == place.shape[-2:], (place, shape)
    return matrix


def _find_layers(path: Path, contents: Contents) -> dict[int, ExpertLayer]:
    places: dict[int, dict[tuple[str, int | None], _Place]] = {}
    known = families()
    for name in contents.tensors:
        for mark in dict.fromkeys(family.mark for family in known):
            if not name.endswith(mark):
                continue
            stem = name.removesuffix(mark)
            match = next((m for pattern in _STEMS if (m := pattern.fullmatch(stem))), None)
            if match is None:
                continue
            family = next((f for f in known if f.mark == mark and f.claims(contents, stem)), None)
            if family is None:
                raise ForeignCheckpoint(
                    f"{contents.tensors[name]} must be stored in one of the ways "
                    f"{', '.join(dict.fromkeys(f.name for f in known))}; convert the checkpoint to "
                    "bfloat16")
            expert = match.groupdict().get("expert")
            key = _PARTS[match["part"]], None if expert is None else int(expert)
            shape = family.shape(contents, stem)
            if len(shape) != (3 if expert is None else 2) or 0 in shape:
                what = "a stack of matrices" if expert is None else "a matrix"
                raise ForeignCheckpoint(f"{contents.tensors[name]} must be {what} without empty "
                                        f"dimensions, not of the shape {list(shape)}")
            layer = places.setdefault(int(match["layer"]), {})
            if key in layer:
                raise ForeignCheckpoint(
                    f"{key[0]} of layer {match['layer']} must be in {path} once, not as both "
                    f"{layer[key].stem!r} and {stem!r}")
            layer[key] = _Place(stem, family, shape)
    return {index: _layer(path, contents, index, places[index]) for index in sorted(places)}


def _layer(path: Path, contents: Contents, index: int,
           places: dict[tuple[str, int | None], _Place]) -> ExpertLayer:
    """Return a layer whose matrices are all there, and fit together."""
    numbers = {expert for _, expert in places}
    stacked = None in numbers
    counts = {place.shape[0] for place in places.values() if len(place.shape) == 3}
    if stacked and (len(numbers) > 1 or len(counts) > 1):
        raise ForeignCheckpoint(f"experts of layer {index} of {path} must all be stacked, as many "
                                f"in each tensor, not {sorted(p.stem for p in places.values())}")
    experts = counts.pop() if stacked else len(numbers)
    parts = ("gate_up", "down") if any(part == "gate_up" for part, _ in places) else (
        "gate", "up", "down")
    for e in (None,) if stacked else range(experts):
        for part in parts:
            if (part, e) not in places:
                raise ForeignCheckpoint(
                    f"{part} of {'experts' if e is None else f'expert {e}'} of layer {index} must "
                    f"be in {path}, which has {len(places)} matrices of this layer, but is not")
    first = None if stacked else 0
    rows, columns = places[parts[0], first].shape[-2:]
    d_model, d_expert = places["down", first].shape[-2:]
    gates = 2 if parts[0] == "gate_up" else 1
    # Of gate and up in one stack, down tells which way round they are; of stacks of their own, only
    # the model's width can.
    transposed = stacked and (rows, columns) == (d_expert, gates * d_model) and (
        gates == 2 or contents.config.get("hidden_size") == d_expert != d_model)
    if transposed:
        d_model, d_expert = d_expert, d_model
    for (part, e), place in places.items():
        n, k = (d_model, d_expert) if part == "down" else (
            (2 if part == "gate_up" else 1) * d_expert, d_model)
        if place.shape[-2:] != ((k, n) if transposed else (n, k)):
            raise ForeignCheckpoint(
                f"{contents.tensors[place.stem + place.family.mark]} must be a matrix "
                f"{[k, n] if transposed else [n, k]} for {part} of expert {e or 0}, with H = "
                f"{d_model} and I = {d_expert} by the others, not {list(place.shape[-2:])}")
    stems = {place.stem for place in places.values()}
    biases = tuple(name for stem in sorted(stems) for end in _BIASES
                   if (name := stem + end) in contents.tensors)
    used = tuple(dict.fromkeys(place.family.name for place in places.values()))
    gpt_oss = contents.config.get("model_type") == "gpt_oss"
    kind = ("gpt_oss", float(contents.config.get("swiglu_limit") or 7.0)) if gpt_oss else (
        "silu", None)
    return ExpertLayer(index, experts, d_model, d_expert, used, biases, places, transposed,
                       "mxfp4" in used or gpt_oss, *kind)
