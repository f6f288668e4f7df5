"""The whole accelerator with the vendors' multiplier blocks gives the same bits."""

import numpy as np
import pytest

from moeaccel.formats import FORMATS
from moeaccel.hdl.array.multiplier import FAMILIES
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import MEMORY_BYTES, draw_experts


@pytest.mark.slow  # builds a model for each family
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "generic"])
def test_bits_do_not_depend_on_the_family(pair_of, family):
    """Every format in both precisions, with random stalls of memory and registers."""
    rng = np.random.default_rng(5)
    memory = MemoryModel(size=MEMORY_BYTES, stalls=StallModel.uniform(0.2), seed=2)
    with pair_of("tiny", family=family, memory=memory) as pair:
        for name in FORMATS:
            for bits in (8, 16):
                gate_up, down = draw_experts(rng, 4, 96, 64, spread=5)
                x = rng.standard_normal((9, 96), np.float32) * np.exp(rng.standard_normal((9, 1)))
                ids = rng.integers(0, 4, (9, 2))
                weights = rng.random((9, 2), np.float32)

                def call(device, name=name, bits=bits, gate_up=gate_up, down=down, x=x, ids=ids,
                         weights=weights):
                    with device.load_experts(gate_up, down, weight_format=name,
                                             activation_bits=bits) as experts:
                        return experts(x.astype(np.float32), ids, weights)

                assert pair.same(call).any()
        pair.check()
