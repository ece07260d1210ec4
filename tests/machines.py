"""Machines made of Linux namespaces: each with its own address, host name, processes, /tmp and /dev/shm.

They share everything else of the file system, as nodes of a cluster share theirs, and are connected by a bridge in a
namespace of its own. Needs root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

NET = "10.78.0"
BOOT_S = 20.0
SETTLE = """
set -e
hostname {name}
mount --make-rprivate /
mount -t proc proc /proc
mount --bind {hosts} /etc/hosts
mount --bind /dev/null /etc/resolv.conf
{keep}
mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
ip link set lo up
touch {ready}
while :; do sleep 3600 & wait $!; done
"""


class Machines:
    """`count` of them, `node1` to `node<count>`, until `close`. folder: outside of /tmp or below it, for files that
    they share."""

    def __init__(self, count: int, folder: Path):
        self.folder = folder
        self._inits: dict[str, int] = {}
        self._started: list[subprocess.Popen] = []
        self.names = [f"node{number}" for number in range(1, count + 1)]
        hosts = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        try:
            self._boot("switch")
            self._run("switch", "ip link add br0 type bridge && ip link set br0 up")
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        return f"{NET}.{10 + int(name.removeprefix('node'))}"

    def boot(self, name: str) -> None:
        """Also after a crash: with nothing of what was there before."""
        self._boot(name)
        port, pid = f"to-{name}", self._inits[name]
        self._run("switch", f"ip link del {port} 2>/dev/null; ip link add {port} type veth peer name eth0 "
                            f"netns /proc/{pid}/ns/net && ip link set {port} master br0 up")
        self._run(name, f"ip addr add {self.address(name)}/24 dev eth0 && ip link set eth0 up")

    def crash(self, name: str) -> None:
        """As if the power were cut."""
        os.kill(self._inits.pop(name), signal.SIGKILL)

    def cut(self, name: str) -> None:
        self._run("switch", f"ip link set to-{name} down")

    def heal(self, name: str) -> None:
        self._run("switch", f"ip link set to-{name} up")

    def start(self, name: str, command: Sequence[str], **options) -> subprocess.Popen:
        """Run there, in a session of its own."""
        process = subprocess.Popen([*self._inside(name), *command], start_new_session=True, **options)
        self._started.append(process)
        return process

    def processes(self, name: str, text: str) -> list[int]:
        """Numbers of the processes there whose command line has `text`, as others know them from outside."""
        namespace, found = os.readlink(f"/proc/{self._inits[name]}/ns/pid"), []
        for entry in Path("/proc").iterdir():
            try:
                if (entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace
                        and text in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        for pid in self._inits.values():
            os.kill(pid, signal.SIGKILL)
        self._inits.clear()
        for process in self._started:
            process.kill()
            process.wait()

    def _boot(self, name: str) -> None:
        ready = self.folder / f"{name}.ready"
        ready.unlink(missing_ok=True)
        # The folder of the test stays what it is, wherever it lies.
        keep = "" if name == "switch" else (
            f"mount -t tmpfs -o mode=1777 tmpfs /mnt && mkdir -p /mnt/shared && mount --bind {self.folder} /mnt/shared"
            f" && mount -t tmpfs -o mode=1777 tmpfs /tmp && mkdir -p {self.folder} && mount --bind /mnt/shared "
            f"{self.folder}")
        script = SETTLE.format(name=name, hosts=self.folder / "hosts", ready=ready, keep=keep)
        # Those that are left when a test is killed would go on for ever.
        outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "--pid", "--fork",
             "--kill-child", "sh", "-c", script],
            stdin=subprocess.DEVNULL, start_new_session=True)
        self._started.append(outer)
        end = time.monotonic() + BOOT_S
        while not ready.exists():
            if outer.poll() is not None or time.monotonic() > end:
                pytest.skip("namespaces need privileges")
            time.sleep(0.02)
        self._inits[name] = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])

    def _inside(self, name: str) -> list[str]:
        # The switch is a network alone: it has to know the machines' processes by the numbers that we know.
        spaces = ["-n"] if name == "switch" else ["-n", "-u", "-m", "-p"]
        return ["nsenter", "-t", str(self._inits[name]), *spaces, f"--wd={os.getcwd()}"]

    def _run(self, name: str, script: str) -> None:
        subprocess.run([*self._inside(name), "sh", "-c", script], check=True)
