"""Elements, blocks and lanes for tests of the quantising blocks."""

import numpy as np

from moeaccel.arithmetic import BLOCK, RAISE_THRESHOLD, BlockFloat


def float32_rows(rng, rows, dim):
    """Return float32 rows with all that a quantiser can meet (but no NaN or infinity)."""
    x = rng.standard_normal((rows, dim)).astype(np.float32)
    blocks = x.reshape(rows, dim // BLOCK, BLOCK)
    blocks *= np.exp2(rng.integers(-14, 3, (rows, dim // BLOCK, 1))).astype(np.float32)
    for row in range(rows):
        kind = row % 8
        if kind == 1:  # zero blocks, subnormals, negative zero
            blocks[row, ::2] = 0
            blocks[row, 1, :3] = [1e-40, -0.0, 1e-45]
        elif kind == 2:
            x[row] = 0
        elif kind == 3:  # elements far apart inside a block; ties
            blocks[row] *= np.exp2(rng.integers(-20, 1, blocks[row].shape)).astype(np.float32)
            blocks[row, 0] = np.arange(BLOCK) + 0.5
        elif kind == 4:  # around the threshold at which the exponent is raised
            bits = 0x3F800000 + 0x7EFF00 + rng.integers(-2, 3, blocks[row].shape)
            blocks[row] = bits.astype(np.uint32).view(np.float32)
            blocks[row] *= np.where(rng.random(blocks[row].shape) < 0.5, 1, -1)
            blocks[row] *= np.exp2(rng.integers(-12, 1, (dim // BLOCK, 1))).astype(np.float32)
        elif kind == 5:  # the ends of float32
            blocks[row] = np.float32(3.4e38) * rng.choice([-1, 1], blocks[row].shape)
            blocks[row, -1] = np.float32(1.2e-38)
        elif kind == 6:  # small
            x[row] = np.float32(1.2e-38) * rng.choice([0, 1, -1], dim)
        elif kind == 7:  # 127.5 / 128: carries beyond the mantissa
            x[row] = rng.choice(np.float32([1.999999, -1.99609375, 1.0, 0.0, -1.5]), dim)
    return x


def hidden_rows(rng, rows, dim):
    """Return rows of h, (significands, exponents), with the same extremes."""
    mantissa = rng.integers(1 << 23, 1 << 24, (rows, dim)) * rng.choice([-1, 1], (rows, dim))
    exponent = rng.integers(-3, 3, (rows, dim)) + np.repeat(
        rng.integers(-12, 3, (rows, dim // BLOCK)), BLOCK, axis=1) - 27
    for row in range(rows):
        kind = row % 6
        if kind == 1:
            mantissa[row, : dim // 2] = 0
            mantissa[row, dim - BLOCK:: 3] = 0
        elif kind == 2:
            mantissa[row] = 0
        elif kind == 3:
            mantissa[row] = RAISE_THRESHOLD + rng.integers(-2, 3, dim)
        elif kind == 4:
            exponent[row] += rng.integers(-40, 1, dim) - 300
        elif kind == 5:
            exponent[row] += 300
    return mantissa, np.where(mantissa == 0, 0, exponent)


def lane_writes(config, blocks: BlockFloat, slot_rows, bank=0):
    """Return what a lane buffer holds: {(bank, group, step, lane): (32 mantissas, shift)}.

    ``slot_rows[slot]`` is the row of ``blocks`` in that slot.
    """
    planes = blocks.plane_mantissas()
    expected = {}
    per_group = config.token_lanes // blocks.planes
    for slot, row in enumerate(slot_rows):
        group, j = divmod(slot, per_group)
        for step in range(blocks.shift.shape[1]):
            for p, plane in enumerate(planes):
                mantissas = plane[row, step * BLOCK: (step + 1) * BLOCK].tolist()
                key = (bank, group, step, j * blocks.planes + p)
                expected[key] = (mantissas, int(blocks.shift[row, step]))
    return expected


def lane_value(value):
    """Return (mantissas, shift) of a lane's constant."""
    return [value.mantissas[k] for k in range(BLOCK)], value.shift


def split_address(config, address):
    """Return (bank, group, step) of a lane buffer address."""
    steps = (config.max_steps - 1).bit_length()
    groups = (config.token_groups - 1).bit_length()
    return (
        address >> (steps + groups),
        address >> steps & ((1 << groups) - 1),
        address & ((1 << steps) - 1),
    )


def monitor_lanes(quantiser, config, lanes, bases):
    """Return a process that collects lane writes (``w_*``) and base exponents (``base_*``)."""
    async def process(ctx):
        slot_bits = (config.max_slots - 1).bit_length()
        while True:
            *_, w_en, address, value, base_en, base_address, base = await ctx.tick().sample(
                quantiser.w_en, quantiser.w_address, quantiser.w_data,
                quantiser.base_en, quantiser.base_address, quantiser.base_data)
            for lane in range(config.token_lanes):
                if w_en >> lane & 1:
                    lanes[(*split_address(config, address), lane)] = lane_value(value[lane])
            if base_en:
                bases[divmod(base_address, 1 << slot_bits)] = base
    return process
