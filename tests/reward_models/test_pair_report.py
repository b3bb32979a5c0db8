"""The report on held-out pairs, worked by hand."""

import json
import math

import numpy as np
import pytest

from reward_models.pair_report import (
    ScoredPair,
    accuracy,
    by_length,
    by_source,
    calibration,
    correlation,
    draw_report,
    expected_calibration_error,
    length_bias,
    report,
    report_table,
)


def pair(difference, lengths=(10, 10), source=""):
    return ScoredPair(
        chosen=difference, rejected=0.0, chosen_length=lengths[0], rejected_length=lengths[1], source=source
    )


def logit(p):
    return math.log(p / (1 - p))


def test_a_tie_is_half_right():
    assert accuracy([pair(1.0), pair(-1.0), pair(0.0), pair(2.0)]).mean == (1 + 0 + 0.5 + 1) / 4


def test_the_calibration_curve_compares_the_confidence_in_the_preferred_one_with_how_often_it_is_the_chosen_one():
    # confidence 0.72 four times, right three times; 0.97 twice, right once; the last is the model's, not the pair's
    pairs = [pair(logit(0.72))] * 3 + [pair(-logit(0.72)), pair(logit(0.97)), pair(-logit(0.97))]
    low, high = calibration(pairs)
    assert (low["predicted"], low["observed"]["mean"], low["observed"]["n"]) == (pytest.approx(0.72), 0.75, 4)
    assert (high["predicted"], high["observed"]["mean"], high["observed"]["n"]) == (pytest.approx(0.97), 0.5, 2)
    assert expected_calibration_error([low, high]) == pytest.approx((4 * 0.03 + 2 * 0.47) / 6)


def test_a_model_that_is_right_as_often_as_it_thinks_has_no_calibration_error():
    pairs = [pair(logit(0.8))] * 80 + [pair(-logit(0.8))] * 20
    assert expected_calibration_error(calibration(pairs)) == pytest.approx(0, abs=1e-12)
    shouting = [pair(10 * p.chosen) for p in pairs]
    assert expected_calibration_error(calibration(shouting)) == pytest.approx(0.2, abs=1e-5)


def test_certainty_and_ignorance_fall_into_the_outermost_bins():
    assert [(b["predicted"], b["observed"]["mean"]) for b in calibration([pair(0.0), pair(800.0)])] == [
        (0.5, 0.5),
        (1.0, 1.0),
    ]


def test_accuracy_is_told_by_source():
    found = by_source([pair(1, source="a"), pair(-1, source="a"), pair(1, source="b"), pair(1)])
    assert {s: (e["mean"], e["n"]) for s, e in found.items()} == {"(none)": (1.0, 1), "a": (0.5, 2), "b": (1.0, 1)}


def test_accuracy_is_told_by_quarters_of_length_and_pairs_of_one_length_stay_together():
    found = by_length([pair(1, (n, n)) for n in (1, 2, 3, 4, 5, 6, 7, 8)])
    assert [(name, e["n"]) for name, e in found.items()] == [(f"up to {n} tokens", 2) for n in (2, 4, 6, 8)]
    found = by_length([pair(1, (5, 5))] * 7 + [pair(-1, (9, 9))])
    assert [(name, e["mean"], e["n"]) for name, e in found.items()] == [
        ("up to 5 tokens", 1.0, 7),
        ("up to 9 tokens", 0.0, 1),
    ]


def test_a_model_that_only_sees_length_is_right_exactly_where_the_chosen_one_is_longer():
    lengths = [(20, 10), (30, 10), (10, 25), (12, 12)]
    scored = [ScoredPair(chosen=float(c), rejected=float(r), chosen_length=c, rejected_length=r) for c, r in lengths]
    bias = length_bias(scored)
    assert (bias["chosen_longer"]["mean"], bias["chosen_shorter"]["mean"], bias["same_length"]["mean"]) == (1, 0, 0.5)
    assert bias["score_and_length"]["mean"] == pytest.approx(1)
    assert bias["difference_of_scores_and_of_lengths"]["mean"] == pytest.approx(1)
    assert bias["longer_is_preferred"]["mean"] == 1
    assert bias["longer_is_chosen"]["mean"] == pytest.approx(2 / 3)
    assert bias["preferred - chosen"]["mean"] == pytest.approx(1 / 3)


def test_a_model_that_is_always_right_likes_length_as_much_as_the_pairs_do():
    bias = length_bias([pair(1.0, (20, 10)), pair(1.0, (10, 20)), pair(1.0, (10, 30))])
    assert (bias["longer_is_preferred"]["mean"], bias["preferred - chosen"]["mean"]) == (pytest.approx(1 / 3), 0)


def test_a_correlation_is_pearsons_and_its_interval_that_of_resampled_pairs():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 2))
    y = x + generator.normal(size=(400, 2))
    found = correlation(x, y)
    assert found["mean"] == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert found["low"] < found["mean"] < found["high"]
    assert 0.04 < found["high"] - found["low"] < 0.12  # 2 · 1.96 (1 - r²) / sqrt(800) = 0.07
    doubled = correlation(np.hstack([x, x]), np.hstack([y, y]))  # the same again is no new evidence
    assert (doubled["low"], doubled["high"]) == pytest.approx((found["low"], found["high"]))


def test_a_correlation_with_a_constant_does_not_exist():
    assert correlation(np.ones((5, 1)), np.arange(5.0)[:, None]) is None


def test_the_report_is_plain_json_and_the_table_and_picture_show_it(tmp_path):
    pairs = [pair(1.0, (9, 4), "sums"), pair(-0.5, (3, 8), "prose $x$"), pair(0.0, (5, 5), "sums")]
    found = report(pairs)
    assert json.loads(json.dumps(found)) == found
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5)) + math.log(2)) / 3
    assert found["loss"] == pytest.approx(expected)
    table = report_table(found)
    assert "chosen one shorter" in table
    assert "  sums" in table
    draw_report(pairs, found, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_all_pairs_of_one_length_and_one_score_leave_no_correlation_and_are_still_reported(tmp_path):
    pairs = [pair(0.0)] * 3
    found = report(pairs)
    assert found["length_bias"]["score_and_length"] is None
    assert found["length_bias"]["chosen_shorter"] is None
    assert "correlation of score and length" in report_table(found)
    draw_report(pairs, found, tmp_path / "report.png")
