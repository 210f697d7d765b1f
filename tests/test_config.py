"""The configuration: the specification's defaults, every field checked, and the key nowhere to be seen."""

import copy
import json
import logging
import math
import pickle
import traceback

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import BatchConfig, OpenAIClient, OpenAIConfig, RateLimitConfig

KEY = "sk-never-to-be-seen-0123456789"
NAN, INF = math.nan, math.inf

NOT_COUNTS = (0, -1, True, False, "5", 1.5, NAN, INF, [5], b"5")
NOT_SECONDS = (0, -1, -0.5, True, False, "5", NAN, INF, -INF, None, [5], b"5")
WRONG = {
    OpenAIConfig: {
        "organization_id": (5, True, NAN, ["org"]),
        "base_url": (
            5, True, None, "", "5", "api.openai.com/v1", "ftp://api.openai.com", "https://", "http:///v1",
            "http://[::1", "http://host:port/v1", "http://host:99999/v1", "http://host name/v1",
        ),
        "default_model": (5, True, None, "", " ", NAN),
        "timeout": NOT_SECONDS,
        "max_retries": (-1, True, "5", 1.5, NAN, INF, None),
        "max_cost": (-1, True, "5", NAN, INF),
        "background_timeout": NOT_SECONDS,
        "flex_fallback": (-1, True, "5", NAN, INF),
        "max_response_bytes": (*NOT_COUNTS, None),
    },
    RateLimitConfig: {
        "requests_per_minute": NOT_COUNTS,
        "tokens_per_minute": NOT_COUNTS,
        "max_concurrent": (*NOT_COUNTS, None),
        "adaptive_throttling": ("5", 5, None, NAN, INF, []),
        "burst_seconds": NOT_SECONDS,
        "max_wait": NOT_SECONDS,
        "redis_url": ("", "redis", "http://h", "redis://", "unix://", "redis://h:port", "redis://h h"),
        "namespace": (5, True, None, "", "a b", "{a}", ["a"]),
    },
    BatchConfig: {
        "auto_batch_threshold": (*NOT_COUNTS, None),
        "polling_interval": NOT_SECONDS,
        "completion_window": ("", "24", "5", "1 day", "0h", "-1h", "24h\n", 24, True, None, NAN),
        "max_batch_size": (*NOT_COUNTS, None, 50_001),
    },
}  # fmt: skip
CASES = [
    (config, field, value)
    for config, fields in WRONG.items()
    for field, values in fields.items()
    for value in values
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A key in the environment, and nothing else."""
    for name in ("OPENAI_ORG_ID", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def pickled(value, protocol=None):
    return pickle.loads(pickle.dumps(value, protocol))  # noqa: S301


def refusal(config, **fields):
    with pytest.raises(pydantic.ValidationError) as caught:
        config(**fields)
    return caught.value


def test_the_defaults_are_the_specifications():
    """Every field that the specification gives a default has that one."""
    config = OpenAIConfig()
    assert config.model_dump() == {
        "organization_id": None,
        "base_url": "https://api.openai.com/v1",
        "default_model": "gpt-3.5-turbo",
        "timeout": 30.0,
        "max_retries": 3,
        "max_cost": None,
        "background_timeout": 3600.0,
        "flex_fallback": None,
        "max_response_bytes": 64 * 1024 * 1024,
    }
    assert RateLimitConfig().model_dump() == {
        "requests_per_minute": 500,
        "tokens_per_minute": 90_000,
        "max_concurrent": 10,
        "adaptive_throttling": True,
        "burst_seconds": 60.0,
        "max_wait": 600.0,
        "namespace": "openai-eval-client",
    }
    assert BatchConfig().model_dump() == {
        "auto_batch_threshold": 100,
        "polling_interval": 60.0,
        "completion_window": "24h",
        "max_batch_size": 50_000,
    }


def test_the_environment_fills_in(monkeypatch):
    """The SDK's three variables are read when the config is made, and an argument wins."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-env")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    config = OpenAIConfig()
    assert config.api_key == KEY
    assert config.organization_id == "org-env"
    assert config.base_url == "http://localhost:8000/v1"
    config = OpenAIConfig(api_key="sk-other", organization_id=None, base_url="http://other/v1")
    assert config.api_key == "sk-other"
    assert config.organization_id is None
    assert config.base_url == "http://other/v1"


def test_an_empty_base_url_in_the_environment_is_none(monkeypatch):
    """As the SDK has it."""
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert OpenAIConfig().base_url == "https://api.openai.com/v1"


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_is_refused_with_what_to_do(monkeypatch, value):
    """The message names the argument and the variable."""
    if value is None:
        monkeypatch.delenv("OPENAI_API_KEY")
    else:
        monkeypatch.setenv("OPENAI_API_KEY", value)
    text = str(refusal(OpenAIConfig))
    assert "api_key" in text
    assert "OPENAI_API_KEY" in text
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        OpenAIClient()


@pytest.mark.parametrize(
    ("config", "field", "value"), CASES, ids=lambda item: getattr(item, "__name__", None)
)
def test_what_is_wrong_is_named_with_its_value(config, field, value):
    """The text of the error holds the field and the value, and so does its JSON."""
    error = refusal(config, **{field: value})
    assert isinstance(error, ValueError)
    assert f"{field}={value!r}" in str(error)
    assert [problem["loc"] for problem in error.errors()] == [(field,)]
    assert field in error.json(include_input=False)


def test_the_cases_cover_every_field():
    """A field added later needs its own cases."""
    for config, fields in WRONG.items():
        assert set(fields) == set(config.model_fields) - {"api_key"}


def test_all_that_is_wrong_is_named_at_once():
    """Two wrong fields make one error with both."""
    text = str(refusal(RateLimitConfig, requests_per_minute=0, max_wait=-1))
    assert "requests_per_minute=0" in text
    assert "max_wait=-1" in text


def test_braces_in_a_value_are_shown_as_they_are():
    """The value is no template."""
    assert "base_url='{x}'" in str(refusal(OpenAIConfig, base_url="{x}"))


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (OpenAIConfig, {"timeout": 5, "max_retries": 0}),
        (OpenAIConfig, {"base_url": "http://127.0.0.1:8080/openai/v1/"}),
        (OpenAIConfig, {"base_url": "HTTPS://[::1]:8000"}),
        (RateLimitConfig, {"requests_per_minute": None, "tokens_per_minute": None}),
        (RateLimitConfig, {"requests_per_minute": 1, "burst_seconds": 0.001, "max_wait": 1e9}),
        (BatchConfig, {"completion_window": "7d", "max_batch_size": 1}),
    ],
)
def test_the_edges_are_accepted(config, fields):
    """What makes sense, however small or unusual, is taken as given."""
    made = config(**fields)
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize("config", WRONG)
def test_an_unknown_field_is_refused_by_name(config):
    """A misspelt name does not silently mean the default."""
    text = str(refusal(config, max_retires=5))
    assert "max_retires" in text


