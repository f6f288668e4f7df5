"""A layer whose experts differ: in weight format, in that of down alone, and in width.

    python examples/mixed_layer.py

Expert 0, which most tokens want, keeps 8 bits; expert 1 has 4-bit gate and up rows before an 8-bit
down matrix; the others are 4-bit, the last one pruned to half its width.
"""

import sys

import numpy as np

from moeaccel.host import open_device
from moeaccel.image import Expert

D_MODEL, D_EXPERT = 64, 128


def main(spec: str = "golden") -> None:
    """Load such a layer and compare it with what each expert says alone."""
    rng = np.random.default_rng(2)

    def expert(name: str, down_format: str | None = None, width: int = D_EXPERT) -> Expert:
        gate_up = rng.standard_normal((2 * width, D_MODEL), np.float32) / 8
        down = rng.standard_normal((D_MODEL, width), np.float32) / 8
        return Expert.quantise(gate_up, down, name, down_format=down_format)

    layer = [expert("mxint8"), expert("int4_g32", "mxint8"), expert("mxfp4"),
             expert("int4_g128", width=D_EXPERT // 2)]
    x = rng.standard_normal((6, D_MODEL), np.float32)

    with open_device(spec, config="tiny") as device:
        mixed = device.load_quantised(layer, grid_exponent=-30)
        for e, shape in enumerate(mixed.shapes):
            ids, weights = np.full((6, 1), e), np.ones((6, 1), np.float32)
            y = mixed(x, ids, weights)
            alone = device.load_quantised([layer[e]], grid_exponent=-30)(x, ids * 0, weights)
            formats = " then ".join(section.format.name for section in shape.sections)
            print(f"expert {e}: {formats}, d_expert {shape.d_expert}, {shape.stored_bytes:,} "
                  f"bytes, as it is alone: {'yes' if np.array_equal(y, alone) else 'NO'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
