"""A real Slurm on this very machine: one node on loopback, from Debian's packages.

Slurm's own commands look for their configuration in /etc/slurm only once a job has
dropped the environment, so that is where it is written; a machine that has one already
belongs to somebody and is left alone. Everything is stopped and removed at the end.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
CONFIGURATION = Path("/etc/slurm/slurm.conf")
CGROUPS = Path("/etc/slurm/cgroup.conf")
SETTINGS = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
KillWait=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000000 State=UNKNOWN
PartitionName=all Nodes=n1 Default=YES MaxTime=INFINITE State=UP
"""


class NoCluster(Exception):
    """Slurm cannot be brought up here; the message says why."""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Slurm up and idle, for as long as the block lasts.

    Raises:
        NoCluster: it cannot be brought up on this machine.
    """
    install()
    if CONFIGURATION.exists():
        raise NoCluster(f"{CONFIGURATION} is somebody's; no second Slurm is brought up beside it")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    started: list[subprocess.Popen] = []
    try:
        _write_settings(folder)
        started.append(_munge(folder))
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"]):
            started.append(_daemon(command, folder))
        _wait_until_idle(folder)
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True, check=False)
        time.sleep(1)
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=60)
        for path in (CONFIGURATION, CGROUPS):
            path.unlink(missing_ok=True)


def install() -> None:
    """Make sure that Slurm's programs are there; root installs them where apt can.

    Raises:
        NoCluster: they are not and cannot be installed.
    """
    if os.getuid() != 0:
        raise NoCluster("only root can bring Slurm up")
    if not all(map(shutil.which, PROGRAMS)) and shutil.which("apt-get"):
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "-q", *command], env=quiet, capture_output=True, check=False)
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        raise NoCluster(f"{', '.join(missing)} not found, and apt-get cannot install them")


def _write_settings(folder: Path) -> None:
    CONFIGURATION.parent.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS.format(folder=folder, host=socket.gethostname())
    CONFIGURATION.write_text(settings, "utf-8")
    CGROUPS.write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n", "utf-8")


def _munge(folder: Path) -> subprocess.Popen:
    """The credentials' daemon, with the key the package made."""
    run = Path("/run/munge")
    run.mkdir(mode=0o755, exist_ok=True)
    for place in (run, Path("/var/log/munge"), Path("/var/lib/munge")):
        place.mkdir(exist_ok=True)
        shutil.chown(place, "munge", "munge")
    daemon = _daemon(["runuser", "-u", "munge", "--", "munged", "--foreground"], folder)
    _wait(lambda: (run / "munge.socket.2").exists(), "munged makes no socket", folder)
    return daemon


def _daemon(command: list[str], folder: Path) -> subprocess.Popen:
    with open(folder / f"{command[0]}.out", "ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)


def _wait_until_idle(folder: Path) -> None:
    def idle() -> bool:
        status = subprocess.run(
            ["sinfo", "--noheader", "--format", "%T"], capture_output=True, text=True, check=False
        )
        return status.stdout.strip() == "idle"

    _wait(idle, "the node does not become idle", folder)


def _wait(condition, trouble: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            logs = [path.read_text("utf-8", "replace")[-1000:] for path in folder.glob("*.log")]
            raise NoCluster(f"{trouble}: {' '.join(logs)}")
        time.sleep(0.5)
