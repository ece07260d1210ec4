"""GPUs of this machine, as their driver describes them."""

from __future__ import annotations

import pwd
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import psutil

from launcher.preflight.facts import Gpu, GpuProcess

DRIVER = Path("/proc/driver/nvidia/version")
THROTTLE = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat (driver)", 0x40: "heat (hardware)",
            0x80: "power brake", 0x2: "application clocks", 0x100: "display clocks", 0x10: "sync boost"}
"""nvml.h, nvmlClocksEventReasons: bit → name, without 0x1, an idle GPU."""


class GpuProbe(Protocol):
    """Who can say what GPUs there are."""

    def versions(self) -> dict[str, str]:
        """Of the driver, and of the CUDA that it supports; empty without one."""

    def gpus(self) -> Sequence[Gpu]: ...


class NoGpus:
    """A machine without a driver for GPUs."""

    def versions(self) -> dict[str, str]:
        return {}

    def gpus(self) -> Sequence[Gpu]:
        return ()


class Nvml:
    """NVIDIA's management library. nvml: its bindings, nvidia-ml-py's module `pynvml`."""

    def __init__(self, nvml: ModuleType | Any):
        self._nvml = nvml
        nvml.nvmlInit()

    def versions(self) -> dict[str, str]:
        cuda = self._nvml.nvmlSystemGetCudaDriverVersion()
        return {"driver": self._nvml.nvmlSystemGetDriverVersion(), "driver CUDA": f"{cuda // 1000}.{cuda % 1000 // 10}"}

    def gpus(self) -> Sequence[Gpu]:
        return [self._gpu(index) for index in range(self._nvml.nvmlDeviceGetCount())]

    def _gpu(self, index: int) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        ecc = self._told(nvml.nvmlDeviceGetEccMode, handle)
        remapped = self._told(nvml.nvmlDeviceGetRemappedRows, handle)  # corrected, uncorrected, pending, failed
        pending = [self._told(nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle), remapped and remapped[2]]
        reasons = self._told(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0
        links = [self._told(nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
        return Gpu(
            index, nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle), memory.total, memory.free,
            ecc=None if ecc is None else bool(ecc[0]),
            volatile_ecc=self._told(nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, nvml.NVML_VOLATILE_ECC),
            aggregate_ecc=self._told(nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, nvml.NVML_AGGREGATE_ECC),
            pending_repair=None if pending == [None, None] else any(pending),
            failed_repair=None if remapped is None else bool(remapped[3]),
            throttle=tuple(name for bit, name in THROTTLE.items() if reasons & bit),
            sm_mhz=self._told(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            max_sm_mhz=self._told(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
            power_limit_w=_watts(self._told(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
            default_power_limit_w=_watts(self._told(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)),
            pcie_width=self._told(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            max_pcie_width=self._told(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
            nvlinks=None if set(links) == {None} else sum(bool(link) for link in links),
            processes=tuple(_process(one.pid, one.usedGpuMemory or 0)
                            for one in self._told(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()))

    def _told(self, ask: Callable, *arguments: Any) -> Any:
        """The answer; None where the device or the driver has none. Other errors are the driver's to explain."""
        nvml = self._nvml
        try:
            return ask(*arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_InvalidArgument,
                nvml.NVMLError_NoPermission):
            return None


def probe_of_this_machine() -> GpuProbe:
    """RuntimeError, with what helps, when there is a driver and nothing to ask it with."""
    if not DRIVER.exists():
        return NoGpus()
    try:
        import pynvml
    except ImportError as error:
        raise RuntimeError("there is an NVIDIA driver and no nvidia-ml-py to ask it; install megatron-pbsd[gpu]"
                           ) from error
    return Nvml(pynvml)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _process(pid: int, used_bytes: int) -> GpuProcess:
    name = user = ""
    with suppress(psutil.Error, KeyError):
        process = psutil.Process(pid)
        name, user = process.name(), pwd.getpwuid(process.uids().real).pw_name
    return GpuProcess(pid, name, user, used_bytes)
