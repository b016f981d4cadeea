"""Opening paths: arrays, ONNX test data, Polygraphy's files, and what is said about anything else."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxlr.data import TensorSpec, load_labels, open_data
from onnxlr.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

X = TensorSpec("x", np.dtype(np.float32), ("N", 2))
IDS = TensorSpec("ids", np.dtype(np.int64), ("N",))


def values(source: object, *inputs: TensorSpec) -> list[float]:
    data = open_data(source, inputs or (X,))
    found = [float(sample["x"][0, 0]) for sample in data]
    assert found == [float(sample["x"][0, 0]) for sample in data]
    return found


def rows(*numbers: float) -> np.ndarray:
    return np.array([[number, 0] for number in numbers], np.float32)


def test_npz_folder(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x=rows(2, 3), ids=[2, 3], labels=[0, 1])
    np.savez_compressed(tmp_path / "a.npz", x=rows(1)[0], ids=1)
    (tmp_path / "README.txt").write_text("notes")
    (tmp_path / ".hidden.npz").write_text("not an archive")
    assert values(tmp_path, X, IDS) == [1, 2, 3]
    assert values(str(tmp_path / "b.npz"), X, IDS) == [2, 3]
    assert open_data(tmp_path, [X, IDS]).name == str(tmp_path)


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "1.npy", rows(3))
    np.save(tmp_path / "0.npy", rows(1, 2))
    assert values(tmp_path) == [1, 2, 3]
    assert values(tmp_path / "0.npy") == [1, 2]
    with pytest.raises(
        DataError, match=r"0.npy: a .npy file holds one array but the model has 2 inputs \('x', 'ids'\)"
    ):
        values(tmp_path, X, IDS)


def test_bfloat16_survives_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(1.5).astype(ml_dtypes.bfloat16))
    assert values(tmp_path, TensorSpec("x", np.dtype(ml_dtypes.bfloat16), (None, 2))) == [1.5]


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_broken_numpy_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save = np.savez if name.endswith("npz") else np.save
    save(path, **{"x" if name.endswith("npz") else "arr": rows(*range(99))})
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=rf"{name}: cannot be read as a numpy file"):
        values(path)
    path.write_bytes(b"garbage")
    with pytest.raises(DataError, match=rf"{name}: cannot be read as a numpy file"):
        values(path)
    save(path, **{"x" if name.endswith("npz") else "arr": np.array([{"a": 1}])})
    with pytest.raises(DataError, match=rf"{name}: holds pickled Python objects"):
        values(path)


def test_npz_without_an_input_says_what_it_has(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=rows(1))
    with pytest.raises(DataError, match=r"a.npz: no array for input 'x' .*got 'image'; unknown to the model: 'image'"):
        values(tmp_path)


def test_samples_that_do_not_fit_are_named_by_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(1, np.inf))
    with pytest.raises(DataError, match=r"a.npz, sample 1: input 'x': holds NaN or infinity"):
        values(tmp_path)


def test_files_are_opened_one_at_a_time(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(1))
    (tmp_path / "b.npz").write_bytes(b"broken")
    assert next(iter(open_data(tmp_path, [X])))["x"][0, 0] == 1


def save_set(folder: Path, *arrays: np.ndarray, called: Sequence[str] = ("", "", "")) -> None:
    folder.mkdir()
    for number, (array, name) in enumerate(zip(arrays, called, strict=False)):
        (folder / f"input_{number}.pb").write_bytes(numpy_helper.from_array(array, name).SerializeToString())
    (folder / "output_0.pb").write_bytes(b"not read")


def test_onnx_test_data(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        save_set(tmp_path / f"test_data_set_{number}", rows(number), np.array([number]))
    onnx.save(onnx.ModelProto(), tmp_path / "model.onnx")
    assert values(tmp_path, X, IDS) == [0, 2, 10]
    assert values(tmp_path / "test_data_set_10", X, IDS) == [10]


@pytest.mark.parametrize(("called", "first"), [(("b", "a"), 2), (("a", "b"), 1), (("a", "a"), 1), (("a", "c"), 1)])
def test_tensors_with_the_names_of_inputs_are_those(tmp_path: Path, called: tuple[str, str], first: int) -> None:
    inputs = [TensorSpec(name, X.dtype, X.shape) for name in ("a", "b")]
    save_set(tmp_path / "test_data_set_0", rows(1), rows(2), called=called)
    (sample,) = open_data(tmp_path, inputs)
    assert (sample["a"][0, 0], sample["b"][0, 0]) == (first, 3 - first)


def test_onnx_test_data_that_do_not_fit(tmp_path: Path) -> None:
    save_set(tmp_path / "test_data_set_0", rows(1), np.array([1]), np.array([1]))
    with pytest.raises(DataError, match=r"test_data_set_0: 3 files input_\*.pb, the model has 2 inputs \('x', 'ids'\)"):
        values(tmp_path, X, IDS)
    (tmp_path / "test_data_set_0" / "input_2.pb").unlink()
    (tmp_path / "test_data_set_0" / "input_1.pb").write_bytes(b"\xff garbage")
    with pytest.raises(DataError, match=r"input_1.pb: cannot be read as a TensorProto"):
        values(tmp_path, X, IDS)


def save_inputs(path: Path, feeds: object) -> None:
    """Write a file as Polygraphy does; it imports torch, whose imports warn of themselves."""
    from polygraphy.json import save_json

    save_json(feeds, str(path))


def test_polygraphy_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_inputs(tmp_path / "inputs.json", [{"x": rows(1)}, {"x": rows(2, 3)}])
    capfd.readouterr()
    assert values(tmp_path / "inputs.json") == [1, 2, 3]
    assert capfd.readouterr().out == ""
    folder = tmp_path / "inputs"
    folder.mkdir()
    save_inputs(folder / "0000000001.json", {"x": rows(5)})
    save_inputs(folder / "0000000000.json", {"x": rows(4)})
    assert values(folder) == [4, 5]


def test_polygraphy_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"inputs.json: cannot be read as Polygraphy inputs"):
        values(path)
    path.write_text("3")
    with pytest.raises(DataError, match=r"inputs.json: holds a int, expected a list of feeds"):
        values(path)
    path.write_text("[3]")
    with pytest.raises(DataError, match=r"inputs.json, feed 0: is a int, expected a feed"):
        values(path)
    save_inputs(path, [{"y": rows(1)}])
    with pytest.raises(DataError, match=r"inputs.json, feed 0: no array for input 'x'"):
        values(path)


GENERATOR = """
import numpy as np
from beside_the_script import NUMBERS

