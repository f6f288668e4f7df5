"""Weights as integers and scales, on their way from one format into another.

What a device format can hold is taken over as it is, group by group: integers that the format has,
a scale of at most its significand's bits, and, of each row, scales within the format's range. Where
only the scale has more bits, it is rounded to the significand's, and counted as coarsened. Other
groups are quantised again, and what comes of that is counted and measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import FormatError
from moeaccel.formats import (
    SIGNIFICAND_BITS,
    QuantisedMatrix,
    WeightFormat,
    Weights,
    check_dims,
    quantise,
    quantise_measured,
    weight_format,
    widened,
)
from moeaccel.formats.scales import fit_minima, fit_rows, minimum_exponents, split_scales
from moeaccel.grid import Squares
from moeaccel.host.importers.errors import CheckpointError, ForeignCheckpoint, InexactWeights

__all__ = ["Coded", "Converted", "Fit", "Matrix", "convert", "converted", "expert_rows",
           "expert_squares"]


@dataclass(frozen=True)
class Coded:
    """A matrix of ``n`` rows and K columns, ``integers * scales``, plus a minimum where it has one.

    Parameters
    ----------
    integers : int8 array, (n, K)
        Zero points taken off.
    scales : float array, (n, groups)
        Of any sign.
    group : :class:`int`
        Weights along K that share a scale; the last group of a row may be short.
    minimum : float array, (n, groups), optional
        Added to every weight of a group.
    order : integer array, (K,), optional
        Which of the matrix's columns each one here is, where they were sorted into groups.
    """

    integers: NDArray[np.int8]
    scales: NDArray[np.floating]
    group: int
    minimum: NDArray[np.floating] | None = None
    order: NDArray[np.integer] | None = None

    def __post_init__(self) -> None:
        shape = np.shape(self.integers)
        if len(shape) != 2 or 0 in shape or self.group < 1:
            raise ForeignCheckpoint(f"weights must be a matrix (n, K) and groups at least 1, not "
                                    f"{shape} and {self.group}")
        for name in ("scales", "minimum"):
            values = getattr(self, name)
            if values is None:
                continue
            expected = shape[0], -(-shape[1] // self.group)
            if np.shape(values) != expected:
                raise ForeignCheckpoint(
                    f"{name} must have the shape {expected} for weights {shape} in groups of "
                    f"{self.group}, not {np.shape(values)}")
            if not np.isfinite(values).all():
                row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
                raise ForeignCheckpoint(f"{name} must be finite, but row {row}, group {column} "
                                        f"holds {values[row, column]}")

    def floats(self) -> NDArray[np.float32]:
        """Return the weights, (n, K)."""
        n, k = self.integers.shape

        def each(values: NDArray[np.floating]) -> NDArray[np.float32]:
            if k % self.group:
                return np.repeat(values, self.group, axis=1)[:, :k].astype(np.float32)
            return values.astype(np.float32)[:, :, None]

        with np.errstate(over="ignore"):  # infinite weights are refused where they are quantised
            weights = self.integers.astype(np.float32)
            grouped = weights if k % self.group else weights.reshape(n, -1, self.group)
            grouped *= each(self.scales)
            if self.minimum is not None:
                grouped += each(self.minimum)
        if self.order is None:
            return weights
        sorted_back = np.empty_like(weights)
        sorted_back[:, self.order] = weights
        return sorted_back

    def __getitem__(self, rows: NDArray[np.integer] | slice) -> Coded:
        """Return some rows."""
        minimum = None if self.minimum is None else self.minimum[rows]
        return replace(self, integers=self.integers[rows], scales=self.scales[rows],
                       minimum=minimum)


_CHUNK_ELEMENTS = 1 << 17  # rows that are worked on at once stay in a core's cache

IMPORT_QUANTISERS = ("search", "amax")
"""Quantisers that need nothing but weights."""

Matrix = Coded | Weights
"""A matrix of a checkpoint: coded, or floats, (n, K), of which bfloat16 is uint16."""

Converted = tuple[QuantisedMatrix, "Fit", Squares]
"""A matrix in a device format, how it fitted, and sums of squares of the checkpoint's weights."""


