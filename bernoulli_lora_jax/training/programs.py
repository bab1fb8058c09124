"""What is compiled of a run: its start, its steps, its evaluations.

Runs that differ in the seed share a `Program`. The functions below it take a task
and a method and may be traced within larger programs, see `together`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import parts
from bernoulli_lora_jax import policies
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import methods
from bernoulli_lora_jax.training import parallel

_METHOD, _BATCH, _NOISE, _INIT = range(4)  # Purposes folded into the run's key.


@dataclasses.dataclass(frozen=True)
class Settings:
  """How long and how often; counts are of steps.

  Attributes:
    num_steps: T >= 1.
    eval_every: steps between evaluations, >= 1; also after the last step.
    checkpoint_every: steps between checkpoints; 0 saves only at the end.
    steps_per_dispatch: most steps in one compiled loop, >= 1.
    patience: evaluations without a lower validation loss after which the run
      stops; 0 never stops early. The params of the lowest one are then kept.
    plateau_patience: evaluations without a lower validation loss after which
      the learning rate is multiplied by `plateau_factor`; 0 never.
    plateau_factor: in (0, 1).
    eval_gradient: whether evaluations report the squared norm of the full
      gradient over trained leaves, at the cost of a data pass.
    recipe: whether a run of a chain writes its recipe, see `recipes`; with
      patience that of the lowest loss.
    progress: whether to show a progress bar.
    max_to_keep: checkpoints kept.
  """

  num_steps: int
  eval_every: int
  checkpoint_every: int = 0
  steps_per_dispatch: int = 1000
  patience: int = 0
  plateau_patience: int = 0
  plateau_factor: float = 0.1
  eval_gradient: bool = True
  recipe: bool = False
  progress: bool = True
  max_to_keep: int = 2

  def __post_init__(self):
    least = {
        'num_steps': 1,
        'eval_every': 1,
        'checkpoint_every': 0,
        'steps_per_dispatch': 1,
        'patience': 0,
        'plateau_patience': 0,
        'max_to_keep': 1,
    }
    for name, low in least.items():
      if getattr(self, name) < low:
        raise ValueError(
            f'Expected training.{name} >= {low}, got'
            f' {name}={getattr(self, name)}.'
        )
    if not 0 < self.plateau_factor < 1:
      raise ValueError(
          'Expected training.plateau_factor in (0, 1), got'
          f' plateau_factor={self.plateau_factor}.'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """What runs that differ in the seed share; compiles each part once.

  Attributes:
    task: data, model and loss.
    method: how params move.
    settings: how long and how often.
    driver: where steps run.
    compiled: {(num, side): (data, state, key, first, batches) -> (state, metrics of
      num steps)}, which `loop` fills; side is None but for `sides`.
    compile_seconds: {(num, side): spent on it}.
  """

  task: task_lib.Task
  method: methods.Method
  settings: Settings
  driver: parallel.Driver = parallel.Driver()
  compiled: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
  compile_seconds: dict[Any, float] = dataclasses.field(default_factory=dict)
  _jitted: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

  @functools.cached_property
  def data(self) -> Any:
    """Returns the task's data where the steps read it."""
    return self.driver.put(self.task.data)

  def start(self, key: jax.Array) -> Any:
    """Returns the state at step 0, from the run's key.

    Weights that are loaded are loaded anew, and the state takes them over.
    """
    if self.task.load is None:
      return self._start(key, self.task.weights)
    return self._start_of_loaded(key, self.task.load())

  def jit(self, num: int, state: Any, side: str | None = None) -> Any:
    """Returns jitted (data, state, key, first, batches) -> (state, metrics).

    One function for each num of steps, and each side whose links alone it is for;
    the state is donated. See `steps` for arguments, `driver.get` for the metrics;
    `batches` is () without a stream.
    """
    if (num, side) not in self._jitted:
      run = functools.partial(steps, self.task, self._stepping(side), num)
      self._jitted[num, side] = self.driver.jit(run, state)
    return self._jitted[num, side]

  def put(self, state: Any) -> Any:
    """Returns a state where the steps read it."""
    return self.driver.put(state, self.method.per_client(state))

  def get(self, state: Any) -> Any:
    """Returns a state of the steps as at the start."""
    return self.driver.get(state, self.method.per_client(state))

  def params(self, state: Any) -> Any:
    """Returns the merged params of a state, on one device."""
    if self.task.load is not None:
      return self.method.params_of_large(self.get(state))
    return self._params(self.get(state))

  @functools.cached_property
  def period(self) -> int | None:
    """Returns the steps after which dispatches end for `next_link`.

    None where links end within steps. Those of weights that are loaded, and large,
    end between them: the program of a step then holds no merge, and the merges of all
    matrices of a shape are one program.
    """
    chain, is_one = self.method.chain, self.driver.kind == 'none'
    return chain.policy.period if chain and self.task.load and is_one else None

  @functools.cached_property
  def sides(self) -> tuple[str | None, ...]:
    """Returns the sides of links that have programs of their own, (None,) for none.

    Links of one coin have, where the weights are loaded, and large, or where links
    are no shorter than dispatches, which then end with them: such a program has no
    coin, and of one factor alone a derivative.
    """
    chain, longest = self.method.chain, self.settings.steps_per_dispatch
    if chain is None or policies.one_coin(chain.policy) is None:
      return (None,)
    is_long = chain.policy.period is None or longest <= chain.policy.period
    return ('left', 'right') if self.task.load or is_long else (None,)

  def link(self, step: int) -> int:
    """Returns the number of the link of a step, counted from 0."""
    chain = self.method.chain
    return step // chain.policy.period if chain and chain.policy.period else 0

  def sides_of_links(self, state: Any, step: int) -> list[str] | None:
    """Returns the sides of all links of a run; None where they share programs.

    Args:
      state: as `put` placed it.
      step: steps that it has done.

    Raises:
      ValueError: coins that are not those of the state's key.
    """
    chain = self.method.chain
    if chain is None or self.sides == (None,):
      return None
    key, coins = self.driver.get((state.chain.key, state.chain.coins))
    num = self.link(self.settings.num_steps - 1) + 1
    sides = adapters.sides_of_links(chain, key, num)
    known = sides[self.link(max(0, step - 1))]
    for path, coin in jax.device_get(coins).items():
      if np.any(coin != (known == 'left')):
        raise ValueError(
            f'Expected the coins of step {step} to fall {known}, as the key of the'
            f' chain says, got {coin} of {path}, True for left: were they drawn by'
            ' another generator?'
        )
    return sides

  def next_link(self, state: Any) -> Any:
    """Returns the state with its link ended and the next begun; consumes it."""
    return self.method.next_link(state)  # pyrefly: ignore

  def _stepping(self, side: str | None) -> methods.Method:
    method: Any = self.method
    if self.period is not None:
      method = dataclasses.replace(method, ends_links=False)
    if side is not None:
      method = dataclasses.replace(method, chain=method.chain.of_side(side))
    return method

  def snapshot(self, state: Any) -> Any:
    """Returns what the params of a state are made of, copied to the host.

    Args:
      state: as `get` gives it.

    Returns:
      `Method.snapshot`, None in place of what stays as it is at step 0; `filled`
      puts it back.
    """
    kept = self.method.snapshot(state)
    stays = self.method.frozen(kept)
    return jax.tree.map(lambda x, s: None if s else _on_host(x), kept, stays)

  def filled(self, snapshot: Any, state: Any) -> Any:
    """Returns a snapshot with what stays taken from a state, as `put` gives it.

    Of weights that are loaded what it replaces of the state is given up.
    """
    none = lambda x: x is None
    kept = self.method.snapshot(self.get(state))

    def pick(own, other):
      if own is None:
        return other
      if self.task.load is not None:  # Not twice at once.
        other.delete()
      return own

    return self.put(jax.tree.map(pick, snapshot, kept, is_leaf=none))

  def evaluate(self, state: Any) -> dict[str, jax.Array]:
    """Returns the metrics of all splits but the test split at a state's weights.

    Weights that are loaded are large: their products are met by the factors. Others
    are merged first.
    """
    if not self.settings.eval_gradient and not evaluated(self.data):
      return {}
    return self._at(self._evaluate, state)

  def test(self, state: Any) -> dict[str, jax.Array]:
    """Returns the metrics of the test split."""
    split = test_split(self.task)
    found = {} if split is None else self._at(self._test, state)
    return {f'{split}_{name}': value for name, value in found.items()}

  def _at(self, metrics: Callable[..., Any], state: Any) -> Any:
    state = self.get(state)
    if self.task.load is None:
      state = self._params(state)
    return metrics(state, self._eval_data)

  @functools.cached_property
  def _eval_data(self) -> Any:
    return self.driver.get(self.data)

  @functools.cached_property
  def _start(self) -> Callable[..., Any]:
    return jax.jit(functools.partial(start, self.task, self.method))

  @functools.cached_property
  def _start_of_loaded(self) -> Callable[..., Any]:
    run = functools.partial(start, self.task, self.method)
    return jax.jit(run, donate_argnums=1)

  @functools.cached_property
  def _params(self) -> Callable[..., Any]:
    return jax.jit(self.method.params)

  @functools.cached_property
  def _evaluate(self) -> Callable[..., Any]:
    parts = self.task, self.method, self.settings
    return self._of_params(functools.partial(evaluate, *parts))

  @functools.cached_property
  def _test(self) -> Callable[..., Any]:
    split = test_split(self.task)
    return self._of_params(
        lambda params, data: of_split(self.task, params, data, split)
    )

  def _of_params(self, metrics: Callable[..., Any]) -> Callable[..., Any]:
    """Returns metrics of params jitted, of a state where weights are loaded."""
    if self.task.load is None:
      return jax.jit(metrics)
    return jax.jit(self.method.at(metrics))


