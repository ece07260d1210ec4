"""Where an engine is between two versions of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_pbsd.rollout.engines.protocol import EngineError


@dataclass
class Update:
    """engine: its name. missing: tensors that have not arrived. partial: of which some need not."""

    engine: str
    version: int
    missing: set[str]
    partial: bool

    @classmethod
    def begun(cls, engine: str, tensors: Iterable[str], version: int, base: int | None, held: int | None) -> Update:
        """held: the version that the engine has; None between versions. EngineError when it is not `base`."""
        if base is not None and base != held:
            has = "is between two versions" if held is None else f"has version {held}"
            raise EngineError(f"engine {engine!r}: what leads from weights version {base} to {version} cannot be used: "
                              f"the engine {has}")
        return cls(engine, version, set(tensors), base is not None)

    def arrived(self, names: Iterable[str]) -> None:
        self.missing -= set(names)

    def ended(self) -> int:
        """The new version. EngineError naming what has not arrived."""
        if self.missing and not self.partial:
            raise EngineError(f"engine {self.engine!r}: weights version {self.version} is incomplete: nothing arrived "
                              f"for {sorted(self.missing)}")
        return self.version


def check_between(engine: str, update: Update | None) -> None:
    """EngineError when the engine has some tensors of one version and others of another."""
    if update is not None:
        raise EngineError(f"engine {engine!r} is in the middle of publication {update.version}: its weights are of no "
                          "version until that has ended")
