"""Loggers that never stop a run, the progress display, and interruption."""

import io
import json
import logging
import math
import os
import signal
import struct
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2

from big_vision_like import observe


def lines(folder):
  text = (folder / observe.METRICS_FILE).read_text()
  return [json.loads(line) for line in text.splitlines()]


def tensorboard_scalars(folder):
  """Reads event files as TFRecords: length, crc, data, crc."""
  scalars = []
  for path in sorted((folder / "tensorboard").iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (size,) = struct.unpack_from("Q", data, at)
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      scalars += [
        (event.step, v.tag, v.simple_value) for v in event.summary.value
      ]
      at += 12 + size + 4
  return scalars


def test_a_step_becomes_a_flat_line_and_tensorboard_scalars(tmp_path):
  with observe.Writer(tmp_path / "run") as writer:
    writer.write(7, {"loss": jnp.float32(0.5), "n": np.int64(3)})
    writer.write(11, {"lr": jnp.bfloat16(0.25)})
  first, second = lines(tmp_path / "run")
  assert first.pop("time") > 1.7e9
  assert first == {"step": 7, "loss": 0.5, "n": 3}
  assert (second["step"], second["lr"]) == (11, 0.25)
  assert tensorboard_scalars(tmp_path / "run") == [
    (7, "loss", 0.5),
    (7, "n", 3.0),
    (11, "lr", 0.25),
  ]


def test_numbers_that_json_lacks_become_null(tmp_path):
  with observe.Writer(tmp_path) as writer:
    writer.write(1, {"a": math.nan, "b": -math.inf, "c": jnp.inf})

  def refuse(constant):
    raise AssertionError(constant)

  (line,) = (tmp_path / observe.METRICS_FILE).read_text().splitlines()
  record = json.loads(line, parse_constant=refuse)
  assert (record["a"], record["b"], record["c"]) == (None, None, None)
  assert all(math.isnan(v) for _, _, v in tensorboard_scalars(tmp_path))


@pytest.fixture
def warnings_of(caplog):
  return lambda: [
    r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING
  ]


def test_a_disk_that_fails_is_reported_once_and_may_recover(
  tmp_path, monkeypatch, warnings_of
):
  writer = observe.Writer(tmp_path)
  path = tmp_path / observe.METRICS_FILE
  # Even root cannot append to a folder.
  path.mkdir()
  for step in range(5):
    writer.write(step, {"loss": 1.0})
  path.rmdir()
  writer.write(5, {"loss": 2.0})
  writer.close()
  assert [record["step"] for record in lines(tmp_path)] == [5]
  assert [s for s, _, _ in tensorboard_scalars(tmp_path)] == list(range(6))
  (warning,) = warnings_of()
  assert "JsonLines failed (IsADirectoryError" in warning
  assert "Training goes on" in warning


def test_tensorboard_that_fails_neither_blocks_nor_stops(
  tmp_path, monkeypatch, warnings_of
):
  writer = observe.Writer(tmp_path)

  def no_space(self, text):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(
    event_file_writer.EventsWriter, "_write_serialized_event", no_space
  )
  # More than the queue of tensorboardX's own thread would hold.
  for step in range(40):
    writer.write(step, {"loss": 1.0})
  writer.close()
  assert len(lines(tmp_path)) == 40
  (warning,) = warnings_of()
  assert "TensorBoard failed (OSError: [Errno 28]" in warning


def test_a_logger_that_cannot_start_leaves_the_other(tmp_path, warnings_of):
  (tmp_path / "tensorboard").write_text("in the way")
  with observe.Writer(tmp_path) as writer:
    writer.write(3, {"loss": 1.0})
  assert len(lines(tmp_path)) == 1
  assert "TensorBoard failed" in warnings_of()[0]


def test_an_error_of_the_computation_is_not_a_loggers(tmp_path):
  class Lost:
    def __array__(self, *args, **kwargs):
      raise RuntimeError("device lost")

  with observe.Writer(tmp_path) as writer:
    with pytest.raises(RuntimeError, match="device lost"):
      writer.write(1, {"loss": Lost()})


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with observe.Writer(tmp_path / "run") as writer:
    writer.write(1, {"loss": 1.0})
  assert not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_after_a_torn_line(tmp_path):
  path = tmp_path / observe.METRICS_FILE
  path.write_text(
    '{"step": 5, "time": 1, "loss": 3.0, "lr": 0.1}\n'
    '{"step": 10, "time": 2, "loss": 2.0}\n'
    '{"step": 15, "ti'
  )
  with observe.Writer(tmp_path) as writer:
    writer.write(10, {"val/mAP": 0.5})
    writer.write(5, {"loss": 2.5})
  records = observe.read_metrics(path)
  for record in records:
    record.pop("time")
  assert records == [
    {"step": 5, "loss": 2.5, "lr": 0.1},
    {"step": 10, "loss": 2.0, "val/mAP": 0.5},
  ]


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


STEP = dict(images=7, tokens=190, slots=200, waited=0.1)


def test_rates_leave_out_compilation_and_pauses():
  clock = Clock()
  progress = observe.Progress(100, stream=io.StringIO(), clock=clock)
  assert progress.rates() == {}
  clock.now += 60  # compilation
  progress.update(1, loss=1.0, **STEP)
  assert progress.rates() == {}
  for step in range(2, 6):
    clock.now += 0.5
    progress.update(step, loss=1.0, **STEP)
    with progress.paused():
      clock.now += 30  # evaluation
  progress.flops, progress.peak = 1e9, 8e9
  assert progress.seconds == pytest.approx(2.0)
  assert progress.rates() == pytest.approx(
    {
      "steps_per_s": 2.0,
      "images_per_s": 14.0,
      "tokens_per_s": 380.0,
      "fill": 0.95,
      "data_wait": 0.2,
      "flops_per_s": 2e9,
      "utilisation": 0.25,
    }
  )


def test_rates_are_those_of_the_recent_window():
  clock = Clock()
  progress = observe.Progress(1000, stream=io.StringIO(), clock=clock, window=3)
  for step in range(1, 50):
    clock.now += 1.0 if step < 40 else 0.25
    progress.update(step, loss=1.0, images=5)
  # 10 quick steps took 2.5 s; a part of one slow step is still in the window.
  assert 12 < progress.rates()["images_per_s"] < 20
  assert "fill" not in progress.rates()
  assert progress.seconds == pytest.approx(38 + 10 * 0.25)


def test_the_bar_shows_what_matters_and_text_passes_it_by():
  clock, stream = Clock(), Terminal()
  progress = observe.Progress(40, initial=10, stream=stream, clock=clock)
  progress.flops, progress.peak = 3e9, 30e9
  for step in range(11, 41):
    clock.now += 0.5
    progress.update(step, loss=0.123456, images=700, tokens=1990, slots=2000)
    if step == 30:
      progress.say("val/mAP 0.9")
  progress._bar.refresh()
  progress.close()
  text = stream.getvalue()
  assert "val/mAP 0.9\n" in text
  last = text.rstrip().split("\r")[-1]
  for part in (
    "100%|",
    "40/40",
    "ETA 00:00",
    "loss 0.123",
    "1.40k images/s",
    "3.98k tokens/s",
    "fill 99.5%",
  ):
    assert part in last
  assert "waits" not in last


def test_without_a_terminal_there_are_some_lines_and_no_bar():
  clock, stream = Clock(), io.StringIO()
  progress = observe.Progress(5000, stream=stream, clock=clock)
  for step in range(1, 5001):
    clock.now += 0.25
    progress.update(step, loss=0.5, **(STEP | {"waited": 0.0}))
  progress.say("val/mAP 0.9")
  progress.close()
  text = stream.getvalue()
  assert "\r" not in text
  first, *_, last, said = text.splitlines()
  assert 20 <= text.count("\n") <= 60
  assert first.startswith("step 1/5000, ETA ?, loss 0.5")
  assert last == (
    "step 5000/5000, ETA 00:00, loss 0.5, 28.0 images/s, 760 tokens/s, "
    "fill 95.0%"
  )
  assert said == "val/mAP 0.9"


def test_a_slow_run_says_something_every_ten_minutes():
  clock, stream = Clock(), io.StringIO()
  progress = observe.Progress(10**6, stream=stream, clock=clock)
  for step in range(1, 101):
    clock.now += 60
    progress.update(step, loss=0.5)
  assert stream.getvalue().count("\n") == 10


def test_other_processes_show_nothing(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  for stream in (Terminal(), io.StringIO()):
    progress = observe.Progress(2, stream=stream)
    progress.update(1, loss=0.5)
    progress.update(2, loss=0.5)
    progress.say("hello")
    progress.close()
    assert stream.getvalue() == ""
  assert progress.rates()["steps_per_s"] > 0


def test_a_waiting_loader_is_shown():
  clock, stream = Clock(), io.StringIO()
  progress = observe.Progress(2, stream=stream, clock=clock)
  for step in (1, 2):
    clock.now += 1
    progress.update(step, loss=0.5, waited=0.31)
  assert "waits 31% for data" in stream.getvalue()


def test_the_first_signal_is_a_wish_and_the_second_an_order(capfd):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with observe.Interrupt() as interrupt:
    assert not interrupt.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.requested
    assert interrupt.name == "SIGTERM"
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.name == "SIGTERM"
  after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  assert after == before
  assert capfd.readouterr().err.count("stopping after this step") == 1


def test_ctrl_c_once_is_a_wish():
  # A shell's background jobs, such as this may be one, ignore it.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with observe.Interrupt() as interrupt:
      os.kill(os.getpid(), signal.SIGINT)
      assert interrupt.name == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)


def test_of_several_processes_none_stops_by_itself(monkeypatch):
  """Ctrl-C becomes the SIGTERM that JAX's preemption service waits for."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  seen = []
  before = signal.signal(signal.SIGTERM, lambda *args: seen.append("SIGTERM"))
  try:
    with observe.Interrupt() as interrupt:
      os.kill(os.getpid(), signal.SIGINT)
      assert seen == ["SIGTERM"]
      assert not interrupt.requested
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
  finally:
    signal.signal(signal.SIGTERM, before)


def test_handlers_come_back_after_an_error():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(ValueError, match="inside"), observe.Interrupt():
    raise ValueError("inside")
  assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_happens():
  before, seen = signal.getsignal(signal.SIGINT), []

  def run():
    with observe.Interrupt() as interrupt:
      seen.append((interrupt.requested, signal.getsignal(signal.SIGINT)))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [(False, before)]


def test_the_table_that_ends_a_run():
  table = observe.summary(
    scores={
      "val/mAP": 0.95431,
      "val/examples": 2000.0,
      "budget/64tokens/mAP": 0.9,
    },
    totals={"images": 123_456, "tokens": 991, "slots": 1000},
    seconds=3723.0,
    train_seconds=100.0,
    parameters=580_123,
    steps=2000,
  )
  rows = dict(row.rsplit("   ", 1) for row in table.splitlines()[1:-1])
  rows = {key.strip(): value.strip() for key, value in rows.items()}
  assert rows == {
    "val/mAP": "0.9543",
    "val/examples": "2,000",
    "steps": "2,000",
    "images seen": "123,456",
    "images/s": "1,235",
    "tokens seen": "991",
    "fill of the rows": "99.1%",
    "time": "1:02:03",
    "of it training": "01:40",
    "parameters": "580,123",
  }
  assert len({len(row) for row in table.splitlines()}) == 1


def test_scores_as_a_line():
  scores = {"val/mAP": 0.91234, "val/loss": 12345.6, "b/64tokens/mAP": 0.5}
  line = observe.score_line(500, scores)
  assert line == "step 500: val/mAP 0.9123, val/loss 12,346"
  assert observe.score_line(7, {}) == "step 7: no scores"
