"""A real Slurm on this machine: a controller and nodes, each in Linux namespaces of its own.

Every node has its own processes, address, host name, /tmp and /dev/shm, so that it can be crashed, cut off and booted
as a machine can. They share all other files. Needs root, and what tools/install_slurm.sh installs. Whatever happens
inside ends with the namespaces; what is left are the files of one folder, which `down` removes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONTROLLER = "ctl"
NETWORK = "10.77.0"
GPUS = 8
SLURMD_TIMEOUT_S = 10
GRACE_S = 60

CONFIGURATION = """
ClusterName=mini
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
SlurmctldTimeout=15
MessageTimeout=10
KillWait=5
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName={names} CPUs=16 RealMemory=24000 Gres=gpu:h100:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
PartitionName=spot Nodes=ALL MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
"""

# Process 1 of a machine. What it is told of: its name, the folder, and whether it has its own /tmp and /dev/shm.
INIT = """
set -e
hostname "$1"; mount --make-rprivate /; mount -t proc proc /proc
mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/resolv.conf" /etc/resolv.conf
if [ "$1" != ctl ]; then
    mount -t tmpfs -o mode=1777 tmpfs /tmp; mount -t tmpfs -o mode=1777,size=4g tmpfs /dev/shm
fi
ip link set lo up
touch "$2/machines/$1.ready"
while :; do sleep 3600 & wait $!; done
"""


WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""What is started with it ends when this process does, however it does."""


