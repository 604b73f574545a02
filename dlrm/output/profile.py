"""The profile of `--enable-profiling`: a few iterations after warm-up, operator by operator.

    dlrm_s_pytorch.json   a trace for ui.perfetto.dev or chrome://tracing, with the phases of each iteration in a row
    dlrm_s_pytorch.prof   one table by phase and one by operator

The laps of `StepClock` tell the profiler where each phase ends. While the profiler records, it puts a mark there that
has the name of the phase. A phase is thus what lies between the previous mark and its own.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from dlrm.devices.backend import Backend
from dlrm.errors import RunError
from dlrm.options import Options
from dlrm.output.observer import going_on_without
from dlrm.output.report import END
from dlrm.system.files import check_writable, written_whole

MAX_WARM_UP_ITERATIONS, MAX_RECORDED_ITERATIONS = 10, 5
MARK = "dlrm end of "
FLAG = "--enable-profiling"


class AbstractProfiler(AbstractContextManager):
    """Profiles the run in its `with` block. `StepClock` calls `lap`."""

    @abstractmethod
    def lap(self, phase: str) -> None:
        """Takes note that the phase of this name ends now."""


class NoProfiler(AbstractProfiler):
    """Profiles nothing."""

    def lap(self, phase: str) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


class Profiler(AbstractProfiler):
    """Records some whole iterations of a run, and writes the files when the run has ended without an error."""

    def __init__(self, options: Options, backend: Backend, iterations: int):
        """`iterations` is how many the run has if nothing ends it early. Raises UsageError if the files cannot be
        written."""
        self._num_recorded = min(MAX_RECORDED_ITERATIONS, iterations)
        self._num_warm_up = min(MAX_WARM_UP_ITERATIONS, iterations - self._num_recorded)
        self._trace_path = Path(options.output_folder, "dlrm_s_pytorch.json")
        self._tables_path = self._trace_path.with_suffix(".prof")
        for path in (self._trace_path, self._tables_path):
            check_writable(FLAG, path)
        self._backend = backend
        self._profile = profile(activities=recordable_activities(backend.device.type), acc_events=True)
        self._is_recording = False
        self._iterations_done = 0

    def lap(self, phase: str) -> None:
        if self._is_recording:
            with record_function(MARK + phase):
                pass
        self._iterations_done += phase == END
        recording_end = self._num_warm_up + self._num_recorded
        if self._is_recording and self._iterations_done == recording_end:
            self._stop()
        elif not self._is_recording and self._num_warm_up <= self._iterations_done < recording_end:
            self._start()

    def _start(self) -> None:
        self._backend.synchronize()
        self._profile.start()
        self._is_recording = True
        self.lap("profile")  # this mark is where the first recorded phase begins

    def _stop(self) -> None:
        self._backend.synchronize()
        self._is_recording = False
        self._profile.stop()

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_recording:
            self._stop()
        if error is None:
            with going_on_without(FLAG):
                self.write()

    def write(self) -> None:
        """Writes both files, and prints the table by phase. Raises RunError if a file cannot be written, or if the run
        ended before an iteration was recorded."""
        recorded = self._iterations_done - self._num_warm_up
        if recorded < 1:
            raise RunError(f"{FLAG}: the run ended in its {self._num_warm_up} iterations of warm-up")
        by_phase = phase_table(self._profile.events(), min(recorded, self._num_recorded))
        by_operator = self._profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        with written_whole(FLAG, self._tables_path) as temporary:
            temporary.write_text(f"{by_phase}\n\n{by_operator}\n")
        with written_whole(FLAG, self._trace_path) as temporary:
            self._profile.export_chrome_trace(str(temporary))
            trace = json.loads(temporary.read_text())
            trace["traceEvents"] = replace_marks_by_phases(trace["traceEvents"])
            temporary.write_text(json.dumps(trace))
        print(by_phase)
        print(f"  by operator in {self._tables_path}, a trace for ui.perfetto.dev in {self._trace_path}")


def recordable_activities(device_type: str) -> set[ProfilerActivity]:
    """Returns the host's activity, and the device's if this build of torch can record it."""
    on_device = getattr(ProfilerActivity, device_type.upper(), ProfilerActivity.CPU)
    return {ProfilerActivity.CPU, on_device} & supported_activities()


def phase_table(events: Iterable[torch.autograd.profiler_util.FunctionEvent], iterations: int) -> str:
    """Returns a table of phases: their mean times on host and device, and their slowest operators.

    `events` are those of so many `iterations`. An operator belongs to the phase in which it begins. Its time is its own
    on host and device, without the operators that it calls.
    """
    host_events = (event for event in events if event.device_type == DeviceType.CPU)
    host_us, device_us = Counter(), Counter()  # by phase
    operator_us = defaultdict(Counter)  # by phase, then by operator
    operators, phase_begin = [], None  # since the last mark
    for event in sorted(host_events, key=lambda event: event.time_range.start):
        if not event.name.startswith(MARK):
            operators.append(event)
            continue
        phase = event.name.removeprefix(MARK)
        if phase_begin is not None:
            host_us[phase] += event.time_range.start - phase_begin
            for operator in operators:
                device_us[phase] += operator.self_device_time_total
                own_us = operator.self_cpu_time_total + operator.self_device_time_total
                operator_us[phase][operator.name] += own_us
        operators, phase_begin = [], event.time_range.start
    to_ms_per_iteration = 1 / (1000 * iterations)  # from microseconds in all iterations
    lines = [
        f"Profile of {iterations} iterations, which take longer while they are profiled",
        f"  {'phase':<18}{'host ms/it':>11}{'device ms/it':>14}{'share':>8}  operators, ms/it",
    ]
    for phase, spent_us in host_us.items():
        slowest = operator_us[phase].most_common(3)
        slowest_text = ", ".join(f"{name} {own_us * to_ms_per_iteration:.3f}" for name, own_us in slowest)
        host_ms, device_ms = spent_us * to_ms_per_iteration, device_us[phase] * to_ms_per_iteration
        share = 100 * spent_us / host_us.total()
        lines.append(f"  {phase:<18}{host_ms:>11.3f}{device_ms:>14.3f}{share:>6.1f} %  {slowest_text}")
    return "\n".join(lines)


def replace_marks_by_phases(events: list[dict]) -> list[dict]:
    """Returns the events of a Chrome trace without marks, but with slices named by phase in a row of their own."""
    others, marks = [], []
    for event in events:
        is_mark = str(event.get("name", "")).startswith(MARK)
        (marks if is_mark else others).append(event)
    # torch writes a mark twice where a device records it as well; the one of the host says when the phase ended.
    marks = sorted((mark for mark in marks if mark.get("cat") == "user_annotation"), key=lambda mark: mark["ts"])
    row = {"pid": "DLRM", "tid": "phases", "ph": "X", "cat": "phase"}
    slices = [
        row | {"name": end["name"].removeprefix(MARK), "ts": begin["ts"], "dur": end["ts"] - begin["ts"]}
        for begin, end in pairwise(marks)
    ]
    return slices + others
