"""Quantises a graph with NVIDIA's model optimizer; `packages.py optimizer` runs this in an environment of its own.

    python modelopt_int8.py ROUTE.onnx CALIBRATION.npy OUT.onnx entropy|max

The optimizer asks for an older onnxruntime than klas-zoo does, so that nothing of klas-zoo is imported here.
"""

from __future__ import annotations

import sys

import numpy as np
from modelopt.onnx.quantization import quantize


def main() -> None:
    graph, images, out, method = sys.argv[1:]
    quantize(
        graph,
        quantize_mode="int8",
        calibration_data={"images": np.load(images)},
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=out,
        log_level="ERROR",
    )


if __name__ == "__main__":
    main()
