"""Make PyPI's torchvision importable beside a CPU build of PyTorch.

PyPI's torchvision is a CUDA build: beside ``torch +cpu`` its shared library does not load, so its
operators are unknown, and ``torchvision/_meta_registrations.py``, which attaches fake kernels to
``nms`` and ``qnms``, raises ``operator torchvision::nms does not exist``.  Declaring the two
schemas is enough: transformers and vLLM use torchvision's resizing, which needs no operator of its
own.

The ``.pth`` file beside this module runs it in every interpreter of the environment (the engine
core and the workers are new processes), so importing it must cost next to nothing: it imports
PyTorch only once somebody else imports torchvision.
"""

import sys
from importlib.machinery import PathFinder, SourceFileLoader

_EXTENSION = "torchvision.extension"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # PyTorch forgets the schemas when the library object is collected


class _ExtensionLoader(SourceFileLoader):
    """Run ``torchvision.extension``, which tries the shared library, then fill its gap."""

    def exec_module(self, module):
        super().exec_module(module)
        import torch

        if torch.version.cuda is None and torch.version.hip is None and not module._has_ops():
            global _library
            _library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                _library.define(schema)


class _ExtensionFinder:
    """Find ``torchvision.extension`` where it always is, with the loader above."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != _EXTENSION:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _ExtensionLoader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _ExtensionFinder)
