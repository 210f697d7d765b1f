"""The options of the simulated server: what makes no sense is refused by name."""

import json

import pytest

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._options import Options, as_json


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faults": {"599": 0.1}}, "599"),
        ({"faults": {"500": 1.5}}, "500=1.5"),
        ({"faults": {"500": float("nan")}}, "500=nan"),
        ({"faults": {"500": 0.6, "drop": 0.6}}, "500, drop sum to more than 1"),
        ({"script": ["ok", "oops"]}, "'oops'"),
        ({"script": [("(", "500")]}, "script: missing \\)"),
        ({"script": [("a", [])]}, "script: there is no outcome"),
        ({"script": [("a", 5)]}, "script: 5 is neither"),
        ({"script": [("a", ["500", None])]}, "script: None is neither"),
        ({"script": [("a",)]}, "script: not enough values"),
        ({"script": "500"}, "script: '500'"),
        ({"fault_wait": -1}, "fault_wait must not be negative"),
        ({"background_polls": -1}, "background_polls must not be negative"),
        ({"rpm": 0}, "rpm must be positive"),
        ({"window": -1}, "window must be positive"),
        ({"latency": -1}, "latency must not be negative"),
        ({"charge": "later"}, "charge must be one of upfront, actual"),
        ({"stamp": "never"}, "stamp must be one of"),
        ({"models": "gpt-4o"}, "models must be"),
        ({"process": True, "answer": str}, "answer: not with process=True"),
        ({"process": True, "count_tokens": len}, "count_tokens: not with process=True"),
        ({"cpu": 0}, "only with process=True"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    """The error names the option and the value that is wrong."""
    with pytest.raises(ValueError, match=message):
        SimulatedServer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_seconds": -1}, "batch_seconds"),
        ({"file_lag": -1}, "file_lag"),
        ({"enqueued_tokens": -1}, "enqueued_tokens"),
        ({"enqueued_refusal": "never"}, "enqueued_refusal"),
        ({"unknown_file": "never"}, "unknown_file"),
        ({"completion_windows": "24h"}, "completion_windows"),
        ({"completion_windows": ["a day"]}, "completion_windows: 'a day'"),
        ({"completion_windows": [24]}, "completion_windows: 24"),
        ({"batch_plans": {"status": "failed"}}, "batch_plans"),
        ({"batch_plans": ["failed"]}, r"batch_plans\[0\]"),
        ({"batch_plans": [{}, {"state": "failed"}]}, r"batch_plans\[1\]: 'state'"),
        ({"batch_plans": [{"status": "done"}]}, r"batch_plans\[0\]: status"),
        ({"batch_plans": [{"seconds": -1}]}, r"batch_plans\[0\]: seconds"),
        ({"batch_plans": [{"seconds": None}]}, r"batch_plans\[0\]: seconds"),
        ({"batch_plans": [{"done": 1.5}]}, r"batch_plans\[0\]: done"),
        ({"batch_plans": [{"done": True}]}, r"batch_plans\[0\]: done"),
        ({"batch_plans": [{"lines": "ok"}]}, r"batch_plans\[0\]: lines"),
        ({"batch_plans": [{"lines": ["fine"]}]}, r"batch_plans\[0\]: lines"),
        ({"batch_plans": [{"output_file": "lost"}]}, r"batch_plans\[0\]: output_file"),
        ({"batch_plans": [{"error_file": None}]}, r"batch_plans\[0\]: error_file"),
        ({"batch_plans": iter([{}])}, "batch_plans"),
        ({"batch_plans": [{"counts": {"done": 1}}]}, r"batch_plans\[0\]: counts"),
        ({"batch_plans": [{"counts": {"total": "1"}}]}, r"batch_plans\[0\]: counts"),
        ({"batch_plans": [{"errors": ["bad"]}]}, r"batch_plans\[0\]: errors"),
        ({"batch_plans": [{"input_gone": 1}]}, r"batch_plans\[0\]: input_gone"),
        ({"batch_faults": {"ok": 0.5}}, "batch_faults"),
        ({"batch_faults": {"400": 0.6, "500": 0.6}}, "batch_faults: the probabilities of 400, 500"),
        ({"endpoint_script": {"nowhere": ["ok"]}}, "endpoint_script: 'nowhere'"),
        ({"endpoint_script": {"create": "500"}}, "endpoint_script: create"),
        ({"endpoint_script": {"create": ["truncate"]}}, "endpoint_script: create"),
        ({"endpoint_faults": {"nowhere": {}}}, "endpoint_faults: 'nowhere'"),
        ({"endpoint_faults": {"list": {"500": 2}}}, "endpoint_faults: list: 500=2"),
    ],
)
def test_batch_options_that_make_no_sense_are_named(options, message):
    """The error names the option, the plan or the endpoint that is wrong."""
    with pytest.raises(ValueError, match=message):
        SimulatedServer(**options)


def test_options_are_keyword_only_and_the_key_is_not_shown():
    """A repr may be logged: it does not hold the key."""
    with pytest.raises(TypeError):
        SimulatedServer(0)
    assert "sk-secret" not in repr(SimulatedServer(api_key="sk-secret"))


def test_options_pass_through_json():
    """Options arrive in another process as they were."""
    options = Options(
        models={"m"},
        script=("ok", "500", ("a", ("429", b"\xff", {"status": 418}))),
        batch_plans=({"lines": ("ok", "400"), "counts": {"total": 3}}, {"errors": ({"code": "c"},)}),
        batch_faults={"400": 0.5},
        completion_windows={"7d"},
        endpoint_script={"create": ("ok", "drop_after")},
        endpoint_faults={"list": {"500": 0.5}},
    )
    passed = json.loads(json.dumps(as_json(options)))
    assert as_json(Options(**passed)) == passed
