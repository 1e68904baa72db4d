"""ONNX runtimes as peers: onnxruntime and OpenVINO, in fp32 and in int8, from the same two graphs.

Both get normalised float images, so normalisation is not timed. The int8 graph is what onnxruntime's own static
quantization makes of the folded network: QDQ, weights int8 with a scale for each channel, activations uint8.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arqsearch.benchmarks.contenders import Contender, fold_batch_norm
from arqsearch.benchmarks.environment import peers_isa
from arqsearch.benchmarks.networks import CALIBRATION_IMAGES, Network

INPUT, OUTPUT, BATCH = "images", "logits", "N"
#: Images that the network is traced with.
TRACED_IMAGES = 2
QUANTIZATION = "static QDQ, weights int8 per channel, activations uint8"


class OnnxFiles:
    """The two graphs of one network, written when first asked for and shared by the runtimes.

    The number of images is open in them; each runtime fixes it before it compiles.

    :param network: the network and its batch.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._folder = tempfile.TemporaryDirectory(prefix="arqsearch-bench-")

    def path(self, kind: str) -> Path:
        """File of the ``fp32`` or the ``int8`` graph."""
        path = Path(self._folder.name) / f"{kind}.onnx"
        if not path.is_file():
            self._quantize(path) if kind == "int8" else self._export(path)
        return path

    def close(self) -> None:
        """Delete the files."""
        self._folder.cleanup()

    @torch.no_grad()
    def _export(self, path: Path) -> None:
        model, images = fold_batch_norm(self.network.model), self.network.normalized()[:TRACED_IMAGES]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The exporter by tracing: it needs no package besides onnx.
            torch.onnx.export(
                model, (images,), str(path), dynamo=False, input_names=[INPUT], output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
            )  # fmt: skip

    def _quantize(self, path: Path) -> None:
        tool = importlib.import_module("onnxruntime.quantization")
        batches = iter([self.network.normalized()[:CALIBRATION_IMAGES].numpy()])

        class Reader(tool.CalibrationDataReader):  # type: ignore[misc, name-defined]
            def get_next(self) -> dict[str, np.ndarray] | None:
                images = next(batches, None)
                return None if images is None else {INPUT: images}

        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # It asks for a preparation of the graph that folding has made.
        try:
            tool.quantize_static(
                str(self.path("fp32")), str(path), Reader(), quant_format=tool.QuantFormat.QDQ, per_channel=True,
                activation_type=tool.QuantType.QUInt8, weight_type=tool.QuantType.QInt8,
            )  # fmt: skip
        finally:
            logging.disable(before)


class OnnxRuntime(Contender):
    """onnxruntime's CPU provider.

    :param kind: ``fp32`` or ``int8``.
    :param files: the graphs.
    """

    #: There is no switch that would keep onnxruntime from an instruction set.
    isa = "cannot be limited"

    def __init__(self, kind: str, files: OnnxFiles) -> None:
        self.name, self.kind, self.files = f"onnxruntime_{kind}", kind, files
        self.bits = kind
        self.note = "normalisation not timed"
        if kind == "int8":
            self.note = f"{QUANTIZATION}; sums saturate on processors without VNNI; {self.note}"

    def available(self) -> str | None:
        return _missing("onnxruntime")

    def prepare(self, network: Network) -> None:
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name(BATCH, network.batch)
        path = str(self.files.path(self.kind))
        self._session: Any = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._batch = {INPUT: network.normalized().numpy()}

    def run(self) -> np.ndarray:
        return np.asarray(self._session.run([OUTPUT], self._batch)[0])


class OpenVino(Contender):
    """OpenVINO's CPU plug-in: one thread, one stream, tuned for latency, no bfloat16.

    :param kind: ``fp32`` or ``int8``.
    :param files: the graphs.
    :param isa: instruction set.
    """

    def __init__(self, kind: str, files: OnnxFiles, isa: str = "auto") -> None:
        self.name, self.kind, self.files = f"openvino_{kind}", kind, files
        self.bits = kind
        self.isa = peers_isa(isa)
        self.note = f"{QUANTIZATION}; normalisation not timed" if kind == "int8" else "normalisation not timed"

    def available(self) -> str | None:
        return _missing("openvino", "; `pip install 'arqsearch[bench]'`")

    def prepare(self, network: Network) -> None:
        openvino = importlib.import_module("openvino")
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }  # fmt: skip
        model = core.read_model(str(self.files.path(self.kind)))
        self._batch = network.normalized().numpy()
        model.reshape(list(self._batch.shape))
        self._request: Any = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self) -> np.ndarray:
        # Shared memory: the runtime reads the batch where it lies.
        return np.array(self._request.infer([self._batch], share_inputs=True)[0])


def _missing(package: str, remedy: str = "") -> str | None:
    """Why a package cannot be imported; None where it can."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        return f"{package} is not installed{remedy}" if absent else f"{package} cannot be loaded: {error}"
    return None
