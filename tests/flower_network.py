"""A SuperLink with TLS and SuperNodes with keys, as processes of this machine on loopback addresses."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "flower"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


def missing():
    """What this machine lacks."""
    programs = ("openssl", "ssh-keygen")
    absent = [name for name in programs if shutil.which(name) is None]
    return absent + ([] if Path(sys.executable).with_name("flower-superlink").exists() else ["fedlscl[flower]"])


class Network:
    """Starts and kills the processes of a trial; every file is under ``folder``."""

    def __init__(self, folder, num_nodes):
        self.folder, self.num_nodes, self.processes = folder, num_nodes, {}
        self.ports = free_ports(1 + num_nodes + 8)
        self.keys = folder / "keys"
        if not self.keys.exists():
            subprocess.run([str(EXAMPLE / "certificates.sh"), str(self.keys), str(num_nodes)], check=True)
        home = folder / "home"
        home.mkdir(exist_ok=True)
        trial = f'address = "127.0.0.1:{self.ports[0]}"\nroot-certificates = "{self.keys / "ca.crt"}"\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "trial"\n[superlink.trial]\n{trial}')

    def start_link(self):
        """The SuperLink; returns when it listens."""
        keys = self.keys
        tls = ["--ssl-certfile", keys / "server.crt", "--ssl-keyfile", keys / "server.key"]
        auth = ["--ssl-ca-certfile", keys / "ca.crt", "--enable-supernode-auth"]
        place = ["--host", "127.0.0.1", "--port", self.ports[0], "--database", self.folder / "link.db"]
        self._start("link", "flower-superlink", *tls, *auth, *place, "--disable-runtime-dependency-installation")
        wait_for_port(self.ports[0])

    def register(self, node):
        """Tell the SuperLink the node's public key."""
        return self.call("flwr", "supernode", "register", self.keys / f"node{node}.pub", "trial")

    def start_node(self, node, *, key=None, ca=None, insecure=False, name=None, port=None):
        """A SuperNode for client ``node``; by default as it should be."""
        name = name or f"node{node}"
        config = f'partition-id={node} state-dir="{self.folder / name}"'
        trust = ["--insecure"] if insecure else ["--root-certificates", ca or self.keys / "ca.crt"]
        key = self.keys / f"node{node}" if key is None else key
        auth = ["--auth-supernode-private-key", key] if key else []
        place = ["--superlink", f"127.0.0.1:{self.ports[0]}", "--port", port or self.ports[1 + node]]
        return self._start(name, "flower-supernode", *trust, *auth, *place, "--node-config", config)

    def run(self, app, **config):
        """Submit the app and return the process that shows its log until it ends."""
        given = " ".join(f'{name}="{v}"' if isinstance(v, str | Path) else f"{name}={v}" for name, v in config.items())
        return self._start("run", "flwr", "run", app, "trial", "--stream", *(["--run-config", given] if given else []))

    def call(self, program, *arguments):
        """Run a command to its end; returns its output."""
        command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
        done = subprocess.run(command, env=self._env("home"), capture_output=True, text=True, timeout=120)
        return done.stdout + done.stderr

    def log(self, name):
        """What a process has written so far."""
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name):
        """SIGKILL for a process and all that it started."""
        process = self.processes.pop(name)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    def close(self):
        """End everything."""
        for name in list(self.processes):
            self.kill(name)

    def _start(self, name, program, *arguments):
        command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command,
                env=self._env(name if name.startswith("node") else "home"),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
        self.processes[name] = process
        return process

    def _env(self, home):
        (self.folder / home).mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str(self.folder / home)}


def end_with_parent():
    """Let the kernel kill this process when the one that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_ports(number):
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_port(port, seconds=60):
    """Return when somebody listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens on port {port}")
