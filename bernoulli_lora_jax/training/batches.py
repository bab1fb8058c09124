"""Batches of a stream, drawn ahead of their steps and put where they run."""

from typing import Any

import jax
import numpy as np

from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import parallel


class Batches:
  """The batches of a run's stream; of a task that has none they are ().

  What `prepare` has drawn counts as not drawn yet, in `get_state` too: a run that
  resumes goes on at the first batch that no step has seen.
  """

  def __init__(self, task: task_lib.Task, driver: parallel.Driver, seed: int):
    """Begins at the first batch.

    Args:
      task: whose stream it is.
      driver: where the steps run.
      seed: of the stream.

    Raises:
      TypeError: a stream without get_state or set_state.
    """
    self._stream = None if task.stream is None else task.stream(seed)
    for name in ('get_state', 'set_state'):
      if self._stream is not None and not hasattr(self._stream, name):
        raise TypeError(
            f'Expected a stream of batches with {name}, got {self._stream!r}: a'
            ' resumed run goes on where it was.'
        )
    self._driver = driver
    self._ahead: tuple[int, Any, Any] | None = None  # Number, batches, place.

  def take(self, num: int) -> Any:
    """Returns the next batches, stacked: leaves (num, b, ...)."""
    if self._stream is None:
      return ()
    if self._ahead is not None and self._ahead[0] != num:
      self.set_state(self._ahead[2])
    self.prepare(num)
    assert self._ahead is not None
    drawn, self._ahead = self._ahead[1], None
    return drawn

  def prepare(self, num: int) -> None:
    """Draws what `take(num)` will return, unless that is done."""
    if self._stream is None or self._ahead is not None or num < 1:
      return
    place = self._stream.get_state()
    rows = [next(self._stream) for _ in range(num)]
    drawn = jax.tree.map(lambda *xs: np.stack(xs), *rows)
    self._ahead = num, self._driver.put_batches(drawn), place

  def get_state(self) -> Any:
    """Returns the place before the next batch of `take`."""
    assert self._stream is not None
    return self._stream.get_state() if self._ahead is None else self._ahead[2]

  def set_state(self, state: Any) -> None:
    """Goes to a place."""
    assert self._stream is not None
    self._ahead = None
    self._stream.set_state(state)
