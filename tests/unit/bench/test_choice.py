from __future__ import annotations

import pytest
from headrace.bench.choice import Choice, Sample, Settings, Setup, choose, is_clear, setups

ONE, WIDE, TWO = Setup(1, 1), Setup(1, 2), Setup(2, 1)
NOISE = (1.0, 1.02, 0.98)


def samples(seconds: float, noise: tuple[float, ...] = NOISE) -> list[Sample]:
    return [Sample(seconds * factor, 1.2 * seconds * factor) for factor in noise]


def measured(milliseconds: dict[Setup, dict[int, float]], noise: tuple[float, ...] = NOISE) -> dict[Setup, dict[int, list[Sample]]]:
    """By setup and rows, milliseconds of a batch."""
    return {setup: {rows: samples(took / 1e3, noise) for rows, took in sizes.items()} for setup, sizes in milliseconds.items()}


def decide(milliseconds: dict[Setup, dict[int, float]], present: Settings, **options: float) -> Choice:
    return choose(measured(milliseconds), present, **options)  # type: ignore[arg-type]  # is_inline is a bool, which is a number


# -- what is measured --------------------------------------------------------------------------------------------------


def test_setups_use_no_more_than_the_cores_and_all_of_them() -> None:
    assert setups(2, WIDE) == [ONE, WIDE, TWO]
    assert setups(6, Setup(1, 6)) == [Setup(*pair) for pair in [(1, 1), (1, 2), (1, 4), (1, 6), (2, 1), (2, 2), (3, 2), (4, 1), (6, 1)]]


def test_what_the_model_has_now_is_measured_whatever_it_is() -> None:
    assert Setup(5, 3) in setups(2, Setup(5, 3))


# -- instances and threads ---------------------------------------------------------------------------------------------


def test_two_instances_are_chosen_where_threads_scale_badly() -> None:
    choice = decide({ONE: {1: 10, 2: 20}, WIDE: {1: 8, 2: 16}, TWO: {1: 10, 2: 20}}, Settings(WIDE, 2))
    assert choice.settings == Settings(TWO, 2)
    assert choice.reasons == ("2 instances of 1 thread instead of 1 instance of 2 threads: 1.60 (1.60-1.60) times the rows a second",)


def test_of_equal_rates_the_one_that_answers_sooner_is_chosen() -> None:
    choice = decide({ONE: {1: 10}, WIDE: {1: 5}, TWO: {1: 10}}, Settings(ONE, 1))
    assert choice.settings.setup == WIDE


def test_what_is_quicker_but_no_better_than_now_does_not_hide_what_is_better() -> None:
    times = {ONE: samples(10e-3), WIDE: samples(9.7e-3, (1.0, 1.1, 0.9)), TWO: samples(19.2e-3, (1.0, 1.0, 1.0))}
    choice = choose({setup: {1: found} for setup, found in times.items()}, Settings(ONE, 1))
    assert choice.settings.setup == TWO


def test_a_gain_within_the_noise_changes_nothing() -> None:
    times = {WIDE: samples(10e-3, (1.0, 1.3, 0.9)), TWO: samples(18e-3, (1.0, 1.05, 0.95))}
    choice = choose({setup: {1: found} for setup, found in times.items()}, Settings(WIDE, 1))
    assert choice.settings == Settings(WIDE, 1)
    assert "1.12 times as much, which is not clear of the noise" in choice.reasons[0]


@pytest.mark.parametrize(("rates", "clear"), [((11, 12, 13), True), ((10, 12, 13), False), ((10.1, 10.2, 10.3), False)])
def test_clear_is_what_no_round_contradicts_and_is_worth_it(rates: tuple[float, ...], clear: bool) -> None:
    assert is_clear(rates, (9, 10, 10)) is clear


def test_a_model_that_runs_where_requests_arrive_keeps_its_one_instance() -> None:
    times = {ONE: {1: 0.01, 2: 0.01}, WIDE: {1: 0.02, 2: 0.02}, TWO: {1: 0.01, 2: 0.01}}
    assert decide(times, Settings(ONE, 2)).settings.setup == TWO
    assert decide(times, Settings(ONE, 2), is_inline=True).settings.setup == ONE


