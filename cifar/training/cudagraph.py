"""Steps captured as CUDA graphs: no Python, no kernel launches and no allocations between one step and the next.

`StepRunner` takes the steps of one trial, or of a pack: several trials side by side. On a GPU a pack is one graph with a
branch for each trial. Their kernels, each too small to fill a GPU, then run at the same time. On a CPU the trials take turns.
Either way a trial computes what it would compute alone. (On a GPU one generator serves a whole graph. So trials that draw
random numbers in their forward pass, as dropout does, are not packed: cifar/agent/packing.py.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

NUM_WARMUP_STEPS = 3  # before a capture: libraries choose their kernels, compilers compile, buffers are allocated


class GraphableTrial(Protocol):
    """A trial whose step can be captured: its tensors stay at the same addresses, and its state can be restored."""

    device: torch.device
    step_index: Tensor  # (1,): the step of the epoch that comes next
    rng_state: Tensor | None  # this trial's state of torch's generator; None: the trial has the generator to itself
    has_ended: bool  # a captured pack goes on stepping it
    is_compiled: bool

    @property
    def has_freezing_params(self) -> bool: ...  # some parameters stop learning before the end of the training
    @property
    def params_frozen(self) -> bool: ...  # these parameters have all stopped before the coming step
    def step(self, with_probes: bool, skip_frozen: bool) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def clear_gradients(self) -> None: ...


T = TypeVar("T", bound=GraphableTrial)


class StepRunner(Generic[T]):
    """Takes the next step of every trial, as a CUDA graph where possible.

    There are up to three graphs, by (with_probes, skip_frozen): a plain step, one with probes, and one without the gradients
    of frozen parameters. A step with probes skips none, so that the probes see every gradient.
    """

    def __init__(
        self, trials: Sequence[T], *, capture: bool = True, agree_on_error: Callable[[str], str] = lambda error: error
    ) -> None:
        """`agree_on_error`: this process's error in a capture, or "" -> that of any process which trains the same network."""
        self.agree_on_error = agree_on_error
        self.trials, self.device = list(trials), trials[0].device
        self.wants_graphs = capture and self.device.type == "cuda"
        self.graphs: dict[tuple[bool, bool], torch.cuda.CUDAGraph] = {}  # by (with_probes, skip_frozen)
        self.capture_error = ""  # why these steps cannot be captured, if so
        self.compile_decided = False  # whether it has been decided if compiling these steps pays off
        self.captures_frozen_step = False  # whether to make the step with skip_frozen, too
        self._streams = [_new_stream(self.device) for _ in trials] if self.wants_graphs and len(trials) > 1 else []

    def ensure_captured(self) -> None:
        """Capture the steps, if that is wanted and has not been done. Takes a few steps, and restores the state before."""
        if self.wants_graphs and not self.graphs and not self.capture_error:
            self._capture_graphs()

    def discard_graphs(self) -> None:
        """The steps have changed: `ensure_captured` captures them again."""
        self.graphs, self.capture_error = {}, ""

    def measure_step_seconds(self, num_steps: int = 20) -> float:
        """Seconds of a captured step, 0.0 if steps are not captured. Restores the state before."""
        self.ensure_captured()
        if not self.graphs:
            return 0.0
        before = [copy.deepcopy(trial.state_dict()) for trial in self.trials]
        start, end = new_timing_event(), new_timing_event()
        start.record()
        for _ in range(num_steps):
            for trial in self.trials:
                trial.step_index.zero_()
            self.graphs[False, False].replay()
        end.record()
        end.synchronize()
        for trial, state in zip(self.trials, before, strict=True):
            trial.load_state_dict(state)
        return float(start.elapsed_time(end)) / 1000 / num_steps

    def __call__(self, with_probes: bool) -> None:
        """Take one step of each trial."""
        if self.graphs:
            live = [trial for trial in self.trials if not trial.has_ended]
            all_frozen = all(trial.params_frozen or not trial.has_freezing_params for trial in live)
            skip_frozen = not with_probes and (False, True) in self.graphs and all_frozen
            self.graphs[with_probes, skip_frozen].replay()
        else:
            self._step_in_turn(with_probes)

    def _step_in_turn(self, with_probes: bool) -> None:
        for trial in self.trials:
            if trial.has_ended:
                continue
            can_skip = self.captures_frozen_step or not trial.is_compiled  # otherwise it would be compiled once more
            skip_frozen = not with_probes and trial.params_frozen and can_skip
            if trial.rng_state is None:
                trial.step(with_probes, skip_frozen)
            else:  # dropout then draws what it would draw if the trial were alone
                torch.set_rng_state(trial.rng_state)
                trial.step(with_probes, skip_frozen)
                trial.rng_state = torch.get_rng_state()

    def _step_concurrently(self, with_probes: bool, skip_frozen: bool) -> None:
        """Step each trial on a stream of its own. The current stream waits for all of them."""
        if not self._streams:
            return self.trials[0].step(with_probes, skip_frozen)
        current = torch.cuda.current_stream(self.device)
        for trial, stream in zip(self.trials, self._streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                trial.step(with_probes, skip_frozen)
        for stream in self._streams:
            current.wait_stream(stream)

    def _capture_graphs(self) -> None:
        before = [copy.deepcopy(trial.state_dict()) for trial in self.trials]
        stream, pool = _new_stream(self.device), torch.cuda.graph_pool_handle()
        kinds = [(False, False), (True, False)]
        if self.captures_frozen_step and any(trial.has_freezing_params for trial in self.trials):
            kinds.append((False, True))
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                for kind in kinds * NUM_WARMUP_STEPS:
                    for trial in self.trials:
                        trial.step_index.zero_()
                    self._step_concurrently(*kind)
            torch.cuda.synchronize(self.device)
            for kind in kinds:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=_capture_error_mode()):
                    self._step_concurrently(*kind)
                self.graphs[kind] = graph
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.capture_error = str(error).splitlines()[0]
            _repair_generator(self.device)
        if error_of_any := self.agree_on_error(self.capture_error):
            self.graphs, self.capture_error = {}, error_of_any
            for trial in self.trials:
                trial.clear_gradients()
        for trial, state in zip(self.trials, before, strict=True):
            trial.load_state_dict(state)