@pytest.mark.parametrize("config", WRONG)
def test_a_config_cannot_be_changed(config):
    """Frozen: what a client runs with stays what it was given."""
    made = config()
    field = next(iter(WRONG[config]))
    with pytest.raises(pydantic.ValidationError):
        setattr(made, field, getattr(made, field))


@pytest.mark.parametrize("config", WRONG)
def test_a_config_round_trips(config):
    """As JSON and as pickle; the key comes from the environment again."""
    made = config()
    assert config.model_validate_json(made.model_dump_json()) == made
    assert pickled(made) == made


# --- the key ------------------------------------------------------------------------------------------


def test_a_pickled_or_copied_config_keeps_the_key():
    """Worker processes need it."""
    config = OpenAIConfig(api_key="sk-worker")
    for copied in (pickled(config), copy.copy(config), copy.deepcopy(config)):
        assert copied.api_key == "sk-worker"
    assert config.model_copy(update={"timeout": 1.0}).api_key == "sk-worker"


class Outer(pydantic.BaseModel):
    config: OpenAIConfig


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        lambda config: f"{config}",
        lambda config: config.model_dump(),
        lambda config: config.model_dump(mode="json", round_trip=True),
        lambda config: config.model_dump(include={"api_key", "timeout"}),
        lambda config: config.model_dump(exclude_defaults=True, by_alias=True),
        lambda config: config.model_dump_json(),
        lambda config: config.model_dump_json(indent=2, round_trip=True, include={"api_key"}),
        lambda config: pydantic.TypeAdapter(OpenAIConfig).dump_python(config),
        lambda config: pydantic.TypeAdapter(OpenAIConfig).dump_json(config),
        lambda config: pydantic.TypeAdapter(object).dump_json(config),
        lambda config: Outer(config=config).model_dump(),
        lambda config: Outer(config=config),
        lambda config: [config],
        lambda config: list(config.__rich_repr__()),
        lambda config: list(config.__repr_args__()),
        dict,
        OpenAIClient,
        lambda config: OpenAIClient(config).openai,
        lambda _: OpenAIConfig.model_json_schema(),
        lambda _: OpenAIConfig.__signature__,
    ],
)
def test_the_key_is_in_no_view_of_the_config(show):
    """However a config gets to a screen or a file, its key does not."""
    assert KEY not in repr(show(OpenAIConfig(api_key=KEY)))


