"""For a CPU-only environment: PyPI's torchvision is a CUDA build whose native library cannot be loaded beside the CPU
build of torch. Importing it then fails on two operators that have no schema; text models only need the import."""

import importlib.abc
import sys


class DefineOperators(importlib.abc.MetaPathFinder):
    """Gives the two operators a schema just before torchvision is first imported."""

    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
            sys.torchvision_operators = self
        return None


sys.meta_path.insert(0, DefineOperators())
