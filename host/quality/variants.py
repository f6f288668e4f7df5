"""What is measured: formats, activation bits, quantisers, patterns, mixed bits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moeaccel.formats import ALL_FORMATS, FORMATS, QUANTISERS, weight_format
from moeaccel.host.compress.moe_pruner import CRITERIA
from moeaccel.host.errors import InvalidOption

__all__ = ["Variant", "every_variant", "variants_of"]

_ACTIVATION_BITS = (16, 8)
FLOAT_BITS = 32


@dataclass(frozen=True)
class Variant:
    """One way of storing and running the experts of a model.

    Parameters
    ----------
    weight_format : :class:`str`
        ``int4_g32``; ``int4_g32+2:4`` for 2 of 4 weights; ``mixed:5.5`` for so many stored bits a
        weight on average, each expert in one of
        :data:`moeaccel.host.compress.mc_moe.FORMATS`.
    activation_bits : :class:`int`
        8 or 16; or 32, which no device has: x and h stay float, to see what weights alone cost.
    quantiser : :class:`str`
        See :func:`moeaccel.formats.quantise`.
    calibrated : :class:`bool`
        Whether quantising looks at activations.
    criterion : :class:`str`, optional
        By which weights are pruned; a pattern must have one.

    Raises
    ------
    FormatError, InvalidOption
        If there is nothing of that name.
    """

    weight_format: str
    activation_bits: int = 16
    quantiser: str = "search"
    calibrated: bool = False
    criterion: str | None = None

    def __post_init__(self) -> None:
        if self.bits is None:
            weight_format(self.base)
        if self.activation_bits not in (*_ACTIVATION_BITS, FLOAT_BITS):
            raise InvalidOption("activation_bits must be 8 or 16, or 32 for float, not "
                                f"{self.activation_bits!r}")
        if self.quantiser not in QUANTISERS:
            raise InvalidOption(f"quantiser must be one of {', '.join(QUANTISERS)}, not "
                                f"{self.quantiser!r}")
        if (self.pattern is None) != (self.criterion is None):
            raise InvalidOption(f"criterion must be given with a pattern, and only then, not "
                                f"{self.criterion!r} for {self.weight_format}")
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise InvalidOption(f"criterion must be one of {', '.join(CRITERIA)}, not "
                                f"{self.criterion!r}")

    @property
    def base(self) -> str:
        """The format without the pattern."""
        return self.weight_format.partition("+")[0]

    @property
    def stored(self) -> str:
        """The format in which the device has the weights: without the pattern where no format has
        that, so that zeros are stored."""
        return self.weight_format if self.weight_format in ALL_FORMATS else self.base

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M."""
        _, plus, text = self.weight_format.partition("+")
        if not plus:
            return None
        found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
        if found is None or not 1 <= int(found[1]) < int(found[2]):
            raise InvalidOption("weight_format must end in +N:M with 1 <= N < M, as int4_g32+2:4, "
                                f"not {self.weight_format!r}")
        return int(found[1]), int(found[2])

    @property
    def bits(self) -> float | None:
        """Mean bits of mixed ones."""
        if not self.weight_format.startswith("mixed:"):
            return None
        try:
            bits = float(self.weight_format.removeprefix("mixed:"))
        except ValueError:
            bits = 0.0
        if not 0 < bits <= 64:
            raise InvalidOption("weight_format must be mixed:BITS, as mixed:5.5, not "
                                f"{self.weight_format!r}")
        return bits

    @property
    def planes(self) -> int:
        """Planes of x and h; 0: they stay float."""
        return 0 if self.activation_bits == FLOAT_BITS else self.activation_bits // 8

    @property
    def weights(self) -> Variant:
        """What its weights are: variants of which this is equal have the same ones."""
        return Variant(self.weight_format, 16, self.quantiser, self.calibrated, self.criterion)

    @property
    def label(self) -> str:
        """For tables."""
        how = [self.criterion] if self.criterion else []
        if self.quantiser != QUANTISERS[0]:
            how.append(self.quantiser)
        elif self.calibrated:
            how.append("calibrated")
        return " ".join([self.weight_format, f"a{self.activation_bits}", *how])


def variants_of(formats: Iterable[str], activation_bits: Iterable[int],
                quantiser: str | None = None, calibrated: bool = False) -> list[Variant]:
    """Return formats with all activation bits; with a pattern, with all criteria."""
    found = []
    for name in formats:
        criteria: tuple[str | None, ...] = CRITERIA if "+" in name else (None,)
        for criterion in criteria:
            found += [Variant(name, bits, quantiser or QUANTISERS[0],
                              calibrated or quantiser == "gptq", criterion)
                      for bits in activation_bits]
    return found


def every_variant() -> list[Variant]:
    """Return what ``moeaccel bench quality`` measures when it is not told what."""
    found = variants_of(FORMATS, _ACTIVATION_BITS)
    found += variants_of([name for name, fmt in ALL_FORMATS.items()
                          if name not in FORMATS and fmt.parts == 1], (16,))
    for base in ("int4_g32", "int4_g128"):
        found += [Variant(base, 16, "search", calibrated=True), Variant(base, 16, "gptq", True)]
    for base in ("mxint8", "int4_g32"):
        for pattern in ("2:4", "1:4"):
            found += variants_of([f"{base}+{pattern}"], (16,))
    found += [Variant(f"mixed:{bits}", 16, "search", calibrated=True) for bits in (4.5, 5.5, 6.5)]
    return list(dict.fromkeys(found))
