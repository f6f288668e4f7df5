"""Quantised experts in a file: imported once, and put into device memory as they lie there.

A safetensors file. Its metadata says ``format`` (``moeaccel-experts``), ``version`` (``3``; ``1``
and ``2`` had matrices instead of images), ``weight_format``, ``array`` (a JSON object: ``config``
for which the images were made, its ``row_multipliers`` and ``channels``, on which alone they
depend, and the version of images, ``image``), ``layers`` (a JSON list, one object a layer with
``index``, ``experts``, ``d_model``, ``d_expert``, ``activation``, ``limit``, which matrices have
biases: ``gate_up_biased``, ``down_biased``, and how it fitted: ``groups``, ``requantised``,
``coarsened``, ``relative_error``) and ``source``. Each layer has these tensors:

``layers.<index>.images``
    uint8, (E, channels, bytes): the image of each expert (:mod:`moeaccel.image`), or each channel's
    part of it. The first begins at a multiple of 4,096 bytes in the file, all at multiples of 64.
``layers.<index>.coarsened``
    int64, (E,): scales that were changed to lie in their row's range.
``layers.<index>.<matrix>.rows``, ``.columns``, ``.error``
    float64, (E, n), (E, K), (E,), of the matrices ``gate_up``, (E, 2 I, H) with rows g0, u0, g1,
    u1, ..., and ``down``, (E, H, I): sums of squares of the checkpoint's weights, from which the
    output grid is chosen (:mod:`moeaccel.grid`), and of what quantising changed.
``layers.<index>.<matrix>.biases``
    uint16, (E, n), where the matrix has some: bfloat16, as the image has them, too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import activation as find_activation
from moeaccel.arithmetic import from_bfloat16
from moeaccel.closing import Closing
from moeaccel.config import PRESETS, AcceleratorConfig, preset
from moeaccel.errors import FormatError, ImageError, OutputError
from moeaccel.files import whole_file
from moeaccel.formats import WeightFormat, weight_format as find_format, whole_blocks
from moeaccel.grid import Squares
from moeaccel.host.errors import InvalidOption
from moeaccel.host.importers.checkpoint import (
    IMPORTED,
    Checkpoint,
    ExpertLayer,
    ImportedExpert,
    in_order,
)
from moeaccel.host.importers.coded import Fit
from moeaccel.host.importers.errors import DamagedCheckpoint, ForeignCheckpoint
from moeaccel.host.importers.files import StoredTensor, read_safetensors
from moeaccel.host.stored import StoredExperts
from moeaccel.host.transports.base import Bytes
from moeaccel.image import (
    ALIGNMENT,
    IMAGE_VERSION,
    Expert,
    ExpertShape,
    build_image,
    check_image,
    limit_bits,
    unpack_image,
)

__all__ = ["Array", "LayerSummary", "QuantisedExperts", "QuantisedFile", "import_checkpoint",
           "is_quantised", "open_quantised"]

FORMAT = IMPORTED
VERSION = "3"

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


@dataclass(frozen=True)
class Array:
    """What the images of a file were made for.

    Parameters
    ----------
    config : :class:`str`
        Name of a configuration, for messages.
    row_multipliers, channels : :class:`int`
        Of its arrays.
    image : :class:`int`
        Version of the images.
    """

    config: str
    row_multipliers: int
    channels: int
    image: int = IMAGE_VERSION


def _expert_shape(fmt: WeightFormat, array: Array, layer: LayerSummary) -> ExpertShape:
    """Return the shape of a layer's experts."""
    return ExpertShape(fmt, layer.d_model, layer.d_expert, array.row_multipliers, array.channels,
                       activation=layer.activation, limit=layer.limit,
                       gate_up_biased=layer.gate_up_biased, down_biased=layer.down_biased)


_Tensors = dict[str, tuple[str, list[int]]]
"""(type, shape) of each tensor."""


def _tensors(fmt: WeightFormat, array: Array, layer: LayerSummary) -> _Tensors:
    """Return what a file has of a layer."""
    e, stem = layer.experts, f"layers.{layer.index}"
    size = _expert_shape(fmt, array, layer).image_bytes
    found: _Tensors = {f"{stem}.images": ("U8", [e, array.channels, size]),
                       f"{stem}.coarsened": ("I64", [e])}
    for matrix, n, k in (("gate_up", 2 * layer.d_expert, layer.d_model),
                         ("down", layer.d_model, layer.d_expert)):
        found |= {f"{stem}.{matrix}.{name}": ("F64", [e, *rest]) for name, rest in (
            ("rows", [n]), ("columns", [k]), ("error", []))}
    for matrix, n in (("gate_up", 2 * layer.d_expert), ("down", layer.d_model)):
        if getattr(layer, f"{matrix}_biased"):
            found[f"{stem}.{matrix}.biases"] = "U16", [e, n]
    return found