@dataclass(frozen=True)
class Fit:
    """How weights fit a format; add them up with ``+``.

    Parameters
    ----------
    groups : :class:`int`
        Scales.
    requantised : :class:`int`
        Groups that were quantised, since the checkpoint has floats, or integers or a scale that the
        format has not.
    coarsened : :class:`int`
        Groups whose scale was changed to lie in its row's range.
    error, total : :class:`float`
        Sums of squares: of the differences to the checkpoint's weights, and of these.
    """

    groups: int = 0
    requantised: int = 0
    coarsened: int = 0
    error: float = 0.0
    total: float = 0.0

    @classmethod
    def of(cls, seen: Squares, groups: int, requantised: int, coarsened: int) -> Fit:
        """Return how weights fit of which these sums of squares are."""
        return cls(groups, requantised, coarsened, seen.error or 0.0, seen.total)

    def __add__(self, other: Fit) -> Fit:
        return Fit(self.groups + other.groups, self.requantised + other.requantised,
                   self.coarsened + other.coarsened, self.error + other.error,
                   self.total + other.total)

    @property
    def exact(self) -> bool:
        """Whether the device's weights are the checkpoint's."""
        return not self.requantised and not self.coarsened

    @property
    def relative_error(self) -> float:
        """Relative Frobenius error against the checkpoint's weights."""
        return float(np.sqrt(self.error / self.total)) if self.total else 0.0


def convert(matrix: Matrix, name: str | WeightFormat, *, exact: bool = False,
            quantiser: str = "search", what: str = "matrix") -> tuple[QuantisedMatrix, Fit]:
    """Bring a matrix into a device format.

    Parameters
    ----------
    matrix : :class:`Coded` or float32 array
    name : :class:`str`
        Of the format.
    exact : :class:`bool`
        Refuse what the format cannot hold as it is.
    quantiser : :class:`str`
        For the rest: ``"search"`` or ``"amax"``.
    what : :class:`str`
        For messages.

    Raises
    ------
    InexactWeights
        With ``exact``, naming the first group that does not fit, and why.
    FormatError
        If there is no such format or quantiser.
    """
    return converted(matrix, name, exact=exact, quantiser=quantiser, what=what)[:2]


def converted(matrix: Matrix, name: str | WeightFormat, *, exact: bool = False,
              quantiser: str = "search", what: str = "matrix") -> Converted:
    """Do what :func:`convert` does, and measure the weights, to float32's precision."""
    fmt = weight_format(name)
    if fmt.parts > 1:
        raise FormatError(f"weight_format of an import must have no pattern, not {fmt.name}; load "
                          "float weights with prune='magnitude' (Device.load_experts)")
    if quantiser not in IMPORT_QUANTISERS:
        raise FormatError(
            f"quantiser of an import must be {' or '.join(IMPORT_QUANTISERS)}, not {quantiser!r}; "
            "what needs activations takes float weights (Device.load_experts, calibration=)")
    if isinstance(matrix, Coded):
        if matrix.order is None:
            n, k = matrix.integers.shape
            step = max(1, _CHUNK_ELEMENTS // k)
            parts = [_recode(matrix[first : first + step], fmt, exact, quantiser, what, first)
                     for first in range(0, n, step)]
            each = [part[2] for part in parts]
            return (_stacked([part[0] for part in parts]), sum((part[1] for part in parts), Fit()),
                    Squares(np.concatenate([one.rows for one in each]),
                            np.sum([one.columns for one in each], axis=0),
                            sum(one.error or 0.0 for one in each)))
        matrix = matrix.floats()
    if exact:
        raise InexactWeights(f"{what} must be integers and scales, columns in their order, to "
                             f"become {fmt.name} exactly; leave exact out")
    check_dims(rows=matrix.shape[0], K=matrix.shape[1])
    with _finite(matrix, what):
        quantised, found = quantise_measured(matrix, fmt, quantiser) if fmt.scaled_alone else (
            quantise(widened(matrix), fmt, quantiser=quantiser), None)
    seen = _squares(quantised, widened(matrix)) if found is None else Squares(
        found.rows, found.columns, found.error)
    groups = quantised.shift.size
    return quantised, Fit.of(seen, groups, groups, quantised.coarsened), seen


@contextlib.contextmanager
def _finite(weights: Weights, what: str) -> Iterator[None]:
    """Say where weights are not finite, if that is why they cannot be quantised."""
    try:
        yield
    except FormatError:
        bad = np.argwhere(~np.isfinite(widened(weights)))
        if not len(bad):
            raise
        row, column = (int(i) for i in bad[0])
        raise CheckpointError(f"{what} must be finite, but row {row}, column {column} holds "
                              f"{widened(weights)[row, column]}") from None


def _stacked(parts: list[QuantisedMatrix]) -> QuantisedMatrix:
    """Return the matrix of which these are the rows."""
    if len(parts) == 1:
        return parts[0]
    return replace(parts[0], coarsened=sum(part.coarsened for part in parts), **{
        name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].parts})


def _grouped(values: NDArray[Any], group: int) -> NDArray[Any]:
    """Return the rows of a matrix in groups, (n, groups, group), zeros behind the last."""
    missing = -values.shape[1] % group
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return np.ascontiguousarray(values).reshape(len(values), -1, group)


