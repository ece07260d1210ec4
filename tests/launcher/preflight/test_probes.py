"""What this machine says of itself is what it is; what hangs or fails is a fact."""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from small_disk import small_disk

from launcher.preflight import host
from launcher.preflight.facts import FabricPort, Gpu, GpuProcess, NodeFacts, from_json, to_json
from launcher.preflight.gathering import Subject, answers, gather
from launcher.preflight.gpus import NoGpus, Nvml

GB = 10**9


def test_probes_that_hang_or_fail_are_said_to():
    stop = threading.Event()

    def fails():
        raise RuntimeError("no driver")

    began = time.monotonic()
    found, failures = answers({"good": lambda: {"shm_bytes": 1}, "hangs": stop.wait, "fails": fails}, 0.3)
    stop.set()
    assert time.monotonic() - began < 5
    assert found == {"good": {"shm_bytes": 1}}
    assert failures == {"fails": "RuntimeError: no driver", "hangs": "no answer within 0.3 s"}


class TwoGpus:
    """GPUs for machines that have none."""

    def versions(self):
        return {"driver": "580.1"}

    def gpus(self):
        return [Gpu(0, "H100", "a", 80 * GB, 79 * GB), Gpu(1, "H100", "b", 80 * GB, 79 * GB)]


def test_a_node_says_what_it_is(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        facts = gather(Subject(3, "n3", "vm", tmp_path / "not" / "there", ("127.0.0.1", 1), (busy,), tmp_path), TwoGpus,
                       60.0)
    assert facts.failures == {} and (facts.rank, facts.name) == (3, "n3")
    assert len(facts.gpus) == 2 and facts.versions["driver"] == "580.1"
    assert facts.versions["python"] == ".".join(map(str, sys.version_info[:3])) and "megatron-core" in facts.versions
    assert facts.busy_ports == (busy,) and facts.route_address == "127.0.0.1"
    assert facts.limits.nofile[0] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert facts.shm_bytes == psutil.disk_usage("/dev/shm").total
    assert {disk.purpose: disk.path for disk in facts.disks} == {"run": str(tmp_path), "temporary": str(tmp_path)}
    assert all(disk.write_mb_s > 0 and disk.free_bytes > 0 for disk in facts.disks)
    assert not list(tmp_path.iterdir()), "what was written is taken away"
    assert any(one.address == "127.0.0.1" for one in facts.interfaces)
    assert from_json(NodeFacts, to_json(facts)) == facts


def test_a_full_disk_cannot_be_written_to(tmp_path):
    with small_disk(tmp_path, "64k"):
        assert host.disk("run", tmp_path).write_mb_s is None
        assert host.disk("run", tmp_path).filesystem == "tmpfs"


def test_ports_of_rdma_devices_are_read_as_the_kernel_writes_them(tmp_path):
    for device, port, state, physical, rate in (("mlx5_0", "1", "4: ACTIVE", "5: LinkUp", "400 Gb/sec (4X NDR)"),
                                                ("mlx5_1", "1", "1: DOWN", "3: Disabled", "2.5 Gb/sec (1X SDR)")):
        folder = tmp_path / "class/infiniband" / device / "ports" / port
        folder.mkdir(parents=True)
        for name, text in (("state", state), ("phys_state", physical), ("rate", rate), ("link_layer", "InfiniBand")):
            (folder / name).write_text(text + "\n")
    assert host.fabric_ports(tmp_path) == (FabricPort("mlx5_0/1", "ACTIVE", "LinkUp", 400.0, "InfiniBand"),
                                           FabricPort("mlx5_1/1", "DOWN", "Disabled", 2.5, "InfiniBand"))
    assert host.fabric_ports(tmp_path / "none") == ()


class FakeNvml(SimpleNamespace):
    """As much of pynvml as the probe asks for, with two GPUs: one in trouble, one that tells little."""

    NVMLError_NotSupported = type("NVMLError_NotSupported", (Exception,), {})
    NVMLError_FunctionNotFound = type("NVMLError_FunctionNotFound", (Exception,), {})
    NVMLError_InvalidArgument = type("NVMLError_InvalidArgument", (Exception,), {})
    NVMLError_NoPermission = type("NVMLError_NoPermission", (Exception,), {})
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_AGGREGATE_ECC, NVML_CLOCK_SM = 1, 0, 1, 1
    NVML_NVLINK_MAX_LINKS = 36

    def __getattr__(self, name):
        answers = {
            "nvmlInit": None, "nvmlSystemGetCudaDriverVersion": 12090, "nvmlSystemGetDriverVersion": "580.65",
            "nvmlDeviceGetCount": 2, "nvmlDeviceGetName": "NVIDIA H100", "nvmlDeviceGetUUID": "GPU-1",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GB, free=70 * GB),
            "nvmlDeviceGetEccMode": [1, 1], "nvmlDeviceGetRemappedRows": (0, 1, 1, 0),
            "nvmlDeviceGetRetiredPagesPendingStatus": self.NVMLError_NotSupported,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x1 | 0x4 | 0x40, "nvmlDeviceGetClockInfo": 345,
            "nvmlDeviceGetMaxClockInfo": 1980, "nvmlDeviceGetEnforcedPowerLimit": 500_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000, "nvmlDeviceGetCurrPcieLinkWidth": 8,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=os.getpid(), usedGpuMemory=9 * GB),
                                                     SimpleNamespace(pid=2**30, usedGpuMemory=None)]}
        told = ("nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo")

        def ask(handle=0, *arguments):
            if name == "nvmlDeviceGetHandleByIndex":
                return handle
            answer = answers.get(name)
            if name == "nvmlDeviceGetTotalEccErrors":
                answer = {(1, 0): 2, (1, 1): 5}[arguments]
            if name == "nvmlDeviceGetNvLinkState":
                answer = 1 if arguments[0] < 17 else 0 if arguments[0] < 18 else self.NVMLError_InvalidArgument
            if handle == 1 and name not in told:
                answer = self.NVMLError_NotSupported
            if isinstance(answer, type):
                raise answer
            return answer

        return ask


