"""Stand-in for SGLang's compiled kernels, of which PyPI has CUDA builds only.

Without AMX SGLang computes in plain torch; nothing numerical is needed from here. Every name exists and fails when it is called.
"""

__version__ = "0.4.10"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on a CPU")

    return absent
