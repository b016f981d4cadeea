"""What low rank does to the operators that onnxruntime fuses: Q, K, V as pairs of their own, or with a shared factor.

    python tools/minilm.py make -o minilm
    python tools/fusion.py [--minilm minilm/minilm.onnx]

Every attention layer's Q, K and V, `y = x W` with `W [d, d]` three times, are replaced in two ways, both with half of
their parameters (plain singular value decompositions: this is about graphs, not about accuracy):

    separate    y = (x A) B for each of the three, A [d, d/4], B [d/4, d]
    shared      h = x A once, y = h B for each, A [d, 3d/8], B [3d/8, d]: [W_q W_k W_v] ~ A [B_q B_k B_v]

For each: what a session fuses (`fused_operators`), what the offline optimizer fuses (`optimize_model` of
`onnxruntime.transformers` for BERT: com.microsoft's operators in its result), and the latency over the dense model's,
as it is and after the offline optimizer: batches of 8, two threads. The models:

    MiniLM       exported by tools/minilm.py: torch's newer exporter, opset 20
    ViT          samples/fashion_vit, by the newer exporter too
    BERT         MiniLM's size, random weights, exported by torch's older exporter (TorchScript): the offline optimizer
                 knows this form of a mask, and puts Attention in its place
    BERT, 2020   attention layers alone, as exporters wrote them then: opset 12, the bias second in every Add, the mask
                 as (1 - mask) * -10000. Of these four, the one in which a session finds Attention

Not here, since there is nothing to lose: at opset 23 torch's newer exporter writes ONNX's own Attention, which takes
the projected Q, K and V and stays whatever becomes of their weights.

Needs torch, transformers, onnxruntime and sympy.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnxlr.bench import compare_latency
from onnxlr.fusion import fused_operators
from onnxlr.model_io import Model, from_proto, load, save
from onnxlr.session import Session

ROOT = Path(__file__).resolve().parent.parent
BATCH, TOKENS = 8, 64
THREADS = 2
WIDTH, HEADS, LAYERS, WORDS = 384, 12, 6, 1000

LAYER = """
    q{i} = MatMul(x{i}, wq{i})  bq{i} = Add(q{i}, b)  rq{i} = Reshape(bq{i}, apart)
    k{i} = MatMul(x{i}, wk{i})  bk{i} = Add(k{i}, b)  rk{i} = Reshape(bk{i}, apart)
    v{i} = MatMul(x{i}, wv{i})  bv{i} = Add(v{i}, b)  rv{i} = Reshape(bv{i}, apart)
    tq{i} = Transpose<perm = [0, 2, 1, 3]>(rq{i})  tk{i} = Transpose<perm = [0, 2, 3, 1]>(rk{i})
    tv{i} = Transpose<perm = [0, 2, 1, 3]>(rv{i})
    qk{i} = MatMul(tq{i}, tk{i})  small{i} = Div(qk{i}, root)  masked{i} = Add(small{i}, away)
    share{i} = Softmax<axis = 3>(masked{i})  mixed{i} = MatMul(share{i}, tv{i})
    back{i} = Transpose<perm = [0, 2, 1, 3]>(mixed{i})  joined{i} = Reshape(back{i}, together)
    o{i} = MatMul(joined{i}, wo{i})  bo{i} = Add(o{i}, b)  n{i} = Add(bo{i}, x{i})
"""
NORM = """
    mean{t} = ReduceMean<axes = [-1]>({x})  off{t} = Sub({x}, mean{t})  square{t} = Pow(off{t}, two)
    var{t} = ReduceMean<axes = [-1]>(square{t})  eps{t} = Add(var{t}, little)  std{t} = Sqrt(eps{t})
    even{t} = Div(off{t}, std{t})  scaled{t} = Mul(even{t}, gain)  {y} = Add(scaled{t}, b)
