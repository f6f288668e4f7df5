"""What happened in a hybrid layer, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Counters", "table"]


@dataclass
class Counters:
    """Of one layer, since the policy was set.

    Parameters
    ----------
    layer : :class:`int`
    calls, tokens : :class:`int`
    hits, misses : :class:`int`
        Experts of calls that were resident, and that were not.
    on_torch, on_device : :class:`int`
        Experts of calls that the torch device computed, moved ones included; and the accelerator.
    rows : :class:`int`
        Tokens that were sent to the accelerator.
    moved, promoted : :class:`int`
        Images that a call needed; images that came in behind one, to stay.
    bytes_moved : :class:`int`
        Of both.
    residents : :class:`int`
        Now.
    move_s, torch_s, wait_s : :class:`float`
        Seconds of moves; of the torch device's part; of waiting for the accelerator behind it.
    """

    layer: int
    calls: int = 0
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    on_torch: int = 0
    on_device: int = 0
    rows: int = 0
    moved: int = 0
    promoted: int = 0
    bytes_moved: int = 0
    residents: int = 0
    move_s: float = 0.0
    torch_s: float = 0.0
    wait_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return every figure for JSON."""
        return asdict(self)


def table(layers: Sequence[Counters]) -> str:
    """Return a table, one line for each layer, and one for all."""
    names = [field.name for field in fields(Counters)]
    rows = [[_text(getattr(layer, name)) for name in names] for layer in layers]
    rows.append(["all", *(_text(sum(getattr(layer, name) for layer in layers))
                          for name in names[1:])])
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                     for row in [names, *rows])


def _text(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
