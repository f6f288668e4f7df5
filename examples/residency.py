"""A routing trace, generated with a published model's locality, replayed through cache policies.

    python examples/residency.py [MODEL]

Which share of the experts that a step of decode uses is still in fast memory, when that has room
for a quarter or half of each layer's experts? ``moeaccel trace`` makes, imports and records traces,
too.
"""

import sys

from moeaccel.host.policies.residency import LFU, LRU, Belady, DecayedLFU, replay
from moeaccel.host.traces.presets import generate, preset


def main(model: str = "mixtral-8x7b") -> None:
    """Print the hit rate of each policy."""
    shape = preset(model)
    trace = generate(model, requests=2, tokens=48, prompt=16, seed=5)
    steps = list(trace.uses("decode"))
    layers, experts = steps[0].shape
    print(f"{shape.name}: {len(steps)} steps of decode, {layers} layers of {experts} experts")
    for slots in (experts // 4, experts // 2):
        size = {"n_layers": layers, "n_experts": experts, "slots": slots}
        policies = {"LRU": LRU(**size), "LFU": LFU(**size), "decayed LFU": DecayedLFU(**size),
                    "Belady, who knows the future": Belady(future=steps, slots=slots)}
        rates = {name: replay(policy, steps).hit_rate for name, policy in policies.items()}
        print(f"   {slots} slots: " + ", ".join(f"{n} {r:.1%}" for n, r in rates.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
