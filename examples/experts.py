"""Experts on a device: load them, call them, keep several calls in flight.

    python examples/experts.py           on the golden model
    python examples/experts.py rtl       on the Verilated hardware: the same bits
"""

import sys

import numpy as np

from moeaccel.host import open_device

EXPERTS, D_MODEL, D_EXPERT, TOP_K, TOKENS = 8, 64, 96, 2, 12


def main(spec: str = "golden") -> None:
    """Run one layer, whole and in pieces."""
    rng = np.random.default_rng(1)
    gate_up = rng.standard_normal((EXPERTS, 2 * D_EXPERT, D_MODEL), np.float32) / 8
    down = rng.standard_normal((EXPERTS, D_MODEL, D_EXPERT), np.float32) / 8
    x = rng.standard_normal((TOKENS, D_MODEL), np.float32)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    weights = rng.dirichlet(np.ones(TOP_K), TOKENS).astype(np.float32)

    with open_device(spec, config="tiny") as device:
        experts = device.load_experts(gate_up, down, weight_format="int4_g32", activation_bits=16)
        y = experts(x, ids, weights)
        error = experts.report.relative_error["gate_up"]
        print(f"{spec}: y {y.shape}, gate and up off by {error:.1%} in 4 bits")

        handles = [experts.submit(x[i : i + 4], ids[i : i + 4], weights[i : i + 4])
                   for i in range(0, TOKENS, 4)]
        pieces = np.concatenate([experts.sync(handle) for handle in handles])
        equal = np.array_equal(y, pieces)
        print(f"three commands in flight: bits {'equal' if equal else 'DIFFER'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
