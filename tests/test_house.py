"""The house holds: imports point down, torch stays out of the lower floors, durability lives in one module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import holdfast

FLOORS = (
    ("errors",),
    ("format",),
    ("storage",),
    ("checkpoint",),
    ("state",),
    ("saving", "loading"),
    ("run",),
    ("policies",),
    ("writer", "resume"),
    ("checkpointer",),
    ("classic", "audit", "integrations", "distributed"),
    ("cli",),
)
FREE = ("__init__", "__main__", "_version")
WITHOUT_TORCH = ("errors", "format", "storage", "checkpoint", "run", "policies", "cli", "__init__", "__main__")
WITHOUT_IO = ("os", "io", "socket", "shutil", "fcntl", "mmap", "tempfile", "subprocess")
DURABLE = "storage/durable.py"
DURABLE_CALLS = {
    *(f"os.{name}" for name in ("fsync", "fdatasync", "sync", "rename", "renames", "replace", "unlink", "remove")),
    *(f"os.{name}" for name in ("rmdir", "removedirs", "link", "posix_fallocate", "truncate", "ftruncate")),
    *("shutil.rmtree", "shutil.move", "fcntl.flock", "fcntl.lockf"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.save", "pickle.load", "pickle.loads", "pickle.Unpickler"}

PACKAGE = Path(holdfast.__file__).parent


def floor_of(module: str) -> int | None:
    """The floor of a module, by the first part of its name below the package; None when it may import anything."""
    top = module.split(".")[0]
    if top in FREE or top == "":
        return None
    for number, names in enumerate(FLOORS):
        if top in names:
            return number
    raise AssertionError(f"{module} stands on no floor: put it on one in FLOORS")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, also inside functions; names imported from a package count as modules of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "holdfast")


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def complaints(package: Path) -> list[str]:
    """Everything in ``package`` that breaks a rule of the house."""
    found = []
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package).as_posix()
        module = place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found += [f"{place}: {complaint}" for complaint in _of_imports(module, tree)]
        found += [f"{place}: {complaint}" for complaint in _of_calls(place, tree)]
    return found


def _of_imports(module: str, tree: ast.Module) -> Iterator[str]:
    floor = floor_of(module)
    top = module.split(".")[0]
    for name in imported(tree):
        inside = name.removeprefix("holdfast.")
        if name.startswith("holdfast.") and floor is not None and inside.split(".")[0] != top:
            below = floor_of(inside)
            if below is not None and below >= floor:
                yield f"imports {name}, which is not on a lower floor"
        if top == "format" and name.split(".")[0] in WITHOUT_IO:
            yield f"imports {name}: the format does no input or output"
    if top in WITHOUT_TORCH:
        at_import = ast.Module([node for node in tree.body if not _is_type_checking(node)], [])
        for node in at_import.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for name in imported(node):
                    if name.split(".")[0] == "torch" or name.startswith("holdfast.state"):
                        yield f"imports {name} when it is imported: it has to do without torch"


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _of_calls(place: str, tree: ast.Module) -> Iterator[str]:
    for name, call in calls(tree):
        method = name.rpartition(".")[2]
        if place != DURABLE and (name in DURABLE_CALLS or (method in ("unlink", "rmdir") and "." in name)):
            yield f"calls {name}: only {DURABLE} may"
        if name in FORBIDDEN_CALLS:
            yield f"calls {name}: never on this road"
        if name == "torch.load" and not any(
            keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords
        ):
            yield "calls torch.load without weights_only=True"
        if place.startswith("format/") and name == "open":
            yield "calls open: the format does no input or output"


def test_the_house_holds() -> None:
    """No module imports from its own floor or above, does what another module alone may do, or unpickles."""
    assert complaints(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("format/tree.py", "from holdfast.storage import local", "not on a lower floor"),
        ("run.py", "def f():\n    from holdfast import checkpointer", "not on a lower floor"),
        ("saving.py", "import holdfast.loading", "not on a lower floor"),
        ("format/names.py", "import os", "no input or output"),
        ("format/names.py", "open('x')", "no input or output"),
        ("storage/local.py", "import torch", "without torch"),
        ("run.py", "from holdfast.state import capture", "without torch"),
        ("storage/local.py", "import os\nos.fsync(3)", "only storage/durable.py may"),
        ("saving.py", "path.unlink()", "only storage/durable.py may"),
        ("classic.py", "import torch\ntorch.load(path)", "weights_only"),
        ("classic.py", "import torch\ntorch.load(path, weights_only=False)", "weights_only"),
        ("loading.py", "eval(text)", "never on this road"),
        ("loading.py", "import pickle\npickle.loads(data)", "never on this road"),
    ],
)
def test_what_breaks_a_rule_is_found(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    """The check above can fail: each rule, broken once, is reported."""
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(code, encoding="utf-8")
    assert any(complaint in found for found in complaints(tmp_path))


def test_an_unknown_module_is_asked_for_its_floor(tmp_path: Path) -> None:
    """A new module has to be put on a floor."""
    (tmp_path / "attic.py").write_text("", encoding="utf-8")
    with pytest.raises(AssertionError, match="attic stands on no floor"):
        complaints(tmp_path)


def test_torch_stays_unimported_until_tensors_are_needed() -> None:
    """Importing the package, its policies, runs and commands leaves torch alone."""
    code = (
        "import sys, holdfast, holdfast.run, holdfast.policies, holdfast.cli, holdfast.writer; "
        "holdfast.Run, holdfast.open, holdfast.KeepLast, holdfast.RestoreReport; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_tests_run_against_the_installed_package() -> None:
    """What is tested is what was built, not what lies in src/."""
    assert "src" not in PACKAGE.parts
