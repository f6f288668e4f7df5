"""What a device would refuse, refused before anything is sent: the limits are those of the fields
(:mod:`moeaccel.interface.commands`), and so are the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from moeaccel.activations import ACTIVATIONS
from moeaccel.config import PRESETS, AcceleratorConfig
from moeaccel.errors import FormatError
from moeaccel.formats import ALL_FORMATS
from moeaccel.host.errors import InvalidTensor, LimitExceeded
from moeaccel.image import ExpertShape, LinearShape, table_entry
from moeaccel.interface.commands import EXPERT, LAYER, Field, Limit, bad_field

__all__ = ["check_layer"]

_NAMES = {"format0": "weight_format", "format1": "weight_format of down",
          "num_experts": "number of experts"}
_OPTIONS = {(ExpertShape, "bias0"): "gate_up_bias", (ExpertShape, "bias1"): "down_bias",
            (LinearShape, "bias0"): "bias", (ExpertShape, "sink0"): "second_up"}
_REGISTRIES = {"format_codes": ALL_FORMATS, "activation_codes": ACTIVATIONS}


class _Refusal(NamedTuple):
    """A field that a device refuses; the expert is -1 for a field of the layer."""

    expert: int
    field: Field
    limit: Limit
    value: int


def check_layer(config: AcceleratorConfig, shapes: Sequence[ExpertShape | LinearShape]) -> None:
    """Refuse what a device of this configuration refuses of a layer.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    shapes : sequence of :class:`ExpertShape`, or one :class:`LinearShape`
        Of its experts, all of one d_model.

    Raises
    ------
    InvalidTensor
        For a layer without experts.
    FormatError
        For a format or an activation.
    LimitExceeded
        For anything else.
    """
    if not shapes:
        raise InvalidTensor("number of experts must be at least 1, not 0")
    first = shapes[0].sections
    layer = {"planes": 1, "num_experts": len(shapes), "d_in": first[0].k, "d_out": first[-1].rows}
    entries: dict[ExpertShape | LinearShape, int] = {}
    for expert, shape in enumerate(shapes):
        entries.setdefault(shape, expert)
    tables = {expert: table_entry(shape, 0) for shape, expert in entries.items()}
    refusal = _refusal(config, layer, tables)
    if refusal is None:
        return
    expert, field, limit, value = refusal
    fitting = [preset.name for preset in sorted(PRESETS.values(), key=lambda p: p.max_dim)
               if _refusal(preset, layer, tables) is None]
    advice = (f"presets that can: {', '.join(fitting)}" if fitting
              else "no preset can, make a configuration that does")
    shape = shapes[max(expert, 0)]
    name, given = _given(field.name, shape)
    registry = _REGISTRIES.get(limit.values) if isinstance(limit.values, str) else None
    codes = limit.codes(config)
    if registry is not None and codes is not None:
        names = {one.code: one.name for one in registry.values()}
        kind, shown = FormatError, repr(names[value])
        allowed = f"one of {', '.join(names[code] for code in codes)}"
    elif name in _OPTIONS.values():
        kind, allowed, shown = LimitExceeded, "left out", "given"
    else:
        kind, allowed = LimitExceeded, replace(limit, when=None).text(config)
        shown = str(value) if given in (None, value) else f"{given} ({value} in whole blocks)"
    where = f"expert {expert}: " if len(tables) > 1 and expert >= 0 else ""
    raise kind(f"{where}{name} must be {allowed} in config {config.name!r}, not {shown}; {advice}")


def _refusal(config: AcceleratorConfig, layer: Mapping[str, int],
             tables: Mapping[int, Mapping[str, int]]) -> _Refusal | None:
    """Return what a device refuses first; addresses are not looked at, and no grid."""
    for expert, fields, values in ((-1, LAYER, layer),
                                   *((expert, EXPERT, table) for expert, table in tables.items())):
        full = {field.name: 0 for field in fields} | dict(values)
        found = bad_field(fields, full, config)
        if found is not None:
            return _Refusal(expert, *found, full[found[0].name])
    return None


def _given(name: str, shape: ExpertShape | LinearShape) -> tuple[str, int | None]:
    """Return how a caller calls a field, and the size that the caller gave."""
    if isinstance(shape, ExpertShape) and name in ("d_in", "d_out"):
        name = "d_model"
    name = _OPTIONS.get((type(shape), name), name)
    return _NAMES.get(name, name), getattr(shape, name, None) if name.startswith("d_") else None