_BYTES = {"U8": 1, "U16": 2, "I64": 8, "F64": 8}


def _entries(stem: str, made: ImportedExpert, array: Array) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the names of a layer's tensors, and what they have of an expert."""
    expert = made.expert
    parts = [build_image(expert.gate_up, expert.down, array.row_multipliers, channel=channel,
                         channels=array.channels) for channel in range(array.channels)]
    yield f"{stem}.images", parts[0] if len(parts) == 1 else np.concatenate(parts)
    yield f"{stem}.coarsened", np.array(
        [expert.gate_up.coarsened + expert.down.coarsened], np.int64)
    for name, matrix in (("gate_up", expert.gate_up), ("down", expert.down)):
        found = made.squares[name]
        yield f"{stem}.{name}.rows", found.rows
        yield f"{stem}.{name}.columns", found.columns
        yield f"{stem}.{name}.error", np.array([found.error or 0.0])
        if matrix.bias is not None:
            yield f"{stem}.{name}.biases", matrix.bias


class QuantisedExperts(StoredExperts):
    """The experts of a layer in a file: what :meth:`moeaccel.host.Device.load_quantised` takes.

    Images are mapped into memory, and read when they are asked for; as a sequence of
    :class:`Expert` they are decoded.
    """

    def __init__(self, path: Path, fmt: WeightFormat, array: Array, layer: LayerSummary,
                 tensors: Mapping[str, StoredTensor]) -> None:
        self._path = path
        self._shape = _expert_shape(fmt, array, layer)
        self._array = array
        self.summary = layer
        self._stored = {name: tensors[name] for name in _tensors(fmt, array, layer)}
        self._stem = f"layers.{layer.index}"
        self._images: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return self.summary.experts

    @overload
    def __getitem__(self, index: int) -> Expert: ...

    @overload
    def __getitem__(self, index: slice) -> list[Expert]: ...

    def __getitem__(self, index: int | slice) -> Expert | list[Expert]:
        if isinstance(index, slice):
            return [self[e] for e in range(len(self))[index]]
        layer = self.summary
        found = unpack_image(*self.parts(range(len(self))[index]))
        rows = (2 * layer.d_expert, layer.d_model), (layer.d_model, layer.d_expert)
        gate_up, down = (matrix.cut(*shape) for matrix, shape in
                         zip((found.gate_up, found.down), rows, strict=True))
        return Expert(gate_up, down, layer.activation, layer.limit)

    def shape(self) -> ExpertShape:
        return self._shape

    def made_for(self) -> str:
        array = self._array
        return (f"images of layer {self.summary.index} of {self._path} are for config "
                f"{array.config!r}, {array.row_multipliers} row multipliers and {array.channels} "
                "channels")

    def parts(self, index: int) -> list[Bytes]:
        tensor = self._stored[f"{self._stem}.images"]
        if self._images is None:
            self._images = tensor.mapped()
        parts = list(self._images[index])
        wanted = replace(self._shape, activation="silu", limit=None)  # the table has those
        wanted = replace(wanted, d_model=whole_blocks(wanted.d_model),
                         d_expert=whole_blocks(wanted.d_expert))
        for channel, part in enumerate(parts):
            try:
                found = check_image(part, channel=channel)
                if found != wanted:
                    raise ImageError(f"image must be one of {wanted}, not of {found}")
            except ImageError as error:
                where = tensor.offset + (index * len(parts) + channel) * part.size
                raise DamagedCheckpoint(f"image of expert {index} of layer {self.summary.index} at "
                                        f"byte {where} of {self._path}: {error}") from error
        return parts

    def measured(self, index: int) -> tuple[dict[str, Squares], int]:
        def read(name: str) -> NDArray[Any]:
            return self._stored[f"{self._stem}.{name}"].array(index)

        found = {}
        for name in ("gate_up", "down"):
            rows, columns, error = (read(f"{name}.{part}") for part in ("rows", "columns", "error"))
            bias = None
            if getattr(self.summary, f"{name}_biased"):
                bias = from_bfloat16(read(f"{name}.biases")).astype(np.float64) ** 2
            if not all((part >= 0).all() and np.isfinite(part).all()
                       for part in (rows, columns, error, *(() if bias is None else (bias,)))):
                raise DamagedCheckpoint(
                    f"sums of squares of {name} of expert {index} of layer {self.summary.index} of "
                    f"{self._path} must be finite and at least 0; the file is damaged")
            found[name] = Squares(rows, columns, float(error), bias)
        return found, int(read("coarsened"))