def test_a_slow_model_gets_instances_although_it_might_run_where_requests_arrive() -> None:
    times = {ONE: {1: 10.0}, TWO: {1: 10.0}}
    assert decide(times, Settings(ONE, 1), is_inline=True).settings.setup == TWO


# -- an SLO ------------------------------------------------------------------------------------------------------------


def test_within_an_slo_only_what_keeps_it_counts() -> None:
    times = {WIDE: {1: 6.0, 2: 12.0}, TWO: {1: 10.0, 2: 20.0}}
    assert decide(times, Settings(WIDE, 2)).settings.setup == TWO
    choice = decide(times, Settings(WIDE, 2), slo=10e-3)
    assert choice.settings == Settings(WIDE, 1)
    assert choice.reasons[1] == "max_batch_size 1: 2 rows take 14.4 ms; requests of more rows will be refused. Instead, or besides: slo_ms"


def test_max_batch_size_stays_where_the_server_itself_keeps_the_slo() -> None:
    choice = decide({WIDE: {1: 6.0, 2: 12.0}, TWO: {1: 10.0, 2: 20.0}}, Settings(WIDE, 2), slo=10e-3, is_kept=True)
    assert choice.settings == Settings(WIDE, 2)


def test_a_batch_is_within_an_slo_only_if_all_smaller_ones_are() -> None:
    choice = decide({ONE: {1: 5.0, 2: 9.0, 4: 30.0, 8: 16.0}}, Settings(ONE, 8), slo=20e-3)
    assert choice.settings.max_batch_size == 2


def test_a_setup_that_cannot_keep_the_slo_gives_way_whatever_it_does() -> None:
    choice = decide({WIDE: {1: 5.0}, TWO: {1: 8.0}}, Settings(TWO, 1), slo=8e-3)
    assert choice.settings.setup == WIDE
    assert "cannot run one row in time" in choice.reasons[0]


def test_an_slo_that_nothing_keeps_changes_nothing_and_says_how_far_it_is() -> None:
    choice = decide({ONE: {1: 10.0}, WIDE: {1: 5.0}}, Settings(ONE, 1), slo=1e-3)
    assert not choice.is_within_slo
    assert choice.settings == Settings(ONE, 1)
    assert choice.reasons == ("nothing is within 1 ms: the smallest batch takes 6 ms at the least, with 1 instance of 2 threads",)


# -- batch sizes -------------------------------------------------------------------------------------------------------


def test_sizes_are_restricted_where_padded_batches_are_quicker() -> None:
    odd = {1: 10.0, 2: 11.0, 3: 20.0, 4: 12.0, 6: 25.0, 8: 14.0}
    choice = decide({ONE: odd}, Settings(ONE, 8))
    assert choice.settings.allowed == (1, 2, 4, 8)
    assert choice.reasons[-1] == "allowed_batch_sizes: 6 rows take 25 ms, 8 only 14 ms"


def test_sizes_stay_free_where_padding_costs() -> None:
    choice = decide({ONE: {1: 10.0, 2: 11.0, 3: 12.0, 4: 13.0, 6: 15.0, 8: 17.0}}, Settings(ONE, 8))
    assert choice.settings == Settings(ONE, 8)


def test_sizes_beyond_those_that_pay_decide_nothing() -> None:
    choice = decide({ONE: {1: 10.0, 2: 20.0, 3: 60.0, 4: 40.0, 6: 99.0, 8: 90.0}}, Settings(ONE, 8))
    assert choice.settings.allowed == ()


def test_allowed_sizes_that_are_there_end_with_a_lowered_max_batch_size() -> None:
    choice = decide({ONE: {1: 5.0, 4: 10.0, 16: 40.0}}, Settings(ONE, 16, (1, 4, 16)), slo=20e-3)
    assert choice.settings == Settings(ONE, 4, (1, 4))


def test_a_model_that_is_not_batched_gets_no_batch_sizes() -> None:
    assert decide({ONE: {1: 5.0}, TWO: {1: 5.0}}, Settings(ONE, 0)).settings == Settings(TWO, 0)
