"""Whether an execution provider of onnxruntime computes here: one block of a network, run in a process of its own.

`get_available_providers()` lists what was compiled in. A provider also starts where cuDNN cannot be used, or where the
package has no kernels for the card; both show only when a convolution or a product runs. So a graph of a convolution, a
matrix product and an attention runs on the provider and on the CPU, and the answers are compared. In a process of its
own, because a card in exclusive mode is then free again, and because a broken library can end a process.
"""

from __future__ import annotations

import json
import subprocess
import sys

from klas_zoo.gpus import cause_of, why_unusable
from klas_zoo.runtimes.base import CPU_PROVIDER, CUDA_PROVIDER
from klas_zoo.runtimes.ort import cuda_version

_SECONDS = 180  # the first start of a provider may read hundreds of megabytes from a slow disk
_ALLOWED = 1e-3  # relative: between the rounding of fp32 (1e-6) and of TF32 (1e-3 and more) nothing is wrong
_GRAPH = """<ir_version: 10, opset_import: ["": 23]>
block (float[1,3,16,16] images, float[32,3,4,4] kernel, float[32,32] weight) => (float[1,16,32] answer) {
   shape = Constant <value = int64[3] {1, 32, 16}> ()
   map = Conv <strides = [4, 4]> (images, kernel)
   flat = Reshape (map, shape)
   tokens = Transpose <perm = [0, 2, 1]> (flat)
   product = MatMul (tokens, weight)
   answer = Attention <q_num_heads = 2, kv_num_heads = 2> (product, product, product)
}"""


def provider_problem(provider: str) -> str | None:
    """Why a provider cannot be used on this machine, for the end of a sentence; None where it computes correctly.

    What the driver knows, such as a version of CUDA that it cannot run, comes before what the provider says of it.
    Takes a few seconds. Where the `onnx` package is not installed there is no graph to run, and no problem is found.
    """
    known = why_unusable(cuda_version()) if provider == CUDA_PROVIDER else None
    if known is not None and "EXCLUSIVE" not in known:  # an exclusive card may be free
        return known
    found = _tried(provider)
    return found if found is None else known or cause_of(found) or found.rstrip(".")


def _tried(provider: str) -> str | None:
    command = [sys.executable, "-m", "klas_zoo.runtimes.trial", provider]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_SECONDS} s"
    try:
        found: str | None = json.loads(done.stdout.splitlines()[-1])["problem"]
    except (IndexError, ValueError, KeyError):
        said = done.stderr.strip().splitlines()
        return f"its process ended with code {done.returncode}{': ' + said[-1] if said else ''}"
    return found


def _problem(provider: str) -> str | None:
    try:
        import onnx
    except ImportError:
        return None
    import numpy as np

    from klas_zoo.errors import first_line
    from klas_zoo.runtimes.ort import _start

    graph = onnx.parser.parse_model(_GRAPH).SerializeToString()
    draw = np.random.default_rng(0).standard_normal
    feed = {
        name: draw(shape, dtype=np.float32)
        for name, shape in (("images", (1, 3, 16, 16)), ("kernel", (32, 3, 4, 4)), ("weight", (32, 32)))
    }
    answers = []
    for one in (CPU_PROVIDER, provider):
        try:
            answers.append(_start(graph, one, 1, {}).run(None, feed)[0])
        except Exception as error:  # onnxruntime's exceptions have no common class of their own
            return first_line(error)
    expected, found = answers
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not off < _ALLOWED:  # also where it is not a number
        return f"a block of convolution, product and attention is off by {off:.2g} of the CPU's largest answer"
    return None


if __name__ == "__main__":
    print(json.dumps({"problem": _problem(sys.argv[1])}))
