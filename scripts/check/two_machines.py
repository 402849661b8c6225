"""Two machines on one: trains over ssh between two network namespaces, kills one of them in the middle, brings it back and goes on.

    python -m scripts.check.two_machines data=runs/data/demo out=docs/results/two_machines/cpu.json          (root; sshd, ssh, pdsh and ip installed)
    python -m scripts.check.two_machines data=DIR slots=2 steps=30 work=/tmp/two

Each machine has a network interface, an sshd and process ids of its own; they are joined by one cable (10.77.0.1 - 10.77.0.2) and reach nothing
else. The job is started on the first by scripts/train_multinode.sh, so by the deepspeed launcher, which reaches both by ssh with a key made
here. Compared are the losses with those of one uninterrupted process. Exit status 77 and a sentence where this machine cannot do it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training.config.arguments import parse_arguments, program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CANNOT = 77
ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}
NAMES = {"a": "node-a", "b": "node-b"}
SMALL = ["experiment=smoke", "train.device=cpu", "eval=end", "eval.tokens=256"]


def why_not() -> str:
    """Why two machines cannot be simulated here, in one sentence, or ''."""
    missing = [tool for tool in ("ip", "unshare", "ssh", "ssh-keygen", "pdsh") if shutil.which(tool) is None]
    if shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        missing.append("sshd")
    if missing:
        return f"Two machines need {', '.join(missing)}, not installed here (packages openssh-server, openssh-client, pdsh, iproute2)."
    if os.geteuid() != 0:
        return "Two machines are made of network namespaces, which needs root."
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False).returncode:
        return "This kernel or container allows no network and process namespaces."
    return ""


class Machine:
    """A network namespace; `up` starts its sshd as process 1 of its own, with which all of the machine's processes end."""

    def __init__(self, which: str, folder: Path) -> None:
        self.address, self.name = ADDRESS[which], NAMES[which]
        self.space = f"everywhen-{os.getpid()}-{which}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        run("ip", "netns", "add", self.space)

    def connect(self) -> None:
        run("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        run("ip", "-n", self.space, "link", "set", "eth0", "up")
        run("ip", "-n", self.space, "link", "set", "lo", "up")

    def up(self) -> None:
        settings = self.folder / f"sshd-{self.name}"
        settings.write_text(
            f"Port 22\nListenAddress {self.address}\nHostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/key.pub\nPidFile none\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nStrictModes no\nLogLevel ERROR\n"
        )
        settings.chmod(0o600)
        sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        command = f"mount -t tmpfs none /run && mkdir /run/sshd && exec {sshd} -D -e -f {settings}"
        inside = ["ip", "netns", "exec", self.space, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", command]
        log = (self.folder / f"sshd-{self.name}.log").open("ab")
        self.process = subprocess.Popen(inside, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def kill(self) -> None:
        """Every process of the machine ends at once, as without power."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def remove(self) -> None:
        self.kill()
        subprocess.run(["ip", "netns", "del", self.space], capture_output=True, check=False)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class Pair:
    """Two machines with a cable between them, and what ssh needs to go from the first to both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: dict[str, Machine] = {}
        try:
            self._build()
        except RuntimeError:
            self.remove()
            raise

    def _build(self) -> None:
        folder = self.folder
        for key in ("key", "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        for which in ADDRESS:
            self.machines[which] = Machine(which, folder)
        a, b = self.machines.values()
        run("ip", "link", "add", "eth0", "netns", a.space, "type", "veth", "peer", "name", "eth0", "netns", b.space)
        hosts = "".join(f"Host {m.name}\n  HostName {m.address}\n" for m in self.machines.values())
        options = "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\nBatchMode yes\nServerAliveInterval 2\nServerAliveCountMax 3\n"
        (folder / "ssh_config").write_text(f"{hosts}Host *\n  IdentityFile {folder}/key\n{options}")
        (folder / "bin").mkdir()
        shim = folder / "bin" / "ssh"  # the launcher and pdsh call `ssh`: they find this one, with the machines' addresses and key
        shim.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        shim.chmod(0o755)
        for machine in self.machines.values():
            machine.connect()
            machine.up()

    def wait(self) -> None:
        """Until both machines answer from the first. Raises RuntimeError after ten seconds."""
        end = time.monotonic() + 10
        for machine in self.machines.values():
            while subprocess.run(
                self.on_first([str(self.folder / "bin" / "ssh"), machine.name, "true"]), capture_output=True, check=False
            ).returncode:
                if time.monotonic() > end:
                    log = (self.folder / f"sshd-{machine.name}.log").read_text()
                    raise RuntimeError(f"{machine.name} does not answer by ssh: {log[-500:]}")
                time.sleep(0.2)

    def on_first(self, command: list[str]) -> list[str]:
        """`command` as it is run on the first machine (in processes of its own, which a launcher that ends may kill by name)."""
        space = self.machines["a"].space
        return ["ip", "netns", "exec", space, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]

    def launch(self, slots: int, overrides: list[str], log: Path) -> subprocess.Popen[bytes]:
        """scripts/train_multinode.sh on the first machine, in ssh mode."""
        hosts = self.folder / "hosts"
        hosts.write_text("".join(f"{m.name} slots={slots}\n" for m in self.machines.values()))
        exports = self.folder / "exports"
        exports.write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nWANDB_MODE=disabled\nHF_HUB_OFFLINE=1\nCUDA_VISIBLE_DEVICES=\n")
        env = {k: v for k, v in os.environ.items() if k not in ("NODE_RANK", "MASTER_ADDR", "LAUNCHER", "RESTARTS", "RANK", "WORLD_SIZE")}
        env |= {
            "PATH": f"{self.folder}/bin:{env['PATH']}",
            "DS_ENV_FILE": str(exports),
            "PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = self.on_first([str(ROOT / "scripts" / "train_multinode.sh"), str(hosts), *overrides])
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True)

    def remove(self) -> None:
        for machine in self.machines.values():
            machine.remove()


def losses(run_dir: Path) -> dict[int, float]:
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def drill(pair: Pair, work: Path, data: str, slots: int, steps: int) -> dict[str, Any]:
    """Trains, kills the second machine, brings it back, goes on. Raises RuntimeError where anything is not as it has to be."""
    common = [*SMALL, f"data.path={data}", f"train.steps={steps}", "checkpoint.every=2", "deepspeed.timeout_minutes=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    alone = [sys.executable, "train.py", *common, "train.micro_batch=4", f"run_dir={work / 'one'}"]
    done = subprocess.run(alone, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the single process failed: {done.stderr[-1000:]}")
    words = [*common, f"train.micro_batch={4 // (2 * slots)}", f"run_dir={work / 'two'}"]
    pair.wait()
    first = pair.launch(slots, words, work / "first.log")
    while len(losses(work / "two")) < steps // 3:
        if first.poll() is not None:
            raise RuntimeError(f"the job ended early: {(work / 'first.log').read_text()[-2000:]}")
        time.sleep(0.05)
    killed = time.monotonic()
    pair.machines["b"].kill()
    try:
        status = first.wait(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(first.pid, signal.SIGKILL)
        raise RuntimeError("the job did not end when a machine died") from None
    noticed, reached = time.monotonic() - killed, max(losses(work / "two"))
    if status == 0 or reached >= steps:
        raise RuntimeError(f"the machine died too late: step {reached}, status {status}")
    pair.machines["b"].up()
    pair.wait()
    second = pair.launch(slots, words, work / "second.log")
    said = second.wait(timeout=400)
    text = (work / "second.log").read_text()
    if said or "resuming from" not in text:
        raise RuntimeError(f"the job did not go on: {text[-2000:]}")
    one, two = losses(work / "one"), losses(work / "two")
    worst = max(abs(one[s] / two[s] - 1) for s in one) if one.keys() == two.keys() else float("inf")
    return {
        "machines": 2, "ranks_per_machine": slots, "steps": steps, "killed_after_step": reached, "status_of_the_job_then": status,
        "seconds_until_it_ended": round(noticed, 1), "largest_relative_difference_of_losses": worst,
    }  # fmt: skip


DEFAULTS: dict[str, Any] = {"data": "", "out": "", "slots": "1,2", "steps": 24, "work": ""}


def main(words: list[str]) -> int:
    options = parse_arguments(words, DEFAULTS)
    if not options["data"]:
        raise UserError("Give data=DIR, a folder of token shards (python -m data.prepare input=demo out=DIR).")
    reason = why_not()
    if reason:
        print(reason, file=sys.stderr)
        return CANNOT
    work = Path(options["work"] or tempfile.mkdtemp(prefix="two-machines-")).resolve()
    rows = []
    for slots in map(int, options["slots"].split(",")):
        folder = Path(tempfile.mkdtemp(prefix="machines-"))
        (work / f"slots-{slots}").mkdir(parents=True, exist_ok=True)
        pair = None
        try:
            pair = Pair(folder)
            rows.append(drill(pair, work / f"slots-{slots}", str(Path(options["data"]).resolve()), slots, options["steps"]))
            print(json.dumps(rows[-1]), flush=True)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            if pair is not None:
                pair.remove()
            shutil.rmtree(folder, ignore_errors=True)
    if options["out"]:
        Path(options["out"]).parent.mkdir(parents=True, exist_ok=True)
        Path(options["out"]).write_text(json.dumps({"command": "python -m scripts.check.two_machines", "rows": rows}, indent=1) + "\n")
    return 0 if all(row["largest_relative_difference_of_losses"] < 1e-5 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(program(__doc__, main, sys.argv[1:]))
