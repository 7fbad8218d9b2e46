"""The registry of verified engines, and picking from it. Nothing here imports torch, onnx or numpy."""

from klas_zoo.registry.store import Registry as Registry
from klas_zoo.registry.store import default_root as default_root
