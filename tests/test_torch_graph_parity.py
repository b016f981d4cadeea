"""Values and gradients of whole models in torch, beside those of onnxruntime and of the torch model itself."""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import SAMPLE, attention, parse, sequences  # noqa: E402

from onnxlr.errors import DataError, ModelError  # noqa: E402
from onnxlr.model_io import Model, from_proto, load  # noqa: E402
from onnxlr.torch_graph import TorchGraph, check_parity, relative_error, to_torch  # noqa: E402

if TYPE_CHECKING:
    from numpy.typing import NDArray

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sample() -> tuple[Model, TorchGraph]:
    model = load(SAMPLE / "model.onnx")
    return model, to_torch(model)


@pytest.fixture(scope="module")
def images() -> NDArray[Any]:
    found: NDArray[Any] = np.load(SAMPLE / "test" / "images.npz")["images"][:4]
    return found


def test_the_sample_agrees_with_onnxruntime(sample: tuple[Model, TorchGraph], images: NDArray[Any]) -> None:
    model, graph = sample
    parity = check_parity(graph, model, [{"images": images[:2]}, {"images": images[2:3]}], 1e-5)
    assert parity.feeds == 2
    assert parity.errors.keys() == {"logits"}
    assert parity.worst < 1e-5


def test_attention_with_a_mask_agrees_with_onnxruntime() -> None:
    model = from_proto(attention())
    assert check_parity(to_torch(model), model, sequences(3), 1e-5).worst < 1e-5


def test_gradients_are_those_of_the_torch_model_it_came_from(
    sample: tuple[Model, TorchGraph], images: NDArray[Any]
) -> None:
    model, graph = sample
    spec = importlib.util.spec_from_file_location("fashion_train", SAMPLE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    torch.manual_seed(0)
    source = train.FashionViT().eval()

    # the exporter keeps the names of biases; a layer's weight is that of the MatMul before its bias
    stored = dict(graph.named_weights())
    nodes = model.proto.graph.node
    layers: dict[str, tuple[str, str, bool]] = {}
    for node in nodes:
        for name in (name for name in node.input if name.endswith(".bias") and node.op_type in ("Add", "Gemm")):
            product = node if node.op_type == "Gemm" else next(n for n in nodes if n.output[0] == node.input[0])
            layers[name.removesuffix(".bias")] = product.input[1], node.output[0], node.op_type == "Add"
    state = source.state_dict()
    for name in state:
        if name in stored:
            state[name] = stored[name]
        else:
            weight, _, transposed = layers[name.removesuffix(".weight")]
            state[name] = stored[weight].T if transposed else stored[weight]
    source.load_state_dict(state)

    outputs: dict[str, Any] = {}
    linear = {name: module for name, module in source.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linear.items():
        module.register_forward_hook(lambda _m, _i, y, name=name: outputs.__setitem__(name, y))
    batch = torch.from_numpy(images)
    logits = source(batch)
    probe = torch.randn(logits.shape)
    wanted = [*outputs.values(), *(module.weight for module in linear.values())]
    expected = torch.autograd.grad(logits, wanted, probe)

    assert set(layers) == set(linear)
    inner = [layers[name][1] for name in linear]
    weights = [stored[layers[name][0]] for name in linear]
    for weight in weights:
        weight.requires_grad_()
    try:
        found = graph({"images": batch}, outputs=["logits", *inner])
        gradients = torch.autograd.grad(found["logits"], [found[name] for name in inner] + weights, probe)
    finally:
        graph.requires_grad_(False)
    assert torch.allclose(found["logits"], logits, atol=1e-4)
    for name, (a, b) in zip([*linear, *linear], zip(gradients, expected, strict=True), strict=True):
        b = b.T if a.shape != b.shape or (a.ndim == 2 and layers[name][2]) else b
        assert torch.linalg.norm(a - b) <= 1e-5 * torch.linalg.norm(b), name


def test_tracked_tensors_have_gradients_though_nothing_requires_one(
    sample: tuple[Model, TorchGraph], images: NDArray[Any]
) -> None:
    _, graph = sample
    feeds = {"images": torch.from_numpy(images)}
    names = ["linear", "linear_1", "relu", "logits"]
    found = graph(feeds, outputs=names, track=["linear_1", "linear"])
    assert not found["relu"].requires_grad
    assert found["linear"].is_leaf
    assert found["linear_1"].is_leaf
    gradients = torch.autograd.grad(found["logits"].sum(), [found["linear"], found["linear_1"]])
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)
    later = graph(feeds, outputs=["linear", "linear_5", "logits"], track=["linear", "linear_5"])
    assert not later["linear_5"].is_leaf
    again = torch.autograd.grad(later["logits"].sum(), [later["linear"], later["linear_5"]])
    assert torch.allclose(again[0], gradients[0])


def test_a_mismatch_names_the_first_tensor_that_differs() -> None:
    model = from_proto(
        parse(
            """g (float[N, 3] x) => (float[N, 3] y) {
            a = Relu(x) b = MatMul(a, w) c = Add(b, x) y = Tanh(c)
        }""",
            {"w": np.eye(3, dtype=np.float32)},
        )
    )
    graph = to_torch(model)
    with torch.no_grad():
        graph.weight("w").mul_(1.01)
    feeds = [{"x": np.float32([[1, -2, 3], [0.5, 0, -1]])}]
    with pytest.raises(
        ModelError, match=r"output 'y': relative error .* first tensor to differ is 'b' .* MatMul of 'b'"
    ):
        check_parity(graph, model, feeds)
    assert check_parity(graph, model, feeds, 0.1).worst > 1e-3
    with pytest.raises(DataError, match="without data"):
        check_parity(graph, model, [])


def test_relative_error() -> None:
    nan, inf = float("nan"), float("inf")
    assert relative_error(np.float32([3, 4.05]), np.float32([3, 4])) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(np.float32([nan, 1]), np.float32([nan, 1])) == 0
    assert relative_error(np.float32([inf, 1]), np.float32([nan, 1])) == inf
    assert relative_error(np.float32([1]), np.float32([[1]])) == inf
    assert relative_error(np.int64([1, 2]), np.int64([1, 3])) == 0.5
    assert relative_error(np.float32([]), np.float32([])) == 0
    assert relative_error(np.float32([2e-9]), np.float32([1e-9])) < 1e-4


@pytest.mark.slow
def test_an_export_of_today_agrees_in_its_values_and_gradients() -> None:
    pytest.importorskip("onnxscript")

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 3, 2, 1)
            self.norm = torch.nn.GroupNorm(2, 8)
            self.rnn = torch.nn.LSTM(8, 6, batch_first=True, bidirectional=True)
            self.head = torch.nn.Linear(12, 5)

        def forward(self, x: Any) -> Any:
            tokens = torch.nn.functional.silu(self.norm(self.stem(x))).flatten(2).transpose(1, 2)
            return self.head(self.rnn(tokens)[0]).amax(1)

    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(2, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(net, (x,), dynamo=True, opset_version=20, input_names=["x"], verbose=False)
    model = from_proto(program.model_proto)
    graph = to_torch(model)
    assert check_parity(graph, model, [{"x": x.numpy()}], 1e-5).worst < 1e-5
    weight = dict(graph.named_weights())["stem.weight"].requires_grad_()
    y, expected = graph({"x": x})[graph.outputs[0]], net(x)
    probe = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, weight, probe)
    (reference,) = torch.autograd.grad(expected, net.stem.weight, probe)
    assert torch.linalg.norm(found - reference) < 1e-4 * torch.linalg.norm(reference)