class QuantisedFile(Closing):
    """A file of quantised experts, open; from :func:`open_quantised`. Use it in a ``with``
    statement, and load its layers within it.

    Parameters
    ----------
    path : :class:`Path`
    weight_format : :class:`WeightFormat`
    array : :class:`Array`
        What its images were made for.
    layers : dict of :class:`int` to :class:`QuantisedExperts`
    source : :class:`str`
        What it was made from.
    """

    def __init__(self, path: Path, file: BinaryIO, weight_format: WeightFormat, array: Array,
                 layers: dict[int, QuantisedExperts], source: str) -> None:
        self.path = path
        self.weight_format = weight_format
        self.array = array
        self.layers = layers
        self.source = source
        self._file = file

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def is_quantised(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is one of quantised experts, of any version, whole or not."""
    try:
        file, _, metadata = read_safetensors(Path(path))
    except DamagedCheckpoint:
        return False
    file.close()
    return metadata.get("format") == FORMAT


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
        if found != (FORMAT, VERSION):
            raise ForeignCheckpoint(f"{path} must be a file of {FORMAT!r}, version {VERSION}, not "
                                    f"{found[0]!r}, {found[1]}; write it with `moeaccel import`")
        try:
            fmt = find_format(metadata["weight_format"])
            array = Array(**json.loads(metadata["array"]))
            summaries = [LayerSummary(**layer) for layer in json.loads(metadata["layers"])]
        except (KeyError, TypeError, ValueError, RecursionError, FormatError) as error:
            raise DamagedCheckpoint(f"metadata of {path} must have a weight_format, an array and "
                                    f"layers, but: {error}") from error
        _check_array(path, array)
        layers: dict[int, QuantisedExperts] = {}
        for layer in summaries:
            sizes = layer.index, layer.experts, layer.d_model, layer.d_expert
            if not all(type(size) is int and size >= (i > 0) for i, size in enumerate(sizes)):
                raise DamagedCheckpoint(f"layers in the metadata of {path} must have positive "
                                        f"dimensions, not {sizes}")
            _check_kind(path, layer)
            for name, (dtype, shape) in _tensors(fmt, array, layer).items():
                if name not in tensors:
                    raise DamagedCheckpoint(f"tensor {name!r} must be in {path}, but is not")
                tensor = tensors[name]
                if (tensor.dtype, tensor.shape) != (dtype, tuple(shape)):
                    raise DamagedCheckpoint(f"{tensor} must be {dtype} {shape}")
            layers[layer.index] = QuantisedExperts(path, fmt, array, layer, tensors)
        return QuantisedFile(path, file, fmt, array, layers, str(metadata.get("source", "")))
    except BaseException:
        file.close()
        raise


def _check_array(path: Path, array: Array) -> None:
    """Make sure that images are such that this package can read, of arrays that may be."""
    if array.image != IMAGE_VERSION:
        raise ForeignCheckpoint(f"images of {path} must be of version {IMAGE_VERSION}, not "
                                f"{array.image!r}; write it again with `moeaccel import`")
    if (type(array.row_multipliers) is not int or not 0 < array.row_multipliers < 256
            or array.channels not in (1, 2, 4, 8, 16, 32) or not isinstance(array.config, str)):
        raise DamagedCheckpoint(
            f"array in the metadata of {path} must have row_multipliers from 1 to 255 and "
            f"channels, a power of two up to 32, not {array}")


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
    config: str | AcceleratorConfig = "small", layers: Iterable[int] | None = None,
    exact: bool = False, quantiser: str = "search", drop_biases: bool = False,
    progress: Progress | None = None, threads: int | None = None,
) -> dict[int, Fit]:
    """Write the images of a checkpoint's experts in a device format to a file.

    The file appears when it is whole.

    Parameters
    ----------
    checkpoint : :class:`Checkpoint`
    path : path
    weight_format, exact, quantiser, drop_biases
        As :meth:`Checkpoint.experts` has them.
    config : :class:`str`
        Configuration whose arrays the images are for: its row multipliers and channels. Devices of
        others can load the file, but encode it again each time.
    layers : iterable of :class:`int`, optional
        Which; all when left out.
    progress : callable, optional
        Called with (layer, experts written, experts in all).
    threads : :class:`int`, optional
        Experts that are worked on at once, and kept in memory; as many as CPUs, at most 8.

    Returns
    -------
    dict of :class:`int` to :class:`Fit`

    Raises
    ------
    CheckpointError, FormatError
        See :meth:`Checkpoint.experts`; and for a format that `config` has not.
    InvalidOption
        If ``layers`` is empty.
    OutputError
        If the file cannot be written, or is one of the checkpoint's own.
    """
    fmt, made_for = find_format(weight_format), preset(config)
    _check_format(fmt, made_for)
    array = Array(made_for.name, made_for.row_multipliers, made_for.channels)
    if threads is None:
        threads = min(os.cpu_count() or 1, 8)
    elif not isinstance(threads, int) or threads < 1:
        raise InvalidOption(f"threads must be at least 1, not {threads!r}")
    named = None if layers is None else tuple(layers)
    if named == ():
        raise InvalidOption("layers must name one at least, not (); leave it out to take all")
    chosen = [_known(checkpoint, index)
              for index in dict.fromkeys(checkpoint.layers if named is None else named)]
    if not chosen:
        raise ForeignCheckpoint(f"{checkpoint.path} must have experts, but has none under a name "
                                "that is known; is it a dense model?")
    summaries = [_summary(checkpoint.layers[index], drop_biases) for index in chosen]
    offsets, total = _layout(fmt, array, summaries)
    path = Path(path)
    with _naming(path):
        _check_no_source(checkpoint, path)
    fits = {layer.index: Fit() for layer in summaries}
    jobs = [(layer, e) for layer in summaries for e in range(layer.experts)]
    with _naming(path), whole_file(path) as part, part.open("wb", buffering=0) as file:
        # The header says how all layers fitted, in as many bytes whatever that is.
        room = len(_header(fmt, array, summaries, offsets, checkpoint.path, {}))
        start = -(-(8 + room + 128 * len(summaries)) // ALIGNMENT) * ALIGNMENT

        def write(job: tuple[LayerSummary, int]) -> tuple[int, Fit]:
            layer, e = job
            made = checkpoint.expert(layer.index, e, fmt, exact=exact, quantiser=quantiser,
                                     drop_biases=drop_biases)
            for name, values in _entries(f"layers.{layer.index}", made, array):
                begin, end, _, _ = offsets[name]
                size = (end - begin) // layer.experts
                assert values.nbytes == size, (job, name)
                _write_at(file, start + begin + e * size, values)
            return layer.index, made.fit

        for done, (index, fit) in enumerate(in_order(write, jobs, threads), 1):
            fits[index] += fit
            if progress is not None:
                progress(index, done, len(jobs))
        header = _header(fmt, array, summaries, offsets, checkpoint.path, fits)
        os.truncate(file.fileno(), start + total)
        _write_at(file, 0, np.frombuffer(
            (start - 8).to_bytes(8, "little") + header.ljust(start - 8), np.uint8))
    return fits


def _check_format(fmt: WeightFormat, config: AcceleratorConfig) -> None:
    """Refuse a format that no device of the configuration loads, before the work and not after."""
    if fmt in config.weight_formats:
        return
    able = [one.name for one in PRESETS.values() if fmt in one.weight_formats]
    raise FormatError(
        f"weight_format must be one of {', '.join(config.formats)} in config {config.name!r}, not "
        f"{fmt.name!r}; " + (f"presets that can: {', '.join(able)}: choose one with config= or "
                             "--config" if able else "no preset can, give a configuration that "
                             "names it in formats"))


def _write_at(file: BinaryIO, offset: int, values: NDArray[Any]) -> None:
    """Write an array's bytes at an offset; may be called by several threads."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    done = 0
    while done < data.size:
        done += os.pwrite(file.fileno(), data[done:].data, offset + done)


def _check_no_source(checkpoint: Checkpoint, path: Path) -> None:
    """Make sure that the file written is none of those that are read."""
    if not path.exists():
        return
    there = path.stat()
    for source in {tensor.file for tensor in checkpoint.contents.tensors.values()}:
        if os.path.samestat(os.fstat(source.fileno()), there):
            raise OutputError(f"output must be another file than the checkpoint's own, not "
                              f"{str(path)!r}, which it would replace; name a new file")


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


_Layout = dict[str, tuple[int, int, str, list[int]]]
"""(begin, end, type, shape) of each tensor."""


def _layout(fmt: WeightFormat, array: Array, layers: Sequence[LayerSummary]
            ) -> tuple[_Layout, int]:
    """Return where each tensor lies, images first, and the bytes of all."""
    each = {name: entry for layer in layers
            for name, entry in _tensors(fmt, array, layer).items()}
    found: _Layout = {}
    offset = 0
    for name in sorted(each, key=lambda name: -_RANKS[name.rsplit(".", 1)[1]]):
        dtype, shape = each[name]
        end = offset + _BYTES[dtype] * math.prod(shape)
        found[name] = offset, end, dtype, shape
        offset = end
    return found, offset


_RANKS = {"images": 2, "coarsened": 1, "rows": 1, "columns": 1, "error": 1, "biases": 0}
"""What lies first: whole blocks, then words of 8 bytes, then shorter ones."""


def _header(fmt: WeightFormat, array: Array, layers: Sequence[LayerSummary], offsets: _Layout,
            source: Path, fits: dict[int, Fit]) -> bytes:
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
                "array": json.dumps(asdict(array)),
                "source": source.name, "layers": json.dumps(summaries)}
    tensors = {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
               for name, (begin, end, dtype, shape) in offsets.items()}
    return json.dumps({"__metadata__": metadata} | tensors).encode()
