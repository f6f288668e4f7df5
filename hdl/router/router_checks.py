"""What the fields of a router say only together."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from moeaccel.config import BLOCK, TOP_K_MAX, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.interface.commands import ENTRY_BYTES, ROUTER, Selection, field_of
from moeaccel.router.choices import GROUPS_MAX, CapacityOrder, Gates, GroupScore

__all__ = ["RouterChecks", "router_fields", "table_units"]


def _product(a, b):
    """Return a product by additions: no multiplier for what is looked at once a command."""
    return sum(Mux(b[i], a << i, 0) for i in range(len(b)))


def _of_modes(config, router, form):
    """Return the statements for what modes have."""
    names = {"threshold": ["threshold"], "top_p": ["top_p"], "prior": ["prior", "prior_keep"],
             "capacity": [], "mixer": [], "gates": ["gates"]}
    taken = [form[name].eq(router[name]) for mode in config.router_modes for name in names[mode]]
    if "capacity" in config.router_modes:
        beyond = router["capacity"][len(form.capacity):].any()
        taken += [form.capacity.eq(Mux(beyond, ~0, router["capacity"])),
                  form.by_priority.eq(router["capacity_order"] == CapacityOrder.PRIORITY)]
    if "mixer" in config.router_modes:
        taken += [form.mixer.eq(router["selection"] == Selection.MIXER),
                  form.limit.eq(router["mixer"])]
    return taken


def table_units(config, job):
    """Return the units of 64 bytes of a router's table, and those of its residents, if any."""
    table = (job.num_experts + 7) >> 3
    residents = C(0)
    if "prior" in config.router_modes:
        residents = Mux(job.form.prior.any(), (job.num_experts + 511) >> 9, 0)
    return table, residents


def router_fields(config, entry, job, groups):
    """Return the statements that take what a job needs of a router's descriptor.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    entry : value
        Its 64 bytes.
    job : view of :func:`~moeaccel.hdl.layouts.job`
        With the submission's top_k. Rows of logits are filled up to blocks, and y is none.
    groups : :class:`Signal`
    """
    router, form = layouts.entry_fields(ROUTER, entry), job.form
    grouped = router["keep_groups"] < router["groups"]
    outputs = router["num_experts"]
    if "gates" in config.router_modes:
        outputs = outputs + Mux(router["gates"] != Gates.NONE, router["shared"], 0)
    return [
        groups.eq(router["groups"]),
        job.num_experts.eq(router["num_experts"]),
        job.table_address.eq(router["table_address"]),
        job.steps_in.eq((outputs + (BLOCK - 1)) // BLOCK),
        job.steps_out.eq(1),
        form.tables.eq(router["tables"][0]),
        form.experts.eq(router["num_experts"]),
        form.top_k.eq(Mux(router["shared"] < job.top_k, job.top_k - router["shared"], 0)),
        form.shared.eq(router["shared"]),
        form.by_logits.eq(router["selection"] != Selection.BIASED_SCORE),
        form.grouped.eq(grouped),
        form.top2.eq(grouped & (router["group_score"] == GroupScore.TOP2_SUM)),
        *_of_modes(config, router, form),
        *([form.outputs.eq(outputs)] if "gates" in config.router_modes else []),
        form.scale.eq(Cat(router["scale"][:23], C(1, 1))),
        form.scale_exponent.eq(router["scale"][23:31] - 150),
        *(form[name].eq(router[name])
          for name in ("score", "group_size", "keep_groups", "renormalize", "epsilon")),
    ]


class RouterChecks(wiring.Component):
    """See that a router's groups are those of its experts, and that they have enough of them.

    Latency LATENCY_CYCLES. Fields are within their own limits; what comes of others is harmless.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_form : :py:`In(layouts.router_form(config))`
    i_groups : :py:`In(range(GROUPS_MAX + 1))`
    o_bad_top_k : :py:`Out(1)`
        None is to be chosen, or more than the groups kept, or the router, have; or not two by a
        sparsemixer.
    o_bad, o_word : :py:`Out(1)`, :py:`Out(range(ENTRY_BYTES // 4))`
        The descriptor's 32-bit word that is wrong.
    """

    LATENCY_CYCLES = 2

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_form": In(layouts.router_form(config)),
            "i_groups": In(range(GROUPS_MAX + 1)),
            "o_bad_top_k": Out(1),
            "o_bad": Out(1),
            "o_word": Out(range(ENTRY_BYTES // 4)),
        })

    def elaborate(self, platform):
        m = Module()
        form = self.i_form
        bits = len(form.experts) + ceil_log2(GROUPS_MAX) + 1
        experts, kept = Signal(bits), Signal(len(form.experts) + TOP_K_MAX.bit_length())
        m.d.sync += [experts.eq(_product(form.group_size, self.i_groups)),
                     kept.eq(_product(form.group_size, form.keep_groups))]
        bad_groups = experts != form.experts
        not_two = C(0)
        if "mixer" in self._config.router_modes:
            not_two = form.mixer & (form.top_k != 2)
        too_many = layouts.router_outputs(self._config, form) > self._config.max_experts
        m.d.sync += [
            self.o_bad_top_k.eq((form.top_k == 0) | (form.top_k > kept) | not_two
                                | (form.top_k > self._config.router_top_k)),
            self.o_bad.eq(too_many | bad_groups | (form.keep_groups > self.i_groups)),
            self.o_word.eq(Mux(too_many, field_of(ROUTER, "num_experts").word, Mux(
                bad_groups, field_of(ROUTER, "groups").word,
                field_of(ROUTER, "keep_groups").word))),
        ]
        return m
