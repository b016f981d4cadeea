"""Calibration data: whatever a user has, as one re-iterable stream of samples that fit the model.

    source      open_data(): finds the reader for a path or a Python object
    arrays      .npz, .npy; labels
    images      folders of images, resized and normalized by a convention
    onnx_data   test_data_set_*/input_*.pb
    polygraphy_data   saved inputs (JSON), load_data() scripts
    python_data       iterables, DataLoader, CalibrationDataReader
    fit         names, shapes, dtypes and values checked, feeds cut into samples
    dataset     Dataset, split() into calibration and held-out, batches()
    spec        TensorSpec; where a model's batch axis is

Neither torch nor onnxruntime is imported here; onnx, Polygraphy and Pillow only by the reader that needs them.
"""

from onnxlr.data.arrays import load_labels
from onnxlr.data.dataset import Dataset, batches, numbered_batches, shuffled, split, spread
from onnxlr.data.images import IMAGES_KEY, ImageOptions
from onnxlr.data.source import open_data
from onnxlr.data.spec import Feed, Sample, TensorSpec, fixed_batch, has_batch_axis, sample_count

__all__ = [
    "IMAGES_KEY",
    "Dataset",
    "Feed",
    "ImageOptions",
    "Sample",
    "TensorSpec",
    "batches",
    "fixed_batch",
    "has_batch_axis",
    "load_labels",
    "numbered_batches",
    "open_data",
    "sample_count",
    "shuffled",
    "split",
    "spread",
]