def _capture_error_mode() -> str:
    """What other threads may do during a capture. NCCL's ask all the time how far its work is, which "global" forbids."""
    return "thread_local" if torch.distributed.is_available() and torch.distributed.is_initialized() else "global"


def _repair_generator(device: torch.device) -> None:
    """After a capture that failed: random numbers can be drawn again.

    torch's generator of the device is left in the state of a capture (torch 2.11), and refuses all that is drawn after it, in
    the next trials of this process too. A copy of its state, with the same seed and offset, is not in a capture.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    generator.graphsafe_set_state(generator.clone_state())


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def new_timing_event() -> torch.cuda.Event:
    """An event in a device's queue, for measuring the time between two of them."""
    return torch.cuda.Event(enable_timing=True)


class GraphedCallable:
    """A function without arguments that is called many times. On a GPU it is captured at the second call, then replayed.

    The results are in the same tensors each time. A function that cannot be captured is called as it is.
    `compiled_function`: the same function compiled; it is captured in the function's place.
    """

    def __init__(
        self, function: Callable[[], Any], device: torch.device, compiled_function: Callable[[], Any] | None = None
    ) -> None:
        self.function, self.device, self.num_calls = function, device, 0
        self.compiled_function = compiled_function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capture_failed = False
        self.result: Any = None

    def __call__(self) -> Any:
        self.num_calls += 1
        if self.device.type != "cuda" or self.num_calls == 1 or self.capture_failed:
            return self.function()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            function = self.compiled_function or self.function
            try:
                if self.compiled_function:
                    self.compiled_function()  # compiles
                with torch.cuda.graph(graph, capture_error_mode=_capture_error_mode()):
                    self.result = function()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                self.capture_failed = True
                _repair_generator(self.device)
                return self.function()
            self.graph = graph
        self.graph.replay()
        return self.result
