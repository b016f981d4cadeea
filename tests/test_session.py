"""The door to onnxruntime: installation, providers, models that it refuses, feeds that it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest

from onnxlr.errors import InstallError, ModelError
from onnxlr.model_io import Model, from_proto
from onnxlr.session import Session, import_onnxruntime

if TYPE_CHECKING:
    from pathlib import Path


def model(body: str = "y = Relu(x)") -> Model:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 2] x) => (float[N, 2] y) {{ {body} }}'
    return from_proto(onnx.parser.parse_model(text))


def test_a_session_knows_its_interface_and_runs() -> None:
    session = Session(model(), threads=1)
    assert [(spec.name, spec.dtype, spec.shape) for spec in session.inputs] == [("x", np.float32, ("N", 2))]
    outputs = session.run({"x": np.float32([[-1, 2]])})
    assert outputs["y"].tolist() == [[0, 2]]


def test_streaming_order_gives_the_same_numbers() -> None:
    feed = {"x": np.random.default_rng(0).standard_normal((5, 2), np.float32)}
    plain, streaming = (Session(model("h = Exp(x) y = Softmax(h)"), streaming=s).run(feed)["y"] for s in (False, True))
    assert np.array_equal(plain, streaming)


def test_a_provider_that_this_build_lacks_is_an_error_and_no_fallback() -> None:
    with pytest.raises(InstallError, match=r"this onnxruntime build has no NoSuchProvider: available are .*CPU"):
        Session(model(), provider="NoSuchProvider")


def test_a_model_that_onnxruntime_refuses() -> None:
    with pytest.raises(ModelError, match=r"onnxruntime cannot load the model: .*NoSuchOperator"):
        Session(model("y = NoSuchOperator(x)"))


def test_a_feed_that_does_not_fit_names_the_shapes() -> None:
    with pytest.raises(ModelError, match=r"the model fails on a feed \(x \[1, 3\]\): "):
        Session(model()).run({"x": np.zeros((1, 3), np.float32)})


def test_without_onnxruntime_the_message_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from onnxlr.session import import_onnxruntime\n"
        "try: import_onnxruntime()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("InstallError onnxruntime cannot be imported")
    assert "pip install 'onnxlr[cpu]'" in printed


def test_two_builds_of_onnxruntime_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        metadata = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InstallError, match="onnxruntime and onnxruntime-gpu are both installed"):
        import_onnxruntime()