def steps(
    task: task_lib.Task,
    method: methods.Method,
    num: int,
    data: Any,
    state: Any,
    key: jax.Array,
    first: Any,
    batches: Any = (),
) -> tuple[Any, dict[str, jax.Array]]:
  """Runs num steps of a method.

  Args:
    task: of which batches are drawn.
    method: how params move.
    num: of steps, >= 1.
    data: of the task, as the driver has placed it.
    state: of the method.
    key: of the run.
    first: number of the first step.
    batches: of a stream, stacked.

  Returns:
    The state and the metrics of each step, stacked.
  """
  if task.batch is None and not jax.tree.leaves(batches):
    raise ValueError(f'Expected batches of the stream of {task.name}.')
  one = functools.partial(_step, task, method, data, key)
  return jax.lax.scan(one, state, (first + jnp.arange(num), batches))


def _step(
    task: task_lib.Task,
    method: methods.Method,
    data: Any,
    key: jax.Array,
    state: Any,
    inputs: tuple[Any, Any],
) -> tuple[Any, dict[str, jax.Array]]:
  """Runs the step of a number, on its batch of a stream or of the task."""
  number, batch = inputs
  if task.batch is not None:
    batch = task.batch(data, jax.random.fold_in(key, _BATCH), number)
  return method.step(state, batch, noise_key(key, number), data.get('train'))


