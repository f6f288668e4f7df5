"""Loading of weights: the grid that is chosen, dimensions of any size, weights quantised before."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moeaccel import golden
from moeaccel.config import PRESETS
from moeaccel.errors import FormatError
from moeaccel.formats import FORMATS, QuantisedMatrix, quantise
from moeaccel.golden import experts_float64
from moeaccel.grid import gated_output, grid_exponent, squares
from moeaccel.host import errors, open_device
from moeaccel.image import Expert


def draw_weights(rng, experts=3, d_model=64, d_expert=96, scale=1.0):
    def matrices(rows, k):
        return rng.standard_normal((experts, rows, k), np.float32) * np.float32(scale / k**0.5)

    return matrices(2 * d_expert, d_model), matrices(d_model, d_expert)


def layer_of(gate_up, down, name="int4_g32"):
    return [Expert.quantise(g, d, name) for g, d in zip(gate_up, down, strict=True)]


@pytest.fixture
def tall():
    with open_device("golden", config="ulx3s", memory_bytes=1 << 24) as device:
        yield device


# -- biases
def test_biases_are_added_to_both_products(tall):
    rng = np.random.default_rng(21)
    gate_up, down = draw_weights(rng)
    biases = {"gate_up_bias": rng.standard_normal((3, 192)), "down_bias": torch.randn(3, 64)}
    x, scores = rng.standard_normal((9, 64), np.float32), rng.random((9, 2), np.float32)
    ids = rng.integers(0, 3, (9, 2))
    for some in ({}, *({name: biases[name]} for name in biases), biases):
        with tall.load_experts(gate_up, down, weight_format="mxint8", **some) as loaded:
            y = loaded(x, ids, scores)
        exact = experts_float64(x, ids, scores, gate_up, down, **{
            name: np.asarray(bias, np.float64) for name, bias in some.items()})
        assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)
    assert loaded.shape.gate_up_biased and loaded.shape.down_biased
    parts = {name: list(bias) for name, bias in biases.items()}  # a sequence of vectors
    with tall.load_experts(gate_up, down, weight_format="mxint8", **parts) as loaded:
        assert np.array_equal(loaded(x, ids, scores), y)


def test_a_linear_layer_with_a_bias(tall):
    rng = np.random.default_rng(22)
    weight, bias = rng.standard_normal((50, 40), np.float32), rng.standard_normal(50)
    x = rng.standard_normal((3, 40), np.float32)
    with tall.load_linear(weight, weight_format="mxint8", bias=bias) as loaded:
        exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        assert np.linalg.norm(loaded(x) - exact) < 0.02 * np.linalg.norm(exact)


def test_biases_count_for_the_grid(tall):
    gate_up, down = draw_weights(np.random.default_rng(23))
    large = {"down_bias": np.full((3, 64), 1e4)}
    with tall.load_experts(gate_up, down) as plain, tall.load_experts(
            gate_up, down, **large) as biased, tall.load_experts(
            gate_up, down, gate_up_bias=np.full((3, 192), 1e3)) as first:
        assert biased.grid_exponent >= plain.grid_exponent + 12
        assert first.grid_exponent >= plain.grid_exponent + 16


@pytest.mark.parametrize(("biases", "error", "message"), [
    ({"gate_up_bias": np.zeros((3, 96))}, errors.InvalidTensor,
     r"gate_up_bias must have the shape \(3, 192\), .* not \(3, 96\)"),
    ({"down_bias": np.zeros(64)}, errors.InvalidTensor, "down_bias must"),
    ({"down_bias": [np.zeros(64), np.zeros(64), np.zeros(63)]}, errors.InvalidTensor,
     r"down_bias\[2\] must have the shape \(64,\), not \(63,\)"),
    ({"gate_up_bias": np.full((3, 192), np.nan)}, FormatError,
     "bias must be of numbers that bfloat16 has"),
])
def test_biases_that_are_none(tall, biases, error, message):
    free = tall.memory.free_bytes
    with pytest.raises(error, match=message):
        tall.load_experts(*draw_weights(np.random.default_rng(0)), **biases)
    assert tall.memory.free_bytes == free


def test_hardware_without_an_adder_refuses_biases():
    gate_up, down = draw_weights(np.random.default_rng(0))
    config = PRESETS["tiny"].replace(name="bare", bias=False)
    with open_device("golden", config=config, memory_bytes=1 << 22) as device:
        device.load_experts(gate_up, down)
        for biases, name in (({"gate_up_bias": np.zeros((3, 192))}, "gate_up_bias"),
                             ({"down_bias": np.zeros((3, 64))}, "down_bias")):
            with pytest.raises(errors.LimitExceeded, match=(
                    f"{name} must be left out in config 'bare', not given; presets that can: "
                    "tiny, ")):
                device.load_experts(gate_up, down, **biases)
        with pytest.raises(errors.LimitExceeded, match="bias must be left out in config 'bare'"):
            device.load_linear(down[0], bias=np.zeros(64))


# -- the grid
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize(("d_model", "d_expert"), [(32, 64), (256, 100), (2048, 64)])
def test_the_grid_keeps_small_outputs_and_fits_large_ones(tall, scale, d_model, d_expert):
    rng = np.random.default_rng(d_expert)
    weights = draw_weights(rng, 1, d_model, d_expert, scale)
    x, ids = rng.standard_normal((8, d_model), np.float32), np.zeros((8, 1), int)
    one = np.ones((8, 1), np.float32)
    with tall.load_experts(*weights, weight_format="mxint8") as loaded:
        exact = experts_float64(x, ids, one, *weights)
        typical = np.sqrt((exact**2).mean())
        y = loaded(x, ids, one)
        assert np.linalg.norm(y - exact) < 0.05 * np.linalg.norm(exact)
        # Powers of two as routing weights move outputs, and round nothing but on the grid. (The
        # estimate of the typical output is itself good to a tenth.)
        small = loaded(x, ids, one * np.float32(2.0**-16)).astype(np.float64) * 2.0**16
        assert abs(small - y).max() <= 1.1 * typical * 2.0**-10
        fits = one * np.float32(0.9 * 2.0**16 * typical / abs(y).max())
        assert loaded(x, ids, fits) == pytest.approx(y * fits, rel=1e-4, abs=1e-6 * typical)
        with pytest.raises(errors.GridOverflow):
            loaded(x, ids, fits * 5)


def test_weights_of_another_size_have_another_grid(tall):
    weights = draw_weights(np.random.default_rng(0))
    base = tall.load_experts(*weights).grid_exponent
    for factor in (2.0**-8, 2.0**8):
        scaled = tall.load_experts(weights[0], weights[1] * np.float32(factor))
        assert scaled.grid_exponent == base + round(np.log2(factor))
    assert tall.load_experts(*weights, grid_exponent=-40).grid_exponent == -40
    assert tall.load_experts(*weights, x_rms=np.float32(2.0**8)).grid_exponent >= base + 14
    linear = tall.load_linear(weights[1][0])
    assert linear.grid_exponent == tall.load_linear(weights[1][0] / 16).grid_exponent + 4
    assert tall.load_linear(weights[1][0], x_rms=0.25).grid_exponent == linear.grid_exponent - 2


def test_every_way_of_loading_finds_the_same_grid(tall):
    gate_up, down = draw_weights(np.random.default_rng(5), 4)
    given = tall.load_experts(gate_up, down, weight_format="mxint8").grid_exponent
    one_by_one = tall.load_experts([torch.from_numpy(g) for g in gate_up], list(down))
    quantised = tall.load_quantised(layer_of(gate_up, down, "mxint8"))
    assert one_by_one.grid_exponent == quantised.grid_exponent == given


def test_pruned_and_huge_experts_do_not_move_the_grid(tall):
    gate_up, down = draw_weights(np.random.default_rng(1), 5)
    plain = tall.load_experts(gate_up, down).grid_exponent
    down[0], gate_up[1] = 0, gate_up[1] * 1e6
    assert tall.load_experts(gate_up, down).grid_exponent == plain
    zeros = tall.load_experts(gate_up * 0, down)
    assert zeros.grid_exponent == -26
    assert not zeros(np.ones((1, 64), np.float32), np.zeros((1, 1), int),
                     np.ones((1, 1), np.float32)).any()


@pytest.mark.parametrize("x_rms", [0, -1.0, float("nan"), float("inf"), "1"])
def test_x_rms_is_a_positive_number(tall, x_rms):
    with pytest.raises(errors.InvalidOption, match="x_rms must be a positive number, not"):
        tall.load_experts(*draw_weights(np.random.default_rng(0)), x_rms=x_rms)


# -- dimensions
def filled(array, *shape):
    """Return an array with zeros behind it."""
    return np.pad(array, [(0, to - size) for to, size in zip(shape, array.shape, strict=True)])


def filled_weights(gate_up, down, d_model, d_expert):
    experts, rows, _ = gate_up.shape
    halves = gate_up.reshape(experts, 2, rows // 2, -1)
    gate_up = filled(halves, experts, 2, d_expert, d_model).reshape(experts, -1, d_model)
    return gate_up, filled(down, experts, d_model, d_expert)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("d_model", "d_expert"),
                         [(40, 48), (48, 100), (100, 40), (1, 1), (64, 33)])
def test_any_dimension_is_filled_up_with_zeros(device, name, d_model, d_expert):
    rng = np.random.default_rng(d_model)
    weights = draw_weights(rng, 3, d_model, d_expert)
    x = rng.standard_normal((9, d_model), np.float32)
    ids, scores = rng.integers(-1, 3, (9, 2)), rng.random((9, 2), np.float32)
    with device.load_experts(*weights, weight_format=name, activation_bits=8) as loaded:
        y = loaded(x, ids, scores)
        assert (loaded.shape.d_model, loaded.shape.d_expert) == (d_model, d_expert)
        assert y.shape == (9, d_model)
        for more in (0, 32, 96):  # however many zeros: no bit depends on them
            dims = [-(-d // 32) * 32 + more for d in (d_model, d_expert)]
            wide = golden.experts(
                filled(x, 9, dims[0]), ids, scores,
                layer_of(*filled_weights(*weights, *dims), name), planes=1,
                grid_exponent=loaded.grid_exponent).y
            assert np.array_equal(wide[:, :d_model], y)
            assert not wide[:, d_model:].any()
        again = device.load_quantised(layer_of(*weights, name), activation_bits=8,
                                      grid_exponent=loaded.grid_exponent)
        assert np.array_equal(again(x, ids, scores), y)


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 48), (1, 100), (100, 1), (64, 33)])
def test_a_linear_layer_of_any_dimension(device, d_out, d_in):
    rng = np.random.default_rng(d_in)
    weight = rng.standard_normal((d_out, d_in), np.float32)
    x = rng.standard_normal((70, d_in), np.float32)
    with device.load_linear(weight, weight_format="int4_g128") as loaded:
        y = loaded(torch.from_numpy(x)).numpy()
        assert y.shape == (70, d_out)
        assert (loaded.shape.d_out, loaded.shape.d_in) == (d_out, d_in)
        wide = golden.gemm(filled(x, 70, 128), quantise(filled(weight, 128, 128), "int4_g128"),
                           grid_exponent=loaded.grid_exponent).y
        assert np.array_equal(wide[:, :d_out], y)


def test_zeros_that_fill_up_are_not_counted_as_stored(device):
    with device.load_linear(np.ones((40, 48), np.float32), weight_format="mxint8") as loaded:
        assert loaded.shape.stored_bytes == 40 * (48 + 2 + 2)
        assert loaded.shape.section.stored_bytes == 64 * (64 + 2 + 2)


# -- weights quantised before
def broken(matrix, field, where, value):
    array = getattr(matrix, field).copy()
    array[where] = value
    return replace(matrix, **{field: array})


BROKEN = [
    ("int4_g32", "integers", (5, 7), 8, "from -8 to 7, but row 5, column 7 holds 8"),
    ("int4_g32", "integers", (5, 7), -9, "from -8 to 7, but row 5, column 7 holds -9"),
    ("mxint8", "integers", (0, 63), -128, "from -127 to 127, but row 0, column 63 holds -128"),
    ("mxfp4", "integers", (1, 2), 5, r"one of -12, -8, .*12, but row 1, column 2 holds 5"),
    ("mxfp4", "integers", (1, 2), 13, "row 1, column 2 holds 13"),
    ("int4_g32", "significand", (3, 1), 2048, "from 0 to 2047, but row 3, group 1 holds 2048"),
    ("int4_g128", "significand", (3, 0), -1, "from 0 to 2047, but row 3, group 0 holds -1"),
    ("mxint8", "significand", (3, 1), 2, "must be 1, but row 3, group 1 holds 2"),
    ("int4_g32", "shift", (9, 0), 7, "from 0 to 6, but row 9, group 0 holds 7"),
    ("mxint8", "shift", (9, 0), 14, "from 0 to 13, but row 9, group 0 holds 14"),
    ("mxfp4", "shift", (9, 0), -1, "from 0 to 15, but row 9, group 0 holds -1"),
    ("mxint8", "row_exponent", 11, 256, "from -256 to 255, but row 11 holds 256"),
    ("mxint8", "row_exponent", 11, -257, "from -256 to 255, but row 11 holds -257"),
]


@pytest.mark.parametrize("kind", ["gate_up", "down"])
@pytest.mark.parametrize(("name", "field", "where", "value", "message"), BROKEN)
def test_values_outside_the_format_are_refused(device, kind, name, field, where, value, message):
    layer = layer_of(*draw_weights(np.random.default_rng(0), 3, 64, 64), name)
    layer[2] = replace(layer[2], **{kind: broken(getattr(layer[2], kind), field, where, value)})
    writes = device.transport.memory_read(0, 1 << 20)
    with pytest.raises(FormatError, match=f"{kind} of expert 2: {field} of {name} .*{message}"):
        device.load_quantised(layer)
    assert np.array_equal(device.transport.memory_read(0, 1 << 20), writes)
    assert device.memory.free_blocks == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"integers": np.zeros((128, 64), np.int16)}, r"integers must .* int8 .*64\), not int16"),
    ({"integers": np.zeros(64, np.int8)}, r"integers must be a matrix \(rows, K\), not of"),
    ({"integers": np.zeros((0, 64), np.int8)}, r"integers must be a matrix .*\(0, 64\)"),
    ({"significand": np.ones((128, 1), np.int16)}, r"significand .*\(128, 2\), not int16 .*1\)"),
    ({"significand": np.ones((128, 2))}, "significand must be an array, int16 .*not float64"),
    ({"shift": np.zeros((128, 3), np.int8)}, r"shift must .*\(128, 2\), not int8 .*\(128, 3\)"),
    ({"shift": [[0, 0]] * 128}, r"shift must be an array, int8 .* not list"),
    ({"row_exponent": np.zeros((128, 1), np.int16)}, r"row_exponent must .*\(128,\), not"),
    ({"row_exponent": np.zeros(128, np.int64)}, "row_exponent must .* not int64"),
    ({"coarsened": -1}, "coarsened must be from 0 to its 256 groups, not -1"),
    ({"coarsened": 257}, "coarsened must be from 0 to its 256 groups, not 257"),
    ({"format": replace(FORMATS["mxint8"], max_shift=12)}, "format must be one of mxint8, int4"),
])
def test_arrays_of_another_kind_are_refused(device, change, message):
    layer = layer_of(*draw_weights(np.random.default_rng(0), 2, 64, 64), "int4_g32")
    layer[1] = replace(layer[1], gate_up=replace(layer[1].gate_up, **change))
    with pytest.raises(FormatError, match=f"gate_up of expert 1: {message}"):
        device.load_quantised(layer)


def test_gate_up_has_pairs_of_rows(device):
    expert = layer_of(*draw_weights(np.random.default_rng(0), 1, 64, 64))[0]
    odd = Expert(expert.gate_up[:127], expert.down)
    with pytest.raises(errors.InvalidTensor,
                       match=r"\(64, 63\), \(64, 127\) without up rows, or \(64, 31\) with second"):
        device.load_quantised([odd])


def test_every_value_of_a_format_is_accepted(device):
    for fmt in FORMATS.values():
        known = np.array([i for i in range(-fmt.max_integer, fmt.max_integer + 1)
                          if fmt.name != "mxfp4" or abs(i) in (0, 1, 2, 3, 4, 6, 8, 12)], np.int8)
        known = known[known <= 7] if fmt.name.startswith("int4") else known
        shape = 64, -(-64 // fmt.group)
        rng = np.random.default_rng(0)
        matrix = QuantisedMatrix(
            fmt, rng.choice(known, (64, 64)),
            rng.integers(0, 2048, shape).astype(np.int16) if fmt.real_scale
            else np.ones(shape, np.int16),
            rng.integers(0, fmt.max_shift + 1, shape).astype(np.int8),
            rng.integers(-40, 0, 64).astype(np.int16), shape[0])
        layer = [Expert(matrix, replace(
            matrix, integers=np.ascontiguousarray(matrix.integers[:, :32]),
            significand=matrix.significand[:, :1], shift=matrix.shift[:, :1], coarsened=0))]
        x = rng.standard_normal((5, 64), np.float32)
        ids, one = np.zeros((5, 1), int), np.ones((5, 1), np.float32)
        with device.load_quantised(layer) as loaded:
            expected = golden.experts(x, ids, one, layer, grid_exponent=loaded.grid_exponent)
            assert np.array_equal(loaded(x, ids, one), expected.y)
            assert not expected.overflows


# -- experts that differ
def draw_mixed(rng, d_model=64):
    """Return experts of every format in both products, of several widths and both activations."""
    names = list(FORMATS)
    layer, floats = [], []
    for e, (name, down) in enumerate(zip(names, names[1:] + names[:1], strict=True)):
        matrices = [m[0] for m in draw_weights(rng, 1, d_model, (40, 96, 256, 32, 160)[e])]
        floats.append(matrices)
        layer.append(Expert.quantise(*matrices, name, down_format=down,
                                     activation=("silu", "relu")[e % 2]))
    return layer, floats


@pytest.mark.parametrize("channels", [1, 4])
def test_experts_of_one_layer_may_differ(channels):
    """In formats of both products, width and activation: bit for bit, and their reads add up."""
    rng = np.random.default_rng(1)
    layer, floats = draw_mixed(rng)
    x, scores = rng.standard_normal((60, 64), np.float32), rng.random((60, 2), np.float32)
    ids = rng.integers(-1, len(layer) + 1, (60, 2))
    config = PRESETS["tiny"].replace(name="mixed", channels=channels)
    with open_device("golden", config=config, memory_bytes=1 << 20) as device:
        loaded = device.load_quantised(layer)
        y = loaded(x, ids, scores)
        expected = golden.experts(x, ids, scores, [expert.filled() for expert in layer],
                                  grid_exponent=loaded.grid_exponent)
        assert np.array_equal(y, expected.y)
        exact = experts_float64(x, ids, scores, *zip(*floats, strict=True),
                                [expert.activation for expert in layer])
        assert np.linalg.norm(y - exact) < 0.25 * np.linalg.norm(exact)
        assert [s.d_expert for s in loaded.shapes] == [40, 96, 256, 32, 160]
        assert loaded.shapes == tuple(e.shape(2, channels) for e in layer)
        with pytest.raises(errors.InvalidOption, match="but there are 5; ask for shapes"):
            _ = loaded.shape
        assert loaded.report.weight_format == ", ".join(FORMATS)
        assert loaded.report.groups == sum(
            m.shift.size for e in layer for m in (e.gate_up, e.down))
        passes = [-(-int((ids == e).sum()) // (config.max_slots // 2)) for e in range(len(layer))]
        beats = [-(-(s.image_bytes - s.header_bytes) // config.port_bytes) for s in loaded.shapes]
        read = sum(p * b for p, b in zip(passes, beats, strict=True))
        assert device.counters()["bytes_read_weights"] == channels * config.port_bytes * read
        used = sum(shape.memory_bytes for shape in loaded.shapes) + 64 * (1 + len(layer))
        free = device.memory.free_bytes
        loaded.close()
        assert device.memory.free_bytes == free + used


def test_a_format_for_each_expert(device):
    gate_up, down = draw_weights(np.random.default_rng(2), 3)
    names = ["mxint8", "int4_g32", "mxint8"]
    layer = [Expert.quantise(*m, name) for *m, name in zip(gate_up, down, names, strict=True)]
    x = np.random.default_rng(3).standard_normal((7, 64), np.float32)
    ids, scores = np.arange(14).reshape(7, 2) % 3, np.ones((7, 2), np.float32)
    loaded = device.load_experts(gate_up, down, weight_format=names)
    expected = golden.experts(x, ids, scores, layer, grid_exponent=loaded.grid_exponent)
    assert np.array_equal(loaded(x, ids, scores), expected.y)
    assert loaded.report.weight_format == "mxint8, int4_g32"
    alone = device.load_experts(gate_up, down, weight_format="mxint8").report
    assert alone.worst_error < loaded.report.worst_error
    assert loaded.report.worst_expert == 1


@pytest.mark.parametrize("how", ["load_experts", "load_quantised", "experts"])
def test_the_activation_may_be_relu(device, how):
    gate_up, down = draw_weights(np.random.default_rng(4), 3)
    x = np.random.default_rng(5).standard_normal((9, 64), np.float32)
    ids, scores = np.arange(18).reshape(9, 2) % 3, np.ones((9, 2), np.float32)
    layer = [replace(expert, activation="relu") for expert in layer_of(gate_up, down, "mxint8")]
    if how == "load_experts":
        loaded = device.load_experts(gate_up, down, activation="relu", weight_format="mxint8")
    elif how == "load_quantised":
        loaded = device.load_quantised(layer_of(gate_up, down, "mxint8"), activation="relu")
    else:
        loaded = device.load_quantised(layer)
    assert loaded.shape.activation == "relu"
    y = loaded(x, ids, scores)
    expected = golden.experts(x, ids, scores, layer, grid_exponent=loaded.grid_exponent)
    assert np.array_equal(y, expected.y)
    exact = experts_float64(x, ids, scores, gate_up, down, "relu")
    assert np.linalg.norm(y - exact) < 0.05 * np.linalg.norm(exact)


def test_the_grid_is_that_of_the_activation(device):
    """Small gates: SiLU halves them, ReLU keeps one half of them."""
    differ = 0
    for size in np.exp2(np.arange(-8, -6, 0.25)):
        gate_up, down = draw_weights(np.random.default_rng(8), 2, scale=size)
        found = {name: device.load_quantised(layer_of(gate_up, down), activation=name).grid_exponent
                 for name in ("silu", "relu")}
        assert found == {name: grid_exponent(
            gated_output(squares(e.gate_up), squares(e.down), activation=name)
            for e in layer_of(gate_up, down)) for name in ("silu", "relu")}
        differ += found["silu"] != found["relu"]
    assert differ


def test_weights_that_are_there_get_another_activation(device):
    """Images hold no activation: the table is all that is written."""
    layer = layer_of(*draw_weights(np.random.default_rng(6)))
    x, ids = np.ones((1, 64), np.float32), np.zeros((1, 1), int)
    one = np.ones((1, 1), np.float32)
    with device.load_quantised(layer) as loaded:
        silu = loaded(x, ids, one)
    with device.load_quantised(layer, activation="relu") as loaded:
        expected = golden.experts(x, ids, one, [replace(e, activation="relu") for e in layer],
                                  grid_exponent=loaded.grid_exponent).y
        assert np.array_equal(loaded(x, ids, one), expected)
    assert not np.array_equal(silu, expected)


# -- what the configuration lacks
def test_a_format_that_the_configuration_lacks_is_refused():
    config = PRESETS["tiny"].replace(formats=("int4_g32", "mxfp4"))
    weight = np.ones((32, 32), np.float32)
    with open_device("golden", config=config) as device:
        device.load_linear(weight, weight_format="mxfp4")
        with pytest.raises(FormatError, match=(
                r"^weight_format must be one of int4_g32, mxfp4 in config 'tiny', not 'mxint8'; "
                r"presets that can: tiny, small, ")):
            device.load_linear(weight, weight_format="mxint8")
        gate_up, down = draw_weights(np.random.default_rng(0), 2)
        before = device.transport.memory_read(0, 1 << 20)
        with pytest.raises(FormatError, match=r"^expert 1: weight_format must .* not 'int4_g64'"):
            device.load_experts(gate_up, down, weight_format=["mxfp4", "int4_g64"])
        mixed = Expert.quantise(gate_up[0], down[0], "mxfp4", down_format="mxint8")
        with pytest.raises(FormatError, match=r"^weight_format of down must be .* not 'mxint8'"):
            device.load_quantised([mixed, mixed])
        assert np.array_equal(device.transport.memory_read(0, 1 << 20), before)


def test_an_activation_that_the_configuration_lacks_is_refused():
    config = PRESETS["tiny"].replace(activations=("silu",))
    weights = draw_weights(np.random.default_rng(0), 2)
    with open_device("golden", config=config) as device:
        device.load_experts(*weights)
        with pytest.raises(FormatError, match=(
                r"^activation must be one of silu in config 'tiny', not 'relu'; presets that can: "
                r"tiny")):
            device.load_experts(*weights, activation="relu")


def test_the_widest_expert_counts(device):
    layer = [Expert.quantise(*[m[0] for m in draw_weights(np.random.default_rng(0), 1, 64, d)],
                             "mxfp4") for d in (32, 250, 260)]
    assert device.load_quantised(layer[:2]).num_experts == 2
    with pytest.raises(errors.LimitExceeded, match=(
            r"^expert 2: d_expert must be a multiple of 32 from 32 to 256 in config 'tiny', not "
            r"260 \(288 in whole blocks\); presets that can: small")):
        device.load_quantised(layer)


def test_nothing_to_prune_is_said():
    """A format without a pattern would stay dense without a word."""
    ones = np.ones((2, 64, 32), np.float32), np.ones((2, 32, 32), np.float32)
    with open_device("golden", config="wide512-sparse", memory_bytes=1 << 24) as device:
        for load in (lambda name: device.load_experts(*ones, weight_format=name,
                                                      prune="magnitude"),
                     lambda name: device.load_linear(ones[1][0], weight_format=name,
                                                     prune="magnitude")):
            with pytest.raises(errors.InvalidOption, match=r"left out with int4_g32, .*2:4"):
                load("int4_g32")
            load("int4_g32+2:4").close()
        device.load_experts(*ones, weight_format=["int4_g32", "int4_g32+2:4"], prune="magnitude")
