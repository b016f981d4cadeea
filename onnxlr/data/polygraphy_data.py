"""What Polygraphy users have: saved inputs (JSON) and data loader scripts (Python).

`polygraphy run model.onnx --onnxrt --save-inputs inputs.json` writes a list of feeds; `--save-inputs folder` writes one
file a feed. `--data-loader-script` takes a script whose `load_data()` yields or returns feeds.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from onnxlr.errors import DataError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


_NO_MORE = object()


def read_json(paths: Iterable[Path]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield `(where, feed)` for each feed in each file, a list of feeds or one feed.

    Raises DataError for a file that is not what Polygraphy writes.
    """
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json

    for path in paths:
        try:
            loaded = load_json(str(path))
        except (OSError, EOFError, ValueError, KeyError, AttributeError, PolygraphyException) as error:
            line = " ".join(str(error).split())
            raise DataError(
                f"{path}: cannot be read as Polygraphy inputs ({line}); write them with --save-inputs"
            ) from error
        feeds = [loaded] if isinstance(loaded, Mapping) else loaded
        if not isinstance(feeds, list):
            raise DataError(
                f"{path}: holds a {type(loaded).__name__}, expected a list of feeds, as --save-inputs writes"
            )
        for index, feed in enumerate(feeds):
            yield _checked(feed, f"{path}, feed {index}")


def load_script(path: Path) -> Callable[[], Iterator[tuple[str, Mapping[str, object]]]]:
    """Run a script once and return a function that yields `(where, feed)` of a new `load_data()` at every call.

    Modules beside the script can be imported by it, as under Polygraphy. Raises DataError where the script fails or
    defines no `load_data`; the returned function where `load_data` fails or gives no feeds.
    """
    sys.path.insert(0, str(path.parent))
    try:
        with _stdout_kept():
            load_data = runpy.run_path(str(path)).get("load_data")
    except (Exception, SystemExit) as error:
        raise DataError(f"{path}: the script failed ({one_line(error)}); it must run and define load_data()") from error
    finally:
        sys.path.remove(str(path.parent))
    if not callable(load_data):
        raise DataError(f"{path}: defines no function load_data(); add one that yields feeds: {{input name: array}}")

    def read() -> Iterator[tuple[str, Mapping[str, object]]]:
        for index, feed in enumerate(_guarded(load_data, path)):
            yield _checked(feed, f"{path}, feed {index}")

    return read


def _guarded(load_data: Callable[[], Any], path: Path) -> Iterator[object]:
    """Iterate over load_data() and tell its errors from those of whoever takes the feeds."""
    try:
        with _stdout_kept():
            feeds = load_data()
        if not isinstance(feeds, Iterable) or isinstance(feeds, Mapping):
            raise TypeError(f"expected a generator or a list of feeds, got {type(feeds).__name__}")
        pending = iter(feeds)
        while True:
            with _stdout_kept():
                feed = next(pending, _NO_MORE)
            if feed is _NO_MORE:
                return
            yield feed
    except (Exception, SystemExit) as error:
        raise DataError(f"{path}: load_data() failed ({one_line(error)}); correct the script") from error


def _stdout_kept() -> redirect_stdout[TextIO]:
    """What a script prints goes to stderr: stdout belongs to results."""
    return redirect_stdout(sys.stderr)


def _checked(feed: object, where: str) -> tuple[str, Mapping[str, object]]:
    if not isinstance(feed, Mapping):
        raise DataError(f"{where}: is a {type(feed).__name__}, expected a feed: a mapping of input names to arrays")
    return where, feed
