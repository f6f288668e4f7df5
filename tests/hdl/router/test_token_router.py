import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.config import preset
from moeaccel.cycles.token_router import token_cycles
from moeaccel.golden.router import route
from moeaccel.hdl.router.token_router import TokenRouter
from moeaccel.router.descriptor import table_words
from moeaccel.router.settings import RouterSettings
from moeaccel.router.tables import LOGIT_BITS, fixed
from tests.support.router import form_of

CONFIG = preset("tiny").replace(
    router=("softmax", "sigmoid", "sqrt_softplus", "identity"), max_experts=32, router_top_k=8)
MODES = CONFIG.replace(router_modes=("threshold", "top_p", "prior", "mixer", "gates"))

ROUTERS = {
    "R1": {"renormalize": "sum"},
    "R2": {},
    "R3": {"score": "identity", "renormalize": "softmax_top_k"},
    "R4": {"groups": 8, "keep_groups": 3, "scale": 16.0},
    "R1b": {"renormalize": "clamp", "epsilon": 1e-3, "extra": True},
    "R1g": {"renormalize": "sum_eps", "epsilon": 1e-2, "groups": 4, "keep_groups": 2,
            "group_score": "top2_sum"},
    "R5": {"score": "sigmoid", "renormalize": "sum_eps", "groups": 8, "keep_groups": 4,
           "group_score": "top2_sum", "scale": 2.446, "extra": True},
    "R5s": {"score": "sigmoid", "renormalize": "sum", "scale": 1.8, "extra": True},
    "R6L4": {"score": "sigmoid", "top_k": 1},
    "R7": {"score": "sqrt_softplus", "renormalize": "sum", "extra": True},
    "R8": {"extra": True, "scale": 6.0},
    "logits": {"score": "sigmoid", "bias_logits": True, "extra": True},
    "residents": {"renormalize": "sum", "resident": 0.4},
    "residents-groups": {"score": "sigmoid", "renormalize": "sum", "groups": 4, "keep_groups": 2,
                         "group_score": "top2_sum", "resident": 0.3, "extra": True},
    "few": {"renormalize": "softmax_top_k", "resident": 0.05, "extra": True},
    "seven": {"experts": 7, "top_k": 5},
    "one": {"experts": 1, "top_k": 1, "renormalize": "sum"},
}

WITH_MODES = {
    "threshold": {"threshold": 0.4},
    "threshold-sum": {"score": "sigmoid", "renormalize": "sum", "threshold": 0.999, "extra": True},
    "top-p": {"top_p": 0.6, "renormalize": "sum_eps", "epsilon": 1e-3},
    "top-p-1": {"top_p": 1.0, "score": "identity", "renormalize": "softmax_top_k"},
    "both": {"top_p": 0.9, "threshold": 0.2, "renormalize": "softmax_top_k", "resident": 0.2},
    "prior": {"prior": 0.7, "resident": 0.4},
    "prior-keep": {"prior": 40.0, "prior_keep": 1, "resident": 0.1, "extra": True,
                   "renormalize": "sum"},
    "prior-groups": {"prior": 1.5, "prior_keep": 1, "groups": 4, "keep_groups": 2,
                     "resident": 0.3, "extra": True, "bias_logits": True},
    "prior-top2": {"prior": 0.5, "groups": 4, "keep_groups": 2, "group_score": "top2_sum",
                   "resident": 0.5, "score": "sigmoid", "extra": True},
    "prior-far": {"prior": 2048.0, "resident": 0.5},
    "keep-alone": {"prior_keep": 1, "extra": True, "resident": 0.2, "threshold": 0.1},
    "mixer": {"mixer": 0.02, "top_k": 2, "extra": True},
    "mixer-all": {"mixer": 1.0, "top_k": 2, "scale": 2.5, "score": "sigmoid"},
    "mixer-none": {"mixer": 0.0, "top_k": 2, "experts": 9},
}
WITH_GATES = {
    "gates": {"gates": "sigmoid", "shared": 1, "renormalize": "sum"},
    "gates-scaled": {"gates": "sigmoid", "shared": 3, "scale": 4.0, "extra": True},
    "gates-of-chosen": {"gates": "sigmoid", "shared": 2, "score": "identity",
                        "renormalize": "softmax_top_k", "threshold": 0.3},
    "gates-sum": {"gates": "sum", "shared": 2, "score": "sigmoid", "renormalize": "sum",
                  "scale": 8.0, "extra": True},
    "gates-dropped": {"gates": "sum", "shared": 1, "score": "sigmoid", "renormalize": "sum",
                      "top_p": 0.5, "groups": 4, "keep_groups": 2},
    "gates-most": {"gates": "sum", "shared": 8, "score": "sigmoid", "experts": 24, "top_k": 8},
}
WITH_MODES |= {name: {"experts": 28} | settings for name, settings in WITH_GATES.items()}
DROPS = {"threshold", "top_p"}


def config_of(name):
    return MODES if name in WITH_MODES else CONFIG


