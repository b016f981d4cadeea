"""Small models as ONNX text, and every form of a linear layer that is compressed, with its algebra in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from onnxlr.model_io import Model, from_proto
from onnxlr.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]

TEXT_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}
D_IN, D_OUT, ROWS = 6, 5, 7


def parsed(signature: str, body: str, *, opset: int = 17, ir: int = 8, tail: str = "", **weights: Array) -> Model:
    """A checked model; `tail` holds local functions."""
    text = f'<ir_version: {ir}, opset_import: ["" : {opset}, "local" : 1, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{text} g {signature} {{ {body} }} {tail}")
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(proto)
    return from_proto(proto)


def random(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def constant(name: str, array: Array) -> str:
    """A Constant node, as text."""
    values = ", ".join(str(value) for value in array.ravel().tolist())
    shape = f"[{', '.join(map(str, array.shape))}]" if array.ndim else ""
    return f"{name} = Constant<value = {TEXT_TYPES[array.dtype.name]}{shape} {{{values}}}>() "


def run(model: Model, **feed: Array) -> dict[str, Array]:
    """The model's outputs, from onnxruntime."""
    return Session(model, threads=1).run(feed)


def relative(reference: Array, candidate: Array) -> float:
    """`||candidate - reference|| / ||reference||`; the shapes have to be equal."""
    assert reference.shape == candidate.shape
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(candidate.astype(np.float64) - wide) / np.linalg.norm(wide))


@dataclass(frozen=True)
class Form:
    """A model of one site `y = x W + rest`, features of `x` and `y` on the axes given.

    `leading` are axes of length 1 that the weight adds to the output. `bias` is the constant vector of `rest` that can
    take a correction, as it is added; `own` whether the site's own node adds it.
    """

    name: str
    model: Model
    x: Array
    matrix: Array
    axes: tuple[int, int] = (-1, -1)
    rest: Array | float = 0.0
    bias: Array | None = None
    own: bool = False
    opaque: bool = False
    leading: int = 0

    def __str__(self) -> str:
        return self.name

    def algebra(self, x: Array, matrix: Array) -> Array:
        """`x W + rest` in float64."""
        if x.ndim == 1:
            return (x.astype(np.float64) @ matrix)[(None,) * self.leading] + self.rest
        rows = np.moveaxis(x.astype(np.float64), self.axes[0], -1) @ matrix
        return np.moveaxis(rows, -1, self.axes[1])[(None,) * self.leading] + self.rest

    def on_output(self, vector: Array) -> Array:
        """A vector [d_out], shaped to be added to the output."""
        return vector[:, None] if self.axes[1] == -2 else vector


