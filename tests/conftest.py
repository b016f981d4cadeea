"""Small models with decaying spectra and data that excite them, and the command line as a function."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxlr.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

SAMPLE = Path(__file__).parent.parent / "samples" / "fashion_vit"


@dataclass(frozen=True)
class Result:
    """What a run of the command line left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def invoke(*arguments: Any) -> Result:
    """`onnxlr ARGUMENTS` in this process; warnings are shown, as they are to a user, and end up in `err`."""
    out, err, old = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["onnxlr", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("default")
            main()
    except SystemExit as end:
        return Result(end.code if isinstance(end.code, int) else 1, out.getvalue(), err.getvalue())
    finally:
        sys.argv = old
    raise AssertionError("main() returned, it is to end the process")


def shell(command: str, *, timeout: float = 120, **variables: str) -> Result:
    """A shell command in a real process, with this interpreter's programs on its PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env={**os.environ, "PATH": path, "COLUMNS": "80", **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def decaying(generator: np.random.Generator, d_in: int, d_out: int, rate: float = 0.96) -> NDArray[np.float32]:
    """A full-rank matrix whose singular values fall by `rate` each."""
    left, _, right = np.linalg.svd(generator.standard_normal((d_in, d_out)), full_matrices=False)
    scale = 1.5 * rate ** np.arange(min(d_in, d_out))
    return np.asarray((left * scale) @ right, np.float32)


def parse(text: str, weights: dict[str, NDArray[Any]], opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """A checked model from ONNX text, with its weights."""
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(model)
    return model


def mlp(batch: str = "N", sizes: tuple[int, ...] = (64, 96, 96, 10)) -> onnx.ModelProto:
    """From x [batch, 64] through three linear layers w1, w2, w3, each of another form, to logits [batch, 10]."""
    generator = np.random.default_rng(1)
    shapes = list(pairwise(sizes))
    weights = {f"w{i}": decaying(generator, *shape) for i, shape in enumerate(shapes, 1)}
    weights["w2"] = np.ascontiguousarray(weights["w2"].T)
    biases = {f"b{i}": 0.3 * generator.standard_normal(n).astype(np.float32) for i, (_, n) in enumerate(shapes, 1)}
    return parse(
        f"""mlp (float[{batch}, {sizes[0]}] x) => (float[{batch}, {sizes[3]}] logits) {{
            p1 = MatMul(x, w1)  s1 = Add(p1, b1)  h1 = Relu(s1)
            s2 = Gemm<transB = 1>(h1, w2, b2)  h2 = Relu(s2)
            logits = Gemm(h2, w3, b3)
        }}""",
        weights | biases,
    )


def attention() -> onnx.ModelProto:
    """From x [N, S, 48], mask [N, S] through attention and a tied layer (wt) to hidden [N, S, 48], pooled [N, 48]."""
    generator = np.random.default_rng(2)
    weights: dict[str, NDArray[Any]] = {
        name: decaying(generator, 48, 48, 0.93) for name in ("wq", "wk", "wv", "wo", "wt")
    }
    weights |= {
        "bt": generator.standard_normal(48).astype(np.float32),
        "bt2": generator.standard_normal(48).astype(np.float32),
        "low": np.float32(-1e4).reshape(()),
        "one": np.float32(1).reshape(()),
        "scale": np.float32(48**-0.5).reshape(()),
        "axis1": np.array([1]),
        "axis2": np.array([2]),
    }
    return parse(
        """attention (float[N, S, 48] x, int64[N, S] mask) => (float[N, S, 48] hidden, float[N, 48] pooled) {
            q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
            kt = Transpose<perm = [0, 2, 1]>(k)  raw = MatMul(q, kt)  scores = Mul(raw, scale)
            real = Cast<to = 1>(mask)  pad = Sub(one, real)  away = Mul(pad, low)  bias = Unsqueeze(away, axis1)
            biased = Add(scores, bias)  shares = Softmax<axis = -1>(biased)  mixed = MatMul(shares, v)
            o = MatMul(mixed, wo)  r = Add(o, x)
            t1 = MatMul(r, wt)  u1 = Add(t1, bt)  g1 = Tanh(u1)
            t2 = MatMul(g1, wt)  hidden = Add(t2, bt2)
            realx = Unsqueeze(real, axis2)  kept = Mul(hidden, realx)  pooled = ReduceSum<keepdims = 0>(kept, axis1)
        }""",
        weights,
        opset=13,
        ir_version=7,
    )


def rows(count: int, width: int = 64, seed: int = 3) -> NDArray[np.float32]:
    """Samples [count, width] of falling variance."""
    generator = np.random.default_rng(seed)
    mix = decaying(generator, width, width, 0.97)
    return np.asarray(generator.standard_normal((count, width)) @ mix, np.float32)


def sequences(count: int, seed: int = 4) -> list[dict[str, NDArray[Any]]]:
    """Feeds for `attention`, of two lengths, the last tokens of some padded with large junk."""
    generator = np.random.default_rng(seed)
    feeds = []
    for index in range(count):
        length, real = (12, 9) if index % 3 == 0 else (10, 10)
        x, mask = rows(length, 48, seed=5 + index), np.ones((1, length), np.int64)
        x[real:] = 50 * generator.standard_normal((length - real, 48))
        mask[:, real:] = 0
        feeds.append({"x": x[None], "mask": mask})
    return feeds


def elements(model: onnx.ModelProto) -> int:
    """The numbers in a model's weights; integers, which are shapes and axes, do not count."""
    floating = [tensor for tensor in model.graph.initializer if tensor.data_type != onnx.TensorProto.INT64]
    return sum(int(np.prod(tensor.dims)) for tensor in floating)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data that tests read and never write: mlp.onnx with calib/, labels.npy; attention.onnx with seq/."""
    folder = tmp_path_factory.mktemp("shelf")
    onnx.save(mlp(), folder / "mlp.onnx")
    onnx.save(attention(), folder / "attention.onnx")
    (folder / "calib").mkdir()
    (folder / "seq").mkdir()
    x = rows(640)
    np.savez(folder / "calib" / "x.npz", x=x)
    np.save(folder / "labels.npy", run(mlp(), {"x": x})["logits"].argmax(-1))
    for index, feed in enumerate(sequences(48)):
        np.savez(folder / "seq" / f"{index:03}.npz", **feed)
    return folder


@pytest.fixture
def compress(shelf: Path, tmp_path: Path) -> Callable[..., Result]:
    """`onnxlr compress` of shelf/mlp.onnx to tmp_path/out.onnx, with tmp_path/report.json, and more options."""

    def call(*options: Any) -> Result:
        fixed = (shelf / "mlp.onnx", "--calib", shelf / "calib", "-o", tmp_path / "out.onnx")
        return invoke("compress", *fixed, "--report", tmp_path / "report.json", "--threads", 1, *options)

    return call


def run(model: onnx.ModelProto, feed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All outputs, from onnxruntime itself."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))