class Secretive:
    def __repr__(self):
        return KEY


WITH_KEY = {
    "misspelt name": lambda: OpenAIConfig(apikey=KEY),
    "misspelt name of another case": lambda: OpenAIConfig(API_KEY=KEY, timeout=-1),
    "list": lambda: OpenAIConfig(api_key=[KEY]),
    "bytes": lambda: OpenAIConfig(api_key=KEY.encode()),
    "bytes with a newline": lambda: OpenAIConfig(api_key=KEY.encode() + b"\n"),
    "object": lambda: OpenAIConfig(api_key=Secretive()),
    "SecretStr": lambda: OpenAIConfig(api_key=pydantic.SecretStr(KEY)),
    "dict": lambda: OpenAIConfig(api_key={KEY: KEY}),
    "newline": lambda: OpenAIConfig(api_key=KEY + "\n"),
    "space": lambda: OpenAIConfig(api_key=f"{KEY} {KEY}"),
    "not ASCII": lambda: OpenAIConfig(api_key=f"{KEY}\N{EN DASH}"),
    "lone surrogate": lambda: OpenAIConfig(api_key=f"{KEY}\ud800"),
    "beside a wrong field": lambda: OpenAIConfig(api_key=KEY, timeout=-1),
    "beside an unknown field": lambda: OpenAIConfig(api_key=KEY, region="eu"),
    "no mapping at all": lambda: OpenAIConfig.model_validate(KEY),
    "wrong JSON": lambda: OpenAIConfig.model_validate_json(f'{{"api_key": "{KEY}", }}'),
    "cut JSON": lambda: OpenAIConfig.model_validate_json(f'{{"api_key": "{KEY}"'),
    "JSON string": lambda: OpenAIConfig.model_validate_json(f'"{KEY}"'),
    "assignment": lambda: setattr(OpenAIConfig(), "api_key", KEY),
    "nested": lambda: Outer(config={"api_key": KEY, "timeout": 0}),
    "nested misspelt": lambda: Outer.model_validate({"config": {"apikey": KEY}}),
    "password of base_url": lambda: OpenAIConfig(base_url=f"https://user:{KEY}@example.com/v1"),
    "user of base_url": lambda: OpenAIConfig(base_url=f"https://{KEY}@example.com/v1"),
}


@pytest.mark.parametrize("make", WITH_KEY.values(), ids=WITH_KEY)
def test_the_key_is_in_no_error(make):
    """However wrong the config was, its error can be logged whole."""
    with pytest.raises(pydantic.ValidationError) as caught:
        make()
    error = caught.value
    shown = [str(error), repr(error), repr(error.errors()), error.json(), repr(error.args)]
    shown.append("".join(traceback.format_exception(error)))
    assert [text for text in shown if KEY in text] == []


def test_a_misspelt_name_for_the_key_is_named():
    """So that the mistake is found although the value is hidden."""
    assert "apikey" in str(refusal(OpenAIConfig, apikey=KEY))


@given(st.text(alphabet=st.characters(exclude_categories=()), min_size=1))
def test_a_key_is_usable_or_refused_unseen(suffix):
    """Any text either can stand in an HTTP header or is refused without being shown."""
    key = KEY + suffix
    if key.isascii() and key.isprintable() and " " not in key:
        assert OpenAIConfig(api_key=key).api_key == key
    else:
        assert KEY not in str(refusal(OpenAIConfig, api_key=key))


def test_the_key_is_in_no_log(caplog):
    """Nor does a config at debug level write it."""
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("app").debug(
            "config %s, %r", OpenAIConfig(), json.loads(OpenAIConfig().model_dump_json())
        )
    assert KEY not in caplog.text
