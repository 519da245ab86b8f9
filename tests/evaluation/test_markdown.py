"""Markdown tables."""

import pytest

from vlv.evaluation import markdown_table


def test_a_table_has_a_header_a_rule_and_one_line_for_each_row():
    assert markdown_table(["name", "value"], [["a", 1], ["b", 0.5]]) == (
        "| name | value |\n|---|---|\n| a | 1 |\n| b | 0.5 |"
    )


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"expected 2 cells in each row, got 1: \['a'\]"):
        markdown_table(["name", "value"], [["a"]])
