import numpy as np
import pytest

from moeaccel.errors import FormatError
from moeaccel.host.calibration import LEAST_TOKENS, Calibration
from moeaccel.host.errors import InvalidOption, InvalidTensor

E, H, I, T = 3, 64, 32, 300


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, 12)) @ rng.standard_normal((12, H))
    x += rng.standard_normal((T, H)) / 2
    ids = rng.integers(0, E - 1, (T, 2))  # nothing goes to the last expert
    gate_up, down = (rng.standard_normal(shape).astype(np.float32) / 8
                     for shape in ((E, 2 * I, H), (E, H, I)))
    return x.astype(np.float32), ids, gate_up, down


def test_an_expert_is_calibrated_with_the_tokens_that_went_to_it(layer):
    x, ids, gate_up, _ = layer
    calibration = Calibration(x, ids, d_model=H, num_experts=E)
    own = x[(ids == 1).any(axis=1)]
    assert np.array_equal(calibration.tokens(1), own)
    of_x, of_h = calibration.moments(1, gate_up[1], len(gate_up[1]) // 2, "silu", None, second=True)
    exact = own.astype(np.float64)
    gate, up = exact @ gate_up[1, :I].T, exact @ gate_up[1, I:].T
    hidden = gate / (1 + np.exp(-gate)) * up
    assert np.allclose(of_x, exact.T @ exact / len(own))
    assert np.allclose(of_h, hidden.T @ hidden / len(own))
    squares = calibration.moments(1, gate_up[1], len(gate_up[1]) // 2, "silu", None, second=False)
    assert np.allclose(squares[0], of_x.diagonal()) and np.allclose(squares[1], of_h.diagonal())


def test_an_expert_that_nothing_went_to_is_given_others(layer):
    x, ids, *_ = layer
    calibration = Calibration(x, ids, d_model=H, num_experts=E)
    assert len(calibration.tokens(E - 1)) == LEAST_TOKENS
    assert len(Calibration(x[:5], ids[:5], d_model=H, num_experts=E).tokens(E - 1)) == 5


def test_better_quantisers_give_better_outputs(device, layer):
    x, ids, gate_up, down = layer
    weights = np.full((T, 2), 0.5, np.float32)

    def outputs(**options):
        experts = device.load_experts(gate_up, down, **options)
        y = experts(x, ids, weights)
        experts.close()
        return y

    exact = outputs(weight_format="mxint8")
    errors = [
        np.linalg.norm(outputs(**options) - exact) / np.linalg.norm(exact) for options in (
            {"quantiser": "amax"}, {}, {"calibration": (x, ids)},
            {"calibration": (x, ids), "quantiser": "gptq"})]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.7 * errors[0]


def test_a_linear_layer_has_quantisers_too(device):
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    found = [device.load_linear(weight, quantiser=name).report.relative_error["weight"]
             for name in ("amax", "search")]
    assert found[1] < 0.95 * found[0]
    with pytest.raises(FormatError, match="quantiser must be one of search, amax, gptq, not 'q'"):
        device.load_linear(weight, quantiser="q")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"quantiser": "best"}, InvalidOption, "quantiser must be one of search, amax, gptq"),
    ({"quantiser": "gptq"}, InvalidOption, "must have a calibration: give calibration="),
    ({"quantiser": "amax", "calibration": (1, 2)}, InvalidOption, "must be left out for the quant"),
    ({"calibration": np.ones(3)}, InvalidOption, r"must be a pair \(x, ids\) of tensors, not nda"),
    ({"calibration": (np.ones((4, 8), np.float32), np.zeros((4, 1), int))}, InvalidTensor,
     r"calibration must be x of the shape \(T, 64\)"),
    ({"calibration": (np.ones((4, 64), np.float32), np.zeros((3, 1), int))}, InvalidTensor,
     r"not \(4, 64\) and \(3, 1\)"),
    ({"calibration": (np.ones((4, 64), np.float32) * np.nan, np.zeros((4, 1), int))},
     InvalidTensor, "calibration x must be finite, but token 0 is not"),
])
def test_bad_options_are_named_before_anything_is_sent(device, layer, options, error, message):
    free = device.memory.free_bytes
    with pytest.raises(error, match=message):
        device.load_experts(*layer[2:], **options)
    assert device.memory.free_bytes == free
