"""Forecasts against sums by hand."""

import pytest

from tilewright.runtime.plan.forecast import Part, forecast


def test_nodes_weigh_what_their_calls_take() -> None:
    parts = [Part(("encode",), 4, 4), Part(("step", "join"), 40, 10), Part(("decode",), 4, 0)]
    told = forecast(parts, {"encode": 2.0, "step": 5.0, "join": 1.0, "decode": 3.0}, elapsed_s=34.0)
    done, total = 4 * 2 + 10 * 6, 4 * 2 + 40 * 6 + 4 * 3
    assert told.share == done / total
    assert told.left_s == pytest.approx(34.0 * (total - done) / done)


def test_a_component_that_has_not_run_counts_as_the_mean_of_the_others() -> None:
    parts = [Part(("encode",), 4, 4), Part(("step",), 4, 2), Part(("decode",), 2, 0)]
    told = forecast(parts, {"encode": 1.0, "step": 3.0}, elapsed_s=10.0)
    assert told.share == (4 + 6) / (4 + 12 + 4) and told.left_s == pytest.approx(10.0)


def test_nothing_is_said_of_the_time_while_most_calls_are_of_components_that_have_not_run() -> None:
    parts = [Part(("encode",), 10, 6), Part(("step",), 5, 0)]
    assert forecast(parts, {"encode": 1.0}, 6.0).left_s is None
    assert forecast([Part(("encode",), 11, 6), *parts[1:]], {"encode": 1.0}, 6.0).left_s == pytest.approx(10.0)
    assert forecast(parts, {}, 6.0).left_s is None


def test_what_an_earlier_run_has_done_counts_as_done_and_not_as_speed() -> None:
    told = forecast([Part(("step",), 10, 6, before=4)], {"step": 1.0}, elapsed_s=2.0)
    assert told.share == 0.6 and told.left_s == pytest.approx(4.0)
    assert forecast([Part(("step",), 10, 4, before=4)], {"step": 1.0}, elapsed_s=2.0).left_s is None


def test_a_round_without_nodes_is_done() -> None:
    told = forecast([], {}, 1.0)
    assert (told.share, told.left_s) == (1.0, 0.0)
