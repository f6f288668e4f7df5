"""A call on the RTL is interrupted anywhere in driver and co-simulation: the next one works."""

import gc

import numpy as np

from tests.support.interrupts import Interrupter, lines_of
from tests.support.pair import assert_same_bits, draw_experts


def test_a_call_interrupted_anywhere(pair_of):
    """Every 61st line, with a ring that has room for one command and calls of two."""
    rng = np.random.default_rng(3)
    gate_up, down = draw_experts(rng, 2, 32, 32)
    call, other = (
        (rng.standard_normal((n, 32)).astype(np.float32), rng.integers(0, 2, (n, 2)),
         rng.random((n, 2)).astype(np.float32)) for n in (65, 1))
    with pair_of("tiny", ring_log2=1) as pair:
        device = pair.rtl
        experts = device.load_experts(gate_up, down)
        golden = pair.golden.load_experts(gate_up, down)
        expected, expected_other = golden(*call), golden(*other)
        assert_same_bits(experts(*call), expected)
        experts._looks = False  # at x, in some calls only: then all have the same lines
        gc.collect()
        free, lines = device.memory.free_bytes, lines_of(lambda: experts(*call))
        places = []
        for at in range(0, lines, 61):
            with Interrupter(at) as interrupter:
                experts(*call)
            assert_same_bits(experts(*other), expected_other)
            device.fence()
            assert device.memory.free_bytes == free, interrupter.where
            places.append(interrupter.where)
        # Which side of the rings a call is on, and so its lines, differs: the last may be behind.
        assert None not in places[:-1]
        assert_same_bits(experts(*call), expected)