def matmul_forms(d_in: int = D_IN, d_out: int = D_OUT) -> Iterator[Form]:
    """MatMul: sides, ranks, Adds, and the ways in which a constant is stored."""
    w, b, m = random(1, d_in, d_out), random(2, d_out), random(3, ROWS, d_out)
    left = np.ascontiguousarray(w.T)
    x2, x3, x4 = random(4, ROWS, d_in), random(5, 2, ROWS, d_in), random(6, 2, 3, ROWS, d_in)

    def form(name: str, rank: str, body: str, x: Array, weights: dict[str, Array], **more: Any) -> Form:
        out = "M, " * (x.ndim - 2) + f"N, {d_out}" if rank == "right" else "M, " * (x.ndim - 2) + f"{d_out}, N"
        dims = "M, " * (x.ndim - 2) + (f"N, {d_in}" if rank == "right" else f"{d_in}, N")
        if x.ndim == 1:
            dims, out = f"{d_in}", f"{d_out}"
        if x.ndim == 4:
            dims, out = dims.replace("M, M", "M, K"), out.replace("M, M", "M, K")
        out = "1, " * more.get("leading", 0) + out
        model = parsed(f"(float[{dims}] x) => (float[{out}] y)", body, **weights)
        axes = (-1, -1) if rank == "right" else (-2, -2)
        return Form(f"matmul-{name}", model, x, w.astype(np.float64), axes, **more)

    for x in (x2, x3, x4, x2[0]):
        yield form(f"right-{x.ndim}d", "right", "y = MatMul(x, w)", x, {"w": w})
        yield form(
            f"right-{x.ndim}d-leading", "right", "y = MatMul(x, w)", x, {"w": w[None]}, leading=1 if x.ndim < 3 else 0
        )
    yield form("right-two-leading", "right", "y = MatMul(x, w)", x3, {"w": w[None, None]}, leading=1)
    for x in (x2, x3, x4):
        turned = np.ascontiguousarray(np.swapaxes(x, -1, -2))
        yield form(f"left-{x.ndim}d", "left", "y = MatMul(w, x)", turned, {"w": left})
    turned = np.ascontiguousarray(np.swapaxes(x3, -1, -2))
    yield form("left-leading", "left", "y = MatMul(w, x)", turned, {"w": left[None]})
    yield form(
        "left-bias", "left", "p = MatMul(w, x) y = Add(p, b)", turned, {"w": left, "b": b[:, None]},
        rest=b[:, None].astype(np.float64), bias=b,
    )  # fmt: skip
    yield form(
        "left-row-addend", "left", "p = MatMul(w, x) y = Add(p, b)", turned[:, :, :d_out],
        {"w": left, "b": b}, rest=b.astype(np.float64),
    )  # fmt: skip
    bias = {"rest": b.astype(np.float64), "bias": b}
    yield form("bias", "right", "p = MatMul(x, w) y = Add(p, b)", x2, {"w": w, "b": b}, **bias)
    yield form("bias-first", "right", "p = MatMul(x, w) y = Add(b, p)", x3, {"w": w, "b": b}, **bias)
    yield form("bias-3d", "right", "p = MatMul(x, w) y = Add(p, b)", x3, {"w": w, "b": b[None, None]}, **bias)
    yield form("bias-1d", "right", "p = MatMul(x, w) y = Add(p, b)", x2[0], {"w": w, "b": b}, **bias)
    yield form(
        "bias-constant", "right", f"{constant('b', b)} p = MatMul(x, w) y = Add(p, b)", x2, {"w": w},
        rest=b.astype(np.float64), bias=b,
    )  # fmt: skip
    scalar = np.float32(0.75).reshape(())
    yield form("scalar", "right", "p = MatMul(x, w) y = Add(p, b)", x2, {"w": w, "b": scalar}, rest=0.75)
    yield form("one", "right", "p = MatMul(x, w) y = Add(p, b)", x2, {"w": w, "b": scalar.reshape(1)}, rest=0.75)
    yield form("matrix", "right", "p = MatMul(x, w) y = Add(p, b)", x2, {"w": w, "b": m}, rest=m.astype(np.float64))
    axes = np.array([0])
    flat = np.array([d_in, d_out])
    for name, body, weights in (
        ("constant", f"{constant('w', w)} y = MatMul(x, w)", {}),
        ("identity", "t = Identity(w) y = MatMul(x, t)", {"w": w}),
        ("cast", "t = Cast<to = 1>(w) y = MatMul(x, t)", {"w": w.astype(np.float16)}),
        ("transpose", "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", {"w": left}),
        ("transpose-default", "t = Transpose(w) y = MatMul(x, t)", {"w": left}),
        ("reshape", "t = Reshape(w, s) y = MatMul(x, t)", {"w": w.ravel(), "s": flat}),
        ("flatten", "t = Flatten<axis = 1>(w) y = MatMul(x, t)", {"w": w[:, :, None]}),
        ("squeezed", "t = Unsqueeze(w, a) u = Squeeze(t, a) y = MatMul(x, u)", {"w": w, "a": axes}),
        ("chain", f"{constant('w', left)} t = Identity(w) u = Transpose(t) y = MatMul(x, u)", {}),
    ):
        made = form(f"stored-{name}", "right", body, x2, weights)
        half = w.astype(np.float16).astype(np.float64)
        yield made if name != "cast" else Form(made.name, made.model, made.x, half)