class MiniCluster:
    """`nodes` machines node1, node2 … and a controller. A context manager.

    shared:  a folder that all see (as everything but /tmp and /dev/shm is).
    """

    def __init__(self, nodes: int = 4):
        self.names = [f"node{i}" for i in range(1, nodes + 1)]
        # Not in /tmp, of which every node has its own.
        self.folder = Path(tempfile.mkdtemp(prefix="pbsd-slurm-", dir="/var/tmp"))
        self.shared = self.folder / "shared"
        self._munged: subprocess.Popen | None = None
        self._inits: dict[str, subprocess.Popen] = {}
        self._first: dict[str, int] = {}

    def __enter__(self) -> MiniCluster:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    def up(self) -> None:
        self._write_configuration()
        self._start_munge()
        self._start(CONTROLLER)
        self.sh(CONTROLLER, f"ip link add br0 type bridge; ip addr add {NETWORK}.1/24 dev br0; ip link set br0 up; "
                            "slurmctld")
        for name in self.names:
            self.boot(name)
        self.until(lambda: self.idle() == set(self.names), 30, "all nodes are idle")

    def down(self) -> None:
        for name in list(self._inits):
            self._end(name)
        if self._munged is not None:
            self._munged.terminate()
            self._munged.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self, name: str) -> None:
        """A machine with empty /tmp joins the network, and slurmd starts on it."""
        self._start(name)
        number = self.names.index(name) + 1
        cable = f"v{number}"
        self._cables(f"ip link del {cable} 2>/dev/null; ip link add {cable} type veth peer name eth0 netns "
                     f"/proc/{self._first[name]}/ns/net && ip link set {cable} master br0 up")
        self.sh(name, f"ip addr add {NETWORK}.{10 + number}/24 dev eth0; ip link set eth0 up; "
                      f"ip route add default via {NETWORK}.1")
        self.start_slurmd(name)

    def crash(self, name: str) -> None:
        """Power loss: all processes of the machine and its network are gone at once."""
        self._end(name)

    def cut(self, name: str) -> None:
        """Its network cable is pulled."""
        self._cables(f"ip link set v{self.names.index(name) + 1} down")

    def heal(self, name: str) -> None:
        self._cables(f"ip link set v{self.names.index(name) + 1} up")

    def stop_slurmd(self, name: str) -> None:
        """slurmd alone dies; what it started goes on."""
        self.sh(name, f"kill -9 $(cat {self.folder}/slurmd-{name}.pid)")

    def start_slurmd(self, name: str) -> None:
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self.sh(name, "slurmd")

    def is_up(self, name: str) -> bool:
        return name in self._first

    def usable(self) -> set[str]:
        """Nodes that Slurm can give jobs, or has given some."""
        rows = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).stdout.splitlines()
        return {name for name, state in map(str.split, rows) if state in ("idle", "allocated", "mixed")}

    def idle(self) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-p", "main", "-o", "%N", check=False).stdout.split())

    def sh(self, name: str, script: str) -> str:
        return self.run("sh", "-c", script, on=name).stdout

    def run(self, *command: str, on: str = CONTROLLER, check: bool = True, timeout_s: float = 120,
            **options: object) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine. RuntimeError with what it said when it fails and `check`."""
        done = subprocess.run(self.entering(on) + list(command), capture_output=True, text=True,
                              env=self.environment(), timeout=timeout_s, stdin=subprocess.DEVNULL, **options)
        if check and done.returncode:
            raise RuntimeError(f"{on}: {' '.join(command)} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def entering(self, name: str) -> list[str]:
        """What to put before a command for it to run on the machine."""
        return ["nsenter", "-t", str(self._first[name]), "-n", "-u", "-m", "-p", f"--wd={os.getcwd()}"]

    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def until(self, holds: Callable[[], bool], seconds: float, what: str) -> float:
        """Seconds until `holds()`. AssertionError, with the end of the controller's log, after `seconds`."""
        began = time.monotonic()
        while not holds():
            if time.monotonic() - began > seconds:
                log = (self.folder / "log" / "slurmctld.log").read_text().splitlines()[-15:]
                raise AssertionError(f"{seconds:g} s passed before {what}; the controller's log:\n" + "\n".join(log))
            time.sleep(0.1)
        return time.monotonic() - began

    def _write_configuration(self) -> None:
        for name in ("controller", "log", "munge", "machines", "devices", "shared"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        for number in range(GPUS):
            # Slurm counts the devices that exist; these are all /dev/null.
            os.mknod(self.folder / "devices" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"Name=gpu Type=h100 File={self.folder}/devices/gpu[0-{GPUS - 1}]\n")
        hosts = ["127.0.0.1 localhost", f"{NETWORK}.1 {CONTROLLER}"]
        hosts += [f"{NETWORK}.{10 + i} {name}" for i, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "resolv.conf").touch()
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(
            controller=CONTROLLER, folder=self.folder, slurmd_timeout=SLURMD_TIMEOUT_S, grace=GRACE_S, gpus=GPUS,
            names=f"node[1-{len(self.names)}]"))

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{kind}-file={munge / kind}" for kind in ("key", "pid", "seed", "log")]
        self._munged = subprocess.Popen([*WITH_US, "munged", "--foreground", f"--socket={munge / 'socket'}", *files],
                                        stderr=subprocess.DEVNULL)
        self._wait_for(munge / "socket", self._munged)

    def _start(self, name: str) -> None:
        spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        ready = self.folder / "machines" / f"{name}.ready"
        with (self.folder / "log" / f"init-{name}.log").open("w") as log:
            init = subprocess.Popen([*WITH_US, "unshare", *spaces, "bash", "-c", INIT, "init", name, str(self.folder)],
                                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._inits[name] = init
        self._wait_for(ready, init)
        ready.unlink()
        self._first[name] = int(Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()[0])

    def _end(self, name: str) -> None:
        init = self._inits.pop(name)
        try:
            os.kill(self._first.pop(name), signal.SIGKILL)
        except (ProcessLookupError, KeyError):
            init.kill()
        init.wait()

    def _cables(self, script: str) -> None:
        """In the controller's network, but among all processes."""
        subprocess.run(["nsenter", "-t", str(self._first[CONTROLLER]), "-n", "sh", "-c", script], check=True)

    def _wait_for(self, path: Path, process: subprocess.Popen) -> None:
        end = time.monotonic() + 20
        while not path.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{process.args[0]} ended with {process.poll()} or was not up in time: see "
                                   f"{self.folder}/log")
            time.sleep(0.02)
