"""Starts scripts in processes of their own, forked from one that has imported torch and the rest: seconds sooner."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
if sys.platform == "linux":  # elsewhere a fork after these imports may fail, so that each process imports them itself
    SERVER.set_forkserver_preload(["gymnasium", "torch._dynamo", "torch.utils.tensorboard", "tyro"])


def run(path: str, arguments: list[str], folder: str, environment: dict[str, str], output):
    """In the new process: `python path arguments` in `folder`, both outputs to the connection `output`."""
    os.setsid()  # a group with the processes that it starts
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    letters = environment.get("PYTHONIOENCODING")
    sys.stdout = open(1, "w", closefd=False, encoding=letters)  # both as of a pipe
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding=letters, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # the usual one
    sys.argv, sys.path[:0] = [path, *arguments], [str(Path(path).parent)]
    runpy.run_path(path, run_name="__main__")


class Started:
    """`python path arguments`, with the part of subprocess.Popen that the tests use; stdout has both outputs."""

    def __init__(self, path: Path, *arguments: str, cwd: Path | None = None, **environment: str):
        reader, writer = SERVER.Pipe(duplex=False)
        words = str(path), [str(x) for x in arguments], str(cwd or Path.cwd()), os.environ | environment
        self.process = SERVER.Process(target=run, args=(*words, writer))
        with contextlib.closing(writer):
            self.process.start()
        self.stdout = open(os.dup(reader.fileno()))
        reader.close()

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int):
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def communicate(self, timeout: float = 100) -> str:
        """Both outputs, at the end of the process; one that hangs is killed, with all that it has started."""
        timer = threading.Timer(timeout, os.killpg, (self.process.pid, signal.SIGKILL))
        timer.start()
        output = self.stdout.read()
        self.wait()
        timer.cancel()
        return output