def _recode(coded: Coded, fmt: WeightFormat, exact: bool, quantiser: str, what: str,
            first: int) -> Converted:
    """Bring some rows, from row ``first`` on, into a format."""
    n, k = coded.integers.shape
    grouped = _grouped(coded.integers, fmt.group)
    scales, one_scale = _regrouped(coded.scales, coded, fmt.group)
    minimum, one_minimum = (np.zeros_like(scales), one_scale) if coded.minimum is None else (
        _regrouped(coded.minimum, coded, fmt.group))
    flipped = scales < 0
    if flipped.any():
        scales = np.abs(scales)
        grouped = np.where(flipped[:, :, None], -grouped, grouped)  # int8 has no -(-128): not there
    there = _any(grouped) & (scales > 0)
    scales = np.where(there, scales, 0)
    significand, exponent = split_scales(fmt, scales)
    bits = (f"scales of at most {SIGNIFICAND_BITS} bits" if fmt.real_scale
            else "powers of two for scales")
    minima = (f"one minimum of at most {SIGNIFICAND_BITS} bits for each {fmt.group} weights"
              if fmt.minimum else "no minimum")
    reasons = {
        minima: one_minimum & _short(minimum) if fmt.minimum else np.full(
            there.shape, coded.minimum is None),
        f"integers that {fmt.name} has": _known(grouped, fmt),
        "integers of one zero point in a group": fmt.whole_groups(grouped),
        f"one scale for each {fmt.group} weights": one_scale,
        bits: np.ldexp(significand.astype(np.float64), exponent.astype(np.int32)) == scales}
    zeros = ~there & one_scale & reasons[minima]  # whatever integers or scale say
    fits = np.logical_and.reduce(list(reasons.values())) | zeros
    if exact and not fits.all():
        row, group = (int(i) for i in np.argwhere(~fits)[0])
        why = next(reason for reason, good in reasons.items() if not good[row, group])
        raise InexactWeights(
            f"{what} must have {why} to become {fmt.name} exactly, but row {first + row}, group "
            f"{group} has not; leave exact out, or take another weight_format")
    weights: NDArray[np.float32] | None = None
    rounded = np.zeros_like(fits)  # integers stay, the scale loses bits
    if fmt.real_scale and not fits.all():
        rounded = ~fits & np.logical_and.reduce(
            [good for reason, good in reasons.items() if reason != bits])
        fits = fits | rounded
        if rounded.any():
            weights = coded.floats()
    if not fits.all():
        weights = coded.floats() if weights is None else weights
        with _finite(weights, what):
            again = quantise(weights, fmt, quantiser=quantiser)
        if not fits.any():
            seen = _squares(again, weights)
            return again, Fit.of(seen, fits.size, fits.size, again.coarsened), seen
        scales = np.ldexp(again.significand.astype(np.float64),
                          again.shift.astype(np.int32) + again.row_exponent[:, None])
        split = split_scales(fmt, scales)
        significand = np.where(fits, significand, split[0])
        exponent = np.where(fits, exponent, split[1])
        if again.minimum is not None:
            minimum = np.where(fits, minimum, np.ldexp(
                again.minimum.astype(np.float64), again.row_exponent[:, None].astype(np.int32)))
    stored, shift, row_exponent, coarsened = fit_rows(
        fmt, significand, exponent, minimum_exponents(minimum) if fmt.minimum else None)
    fitted = None
    if fmt.minimum:
        fitted, rough = fit_minima(minimum, row_exponent)
        minimum = np.ldexp(fitted.astype(np.float64), row_exponent[:, None].astype(np.int32))
        coarsened = coarsened | rough
    if exact and coarsened.any():
        row, group = (int(i) for i in np.argwhere(coarsened)[0])
        raise InexactWeights(
            f"{what} must have scales{' and minima' * fmt.minimum} of each row within "
            f"{fmt.max_shift} powers of two, and in the significand's bits below, to become "
            f"{fmt.name} exactly, but row {first + row}, group {group} has not; leave exact out")
    integers = np.where(there[:, :, None], grouped, np.int8(fmt.filler))
    anew = ~fits | coarsened
    coarsened = coarsened | rounded
    if anew.any():
        weights = coded.floats() if weights is None else weights
        rows, columns = np.nonzero(anew)
        scale = np.ldexp(stored[anew].astype(np.float64),
                         shift[anew].astype(np.int32) + row_exponent[rows])
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        part = _grouped(weights, fmt.group)[rows, columns].astype(np.float64)
        part -= minimum[anew][:, None]
        integers[rows, columns] = fmt.nearest_groups(part * inverse[:, None])
    quantised = QuantisedMatrix(
        fmt, np.ascontiguousarray(integers.reshape(n, -1)[:, :k]), stored, shift, row_exponent,
        int(coarsened.sum()), minimum=fitted)
    if weights is None and fmt.minimum:
        weights = coded.floats()
    seen = _squares(quantised, weights)
    return quantised, Fit.of(seen, fits.size, int((~fits).sum()), int(coarsened.sum())), seen


