"""What the README says of the command line exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import onnxlr
from onnxlr.cli import cli

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [re.split(r"\s+#", line)[0] for block in BLOCKS for line in block.splitlines() if line.startswith("onnxlr ")]


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_is_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = cli.commands[name]
    parsed = command.make_context(name, arguments)
    assert isinstance(parsed, click.Context)


def test_every_option_named_exists() -> None:
    known = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    ours = README.partition("## Reproduce the figures")[0]  # scripts have options of their own
    prose = re.sub(r"polygraphy run.*?\n\n", "", re.sub(r"```.*?```", "", ours, flags=re.DOTALL), flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", prose)) - {"--save-inputs"}
    assert named
    assert named <= known


@pytest.mark.parametrize(("section", "command"), [("## Compress", "compress"), ("## Fine-tune", "finetune")])
def test_a_table_of_options_is_of_its_command(section: str, command: str) -> None:
    text = README.partition(f"\n{section}\n")[2].partition("\n## ")[0]
    options = set(re.findall(r"(--[a-z][a-z-]*)", "".join(re.findall(r"^\| (`-.*?) \|", text, re.MULTILINE))))
    assert len(options) > 5
    assert options <= {option for parameter in cli.commands[command].params for option in parameter.opts}


def test_every_command_is_described() -> None:
    assert all(f"onnxlr {name}" in README for name in cli.commands)


def test_the_python_example_uses_what_is_exported() -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    used = set(re.findall(r"onnxlr\.(\w+)", example))
    assert used
    assert used <= set(onnxlr.__all__)
