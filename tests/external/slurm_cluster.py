"""A SLURM of two nodes on this one machine, for tests: real daemons, a real queue, GPUs in name alone.

Job steps read the configuration from its default place, so this one lies in /etc/slurm while the cluster runs, and
goes when it ends. Where a configuration lies there that is not ours, there is no cluster (`missing` says so).
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from filelock import FileLock

ETC = Path("/etc/slurm")
MARK = "# Of a test of SALSA; it goes when the test ends.\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "setpriv")
NODES = ("n1", "n2")
LOCK = Path(tempfile.gettempdir()) / "salsa-slurm.lock"  # one cluster at a time
PATIENCE = 600  # seconds, of a machine that may have much else to do

CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=1,sched_min_interval=100000
GresTypes=gpu
ReturnToService=1
KillWait=30
MinJobAge=86400
{nodes}
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=120
PartitionName=gpu Nodes=n1,n2 MaxTime=INFINITE
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=500000 Gres=gpu:2"


def missing():
    """What keeps a cluster from being started here, or None."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm munge)"
    if os.geteuid():
        return "SLURM's daemons need root"
    if "SLURM_CONF" in os.environ:
        return f"SLURM_CONF names another SLURM: {os.environ['SLURM_CONF']}"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "no SLURM plugin of Snakemake: pip install 'salsa[slurm]'"
    theirs = [path for name in ("slurm.conf", "gres.conf") if (path := ETC / name).exists() and not ours(path)]
    return f"{theirs[0]} is not a test's" if theirs else None


def ours(path):
    return path.read_text(encoding="utf-8", errors="replace").startswith(MARK)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition, what, seconds=PATIENCE):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


def ask(*command, check=True):
    """The lines that a command of SLURM prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
    return done.stdout.splitlines()


class Cluster:
    """What a test asks of a running cluster."""

    def jobs(self, states="all"):
        """{"id", "state", "rule", "node", "gpus", "memory", "cpus", "partition"} of every job."""
        names = ("id", "state", "rule", "node", "memory", "cpus", "partition", "gpus")
        fields = "JobID:|,State:|,Comment:|,NodeList:|,MinMemory:|,NumCPUs:|,Partition:|,tres-per-job:"
        rows = [line.split("|") for line in ask("squeue", "--noheader", "--states", states, "--Format", fields)]
        found = [dict(zip(names, (value.strip() for value in row), strict=True)) for row in rows]
        for job in found:
            job["rule"] = job["rule"].removeprefix("rule_").split("_wildcards_")[0]
        return found

    def running(self, rule):
        """The running jobs of a rule or group."""
        return [job for job in self.jobs("running") if job["rule"] == rule]

    def submit(self, command, *options):
        """Queue a shell command; returns the job."""
        return {"id": ask("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={command}")[0]}

    def state(self, job):
        """What has become of a job, by now."""
        return next(found["state"] for found in self.jobs() if found["id"] == job["id"])

    def cancel(self, job, *options):
        ask("scancel", *options, job["id"])

    def node(self, name, state):
        """Set a node `down` or to `resume`."""
        ask("scontrol", "update", f"NodeName={name}", f"State={state}", "Reason=test")

    def idle(self):
        return sorted(line for line in ask("sinfo", "-N", "-h", "-p", "cpu", "-t", "idle", "-o", "%N", check=False))


@contextlib.contextmanager
def cluster(folder):
    """A running Cluster, its files in the new `folder`. Daemons, jobs and configuration go with it, come what may."""
    with FileLock(LOCK), contextlib.ExitStack() as stack:
        name = f"salsa{os.getpid()}"
        (folder / "state").mkdir(parents=True)
        stack.callback(lambda: [(ETC / name).unlink(missing_ok=True) for name in ("slurm.conf", "gres.conf")])
        configure(folder, name)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        stack.callback(end_jobs, name)
        own = {"key-file": key, **{f"{kind}-file": folder / f"munge.{kind}" for kind in ("pid", "log", "seed")}}
        files = [f"--{option}={path}" for option, path in own.items()]
        start(stack, folder, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_for((folder / "munge.socket").exists, "munged")
        start(stack, folder, "slurmctld", "-D")
        for node in NODES:
            start(stack, folder, "slurmd", "-D", "-N", node)
        found = Cluster()
        wait_for(lambda: found.idle() == sorted(NODES), "idle nodes")
        stack.callback(settle, found, name)
        yield found


def configure(folder, name):
    host = socket.gethostname().split(".")[0]
    ports = free_ports(1 + len(NODES))
    nodes = "\n".join(NODE.format(name=node, host=host, port=port) for node, port in zip(NODES, ports[1:], strict=True))
    text = CONFIGURATION.format(name=name, host=host, ports=ports, folder=folder, nodes=nodes)
    (ETC / "gres.conf").write_text(MARK + "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (ETC / "slurm.conf").write_text(MARK + text)


def start(stack, folder, *command):
    """Start a daemon that ends with this process at the latest, however that ends."""
    with open(folder / f"{command[0]}.out", "a") as out:
        process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=out, stderr=out)
    stack.callback(process.wait)
    stack.callback(process.kill)


def settle(found, name):
    """Empty the queue, so that no daemon of a job outlives the cluster."""
    ask("scancel", "--user=root", check=False)
    end_jobs(name)
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not found.jobs("running,pending,completing"), "an empty queue", 20)


def end_jobs(name):
    """Kill the processes of the cluster's jobs, known by their environment."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURM_CLUSTER_NAME={name}".encode() in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)
