"""Steps captured as CUDA graphs: no Python, no launches and no allocations between one step and the next.

`Steps` is one trial's step, or those of a pack: several trials side by side. On a GPU a pack is one graph with a branch for
each trial, so that their kernels, each too small to fill a GPU, run at the same time; on a CPU the trials take turns.
Either way a trial computes what it would compute alone. (On a GPU one generator serves a whole graph, so trials that draw
random numbers in their forward pass, by dropout, are not packed: cifar/packs.py.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

WARMUP = 3  # steps before a capture: libraries choose their kernels, compilers compile, buffers are made


class Trial(Protocol):
    """What is captured: a step on tensors that stay where they are, and the way back to the state before."""

    device: torch.device
    at: Tensor  # (1,): the step of the epoch that comes next
    random: Tensor | None  # the state of torch's generator for this trial; None: it has the process's to itself
    idle: bool  # it has ended; a graph steps it all the same
    compiled: bool

    @property
    def may_rest(self) -> bool: ...  # there are parameters that stop learning before its end
    @property
    def rests(self) -> bool: ...  # there are, and they have stopped before the coming step
    def step(self, look: bool, rest: bool) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
    def clear(self) -> None: ...


T = TypeVar("T", bound=Trial)


class Steps(Generic[T]):
    """The next step of every trial: bare, watched, or with what has stopped learning left out.

    These are (look, rest) of `Trial.step`. A watched step leaves nothing out, so that the probes see every gradient.
    """

    def __init__(self, trials: Sequence[T], *, capture: bool = True) -> None:
        self.trials, self.device = list(trials), trials[0].device
        self.wanted = capture and self.device.type == "cuda"
        self.graphs: dict[tuple[bool, bool], torch.cuda.CUDAGraph] = {}  # by (look, rest)
        self.refused = ""  # why these steps cannot be captured
        self.decided = False  # whether they are worth compiling
        self.leaves_out = False  # whether to make a step that leaves out what has stopped learning
        self._streams = [_stream(self.device) for _ in trials] if self.wanted and len(trials) > 1 else []

    def prepare(self) -> None:
        """Capture, where that is wanted and has not been done. Takes a few steps, and undoes them."""
        if self.wanted and not self.graphs and not self.refused:
            self._capture()

    def forget(self) -> None:
        """The steps are others now: capture them anew."""
        self.graphs, self.refused = {}, ""

    def measure(self, count: int = 20) -> float:
        """Seconds of a captured step; undone too. 0.0 where steps are not captured."""
        self.prepare()
        if not self.graphs:
            return 0.0
        before = [copy.deepcopy(trial.state()) for trial in self.trials]
        begun, ended = event(), event()
        begun.record()
        for _ in range(count):
            for trial in self.trials:
                trial.at.zero_()
            self.graphs[False, False].replay()
        ended.record()
        ended.synchronize()
        for trial, state in zip(self.trials, before, strict=True):
            trial.load(state)
        return float(begun.elapsed_time(ended)) / 1000 / count

    def __call__(self, look: bool) -> None:
        """One step of each trial; `look`: the watched one."""
        if self.graphs:
            resting = all(trial.rests or not trial.may_rest for trial in self.trials if not trial.idle)
            rest = not look and (False, True) in self.graphs and resting
            self.graphs[look, rest].replay()
        else:
            self._in_turn(look)

    def _in_turn(self, look: bool) -> None:
        for trial in self.trials:
            if trial.idle:
                continue
            rest = not look and trial.rests and (self.leaves_out or not trial.compiled)  # else it would be compiled anew
            if trial.random is None:
                trial.step(look, rest)
            else:  # dropout draws what it would draw if the trial were alone
                torch.set_rng_state(trial.random)
                trial.step(look, rest)
                trial.random = torch.get_rng_state()

    def _side_by_side(self, look: bool, rest: bool) -> None:
        """Each trial on a stream of its own, from here on and until all have ended."""
        if not self._streams:
            return self.trials[0].step(look, rest)
        here = torch.cuda.current_stream(self.device)
        for trial, stream in zip(self.trials, self._streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                trial.step(look, rest)
        for stream in self._streams:
            here.wait_stream(stream)

    def _capture(self) -> None:
        before = [copy.deepcopy(trial.state()) for trial in self.trials]
        stream, pool = _stream(self.device), torch.cuda.graph_pool_handle()
        kinds = [(False, False), (True, False)]
        if self.leaves_out and any(trial.may_rest for trial in self.trials):
            kinds.append((False, True))
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                for kind in kinds * WARMUP:
                    for trial in self.trials:
                        trial.at.zero_()
                    self._side_by_side(*kind)
            torch.cuda.synchronize(self.device)
            for kind in kinds:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self._side_by_side(*kind)
                self.graphs[kind] = graph
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.graphs, self.refused = {}, str(error).splitlines()[0]
            for trial in self.trials:
                trial.clear()
        for trial, state in zip(self.trials, before, strict=True):
            trial.load(state)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def event() -> torch.cuda.Event:
    """A moment in a device's queue that can be timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Captured:
    """A function of no arguments that is called again and again: run as it is at first, replayed as a CUDA graph after that,
    its results in the same tensors each time. What cannot be captured is run as it is for good.

    `better`: the same, compiled, which takes its place at the second call.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, better: Callable[[], Any] | None = None) -> None:
        self.function, self.device, self.calls = function, device, 0
        self.better = better
        self.graph: torch.cuda.CUDAGraph | None = None
        self.refused = False
        self.result: Any = None

    def __call__(self) -> Any:
        self.calls += 1
        if self.device.type != "cuda" or self.calls == 1 or self.refused:
            return self.function()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            function = self.better or self.function
            try:
                if self.better:
                    self.better()  # compiles
                with torch.cuda.graph(graph):
                    self.result = function()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                self.refused = True
                return self.function()
            self.graph = graph
        self.graph.replay()
        return self.result
