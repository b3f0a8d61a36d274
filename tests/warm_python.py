"""Fresh Python processes without their seconds of imports: a server imports the libraries once, and forks for each.

As a script it is that server. It imports none of our code and no `diffusers.pipelines.auto_pipeline`, so a program
finds what it would find if it imported the libraries first. Tests whose subject is what is imported when start a
process from nothing.
"""

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

# What each run may change: no library reads these while it is imported, but for HF_HOME, which is a link to the run's.
OF_A_RUN = ("HF_HOME", "PYTEST_CURRENT_TEST", "ACCELERATE_", "DIFFUSERS_EXT_")
MOST_SERVERS = 3  # some 400 MB each


class WarmPython:
    """The servers of a test process, one for each environment that the libraries read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.servers: dict[str, tuple[subprocess.Popen, Path]] = {}  # environment -> server, its HF_HOME

    def run(
        self, *words: str, cwd: Path | str = ".", env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess:
        """What `python *words` prints and returns; `words` are `-c code`, `-m module ...` or `file ...`."""
        env = dict(os.environ if env is None else env)
        home = env.get("HF_HOME", str(self.folder / "home"))
        key = json.dumps(sorted(item for item in env.items() if not item[0].startswith(OF_A_RUN)))
        server, link = self.servers.get(key) or self.start(key, env)
        link.unlink(missing_ok=True)
        link.symlink_to(home)
        Path(home).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as printed:
            names = [str(Path(printed, name)) for name in ("stdout", "stderr")]
            job = {"words": words, "cwd": os.path.abspath(cwd), "env": {**env, "HF_HOME": str(link)}, "files": names}
            server.stdin.write(json.dumps(job).encode() + b"\n")
            server.stdin.flush()
            if not select.select([server.stdout], [], [], timeout)[0]:
                os.killpg(server.pid, signal.SIGKILL)
                del self.servers[key]
                raise subprocess.TimeoutExpired(words, timeout)
            status = int(server.stdout.readline())
            return subprocess.CompletedProcess(words, status, *(Path(name).read_text() for name in names))

    def start(self, key: str, env: dict[str, str]) -> tuple[subprocess.Popen, Path]:
        if len(self.servers) == MOST_SERVERS:
            self.stop(next(iter(self.servers)))
        link = Path(tempfile.mkdtemp(dir=self.folder)) / "home"
        server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**env, "HF_HOME": str(link)}, start_new_session=True,
        )  # fmt: skip
        self.servers[key] = server, link
        return server, link

    def stop(self, key: str) -> None:
        server, _ = self.servers.pop(key)
        server.stdin.close()
        server.wait(timeout=60)

    def close(self) -> None:
        for key in list(self.servers):
            self.stop(key)


def serve() -> None:
    """Forks for each line on stdin, and answers with the exit status of what ran."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torchvision  # noqa: F401
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DDPMScheduler,
        DiffusionPipeline,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
        training_utils,
    )
    from transformers import (  # noqa: F401
        BertModel,
        BertTokenizer,
        CLIPImageProcessor,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
        GPT2LMHeadModel,
        GPT2Tokenizer,
    )

    assert not {"diffusers_ext", "diffusers.pipelines.auto_pipeline"} & sys.modules.keys()
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os._exit(outcome(json.loads(line)))  # without taking the libraries apart, as multiprocessing ends a fork
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


def outcome(job: dict) -> int:
    """The exit status of a job's program."""
    status = 0
    try:
        become(job)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def become(job: dict) -> None:
    """Runs the program of a job as Python's own command line does."""
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for number, name in enumerate((os.devnull, *job["files"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    match job["words"]:
        case ["-c", code, *rest]:
            sys.path[0], sys.argv = "", ["-c", *rest]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), vars(main))
        case ["-m", module, *rest]:
            sys.path[0], sys.argv = os.getcwd(), [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [file, *_]:
            sys.path[0], sys.argv = os.path.dirname(os.path.abspath(file)), list(job["words"])
            runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    serve()
