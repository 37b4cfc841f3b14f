# SPDX-License-Identifier: GPL-3.0-only
"""
Several processes that train one model (torchrun), and the signals that stop them.

    ranks = Processes()                             # one, or as many as torchrun has started
    ranks.join(device, "auto", timeout=600)         # meet the others
    [total] = ranks.all_reduce_sum([loss])          # collectives: every rank calls them, in the same order
    stop = StopSignal()
    stop.listen()                                   # from here on, Ctrl-C only sets stop.signal

With one process every collective returns its argument.
"""
import contextlib
import datetime
import os
import signal

import torch
import torch.distributed as dist

from runtime.console import UserError


class Processes:
    """The processes of one run, as torchrun numbers them: RANK of WORLD_SIZE in all, LOCAL_RANK of
    LOCAL_WORLD_SIZE on this machine."""

    def __init__(self):
        def number(name, default):
            return int(os.environ.get(name) or default)

        self.rank = number("RANK", 0)
        self.world = number("WORLD_SIZE", 1)
        self.local_rank = number("LOCAL_RANK", 0)
        self.local_world = number("LOCAL_WORLD_SIZE", self.world)
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if self.world > 1 and missing:
            raise UserError(f"WORLD_SIZE={self.world}, but {missing[0]} is not set",
                            f"unset WORLD_SIZE, or torchrun --nproc_per_node={self.world} train.py ...")

    def join(self, device, backend, timeout):
        """Meet the other ranks. timeout: seconds after which waiting for one, now or later, is an error."""
        if self.world == 1:
            return
        nccl = device.startswith("cuda") and backend != "gloo"
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        timeout = datetime.timedelta(seconds=timeout)
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"the processes cannot meet at {where}: {str(error).splitlines()[0]}",
                            "torchrun --standalone, or another MASTER_PORT") from None
        # After a restart (--max-restarts) the store still has the addresses of dead processes, and gloo would
        # wait for them. So each attempt gets keys of its own.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)

    def all_reduce_sum(self, values):
        """The sums of a list of numbers over all ranks, in float64."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all_reduce_max(self, value):
        """The largest of the ranks' whole numbers."""
        if self.world == 1:
            return value
        value = torch.tensor(value)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    def all_gather(self, value):
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The value of rank 0."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self):
        self.all_reduce_max(0)

    def check_same(self, facts):
        """Raises UserError where a rank has other facts {name: value} than rank 0."""
        everyone = self.all_gather(facts)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise UserError(f"process {rank} has {name}={theirs.get(name)}, process 0 has {value}",
                                    "all machines need the same command, data/ and out/")

    def wrap(self, model):
        """The model whose backward() averages the gradients over the ranks."""
        if self.world == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def no_sync(self, wrapped, unless):
        """The context of a micro-batch whose gradients are not sent yet: the last one sends the sum."""
        return contextlib.nullcontext() if self.world == 1 or unless else wrapped.no_sync()

    def lost(self, error):
        """Does this error mean that another rank has ended, or did not answer in time?"""
        words = "gloo", "Connection closed by peer", "Connection reset", "Timed out", "NCCL", "Broken pipe"
        known = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
        return self.world > 1 and known


# ---------- Being stopped


class Stopped(Exception):
    """A signal asked for the end."""


class StopSignal:
    """After `listen`, SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) only set `signal`.

    A second signal ends the process at once, but not under torchrun, which repeats a Ctrl-C of the terminal.
    """

    def __init__(self):
        self.signal = 0
        self.second_ends = "TORCHELASTIC_RUN_ID" not in os.environ

    def listen(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # (Windows has no SIGHUP; nohup ignores it)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        """It may interrupt a line being printed, so it prints nothing."""
        self.signal = number
        if self.second_ends:
            signal.signal(number, signal.SIG_DFL)