def method_key(key: jax.Array) -> jax.Array:
  """Returns the key of the method's init, from the run's."""
  return jax.random.fold_in(key, _METHOD)


def noise_key(key: jax.Array, step: Any) -> jax.Array:
  """Returns the key of a method's step, from the run's."""
  return jax.random.fold_in(jax.random.fold_in(key, _NOISE), step)


def start(
    task: task_lib.Task,
    method: methods.Method,
    key: jax.Array,
    weights: Any = None,
) -> Any:
  """Returns the state of the method at step 0, see `init_params`."""
  return method.init(method_key(key), init_params(task, key, weights))


def init_params(
    task: task_lib.Task, key: jax.Array, weights: Any = None
) -> Any:
  """Returns the params at step 0.

  Args:
    task: whose weights they are.
    key: of the run.
    weights: task.weights, as an argument: as constants of what is compiled they
      would be copied into the program.

  Raises:
    ValueError: a task that loads its weights, without them.
  """
  init_key = jax.random.fold_in(key, _INIT)
  if weights is not None:
    return weights if task.begin is None else task.begin(init_key, weights)
  if task.load is not None:
    raise ValueError(
        f'Expected weights in memory, got task {task.name!r}, which loads them for'
        ' one run: it trains alone, with one process.'
    )
  return task.init(init_key)


def _on_host(leaf: jax.Array) -> Any:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jnp.copy(leaf)  # NumPy has no keys.
  return np.array(leaf)  # No view: a state is donated.


def test_split(task: task_lib.Task) -> str | None:
  """Returns the split that is looked at once, at the end; None for neither."""
  return next((x for x in ('test', 'train') if x in task.data), None)


def of_split(
    task: task_lib.Task, params: Any, data: Any, split: str | None
) -> dict[str, jax.Array]:
  """Returns the metrics of a split, none where there is none."""
  if split is None:
    return {}
  return task_lib.evaluate(task, params, data, split)


def evaluated(data: Any) -> list[str]:
  """Returns the splits that evaluations look at."""
  return sorted(data.keys() - {'test', 'clients'})


def evaluate(
    task: task_lib.Task,
    method: methods.Method,
    settings: Settings,
    params: Any,
    data: Any,
) -> dict[str, jax.Array]:
  """Returns the metrics of all splits but the test split."""
  metrics: dict[str, Any] = {}
  if settings.eval_gradient:
    value = lambda p, batch: task.loss(p, batch, None)
    grad_fn = jax.value_and_grad(value, has_aux=True)
    _, grad = parts.chunked(grad_fn, task.chunk)(params, data['train'])
    squares = jax.tree.map(
        lambda moves, g: jnp.vdot(g, g) if moves else 0.0,
        method.trained(params),
        grad,
    )
    metrics['grad_norm_sq'] = sum(jax.tree.leaves(squares))
  for split in evaluated(data):
    for name, value in task_lib.evaluate(task, params, data, split).items():
      metrics[f'{split}_{name}'] = value
  return metrics
