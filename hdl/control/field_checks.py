"""The limits of every field of a submission and of a layer descriptor."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import BLOCK, TOP_K_MAX, AcceleratorConfig
from moeaccel.hdl.layouts import entry_fields
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    GRID_EXPONENTS,
    LAYER,
    SUBMISSION,
    Activation,
    LayerKind,
    Opcode,
)

__all__ = ["FieldChecks"]

_WORDS = ENTRY_BYTES // 4


def _outside(value, low, high):
    return [value < low, value > high]


class FieldChecks(wiring.Component):
    """Find the lowest 32-bit word of a structure that has a field out of its range.

    The ranges are those of the texts of ``moeaccel.interface.commands`` and the limits of
    ``config``; whether what fields describe together ends within the address space is for
    ``JobSizes`` to say.

    Latency: ``o_bad`` 3 cycles after ``i_entry``, ``o_word`` 4. Throughput: one structure a cycle.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Limits.

    Members
    -------
    i_entry : :py:`In(8 * ENTRY_BYTES)`
        A submission of EXPERTS or GEMM, or a layer descriptor.
    i_is_layer : :py:`In(1)`
        Which of them; it and the next one are 2 cycles behind ``i_entry``.
    i_linear : :py:`In(1)`
        The layer must be linear.
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
            "i_linear": In(1),
            "o_bad": Out(1),
            "o_word": Out(range(_WORDS)),
        })

    def _bad_address(self, value):
        return [value[:exact_log2(ENTRY_BYTES)] != 0, value[self._config.address_bits:] != 0]

    def _bad_submission(self, m, entry):
        """Return what makes fields of a GEMM or EXPERTS submission bad, by field.

        A limit is one cycle behind the entry.
        """
        config = self._config
        top_k = entry["top_k"]
        # tokens * top_k <= max_assignments, without the product.
        limit = Signal(range(config.max_tokens + 1))
        with m.Switch(top_k[:TOP_K_MAX.bit_length()]):
            for k in range(1, TOP_K_MAX + 1):
                with m.Case(k):
                    m.d.sync += limit.eq(min(config.max_tokens, config.max_assignments // k))
        too_many = entry["tokens"][:len(limit)] > limit
        gemm = entry["opcode"] == Opcode.GEMM
        bad = {
            "tokens": _outside(entry["tokens"], 1, config.max_tokens),
            "top_k": [*_outside(top_k, 1, TOP_K_MAX), gemm & (top_k != 1), too_many],
        }
        return bad | {
            field.name: self._bad_address(entry[field.name])
            for field in SUBMISSION if field.name.endswith("_address")
        }

    def _bad_layer(self, entry, gemm):
        """Return what makes fields of a layer descriptor bad, by field."""
        config = self._config

        def unknown(name, values):
            return ~Cat(entry[name] == value for value in values).any()

        def dimension(name):
            return [entry[name][:exact_log2(BLOCK)] != 0, *_outside(entry[name], 1, config.max_dim)]

        return {
            "kind": [entry["kind"] != Mux(gemm, LayerKind.LINEAR, LayerKind.EXPERTS)],
            "format": [unknown("format", [f.code for f in config.weight_formats])],
            "planes": [unknown("planes", (1, 2))],
            "activation": [unknown("activation", Activation)],
            "num_experts": [*_outside(entry["num_experts"], 1, config.max_experts),
                            gemm & (entry["num_experts"] != 1)],
            "d_in": dimension("d_in"),
            "d_expert": [*dimension("d_expert"), gemm & (entry["d_expert"] != entry["d_in"])],
            "d_out": dimension("d_out"),
            "grid_exponent": _outside(
                entry["grid_exponent"], GRID_EXPONENTS[0], GRID_EXPONENTS[-1]),
            "stride": [entry["stride"][:exact_log2(ENTRY_BYTES)] != 0],
            "image_address": self._bad_address(entry["image_address"]),
        }

    def elaborate(self, platform):
        m = Module()

        def bad_words(structure, checks):
            """Return a bit for each word with a bad field, one cycle behind the checks."""
            words = [[] for _ in range(_WORDS)]
            for field in structure:
                for i, check in enumerate(checks.get(field.name, [])):
                    bit = Signal(name=f"bad_{field.name}{i}")
                    m.d.sync += bit.eq(check)
                    words[field.word].append(bit)
            return Cat(Cat(*word).any() if word else C(0, 1) for word in words)

        bad = Signal(_WORDS)
        of_layer = bad_words(
            LAYER, self._bad_layer(entry_fields(LAYER, self.i_entry), self.i_linear))
        of_submission = bad_words(
            SUBMISSION, self._bad_submission(m, entry_fields(SUBMISSION, self.i_entry)))
        m.d.sync += [
            bad.eq(Mux(self.i_is_layer, of_layer, of_submission)),
            self.o_bad.eq(Mux(self.i_is_layer, of_layer.any(), of_submission.any())),
        ]
        for i in reversed(range(_WORDS)):
            with m.If(bad[i]):
                m.d.sync += self.o_word.eq(i)
        return m