def test_a_driver_is_asked_for_all_that_rules_look_at():
    probe = Nvml(FakeNvml())
    assert probe.versions() == {"driver": "580.65", "driver CUDA": "12.9"}
    first, second = probe.gpus()
    assert first.processes[0].pid == os.getpid() and first.processes[0].name == psutil.Process().name()
    assert first.processes[1] == GpuProcess(2**30, "", "", 0)
    assert dataclasses.replace(first, processes=()) == Gpu(
        0, "NVIDIA H100", "GPU-1", 80 * GB, 70 * GB, True, 2, 5, True, False, ("power cap", "heat (hardware)"), 345,
        1980, 500.0, 700.0, 8, 16, 17)
    assert second == Gpu(1, "NVIDIA H100", "GPU-1", 80 * GB, 70 * GB), "what it does not tell is not made up"
    assert NoGpus().gpus() == () and NoGpus().versions() == {}


def test_the_bindings_have_what_the_probe_asks_for():
    pynvml = pytest.importorskip("pynvml")
    text = Path(host.__file__).with_name("gpus.py").read_text()
    names = {name for name in text.replace("(", " ").replace(",", " ").replace(")", " ").split()
             if name.startswith(("nvml.nvml", "nvml.NVML", "self._nvml.nvml"))}
    missing = [name for name in names if not hasattr(pynvml, name.rpartition(".")[2])]
    assert len(names) > 25 and not missing


def test_a_process_that_is_stuck_ends_itself_and_says_in_what():
    code = ("import time; from launcher.preflight.watchdog import Watchdog\n"
            "dog = Watchdog('node 1 (anna)', 0.4); dog.enter('first'); time.sleep(0.2); dog.enter('clocks')\n"
            "time.sleep(0.2); dog.enter('files'); time.sleep(60)")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1 and "node 1 (anna) has been in 'files' for 0.4 s" in ended.stderr
