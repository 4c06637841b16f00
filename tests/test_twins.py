"""The two scripts side by side, their command line and the README's."""

import ast
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import tyro
from conftest import ROOT

FILES = [ROOT / "maddpg_continuous.py", ROOT / "maddpg_discrete.py"]
# What the kind of action requires, and nothing else
DIFFERENT = {
    "Args",  # exploration_noise here, gumbel_temperature, logit_regularization and relaxed there
    "Games.__init__",  # bounds, and the options of each choice
    "Games",  # _choices
    "Games._step_game",  # onto the bounds, and the largest entry
    "Games._move",  # a Box, and integers
    "Actor",  # its docstring
    "Actor.__init__",  # how many softmaxes
    "Actor.forward",  # tanh, and logits
    "Networks.__init__",  # how many softmaxes
    "choose",  # Gaussian noise, and Gumbel noise
    "td_targets",  # the target actions' noise
    "actor_loss",  # the regulariser
    "game_maker",  # continuous_actions
    "main",  # --relaxed, and the exploration's argument
    "Args.__post_init__",  # the ranges of those fields
}
DISCRETE_ONLY = {"gumbel_softmax", "Games._choices"}


def pieces(file):
    """Source by name: functions, methods, and classes without their methods."""
    text, found = file.read_text(), {}
    lines = text.splitlines()

    def source(node):
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return lines[start - 1 : node.end_lineno]

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = source(node)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": source(method) for method in methods}
            inside = {n for method in methods for n in range(method.lineno, method.end_lineno + 1)}
            numbered = enumerate(source(node), node.lineno - len(node.decorator_list))
            found[node.name] = [line for n, line in numbered if n not in inside]
    return found


def test_what_they_share_is_identical():
    continuous, discrete = map(pieces, FILES)
    assert discrete.keys() - continuous.keys() <= DISCRETE_ONLY
    assert not continuous.keys() - discrete.keys()
    differing = {name for name, source in continuous.items() if discrete[name] != source}
    assert differing <= DIFFERENT


def test_their_flags_differ_by_the_kind_of_action_alone():
    fields = [
        {field.name: field.default for field in dataclasses.fields(importlib.import_module(file.stem).Args)}
        for file in FILES
    ]
    assert fields[0].keys() - fields[1].keys() == {"exploration_noise"}
    assert fields[1].keys() - fields[0].keys() == {"gumbel_temperature", "logit_regularization", "relaxed"}
    shared = fields[0].keys() & fields[1].keys()
    assert {name for name in shared if fields[0][name] != fields[1][name]} == {"buffer_size", "exp_name"}
    assert [values["exp_name"] for values in fields] == [file.stem for file in FILES]


def test_at_most_100_lines_differ():
    result = subprocess.run(["diff", *FILES], capture_output=True, text=True)
    assert sum(line[:1] in "<>" for line in result.stdout.splitlines() if line) <= 100


def test_sections_come_in_the_same_order():
    headings = [re.findall(r"^# ---- (.+?) -+$", file.read_text(), re.M) for file in FILES]
    assert headings[0] == headings[1] and len(headings[0]) > 5


def test_help_names_every_flag(script, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(script.Args, args=["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(script.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", shown), field.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_flag_has_a_docstring(file):
    tree = ast.parse(file.read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    number = 0
    for node, after in zip(args.body, args.body[1:] + [None], strict=True):
        if isinstance(node, ast.AnnAssign):
            number += 1
            assert isinstance(after, ast.Expr) and isinstance(after.value.value, str), node.target.id
            assert len(after.value.value) > 10
    assert number > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_public_functions_are_annotated(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [a for a in node.args.args if a.arg != "self"] + node.args.kwonlyargs
            assert node.returns is not None and all(a.annotation for a in arguments), node.name


def test_commands_in_the_text_parse():
    """Every `python maddpg_*.py` line of the README and of the scripts' own docstrings."""
    text = "\n".join(file.read_text() for file in [ROOT / "README.md", *FILES] if file.exists())
    commands = re.findall(r"python (maddpg_\w+)\.py([^\n`|&]*)", text)
    assert len(commands) >= 2
    for name, flags in commands:
        arguments = shlex.split(flags, comments=True)
        if arguments != ["--help"]:
            tyro.cli(importlib.import_module(name).Args, args=arguments)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_inline_metadata_names_the_requirements(file):
    """PEP 723, for `uv run maddpg_discrete.py`: the same packages and versions as requirements.txt, in its order."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", file.read_text())
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert metadata["requires-python"] == ">=3.11"
    install = re.search(r"^    pip install (.+)$", file.read_text(), re.M)[1].split()
    assert set(install) == {requirement.split("==")[0] for requirement in metadata["dependencies"]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_importing_a_script_starts_nothing(file, working_folder):
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {file.stem}"]
    result = subprocess.run(line, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(working_folder.iterdir())
