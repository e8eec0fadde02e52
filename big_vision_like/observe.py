"""What a run says: metrics to files, progress to people, and how it is stopped.

Nothing here may end a training that is going well: a logger that fails is
reported once and the steps go on.
"""

import collections
import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import jax
import numpy as np
import tqdm
from absl import logging

METRICS_FILE = "metrics.jsonl"
_Number = int | float | None


class Writer:
  """Writes metrics as JSON lines and for TensorBoard, on process 0 only.

  A line of `metrics.jsonl` is a flat dict: `step`, `time` (seconds since 1970)
  and one number per metric. JSON has no NaN and no infinity: they become null.
  A resumed run goes on in the same file, where it may repeat steps that were
  written but not checkpointed; `read_metrics` lets the last line win.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    self._sinks: dict[str, Any] = {}
    self._reported: set[str] = set()
    if jax.process_index() != 0:
      return
    for sink in (_JsonLines, _TensorBoard):
      with self._never_fatal(sink.__name__):
        self._sinks[sink.__name__] = sink(Path(folder))

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes scalars (Python, numpy or jax) of one step."""
    if jax.process_index() != 0:
      return
    # Outside the guard: to fetch a jax value may raise the error of the
    # computation behind it, which must not pass for a logger's.
    numbers = {key: _number(value) for key, value in metrics.items()}
    for name, sink in self._sinks.items():
      with self._never_fatal(name):
        sink.write(int(step), time.time(), numbers)

  def close(self) -> None:
    for name, sink in self._sinks.items():
      with self._never_fatal(name):
        sink.close()
    self._sinks = {}

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  @contextlib.contextmanager
  def _never_fatal(self, name: str) -> Iterator[None]:
    try:
      yield
    except Exception as e:
      if name not in self._reported:
        self._reported.add(name)
        logging.warning(
          "The metrics logger %s failed (%s: %s). Training goes on; further "
          "failures of it are not reported.",
          name.strip("_"),
          type(e).__name__,
          e,
        )


