"""The limits of every field of a submission, a layer descriptor or an expert table entry."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import TOP_K_MAX, AcceleratorConfig
from moeaccel.hdl.layouts import entry_fields
from moeaccel.interface.commands import ENTRY_BYTES, LAYER, ROUTER, SUBMISSION

__all__ = ["FieldChecks", "bad_words", "lowest"]

_WORDS = ENTRY_BYTES // 4


def _refusals(limit, name, entry, config):
    """Return what, each by itself, makes a field's value one that a limit does not allow."""
    value = entry[name]
    codes = limit.codes(config)
    if codes is not None:
        bad = [~Cat(value == code for code in codes).any()]
    else:
        shape = value.shape()
        least = -1 << (shape.width - 1) if shape.signed else 0
        bad = []
        if limit.multiple > 1:
            bad.append(value[:exact_log2(limit.multiple)] != 0)
        if limit.low > least:
            bad.append(value < limit.low)
        high = limit.highest(config)
        if not shape.signed and not high & (high + 1):  # only bits above may be wrong
            bad.append(value[high.bit_length():] != 0)
        else:
            bad.append(value > high)
    if limit.when is not None:
        other, at = limit.when
        bad = [this & (entry[other] == at) for this in bad]
    return bad


def bad_words(m, structure, entry, config, more=None):
    """Return a bit for each 32-bit word with a field that its limits refuse, a cycle later.

    Parameters
    ----------
    m : :class:`Module`
    structure : tuple of :class:`~moeaccel.interface.commands.Field`
    entry : :class:`Value`
        The structure's 64 bytes.
    config : :class:`AcceleratorConfig`
    more : mapping of str to list of :class:`Value`, optional
        By field, what else makes it bad.
    """
    values = entry_fields(structure, entry)
    words = [[] for _ in range(_WORDS)]
    for field in structure:
        checks = [bad for limit in field.limits
                  for bad in _refusals(limit, field.name, values, config)]
        for i, check in enumerate(checks + (more or {}).get(field.name, [])):
            bit = Signal(name=f"bad_{field.name}{i}")
            m.d.sync += bit.eq(check)
            words[field.word].append(bit)
    return Cat(Cat(*word).any() if word else C(0, 1) for word in words)


def lowest(bits):
    """Return the index of the lowest bit that is 1; 0 if there is none."""
    index = C(0, range(len(bits)))
    for i in reversed(range(len(bits))):
        index = Mux(bits[i], C(i, range(len(bits))), index)
    return index


class FieldChecks(wiring.Component):
    """Find the lowest 32-bit word of a structure that has a field out of its range.

    The ranges are those that :mod:`moeaccel.interface.commands` has with each field; whether what
    fields describe together ends within the address space is for ``JobSizes`` to say.

    Latency: ``o_bad`` 3 cycles after ``i_entry``, ``o_word`` 4. Throughput: one structure a cycle.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Limits.

    Members
    -------
    i_entry : :py:`In(8 * ENTRY_BYTES)`
        A submission that has a job, or a descriptor.
    i_is_layer : :py:`In(1)`
        Which of them; 2 cycles behind ``i_entry``.
    i_is_router : :py:`In(1)`
        The layer is a router descriptor; where the configuration has a router.
    o_bad : :py:`Out(1)`
    o_word : :py:`Out(range(ENTRY_BYTES // 4))`
        The word, if there is one.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_entry": In(8 * ENTRY_BYTES),
            "i_is_layer": In(1),
            "i_is_router": In(1),
            "o_bad": Out(1),
            "o_word": Out(range(_WORDS)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        # tokens * top_k <= max_assignments, without the product; a cycle behind the entry.
        entry = entry_fields(SUBMISSION, self.i_entry)
        limit = Signal(range(config.max_tokens + 1))
        with m.Switch(entry["top_k"][:TOP_K_MAX.bit_length()]):
            for k in range(1, TOP_K_MAX + 1):
                with m.Case(k):
                    m.d.sync += limit.eq(min(config.max_tokens, config.max_assignments // k))
        too_many = {"top_k": [entry["tokens"][:len(limit)] > limit]}

        bad = Signal(_WORDS)
        of_layer = bad_words(m, LAYER, self.i_entry, config)
        if config.router:
            of_layer = Mux(self.i_is_router, bad_words(m, ROUTER, self.i_entry, config), of_layer)
        of_submission = bad_words(m, SUBMISSION, self.i_entry, config, too_many)
        m.d.sync += [
            bad.eq(Mux(self.i_is_layer, of_layer, of_submission)),
            self.o_bad.eq(Mux(self.i_is_layer, of_layer.any(), of_submission.any())),
            self.o_word.eq(lowest(bad)),
        ]
        return m
