"""Fresh Python processes without the seconds that importing torch takes: children of a process that has imported it.

A child has its own environment, folder, arguments and output, as a new process has. Only torch and what belongs to it
are imported already. Libraries that read the environment when they are imported, such as huggingface_hub, are not.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = """
import json, os, signal, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor  # all that transformers imports of torch

def run(request):
    signal.alarm(request["timeout"])  # ends a child that hangs
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
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
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.stdout.write(f"{status}\\n")
    sys.stdout.flush()
"""
MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
"""Code for `run_python` that runs the module in its first argument, as `python -m` does."""
TIMEOUT = 300  # seconds
_server: subprocess.Popen | None = None


def run_python(
    code: str, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess:
    """Runs `python -c code arguments...` and returns its exit code and output, as `subprocess.run` does.

    Raises:
        TimeoutError: If it has not ended after `TIMEOUT` seconds.
    """
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_server.kill)
    assert _server.stdin is not None and _server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
        request = {"code": code, "arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
        request |= {"timeout": TIMEOUT, **outputs}
        _server.stdin.write(json.dumps(request) + "\n")
        _server.stdin.flush()
        returncode = int(_server.stdout.readline())
        texts = [Path(path).read_text(encoding="utf-8", errors="replace") for path in outputs.values()]
    if returncode == -signal.SIGALRM:
        raise TimeoutError(f"python -c {code[:80]!r} did not end within {TIMEOUT} s: {texts[1][-2000:]}")
    return subprocess.CompletedProcess([sys.executable, "-c", code, *arguments], returncode, *texts)
