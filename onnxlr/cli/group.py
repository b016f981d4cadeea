"""The group that all commands belong to."""

from __future__ import annotations

from typing import Any

import click


class _Group(click.Group):
    """Commands whose interruption reaches `main` as it is: click would print an empty line first."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="onnxlr")
def cli() -> None:
    """Low-rank compression of ONNX models: smaller and faster, with evidence.

    Exit codes: 0 done, 1 error, 2 wrong usage, 3 a target or gate was not met, 130 interrupted.
    """
