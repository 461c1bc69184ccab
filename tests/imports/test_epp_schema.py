import pytest

from picker.errors import ConfigError
from picker.imports.epp_schema import quantity, seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("200ms", 0.2),
        ("1m30s", 90.0),
        ("0", 0.0),
        ("0s", 0.0),
        ("1.5h", 5400.0),
        (".5s", 0.5),
        ("10us", 1e-5),
        ("2s", 2.0),
    ],
)
def test_durations_are_read_as_go_reads_them(text: str, value: float) -> None:
    assert seconds(text, "here") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "s", "1s 2s", "1x", "-1s", "1ss"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"here: .*is not a duration"):
        seconds(text, "here")


@pytest.mark.parametrize(
    ("value", "number"), [(5, 5), ("5000", 5000), ("5k", 5000), ("1Gi", 2**30), ("1.5M", 1_500_000), ("2Ki", 2048)]
)
def test_quantities_are_read_as_kubernetes_reads_them(value: str | int, number: int) -> None:
    assert quantity(value, "here") == number


@pytest.mark.parametrize("value", ["", "k", "1KB", "-1"])
def test_what_is_no_quantity_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"here: .*is not a quantity"):
        quantity(value, "here")
