"""Calibration: what it takes to be doubted, and to be believed again."""

from __future__ import annotations

from picker.core.calibration import Calibration


def report(calibration: Calibration, cached: int, *, predicted: float = 320.0, times: int = 1, row: int = 0) -> bool:
    changes = [calibration.reported(row, least=predicted, most=predicted, cached=cached) for _ in range(times)]
    return any(changes)


def test_predictions_that_come_true_are_believed() -> None:
    calibration = Calibration(2)
    assert not report(calibration, 320, times=100)
    assert not calibration.doubted.any()
    assert calibration.record(0).right == 100


def test_a_source_is_doubted_when_a_quarter_of_its_latest_predictions_fail() -> None:
    calibration = Calibration(2)
    report(calibration, 320, times=24)
    assert not report(calibration, 288, times=7)
    assert report(calibration, 288)
    assert calibration.doubted.tolist() == [True, False]


def test_a_doubted_source_is_believed_again_when_its_predictions_come_true() -> None:
    calibration = Calibration(1)
    report(calibration, 0, times=8)
    assert not report(calibration, 320, times=29)
    assert report(calibration, 320)
    assert not calibration.doubted.any()


def test_what_lies_between_least_and_most_is_right() -> None:
    calibration = Calibration(1)
    for cached in (320, 480, 640):
        calibration.reported(0, least=320.0, most=640.0, cached=cached)
    calibration.reported(0, least=320.0, most=640.0, cached=304)
    calibration.reported(0, least=320.0, most=640.0, cached=656)
    record = calibration.record(0)
    assert (record.right, record.over, record.under, record.error) == (3, 1, 1, 32.0)


def test_the_complaint_names_what_is_likely() -> None:
    calibration = Calibration(3)
    report(calibration, 0, times=10)
    report(calibration, 160, times=10, row=1)
    report(calibration, 640, times=10, row=2)
    assert "prefix caching" in calibration.complaint(0)
    assert "too high" in calibration.complaint(1)
    assert "too low" in calibration.complaint(2)


def test_a_new_stream_starts_with_a_clean_record() -> None:
    calibration = Calibration(1)
    report(calibration, 0, times=10)
    calibration.forget(0)
    assert (bool(calibration.doubted[0]), calibration.record(0).predictions) == (False, 0)


def counters(calibration: Calibration, *, found: float, asked: float = 1600.0) -> bool:
    """Sixteen answers of a hundred tokens each that do not say what was cached; half of it was expected to be."""
    calibration.counted(0, 0.0, 0.0)
    for _ in range(16):
        calibration.silent(0, prompt=100.0, expected=50.0)
    return calibration.counted(0, asked, found)


def test_counters_stand_in_for_answers_that_say_nothing() -> None:
    assert not counters(Calibration(1), found=800.0)
    assert counters(Calibration(1), found=160.0)


def test_counters_say_nothing_while_others_send_requests_too() -> None:
    assert not counters(Calibration(1), found=160.0, asked=3200.0)


def test_counters_of_a_restarted_engine_are_not_compared_with_those_before() -> None:
    calibration = Calibration(1)
    calibration.counted(0, 5000.0, 4000.0)
    for _ in range(16):
        calibration.silent(0, prompt=100.0, expected=50.0)
    assert not calibration.counted(0, 100.0, 0.0)
    assert not calibration.doubted[0]


def test_rows_that_join_are_believed() -> None:
    calibration = Calibration(1)
    report(calibration, 0, times=10)
    calibration.grow(3)
    assert calibration.doubted.tolist() == [True, False, False]


def test_predictions_that_nothing_is_compared_with_are_named() -> None:
    calibration = Calibration(1)
    for _ in range(7):
        calibration.silent(0, prompt=100.0, expected=64.0)
    assert calibration.record(0).unwitnessed is None, "too few to say"
    calibration.silent(0, prompt=100.0, expected=64.0)
    assert "cached_tokens" in (calibration.record(0).unwitnessed or "")
    calibration.counted(0, 1000.0, 100.0)
    assert calibration.record(0).unwitnessed is None, "the counters tell"


def test_predictions_that_answers_confirm_are_witnessed() -> None:
    calibration = Calibration(1)
    calibration.reported(0, least=64.0, most=64.0, cached=64)
    for _ in range(9):
        calibration.silent(0, prompt=100.0, expected=64.0)
    assert calibration.record(0).unwitnessed is None
