"""Quantised experts in a file: imported once, loaded into devices of any configuration.

A safetensors file. Its metadata says ``format`` (``moeaccel-experts``), ``version`` (``2``; ``1``
had neither biases nor activations), ``weight_format``, ``layers`` (a JSON list, one object a layer
with ``index``, ``experts``, ``d_model``, ``d_expert``, ``activation``, ``limit``, which matrices
have biases: ``gate_up_biased``, ``down_biased``, and how it fitted: ``groups``, ``requantised``,
``coarsened``, ``relative_error``) and ``source``. Each layer has these tensors,
``layers.<index>.<matrix>.<part>`` of the matrices ``gate_up``, (E, 2 I, H) with rows g0, u0, g1,
u1, ..., and ``down``, (E, H, I):

``codes``
    uint8, (E, n, bytes): the format's code of each weight along K; of 4-bit formats two in a byte,
    the first in its low half, and the last byte of an odd K has a zero.
``scales``
    (E, n, groups): uint16 of formats with real scales, the significand in bits 0 to 10 and the
    shift above, uint32 of those with zero points, which are in bits 16 to 19; else uint8, the
    shift.
``row_exponents``
    int16, (E, n).
``biases``
    uint16, (E, n), where the matrix has some: bfloat16.

That is what expert images hold (:mod:`moeaccel.image`), in an order that no array has a say in.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import activation as find_activation
from moeaccel.errors import FormatError, OutputError
from moeaccel.formats import QuantisedMatrix, WeightFormat, weight_format as find_format
from moeaccel.host.importers.checkpoint import Checkpoint, ExpertLayer
from moeaccel.host.importers.coded import Fit
from moeaccel.host.importers.errors import DamagedCheckpoint, ForeignCheckpoint
from moeaccel.host.importers.files import StoredTensor, read_safetensors
from moeaccel.image import Expert, limit_bits

__all__ = ["LayerSummary", "QuantisedExperts", "QuantisedFile", "import_checkpoint",
           "open_quantised"]

FORMAT = "moeaccel-experts"
VERSION = "2"
_READ = ("1", VERSION)

Progress = Callable[[int, int, int], None]
"""Called with (layer, experts written, experts in all)."""


@dataclass(frozen=True)
class LayerSummary:
    """A layer of a file, and how it fitted.

    Parameters
    ----------
    index, experts, d_model, d_expert : :class:`int`
    activation, limit
        As :class:`moeaccel.image.Expert` has them.
    gate_up_biased, down_biased : :class:`bool`
    groups, requantised, coarsened, relative_error
        As :class:`Fit` has them.
    """

    index: int
    experts: int
    d_model: int
    d_expert: int
    activation: str = "silu"
    limit: float | None = None
    gate_up_biased: bool = False
    down_biased: bool = False
    groups: int = 0
    requantised: int = 0
    coarsened: int = 0
    relative_error: float = 0.0


def _shapes(fmt: WeightFormat, layer: LayerSummary) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Return (type, shape) of each part of each matrix of a layer."""
    found = {}
    for matrix, n, k in (("gate_up", 2 * layer.d_expert, layer.d_model),
                         ("down", layer.d_model, layer.d_expert)):
        found[matrix] = {
            "codes": ("U8", [layer.experts, n, -(-k * fmt.weight_bits // 8)]),
            "scales": (f"U{fmt.scale_bits}",
                       [layer.experts, n, -(-k // fmt.group)]),
            "row_exponents": ("I16", [layer.experts, n])}
        if getattr(layer, f"{matrix}_biased"):
            found[matrix]["biases"] = "U16", [layer.experts, n]
    return found


_BYTES = {"U8": 1, "U16": 2, "U32": 4, "I16": 2}


def _parts(matrix: QuantisedMatrix) -> dict[str, NDArray[Any]]:
    """Return what a file holds of a matrix."""
    fmt = matrix.format
    codes, scales = fmt.stored(matrix)
    in_byte = 8 // fmt.weight_bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % in_byte)))
    codes = np.bitwise_or.reduce(
        [codes[:, i::in_byte] << np.uint8(fmt.weight_bits * i) for i in range(in_byte)], axis=0)
    found = {"codes": codes, "scales": scales.astype(f"u{fmt.scale_bits // 8}"),
             "row_exponents": matrix.row_exponent}
    return found if matrix.bias is None else found | {"biases": matrix.bias}


def _matrix(fmt: WeightFormat, k: int, parts: dict[str, NDArray[Any]]) -> QuantisedMatrix:
    """Return the matrix that a file holds: the inverse of :func:`_parts`."""
    codes: NDArray[np.uint8] = parts["codes"]
    shifts = np.arange(0, 8, fmt.weight_bits, dtype=np.uint8)
    codes = codes[:, :, None] >> shifts & np.uint8((1 << fmt.weight_bits) - 1)
    codes = codes.reshape(len(codes), -1)[:, :k]
    found = fmt.restored(np.ascontiguousarray(codes), parts["scales"],
                         parts["row_exponents"].astype(np.int16))
    return replace(found, bias=parts.get("biases"))


class QuantisedExperts(Sequence[Expert]):
    """The experts of a layer in a file, read when they are asked for: what
    :meth:`moeaccel.host.Device.load_quantised` takes."""

    def __init__(self, fmt: WeightFormat, layer: LayerSummary,
                 tensors: dict[str, StoredTensor]) -> None:
        self._format = fmt
        self.summary = layer
        self._tensors = tensors

    def __len__(self) -> int:
        return self.summary.experts

    @overload
    def __getitem__(self, index: int) -> Expert: ...

    @overload
    def __getitem__(self, index: slice) -> list[Expert]: ...

    def __getitem__(self, index: int | slice) -> Expert | list[Expert]:
        if isinstance(index, slice):
            return [self[e] for e in range(len(self))[index]]
        expert = range(len(self))[index]
        layer = self.summary
        gate_up, down = (
            _matrix(self._format, k, {
                part: self._tensors[f"layers.{layer.index}.{name}.{part}"].array(expert)
                for part in parts})
            for (name, parts), k in zip(_shapes(self._format, layer).items(),
                                        (layer.d_model, layer.d_expert), strict=True))
        return Expert(gate_up, down, layer.activation, layer.limit)


class QuantisedFile:
    """A file of quantised experts, open; from :func:`open_quantised`. Use it in a ``with``
    statement, and load its layers within it.

    Parameters
    ----------
    path : :class:`Path`
    weight_format : :class:`WeightFormat`
    layers : dict of :class:`int` to :class:`QuantisedExperts`
    source : :class:`str`
        What it was made from.
    """

    def __init__(self, path: Path, file: BinaryIO, weight_format: WeightFormat,
                 layers: dict[int, QuantisedExperts], source: str) -> None:
        self.path = path
        self.weight_format = weight_format
        self.layers = layers
        self.source = source
        self._file = file

    def __enter__(self) -> QuantisedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_quantised(path: str | os.PathLike[str]) -> QuantisedFile:
    """Open a file that :func:`import_checkpoint` has written.

    Raises
    ------
    DamagedCheckpoint
        Naming the file, the tensor and the offset.
    ForeignCheckpoint
        If it is a file of another kind or version.
    """
    path = Path(path)
    file, tensors, metadata = read_safetensors(path)
    try:
        found = metadata.get("format"), metadata.get("version")
        if found[0] != FORMAT or found[1] not in _READ:
            raise ForeignCheckpoint(f"{path} must be a file of {FORMAT!r}, version "
                                    f"{' or '.join(_READ)}, not "
                                    f"{found[0]!r}, {found[1]}; write it with `moeaccel import`")
        try:
            fmt = find_format(metadata["weight_format"])
            summaries = [LayerSummary(**layer) for layer in json.loads(metadata["layers"])]
        except (KeyError, TypeError, ValueError, RecursionError, FormatError) as error:
            raise DamagedCheckpoint(f"metadata of {path} must have a weight_format and layers, "
                                    f"but: {error}") from error
        layers: dict[int, QuantisedExperts] = {}
        for layer in summaries:
            sizes = layer.index, layer.experts, layer.d_model, layer.d_expert
            if not all(type(size) is int and size >= (i > 0) for i, size in enumerate(sizes)):
                raise DamagedCheckpoint(f"layers in the metadata of {path} must have positive "
                                        f"dimensions, not {sizes}")
            _check_kind(path, layer)
            for matrix, parts in _shapes(fmt, layer).items():
                for part, (dtype, shape) in parts.items():
                    name = f"layers.{layer.index}.{matrix}.{part}"
                    if name not in tensors:
                        raise DamagedCheckpoint(f"tensor {name!r} must be in {path}, but is not")
                    tensor = tensors[name]
                    if (tensor.dtype, tensor.shape) != (dtype, tuple(shape)):
                        raise DamagedCheckpoint(f"{tensor} must be {dtype} {shape}")
            layers[layer.index] = QuantisedExperts(fmt, layer, tensors)
        return QuantisedFile(path, file, fmt, layers, str(metadata.get("source", "")))
    except BaseException:
        file.close()
        raise


def _check_kind(path: Path, layer: LayerSummary) -> None:
    """Make sure that a layer's activation, limit and biases are such."""
    try:
        find_activation(layer.activation)
        limit_bits(layer.limit)
    except (FormatError, TypeError, OverflowError) as error:
        raise DamagedCheckpoint(f"layer {layer.index} in the metadata of {path}: {error}"
                                ) from error
    biased = layer.gate_up_biased, layer.down_biased
    if not all(isinstance(flag, bool) for flag in biased):
        raise DamagedCheckpoint(f"layer {layer.index} in the metadata of {path} must have biases, "
                                f"true or false, not {biased}")


def import_checkpoint(
    checkpoint: Checkpoint, path: str | os.PathLike[str], weight_format: str = "int4_g32", *,
    layers: Iterable[int] | None = None, exact: bool = False, quantiser: str = "search",
    drop_biases: bool = False, progress: Progress | None = None,
) -> dict[int, Fit]:
    """Write the experts of a checkpoint in a device format, one after another, to a file.

    The file appears when it is whole.

    Parameters
    ----------
    checkpoint : :class:`Checkpoint`
    path : path
    weight_format, exact, quantiser, drop_biases
        As :meth:`Checkpoint.experts` has them.
    layers : iterable of :class:`int`, optional
        Which; all when left out.
    progress : callable, optional
        Called with (layer, experts written, experts in all).

    Returns
    -------
    dict of :class:`int` to :class:`Fit`

    Raises
    ------
    CheckpointError, FormatError
        See :meth:`Checkpoint.experts`.
    OutputError
        If the file cannot be written.
    """
    fmt = find_format(weight_format)
    chosen = [_known(checkpoint, index) for index in layers or checkpoint.layers]
    if not chosen:
        raise ForeignCheckpoint(f"{checkpoint.path} must have experts, but has none under a name "
                                "that is known; is it a dense model?")
    summaries = [_summary(checkpoint.layers[index], drop_biases) for index in chosen]
    offsets, total = _layout(fmt, summaries)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    fits: dict[int, Fit] = {}
    done, count = 0, sum(layer.experts for layer in summaries)
    try:
        with _naming(path), part.open("wb") as file:
            # The header says how all layers fitted, in as many bytes whatever that is.
            room = len(_header(fmt, summaries, offsets, checkpoint.path, {})) + 128 * len(summaries)
            room = -(-room // 8) * 8
            for layer in summaries:
                fits[layer.index] = Fit()
                experts = checkpoint.experts(layer.index, fmt, exact=exact, quantiser=quantiser,
                                             drop_biases=drop_biases)
                for e, (expert, fit) in enumerate(experts):
                    for matrix in ("gate_up", "down"):
                        for name, values in _parts(getattr(expert, matrix)).items():
                            begin, end, _, _ = offsets[f"layers.{layer.index}.{matrix}.{name}"]
                            size = (end - begin) // layer.experts
                            data = np.ascontiguousarray(values)
                            assert data.nbytes == size, (layer, matrix, name)
                            file.seek(8 + room + begin + e * size)
                            file.write(data.data)
                    fits[layer.index] += fit
                    done += 1
                    if progress is not None:
                        progress(layer.index, done, count)
            header = _header(fmt, summaries, offsets, checkpoint.path, fits)
            file.seek(0)
            file.write(room.to_bytes(8, "little") + header.ljust(room))
            file.truncate(8 + room + total)
        with _naming(path):
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return fits


def _summary(layer: ExpertLayer, drop_biases: bool) -> LayerSummary:
    """Return what a layer will be."""
    biased = {} if drop_biases else layer.biased
    return LayerSummary(
        layer.index, layer.num_experts, layer.d_model, layer.d_expert, layer.activation,
        layer.limit, gate_up_biased=biased.get("gate_up", False),
        down_biased=biased.get("down", False))


def _known(checkpoint: Checkpoint, index: int) -> int:
    if index not in checkpoint.layers:
        raise ForeignCheckpoint(f"layer must be one with experts of {checkpoint.path}, "
                                f"{', '.join(map(str, checkpoint.layers)) or 'none'}, not {index}")
    return index


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"output must go to a place that can be written, not {str(path)!r}: "
                          f"{error.strerror or error}") from error


def _layout(fmt: WeightFormat, layers: Sequence[LayerSummary]
            ) -> tuple[dict[str, tuple[int, int, str, list[int]]], int]:
    """Return (begin, end, type, shape) of each tensor, and the bytes of all."""
    found: dict[str, tuple[int, int, str, list[int]]] = {}
    offset = 0
    for layer in layers:
        for matrix, parts in _shapes(fmt, layer).items():
            for part, (dtype, shape) in parts.items():
                end = offset + _BYTES[dtype] * math.prod(shape)
                found[f"layers.{layer.index}.{matrix}.{part}"] = offset, end, dtype, shape
                offset = end
    return found, offset


def _header(fmt: WeightFormat, layers: Sequence[LayerSummary],
            offsets: dict[str, tuple[int, int, str, list[int]]], source: Path,
            fits: dict[int, Fit]) -> bytes:
    """Return the header of a file."""
    summaries = []
    for layer in layers:
        fit = fits.get(layer.index, Fit())
        summaries.append({
            "index": layer.index, "experts": layer.experts, "d_model": layer.d_model,
            "d_expert": layer.d_expert, "activation": layer.activation, "limit": layer.limit,
            "gate_up_biased": layer.gate_up_biased, "down_biased": layer.down_biased,
            "groups": fit.groups, "requantised": fit.requantised, "coarsened": fit.coarsened,
            "relative_error": fit.relative_error})
    metadata = {"format": FORMAT, "version": VERSION, "weight_format": fmt.name,
                "source": source.name, "layers": json.dumps(summaries)}
    tensors = {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
               for name, (begin, end, dtype, shape) in offsets.items()}
    return json.dumps({"__metadata__": metadata} | tensors).encode()
