"""Where the cycles of a command go, from the device's counters: decode and a batch.

    python examples/counters.py          on the golden model, which fills the counters when asked
    python examples/counters.py rtl      on the Verilated hardware
"""

import sys

import numpy as np

from moeaccel.host import open_device

TIMES = ("busy", "starved_weights", "starved_activations", "stalled_output", "idle")
EXPERTS, D_MODEL, D_EXPERT, TOP_K = 8, 128, 128, 2


def main(spec: str = "golden") -> None:
    """Run one token, then sixteen, and set their counters side by side."""
    rng = np.random.default_rng(4)
    gate_up = rng.standard_normal((EXPERTS, 2 * D_EXPERT, D_MODEL), np.float32) / 8
    down = rng.standard_normal((EXPERTS, D_MODEL, D_EXPERT), np.float32) / 8
    options = {"timing": True} if spec == "golden" else {}

    with open_device(spec, config="tiny", **options) as device:
        experts = device.load_experts(gate_up, down, weight_format="int4_g32", activation_bits=8)
        for tokens in (1, 16):
            x = rng.standard_normal((tokens, D_MODEL), np.float32)
            ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
            before = device.counters()
            experts(x, ids, np.full(ids.shape, 0.5, np.float32))
            now = {name: count - before[name] for name, count in device.counters().items()}
            share = now["bytes_read_weights"] / device.config.port_bytes / device.last_cycles
            print(f"{tokens} token(s): {device.last_cycles:,} cycles, {now['expert_passes']} "
                  f"passes, weights take {share:.0%} of the port")
            total = sum(now[name] for name in TIMES)
            print("   " + ", ".join(f"{name} {now[name] / total:.0%}" for name in TIMES))


if __name__ == "__main__":
    main(*sys.argv[1:])
