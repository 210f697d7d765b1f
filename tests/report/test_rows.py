"""Answers as rows and data frames."""

import sys

import pytest
from answers import SCRIPT, answer, parsed

from openai_eval_client import PartialFailureError, to_pandas
from openai_eval_client._report.rows import rows


def test_there_is_a_row_for_each_prompt():
    """A prompt was answered, failed, or neither."""
    first, second, third = rows([answer(), ValueError("wrong"), None])
    assert (first["index"], first["content"], first["prompt_tokens"], first["cost"]) == (0, SCRIPT, 7, 0.002)
    assert "error" not in first
    assert second == {"index": 1, "error": "wrong", "error_type": "ValueError"}
    assert third == {"index": 2}


def test_pairs_bring_their_index():
    """`as_completed` yields them."""
    assert [row["index"] for row in rows([(7, answer()), (3, ValueError())])] == [7, 3]


def test_the_error_of_a_run_is_its_responses_and_failures():
    """Its rows are in the order of the prompts."""
    error = PartialFailureError([answer(), None], {1: ValueError("wrong")})
    assert [row.get("error_type") for row in rows(error)] == [None, "ValueError"]


def test_parsed_objects_become_columns():
    """They do so only when asked for."""
    (plain,), (more,) = rows([parsed("Paris")]), rows([parsed("Paris")], parsed=True)
    assert "parsed_city" not in plain
    assert more["parsed_city"] == "Paris"


def test_anything_else_is_refused():
    """The message names its class."""
    with pytest.raises(TypeError, match="not dict"):
        list(rows([{}]))


def test_without_pandas_it_says_what_to_install(monkeypatch):
    """The message names the extra."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'openai-eval-client\[pandas\]'"):
        to_pandas([])


def test_a_data_frame_has_a_type_for_each_column():
    """It has the same types where all prompts failed, or there is none."""
    pandas = pytest.importorskip("pandas")
    frame = to_pandas([answer(), ValueError("wrong"), None, parsed("Rome")], parsed=True)
    assert list(frame["index"]) == [0, 1, 2, 3]
    assert frame["prompt_tokens"].sum() == 14
    assert frame["prompt_tokens"].isna().tolist() == [False, True, True, False]
    assert frame["cost"].mean() == pytest.approx(0.002)
    assert frame["parsed_city"].tolist()[3] == "Rome"
    assert frame["fits_schema"].isna().all()
    for few in ([], [None], [ValueError()]):
        assert (to_pandas(few).dtypes == frame.dtypes[: len(to_pandas(few).columns)]).all()
    assert isinstance(frame["cached"].dtype, pandas.BooleanDtype)


def test_a_row_says_what_the_model_thought_called_and_cited():
    """Each is missing where there was none, or an empty list."""
    calls, cited = [{"id": "call_1"}], [{"type": "url_citation"}]
    odd = {"fits_schema": False, "unsent_parameters": ("temperature",)}
    (row,) = rows([answer(reasoning="I think.", tool_calls=calls, annotations=cited, **odd)])
    assert (row["reasoning"], row["tool_calls"], row["annotations"]) == ("I think.", calls, cited)
    assert {name: row[name] for name in odd} == odd
    (plain,) = rows([answer()])
    assert (plain["reasoning"], plain["tool_calls"], plain["annotations"]) == (None, [], [])