class _JsonLines:
  def __init__(self, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / METRICS_FILE
    # A killed run may have left half a line.
    text = self._path.read_bytes() if self._path.exists() else b""
    if text and not text.endswith(b"\n"):
      self._append("\n")

  def write(self, step: int, now: float, metrics: dict[str, _Number]) -> None:
    line = {"step": step, "time": round(now, 3), **metrics}
    self._append(json.dumps(line, allow_nan=False) + "\n")

  def close(self) -> None:
    pass

  def _append(self, text: str) -> None:
    # Opened for each line, so that a disk that was full may recover.
    with self._path.open("a") as f:
      f.write(text)


class _TensorBoard:
  """Event files, written by the caller's thread.

  tensorboardX's SummaryWriter writes from a thread; when that dies of a full
  disk, its queue fills up and the eleventh scalar blocks for ever (version
  2.6.5). We use the synchronous writer beneath it.
  """

  def __init__(self, folder: Path):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._event, self._scalar = event_pb2.Event, summary.scalar
    folder = folder / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = event_file_writer.EventsWriter(str(folder / "events"))

  def write(self, step: int, now: float, metrics: dict[str, _Number]) -> None:
    for name, value in metrics.items():
      value = math.nan if value is None else value
      scalar = self._scalar(name, np.float64(value))
      self._writer.write_event(
        self._event(step=step, wall_time=now, summary=scalar)
      )
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _number(value: Any) -> _Number:
  array = np.asarray(value)
  if array.dtype.kind in "iub":
    return int(array)
  number = float(array)
  return number if math.isfinite(number) else None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The records of a `metrics.jsonl`, one per step, in order of steps.

  Lines of the same step are merged, later ones win. A line that a killed run
  left unfinished is skipped.
  """
  steps: dict[int, dict[str, Any]] = {}
  for line in Path(path).read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    steps.setdefault(record["step"], {}).update(record)
  return [steps[step] for step in sorted(steps)]


class Progress:
  """One progress bar for a training run; log lines where there is no terminal.

  Rates are those of the last `window` seconds of training. The first update
  only starts the clock, because compilation came before it; time inside
  `paused()` does not count.

  Args:
    total: the step at which the run ends.
    initial: the step at which it starts.
    stream: where to write; stderr by default.
    window: seconds over which rates are taken.
    clock: seconds, monotonic.

  Attributes:
    seconds: training time so far, without pauses.
    flops: model FLOPs of a step; set it to see FLOP/s.
    peak: FLOP/s that the devices can do; set it to see the utilisation.
  """

  def __init__(
    self,
    total: int,
    *,
    initial: int = 0,
    stream: TextIO | None = None,
    window: float = 20.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.seconds = 0.0
    self.flops: float | None = None
    self.peak: float | None = None
    self._total, self._step = total, initial
    self._stream = sys.stderr if stream is None else stream
    self._window, self._clock = window, clock
    self._last: float | None = None
    # seconds, steps, images, tokens, slots, seconds of waiting; and their sum
    self._recent: collections.deque[np.ndarray] = collections.deque()
    self._sum = np.zeros(6)
    self._shown = jax.process_index() == 0
    self._line_time, self._line_step = -math.inf, initial
    self._bar = tqdm.tqdm(
      total=total,
      initial=initial,
      file=self._stream,
      disable=not (self._shown and self._stream.isatty()),
      dynamic_ncols=True,
      bar_format="{percentage:2.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
    )

  def update(
    self,
    step: int,
    *,
    loss: float,
    images: int = 0,
    tokens: int = 0,
    slots: int = 0,
    waited: float = 0.0,
  ) -> None:
    """Shows that `step` steps are done.

    Args:
      step: steps done since the beginning of training.
      loss: of the latest step.
      images: seen since the last update.
      tokens: seen since the last update, without padding; 0 if not packed.
      slots: places for tokens in the rows that held them.
      waited: seconds since the last update that were spent waiting for data.
    """
    now = self._clock()
    if self._last is not None:
      spent = now - self._last
      self.seconds += spent
      steps = step - self._step
      self._remember(np.array([spent, steps, images, tokens, slots, waited]))
    self._last, self._step = now, step
    if self._bar.disable:
      self._maybe_print_line(now, loss)
    else:
      self._bar.set_postfix_str(" ".join(self._parts(loss)), refresh=False)
      self._bar.update(step - self._bar.n)

  def rates(self) -> dict[str, float]:
    """Recent rates, for the metrics; {} before the second update.

    `steps_per_s`, `images_per_s`, `data_wait` (share of the time spent waiting
    for data); for packed rows `tokens_per_s` and `fill` (tokens / slots); and
    where known `flops_per_s` and `utilisation`.
    """
    if not self._recent:
      return {}
    seconds, steps, images, tokens, slots, waited = self._sum
    seconds = max(seconds, 1e-9)
    rates = {
      "steps_per_s": steps / seconds,
      "images_per_s": images / seconds,
      "data_wait": waited / seconds,
    }
    if slots:
      rates |= {"tokens_per_s": tokens / seconds, "fill": tokens / slots}
    if self.flops:
      rates["flops_per_s"] = self.flops * rates["steps_per_s"]
      if self.peak:
        rates["utilisation"] = rates["flops_per_s"] / self.peak
    return {key: float(value) for key, value in rates.items()}

  def say(self, text: str) -> None:
    """Prints text without disturbing the bar."""
    if not self._shown:
      return
    if self._bar.disable:
      print(text, file=self._stream, flush=True)
    else:
      self._bar.write(text, file=self._stream)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around evaluation and the like: the time inside is no training time."""
    start = self._clock()
    yield
    if self._last is not None:
      self._last += self._clock() - start

  def close(self) -> None:
    self._bar.close()

  def _remember(self, entry: np.ndarray) -> None:
    self._recent.append(entry)
    self._sum = self._sum + entry
    while self._sum[0] - self._recent[0][0] > self._window:
      self._sum = self._sum - self._recent.popleft()

  def _parts(self, loss: float) -> list[str]:
    rates, size = self.rates(), tqdm.tqdm.format_sizeof
    left = "?"
    if rates.get("steps_per_s"):
      left = (self._total - self._step) / rates["steps_per_s"]
      left = tqdm.tqdm.format_interval(left)
    parts = [f"ETA {left}", f"loss {loss:.3g}"]
    if "images_per_s" in rates:
      parts.append(f"{size(rates['images_per_s'])} images/s")
    if "tokens_per_s" in rates:
      parts.append(f"{size(rates['tokens_per_s'])} tokens/s")
      parts.append(f"fill {rates['fill']:.1%}")
    if rates.get("data_wait", 0) > 0.05:
      parts.append(f"waits {rates['data_wait']:.0%} for data")
    if "flops_per_s" in rates:
      parts.append(f"{size(rates['flops_per_s'])}FLOP/s")
    if "utilisation" in rates:
      parts.append(f"({rates['utilisation']:.0%} of peak)")
    return parts

  def _maybe_print_line(self, now: float, loss: float) -> None:
    """Prints a line per 2 % of the run, with 10 s to 10 min between them."""
    quiet = now - self._line_time
    moved = self._step - self._line_step >= 0.02 * self._total
    due = (moved and quiet >= 10) or quiet >= 600 or self._step == self._total
    if due:
      self._line_time, self._line_step = now, self._step
      done = f"step {self._step}/{self._total}"
      self.say(", ".join([done, *self._parts(loss)]))


def score_line(step: int, scores: Mapping[str, float]) -> str:
  """The scores of an evaluation as one line for people."""
  shown = [f"{k} {_short(v)}" for k, v in _headline(scores).items()]
  return f"step {step}: {', '.join(shown) or 'no scores'}"


def summary(
  *,
  scores: Mapping[str, float],
  totals: Mapping[str, int],
  seconds: float,
  train_seconds: float,
  parameters: int,
  steps: int,
) -> str:
  """The table that ends a run.

  Args:
    scores: of the last evaluations; "budget/64tokens/mAP" and others of such
      depth are details that stay in the metrics.
    totals: `images`, `tokens` and `slots` seen by this process's training.
    seconds: since the command was started.
    train_seconds: of these, spent in training steps.
    parameters: of the model.
    steps: done in all.
  """
  rows = {name: _short(value) for name, value in _headline(scores).items()}
  rows |= {"steps": f"{steps:,}", "images seen": f"{totals['images']:,}"}
  if train_seconds > 0:
    rows["images/s"] = f"{totals['images'] / train_seconds:,.0f}"
  if totals.get("slots"):
    rows["tokens seen"] = f"{totals['tokens']:,}"
    rows["fill of the rows"] = f"{totals['tokens'] / totals['slots']:.1%}"
  rows["time"] = tqdm.tqdm.format_interval(seconds)
  rows["of it training"] = tqdm.tqdm.format_interval(train_seconds)
  rows["parameters"] = f"{parameters:,}"
  left, right = (max(map(len, column)) for column in zip(*rows.items()))
  rule = "-" * (left + 3 + right)
  lines = [f"{key:<{left}}   {value:>{right}}" for key, value in rows.items()]
  return "\n".join([rule, *lines, rule])


def _headline(scores: Mapping[str, float]) -> dict[str, float]:
  return {k: v for k, v in scores.items() if k.count("/") < 2}


def _short(value: float) -> str:
  whole = float(value).is_integer() and abs(value) >= 10
  return f"{value:,.0f}" if whole or abs(value) >= 1e4 else f"{value:.4g}"


class Interrupt:
  """Turns the first SIGINT or SIGTERM into a wish that the loop can grant.

  `with Interrupt() as interrupt:` and then ask `interrupt.requested` after each
  step. A Ctrl-C after the first signal raises KeyboardInterrupt at once; more
  SIGTERMs change nothing. The old handlers come back at the end. Outside the
  main thread, where Python allows no handlers, it does nothing.

  Several processes have to stop at the same step, and none may do so by itself.
  JAX's preemption service, which `reached_preemption` of the checkpoints asks,
  settles the step once any process gets a SIGTERM. So there we leave SIGTERM
  to it, and make one of the first Ctrl-C.
  """

  def __init__(self) -> None:
    self.name: str | None = None  # of the first signal
    self._alone = jax.process_count() == 1
    self._previous: dict[int, Any] = {}

  @property
  def requested(self) -> bool:
    return self.name is not None and self._alone

  def __enter__(self) -> "Interrupt":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, *[signal.SIGTERM] * self._alone):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc: object) -> None:
    for number, handler in self._previous.items():
      # None: the handler was not set from Python.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._previous = {}

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.name is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    if self.name is None:
      self.name = signal.Signals(number).name
      if not self._alone:
        os.kill(os.getpid(), signal.SIGTERM)
      # Not print: the signal may have come in the middle of one.
      text = f"\n{self.name}: stopping after this step. Ctrl-C: at once.\n"
      os.write(2, text.encode())
