"""Functions that run in several processes of a gloo group, without a launcher."""

import os
import subprocess
import sys
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
from filelock import FileLock
from torch import distributed

PROGRAM = "import sys; from tests.ranks import main; main(*sys.argv[1:])"


def once(tmp_path_factory, name, compute):
    """Let one of the workers that run tests compute what all of them need.

    Args:
        tmp_path_factory: The fixture.
        name: A name for it.
        compute: Computes it, given an empty folder.

    Returns:
        What was computed.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / f"{name}.lock"):
        result = folder / f"{name}.pt"
        if not result.exists():
            own = folder / name
            own.mkdir()
            torch.save(compute(own), result)
    return torch.load(result, weights_only=False)


def run(functions, size, folder, timeout=60.0):
    """Run functions of a test module, each by processes with a group of their own.

    Args:
        functions: The functions, of the rank and a folder.
        size: Number of processes.
        folder: An empty folder.
        timeout: The group's timeout in seconds.

    Returns:
        By the function's name, what each process returned, None if it was killed.
    """
    subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", PROGRAM),
            *(functions[0].__module__, str(folder), str(size), str(timeout)),
            *(function.__name__ for function in functions),
        ],
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "GLOO_SOCKET_IFNAME": "lo",
        },
        check=True,
    )
    return {
        function.__name__: [
            torch.load(path, weights_only=False) if path.exists() else None
            for path in (folder / f"{function.__name__}-{k}.pt" for k in range(size))
        ]
        for function in functions
    }


def main(module, folder, size, timeout, *names):
    """Fork the processes, which share the time that imports take."""
    own = import_module(module)
    for name in names:
        children = []
        for rank in range(int(size)):
            child = os.fork()
            if child == 0:
                _call(getattr(own, name), rank, int(size), Path(folder), float(timeout))
            children.append(child)
        for child in children:
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) or status == 0, (name, status)


def _call(function, rank, size, folder, timeout):
    """Run a function in this process, and end it."""
    status = 1
    try:
        torch.set_num_threads(1)
        name = function.__name__
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / name}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(rank, folder), folder / f"{name}-{rank}.pt")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
