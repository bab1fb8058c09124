"""What a run writes while it goes on: metrics.jsonl and TensorBoard events."""

from collections.abc import Mapping
import contextlib
import json
import pathlib
from typing import Any

from bernoulli_lora_jax import files


class MetricsLog:
  """metrics.jsonl and TensorBoard events; lines after `step` are dropped."""

  def __init__(self, workdir: pathlib.Path, step: int, events: bool = True):
    self.directory = workdir
    self._path = workdir / 'metrics.jsonl'
    kept = []
    if self._path.exists() and step > 0:
      for line in self._path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # Cut by a kill.
          if json.loads(line)['step'] <= step:
            kept.append(line + '\n')
    files.write(self._path, ''.join(kept).encode())
    self._file = self._path.open('a')
    self._events: Any = None
    if events:
      import tensorboardX  # Imports torch where that is there: seconds.

      self._events = tensorboardX.SummaryWriter(
          str(workdir / 'events'), purge_step=step + 1 if step else None
      )

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._file.write(json.dumps({'step': step, **metrics}) + '\n')
    self._file.flush()
    if self._events is not None:
      for name, value in metrics.items():
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    if self._events is not None:
      self._events.close()
