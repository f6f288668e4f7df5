"""What the array does in every cycle: sections, tiles, groups, steps."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.combine.combiner import drain_request
from moeaccel.hdl.dispatch.dispatcher import pass_descriptor


def step(config: AcceleratorConfig) -> data.StructLayout:
    """Return one step of the array as the sequencer starts it."""
    return data.StructLayout(
        {
            "first": 1,
            "last": 1,
            "format": config.format_bits,
            "hidden": 1,
            "x_bank": 1,
            "lane_address": layouts.lane_address_bits(config),
        }
    )


class Sequencer(wiring.Component):
    """Start at most one array step a cycle, in the order tile, group, step.

    A step starts when its weight word is in the tile buffer, its x or h is in the lane buffer and,
    for the first step of a (tile, group), the result has a place behind the array. Gate/up of the
    next pass runs while the results of this one are combined and drained; its down section waits
    until its bank of the y buffer is free: until every pass before has retired or, with two banks
    and other tokens than those before, until at most one set of tokens has not left.

    ::

        i_pass --> [section 0] --> [quantise h] --> [section 1] --> results in --> drain
                       |                                ^                            |
                       +--------- where it is single ---+                            +--> o_retired

    A section has an operand (x or h) and a sink (the activation, or y): what it waits for follows
    from these, and from its shape what it starts.

    With two banks of h, passes overlap. The last section of an expert with two is *owed* while its
    h is quantised; it follows the first section of the next pass, goes ahead of a pass with a
    single section, or comes when no pass comes any more. h is begun when the section owed before
    has been issued, a first section when all elements of h before have come.

    Nothing relies on how fast others are. ``i_loaded``, ``i_result`` and ``i_down_done`` are
    counted: loads not yet taken, results under way, passes whose outputs are in the y buffer.
    ``i_drained`` answers what is waited for. Neither it nor ``i_down_done`` comes within the two
    cycles that it takes to begin to wait, as the array and the drain's first look at the slot table
    are longer.

    Throughput: one step per cycle. Nothing is lost between tiles, groups or, while weights last,
    sections, but for the latency from the last gate/up step to the first quantised h.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_job : :py:`In(layouts.job(config))`
        Constant while passes of the command are in the machine.
    i_pass : :py:`In(stream.Signature(pass_descriptor(config)))`
    o_pass, o_pass_start : current pass; pulse when it starts
    i_available, o_take, o_tile_end, o_rewind, o_free
        Read side of the tile buffer.
    o_step : :py:`Out(step(config))`
        Valid with ``o_take``.
    o_tag : :py:`Out(layouts.result_tag(config))`
        Of the step, valid with ``o_take``.
    i_free : results that have a place behind the array
    i_result : pulse, a result has arrived there
    i_loaded : pulse, the x of a set of tokens is in the lane buffer
    o_hidden_start, i_slots_ready, i_hidden_complete
        Quantiser of h; pulse, the last element of a pass's h has come.
    o_form : :py:`Out(layouts.hidden_form(config))`
        Of the pass whose rows of h are computed.
    i_down_done : pulse, the last output of a pass is in the y buffer
    o_drain, i_drained
        Y buffer.
    i_ended : level, no pass comes any more, be it that none was the last one
    o_x_free : how many passes need their x no more, in their order; counts each once
    o_x_can_wait, o_y_can_wait : levels, there is work that needs neither the x that is being loaded
        nor the sums that leave
    o_retired : pulse, the pass has left the machine; its slot table is free
    o_active, o_starved_weights, o_starved_activations, o_stalled_output
        For the counters; with ``o_take`` they are exclusive.
    """

    def __init__(self, config: AcceleratorConfig):
        self._config = config
        slots = range(config.max_slots + 1)
        super().__init__(
            {
                "i_job": In(layouts.job(config)),
                "i_pass": In(stream.Signature(pass_descriptor(config))),
                "o_pass": Out(pass_descriptor(config)),
                "o_pass_start": Out(1),
                "i_available": In(1),
                "o_take": Out(1),
                "o_tile_end": Out(1),
                "o_rewind": Out(1),
                "o_free": Out(1),
                "o_step": Out(step(config)),
                "o_tag": Out(layouts.result_tag(config)),
                "i_free": In(range(config.result_places + 1)),
                "i_result": In(1),
                "i_loaded": In(1),
                "o_hidden_start": Out(1),
                "o_form": Out(layouts.hidden_form(config)),
                "i_slots_ready": In(slots),
                "i_hidden_complete": In(1),
                "i_down_done": In(1),
                "o_drain": Out(stream.Signature(drain_request(config))),
                "i_drained": In(1),
                "i_ended": In(1),
                "o_x_free": Out(range(3)),
                "o_x_can_wait": Out(1),
                "o_y_can_wait": Out(1),
                "o_retired": Out(1),
                "o_active": Out(1),
                "o_starved_weights": Out(1),
                "o_starved_activations": Out(1),
                "o_stalled_output": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        job = self.i_job
        lanes = config.token_lanes
        count_shape = range(config.max_slots + 1)

        current = Signal(pass_descriptor(config))
        y_bank = Signal(layouts.y_bank_bits(config))  # of the pass
        overlaps = config.hidden_banks > 1
        owed = Signal()  # a section
        owing = Signal(pass_descriptor(config), reset_less=True)  # the pass that owes it
        owing_y_bank = Signal.like(y_bank, reset_less=True)
        of_owing = Signal()  # what is under way is the section owed
        begins_owed = Signal()  # in this cycle
        now, starting = (Signal(pass_descriptor(config), name=name)
                         for name in ("now", "starting"))  # of the section under way, of the next
        now_y_bank = Signal.like(y_bank)
        m.d.comb += [
            self.o_pass.eq(current), now.eq(current), starting.eq(current), now_y_bank.eq(y_bank)]
        if overlaps:
            with m.If(of_owing):
                m.d.comb += [now.eq(owing), now_y_bank.eq(owing_y_bank)]
            with m.If(begins_owed):
                m.d.comb += starting.eq(owing)

        # -- position: tile, group, step; whether it is the first or the last is in registers, too
        tiles_left = Signal(config.most_rows.bit_length())
        group = Signal(range(max(2, config.token_groups)))
        steps_last = Signal(layouts.steps_bits(config))
        steps_left = Signal(layouts.steps_bits(config))  # behind this one
        position = Signal(layouts.steps_bits(config))
        slots_left = Signal(count_shape)  # slots of this and later groups
        slots_through, slots_then = (  # slots up to the end of this group, of the next one
            Signal(range(config.max_slots + 2 * lanes + 1), name=f"slots_{name}")
            for name in ("through", "then"))
        row = Signal(range(config.most_rows + 1))
        per_group = Signal(range(lanes + 1))
        section = Signal(layouts.section_work(config))  # under way
        order = Signal(range(max(2, len(layouts.row_orders(config)))))  # of its format's rows
        lacking = Signal(exact_log2(config.rows))  # rows that the array has and its tiles have not
        final = Signal()  # it is the pass's last
        in_section = Signal()

        one_step, one_group = Signal(), Signal()  # of the section, of its pass
        first_step, last_step = Signal(), Signal()
        last_group, last_tile = Signal(), Signal()
        m.d.comb += per_group.eq(Mux(job.two_planes, lanes // 2, lanes))
        # Rows that the array has and the tile has not: those of other formats, all bits from a
        # place on, and those by which the section's last tile is short.
        missing = Signal(exact_log2(config.rows))
        m.d.comb += missing.eq(lacking | Mux(last_tile, section.short, 0))
        tile_rows = Signal(range(config.rows + 1))  # a power of two
        m.d.comb += tile_rows.eq(config.rows - lacking)

        # -- may the step start? Whether x or h is there and the result has a place is known from
        # registers, which are set for the step that comes next. A place that becomes free and a
        # slot that becomes ready are seen a cycle late.
        in_flight = Signal(range(32))
        started = Signal()
        operand, room = Signal(), Signal()
        permitted = Signal()  # both, and there is a step
        operand_next, room_next, in_section_next = Signal(), Signal(), Signal()
        group_end = Signal()
        m.d.sync += [
            Assert(~self.i_result | (in_flight != 0), "a result must belong to a step"),
            in_flight.eq(in_flight + started - self.i_result),
            operand.eq(operand_next),
            room.eq(room_next),
            in_section.eq(in_section_next),
            permitted.eq(in_section_next & operand_next & room_next),
        ]
        all_ready = self.i_slots_ready == now.count
        reached_now = all_ready | (self.i_slots_ready >= slots_through)
        # The next group's; that of the next tile has been used before.
        reached_then = last_group | all_ready | (self.i_slots_ready >= slots_then)
        loads = Signal(2)
        # Passes whose last step has started, and that have not retired; sets of tokens among them.
        unretired, sets_open = (
            Signal(range(config.y_banks + 1), name=name) for name in ("unretired", "sets_open"))
        y_free = Signal()  # in the next cycle
        m.d.comb += [
            group_end.eq(self.o_take & last_step),
            operand_next.eq(Mux(
                group_end,
                ~section.hidden | reached_then,
                Mux(in_section & (section.combine | section.hidden),
                    (~section.combine | y_free) & (~section.hidden | reached_now), operand))),
            room_next.eq(Mux(
                self.o_take & first_step, ~group_end | (in_flight + 1 < self.i_free),
                (~first_step & ~group_end) | (in_flight < self.i_free))),
            in_section_next.eq(in_section),
            self.o_take.eq(permitted & self.i_available),
            self.o_tile_end.eq(last_step),
            self.o_rewind.eq(last_step & ~last_group),
            self.o_free.eq(last_group),
            started.eq(self.o_take & first_step),
            self.o_step.first.eq(first_step),
            self.o_step.last.eq(last_step),
            self.o_step.format.eq(section.dims.format),
            self.o_step.hidden.eq(section.hidden),
            self.o_step.x_bank.eq(now.x_bank),
            self.o_step.lane_address.eq(Cat(position[: ceil_log2(config.max_steps)], group)),
            self.o_tag.group.eq(group),
            self.o_tag.row.eq(row),
            self.o_tag.last_group.eq(last_group),
            self.o_tag.slots.eq(Mux(slots_left > per_group, per_group, slots_left)),
            self.o_tag.hidden.eq(section.hidden),
            self.o_tag.combine.eq(section.combine),
            self.o_tag.two_planes.eq(job.two_planes),
            self.o_tag.missing.eq(missing),
            self.o_tag.x_bank.eq(now.x_bank),
            self.o_tag.slot_bank.eq(now.slot_bank),
            self.o_tag.fresh.eq(~now.same),
            self.o_tag.y_bank.eq(now_y_bank),
            self.o_tag.last.eq(last_group & last_tile),
            self.o_tag.row_order.eq(order),
        ]
        if config.bias:
            m.d.comb += self.o_tag.biased.eq(section.dims.biased)
        section_end = Signal()

        def first_group(count, single):
            return [
                group.eq(0), slots_left.eq(count), slots_through.eq(per_group),
                slots_then.eq(per_group << 1), last_group.eq(single),
            ]

        with m.If(self.o_take):
            m.d.sync += [
                position.eq(position + 1), steps_left.eq(steps_left - 1),
                first_step.eq(0), last_step.eq(steps_left == 1),
            ]
            with m.If(last_step):
                m.d.sync += [
                    position.eq(0),
                    steps_left.eq(steps_last),
                    first_step.eq(1),
                    last_step.eq(one_step),
                    group.eq(group + 1),
                    slots_left.eq(slots_left - per_group),
                    last_group.eq(slots_left <= (per_group << 1)),
                    slots_through.eq(slots_then),
                    slots_then.eq(slots_then + per_group),
                ]
                with m.If(last_group):
                    m.d.sync += [
                        *first_group(now.count, one_group),
                        tiles_left.eq(tiles_left - 1),
                        last_tile.eq(tiles_left == 2),
                        row.eq(row + tile_rows),
                    ]
                    m.d.comb += section_end.eq(last_tile)

        waiting_x = Signal()
        m.d.comb += [
            self.o_active.eq(in_section | waiting_x),
            self.o_starved_activations.eq(waiting_x | (in_section & ~operand)),
            self.o_starved_weights.eq(in_section & operand & ~self.i_available),
            self.o_stalled_output.eq(in_section & operand & self.i_available & ~room),
        ]

        # -- sections
        def lacking_of(code):
            """Return the rows that the array has and a tile of a format has not."""
            value = 0
            for fewer in {config.rows - f.rows(config.row_multipliers)
                          for f in config.weight_formats} - {0}:
                some = [f for f in config.weight_formats
                        if config.rows - f.rows(config.row_multipliers) == fewer]
                value = value | layouts.is_format(code, some).replicate(len(lacking)) & fewer
            return value

        begin = Signal()
        coming = Signal(layouts.section_work(config))  # the section that ``begin`` starts
        m.d.comb += coming.eq(current.work.sections[0])
        with m.If(begin):
            one = coming.dims.steps == 1
            single = starting.count <= per_group
            m.d.comb += [
                in_section_next.eq(1),
                operand_next.eq(~coming.hidden & (~coming.combine | y_free)),
                room_next.eq(in_flight < self.i_free),
            ]
            m.d.sync += [
                *first_group(starting.count, single),
                one_group.eq(single),
                of_owing.eq(begins_owed),
                section.eq(coming),
                order.eq(layouts.row_order(config, coming.dims.format)),
                lacking.eq(lacking_of(coming.dims.format)),
                position.eq(0),
                row.eq(0),
                steps_last.eq(coming.dims.steps - 1),
                steps_left.eq(coming.dims.steps - 1),
                one_step.eq(one),
                first_step.eq(1),
                last_step.eq(one),
                tiles_left.eq(coming.dims.tiles),
                last_tile.eq(coming.dims.tiles == 1),
            ]

        taken_load = Signal()
        x_there = Signal()  # that of the pass in ``current``
        loads_next = Signal.like(loads)
        m.d.comb += loads_next.eq(loads + self.i_loaded - taken_load)
        m.d.sync += [loads.eq(loads_next), x_there.eq(current.same | (loads_next != 0)),
                     Assert(~self.i_loaded | (loads != 3), "loads must not be lost")]
        finished = Signal()  # the last step of a pass has started
        # Behind a section that was owed comes h of ``current``, whose first section went ahead, or
        # ``current``, which is single, or nothing.
        current_owes, current_waits = Signal(), Signal()
        with m.If(begin & ~begins_owed):
            m.d.sync += [current_owes.eq(~current.work.single), current_waits.eq(0)]
        # Elements of h that belong to steps which have started have not all come.
        elements_due = Signal()
        with m.If(self.i_hidden_complete):
            m.d.sync += elements_due.eq(0)
        with m.FSM(name="issue") as issue:
            with m.State("PASS"):
                m.d.comb += self.i_pass.ready.eq(1)
                m.d.sync += [
                    current.eq(self.i_pass.payload),
                    x_there.eq(self.i_pass.p.same | (loads_next != 0)),
                ]
                with m.If(self.i_pass.valid):
                    m.d.sync += [current_waits.eq(1), current_owes.eq(0)]
                    m.next = "X"
                    if overlaps:
                        with m.If(owed & self.i_pass.p.work.single):
                            m.next = "OWED"
                if overlaps:
                    with m.Elif(owed & (owing.last | self.i_ended)):
                        m.next = "OWED"
            with m.State("X"):
                m.d.comb += waiting_x.eq(1)
                with m.If(x_there & ~(elements_due if overlaps else C(0))):
                    m.d.comb += [
                        taken_load.eq(~current.same), self.o_pass_start.eq(1), begin.eq(1)]
                    m.d.sync += [final.eq(current.work.single),
                                 y_bank.eq(y_bank + ~current.same)]
                    with m.If(~current.work.single):
                        m.d.sync += [self.o_form.eq(current.work.form), elements_due.eq(1)]
                    m.next = "SECTION"
            with m.State("SECTION"):
                with m.If(section_end):
                    m.d.comb += in_section_next.eq(0)
                    m.next = "HIDDEN"
                    if overlaps:
                        with m.If(owed & ~final):
                            m.next = "OWED"
                    with m.If(final):
                        m.d.comb += finished.eq(1)
                        m.next = "PASS"
                        if overlaps:
                            with m.If(of_owing & current_owes):
                                m.next = "HIDDEN"
                            with m.Elif(of_owing & current_waits):
                                m.next = "X"
            with m.State("HIDDEN"):
                m.d.sync += current_owes.eq(0)
                m.d.comb += [self.o_hidden_start.eq(1), waiting_x.eq(1)]
                if overlaps:
                    m.d.sync += [owed.eq(1), owing.eq(current), owing_y_bank.eq(y_bank)]
                    m.next = "PASS"
                else:
                    m.next = "HIDDEN_STARTED"
            if overlaps:
                with m.State("OWED"):
                    m.d.comb += [waiting_x.eq(1), begin.eq(1), begins_owed.eq(1),
                                 coming.eq(owing.work.sections[1])]
                    m.d.sync += [final.eq(1), owed.eq(0)]
                    m.next = "SECTION"
            else:
                with m.State("HIDDEN_STARTED"):  # i_slots_ready is of this pass from then on
                    m.d.comb += [
                        waiting_x.eq(1), begin.eq(1), coming.eq(current.work.sections[1])]
                    m.d.sync += final.eq(1)
                    m.next = "SECTION"
        m.d.sync += [
            self.o_x_can_wait.eq(~issue.ongoing("PASS") & ~issue.ongoing("X")),
            self.o_y_can_wait.eq(in_section & operand),
        ]

        # -- retiring: one pass after another; behind the one that does another may wait
        left = Signal()  # a cycle later
        leaving, behind = (Signal(_leaving(config), name=name) for name in ("leaving", "behind"))
        behind_valid = Signal()
        new = Signal(_leaving(config))  # the latest that finished
        with m.If(finished):
            m.d.sync += [
                new.slot_bank.eq(now.slot_bank), new.y_bank.eq(now_y_bank),
                new.count.eq(now.count), new.last.eq(now.last)]
        m.d.comb += [
            self.o_drain.p.slot_bank.eq(leaving.slot_bank),
            self.o_drain.p.y_bank.eq(leaving.y_bank),
            self.o_drain.p.count.eq(leaving.count),
        ]
        # Whether a pass has the tokens of the one before, once for each that has one before it.
        accepted = Signal()
        decided = Signal()
        most = config.y_banks + config.hidden_banks
        undecided = Signal(range(most + 1))  # passes that were accepted
        same_next = Signal(most)  # of those that follow them, from bit 0 on
        known = Signal(range(most + 1))
        followed = Signal()
        has_next, next_same = Signal(), Signal()
        m.d.comb += [
            accepted.eq(self.i_pass.valid & self.i_pass.ready),
            followed.eq(accepted & (undecided != 0)),
            has_next.eq((known != 0) | accepted),
            next_same.eq(Mux(known == 0, self.i_pass.p.same, same_next[0])),
        ]
        taken = Signal()  # by the pass that decides
        m.d.comb += taken.eq(decided & has_next)
        m.d.sync += [
            left.eq(finished),
            undecided.eq(undecided + accepted - decided),
            known.eq(known + followed - taken),
            Assert(~accepted | decided | (undecided != most), "too many passes"),
        ]
        for i in range(len(same_next)):
            shifted = same_next[i + 1] if i + 1 < len(same_next) else C(0)
            m.d.sync += same_next[i].eq(Mux(
                followed & (known == i + taken), self.i_pass.p.same,
                Mux(taken, shifted, same_next[i])))
        # Outputs of passes that are in the y buffer, beyond those of the pass that is waited for.
        done = Signal(range(config.y_banks + 1))
        consumed = Signal()
        drains = Signal()  # the pass that retires
        self._free_x(m, finished, now.work.single)
        m.d.sync += [
            done.eq(done + self.i_down_done - consumed),
            unretired.eq(unretired + finished - self.o_retired),
            sets_open.eq(sets_open + (finished & ~now.same) - (self.o_retired & drains)),
        ]
        all_retired = (unretired == 0) | ((unretired == 1) & self.o_retired)
        m.d.comb += y_free.eq(all_retired)
        if config.y_banks > 1:
            with m.If(~Mux(begin, starting.same, now.same)):
                m.d.comb += y_free.eq((sets_open != config.y_banks) | (self.o_retired & drains))
        with m.FSM(name="retire") as retire:
            with m.State("IDLE"):
                m.d.sync += leaving.eq(new)
                with m.If(left):
                    m.next = "RESULTS"
            with m.State("RESULTS"):
                with m.If(self.i_down_done | (done != 0)):
                    m.d.comb += consumed.eq(1)
                    m.next = "DECIDE"
            with m.State("DECIDE"):
                m.d.sync += drains.eq(1)
                with m.If(has_next & ~leaving.last):
                    m.d.comb += decided.eq(1)
                    m.next = "DRAIN"
                    with m.If(next_same):
                        m.d.sync += drains.eq(0)
                        m.next = "RETIRE"
                with m.Elif(leaving.last | self.i_ended):
                    m.d.comb += decided.eq(1)
                    m.next = "DRAIN"
            with m.State("DRAIN"):
                m.d.comb += self.o_drain.valid.eq(1)
                with m.If(self.o_drain.ready):
                    m.next = "DRAINING"
            with m.State("DRAINING"):
                with m.If(self.i_drained):
                    m.next = "RETIRE"
            with m.State("RETIRE"):
                m.d.comb += self.o_retired.eq(1)
                m.d.sync += [leaving.eq(Mux(behind_valid, behind, new)), behind_valid.eq(0)]
                m.next = "IDLE"
                with m.If(behind_valid | left):
                    m.next = "RESULTS"
        with m.If(left & ~retire.ongoing("IDLE")
                  & (~retire.ongoing("RETIRE") | behind_valid)):
            m.d.sync += [behind.eq(new), behind_valid.eq(1)]
        m.d.sync += [
            Assert(~left | ~behind_valid | retire.ongoing("RETIRE"), "too many passes retire"),
            Assert(~self.i_drained | retire.ongoing("DRAINING"), "nobody waits for i_drained"),
            Assert(~self.i_down_done | (unretired != 0), "no pass waits for i_down_done"),
        ]
        return m

    def _free_x(self, m, finished, single):
        """Tell when a pass needs its x no more: its first section's results have all come."""
        config = self._config
        if config.hidden_banks == 1:
            m.d.comb += self.o_x_free.eq(self.i_down_done)
            return
        # Whether the passes whose outputs come next have a single section.
        kinds = Signal(config.y_banks)
        waiting = Signal(range(config.y_banks + 1))
        m.d.comb += self.o_x_free.eq(self.i_hidden_complete + (self.i_down_done & kinds[0]))
        m.d.sync += waiting.eq(waiting + finished - self.i_down_done)
        for i in range(config.y_banks):
            after = kinds[i + 1] if i + 1 < config.y_banks else C(0)
            m.d.sync += kinds[i].eq(Mux(
                finished & (waiting == i + self.i_down_done), single,
                Mux(self.i_down_done, after, kinds[i])))


def _leaving(config):
    """Return what is known of a pass whose steps have started: its slots and sums."""
    return data.StructLayout({
        "slot_bank": layouts.slot_bank_bits(config),
        "y_bank": layouts.y_bank_bits(config),
        "count": range(config.max_slots + 1),
        "last": 1,
    })
