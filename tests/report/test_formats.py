"""Numbers are rounded once."""

import random

import pytest

from helpers.report.markdown import number


def test_a_tiny_number_is_rounded_once():
    assert number(5.746881633622127e-09) == "5.7e-09"  # by way of 5.75e-09 it would be 5.8e-09


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-4, 1e-2, 0.99949, 1.0, 50.0, 99.949, 5e4, 5e9])
def test_what_is_shown_is_within_half_a_step(size):
    chance = random.Random(1)
    for _ in range(2000):
        value = size * chance.uniform(0.5, 2)
        written = number(value)
        mantissa, _, exponent = written.replace(",", "").partition("e")
        step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert abs(float(written.replace(",", "")) - value) <= 0.5000001 * step, (value, written)