def gemm_forms(d_in: int = D_IN, d_out: int = D_OUT) -> Iterator[Form]:
    """Gemm: sides, transpositions, factors and addends."""
    w, vector = random(1, d_in, d_out), random(2, d_out)
    x, matrix = random(4, ROWS, d_in), random(3, ROWS, d_out)
    column = random(7, ROWS, 1)
    for left, flip_w, flip_x in product((False, True), repeat=3):
        turn = left != flip_w
        stored = np.ascontiguousarray(w.T if turn else w)
        data = np.ascontiguousarray(x.T if left != flip_x else x)
        flags = (
            f"transA = {int(flip_w)}, transB = {int(flip_x)}"
            if left
            else f"transA = {int(flip_x)}, transB = {int(flip_w)}"
        )
        dims = f"{d_in}, N" if left != flip_x else f"N, {d_in}"
        out = f"{d_out}, N" if left else f"N, {d_out}"
        # the addends of y [N, d_out]; with the weight on the left all of it is transposed
        addends: dict[str, Array | None] = {
            "none": None,
            "row": vector[None],
            "column": column,
            "matrix": matrix,
            "scalar": np.float32(0.75).reshape(()),
        }
        if not left:
            addends["vector"] = vector
        for (kind, c), (alpha, beta) in product(addends.items(), ((1.0, 1.0), (-2.5, 0.5), (0.5, 0.0))):
            if c is not None and left and c.ndim == 2:
                c = np.ascontiguousarray(c.T)
            operands = "w, x" if left else "x, w"
            if c is not None:
                operands += ", c"
            model = parsed(
                f"(float[{dims}] x) => (float[{out}] y)",
                f"y = Gemm<alpha = {alpha}, beta = {beta}, {flags}>({operands})",
                **({"w": stored} if c is None else {"w": stored, "c": c}),
            )
            seen = c is not None and beta != 0
            takes = seen and kind in ("row", "vector")
            name = f"gemm-{'left' if left else 'right'}-{int(flip_w)}{int(flip_x)}-{kind}-{alpha}-{beta}"
            yield Form(
                name,
                model,
                data,
                alpha * w.astype(np.float64),
                (-2 if left != flip_x else -1, -2 if left else -1),
                rest=beta * c.astype(np.float64) if c is not None and seen else 0.0,
                bias=beta * vector if takes else None,
                own=takes,
                opaque=seen and not takes,
            )


def typed_forms(d_in: int = D_IN, d_out: int = D_OUT) -> Iterator[Form]:
    """Other element types and older opsets."""
    w, b, x = random(1, d_in, d_out), random(2, d_out), random(4, ROWS, d_in)
    for dtype in (np.float16, np.float64):
        kind = TEXT_TYPES[np.dtype(dtype).name]
        for op, body in (("matmul", "p = MatMul(x, w) y = Add(p, b)"), ("gemm", "y = Gemm(x, w, b)")):
            typed = {"w": w.astype(dtype), "b": b.astype(dtype)}
            yield Form(
                f"{op}-{kind}",
                parsed(f"({kind}[N, {d_in}] x) => ({kind}[N, {d_out}] y)", body, **typed),
                x.astype(dtype),
                typed["w"].astype(np.float64),
                rest=typed["b"].astype(np.float64),
                bias=typed["b"],
                own=op == "gemm",
            )
    signature = f"(float[N, {d_in}] x) => (float[N, {d_out}] y)"
    common = {"x": x, "matrix": w.astype(np.float64)}
    for opset in (7, 9, 10):
        for beta in (1.0, 0.5, 0.0):
            model = parsed(signature, f"y = Gemm<transB = 1, beta = {beta}>(x, w, b)", opset=opset, w=w.T.copy(), b=b)
            taken = {"bias": beta * b, "own": True} if beta else {}
            yield Form(f"gemm-opset{opset}-{beta}", model, **common, rest=beta * b.astype(np.float64), **taken)
        yield Form(f"matmul-opset{opset}", parsed(signature, "y = MatMul(x, w)", opset=opset, w=w), **common)
    listed = parsed(
        signature[:-1].replace(" x)", f" x, float[{d_in}, {d_out}] w)") + ")", "y = MatMul(x, w)", ir=3, w=w
    )
    yield Form("matmul-listed-ir3", listed, **common)


FORMS = [*matmul_forms(), *gemm_forms(), *typed_forms()]
