"""Trains a config: python launch.py --config configs/X.py [--workdir DIR]

Any key of the config can be set on the command line: --config.optim.lr=1e-3.
"""

import datetime
import pathlib
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Run folder; made under runs/ if not given."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the cluster that jax.distributed detects."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of process 0, where undetected."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many there are, where undetected."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which this is, from 0, where undetected."
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
  "join_timeout", 300, "Seconds to wait for all processes.", lower_bound=1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout",
  100,
  "Seconds until a process that was killed is noticed, and the others end.",
  lower_bound=1,
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  workdir = _WORKDIR.value or _new_workdir()
  # After the flags: the import takes seconds, and `--help` should not.
  from big_vision_like import processes, train

  if _DISTRIBUTED.value:
    processes.join(
      workdir,
      timeout=_JOIN_TIMEOUT.value,
      heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
      coordinator_address=_COORDINATOR_ADDRESS.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
    )
  command = shlex.join(["python", "launch.py", *sys.argv[1:]])
  if _WORKDIR.value is None:
    command += f" --workdir {shlex.quote(workdir)}"
  with processes.end_together():
    train.train(_CONFIG.value, workdir, command=command)


def _new_workdir() -> str:
  if _DISTRIBUTED.value:
    # Each host would make up a name of its own.
    raise app.UsageError("--distributed needs a --workdir that all hosts see.")
  spec = config_flags.get_config_filename(flags.FLAGS["config"])
  now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
  return f"runs/{pathlib.Path(spec).stem}-{now}"


def _parse(argv):
  """Flags, with a sentence where a config refuses a key or an argument."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, ValueError) as e:
    sys.exit(f"error: {_refusal(argv, e)}")


def _refusal(argv, error) -> str:
  if isinstance(error, ValueError):
    return str(error)
  # ml_collections wraps its sentence, with the nearest key, once or twice.
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  sentence = " ".join(str(error.args[0]).split())
  given = [a.partition("=")[0] for a in argv if a.startswith("--config.")]
  return (
    f"the config has no key {sentence} Given: {', '.join(given)}. The file "
    "behind --config and configs/common.py list the keys there are."
  )


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=_parse)
