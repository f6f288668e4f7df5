import numpy as np
from hypothesis import given, strategies as st

from moeaccel.formats import FORMATS
from moeaccel.formats.scales import fit_rows, split_scales


@given(st.sampled_from(list(FORMATS)), st.integers(0, 2**32 - 1))
def test_a_scale_changes_only_where_it_is_counted(name, seed):
    fmt, rng = FORMATS[name], np.random.default_rng(seed)
    scales = np.ldexp(1.0, rng.integers(-24, 3, (4, 5)).astype(np.int32))
    if fmt.real_scale:
        scales *= rng.integers(1, 2048, (4, 5))
    else:
        assert (split_scales(fmt, scales)[0] == 1).all()
    scales[rng.random((4, 5)) < 0.2] = 0
    significand, shift, row_exponent, coarsened = fit_rows(fmt, *split_scales(fmt, scales))
    assert shift.min() >= 0 and shift.max() <= fmt.max_shift
    stored = np.ldexp(significand.astype(float), shift + row_exponent[:, None].astype(np.int32))
    there = scales > 0
    assert np.array_equal(coarsened & there, coarsened)
    assert np.array_equal(stored[there & ~coarsened], scales[there & ~coarsened])
    assert (stored[coarsened] != scales[coarsened]).all()
    top = np.where(there, scales, 0).max(axis=1)
    rows = top > 0  # what is rounded is rounded to the unit of the row's largest scale
    unit = np.ldexp(1.0, row_exponent[rows].astype(np.int32))
    if fmt.real_scale:
        error = np.abs(np.where(there, stored - scales, 0))[rows].max(axis=1, initial=0)
        assert (error <= unit / 2).all()


def test_significands_are_rounded_to_their_bits_and_carry():
    significand, exponent = split_scales(FORMATS["int4_g32"], np.array([2047.5, 1025.4, 3.0, 0]))
    assert significand.tolist() == [1024, 1025, 1536, 0]
    assert exponent.tolist()[:3] == [1, 0, -9]
