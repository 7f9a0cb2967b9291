"""The floors of the house: what may import what, and what may be called where.

The rules are functions of a tree of sources, so that each can also be shown to fail, on a small false house.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# Low to high. A module imports from its own package and from lower floors; what shares a floor is independent.
FLOORS = (
    ("errors", "collector"),
    ("format",),
    ("storage",),
    ("inspection",),
    ("description", "opening", "locating"),
    ("exporting",),
    ("checkpoint",),
    ("state",),
    ("part",),
    ("saving", "loading", "data"),
    ("run",),
    ("policies", "pace", "notices", "progress", "config"),
    ("company",),
    ("preemption", "handle"),
    ("distributed",),
    ("resume", "writer", "loaders"),
    ("keeping", "training"),
    ("block",),
    ("checkpointer",),
    ("classic", "audit"),
    ("cli",),
)
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
FREE = ("__init__", "__main__", "_version")  # they stand outside: the door, the bell and the number on the house

# Looking at checkpoints, from Python or from the command line, does not load torch, which takes seconds.
WITHOUT_TORCH = tuple(
    "errors format storage inspection description opening locating exporting checkpoint run policies pace progress "
    "config notices preemption cli __init__ _version".split()
)

# format says what bytes mean; where they lie is not its business.
IO_MODULES = frozenset("asyncio fcntl http io mmap os shutil socket subprocess tempfile urllib".split())
IO_METHODS = frozenset(
    "open read_bytes read_text write_bytes write_text exists is_dir is_file stat iterdir glob rglob mkdir touch".split()
)

# Durability lives in one file. Of the methods of paths, those that nothing but a path has.
DURABLE = "storage.durable"
DURABLE_CALLS = frozenset(
    {
        *(f"os.{name}" for name in "fsync fdatasync sync rename renames replace link lockf posix_fallocate".split()),
        *(f"os.{name}" for name in "unlink remove rmdir removedirs".split()),
        *("shutil.rmtree", "shutil.move", "fcntl.flock", "fcntl.lockf"),
    }
)
DURABLE_METHODS = frozenset({"unlink", "rename", "rmdir", "hardlink_to"})

# Reading a checkpoint runs no code that the checkpoint chose.
PICKLES = frozenset("pickle _pickle cPickle cloudpickle dill joblib marshal shelve".split())
PICKLE_ERRORS = frozenset({"pickle.UnpicklingError", "pickle.PickleError"})  # to say what another file holds
CODE_RUNNERS = frozenset({"eval", "exec", "builtins.eval", "builtins.exec", "torch.save"})
# DCP's planners call torch.load on what a storage reader gives them: that is made in memory, of a decoded value.
PICKLED_IN_MEMORY = {"distributed.dcp.values": frozenset({"torch.save"})}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: ``origin`` is dotted, as in ``holdfast.format.names.MANIFEST``."""

    origin: str
    line: int
    at_runtime: bool  # not only for type checkers
    at_module_level: bool


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the house; ``name`` is relative to it, as in ``storage.durable``."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...] = field(repr=False)

    @property
    def unit(self) -> str:
        """The package or module that stands on a floor."""
        return self.name.partition(".")[0]

    def at(self, line: int, found: str) -> str:
        """A finding, with its place."""
        return f"{self.name}:{line}: {found}"


def read_house(root: Path) -> list[Module]:
    """Every module of the package at ``root``."""
    return [read_module(path, root) for path in sorted(root.rglob("*.py"))]


def read_module(path: Path, root: Path) -> Module:
    """One module of the package at ``root``."""
    parts = path.relative_to(root).with_suffix("").parts
    package = ("holdfast", *parts[:-1])
    name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return Module(name, path, tree, tuple(imports_in(tree, package)))


def imports_in(
    node: ast.AST, package: tuple[str, ...], at_runtime: bool = True, at_module_level: bool = True
) -> Iterator[Import]:
    """Every import below ``node``, those inside functions too."""
    for child in ast.iter_child_nodes(node):
        for origin in origins(child, package):
            yield Import(origin, getattr(child, "lineno", 0), at_runtime, at_module_level)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports_in(child, package, at_runtime and not typing_only, at_module_level and not deferred)


