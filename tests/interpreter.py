"""Fresh Python processes without the seconds that imports take: children of a process that has imported libraries.

A child has its own environment, folder, arguments and output, as a new process has. torch and, unless a caller wants
torch alone, the libraries that `vlv` imports are imported already, with the child's variables of `READ_AT_IMPORT`.
`vlv` is not imported.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

READ_AT_IMPORT = re.compile(r"(HF|HUGGINGFACE|TRANSFORMERS|DIFFUSERS|DATASETS|ACCELERATE|USE|XDG)_(?!TOKEN$)|HOME$")
"""Names of the variables that libraries read when they are imported. Each combination of values has a server."""
# The first process imports torch alone. It forks the servers, which import the other libraries.
SERVER = """
import gc, importlib, json, os, signal, sys, traceback
gc.disable()  # until `serve`: imports leave many objects and little garbage
from contextlib import suppress
WITHOUT_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # a process that has started CUDA cannot fork one that uses it
os.environ.update(WITHOUT_CUDA)
import torch, torch._dynamo, torch.distributed.tensor  # all that transformers imports of torch

servers = {}  # of each combination of variables: a pipe to it, and a pipe from it
parents = {}  # of each running child: the pipes of the server that has started it, or None

def import_libraries():
    gc.disable()
    shown = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print when they are imported
    try:
        import_each()
    finally:
        os.dup2(shown, 2)
        os.close(shown)

def import_each():
    for name in ("datasets", "peft"):
        with suppress(ImportError):  # they are extras
            importlib.import_module(name)
    import transformers.modeling_utils, transformers.trainer
    from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
    from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPTextModel, HfArgumentParser, pipeline
    from transformers import Florence2ForConditionalGeneration, Qwen2ForCausalLM, T5EncoderModel

def start_server(environment):
    from_parent, to_server = os.pipe()
    from_server, to_parent = os.pipe()
    if not os.fork():
        for files in servers.values():
            for file in files:
                file.close()
        os.close(to_server)
        os.close(from_server)
        servers.clear()
        parents.clear()
        os.environ.clear()
        os.environ.update(environment | WITHOUT_CUDA)
        import_libraries()
        serve(os.fdopen(from_parent), os.fdopen(to_parent, "w"))
        os._exit(0)
    os.close(from_parent)
    os.close(to_parent)
    return os.fdopen(to_server, "w"), os.fdopen(from_server)

def serve(requests, answers):
    gc.collect()
    gc.freeze()  # a child does not visit the many objects of the libraries again and again
    gc.enable()
    for line in requests:
        request = json.loads(line)
        key = request.pop("key", None)
        if key is not None and key not in servers:
            servers[key] = start_server(request["env"])
        server = servers[key] if key is not None else parents.get(request.get("pid"))
        if server is not None:
            server[0].write(json.dumps(request) + "\\n")
            server[0].flush()
            answer = json.loads(server[1].readline())
        elif "code" in request:
            answer = os.fork()
            if not answer:
                run(request)
        else:
            answer = os.waitid(os.P_PID, request["pid"], os.WEXITED | request["options"])
            answer = answer and (answer.si_status if answer.si_code == os.CLD_EXITED else -answer.si_status)
        if "code" in request:
            parents[answer] = server
        answers.write(json.dumps(answer) + "\\n")
        answers.flush()

def run(request):
    os.setsid()
    signal.alarm(request["timeout"])  # ends a child that hangs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = ["-c", *request["arguments"]]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(request["code"], "<string>", "exec"), main.__dict__)
        code = 0
    except SystemExit as ending:
        if not isinstance(ending.code, int | None):
            print(ending.code, file=sys.stderr)
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    import atexit
    import threading
    threading._shutdown()  # waits for threads, as the end of a process does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

serve(sys.stdin, sys.stdout)
"""
MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
"""Code for `run_python` that runs the module in its first argument, as `python -m` does."""
TIMEOUT = 300  # seconds
_server: subprocess.Popen | None = None


class PythonProcess:
    """A running `python -c code arguments...` in a session of its own.

    Args:
        code, arguments: As on the command line. `MODULE` as code runs a module.
        cwd, env: Working folder and environment.
        stdout, stderr: Files, or a terminal's device, that its output is appended to.
        with_libraries: False if it imports all libraries but torch itself, with the warnings that they print then.
    """

    def __init__(
        self,
        code: str,
        arguments: Sequence[str],
        *,
        stdout: str | Path,
        stderr: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        with_libraries: bool = True,
    ):
        self.code, self.stderr = code, stderr
        self.returncode: int | None = None
        request = {"code": code, "arguments": list(arguments), "stdout": str(stdout), "stderr": str(stderr)}
        environment = dict(os.environ if env is None else env)
        request |= {"cwd": str(cwd or Path.cwd()), "env": environment}
        if with_libraries:
            request["key"] = json.dumps(sorted(item for item in environment.items() if READ_AT_IMPORT.match(item[0])))
        self.pid = _ask(request | {"timeout": TIMEOUT})

    def poll(self) -> int | None:
        """The exit code, negative after a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"pid": self.pid, "options": os.WNOHANG})
        return self.returncode

    def wait(self) -> int:
        """Waits for the exit code.

        Raises:
            TimeoutError: If the process has not ended `TIMEOUT` seconds after its start.
        """
        if self.returncode is None:
            self.returncode = _ask({"pid": self.pid, "options": 0})
        if self.returncode == -signal.SIGALRM:
            raise TimeoutError(f"python -c {self.code[:80]!r} did not end within {TIMEOUT} s; see {self.stderr}")
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kills it and the processes that it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def run_python(
    code: str, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], with_libraries: bool = True
) -> subprocess.CompletedProcess:
    """Runs `python -c code arguments...` and returns its exit code and output, as `subprocess.run` does.

    Raises:
        TimeoutError: If it has not ended after `TIMEOUT` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = PythonProcess(
            code, arguments, cwd=cwd, env=env, stdout=outputs[0], stderr=outputs[1], with_libraries=with_libraries
        )
        returncode = process.wait()
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in outputs]
    return subprocess.CompletedProcess([sys.executable, "-c", code, *arguments], returncode, *texts)


def _ask(request: dict) -> int | None:
    """Sends a request to the process that starts the others. It is started with the first request."""
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_server.kill)
    assert _server.stdin is not None and _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    answer = _server.stdout.readline()
    if not answer:
        raise RuntimeError("the process that starts the tests' processes has ended; the reason is in its stderr")
    return json.loads(answer)
