"""Payloads that travel between blocks; every width follows from the configuration."""

from collections.abc import Iterable

from amaranth.hdl import Cat, Const, Mux, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.arithmetic import ELEMENT_BITS, MANTISSA_BITS
from moeaccel.config import BLOCK, TOP_K_MAX, AcceleratorConfig
from moeaccel.formats import WeightFormat
from moeaccel.interface.commands import COUNT_MAX, ENTRY_BYTES, SECTIONS_MAX, Field, NonFinite
from moeaccel.router.choices import PART_BITS, Gates, Renormalize, Score
from moeaccel.router.tables import LOGIT_BITS, SCORE_BITS, VALUE_BITS, WORD_BITS

SCORE_WIDTH = SCORE_BITS + 6
"""Bits of a score: sqrt(log(1 + exp(s))) is below 2**6."""

EXPONENT_BITS = 12
"""Signed exponents of internal and block floats: no product of the chain leaves this range."""


def internal_float() -> data.StructLayout:
    """Return the internal float: 18-bit signed mantissa (0, or 17 magnitude bits), exponent."""
    return data.StructLayout({
        "mantissa": signed(MANTISSA_BITS + 1), "exponent": signed(EXPONENT_BITS)})


def hidden_float() -> data.StructLayout:
    """Return h before it is quantised: magnitude (0, or 24 significant bits), sign, exponent."""
    return data.StructLayout({
        "magnitude": ELEMENT_BITS, "sign": 1, "exponent": signed(EXPONENT_BITS)})


def lane(config: AcceleratorConfig) -> data.StructLayout:
    """Return one token lane's block of 32: a plane's mantissas, element 0 first, and its shift."""
    mantissas = data.ArrayLayout(signed(8), BLOCK)
    return data.StructLayout({"mantissas": mantissas, "shift": unsigned(4)})


def lane_address_bits(config: AcceleratorConfig) -> int:
    """Return the bits of {step, group}, the address in a lane buffer's bank."""
    return ceil_log2(config.token_groups) + ceil_log2(config.max_steps)


def slot_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a slot, the index of a token within a pass."""
    return ceil_log2(config.max_slots)


def slot_bank_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a slot table's bank."""
    return exact_log2(config.slot_banks)


def slot_address_bits(config: AcceleratorConfig) -> int:
    """Return the bits of {bank, slot}, where an entry of the slot tables is."""
    return slot_bank_bits(config) + slot_bits(config)


def y_bank_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a bank of the y buffer: 0 where there is one."""
    return exact_log2(config.y_banks)


def hidden_bank_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a bank of h: 0 where there is one. It is a pass's slot table's, modulo."""
    return exact_log2(config.hidden_banks)


def token_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a token index."""
    return max(1, ceil_log2(config.max_tokens))


def expert_bits(config: AcceleratorConfig) -> int:
    """Return the bits of an expert's number."""
    return max(1, ceil_log2(config.max_experts))


