"""What weight formats, activation bits, pruning and mixed bits do to a language model: perplexity,
KL divergence to float, agreement of the likeliest token, beside bytes and decode cycles.

``text`` is what is read; ``experts`` puts experts of any kind into a transformers model (float,
quantised as the device has them, or the device itself) and writes down what they are asked;
``activations`` is the device's block floats in torch; ``measure`` compares logits; ``variants``
names what is measured; ``study`` does it, ``plot`` draws it.

The fast path has the device's operands, integers times scales and block floats, but sums in
float32 and leaves out the rounding of each dot product to 17 bits and the tables: the perplexities
of both differ by less than 0.1 % (tests/host/quality), and ``golden_tokens`` measures it.
"""

from moeaccel.host.quality.study import QualityResult, Study, open_study
from moeaccel.host.quality.variants import Variant, every_variant

__all__ = ["QualityResult", "Study", "Variant", "every_variant", "open_study"]