def origins(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """What one node imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            return [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]
        case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
            return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def uses_in(module: Module) -> Iterator[tuple[ast.expr, str]]:
    """Every name or attribute in ``module``, and where it comes from: ``os.rename``, whatever it is called here."""
    aliases = {
        alias.asname or alias.name.partition(".")[0]: origin if alias.asname else origin.partition(".")[0]
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import)
        for alias, origin in zip(node.names, origins(node, ()), strict=True)
    } | {
        alias.asname or alias.name: origin
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom)
        for alias, origin in zip(node.names, origins(node, ()), strict=True)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node, dotted(node, aliases)


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """The origin of ``a.b.c``; that of ``f().c`` is ``.c``."""
    match node:
        case ast.Name():
            return aliases.get(node.id, node.id)
        case ast.Attribute():
            return f"{dotted(node.value, aliases)}.{node.attr}"
    return ""


# The rules: each takes the modules of a house and says what is wrong with them.


def wrong_floors(house: Iterable[Module]) -> Iterator[str]:
    """Imports that point up or sideways, and modules without a floor."""
    for module in house:
        if module.unit in FREE:
            continue
        if module.unit not in FLOOR:
            yield module.at(1, f"'{module.unit}' stands on no floor: give it one in FLOORS of tests/test_house.py")
            continue
        for entry in module.imports:
            package, _, rest = entry.origin.partition(".")
            target = rest.partition(".")[0]
            if package != "holdfast" or target in (module.unit, "__version__", "_version"):
                continue
            if target not in FLOOR:
                yield module.at(entry.line, f"imports {entry.origin}: import it from the module where it lives")
            elif FLOOR[target] >= FLOOR[module.unit]:
                yield module.at(entry.line, f"imports {entry.origin}, which stands no lower than {module.unit}")


def torch_below(house: Iterable[Module]) -> Iterator[str]:
    """Imports of torch where importing must stay quick; in functions they may stand."""
    for module in house:
        for entry in module.imports:
            is_torch = entry.origin.partition(".")[0] == "torch"
            if module.unit in WITHOUT_TORCH and is_torch and entry.at_runtime and entry.at_module_level:
                yield module.at(entry.line, f"imports {entry.origin} when it is imported")


def io_in_format(house: Iterable[Module]) -> Iterator[str]:
    """Input or output in format."""
    for module in house:
        if module.unit != "format":
            continue
        for entry in module.imports:
            if entry.origin.partition(".")[0] in IO_MODULES:
                yield module.at(entry.line, f"imports {entry.origin}, which does input or output")
        for call, origin in calls_in(module):
            if origin == "open" or ("." in origin and origin.rpartition(".")[2] in IO_METHODS):
                yield module.at(call.lineno, f"calls {origin}, which does input or output")


def durability_elsewhere(house: Iterable[Module]) -> Iterator[str]:
    """System calls that make or break a promise of durability, outside the one file that keeps it."""
    for module in house:
        if module.name == DURABLE:
            continue
        for node, origin in uses_in(module):
            if origin in DURABLE_CALLS:
                yield module.at(node.lineno, f"{origin} belongs in storage/durable.py")
        for call, origin in calls_in(module):
            receiver, _, method = origin.rpartition(".")
            known = origin in DURABLE_CALLS or receiver == "durable" or receiver == f"holdfast.{DURABLE}"
            if isinstance(call.func, ast.Attribute) and method in DURABLE_METHODS and not known:
                yield module.at(call.lineno, f".{method}() of a path belongs in storage/durable.py")


def code_from_data(house: Iterable[Module]) -> Iterator[str]:
    """Pickle, eval and exec; loaders of others that unpickle unless told not to."""
    for module in house:
        for entry in module.imports:
            package, _, name = entry.origin.partition(".")
            if package in PICKLES and (name or package != "pickle") and entry.origin not in PICKLE_ERRORS:
                yield module.at(entry.line, f"imports {entry.origin}: no pickle")
        allowed = PICKLED_IN_MEMORY.get(module.name, frozenset())
        for node, origin in uses_in(module):
            if (origin in CODE_RUNNERS and origin not in allowed) or (
                origin.startswith("pickle.") and origin not in PICKLE_ERRORS
            ):
                yield module.at(node.lineno, f"uses {origin}: data must not become code")
        for call, origin in calls_in(module):
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
            if origin == "torch.load" and given.get("weights_only") is not True:
                yield module.at(call.lineno, "torch.load without weights_only=True")
            if "allow_pickle" in given and given["allow_pickle"] is not False:
                yield module.at(call.lineno, f"{origin} with allow_pickle")


def calls_in(module: Module) -> Iterator[tuple[ast.Call, str]]:
    """Every call in ``module``, and the origin of what is called."""
    origin_of = dict(uses_in(module))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield node, origin_of.get(node.func, "")


RULES: tuple[Callable[[Iterable[Module]], Iterator[str]], ...] = (
    wrong_floors,
    torch_below,
    io_in_format,
    durability_elsewhere,
    code_from_data,
)


@pytest.fixture(scope="module")
def house() -> list[Module]:
    """The installed package."""
    spec = importlib.util.find_spec("holdfast")
    assert spec is not None
    assert spec.submodule_search_locations
    return read_house(Path(spec.submodule_search_locations[0]))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Callable[[Iterable[Module]], Iterator[str]], house: list[Module]) -> None:
    """Arrows point down, torch stays above, format does no I/O, durability is in one file, data never becomes code."""
    assert list(rule(house)) == []


def test_every_floor_is_inhabited(house: list[Module]) -> None:
    """A floor whose module was renamed or removed is noticed."""
    assert set(FLOOR) - {module.unit for module in house} == set()


def test_looking_at_checkpoints_does_not_load_torch(house: list[Module]) -> None:
    """No module that reads checkpoints loads torch when it is imported, by whatever way: the command line neither."""
    quick = [module.name for module in house if module.unit in WITHOUT_TORCH and module.name != "__init__"]

    assert {"run", "policies", "cli"} <= set(quick)
    assert loads_torch(quick) is False


def test_saving_does_load_torch() -> None:
    """The probe of the test above sees torch where it is."""
    assert loads_torch(["state.capture"]) is True


def loads_torch(names: Iterable[str]) -> bool:
    """Whether a new process has torch after importing these modules."""
    imports = "; ".join(["import holdfast, sys", *(f"import holdfast.{name}" for name in names)])
    code = f"{imports}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout == "True\n"


# False houses: one violation each, and what has to be said about it.
VIOLATIONS = {
    "up": ("errors.py", "import holdfast.run", "errors:1: imports holdfast.run, which stands no lower than errors"),
    "up, in a function": (
        "format/names.py",
        "def f():\n    from holdfast.storage.local import LocalStore",
        "format.names:2: imports holdfast.storage.local.LocalStore, which stands no lower than format",
    ),
    "up, for types only": (
        "storage/local.py",
        "if TYPE_CHECKING:\n    from holdfast import checkpoint",
        "storage.local:2: imports holdfast.checkpoint, which stands no lower than storage",
    ),
    "up, relative": (
        "state/capture.py",
        "from ..run import Run",
        "state.capture:1: imports holdfast.run.Run, which stands no lower than state",
    ),
    "up, from a package": (
        "format/__init__.py",
        "from ..storage import local",
        "format:1: imports holdfast.storage.local, which stands no lower than format",
    ),
    "up, by function": (
        "checkpoint.py",
        "importlib.import_module('holdfast.run')",
        "checkpoint:1: imports holdfast.run, which stands no lower than checkpoint",
    ),
    "sideways": (
        "saving.py",
        "from holdfast.loading import load",
        "saving:1: imports holdfast.loading.load, which stands no lower than saving",
    ),
    "through the door": (
        "cli/ls.py",
        "from holdfast import Run",
        "cli.ls:1: imports holdfast.Run: import it from the module where it lives",
    ),
    "no floor": (
        "telemetry.py",
        "",
        "telemetry:1: 'telemetry' stands on no floor: give it one in FLOORS of tests/test_house.py",
    ),
    "torch": ("run.py", "from torch import nn", "run:1: imports torch.nn when it is imported"),
    "torch, in a try": (
        "cli/show.py",
        "try:\n    import torch.nn\nexcept ImportError:\n    pass",
        "cli.show:2: imports torch.nn when it is imported",
    ),
    "os in format": ("format/a.py", "from os import path", "format.a:1: imports os.path, which does input or output"),
    "open in format": ("format/a.py", "open('x')", "format.a:1: calls open, which does input or output"),
    "path in format": (
        "format/a.py",
        "def f(path):\n    return path.read_bytes()",
        "format.a:2: calls path.read_bytes, which does input or output",
    ),
    "fsync": ("run.py", "import os\nos.fsync(3)", "run:2: os.fsync belongs in storage/durable.py"),
    "rename by another name": (
        "storage/local.py",
        "from os import rename as move\nmove(a, b)",
        "storage.local:2: os.rename belongs in storage/durable.py",
    ),
    "rename handed over": (
        "run.py",
        "import os as system\nwith_retries(system.replace)",
        "run:2: os.replace belongs in storage/durable.py",
    ),
    "rmtree": ("cli/a.py", "import shutil\nshutil.rmtree(a)", "cli.a:2: shutil.rmtree belongs in storage/durable.py"),
    "flock": ("run.py", "import fcntl\nfcntl.flock(3, 2)", "run:2: fcntl.flock belongs in storage/durable.py"),
    "path.unlink": ("run.py", "Path('a').unlink()", "run:1: .unlink() of a path belongs in storage/durable.py"),
    "pickle": (
        "state/a.py",
        "import pickle\npickle.loads(b)",
        "state.a:2: uses pickle.loads: data must not become code",
    ),
    "pickle by another name": ("state/a.py", "from pickle import loads", "state.a:1: imports pickle.loads: no pickle"),
    "pickle by another maker": ("state/a.py", "import cloudpickle", "state.a:1: imports cloudpickle: no pickle"),
    "torch.save": (
        "state/a.py",
        "import torch\ntorch.save(a, b)",
        "state.a:2: uses torch.save: data must not become code",
    ),
    "torch.load where torch.save may be": (
        "distributed/dcp/values.py",
        "import torch\ntorch.load(f)",
        "distributed.dcp.values:2: torch.load without weights_only=True",
    ),
    "eval": ("state/a.py", "eval('1')", "state.a:1: uses eval: data must not become code"),
    "exec": ("state/a.py", "exec('1')", "state.a:1: uses exec: data must not become code"),
    "torch.load": ("state/a.py", "import torch\ntorch.load(f)", "state.a:2: torch.load without weights_only=True"),
    "torch.load, with pickle": (
        "state/a.py",
        "from torch import load\nload(f, weights_only=False)",
        "state.a:2: torch.load without weights_only=True",
    ),
    "numpy.load": (
        "state/a.py",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "state.a:2: numpy.load with allow_pickle",
    ),
}


@pytest.mark.parametrize(("file", "code", "finding"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_a_violation_is_reported(file: str, code: str, finding: str, tmp_path: Path) -> None:
    """Each rule can fail: it names the module, the line and what is wrong there, and nothing else."""
    assert findings_in({file: code}, tmp_path) == [finding]


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    """Names that only look like violations, and the places where the real ones belong."""
    files = {
        "__init__.py": "from holdfast.run import Run",
        "storage/durable.py": "import os, fcntl\nos.fsync(3)\nos.rename(a, b)\nfcntl.flock(3, 2)",
        "storage/local.py": "from holdfast.storage import durable\ndurable.rename(a)",
        "run.py": "def save():\n    import torch\nfrom holdfast import __version__\nfrom holdfast import errors",
        "policies.py": "if TYPE_CHECKING:\n    import torch",
        "format/tree.py": "from pathlib import PurePath\ntext.replace('a', 'b')\nitems.remove(1)\nre.compile('a')",
        "state/modules.py": "import torch\nmodel.eval()\ntorch.load(f, weights_only=True)",
        "distributed/dcp/values.py": "import torch\ntorch.save(value, io.BytesIO())",
        "classic.py": "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass",
    }

    assert findings_in(files, tmp_path) == []


def findings_in(files: dict[str, str], root: Path) -> list[str]:
    """What all rules together say about a house of these files."""
    for name, code in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code, encoding="utf-8")
    return [finding for rule in RULES for finding in rule(read_house(root))]
