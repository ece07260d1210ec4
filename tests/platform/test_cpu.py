"""The CPU stand-ins: checked before they are made, gone when Megatron code has run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_pbsd.platform import cpu


def test_stand_ins_are_taken_away_again():
    def present():
        return {(owner, name): getattr(owner, name) for owner, names in cpu._STAND_INS for name in names}

    before = present()
    with pytest.raises(KeyError), cpu.Cpu().running():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.empty(1, device="cuda", pin_memory=True).cuda().type() == "torch.cuda.FloatTensor"
        raise KeyError
    assert present() == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_a_missing_symbol_is_named():
    owner = SimpleNamespace(__name__="megatron.core.somewhere", present=1)
    cpu.require_symbols(owner, ("present",))
    with pytest.raises(cpu.PlatformError, match="megatron.core.somewhere.absent does not exist"):
        cpu.require_symbols(owner, ("present", "absent"))


def test_another_megatron_version_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "version", lambda name: "0.17.0")
    with pytest.raises(cpu.PlatformError, match=r"megatron-core 0.17.0 is installed; .* needs 0.16.1"):
        cpu.Cpu().prepare(0)
