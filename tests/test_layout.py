"""Who may import whom, and that nothing in the schema is dead."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from rlhf import config as schema

ROOT = Path(__file__).parents[1]
OURS = ("rlhf", "reward_models", "data", "scripts")
ALLOWED = {
    "scripts": {"data", "reward_models", "rlhf"},
    "data": {"data", "rlhf.types"},
    "reward_models": {"reward_models", "rlhf"},
    "rlhf": {"rlhf"},
}
MATHEMATICS = ("masking", "logprobs", "advantages", "losses", "kl", "balance")


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", OURS)
def test_imports_point_one_way(package):
    for path in sources(package):
        for name in imports(path):
            if name.split(".")[0] in OURS:
                assert any(name == ok or name.startswith(ok + ".") for ok in ALLOWED[package]), (
                    f"{path.relative_to(ROOT)} imports {name}"
                )


def test_the_mathematics_imports_torch_and_nothing_else():
    for module in MATHEMATICS:
        assert set(imports(ROOT / f"rlhf/{module}.py")) <= {"__future__", "math", "torch", "typing"}, module


def test_deepspeed_and_vllm_are_imported_in_one_place_each():
    for package in OURS:
        for path in sources(package):
            roots = {name.split(".")[0] for name in imports(path)}
            assert "deepspeed" not in roots or path.name == "distributed.py"
            assert "vllm" not in roots or "rollout" in path.parts


def sections():
    return [c for c in vars(schema).values() if isinstance(c, type) and issubclass(c, schema.Section)]


def test_every_key_of_the_schema_is_read_somewhere():
    read = set()
    for package in OURS:
        for path in sources(package):
            tree = ast.parse(path.read_text())
            # of the schema only methods count: the field's own declaration is not a use
            read |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            }
    # a source's options reach its `prepare` function by name
    read |= {arg.arg for source in ("stories", "gsm8k") for arg in _arguments(ROOT / f"data/{source}.py", "prepare")}
    unread = {f"{c.__name__}.{name}" for c in sections() for name in c.model_fields if name not in read}
    assert not unread


def test_every_file_and_test_that_the_table_of_silent_faults_names_exists():
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for named in re.findall(r"`([^`\n]+)`", (ROOT / "docs/silent_faults.md").read_text()):
        file, _, function = named.rpartition("::") if "::" in named else ("", "", named)
        if file.startswith("tests/") or file.startswith("test_"):
            assert Path(file).name in tests, named
        if "test_" in function and not function.endswith(".py"):
            start = function.strip("…").partition("[")[0].partition("…")[0]
            assert any(start in text for text in tests.values()), f"{named}: there is no such test"
        elif "/" in named and named.partition("::")[0].endswith(".py"):
            assert (ROOT / named.partition("::")[0]).is_file(), named


def _arguments(path, function):
    return next(
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == function
    ).args.kwonlyargs


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_parses(path):
    if path.parent.name == "lm_eval":
        assert path.read_text().startswith("#")  # a task of another program
    elif path.parent.name == "accelerate":
        assert "distributed_type" in yaml.safe_load(path.read_text())
    elif path.parent.name != "base":
        schema.load_config(path)
