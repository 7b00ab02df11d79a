"""What readers see of a table: constant columns aside, shares within 0 and 1, errors beside what they are of."""

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salsa.report import formats, outcomes, sections
from salsa.report.formats import Number, Table, Verdict

CELLS = st.sampled_from(["a", "b", Number("1"), Number("1 [0, 2]"), Verdict("supported")])


def test_columns_that_say_the_same_go_into_the_caption():
    table = Table(
        ["claim", "verdict", "judge", "kl coef", "effect", "n"],
        [["one", Verdict("supported"), "gold", Number("0.3"), Number("1 [0, 2]"), Number("3")],
         ["one", Verdict("supported"), "gold", Number("0.3"), Number("1 [0, 2]"), Number("4")]],
        ("claim-one", ""),
    )  # fmt: skip
    shown, constants = formats.without_constants(table)
    assert constants == {"judge": "gold", "kl coef": "0.3"} and shown.names == ("claim-one", "")
    assert shown.columns == ["claim", "verdict", "effect", "n"] and shown.rows[1][3] == "4"
    one = Table(["arm", "n"], [["ppo", Number("1")]])
    assert formats.without_constants(one) == (one, {})
    same = Table(["a", "b"], [["x", "y"], ["x", "y"]])
    assert formats.without_constants(same) == (Table(["a"], [["x"], ["x"]]), {"b": "y"})


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=2, max_size=4))
def test_nothing_is_lost_with_the_columns(rows):
    table = Table(["x", "y", "z"], [list(row) for row in rows])
    shown, constants = formats.without_constants(table)
    back = [dict(zip(shown.columns, row, strict=True)) | constants for row in shown.rows]
    assert back == [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_intervals_of_shares_are_cut_for_readers_and_whole_in_the_csv():
    frame = pd.DataFrame({"arm": ["a", "b", "c"], "eos_rate": [0.99, 0.5, math.nan],
                          "eos_rate_low": [0.95, -0.2, math.nan], "eos_rate_high": [1.03, 1.2, math.nan]})  # fmt: skip
    before = frame.copy()
    section = sections.sections()["rewards"]
    shown = section.shown(frame)
    assert [row[1] for row in shown.rows] == ["0.99 [0.95, 1]", "0.5 [0, 1]", ""]
    pd.testing.assert_frame_equal(frame, before)
    assert section.cut(frame)[1] and not section.cut(frame.assign(eos_rate_low=0.1, eos_rate_high=0.9))[1]


@pytest.mark.parametrize(("measure", "most"), [("win_rate", 0.5), ("matched_win_rate", 1), ("gold_reward", math.inf)])
def test_differences_of_win_rates_are_cut_where_none_can_lie(measure, most):
    row = {"measure": measure, "effect": 0.1, "effect_low": -3.0, "effect_high": 2.0}
    assert outcomes.shown_interval(row) == (0.1, max(-3.0, -most), min(2.0, most))
    none = row | {"effect_low": math.nan, "effect_high": math.nan}
    assert all(math.isnan(bound) for bound in outcomes.shown_interval(none)[1:])


def test_every_column_of_win_rates_is_a_share():
    """Whatever table has a rate with an interval over replicates shows it within 0 and 1."""
    shares = {name: section.shares for name, section in sections.sections().items() if section.shares}
    assert shares["win_rates"] == ("adjusted_win_rate", "replicates", "length_controlled")
    assert {"paper_table", "ablations", "alpha_curve", "rewards"} <= set(shares)


def test_errors_stand_beside_what_they_are_of():
    frame = pd.DataFrame({"x": [1.0, 2.0], "x_se": [0.1, math.nan], "other_se": [3.0, 4.0]})
    table = formats.readable(frame)
    assert table.columns == ["x", "other se"] and table.rows == [["1 ± 0.1", "3"], ["2", "4"]]
    assert table.numeric() == [True, True]
