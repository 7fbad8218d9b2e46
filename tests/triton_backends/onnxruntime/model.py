"""A stand-in for Triton's onnxruntime backend, which the server from the package index has not got.

Triton runs this for every model whose config.pbtxt says `backend: "onnxruntime"`; the model's
repository needs no change.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton  # only there in Triton's own process


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        parameters = config.get("parameters", {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
        graph = folder / (config.get("default_model_filename") or "model.onnx")
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = [one["name"] for one in config["input"]]
        self.outputs = [one["name"] for one in config["output"]]

    def execute(self, requests):
        """Merges what Triton's dynamic batcher put together, and takes the answers apart again."""
        batches = [[triton.get_input_tensor_by_name(r, name).as_numpy() for name in self.inputs] for r in requests]
        merged = {name: np.concatenate(parts) for name, *parts in zip(self.inputs, *batches, strict=True)}
        answers = self.session.run(self.outputs, merged)
        ends = np.cumsum([len(parts[0]) for parts in batches])[:-1]
        split = zip(*(np.split(answer, ends) for answer in answers), strict=True)
        return [
            triton.InferenceResponse([triton.Tensor(n, part) for n, part in zip(self.outputs, parts, strict=True)])
            for parts in split
        ]
