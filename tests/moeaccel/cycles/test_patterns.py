"""What N:M patterns save, of a published layer, by the cycle model (which the RTL's tests hold)."""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.cycles import predict_experts
from moeaccel.formats import weight_format
from moeaccel.host.benchmark import routing
from moeaccel.image import ExpertShape
from moeaccel.zoo import model

OLMOE = model("olmoe-1b-7b")
DENSE = ("mxint8", "int4_g32")


def predict(name, tokens, planes):
    """Return the prediction of a layer and an expert's stored bytes."""
    config = PRESETS["wide512-sparse"]
    shape = ExpertShape(weight_format(name), OLMOE.d_model, OLMOE.d_expert,
                        config.row_multipliers)
    ids = routing(tokens, OLMOE.n_experts, OLMOE.top_k, kind="uniform", seed=0)
    return predict_experts(config, [shape] * OLMOE.n_experts, ids, OLMOE.n_experts, planes=planes,
                           latency=100), shape.stored_bytes


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("pattern", "most"), [("+2:4", 0.53), ("+1:4", 0.29)])
def test_prefill(name, pattern, most):
    dense, _ = predict(name, 64, 1)
    sparse, _ = predict(name + pattern, 64, 1)
    assert sparse.cycles / dense.cycles < most
    assert sparse.stalled_output == 0


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("pattern", ["+2:4", "+1:4"])
def test_decode_takes_as_long_as_its_bytes(name, pattern):
    """Within 2 %: patterns and scales are among the bytes."""
    dense, dense_bytes = predict(name, 1, 2)
    sparse, sparse_bytes = predict(name + pattern, 1, 2)
    assert np.isclose(sparse.cycles / dense.cycles, sparse_bytes / dense_bytes, rtol=0.02)
    assert sparse.stalled_output == 0


def test_presets_without_these_formats_are_as_fast():
    """Formats beside one change no cycle of it."""
    shape = ExpertShape(weight_format("int4_g32"), 512, 256, 2)
    ids = np.arange(8)[None]
    found = [predict_experts(PRESETS[config], [shape] * 8, ids, 8, planes=2, latency=100)
             for config in ("wide512", "wide512-sparse")]
    assert found[0] == found[1]