def logits_of(rng, tokens, experts):
    """Return logits of some sizes, with ties, far ones and ends."""
    logits = rng.standard_normal((tokens, experts)) * 2.0**rng.integers(-2, 6, (tokens, 1))
    logits[0] = 0
    logits[1] = np.rint(logits[1])
    logits[2, :1] = 5000
    logits[3] -= 60
    return logits.astype(np.float32)


def run(settings, logits, tables, *, config=CONFIG, rng=None, stall=0.0):
    """Return ids, weights, how many logits were saturated, and when the last pair of each came."""
    dut = TokenRouter(config)
    mask = {} if settings.prior == 0 else {"resident": None}
    bias, extra = table_words(settings, **tables | mask).T
    residents = tables.get("resident") if settings.prior else None
    integers, beyond = fixed(logits, LOGIT_BITS)
    pairs, cycles, saturated = [], [], 0
    slots = settings.top_k + settings.shared

    async def drive(ctx):
        for name, table in (("bias", bias), ("extra", extra)):
            ctx.set(getattr(dut, f"{name}_w_en"), 1)
            for address, value in enumerate(table.tolist()):
                ctx.set(getattr(dut, f"{name}_w_address"), address)
                ctx.set(getattr(dut, f"{name}_w_data"), value)
                await ctx.tick()
            ctx.set(getattr(dut, f"{name}_w_en"), 0)
        if residents is not None:
            ctx.set(dut.resident_w_en, 1)
            ctx.set(dut.resident_w_data, int.from_bytes(
                np.packbits(residents, bitorder="little").tobytes(), "little"))
            await ctx.tick()
            ctx.set(dut.resident_w_en, 0)
        for logit, far in zip(integers.reshape(-1).tolist(), beyond.reshape(-1).tolist(),
                              strict=True):
            while rng and rng.random() < stall:
                ctx.set(dut.i_logit.valid, 0)
                await ctx.tick()
            ctx.set(dut.i_logit.payload, {"value": logit, "beyond": far})
            ctx.set(dut.i_logit.valid, 1)
            await ctx.tick().until(dut.i_logit.ready)
        ctx.set(dut.i_logit.valid, 0)

    async def collect(ctx):
        nonlocal saturated
        port, cycle = dut.o_pair, 0
        ctx.set(dut.i_form, form_of(settings, tables.get("selection_bias"),
                                    modes=config.router_modes, residents=residents is not None))
        while len(pairs) < logits.shape[0] * slots:
            ctx.set(port.ready, not (rng and rng.random() < stall))
            *_, valid, ready, pair, lost = await ctx.tick().sample(
                port.valid, port.ready, port.payload, dut.o_saturated)
            saturated += lost
            cycle += 1
            assert cycle < 200_000
            if valid and ready:
                pairs.append((pair.id if pair.some else -1, pair.weight))
                if pair.last:
                    cycles.append(cycle)
        assert ctx.get(dut.o_idle)
        assert not ctx.get(port.valid)

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(collect)
    sim.add_testbench(drive, background=True)
    sim.run()
    pairs = np.array(pairs).reshape(len(logits), slots, 2)
    return pairs[:, :, 0], pairs[:, :, 1].astype(np.uint32).view(np.float32), saturated, cycles


def case(name, rng):
    settings = dict((ROUTERS | WITH_MODES)[name])
    extra, resident = settings.pop("extra", False), settings.pop("resident", None)
    settings = RouterSettings(**{"experts": 32, "top_k": 6, **settings})
    n = settings.experts
    tables = {"bias": rng.standard_normal(n) * 3 if name in ("R3", "R5", "gates-scaled") else None,
              "selection_bias": rng.standard_normal(n) * 0.2 if extra else None,
              "resident": rng.random(n) < resident if resident else None}
    return settings, tables


@pytest.mark.parametrize("name", [*ROUTERS, *WITH_MODES])
def test_bits(name):
    rng = np.random.default_rng(7)
    settings, tables = case(name, rng)
    logits = logits_of(rng, 8, settings.outputs)
    ids, weights, saturated, _ = run(settings, logits, tables, config=config_of(name), rng=rng,
                                     stall=0.2)
    if settings.mixer is not None:  # what is in the table of keys is not looked at
        tables["selection_bias"] = None
    want = route(logits, settings, **tables)
    assert ids.tolist() == want.ids.tolist()
    assert weights.view(np.uint32).tolist() == want.weights.view(np.uint32).tolist()
    assert saturated == want.saturated
    if name == "few" or DROPS & set(WITH_MODES.get(name, {})):
        assert (ids == -1).any()


@pytest.mark.parametrize("name", ["R1", "R2", "R3", "R4", "R1b", "R1g", "R5", "R5s", "R7",
                                  *WITH_MODES])
def test_cycles(name):
    rng = np.random.default_rng(8)
    settings, tables = case(name, rng)
    config = config_of(name)
    *_, cycles = run(settings, logits_of(rng, 4, settings.outputs), tables, config=config)
    biased = tables["selection_bias"] is not None
    assert np.diff(cycles).tolist() == [token_cycles(config, settings, biased=biased)] * 3


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig with a router, not"):
        TokenRouter(preset("tiny"))