"""


def bert_2020() -> Model:
    """Attention layers (without feed-forward ones), in the form of exporters of 2020."""
    layers = "".join(
        NORM.format(t=i, x="embedded" if i == 0 else f"n{i - 1}", y=f"x{i}") + LAYER.format(i=i) for i in range(LAYERS)
    )
    text = f"""<ir_version: 7, opset_import: ["" : 12]>
    g (int64[B, S] input_ids, int64[B, S] attention_mask) => (float[B, S, {WIDTH}] y) {{
        wide = Unsqueeze<axes = [1]>(attention_mask)  wider = Unsqueeze<axes = [2]>(wide)
        real = Cast<to = 1>(wider)  pad = Sub(one, real)  away = Mul(pad, far)
        embedded = Gather(words, input_ids)
        {layers}
        {NORM.format(t="end", x=f"n{LAYERS - 1}", y="y")}
    }}"""
    generator = np.random.default_rng(0)
    weights = {
        "words": generator.standard_normal((WORDS, WIDTH)),
        "b": 0.1 * generator.standard_normal(WIDTH),
        "gain": np.ones(WIDTH),
        **{name: np.array(value) for name, value in {"one": 1, "far": -1e4, "two": 2, "little": 1e-5}.items()},
        "root": np.array(np.sqrt(WIDTH // HEADS)),
    }
    for i in range(LAYERS):
        weights |= {f"w{kind}{i}": generator.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5 for kind in "qkvo"}
    proto = onnx.parser.parse_model(text)
    stored = {name: array.astype(np.float32) for name, array in weights.items()}
    stored |= {"apart": np.array([0, 0, HEADS, WIDTH // HEADS]), "together": np.array([0, 0, WIDTH])}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    return from_proto(proto)


def bert_torchscript(folder: Path) -> Model:
    """A BERT of MiniLM's size with random weights, through torch's older exporter."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    # eager: the optimizer does not know the graph of scaled_dot_product_attention
    bert = BertModel(
        BertConfig(
            vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH, attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )  # fmt: skip

    class Encoder(torch.nn.Module):
        """With tensors, and nothing but tensors, for inputs and output."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.ones(2, 7, dtype=torch.int64)
    names, axes = ["input_ids", "attention_mask"], {0: "batch", 1: "sequence"}
    path = folder / "bert.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder().eval(), (ids, ids), path, dynamo=False, opset_version=17, input_names=names,
            output_names=["y"], dynamic_axes=dict.fromkeys(names, axes),
        )  # fmt: skip
    return load(path)


def factor_qkv(model: Model, *, shared: bool) -> tuple[Model, int]:
    """Replace every three square MatMuls of one tensor by low-rank factors; also returns how many threes there were."""
    graph = gs.import_onnx(model.proto)
    found = 0
    for tensor in list(graph.tensors().values()):
        three = [
            node
            for node in tensor.outputs
            if node.op == "MatMul" and isinstance(node.inputs[1], gs.Constant) and len(set(node.inputs[1].shape)) == 1
        ]
        if len(three) != 3:
            continue
        found += 1
        weights = [node.inputs[1].values for node in three]
        d = len(weights[0])
        for index, stack in enumerate([np.concatenate(weights, 1)] if shared else weights):
            nodes = three if shared else [three[index]]
            rank = 3 * d // 8 if shared else d // 4
            u, s, vt = np.linalg.svd(stack.astype(np.float64), full_matrices=False)
            a = (u[:, :rank] * np.sqrt(s[:rank])).astype(np.float32)
            b = (np.sqrt(s[:rank])[:, None] * vt[:rank]).astype(np.float32)
            name = f"{tensor.name}_{index}"
            hidden = gs.Variable(f"{name}_h", np.float32)
            graph.nodes.append(gs.Node("MatMul", f"{name}_A", {}, [tensor, gs.Constant(f"{name}_a", a)], [hidden]))
            for part, (node, columns) in enumerate(zip(nodes, np.split(b, len(nodes), 1), strict=True)):
                node.inputs = [hidden, gs.Constant(f"{name}_b{part}", np.ascontiguousarray(columns))]
    graph.cleanup().toposort()
    return from_proto(gs.export_onnx(graph)), found


def optimized(model: Model, heads: int, width: int) -> Model:
    """What the offline optimizer makes of a model."""
    from onnxruntime.transformers.optimizer import optimize_model

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        save(model, path)
        found = optimize_model(
            str(path), model_type="bert", num_heads=heads, hidden_size=width, opt_level=1, use_gpu=False
        )
        return from_proto(found.model)


def contrib(model: Model) -> dict[str, int]:
    """Operators of onnxruntime's own domain."""
    counts = Counter(node.op_type for node in model.proto.graph.node if node.domain == "com.microsoft")
    return dict(sorted(counts.items()))


def feed_of(model: Model) -> dict[str, np.ndarray]:
    """Random inputs: words with nothing masked, or images."""
    generator = np.random.default_rng(0)
    feed = {}
    for spec in Session(model, threads=THREADS).inputs:
        if spec.dtype == np.int64:
            ids = generator.integers(1, WORDS, (BATCH, TOKENS))
            feed[spec.name] = np.ones_like(ids) if "mask" in spec.name else 0 * ids if "type" in spec.name else ids
        else:
            feed[spec.name] = generator.integers(0, 256, (BATCH, *spec.shape[1:])).astype(spec.dtype)
    return feed


def listed(counts: dict[str, int]) -> str:
    """Counts as text."""
    return ", ".join(f"{op} {number}" for op, number in counts.items()) or "none"


def report(name: str, dense: Model, heads: int = HEADS, width: int = WIDTH) -> None:
    """Print the three rows of one model."""
    variants = {"dense": dense}
    for kind in ("separate", "shared"):
        variants[kind], found = factor_qkv(dense, shared=kind == "shared")
        if not found:
            print(f"{name}: no tensor feeds three square MatMuls")
            return
    after = {kind: optimized(model, heads, width) for kind, model in variants.items()}
    timed = compare_latency([*variants.values(), *after.values()], feed_of(dense), threads=THREADS, budget_seconds=10)
    for index, (kind, model) in enumerate(variants.items()):
        session, offline = listed(fused_operators(model, threads=THREADS)), listed(contrib(after[kind]))
        times = f"{timed[index].ratio:.2f} | {timed[index + len(variants)].ratio:.2f}"
        print(f"| {name} | {kind} | {session} | {offline} | {times} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, default=Path("minilm/minilm.onnx"), help="what tools/minilm.py made")
    options = parser.parse_args(arguments)
    print("| model | Q, K, V | fused by a session | fused by the offline optimizer | latency | latency, offline |")
    print("|---|---|---|---|---|---|")
    if options.minilm.exists():
        report("MiniLM", load(options.minilm))
    else:
        print(f"| MiniLM | no {options.minilm}: python tools/minilm.py make -o {options.minilm.parent} | | | | |")
    report("ViT", load(ROOT / "samples" / "fashion_vit" / "model.onnx"), 4, 128)
    with tempfile.TemporaryDirectory() as folder:
        report("BERT", bert_torchscript(Path(folder)))
    report("BERT, 2020", bert_2020())


if __name__ == "__main__":
    main()
