"""The command line: options in, API calls, tables or JSON out. No work is done here.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 an error of the tool or its input, 2 wrong
usage, 3 a target or gate was not met, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import click

from onnxlr.cli import commands, finetune, models, speed
from onnxlr.cli.group import cli
from onnxlr.errors import OnnxlrError

__all__ = ["cli", "commands", "finetune", "main", "models", "speed"]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    warnings.showwarning = _show_warning
    try:
        code = cli.main(prog_name="onnxlr", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OnnxlrError as error:
        click.echo(f"onnxlr: error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("onnxlr: interrupted; no half-written file is left", err=True)
        sys.exit(130)
    except BrokenPipeError:
        _discard_stdout()
        sys.exit(1)
    except OSError as error:
        # every file that a stage reads or writes has an error of its own: what is left is stdout
        click.echo(f"onnxlr: error: the result cannot be printed: {error.strerror or error}", err=True)
        _discard_stdout()
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _discard_stdout() -> None:
    # what is still buffered would fail again, with a traceback, when the interpreter closes the stream
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"onnxlr: warning: {message}", err=True)
