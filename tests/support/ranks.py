"""Gloo processes that stay for a whole test module and run one function after another, all together."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import traceback
import warnings

TIMEOUT = 60.0


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _serve(rank, size, port, pipe):
    import torch

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*is deprecated")
    # As in pyproject.toml, of peft 0.18.
    warnings.filterwarnings("ignore", message="Could not find a config file in  -")
    # Of tensor-parallel logits, in the user's own forward.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun does; accelerate would choose, and warn
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    while True:
        function, arguments = pickle.loads(pipe.recv_bytes())
        try:
            answer = ("result", function(**arguments))
        except Exception as error:  # noqa: BLE001 - it is for the test to judge
            answer = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(answer))


class RankError(Exception):
    """What each rank raised, in `args`."""


class Ranks:
    """`size` processes in one process group."""

    def __init__(self, size):
        # Forked from one server that has imported all that is slow to import.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.parallel_runs"])
        port = _free_port()
        pipes = [context.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, **arguments):
        """Run a function on all ranks and return what each returned."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                self.stop()
                raise TimeoutError(f"Rank {rank} has not answered for {TIMEOUT} s; others: {answers}")
            try:
                answers.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                answers.append(("error", "died"))
        if any(kind == "error" for kind, _ in answers):
            raise RankError(*(value if kind == "error" else "no error" for kind, value in answers))
        return [value for _, value in answers]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()
