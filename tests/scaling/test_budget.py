import pytest

from plinth.config import UserError
from plinth.scaling.budget import Budget, format_seconds, parse_budget


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("10m", "time", 600), ("90s", "time", 90), ("2h", "time", 7200), ("1h30m", "time", 5400), ("1.5 hours", "time", 5400),
        ("2 min", "time", 120), ("1d", "time", 86400), ("3e14flops", "flops", 3e14), ("300Tflops", "flops", 3e14),
        ("2 PFLOP", "flops", 2e15), ("5e6tokens", "tokens", 5e6), ("5Mtokens", "tokens", 5e6), (".5 Btokens", "tokens", 5e8),
    ],
)  # fmt: skip
def test_parse(text, kind, value):
    assert parse_budget(text) == Budget(kind, pytest.approx(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", "has no unit"),
        ("", "budget is empty"),
        ("ten minutes", "not an amount with a unit"),
        ("10 minuts", "Did you mean minutes"),
        ("5e6 tokns", "Did you mean tokens"),
        ("10m 3e14flops", "mixes units"),
        ("0s", "not a positive amount"),
        ("-5m", "not an amount with a unit"),
        ("1e999s", "not a positive amount"),
    ],
)
def test_a_bad_budget_says_why_and_how(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_budget(text)
    assert "10m, 90s" in str(error.value)


def test_a_budget_passes_through_and_prints():
    budget = parse_budget("4m")
    assert parse_budget(budget) is budget
    assert (str(budget), str(parse_budget("3e14flops"))) == ("4 min", "3e+14 flops")


@pytest.mark.parametrize(("seconds", "text"), [(0.5, "0.5 s"), (59, "59 s"), (270, "4 min 30 s"), (7500, "2 h 5 min"), (3599.9, "1 h")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
