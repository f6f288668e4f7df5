"""Cases for the RTL beside the golden model: calls of layers, and how memory behaves meanwhile.

A case is data: drawn from a seed, printed as JSON, read back, and made smaller when it fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeaccel.activations import ACTIVATIONS
from moeaccel.config import DIM_MAX, EXPERTS_MAX, PRESETS, AcceleratorConfig
from moeaccel.cycles import Prediction, predict_experts, predict_linear
from moeaccel.formats import ALL_FORMATS, FORMATS, weight_format
from moeaccel.image import ExpertShape, Section
from moeaccel.interface.commands import GRID_EXPONENTS
from moeaccel.sim.cosim.memory import CHANNELS, MemoryModel, StallModel
from moeaccel.sim.errors import SimulationError
from moeaccel.sim.routed import Routed, draw_routed

MEMORY_BYTES = 1 << 24
PROMPT = MemoryModel(size=MEMORY_BYTES, read_latency=1, write_latency=1, check_unwritten=True)
"""Memory that answers as soon as it may."""

HARD_RESETS = ("hard reset", "hard reset with memory")
ENDS = ("", "abort", "reset", *HARD_RESETS)
"""The simplest first. By its reset pin the device forgets everything; its memory goes on and
answers what was in flight, unless it is reset, too."""

_LEAST_BUDGET = 1000


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What experts of one layer may differ in.

    Parameters
    ----------
    weight_format, down_format : str
        Of gate and up, and of down.
    d_expert : int
    activation : str
    gated : bool
    limit : float, optional
    biases : int
        1: of gate and up rows; 2: of down rows; 3: of both.
    """

    weight_format: str = "int4_g32"
    down_format: str = "int4_g32"
    d_expert: int = 32
    activation: str = "silu"
    gated: bool = True
    limit: float | None = None
    biases: int = 0

    def __post_init__(self) -> None:
        _check_whole("d_expert", self.d_expert, 1, DIM_MAX)
        _check_whole("biases", self.biases, 0, 3)
        for name, registry in (("weight_format", ALL_FORMATS), ("down_format", ALL_FORMATS),
                               ("activation", ACTIVATIONS)):
            if getattr(self, name) not in registry:
                raise ValueError(f"{name} must be one of {', '.join(registry)}, not "
                                 f"{getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One command, and its layer.

    Parameters
    ----------
    d_in, d_other : int
        d_model and d_expert; of a matrix its columns and rows.
    experts : int
        Of the layer; 0: a matrix (GEMM).
    ids : tuple of tuple of int
        Experts of each token; of a matrix, and where the device routes, an empty tuple for each.
    routed : Routed, optional
        How the device routes (MOE, ROUTE).
    weight_format : str
    kinds : tuple of Kind
        Of the experts, in turn, instead of ``d_other`` and ``weight_format``; empty: all alike.
    activation_bits : int
    grid_exponent : int
    nan : int
        Token whose x has a NaN; -1: none.
    end : {"", "abort", "reset", "hard reset", "hard reset with memory"}
        What happens ``after`` so many cycles to this command and what is in flight with it.
    after : int
    """

    d_in: int = 32
    d_other: int = 32
    experts: int = 1
    ids: tuple[tuple[int, ...], ...] = ((0,),)
    weight_format: str = "int4_g32"
    kinds: tuple[Kind, ...] = ()
    routed: Routed | None = None
    activation_bits: int = 8
    grid_exponent: int = -24
    nan: int = -1
    end: str = ""
    after: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("d_in", 1, DIM_MAX), ("d_other", 1, DIM_MAX),
                                  ("experts", 0, EXPERTS_MAX), ("nan", -1, 1 << 31),
                                  ("grid_exponent", GRID_EXPONENTS[0], GRID_EXPONENTS[-1]),
                                  ("after", 0, 1 << 31)):
            _check_whole(name, getattr(self, name), least, most)
        if self.weight_format not in ALL_FORMATS or self.activation_bits not in (8, 16):
            raise ValueError(
                f"weight_format must be one of {', '.join(ALL_FORMATS)} and activation_bits 8 or "
                f"16, not {self.weight_format!r} and {self.activation_bits!r}")
        for expert in (expert for row in self.ids for expert in row):
            _check_whole("expert", expert, -(1 << 31), (1 << 31) - 1)
        if self.end not in ENDS:
            raise ValueError(f"end must be one of {', '.join(map(repr, ENDS))}, not {self.end!r}")
        if not self.ids or len({len(row) for row in self.ids}) != 1:
            raise ValueError(f"ids must be rows of equal length, not {self.ids!r}")
        if self.routed is not None:
            self.routed.settings(self.experts)
            if self.ids[0]:
                raise ValueError(
                    f"ids must be empty rows where the device routes, not {self.ids!r}")

    @property
    def every_expert(self) -> range:
        """The experts of the layer, with shared ones."""
        return range(self.experts + (0 if self.routed is None else self.routed.shared))

    def kind_of(self, expert: int) -> Kind:
        """Return what an expert is like."""
        if self.kinds:
            return self.kinds[expert % len(self.kinds)]
        return Kind(weight_format=self.weight_format, down_format=self.weight_format,
                    d_expert=self.d_other)

    def predict(self, config: AcceleratorConfig) -> Prediction:
        """Return what the cycle model says."""
        array = config.row_multipliers, config.channels
        planes = self.activation_bits // 8
        if not self.experts:
            section = Section(weight_format(self.weight_format), self.d_other, self.d_in, *array)
            return predict_linear(config, section, len(self.ids), planes=planes)
        shapes = [ExpertShape(
            weight_format(kind.weight_format), self.d_in, kind.d_expert, *array,
            down_format=weight_format(kind.down_format), activation=kind.activation,
            gated=kind.gated, limit=kind.limit, gate_up_biased=bool(kind.biases & 1),
            down_biased=bool(kind.biases & 2))
            for kind in map(self.kind_of, self.every_expert)]
        if self.routed is not None:
            return self.routed.predict(config, shapes, experts=self.experts, tokens=len(self.ids),
                                       d_in=self.d_in, planes=planes)
        return predict_experts(config, shapes, np.array(self.ids), self.experts, planes=planes)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Calls that are in flight together, and the memory of each channel.

    Parameters
    ----------
    config : str
        Name of a preset.
    channels : int
        Memory channels, instead of the preset's.
    seed : int
        Of weights and x.
    calls : tuple of Call
    memories : tuple of MemoryModel
        One for each channel.
    """

    config: str = "tiny"
    channels: int = 1
    seed: int = 0
    calls: tuple[Call, ...] = (Call(),)
    memories: tuple[MemoryModel, ...] = (PROMPT,)

    def __post_init__(self) -> None:
        if self.config not in PRESETS:
            raise ValueError(f"config must be one of {', '.join(PRESETS)}, not {self.config!r}")
        _check_whole("seed", self.seed, 0, (1 << 64) - 1)
        _check_whole("channels", self.channels, 1, 32)
        if not self.calls or len(self.memories) != self.channels:
            raise ValueError(f"case must have calls and a memory for each of {self.channels} "
                             f"channels, not {len(self.calls)} and {len(self.memories)}")
        limits = self.parameters
        for call in self.calls:
            _check_whole("d_in", call.d_in, 1, limits.max_dim)
            _check_whole("d_other", call.d_other, 1, limits.max_dim)
            for kind in call.kinds:
                _check_whole("d_expert", kind.d_expert, 1, limits.max_dim)
            _check_whole("experts", call.experts, 0, limits.max_experts)

    @property
    def parameters(self) -> AcceleratorConfig:
        """The configuration."""
        return channels_of(self.config, self.channels)

    def to_json(self) -> str:
        """Return one line: what differs from the defaults, and memories from :data:`PROMPT`."""
        fields = _differences(self, Case())
        fields["calls"] = [_differences(call, Call()) for call in self.calls]
        fields["memories"] = [_differences(memory, PROMPT) for memory in self.memories]
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Return the case of a line.

        Raises
        ------
        SimulationError
            If it is none.
        """
        try:
            fields = json.loads(text)
            calls = [Call(**_call_fields(call)) for call in fields.pop("calls")]
            memories = [replace(PROMPT, **memory | (
                {"stalls": StallModel(**memory["stalls"])} if "stalls" in memory else {}))
                for memory in fields.pop("memories")]
            return cls(calls=tuple(calls), memories=tuple(memories), **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SimulationError(
                f"case must be a line that `moeaccel soak` has printed, not {text[:80]!r}: {error}"
            ) from error


def _call_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a call as they were before JSON."""
    made = dict(fields)
    if "ids" in fields:
        made["ids"] = tuple(map(tuple, fields["ids"]))
    if "kinds" in fields:
        made["kinds"] = tuple(Kind(**kind) for kind in fields["kinds"])
    if "routed" in fields:
        made["routed"] = Routed(**fields["routed"])
    return made


def channels_of(config: str, channels: int) -> AcceleratorConfig:
    """Return a preset with so many memory channels."""
    found = PRESETS[config]
    if channels != found.channels:
        found = found.replace(name=f"{config}, {channels} channels", channels=channels)
    return found


def _differences(value: Any, default: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from another's, as plain values."""
    found = {}
    for field in dataclasses.fields(value):
        one, other = getattr(value, field.name), getattr(default, field.name)
        if one != other:
            found[field.name] = (
                _differences(one, Routed()) if field.name == "routed"
                else _differences(one, other) if dataclasses.is_dataclass(one)
                else [_differences(kind, Kind()) for kind in one] if field.name == "kinds"
                else one)
    return found


# -- drawing ---------------------------------------------------------------------------------------
def draw_case(seed: int, config: str, channels: int, *, budget: int) -> Case:
    """Draw a case that takes about ``budget`` cycles at most; every seed is another one."""
    draw = random.Random(f"{seed} {config} {channels}")
    limits = channels_of(config, channels)
    calls = [draw_call(draw, limits, least=budget // 20)
             for _ in range(draw.choice((1, 1, 2, 3, 5)))]
    if len(calls) > 1 and draw.random() < 0.3:
        at = draw.randrange(len(calls) - 1)
        calls[at] = replace(calls[at], end=draw.choice(ENDS[1:]),
                            after=round(10 ** draw.uniform(0.5, 4.5)))
    work = sum((call.predict(limits) for call in calls), Prediction())
    slow = [afford(MemoryModel.adversarial(draw.getrandbits(32), size=MEMORY_BYTES), limits, work,
                   budget=budget) for _ in range(channels)]
    kind = draw.choice(("all", "one", "each")) if channels > 1 else "all"
    if kind == "all":
        slow = slow[:1] * channels
    elif kind == "one":
        one = draw.randrange(channels)
        slow = [memory if i == one else PROMPT for i, memory in enumerate(slow)]
    memories = tuple(replace(memory, check_unwritten=True) for memory in slow)
    return Case(config=config, channels=channels, seed=seed, calls=tuple(calls), memories=memories)


def draw_call(draw: random.Random, limits: AcceleratorConfig, *, least: int) -> Call:
    """Draw a command that takes about ``least`` cycles at most where memory is prompt."""
    bits = draw.choice((8, 16))
    groups = limits.token_lanes * 8 // bits
    slots = limits.max_slots * 8 // bits
    tokens = draw.choice((1, 2, 3, groups, groups + 1, slots, slots + 1, 2 * slots + 3))
    experts = draw.choice((0, 1, 1, 2, 3, 5))
    top_k = draw.choice((1, 1, 2, 3, 4))
    call = Call(
        d_in=32 * draw.choice((1, 1, 2, 3, 5)), d_other=32 * draw.choice((1, 1, 2, 3, 5)),
        experts=experts, ids=((),) * tokens, weight_format=draw.choice(list(FORMATS)),
        activation_bits=bits, grid_exponent=draw.choice((-24,) * 9 + (-60,)))
    if experts:
        call = replace(call, ids=_draw_ids(draw, tokens, top_k, experts))
    if experts and draw.random() < 0.5:
        call = replace(call, kinds=tuple(_draw_kind(draw) for _ in range(draw.choice((1, 2, 3)))))
    if experts and limits.router and draw.random() < 0.4:
        call = replace(call, ids=((),) * tokens, **draw_routed(draw, limits))
    if draw.random() < 0.05:
        call = replace(call, nan=draw.randrange(tokens))
    while call.predict(limits).cycles > max(least, _LEAST_BUDGET):  # large in one way at a time
        if call.d_in * max(call.kind_of(e).d_expert for e in range(call.experts or 1)) > 1024:
            call = replace(call, d_in=_half(call.d_in), d_other=_half(call.d_other), kinds=tuple(
                replace(kind, d_expert=_half(kind.d_expert)) for kind in call.kinds))
        elif len(call.ids) > 1:
            call = replace(call, ids=call.ids[: len(call.ids) // 2], nan=-1)
        else:
            break
    return call


def _half(dim: int) -> int:
    """Return about half of a dimension, in whole blocks."""
    return max(32, dim // 64 * 32)


def _draw_kind(draw: random.Random) -> Kind:
    return Kind(
        weight_format=draw.choice(list(FORMATS)), down_format=draw.choice(list(FORMATS)),
        d_expert=32 * draw.choice((1, 1, 2, 3, 5)), activation=draw.choice(list(ACTIVATIONS)),
        gated=draw.random() < 0.6, limit=draw.choice((None, None, 0.75)),
        biases=draw.choice((0, 0, 1, 2, 3)))


def _draw_ids(draw: random.Random, tokens: int, top_k: int, experts: int
              ) -> tuple[tuple[int, ...], ...]:
    """Draw experts of tokens: free, repeated, the same for all; some out of range; some none."""
    kind = draw.choice(("free", "free", "repeated", "same for all"))
    rows = [[draw.randrange(experts) for _ in range(top_k)] for _ in range(tokens)]
    if kind == "repeated":
        rows = [row[:1] * top_k for row in rows]
    elif kind == "same for all":
        rows = rows[:1] * tokens
    outside, none = draw.choice((0, 0, 0.2)), draw.choice((0, 0.3, 0.6))
    return tuple(
        tuple(-1 if without else draw.choice((-1, experts, experts + 3))
              if draw.random() < outside else expert for expert in row)
        for row in rows for without in [draw.random() < none])


def afford(memory: MemoryModel, limits: AcceleratorConfig, work: Prediction, *, budget: int
           ) -> MemoryModel:
    """Return a memory that is as slow as about ``budget`` cycles for so much work allow.

    What costs most is made half as slow, until it fits.
    """
    reads = (work.bytes_read_weights // limits.channels + work.bytes_read_other) / limits.port_bytes
    writes = work.bytes_written / limits.port_bytes
    bursts = {"ar": reads / 8 + 4, "aw": writes / 8 + 2}
    events = bursts | {"r": reads, "w": writes, "b": bursts["aw"]}
    while True:
        pause = (memory.stalls.length + 1) / 2
        chances = {name: getattr(memory.stalls, name) for name in CHANNELS}
        costs = {name: events[name] * pause * p / (1 - p) for name, p in chances.items()}
        costs["read_latency"] = memory.read_latency * bursts["ar"]
        costs["write_latency"] = memory.write_latency * bursts["aw"]
        costs["read_latency_most"] = memory.read_latency_most * bursts["ar"] / 4
        costs["write_latency_most"] = memory.write_latency_most * bursts["aw"] / 4
        costs["last_beat_delay"] = memory.last_beat_delay * bursts["ar"]
        worst = max(costs, key=lambda name: costs[name])
        if sum(costs.values()) <= budget:
            return memory
        memory = _gentler(memory, worst)


def _gentler(memory: MemoryModel, name: str) -> MemoryModel:
    """Return a memory that is half as slow in one way."""
    if name not in CHANNELS:
        least = 1 if name in ("read_latency", "write_latency") else 0
        return replace(memory, **{name: max(least, getattr(memory, name) // 2)})
    stalls = memory.stalls
    if stalls.length > 1:
        return replace(memory, stalls=replace(stalls, length=stalls.length // 2))
    chance = getattr(stalls, name)
    return replace(memory, stalls=replace(stalls, **{name: chance / (2 - chance)}))


# -- making a case smaller -------------------------------------------------------------------------
def smaller(case: Case) -> Iterator[Case]:
    """Yield cases that are simpler in one way each, the largest steps first."""
    def with_call(at: int, **changes: Any) -> Case:
        call = replace(case.calls[at], **changes)
        return replace(case, calls=(*case.calls[:at], call, *case.calls[at + 1 :]))

    def with_memory(at: int, memory: MemoryModel) -> Case:
        return replace(case, memories=(*case.memories[:at], memory, *case.memories[at + 1 :]))

    if len(case.calls) > 1:
        for at in range(len(case.calls)):
            yield replace(case, calls=case.calls[:at] + case.calls[at + 1 :])
    if case.channels > 1:
        for memory in dict.fromkeys(case.memories):
            yield replace(case, channels=1, memories=(memory,))
    for at, memory in enumerate(case.memories):
        if memory != PROMPT:
            yield with_memory(at, PROMPT)
    if case.config != "tiny":
        with contextlib.suppress(ValueError):  # it may be too small
            yield replace(case, config="tiny")
    for at, call in enumerate(case.calls):
        for change in _simpler_calls(call):
            with contextlib.suppress(ValueError):  # a router that there is not
                yield with_call(at, **change)
    for at, memory in enumerate(case.memories):
        yield from (with_memory(at, simpler) for simpler in _simpler_memories(memory))


def _simpler_calls(call: Call) -> Iterator[dict[str, Any]]:
    plain = Call()
    if call.routed is not None:
        yield {"routed": None, "ids": ((0,),) * len(call.ids)}
        for name, value in dataclasses.asdict(Routed()).items():
            if getattr(call.routed, name) != value:
                yield {"routed": replace(call.routed, **{name: value})}
    for end in ENDS[: ENDS.index(call.end)]:
        yield {"end": end, "after": call.after if end else 0}
    for name in ("nan", "grid_exponent", "kinds", "weight_format", "activation_bits", "d_in",
                 "d_other"):
        if getattr(call, name) != getattr(plain, name):
            yield {name: getattr(plain, name)}
    for name in ("d_in", "d_other"):
        if getattr(call, name) > 64:
            yield {name: getattr(call, name) // 64 * 32}
    for at, kind in enumerate(call.kinds):
        before, behind = call.kinds[:at], call.kinds[at + 1 :]
        if before or behind:
            yield {"kinds": before + behind}
        for name, value in dataclasses.asdict(Kind()).items():
            if getattr(kind, name) != value:
                yield {"kinds": (*before, replace(kind, **{name: value}), *behind)}
        if kind.d_expert > 64:
            yield {"kinds": (*before, replace(kind, d_expert=_half(kind.d_expert)), *behind)}
    ids = call.ids
    span = len(ids) // 2
    while span:
        for begin in range(0, len(ids), span):
            left = ids[:begin] + ids[begin + span :]
            if left and not begin <= call.nan < begin + span:
                yield {"ids": left, "nan": call.nan - span * (call.nan >= begin + span)}
        span //= 2
    for k in range(len(ids[0]) if len(ids[0]) > 1 else 0):
        yield {"ids": tuple(row[:k] + row[k + 1 :] for row in ids)}
    if call.experts > 1 and call.routed is not None:
        yield {"experts": call.experts // 2}
        yield {"experts": call.experts - 1}
    elif call.experts > 1:
        yield {"experts": call.experts - 1,
               "ids": tuple(tuple(min(i, call.experts - 2) for i in row) for row in ids)}
    if call.after > 1:
        yield {"after": call.after // 2}


def _simpler_memories(memory: MemoryModel) -> Iterator[MemoryModel]:
    stalls = memory.stalls
    for name in CHANNELS:
        if getattr(stalls, name):
            yield replace(memory, stalls=replace(stalls, **{name: 0.0}))
    if stalls.length > 1:
        yield replace(memory, stalls=replace(stalls, length=stalls.length // 2))
    if memory.read_latency_most or memory.write_latency_most:
        yield replace(memory, read_latency_most=0, write_latency_most=0,
                      read_latency=max(memory.read_latency, memory.read_latency_most),
                      write_latency=max(memory.write_latency, memory.write_latency_most))
    for field in dataclasses.fields(memory):
        value, plain = getattr(memory, field.name), getattr(PROMPT, field.name)
        if field.name in ("stalls", "seed") or value == plain:
            continue
        yield replace(memory, **{field.name: plain})
        if field.name.endswith(("latency", "most", "delay")) and value // 2 > plain:
            yield replace(memory, **{field.name: value // 2})


def shrink(case: Case, fails: Callable[[Case], str | None]) -> Iterator[tuple[Case, str]]:
    """Yield ever simpler cases that fail, and how; the last has none that is simpler and fails.

    Parameters
    ----------
    case : Case
        One that fails.
    fails : callable
        How a case fails, or None; it ends the search by saying None.
    """
    found: Case | None = case
    while found is not None:
        case, found = found, None
        for other in smaller(case):
            what = fails(other)
            if what is not None:
                yield other, what
                found = other
                break
