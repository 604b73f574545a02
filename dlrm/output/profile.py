"""`--enable-profiling`: some iterations after warm-up, operator by operator.

    dlrm_s_pytorch.json   a trace for ui.perfetto.dev or chrome://tracing, with the phases of each iteration in a row
    dlrm_s_pytorch.prof   tables by phase and by operator

The clock's laps say where a phase ends. While the profiler records, each leaves a mark; what lies between two marks is
the phase that the second one names.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from dlrm.options import Options
from dlrm.output.report import END
from dlrm.system.files import check_writable, written_whole

WARM_UP, RECORDED = 10, 5  # iterations, at most
MARK = "dlrm end of "
FLAG = "--enable-profiling"


class NoProfiler:
    """Where nobody wants a profile. `with` encloses the run, `lap` is what the clock calls."""

    def lap(self, phase: str) -> None:
        """The named phase ends here."""

    def __enter__(self) -> NoProfiler:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        pass


class Profiler(NoProfiler):
    """Records from the end of one iteration to that of another; writes its files when the run is over."""

    def __init__(self, options: Options, backend):
        iterations = options.nepochs * options.batches_per_epoch
        self._recorded = min(RECORDED, iterations)
        self._first = min(WARM_UP, iterations - self._recorded)
        self._trace = Path(options.output_folder, "dlrm_s_pytorch.json")
        self._tables = self._trace.with_suffix(".prof")
        for path in (self._trace, self._tables):
            check_writable(FLAG, path)
        self._backend = backend
        self._profile = profile(activities=activities(backend.device.type), acc_events=True)
        self._running = False
        self._done = 0  # iterations

    def lap(self, phase: str) -> None:
        if self._running:
            with record_function(MARK + phase):
                pass
        self._done += phase == END
        last = self._first + self._recorded
        if self._running and self._done == last:
            self._stop()
        elif not self._running and self._first <= self._done < last:
            self._start()

    def _start(self) -> None:
        self._backend.synchronize()
        self._profile.start()
        self._running = True
        self.lap("profile")

    def _stop(self) -> None:
        self._backend.synchronize()
        self._running = False
        self._profile.stop()

    def __exit__(self, kind, error, traceback) -> None:
        if self._running:
            self._stop()
        if error is None:
            self.write()

    def write(self) -> None:
        """RunError if the files can't be written."""
        by_phase = phase_table(self._profile.events(), self._recorded)
        by_operator = self._profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        with written_whole(FLAG, self._tables) as temporary:
            temporary.write_text(f"{by_phase}\n\n{by_operator}\n")
        with written_whole(FLAG, self._trace) as temporary:
            self._profile.export_chrome_trace(str(temporary))
            trace = json.loads(temporary.read_text())
            trace["traceEvents"] = with_phases(trace["traceEvents"])
            temporary.write_text(json.dumps(trace))
        print(by_phase)
        print(f"  by operator in {self._tables}, a trace for ui.perfetto.dev in {self._trace}")


def activities(device: str) -> set[ProfilerActivity]:
    """The host, and the device where torch can see into it."""
    on_device = getattr(ProfilerActivity, device.upper(), ProfilerActivity.CPU)
    return {ProfilerActivity.CPU, on_device} & supported_activities()


def phase_table(events: Iterable[torch.autograd.profiler_util.FunctionEvent], iterations: int) -> str:
    """Host time of each phase, and the operators that begin in it: their own time, on host and device."""
    on_host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda event: event.time_range.start)
    host, device = Counter(), Counter()
    operators = defaultdict(Counter)
    seen, begin = [], None
    for event in on_host:
        if not event.name.startswith(MARK):
            seen.append(event)
            continue
        phase = event.name.removeprefix(MARK)
        if begin is not None:
            host[phase] += event.time_range.start - begin
            for operator in seen:
                device[phase] += operator.self_device_time_total
                own = operator.self_cpu_time_total + operator.self_device_time_total
                operators[phase][operator.name] += own
        seen, begin = [], event.time_range.start
    to_ms = 1 / (1000 * iterations)
    lines = [
        f"Profile of {iterations} iterations, which take longer while they are profiled",
        f"  {'phase':<18}{'host ms/it':>11}{'device ms/it':>14}{'share':>8}  operators, ms/it",
    ]
    for phase, spent in host.items():
        top = ", ".join(f"{name} {own * to_ms:.3f}" for name, own in operators[phase].most_common(3))
        share = 100 * spent / host.total()
        lines.append(f"  {phase:<18}{spent * to_ms:>11.3f}{device[phase] * to_ms:>14.3f}{share:>6.1f} %  {top}")
    return "\n".join(lines)


def with_phases(events: list[dict]) -> list[dict]:
    """The events of a Chrome trace with slices named by phase, in a row of their own, in place of marks."""
    is_mark = [str(event.get("name", "")).startswith(MARK) for event in events]
    marks = [event for event, yes in zip(events, is_mark, strict=True) if yes and event.get("cat") == "user_annotation"]
    marks.sort(key=lambda event: event["ts"])
    row = {"pid": "DLRM", "tid": "phases", "ph": "X", "cat": "phase"}
    slices = [
        row | {"name": end["name"].removeprefix(MARK), "ts": begin["ts"], "dur": end["ts"] - begin["ts"]}
        for begin, end in pairwise(marks)
    ]
    return slices + [event for event, yes in zip(events, is_mark, strict=True) if not yes]
