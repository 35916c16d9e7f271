"""Docstrings of what users call: each is there, names every parameter and says what is raised; of operators, the shapes."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import res2net_fused
import res2net_fused.models

# Everything in these modules is public, but for what begins with an underscore.
MODULES = [
    importlib.import_module(f"res2net_fused.{name}")
    for name in (
        "chain.config",
        "chain.problem",
        "chain.memory_format",
        "chain.checks",
        "ops.hierarchical_conv2d",
        "ops.bottle2neck",
        "ops.hierarchical_conv1d",
    )
]


def exported():
    for module in (res2net_fused, res2net_fused.models):
        for name in module.__all__:
            yield f"{module.__name__}.{name}", getattr(module, name)
    yield "res2net_fused.cli.main", importlib.import_module("res2net_fused.cli").main
    for module in MODULES:
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and (inspect.isclass(value) or inspect.isfunction(value)):
                yield f"{module.__name__}.{name}", value


def documented() -> dict[str, object]:
    """Name -> class, function or public method of such a class; each object once."""
    found: dict[int, tuple[str, object]] = {}
    for name, value in exported():
        found.setdefault(id(value), (name, value))
        if inspect.isclass(value):
            for key, method in vars(value).items():
                method = getattr(method, "__func__", method)  # of a classmethod
                # Generated ones, such as a dataclass's, have another home or an underscore.
                if inspect.isfunction(method) and not key.startswith("_") and method.__module__ == value.__module__:
                    found.setdefault(id(method), (f"{name}.{key}", method))
    return dict(found.values())


DOCUMENTED = documented()


def functions_of(value) -> list:
    """What runs when it is called: the function, or a class's own constructor and its check of the fields."""
    if not inspect.isclass(value):
        return [value]
    return [vars(value)[name] for name in ("__init__", "__post_init__") if name in vars(value)]


def parameters(value) -> list[str]:
    if inspect.isclass(value) and "__init__" not in vars(value):
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = inspect.signature(vars(value)["__init__"] if inspect.isclass(value) else value).parameters.values()
    return [p.name for p in named if p.name not in ("self", "cls") and p.kind not in several]


def raised(value) -> set[str]:
    """Names of the exceptions that its own body raises, nested functions left in."""
    names = set()
    for function in functions_of(value):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except OSError:
            continue  # generated, as a dataclass's constructor is
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                names.add(node.exc.func.id)
    return names


def test_the_walk_finds_the_public_interface():
    some = ("hierarchical_conv2d", "Bottle2neck", "PackedWeights.settings", "models.create_model", "cli.main")
    assert {f"res2net_fused.{name}" for name in some} <= set(DOCUMENTED)
    assert len(DOCUMENTED) > 50


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_says_what_a_caller_needs(name):
    value = DOCUMENTED[name]
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert text and text.strip(), "no docstring"
    missing = [parameter for parameter in parameters(value) if not re.search(rf"\b{parameter}\b", text)]
    assert not missing, f"says nothing of {', '.join(missing)}"
    errors = {error for error in raised(value) if error not in text}
    # A method that a subclass has to write raises NotImplementedError, of which no caller hears.
    errors -= {"NotImplementedError"} if inspect.isfunction(value) and "." in value.__qualname__ else set()
    assert not errors, f"raises {', '.join(errors)}, of which it says nothing"


OPERATORS = [name for name in DOCUMENTED if name.rpartition(".")[2].startswith(("hierarchical", "pack_w", "check_a"))]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_state_shapes_and_errors(name):
    text = DOCUMENTED[name].__doc__
    assert "Raises" in text and re.search(r"\(N, s\*w, |\(w, w", text)


def test_formulas_have_a_source():
    reference = importlib.import_module("res2net_fused.chain.reference")
    for value in (res2net_fused.hierarchical_conv2d, reference, MODULES[0].ChainConfig):
        assert "arXiv:1904.01169" in value.__doc__


FILES = sorted(Path(res2net_fused.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FILES[0].parent)))
def test_no_docstring_begins_with_a_preposition(path):
    """The first word is a verb or what is described, so that a reader of the first line knows what it is about."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    for text in filter(None, map(ast.get_docstring, nodes)):
        assert text.split()[0] not in ("Of", "As", "For", "With", "Without", "To", "In", "By", "From"), text
