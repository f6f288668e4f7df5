"""Logits of two tokens: one is loaded while the other is routed."""

from amaranth import *
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.unchecked_memory import unchecked_memory
from moeaccel.router.tables import WORD_BITS, WORD_MAX, WORD_MIN

__all__ = ["LogitBanks"]


class LogitBanks(wiring.Component):
    """Take logits, add the bias, keep them, and find each token's largest.

    Golden model: `route_words` of :mod:`moeaccel.golden.router`. Throughput: one logit a cycle
    comes in, and stalls while two tokens' are there. Reset: empty.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With a router.

    Members
    -------
    i_form : :py:`In(layouts.router_form(config))`
        Of all tokens, from a cycle before the first logit on.
    bias_w_en, bias_w_address, bias_w_data : :py:`In`
        Write port of what is added. Between tokens.
    i_logit : :py:`In(stream.Signature(layouts.fixed_logit()))`
    o_saturated : :py:`Out(1)`
        Pulse for each logit that is beyond its range, with its bias or before.
    o_full, o_most, o_most_id : :py:`Out(1)`, :py:`Out(signed(32))`, :py:`Out`
        A token's logits are all there; their largest, and the first expert that has it.
    i_address, o_logit : :py:`In`, :py:`Out(signed(32))`
        An expert's logit of that token, a cycle later.
    i_freed : :py:`In(1)`
        Pulse: on to the next token.
    o_idle : :py:`Out(1)`
        No token has been begun.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        address = layouts.expert_bits(config)
        super().__init__({
            "i_form": In(layouts.router_form(config)),
            "bias_w_en": In(1), "bias_w_address": In(address),
            "bias_w_data": In(signed(WORD_BITS)),
            "i_logit": In(stream.Signature(layouts.fixed_logit())),
            "o_saturated": Out(1),
            "o_full": Out(1),
            "o_most": Out(signed(WORD_BITS)),
            "o_most_id": Out(address),
            "i_address": In(address),
            "o_logit": Out(signed(WORD_BITS)),
            "i_freed": In(1),
            "o_idle": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, form = self._config, self.i_form
        id_bits = layouts.expert_bits(config)
        write, read = unchecked_memory(m, "logits", signed(WORD_BITS), 2 * (1 << id_bits))
        bias_write, bias_read = unchecked_memory(m, "bias", signed(WORD_BITS), 1 << id_bits)
        full, claimed = Signal(2), Signal(2)
        routed = Signal()  # the bank of the token that is routed
        most = Array(Signal(signed(WORD_BITS), name=f"most{i}") for i in range(2))
        most_id = Array(Signal(id_bits, name=f"most_id{i}") for i in range(2))
        bank, index = Signal(), Signal(range(config.max_experts + 1))
        take, last, own = Signal(), Signal(), Signal()  # own: of an expert that may be chosen
        final = Signal.like(index)  # of a token; known long before its logits
        m.d.comb += [
            bias_write.en.eq(self.bias_w_en), bias_write.addr.eq(self.bias_w_address),
            bias_write.data.eq(self.bias_w_data),
            bias_read.addr.eq(index),
            self.i_logit.ready.eq(~claimed.bit_select(bank, 1)),
            take.eq(self.i_logit.valid & self.i_logit.ready),
            last.eq(index == final),
            own.eq((index < form.experts) if "gates" in config.router_modes else 1),
        ]
        m.d.sync += final.eq(layouts.router_outputs(config, form) - 1)
        with m.If(take):
            m.d.sync += index.eq(Mux(last, 0, index + 1))
            with m.If(last):
                m.d.sync += [bank.eq(~bank), claimed.bit_select(bank, 1).eq(1)]
        pipe = Pipeline(m, take, name="load")
        s = pipe.stage(logit=self.i_logit.p.value, beyond=self.i_logit.p.beyond,
                       index=index[:id_bits], bank=bank, first=index == 0, last=last, own=own)
        # Block RAM is slow to answer: a register behind it, ahead of everything else.
        s = pipe.stage(**vars(s), bias=bias_read.data)
        total = s.logit + Mux(form.tables & s.own, s.bias, 0)
        s = pipe.stage(total=total, beyond=s.beyond, index=s.index, bank=s.bank, first=s.first,
                       last=s.last, own=s.own)
        high, low = s.total > WORD_MAX, s.total < WORD_MIN
        held = Mux(high, WORD_MAX, Mux(low, WORD_MIN, s.total))[:WORD_BITS].as_signed()
        s = pipe.stage(value=held, beyond=s.beyond | high | low, index=s.index, bank=s.bank,
                       first=s.first, last=s.last, own=s.own)
        value = s.value
        m.d.comb += [
            write.en.eq(pipe.valid), write.addr.eq(Cat(s.index, s.bank)), write.data.eq(value),
            read.addr.eq(Cat(self.i_address, routed)), self.o_logit.eq(read.data),
            self.o_saturated.eq(pipe.valid & s.beyond),
            self.o_full.eq(full.bit_select(routed, 1)),
            self.o_most.eq(most[routed]), self.o_most_id.eq(most_id[routed]),
        ]
        largest, largest_id = Signal(signed(WORD_BITS)), Signal(id_bits)  # so far
        larger = s.first | (s.own & (value > largest))
        now, now_id = Mux(larger, value, largest), Mux(larger, s.index, largest_id)
        with m.If(pipe.valid):
            m.d.sync += [largest.eq(now), largest_id.eq(now_id)]
            with m.If(s.last):
                m.d.sync += [most[s.bank].eq(now), most_id[s.bank].eq(now_id),
                             full.bit_select(s.bank, 1).eq(1)]
        with m.If(self.i_freed):
            m.d.sync += [full.bit_select(routed, 1).eq(0), claimed.bit_select(routed, 1).eq(0),
                         routed.eq(~routed)]
        m.d.comb += self.o_idle.eq(~claimed.any() & (index == 0))
        return m
