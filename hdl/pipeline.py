"""Registers of free-running pipelines."""

from types import SimpleNamespace

from amaranth import *

__all__ = ["Pipeline"]


class Pipeline:
    """Adds one row of registers after another, each enabled by the valid bit that travels along.

    Only valid bits are reset. Registers of an empty stage keep their value, which saves power and
    simulation time.

    Parameters
    ----------
    m : :class:`Module`
    valid : 1-bit value
        Input of the first row is valid.
    name : :class:`str`
        Prefix of signal names.

    Attributes
    ----------
    valid : :class:`Signal`
        Output of the latest row is valid.
    depth : :class:`int`
        Rows so far: the latency.
    """

    def __init__(self, m, valid, name="stage"):
        self._m = m
        self._name = name
        self.valid = valid
        self.depth = 0

    def stage(self, **values):
        """Add a row and return its outputs by name; a value may be a list."""
        m = self._m
        self.depth += 1
        prefix = f"{self._name}{self.depth}"
        after = Signal(name=f"{prefix}_valid")
        m.d.sync += after.eq(self.valid)

        def register(name, value):
            if not Shape.cast(value.shape()).width:
                return value
            signal = Signal(value.shape(), name=f"{prefix}_{name}", reset_less=True)
            with m.If(self.valid):
                m.d.sync += signal.eq(value)
            return signal

        out = SimpleNamespace()
        for name, value in values.items():
            if isinstance(value, list):
                registered = [register(f"{name}_{i}", v) for i, v in enumerate(value)]
            else:
                registered = register(name, value)
            setattr(out, name, registered)
        self.valid = after
        return out

    def delay(self, cycles, **values):
        """Add ``cycles`` rows that only pass the values on."""
        for _ in range(cycles):
            values = vars(self.stage(**values))
        return SimpleNamespace(**values)