def one(number):
    return {"x": np.full((1, 2), number, np.float32)}

def load_data():
    for number in NUMBERS:
        yield one(number)
"""


def test_load_data_script(tmp_path: Path) -> None:
    (tmp_path / "beside_the_script.py").write_text("NUMBERS = [4, 5, 6]\n")
    script = tmp_path / "data.py"
    script.write_text(GENERATOR)
    before = list(sys.path)
    assert values(script) == [4, 5, 6]
    assert sys.path == before
    script.write_text("def load_data():\n    return [{'x': [[1.0, 2.0]]}, {'x': [[3.0, 4.0]]}]\n")
    assert values(script) == [1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def load_data(:", "the script failed .SyntaxError"),
        ("import sys; sys.exit(3)", "the script failed .SystemExit: 3"),
        ("import no_such_module_at_all", "the script failed .ModuleNotFoundError: No module"),
        ("def data(): pass", r"defines no function load_data\(\)"),
        (
            "def load_data(): return 3",
            r"load_data\(\) failed .TypeError: expected a generator or a list of feeds, got int",
        ),
        ("def load_data(): return {'x': 3}", "expected a generator or a list of feeds, got dict"),
        ("def load_data(): yield [1.0]", "feed 0: is a list, expected a feed"),
        ("def load_data():\n    yield {'x': [[0.0, 0.0]]}\n    1 / 0", r"load_data\(\) failed .ZeroDivisionError"),
        ("def load_data(): return []", "gave no samples"),
        ("import sys\ndef load_data(): sys.exit(5)", r"load_data\(\) failed .SystemExit: 5"),
    ],
)
def test_scripts_that_fail(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.py").write_text(text)
    with pytest.raises(DataError, match=rf"data\.py.*{message}"):
        values(tmp_path / "data.py")


def test_what_a_script_prints_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.py").write_text(
        "print('reading')\ndef load_data():\n    print('giving')\n    for i in range(2): yield {'x': [[i, i + 1.0]]}\n"
    )
    assert values(tmp_path / "data.py") == [0, 1]
    said = capsys.readouterr()
    assert said.out == ""
    assert {"reading", "giving"} <= set(said.err.split())


def test_paths_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        open_data(tmp_path / "nowhere", [X])
    with pytest.raises(DataError, match=r"is an empty folder; expected .npz"):
        open_data(tmp_path, [X])
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DataError, match=r"holds no data of a known kind; expected .npz"):
        open_data(tmp_path, [X])
    with pytest.raises(DataError, match=r"notes.txt: data of this kind cannot be read; expected .npz, .npy, .json"):
        open_data(tmp_path / "notes.txt", [X])
    np.savez(tmp_path / "a.npz", x=rows(1))
    np.save(tmp_path / "labels.npy", [1])
    with pytest.raises(DataError, match=r"mixes kinds of data \(1 .npz, 1 .npy\)"):
        open_data(tmp_path, [X])
    with pytest.raises(DataError, match="the model has no inputs"):
        open_data(tmp_path, [])


def test_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([3, 1], np.uint8))
    np.savez(tmp_path / "a.npz", labels=[4, 5])
    (tmp_path / "a.txt").write_text("3\n1\n\n2\n")
    (tmp_path / "a.csv").write_text("label\n0.5\n-1e3,\n")
    assert load_labels(tmp_path / "a.npy").tolist() == [3, 1]
    assert load_labels(str(tmp_path / "a.npz")).tolist() == [4, 5]
    integers = load_labels(tmp_path / "a.txt")
    assert (integers.tolist(), integers.dtype) == ([3, 1, 2], np.int64)
    assert load_labels(tmp_path / "a.csv").tolist() == [0.5, -1000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "label\n1\ntwo\n", "a.txt, line 3: 'two' is not a number"),
        ("a.csv", "1,2\n", "a.csv, line 1: '1,2' is not a number"),
        ("a.csv", "label\n", "holds no labels"),
        ("a.csv", "1\nnan\n", "labels must be finite numbers"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as text"),
        ("a.npy", b"garbage", "a.npy: cannot be read as a numpy file"),
        ("a.npz", b"garbage", "a.npz: cannot be read as a numpy file"),
        ("a.pkl", b"garbage", "labels cannot be read from .pkl"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        load_labels(tmp_path / name)


def test_label_arrays_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file of labels"):
        load_labels(tmp_path / "nowhere.npy")
    np.savez(tmp_path / "two.npz", a=[1], b=[2])
    with pytest.raises(DataError, match="expected one array, the labels, got 'a', 'b'"):
        load_labels(tmp_path / "two.npz")
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "one.npy", np.array(3))
    with pytest.raises(DataError, match="holds no labels"):
        load_labels(tmp_path / "one.npy")
    with pytest.raises(DataError, match="labels must be finite numbers, got str"):
        load_labels(tmp_path / "text.npy")
    np.save(tmp_path / "objects.npy", np.array([None]))
    with pytest.raises(DataError, match="holds pickled Python objects"):
        load_labels(tmp_path / "objects.npy")


def test_the_package_imports_no_framework() -> None:
    code = (
        "import sys, onnxlr.data; print([m for m in ('torch', 'onnxruntime', 'polygraphy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
