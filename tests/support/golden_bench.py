"""The golden device without a driver: layers, tables and commands laid out by hand."""

import numpy as np

from moeaccel.config import PRESETS
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.image import Expert, LinearShape, build_image, build_linear_image, table_entry
from moeaccel.interface.commands import (
    COMPLETION,
    EXPERT,
    LAYER,
    SUBMISSION,
    Opcode,
    decode,
    encode,
)
from moeaccel.interface.registers import COUNTERS, REGISTERS

TINY = PRESETS["tiny"]
SQ, CQ, FREE = 0x1000, 0x2000, 0x3000


class GoldenBench:
    """A golden device whose memory is handed out from the bottom, never given back."""

    def __init__(self, config=TINY, memory_bytes=1 << 22, **options):
        self.config = config
        self.device = GoldenTransport(config, memory_bytes=memory_bytes, **options)
        self.free = FREE
        self.tail = 0
        self.write(SQ_BASE_LO=SQ, CQ_BASE_LO=CQ, RING_LOG2=4, WINDOW_LIMIT_LO=memory_bytes,
                   ENABLE=1)

    def write(self, **values):
        for name, value in values.items():
            self.device.register_write(REGISTERS[name].address, value)

    def place(self, data):
        """Return the address of bytes, or of an array."""
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else (
            np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        address = self.free
        self.free += -(-raw.size // 4096) * 4096
        self.device.memory_write(address, raw)
        return address

    def place_weights(self, weights):
        """Place an expert's or a matrix's image, and return its entry's fields."""
        config = self.config
        array = config.row_multipliers, config.channels
        if isinstance(weights, Expert):
            shape = weights.filled().shape(*array)
            build, matrices = build_image, (weights.gate_up, weights.down)
        else:
            shape = LinearShape(weights.format, *weights.integers.shape, *array,
                                weights.bias is not None)
            build, matrices = build_linear_image, (weights,)
        parts = [build(*matrices, config.row_multipliers, channel=c, channels=config.channels)
                 for c in range(config.channels)]
        address = self.free
        self.free += shape.memory_bytes
        for channel, part in enumerate(parts):
            self.device.memory_write(config.device_address(channel, address), part)
        return table_entry(shape, address + shape.header_bytes)

    def layer(self, experts, *, planes=2, grid_exponent=-28, **changes):
        """Return a new layer of experts and matrices; ``changes`` of its descriptor."""
        return Layer(self, experts, planes, grid_exponent, changes)

    def run(self, layer, x, ids=None, weights=None, **changes):
        """Run a command, EXPERTS if there are ids; return completion, counters, y."""
        tokens, d_out = len(x), layer.fields["d_out"]
        fields = {"opcode": Opcode.GEMM if ids is None else Opcode.EXPERTS, "tokens": tokens,
                  "top_k": 1 if ids is None else ids.shape[1], "tag": 7,
                  "layer_address": layer.address, "x_address": self.place(x.astype("<f4"))}
        if ids is not None:
            fields["ids_address"] = self.place(np.asarray(ids).astype("<i4"))
            fields["weights_address"] = self.place(weights.astype("<f4"))
        fields["y_address"] = self.place(np.full((tokens, d_out), np.nan, "<f4"))
        fields["workspace_address"] = self.place(np.full((tokens, d_out), -1, "<i8"))
        return self.submit(fields | changes, (tokens, d_out))

    def submit(self, fields, shape):
        """Run a submission; y has that shape."""
        self.device.memory_write(SQ + 64 * self.tail, encode(SUBMISSION, fields))
        entry = CQ + 64 * self.tail
        before = self.counters()
        self.tail = (self.tail + 1) % 16
        self.write(CQ_HEAD=(self.tail - 1) % 16, SQ_TAIL=self.tail)
        after = self.counters()
        completion = decode(COMPLETION, self.device.memory_read(entry, 64).tobytes())
        raw = self.device.memory_read(fields["y_address"], 4 * shape[0] * shape[1])
        return (completion, {name: after[name] - before[name] for name in after},
                raw.view("<f4").reshape(shape))

    def counters(self):
        return {name: self.device.register_read(REGISTERS[f"{name.upper()}_LO"].address)
                for name, _ in COUNTERS}


class Layer:
    """A layer descriptor and its table; entries may be changed."""

    def __init__(self, bench, experts, planes, grid_exponent, changes):
        self.bench, self.experts = bench, experts
        self.entries = [bench.place_weights(weights) for weights in experts]
        first = experts[0]
        d_out, d_in = (first.integers.shape if not isinstance(first, Expert) else
                       (first.down.integers.shape[0], first.gate_up.integers.shape[1]))
        self.table = bench.place(bytes(64 * len(experts)))
        self.fields = {"planes": planes, "num_experts": len(experts), "d_in": d_in, "d_out": d_out,
                       "grid_exponent": grid_exponent, "table_address": self.table} | changes
        self.address = bench.place(encode(LAYER, self.fields))
        for index in range(len(experts)):
            self.change(index)

    def change(self, index, **changes):
        """Write an entry, with some fields changed."""
        entry = encode(EXPERT, self.entries[index] | changes)
        self.bench.device.memory_write(self.table + 64 * index, entry)