def _short(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which numbers have no more bits than a significand."""
    scaled = np.ldexp(np.frexp(values)[0], SIGNIFICAND_BITS)
    return scaled == np.rint(scaled)


def _known(integers: NDArray[np.int8], fmt: WeightFormat) -> NDArray[np.bool_]:
    """Return which groups hold nothing but integers of a format."""
    if len(fmt.known) == fmt.high - fmt.low + 1 and (
            fmt.low <= integers.min() and integers.max() <= fmt.high):
        return np.ones(integers.shape[:2], bool)
    unknown = np.ones(256, np.int8)
    unknown[fmt.known] = 0
    return ~_any(unknown[integers.view(np.uint8)])


def _any(integers: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Return which groups hold something else than zeros, eight of them at a time."""
    return np.bitwise_or.reduce(integers.view(np.uint64), axis=2) != 0


def _regrouped(values: NDArray[np.floating], coded: Coded, group: int
               ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the scales, or minima, of groups of another size, (n, groups), and which groups have
    one."""
    n, k = coded.integers.shape
    groups = -(-k // group)
    scales = values.astype(np.float64)
    if scales.shape[1] == 1:
        return np.repeat(scales, groups, axis=1), np.ones((n, groups), bool)
    if coded.group % group == 0:
        scales = np.repeat(scales, coded.group // group, axis=1)[:, :groups]
        return scales, np.ones((n, groups), bool)
    # Several scales of the checkpoint, at least in part, lie in one group here.
    each = np.repeat(scales, coded.group, axis=1)[:, :k]
    each = np.pad(each, ((0, 0), (0, groups * group - k)), mode="edge").reshape(n, groups, group)
    return each[:, :, 0], (each == each[:, :, :1]).all(axis=2)


def _squares(matrix: QuantisedMatrix, weights: NDArray[np.float32] | None) -> Squares:
    """Return the sums of squares of weights, those of the matrix itself where there are no others,
    and of the error."""
    n, k = matrix.integers.shape
    group = matrix.format.group
    rows, columns, error = np.empty(n), np.zeros(k), 0.0
    step = max(1, (1 << 17) // k)
    terms = [np.ldexp(part, matrix.row_exponent[:, None].astype(np.int32))
             for part in matrix.group_terms() if part is not None]
    # In units of about the largest weight, whose square float32 may not have.
    largest = (max(float(weights.max()), -float(weights.min())) if weights is not None
               else matrix.format.max_integer * float(terms[0].max()))
    unit = np.ldexp(1.0, int(np.frexp(largest)[1]))
    terms = [(part / unit).astype(np.float32) for part in terms]
    for first in range(0, n, step):
        part = slice(first, first + step)
        found = matrix.integers[part].astype(np.float32)
        for change, term in zip((np.multiply, np.add), terms, strict=False):
            each = np.repeat(term[part], group, axis=1)[:, :k] if k % group else term[part, :, None]
            grouped = found if k % group else found.reshape(len(found), -1, group)
            change(grouped, each, out=grouped)
        if weights is None:
            exact = found
        else:
            exact = weights[part] * np.float32(1 / unit) if 2**-126 < unit < 2**126 else (
                weights[part] / unit).astype(np.float32)
            found -= exact
            error += float(np.vdot(found, found))
        exact = exact * exact
        rows[part] = exact.sum(axis=1)
        columns += exact.sum(axis=0)
    return Squares(rows * unit**2, columns * unit**2, error * unit**2)


def expert_squares(gate: Squares, up: Squares) -> Squares:
    """Return the sums of squares of gate and up whose rows alternate."""
    return Squares(np.stack([gate.rows, up.rows], axis=1).reshape(-1), gate.columns + up.columns,
                   (gate.error or 0.0) + (up.error or 0.0))


def expert_rows(gate: QuantisedMatrix, up: QuantisedMatrix) -> QuantisedMatrix:
    """Return gate and up as an expert has them: their rows alternate, g0, u0, g1, u1, ...

    Raises
    ------
    ForeignCheckpoint
        If they differ in format or shape.
    """
    if gate.format != up.format or gate.integers.shape != up.integers.shape:
        raise ForeignCheckpoint(
            f"gate and up must have one format and shape, not {gate.format.name} "
            f"{gate.integers.shape} and {up.format.name} {up.integers.shape}")

    def rows(name: str) -> NDArray[np.integer]:
        a, b = getattr(gate, name), getattr(up, name)
        return np.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])

    return replace(gate, coarsened=gate.coarsened + up.coarsened, **{
        name: rows(name) for name in gate.parts})
