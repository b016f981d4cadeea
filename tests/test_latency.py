"""Times of products: what holds by construction, however fast or busy the machine is."""

from __future__ import annotations

from itertools import pairwise

import pytest

from onnxlr.errors import ConfigError, InstallError
from onnxlr.latency import LARGEST, Timings

ROWS, WIDTH = 40, 64


@pytest.fixture(scope="module")
def timings() -> Timings:
    timings = Timings(threads=1)
    timings.measure((ROWS, WIDTH, rank) for rank in range(1, 2 * WIDTH))
    return timings


def test_no_time_falls_as_a_layer_grows(timings: Timings) -> None:
    by_output = [timings.product(ROWS, WIDTH, rank) for rank in range(1, 2 * WIDTH)]
    by_input = [timings.product(ROWS, rank, WIDTH) for rank in range(1, 2 * WIDTH)]
    assert by_output[0] > 0
    assert all(a <= b for a, b in pairwise(by_output))
    assert all(a <= b for a, b in pairwise(by_input))
    moves = [timings.moved(ROWS, features) for features in range(1, 2 * WIDTH)]
    assert moves[0] > 0
    assert all(a <= b for a, b in pairwise(moves))


def test_times_are_in_one_unit_and_interpolated_linearly(timings: Timings) -> None:
    """Between two grid sizes a wider product costs its share of the step; so sums of products are sums of times."""
    narrow, middle, wide = (timings.product(ROWS, WIDTH, width) for width in (64, 80, 96))
    assert middle == (narrow + wide) / 2
    corners = [timings.product(ROWS, d_in, d_out) for d_in in (64, 96) for d_out in (64, 96)]
    assert timings.product(ROWS, 80, 80) == pytest.approx(sum(corners) / 4)


def test_kernels_compute_sixteen_columns_at_a_time(timings: Timings) -> None:
    assert timings.product(ROWS, WIDTH, 65) == timings.product(ROWS, WIDTH, 80)
    other = Timings(provider="CPUExecutionProvider", threads=1)
    assert other.product(ROWS, 16, 1) == other.product(ROWS, 16, 16)


def test_what_was_measured_stays(timings: Timings) -> None:
    sizes = [(ROWS, WIDTH, 48), (ROWS, 48, WIDTH), (ROWS, 17, 33)]
    before = [timings.product(*one) for one in sizes] + [timings.moved(ROWS, WIDTH)]
    timings.product(ROWS, 3 * WIDTH, 3 * WIDTH)
    timings.product(ROWS + 1, WIDTH, WIDTH)
    timings.moved(ROWS, 4 * WIDTH)
    assert [timings.product(*one) for one in sizes] + [timings.moved(ROWS, WIDTH)] == before


def test_beyond_the_grid_time_is_proportional() -> None:
    timings = Timings(threads=1)
    at = timings.product(1, 1, LARGEST)
    assert timings.product(1, 1, 2 * LARGEST) == pytest.approx(2 * at)
    deep = timings.product(1, LARGEST, 16)
    assert timings.product(1, 3 * LARGEST, 16) == pytest.approx(3 * deep)
    tall = timings.product(LARGEST, 16, 16)
    assert timings.product(2 * LARGEST, 16, 16) == pytest.approx(2 * tall)
    assert timings.moved(4 * LARGEST, 16) == pytest.approx(4 * timings.moved(LARGEST, 16))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_element_types(dtype: str) -> None:
    timings = Timings(threads=1, dtype=dtype)
    assert timings.product(ROWS, 16, 16) > 0
    assert timings.moved(ROWS, 16) > 0


def test_what_cannot_be_timed(timings: Timings) -> None:
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        Timings(dtype="int8")
    for sizes in ((0, 16, 16), (16, -1, 16), (16, 16, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            timings.product(*sizes)
    for rows, features in ((0, 16), (16, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            timings.moved(rows, features)
    with pytest.raises(ConfigError, match="at least 1"):
        timings.measure([(ROWS, WIDTH, WIDTH), (ROWS, WIDTH, 0)])
    with pytest.raises(InstallError, match="no Nonsense"):
        Timings(provider="Nonsense").product(1, 1, 1)
