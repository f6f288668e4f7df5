"""Weight formats, activations and configurations, from their registries; the words of sections."""

from __future__ import annotations

from moeaccel.activations import ACTIVATIONS, Factor
from moeaccel.config import PRESETS
from moeaccel.docs.markdown import table
from moeaccel.formats import ALL_FORMATS, BLOCK, WeightFormat
from moeaccel.image import Section

__all__ = ["activations", "configurations", "formats", "section_words"]

_ROWS, _K, _ROW_MULTIPLIERS = 64, 256, 2  # of the example

_FACTORS = {Factor.TABLE: "table of linear segments", Factor.STEP: "1 where g is positive, else 0",
            Factor.RAMP: "g where it is positive, else 0"}


def _integers(fmt: WeightFormat) -> str:
    if fmt.table is None or fmt.zero_point or fmt.minimum:
        return f"{fmt.low} to {fmt.high}"
    return ", ".join(str(i) for i in sorted({abs(i) for i in fmt.table})) + ", either sign"


def _scale(fmt: WeightFormat) -> str:
    return ("11 bits and a shift, zero point" if fmt.zero_point
            else "11 bits and a shift, minimum" if fmt.minimum
            else "11 bits and a shift" if fmt.real_scale else "power of two")


def formats() -> list[str]:
    """Return the formats with all their attributes."""
    return table(
        ("code", "format", "bits a weight, with scales", "integers", "group", "scale",
         "largest shift"), [
            (str(f.code), f"`{f.name}`", f"{f.bits_per_weight():g}", _integers(f), str(f.group),
             _scale(f), str(f.max_shift))
            for f in ALL_FORMATS.values()])


def activations() -> list[str]:
    """Return the activations."""
    return table(("code", "activation", "g * f(g)", "f"), [
        (str(a.code), f"`{a.name}`", a.text, _FACTORS[a.factor]) for a in ACTIVATIONS.values()])


def configurations() -> list[str]:
    """Return the presets with what is most asked for."""
    return table(
        ("preset", "channels x bits", "multipliers", "tokens of a pass, `a8`", "largest dimension",
         "experts", "tokens and pairs of a command"), [
            (f"`{c.name}`", f"{c.channels} x {8 * c.port_bytes}", f"{c.multipliers:,}",
             str(c.max_slots), f"{c.max_dim:,}", f"{c.max_experts:,}",
             f"{c.max_tokens:,} and {c.max_assignments:,}")
            for c in PRESETS.values()])


def section_words() -> list[str]:
    """Return how many words of each kind an example has, in every format."""
    def row(fmt: WeightFormat) -> tuple[str, ...]:
        section = Section(fmt, _ROWS, _K, _ROW_MULTIPLIERS)
        return (f"`{fmt.name}`", *map(str, (
            section.tile_rows, section.tiles, section.row_words, section.scale_words,
            section.tiles * section.weight_words, section.pattern_words, section.words)))

    example = (f"A section of {_ROWS} rows and {_K} columns, {_ROW_MULTIPLIERS} row multipliers, "
               f"one channel; words of {BLOCK * _ROW_MULTIPLIERS} bytes:")
    return [example, "", *table(
        ("format", "R", "tiles", "row words", "scale words", "weight words", "pattern words",
         "words"),
        [row(fmt) for fmt in ALL_FORMATS.values()])]