def row_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a row's index in a section of one channel."""
    return ceil_log2(config.most_rows // config.channels)


def channel_name(name: str, channel: int) -> str:
    """Return a member's name for a channel: channel 0 has the plain one, 1 a 1 behind it."""
    return f"{name}{channel}" if channel else name


def is_format(code: Value, formats: Iterable[WeightFormat]) -> Value:
    """Return whether the code is that of one of some formats."""
    return Cat(code == f.code for f in formats).any()


def is_packed(config: AcceleratorConfig, code: Value) -> Value:
    """Return whether two rows share a multiplier in the format of that code."""
    return is_format(code, [f for f in config.weight_formats if f.packed])


def row_orders(config: AcceleratorConfig) -> list[tuple[bool, int]]:
    """Return how rows of a tile lie in the array, once each: whether two share a multiplier, and
    the parts of a multiplier row that compute rows of their own."""
    return sorted({(f.packed, f.parts) for f in config.weight_formats})


def row_order(config: AcceleratorConfig, code: Value) -> Value:
    """Return the number of a format's order in :func:`row_orders`."""
    value: Value | int = 0
    for number, (packed, parts) in enumerate(row_orders(config)):
        some = [f for f in config.weight_formats if (f.packed, f.parts) == (packed, parts)]
        value = Mux(is_format(code, some), number, value)
    return Value.cast(value)


def sum_of_row(config: AcceleratorConfig, order: tuple[bool, int], row: Value) -> Value:
    """Return which of the array's sums is that of a row of a tile.

    Sums are numbered ``(multiplier row * config.parts + part) * 2 + field``, rows ``(multiplier row
    * parts + part) * 2 + field`` of the format's parts, without the field where no two rows share a
    multiplier.
    """
    packed, parts = order
    field = row[0] if packed else Const(0, 1)
    place = row[1:] if packed else row
    missing = exact_log2(config.parts // parts)
    part = Cat(Const(0, missing), place[:exact_log2(parts)])
    whole = Value.cast(Cat(field, part, place[exact_log2(parts):]))
    return Value.cast(whole[:exact_log2(config.rows)])


def rows_of_part(config: AcceleratorConfig, order: tuple[bool, int], part: int) -> list[int]:
    """Return the array's sums of every so manieth row, as there are results per cycle, from row
    ``part`` on: in the order of :func:`sum_of_row`, those that a tile has not as well."""
    packed, parts = order
    found = []
    for row in range(part, config.rows, config.results_per_cycle):
        field, place = (row & 1, row >> 1) if packed else (0, row)
        whole, own = divmod(place, parts)
        found.append(
            ((whole * config.parts + own * (config.parts // parts)) * 2 + field) % config.rows)
    return found


def steps_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a count of blocks, 1 to max_steps."""
    return (config.max_steps).bit_length()


def most_beats(config: AcceleratorConfig) -> int:
    """Return the beats of the longest request that any client of a memory port makes.

    That is a command's ids or weights, a row of partial sums (8 bytes each; x and y have less), or
    a burst of the weight stream.
    """
    longest = max(4 * config.max_assignments, 8 * config.max_dim)
    return max(longest // config.port_bytes, config.max_burst_beats)


def read_request(config: AcceleratorConfig) -> data.StructLayout:
    """Return a linear read or write: byte address, a multiple of the port's width, and beats.

    ``beats``, 1 or more, holds what a client may ask for (:func:`most_beats`).
    """
    return data.StructLayout({
        "address": config.address_bits, "beats": range(most_beats(config) + 1)})


def burst(config: AcceleratorConfig) -> data.StructLayout:
    """Return a burst: aligned block, first and last beat in it, whether its request ends."""
    index = exact_log2(config.max_burst_beats)
    return data.StructLayout({
        "start": index,
        "block": config.address_bits - exact_log2(config.port_bytes) - index,
        "end": index,
        "last": 1,
    })


class ReadClientSignature(wiring.Signature):
    """One reader of the memory port, seen from the reader.

    ``request`` is a stream. ``valid``/``data``/``last`` bring its beats in order and *cannot be
    refused*: a reader asks only for what it has room for. Between request and beats, and from one
    beat to the next, may lie any number of cycles.
    """

    def __init__(self, config: AcceleratorConfig):
        from amaranth.lib import stream

        super().__init__({
            "request": Out(stream.Signature(read_request(config))),
            "valid": In(1),
            "data": In(8 * config.port_bytes),
            "last": In(1),
        })


class WriteClientSignature(wiring.Signature):
    """One writer of the memory port, seen from the writer.

    ``request`` announces a linear write of ``beats`` full beats; ``data`` brings them, those of one
    request after another. ``done`` pulses when memory has acknowledged all that was asked for, any
    number of cycles later; with a request that is accepted in that very cycle it has nothing to do.
    Further requests may be raised before it.
    """

    def __init__(self, config: AcceleratorConfig):
        from amaranth.lib import stream

        super().__init__({
            "request": Out(stream.Signature(read_request(config))),
            "data": Out(stream.Signature(8 * config.port_bytes)),
            "done": In(1),
        })


def weight_request(config: AcceleratorConfig) -> data.StructLayout:
    """Return a linear read of array words of an image.

    With an expert buffer, ``fill``: they go there and nowhere else. ``before``: words of the image
    ahead of these, where its sections are asked for one by one.
    """
    buffered = {"fill": 1, "before": 32 if config.hidden_banks > 1 else 0}
    return data.StructLayout({
        "address": config.address_bits, "words": 32,
        **(buffered if config.buffer_slots else {})})


def stream_request(config: AcceleratorConfig) -> data.StructLayout:
    """Return what a weight streamer is asked for: a linear read of array words.

    With an expert buffer: its first ``held`` beats are there, from beat ``place`` on, the other
    ``beats`` are in memory, from ``address`` on; together whole words, at least one. ``fill``:
    none is held, and those of memory go to the buffer, from ``place`` on, at least one.
    """
    if not config.buffer_slots:
        return weight_request(config)
    return data.StructLayout({
        "address": config.address_bits, **dict(stream_part(config).members)})


def stream_part(config: AcceleratorConfig) -> data.StructLayout:
    """Return what of a request is in the expert buffer, and how many beats are not."""
    return data.StructLayout({
        "fill": 1, "held": range(config.buffer_beats + 1), "place": buffer_address_bits(config),
        "beats": 32 + exact_log2(config.beats_per_word)})


def buffer_address_bits(config: AcceleratorConfig) -> int:
    """Return the bits of {slot, beat}, where a beat is in the expert buffer."""
    return ceil_log2(config.buffer_slots) + exact_log2(config.buffer_beats)


def job(config: AcceleratorConfig) -> data.StructLayout:
    """Return a checked command with its layer, as the engine takes it.

    ``routed``: ids and weights are in memory; else every token goes to experts 0 to ``top_k`` - 1,
    those that there are, with weight 1.
    ``x_narrow``, ``y_narrow``: bfloat16 in memory, else float32. With a router, ``route``: x are
    logits, ids and weights are written, by ``form``; ``continues``: what is counted, and what is
    not finite, is that of the job before as well, and where it is ``routed``, ids and weights are
    those that have been made just now; ``precedes``: a job of the same command comes behind it, so
    that nobody waits for the end of a product, nor for the writes of a ``route``. With an expert
    buffer, ``prefetch``: experts with tokens are brought there, and nothing is computed.
    """
    address = config.address_bits
    router = ({"route": 1, "continues": 1, "precedes": 1, "form": router_form(config)}
              if config.router else {})
    return data.StructLayout({
        "routed": 1,
        "two_planes": 1,
        "x_narrow": 1,
        "y_narrow": 1,
        "num_experts": config.max_experts.bit_length(),
        "steps_in": steps_bits(config),
        "steps_out": steps_bits(config),
        "grid_exponent": signed(8),
        "tokens": config.max_tokens.bit_length(),
        "top_k": 5,
        "table_address": address,
        "x_address": address,
        "ids_address": address,
        "weights_address": address,
        "y_address": address,
        "workspace_address": address,
        **router,
        **({"prefetch": 1} if config.buffer_slots else {}),
    })


def output_count_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a count of a command's weighted outputs."""
    of_outputs = config.max_assignments * config.max_dim
    # A MOE counts those of its router's two matrices as well, and logits.
    of_logits = 3 * config.max_tokens * config.max_experts if config.router else 0
    return (of_outputs + of_logits).bit_length()


def limited_count(count: Value) -> Value:
    """Return a count as a completion has it: COUNT_MAX from there on."""
    bits = COUNT_MAX.bit_length()
    return Mux(count[bits:].any(), COUNT_MAX, count[:bits]) if len(count) > bits else count


def job_result(config: AcceleratorConfig) -> data.StructLayout:
    """Return what a job that has run to its end says of its numbers.

    ``bad_expert``: it ended at an entry of the expert table, that of ``expert``, for ``word``.
    ``nonfinite``: something that was computed with is NaN or infinite; then ``what`` and ``token``
    are those that :class:`moeaccel.interface.commands.Status` has reported.
    """
    return data.StructLayout({
        "bad_expert": 1,
        "expert": expert_bits(config),
        "word": range(ENTRY_BYTES // 4),
        "nonfinite": 1,
        "what": NonFinite,
        "token": token_bits(config),
        "overflows": output_count_bits(config),
        "underflows": output_count_bits(config),
    })


def entry_fields(structure: tuple[Field, ...], entry: Value) -> dict[str, Value]:
    """Return the fields of a structure in device memory, by name."""
    fields: dict[str, Value] = {}
    for f in structure:
        part = entry[f.offset:f.offset + f.bits]
        fields[f.name] = part.as_signed() if f.signed else part
    return fields


def section(config: AcceleratorConfig) -> data.StructLayout:
    """Return the shape of one section of an image (moeaccel.image.Section)."""
    return data.StructLayout({
        "format": config.format_bits,
        "steps": steps_bits(config),
        "tiles": config.most_rows.bit_length(),
        **has_bias(config),
    })


def has_bias(config: AcceleratorConfig) -> dict[str, int]:
    """Return the member that says whether rows have biases, where the hardware has an adder."""
    return {"biased": 1} if config.bias else {}


def section_work(config: AcceleratorConfig) -> data.StructLayout:
    """Return a section and what to do with it.

    ``hidden``: the operand is h, not x. ``combine``: the sink is y, not the activation. ``short``:
    rows that a tile of all the array's rows, at the section's end, has not.
    """
    return data.StructLayout({
        "dims": section(config), "hidden": 1, "combine": 1, "short": exact_log2(config.rows)})


def expert_work(config: AcceleratorConfig) -> data.StructLayout:
    """Return what is to be computed for an expert: its sections, ``single`` where it has one."""
    return data.StructLayout({
        "sections": data.ArrayLayout(section_work(config), SECTIONS_MAX),
        "single": 1,
        "form": hidden_form(config),
    })


def hidden_form(config: AcceleratorConfig) -> data.StructLayout:
    """Return how rows become h.

    ``rows_log2``: of the rows of an element. ``limit``, ``gate_limit``: of up and of gate; none
    where the exponent is 0.
    """
    return data.StructLayout({
        "activation": config.activation_bits,
        "rows_log2": range(exact_log2(config.most_rows_of_h) + 1),
        "limit": limit(7), "gate_limit": limit(MANTISSA_BITS - 1)})


def limit(bits: int) -> data.StructLayout:
    """Return the shape of a positive float32 with so many bits of its fraction."""
    return data.StructLayout({"fraction": bits, "exponent": 8})


def expert(config: AcceleratorConfig) -> data.StructLayout:
    """Return an expert that has tokens, with what its entry of the expert table says.

    ``words``: of its whole image; ``first_words``: of its first section, where sections are asked
    for one by one. ``bad``: the entry cannot be computed with, for what its 32-bit word ``word``
    says; then all else but ``expert`` is undefined.
    """
    return data.StructLayout({
        "expert": expert_bits(config),
        "image_address": config.address_bits,
        "words": 32,
        "work": expert_work(config),
        "bad": 1,
        "word": range(ENTRY_BYTES // 4),
        "first_words": 32 if config.hidden_banks > 1 else 0,
    })


def pair_beat_bits(config: AcceleratorConfig) -> int:
    """Return the bits that number the beats of the longest list of ids, or of weights."""
    return max(1, ceil_log2(4 * config.max_assignments // config.port_bytes))


def pair_beat(config: AcceleratorConfig) -> data.StructLayout:
    """Return a beat of ids, or of weights, of pairs that a router has made, in their order."""
    return data.StructLayout({"valid": 1, "of_weights": 1, "data": 8 * config.port_bytes})


def logit_beat(config: AcceleratorConfig) -> data.StructLayout:
    """Return a beat of what a product writes."""
    return data.StructLayout({"valid": 1, "data": 8 * config.port_bytes})


def pair(config: AcceleratorConfig) -> data.StructLayout:
    """Return a token-expert pair: its token, and where its id and weight are in their lists."""
    return data.StructLayout({
        "token": token_bits(config), "index": ceil_log2(config.max_assignments)})


def slot(config: AcceleratorConfig) -> data.StructLayout:
    """Return one entry of the slot table: a token-expert pair of the pass.

    ``first``: no partial sum of this token is in the workspace yet. ``last``: no later pass touches
    the token.
    """
    return data.StructLayout({
        "token": token_bits(config), "weight": internal_float(), "first": 1, "last": 1,
    })


def element(config: AcceleratorConfig) -> data.StructLayout:
    """Return one value on its way from an array: the slot it belongs to, its row, the value.

    Rows are those of the core; with several, row r of core c is row ``r * channels + c`` of all.
    """
    return data.StructLayout({
        "slot": slot_bits(config), "row": row_bits(config), "value": internal_float(),
    })


def result_tag(config: AcceleratorConfig) -> data.StructLayout:
    """Return what a result of the array (one tile times one group of tokens) is.

    ``row``: the tile's first. ``missing``: how many of the array's R rows the tile has not.
    ``slots``: tokens in the group. ``last``: the section's last result. ``hidden``, ``combine``:
    of the section, as is ``biased``. ``fresh``: the pass stores y, it does not add. ``y_bank``: of
    the y buffer. ``row_order``: its number in :func:`row_orders`.
    """
    return data.StructLayout({
        "group": max(1, ceil_log2(config.token_groups)),
        "row": row_bits(config),
        "missing": exact_log2(config.rows),
        "slots": range(config.token_lanes + 1),
        "last_group": 1,
        "last": 1,
        "hidden": 1,
        "combine": 1,
        "two_planes": 1,
        "x_bank": 1,
        "slot_bank": slot_bank_bits(config),
        "fresh": 1,
        "y_bank": y_bank_bits(config),
        "row_order": range(max(2, len(row_orders(config)))),
        **has_bias(config),
    })


def result_element(config: AcceleratorConfig) -> data.StructLayout:
    """Return one row's output for one slot: of h's rows, or to be combined; ``last``: the section's
    last."""
    return data.StructLayout({
        **dict(element(config).members),
        "combine": 1,
        "last": 1,
        "slot_bank": slot_bank_bits(config),
        "fresh": 1,
        "y_bank": y_bank_bits(config),
    })


def hidden_element(config: AcceleratorConfig) -> data.StructLayout:
    """Return one element of h of one core; ``last``: the pass's last."""
    return data.StructLayout({
        "slot": slot_bits(config),
        "index": row_bits(config) - 1,
        "value": hidden_float(),
        "last": 1,
        "bank": hidden_bank_bits(config),
    })


def hidden_elements(config: AcceleratorConfig) -> data.StructLayout:
    """Return consecutive elements of h, one of each core: from ``channels * index`` on.

    With several results per cycle there is room for as many of each core. ``full``: all of them are
    there, and the index is a multiple of their number; else only the first of each core.
    """
    return data.StructLayout({
        **dict(hidden_element(config).members),
        "value": data.ArrayLayout(hidden_float(), config.channels * config.results_per_cycle),
        "full": 1,
    })


def base_address(config: AcceleratorConfig) -> data.StructLayout:
    """Return the address of a base exponent: a slot of x (``bank``), or of h (``hidden``)."""
    return data.StructLayout({"slot": slot_bits(config), "bank": 1, "hidden": 1})


def router_form(config: AcceleratorConfig) -> data.StructLayout:
    """Return how a router makes ids and weights of logits (moeaccel.router.settings).

    ``by_logits``: keys are logits, else scores. ``top2``: a group's score is the sum of its top
    two. ``scale``, ``scale_exponent``: 24 bits of it and the power of two behind them. ``tables``:
    there is a table, else nothing is added. ``shared``: experts behind the others that every token
    goes to; ``top_k`` is without them. Of modes that the configuration has, what the descriptor
    has; ``capacity`` as much as there may be tokens, 0: none; ``mixer``: it is a sparsemixer, and
    ``limit`` its; ``outputs``: experts, and shared ones that have a logit.
    """
    experts = config.max_experts.bit_length()
    modes = {
        "threshold": {"threshold": PART_BITS + 1},
        "top_p": {"top_p": PART_BITS + 1},
        "prior": {"prior": WORD_BITS - 1, "prior_keep": 1},
        "capacity": {"capacity": config.max_tokens.bit_length(), "by_priority": 1},
        "mixer": {"mixer": 1, "limit": LOGIT_BITS + 1},
        "gates": {"gates": range(len(Gates)), "outputs": experts + 1},
    }
    return data.StructLayout({
        "experts": experts,
        "top_k": range(TOP_K_MAX + 1),
        "score": range(len(Score)),
        "by_logits": 1,
        "grouped": 1,
        "top2": 1,
        "group_size": experts,
        "keep_groups": range(TOP_K_MAX + 1),
        "renormalize": range(len(Renormalize)),
        "epsilon": SCORE_BITS + 1,
        "scale": VALUE_BITS,
        "scale_exponent": signed(8),
        "tables": 1,
        "shared": range(TOP_K_MAX),
        **{name: shape for mode in config.router_modes for name, shape in modes[mode].items()},
    })


def router_outputs(config: AcceleratorConfig, form: data.View) -> Value:
    """Return the logits of a token, of a router's form."""
    return Value.cast(form.outputs if "gates" in config.router_modes else form.experts)


def fixed_logit() -> data.StructLayout:
    """Return a logit in units of 2**-20; ``beyond``: it is not what it should be, but the nearest
    there is."""
    return data.StructLayout({"value": signed(WORD_BITS), "beyond": 1})


def routed_pair(config: AcceleratorConfig) -> data.StructLayout:
    """Return an expert that a token goes to: its id and weight; ``some``: there is one; ``last``:
    of the token. Where there may be a capacity, ``priority`` is the token's."""
    priority = {"priority": SCORE_WIDTH} if "capacity" in config.router_modes else {}
    return data.StructLayout({
        "id": expert_bits(config), "some": 1, "weight": 32, "last": 1, **priority})
