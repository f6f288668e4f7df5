"""The accelerator's configuration: what is chosen, and every width that follows from it."""

from __future__ import annotations

import dataclasses
import json
import zlib
from dataclasses import dataclass, field

from moeaccel.activations import ACTIVATIONS, Activation
from moeaccel.errors import ConfigurationError
from moeaccel.formats import ALL_FORMATS, BLOCK, FORMATS, WeightFormat
from moeaccel.router.choices import MODES, PART_BITS, Gates, Score

ACTIVATION_SHIFT_MAX = 11
"""Largest block shift of an activation: 10 below the token's largest, plus one for a raised
exponent."""

PLANE_BITS = 8
"""Mantissa bits of one activation plane; ``a16`` is two planes, ``256 * hi + lo``."""

TOP_K_MAX = 16
"""Largest number of experts per token (the combination cannot overflow below it)."""

DIM_MAX = 32768
"""Largest d_model and d_expert of any configuration."""

EXPERTS_MAX = 1024
"""Most experts of a layer in any configuration."""

BUFFER_SLOTS_MAX = 64
"""Most slots of an expert buffer: all of them are looked at at once."""

MEMORY_LATENCY_CYCLES = 100
"""Latency of a modelled memory where nobody names another: of the golden model's cycles, of
simulations, and of every published figure."""


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True, kw_only=True)
class AcceleratorConfig:
    """Parameters of one accelerator; validated on creation, immutable after it.

    Parameters
    ----------
    name : :class:`str`
        Name of the configuration, for reports.
    port_bytes : :class:`int`
        Bytes of one beat of a memory port: 8, 16, 32 or 64.
    channels : :class:`int`
        Memory channels, each with a port, a stream of weights and an array of its own; rows are
        dealt to them one by one. A power of two from 1 to 32.
    row_multipliers : :class:`int`
        Multiplier rows of an array; each computes one row of an 8-bit format, or two of a 4-bit
        format. A power of two from 2 to 16 (a gate row and its up row are always in the same tile).
    token_lanes : :class:`int`
        Tokens (``a8``) or half tokens (``a16``) multiplied in one cycle; a power of two from 2 to
        64.
    token_groups : :class:`int`
        Groups of tokens over which a tile of weights is replayed, P; a power of two from 1 to 64.
    max_dim : :class:`int`
        Largest d_model and d_expert; a multiple of 32 from 64 to 32768.
    max_experts, max_tokens, max_assignments : :class:`int`
        Limits of one command: experts in a layer, tokens, and tokens times top-k. Powers of two.
    read_ahead_beats : :class:`int`
        Beats of weights that may be requested ahead on a channel; a power of two, at least two full
        bursts.
    tile_words : :class:`int`
        Depth of a row-tile buffer in array words; a power of two, at least ``max_dim / 32``.
    quantiser_lanes : :class:`int`
        Elements quantised, and outputs drained, in one cycle; a power of two from ``port_bytes /
        8``, so that sums that leave keep up with the port, to ``port_bytes / 2``.
    address_bits : :class:`int`
        Width of an address in a channel's memory; with the channel's number above it, 16 to 64.
    formats : tuple of str
        Weight formats that the hardware reads, of :data:`moeaccel.formats.ALL_FORMATS`; those of
        :data:`moeaccel.formats.FORMATS` when left out.
    activations : tuple of str
        Activations that the hardware computes, all of :data:`moeaccel.activations.ACTIVATIONS` when
        left out.
    router : tuple of str
        Scores that the hardware makes of logits, of :class:`moeaccel.router.choices.Score`; without
        any there is no router.
    router_top_k : :class:`int`
        Most experts that the router chooses for a token, 1 to 16.
    router_modes : tuple of str
        Modes that the router has beside, of :data:`moeaccel.router.choices.MODES`.
    y_banks : :class:`int`
        Banks of the y buffer, 1 or 2: with two, sums of one set of tokens leave while those of the
        next are computed.
    bias : :class:`bool`
        Rows may have biases: an adder behind each channel's normaliser. Rows without them take no
        cycle more, with it or without.
    second_up : :class:`bool`
        Experts may have second up rows, h = activation(gate) * up * second up: one more multiplier
        for each channel.
    results_per_cycle : :class:`int`
        Outputs of an array that are rounded in a cycle, 1 or 2: with few blocks along K an array
        makes more than one.
    hidden_banks : :class:`int`
        Banks of h, 1 or 2, at most ``y_banks``: with two, the first section of the next pass runs
        while h of this one is quantised.
    buffer_slots : :class:`int`
        Experts of which the chip holds the leading beats, 0 to 64; 0: there is no expert buffer.
    buffer_beats : :class:`int`
        Of each on a channel, so many: a power of two, at least an array word; 0 without slots.

    Raises
    ------
    ConfigurationError
        Naming the field, its value and what it must be.
    """

    name: str
    port_bytes: int
    channels: int = 1
    row_multipliers: int = 2
    token_lanes: int = 2
    token_groups: int = 8
    max_dim: int = 1024
    max_experts: int = 64
    max_tokens: int = 256
    max_assignments: int = 1024
    read_ahead_beats: int = 256
    tile_words: int = 64
    quantiser_lanes: int = 2
    address_bits: int = 40
    formats: tuple[str, ...] = field(default_factory=lambda: tuple(FORMATS))
    activations: tuple[str, ...] = field(default_factory=lambda: tuple(ACTIVATIONS))
    router: tuple[str, ...] = ()
    router_top_k: int = TOP_K_MAX
    router_modes: tuple[str, ...] = ()
    y_banks: int = 1
    bias: bool = True
    second_up: bool = False
    results_per_cycle: int = 1
    hidden_banks: int = 1
    buffer_slots: int = 0
    buffer_beats: int = 0

    def __post_init__(self) -> None:
        for name in ("formats", "activations", "router", "router_modes"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))

        def require(field: str, ok: bool, what: str) -> None:
            if not ok:
                raise ConfigurationError(f"{field} must be {what}, not {getattr(self, field)!r}")

        def power(field: str, low: int, high: int) -> None:
            value = getattr(self, field)
            require(
                field,
                isinstance(value, int) and _is_power_of_two(value) and low <= value <= high,
                f"a power of two from {low} to {high}",
            )

        for name in ("bias", "second_up"):
            require(name, isinstance(getattr(self, name), bool), "true or false")
        power("port_bytes", 8, 64)
        power("channels", 1, BLOCK)
        power("row_multipliers", 2, 16)
        power("token_lanes", 2, 64)
        power("token_groups", 1, 64)
        power("max_experts", 2, EXPERTS_MAX)
        power("max_tokens", 1, 1 << 16)
        power("max_assignments", TOP_K_MAX, 1 << 17)
        power("quantiser_lanes", self.port_bytes // 8, self.port_bytes // 2)
        power("y_banks", 1, 2)
        power("results_per_cycle", 1, 2)
        power("hidden_banks", 1, 2)
        require("hidden_banks", self.hidden_banks <= self.y_banks,
                f"at most y_banks = {self.y_banks!r}")
        power("read_ahead_beats", 2 * self.max_burst_beats, 1 << 16)
        require("buffer_slots", isinstance(self.buffer_slots, int)
                and 0 <= self.buffer_slots <= BUFFER_SLOTS_MAX, f"from 0 to {BUFFER_SLOTS_MAX}")
        if self.buffer_slots:
            power("buffer_beats", max(2, self.beats_per_word), 1 << 16)
        require("buffer_beats", bool(self.buffer_slots) or self.buffer_beats == 0,
                "0 without buffer_slots")
        require(
            "max_dim",
            isinstance(self.max_dim, int)
            and self.max_dim % BLOCK == 0
            and 64 <= self.max_dim <= DIM_MAX,
            f"a multiple of 32 from 64 to {DIM_MAX}",
        )
        require("max_experts", not self.router or self.max_experts <= self.max_dim,
                f"at most max_dim = {self.max_dim} with a router, whose outputs are a token's "
                "logits")
        power("tile_words", 16, 1 << 16)
        require(
            "tile_words",
            self.tile_words >= self.max_steps,
            f"at least max_dim / 32 = {self.max_steps}",
        )
        require(
            "address_bits",
            isinstance(self.address_bits, int)
            and 16 <= self.address_bits
            and self.device_address_bits <= 64,
            f"from 16 to {64 - self.channels.bit_length() + 1}",
        )
        for name, registry in (("formats", ALL_FORMATS), ("activations", ACTIVATIONS)):
            chosen = getattr(self, name)
            require(
                name,
                isinstance(chosen, tuple)
                and bool(chosen)
                and len(set(chosen)) == len(chosen)
                and all(one in registry for one in chosen),
                f"a tuple of different ones of {', '.join(registry)}",
            )
        scores = [score.key for score in Score]
        require("router", isinstance(self.router, tuple)
                and len(set(self.router)) == len(self.router)
                and all(one in scores for one in self.router),
                f"a tuple of different ones of {', '.join(scores)}, or empty")
        require("max_assignments", not self.router or self.max_assignments >= 2 * self.max_tokens,
                f"{2 * self.max_tokens} or more with a router, of which a token takes two planes")
        require("router_top_k", isinstance(self.router_top_k, int)
                and 1 <= self.router_top_k <= TOP_K_MAX, f"from 1 to {TOP_K_MAX}")
        require("router_modes", isinstance(self.router_modes, tuple)
                and len(set(self.router_modes)) == len(self.router_modes)
                and all(one in MODES for one in self.router_modes),
                f"a tuple of different ones of {', '.join(MODES)}, or empty")
        require("router_modes", bool(self.router) or not self.router_modes,
                "empty without a router")
        require("router_top_k", "mixer" not in self.router_modes or self.router_top_k >= 2,
                "at least 2 with the mode mixer")
        require("formats", any(f.packed for f in self.weight_formats),
                "with a 4-bit format among them: an array joins the rows of two")

    def replace(self, **changes: object) -> AcceleratorConfig:
        """Return this configuration with some fields changed.

        Raises
        ------
        ConfigurationError
            If there is no such field, or a value is none that it may have.
        """
        names = [field.name for field in dataclasses.fields(self)]
        if unknown := [name for name in changes if name not in names]:
            raise ConfigurationError(
                f"fields of a configuration must be among {', '.join(names)}, not "
                f"{', '.join(unknown)}")
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    # -- shape
    @property
    def multipliers(self) -> int:
        """Multipliers in all arrays: channels x K (32) x row multipliers x token lanes."""
        return self.channels * BLOCK * self.row_multipliers * self.token_lanes

    @property
    def rows(self) -> int:
        """Most rows of a tile: two for each multiplier row in a 4-bit format, one in an 8-bit
        format, times the parts of a multiplier row in an N:M format."""
        return 2 * self.row_multipliers * self.parts

    @property
    def parts(self) -> int:
        """Most parts of a multiplier row that compute rows of their own."""
        return max(f.parts for f in self.weight_formats)

    @property
    def splits(self) -> int:
        """Parts of a multiplier row whose sums are scaled by themselves."""
        return max(self.parts, *(BLOCK // f.group for f in self.weight_formats))

    @property
    def zero_points(self) -> bool:
        """Whether a format has zero points."""
        return any(f.zero_point for f in self.weight_formats)

    @property
    def minima(self) -> bool:
        """Whether a format has minima."""
        return any(f.minimum for f in self.weight_formats)

    @property
    def word_bytes(self) -> int:
        """Bytes of one array word: the weights of one tile for one block of 32, in any format; for
        two in 2-bit formats."""
        return BLOCK * self.row_multipliers

    @property
    def max_steps(self) -> int:
        """Blocks of 32 along the largest K."""
        return self.max_dim // BLOCK

    @property
    def max_slots(self) -> int:
        """Tokens resident in one pass in ``a8`` (half of it in ``a16``)."""
        return self.token_groups * self.token_lanes

    @property
    def slot_banks(self) -> int:
        """Slot tables: passes that are prepared, computed or leave at the same time."""
        return 2 * max(self.y_banks, self.hidden_banks)

    @property
    def result_places(self) -> int:
        """Results of an array that may be under way or waiting behind it."""
        return 4 * max(self.results_per_cycle, self.hidden_banks)

    @property
    def max_burst_beats(self) -> int:
        """Beats of the longest AXI burst: up to one 4 KiB page, at most 64 beats."""
        return min(64, 4096 // self.port_bytes)

    @property
    def beats_per_word(self) -> int:
        """Memory beats of one array word (1 when the port is wider than a word)."""
        return max(1, self.word_bytes // self.port_bytes)

    # -- formats
    @property
    def weight_formats(self) -> tuple[WeightFormat, ...]:
        """The formats that the hardware reads, in the order of their codes."""
        return tuple(f for f in ALL_FORMATS.values() if f.name in self.formats)

    @property
    def format_bits(self) -> int:
        """Bits of a format's code in the hardware."""
        return max(1, *self.format_codes).bit_length()

    @property
    def format_codes(self) -> tuple[int, ...]:
        """Codes of the formats that the hardware reads."""
        return tuple(f.code for f in self.weight_formats)

    # -- activations
    @property
    def expert_activations(self) -> tuple[Activation, ...]:
        """The activations that the hardware computes, in the order of their codes."""
        return tuple(a for a in ACTIVATIONS.values() if a.name in self.activations)

    @property
    def activation_codes(self) -> tuple[int, ...]:
        """Their codes."""
        return tuple(a.code for a in self.expert_activations)

    @property
    def activation_bits(self) -> int:
        """Bits of an activation's code in the hardware."""
        return max(1, *self.activation_codes).bit_length()

    # -- router
    @property
    def router_scores(self) -> tuple[Score, ...]:
        """The scores that the hardware makes of logits, in the order of their codes."""
        return tuple(score for score in Score if score.key in self.router)

    @property
    def router_codes(self) -> tuple[int, ...]:
        """Their codes."""
        return tuple(int(score) for score in self.router_scores)

    @property
    def router_drops(self) -> bool:
        """Whether the router has a mode that drops chosen experts."""
        return any(mode in self.router_modes for mode in ("threshold", "top_p", "capacity"))

    @property
    def selection_codes(self) -> tuple[int, ...]:
        """Codes of what orders a token's experts."""
        return tuple(range(4 if "mixer" in self.router_modes else 3))

    def _of_mode(self, mode: str, most: int) -> int:
        return most if mode in self.router_modes else 0

    @property
    def gates_max(self) -> int:
        """Largest code of gates."""
        return self._of_mode("gates", max(Gates))

    @property
    def threshold_max(self) -> int:
        """Largest ``threshold``, in its units; 0, as of the others, without the mode."""
        return self._of_mode("threshold", 1 << PART_BITS)

    @property
    def top_p_max(self) -> int:
        """Largest ``top_p``, in its units."""
        return self._of_mode("top_p", 1 << PART_BITS)

    @property
    def prior_max(self) -> int:
        """Largest ``prior``, in units of keys."""
        return self._of_mode("prior", (1 << 31) - 1)

    @property
    def prior_keep_max(self) -> int:
        """Largest ``prior_keep``."""
        return self._of_mode("prior", 1)

    @property
    def capacity_max(self) -> int:
        """Largest ``capacity``."""
        return self._of_mode("capacity", (1 << 31) - 1)

    @property
    def capacity_order_max(self) -> int:
        """Largest code of a ``capacity_order``."""
        return self._of_mode("capacity", 1)

    # -- experts
    @property
    def activation_sinks(self) -> tuple[int, ...]:
        """What an entry of the expert table may say of rows that become h: codes of Sink."""
        return (0, 2, 3) if self.second_up else (0, 2)

    @property
    def most_rows_of_h(self) -> int:
        """Most rows of an image for an element of h: gate, up, and another two with second up."""
        return 4 if self.second_up else 2

    @property
    def most_rows(self) -> int:
        """Most rows of a section, on all channels."""
        return self.most_rows_of_h * self.max_dim

    @property
    def bias_codes(self) -> tuple[int, ...]:
        """What an entry of the expert table may say of a section's biases: 1, that there are."""
        return (0, 1) if self.bias else (0,)

    # -- addresses
    @property
    def max_address(self) -> int:
        """Last byte of a channel's memory that an address can name."""
        return (1 << self.address_bits) - 1

    @property
    def device_address_bits(self) -> int:
        """Bits of an address in the whole device: the channel above the address in its memory."""
        return self.address_bits + self.channels.bit_length() - 1

    def device_address(self, channel: int, address: int) -> int:
        """Return the address in the whole device of an address in a channel's memory."""
        return channel << self.address_bits | address

    # -- widths
    @property
    def accumulator_bits(self) -> int:
        """Bits of one plane's accumulator, sign included (docs/arithmetic.md: at most 53 and a
        sign)."""
        growth = (self.max_steps - 1).bit_length()
        block_bits = max(f.scaled_block_bits for f in self.weight_formats)
        return 1 + growth + ACTIVATION_SHIFT_MAX + block_bits

    @property
    def joined_bits(self) -> int:
        """Bits of two joined planes, ``256 * hi + lo``, sign included."""
        return self.accumulator_bits + PLANE_BITS + 1

    @property
    def digest(self) -> int:
        """32-bit digest of all that the hardware depends on: the CONFIG_HASH register.

        Every field but the name, and what the formats and activations mean, in whatever order they
        and the router's scores and modes are named.
        """
        fields = dataclasses.asdict(self)
        del fields["name"]
        fields["formats"] = [
            {a.name: value for a in dataclasses.fields(WeightFormat)
             if (value := getattr(f, a.name)) or a.name != "minimum"}
            for f in self.weight_formats]
        fields["activations"] = [
            {"name": a.name, "code": a.code, "factor": a.factor.value, "up_offset": a.up_offset}
            for a in self.expert_activations]
        fields["router"] = [score.key for score in self.router_scores]
        fields["router_modes"] = [mode for mode in MODES if mode in self.router_modes]
        if not self.router:  # what is not there changes nothing
            del fields["router"], fields["router_top_k"]
        if not self.router_modes:
            del fields["router_modes"]
        if not self.second_up:
            del fields["second_up"]
        if not self.buffer_slots:
            del fields["buffer_slots"], fields["buffer_beats"]
        return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


ROUTER_SCORES = tuple(score.key for score in Score)
"""Every score that a router may make of logits."""

PRESETS: dict[str, AcceleratorConfig] = {
    config.name: config
    for config in (
        AcceleratorConfig(
            name="tiny",
            port_bytes=8,
            token_groups=2,
            max_dim=256,
            max_experts=16,
            max_tokens=64,
            max_assignments=256,
            read_ahead_beats=128,
            tile_words=16,
            quantiser_lanes=2,
        ),
        AcceleratorConfig(
            name="small",
            port_bytes=64,
            token_lanes=4,
            token_groups=8,
            max_dim=1024,
            max_experts=128,
            max_tokens=256,
            max_assignments=2048,
            read_ahead_beats=256,
            tile_words=128,
            quantiser_lanes=8,
            router=ROUTER_SCORES,
        ),
        AcceleratorConfig(
            name="ulx3s",
            # gpt-oss' gate would take a table and an adder of its own.
            activations=("silu", "relu", "gelu", "gelu_tanh", "relu2"),
            port_bytes=8,
            token_groups=4,
            max_dim=2048,
            max_experts=64,
            max_tokens=256,
            max_assignments=1024,
            read_ahead_beats=256,
            tile_words=128,
            quantiser_lanes=2,
            address_bits=32,
        ),
        AcceleratorConfig(
            name="wide512",
            port_bytes=64,
            token_groups=8,
            max_dim=16384,
            max_experts=1024,
            max_tokens=2048,
            max_assignments=16384,
            read_ahead_beats=512,
            tile_words=1024,
            quantiser_lanes=8,
            router=ROUTER_SCORES,
        ),
        # An Alveo U55C: a channel for each pseudo-channel of the HBM. 4-bit weights arrive at half
        # the rate of an array, so two groups of tokens fill it; with four token lanes the arrays
        # alone would need 8,192 of 9,024 DSP slices. The buffer of x is 4,096 blocks deep, as URAM.
        AcceleratorConfig(
            name="hbm32", port_bytes=32, channels=32, token_groups=4, max_dim=16384,
            max_experts=1024, max_tokens=2048, max_assignments=16384, read_ahead_beats=512,
            tile_words=1024, quantiser_lanes=8, address_bits=29, router=ROUTER_SCORES,
        ),
        AcceleratorConfig(
            name="peer256", port_bytes=16, token_lanes=4, token_groups=8, max_dim=4096,
            max_experts=64, max_tokens=1024, max_assignments=4096, read_ahead_beats=512,
            tile_words=256, quantiser_lanes=8, y_banks=2,
        ),
    )
}
"""Named configurations, smallest first."""

# The board with a router fits, routed at 102.6 MHz with seed 1.
PRESETS["ulx3s-router"] = PRESETS["ulx3s"].replace(
    name="ulx3s-router", router=("softmax", "sigmoid"), router_top_k=8)
# One 4-bit and one 8-bit format with 2:4 share its selection network. Left out: a router, whose
# multipliers are more than the 7 that are left then; and 1:4, whose scales take 16 more. It fits as
# mapped by Yosys, and was not routed.
PRESETS["ulx3s-sparse"] = PRESETS["ulx3s"].replace(
    name="ulx3s-sparse", formats=(*FORMATS, "mxint8+2:4", "int4_g32+2:4"))
PRESETS["wide512-sparse"] = PRESETS["wide512"].replace(
    name="wide512-sparse", formats=tuple(ALL_FORMATS))
# All that there is. A slot holds a channel's share of an expert of OLMoE (3,466 beats in int4_g32)
# or Qwen3-30B-A3B (2,602); two of them are 8 UltraRAMs of each channel's.
PRESETS["hbm32-full"] = PRESETS["hbm32"].replace(
    name="hbm32-full", formats=tuple(ALL_FORMATS), router_modes=MODES, second_up=True,
    buffer_slots=2, buffer_beats=4096)


def preset(name: str | AcceleratorConfig) -> AcceleratorConfig:
    """Return the preset of that name (a configuration is returned as it is)."""
    if isinstance(name, AcceleratorConfig):
        return name
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigurationError(f"config must be one of {', '.join(PRESETS)}, not {name!r}")
    return PRESETS[name]
