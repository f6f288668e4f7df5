"""Routing traces: recorded, imported or generated; what policies and simulators are fed with.

A trace is a safetensors file of five tensors, T tokens in the order in which they were computed:

=============  ===================  ================================================================
tensor         type, shape          what
=============  ===================  ================================================================
``ids``        int16 or int32       experts of each token and layer; -1: slot not used
               (T, layers, top_k)
``weights``    float16 or float32   what each expert's output was multiplied with; may be missing
               (T, layers, top_k)
``request``    int32 (T,)           which request the token belongs to
``position``   int32 (T,)           where in the request
``step``       int32 (T,)           forward pass that computed it; does not descend
=============  ===================  ================================================================

The header's texts are ``format`` ("moeaccel.routing_trace"), ``version`` ("1"), ``model``,
``experts``, ``top_k``, ``layers`` (a JSON list: the number in the model of each layer in the file)
and ``source``. Ids are int16 up to 32,768 experts. Nothing is pickled.

A popularity profile ("moeaccel.popularity_profile") has one tensor, ``counts``, int64
(layers, experts), and the texts ``model``, ``layers`` and ``source``.
"""

from moeaccel.host.traces.errors import (
    ForeignTrace,
    InvalidTrace,
    TornTrace,
    TraceError,
    UnknownPreset,
)
from moeaccel.host.traces.popularity import PopularityProfile
from moeaccel.host.traces.trace import RoutingTrace, Step

__all__ = ["ForeignTrace", "InvalidTrace", "PopularityProfile", "RoutingTrace", "Step", "TornTrace",
           "TraceError", "UnknownPreset"]
