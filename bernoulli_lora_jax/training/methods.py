"""Methods: how params move. The other side of the narrow waist.

A `Method` is made for a loss and a driver and runs any task. Two kinds:
gradient mode, an estimator of the whole gradient (GD, SGD, PAGE, MVR) before an
optax transformation such as the Bernoulli chain, and adapter mode, a policy of
the LoRA family over pairs of thin factors. Sketched mode is adapter mode whose
weights move at each step. All states have a field `lr_scale` that multiplies every
update, for the loop to lower on plateaus.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import chain as chain_lib
from bernoulli_lora_jax import estimators
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import parts
from bernoulli_lora_jax import policies
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import parallel

# Metrics that are sums over all steps so far.
CUMULATIVE = ('data_passes', 'bits_up', 'bits_down')
MODES = ('gradient', 'adapter', 'sketched')
ESTIMATORS = ('gd', 'sgd', 'page', 'mvr')
WHOLE = ('full', 'probe')  # Gradients that are not projected.
ADAPTERS = (
    'lora',
    'asymmetric_left',
    'asymmetric_right',
    'cola',
    'rac_left',
    'rac_right',
    'bernoulli',
)
SKETCHED = (
    'rac_left',
    'rac_right',
    'bernoulli',
)  # They train one factor a link.


class Method(Protocol):
  """How params move: what `loop` asks of a frozen value.

  Attributes:
    passes_per_step: data passes of a step in the mean: 1 a full gradient.
    chain: of adapter and sketched mode.
  """

  @property
  def passes_per_step(self) -> float:
    ...

  @property
  def chain(self) -> adapters.Chain | None:
    ...

  def init(self, key: jax.Array, params: Any) -> Any:
    """Returns the state at step 0, of copies: the loop donates it."""
    ...

  def step(
      self, state: Any, batch: Any, key: jax.Array, full: Any
  ) -> tuple[Any, dict[str, jax.Array]]:
    """Returns the next state and metrics: loss, data_passes and more.

    Args:
      state: of the method.
      batch: of the task.
      key: of the step's noise.
      full: the training split, the batch of grad f.
    """
    ...

  def params(self, state: Any) -> Any:
    """Returns the params, merged."""
    ...

  def params_of_large(self, state: Any, in_place: bool = False) -> Any:
    """Returns the params, not within jit: compiled by shape, not by model.

    What does not move is the state's own; in_place its other weights are deleted.
    """
    ...

  def snapshot(self, state: Any) -> Any:
    """Returns the state without what only steps need; `params` takes it."""
    ...

  def at(self, f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns (state, *args) -> f(params, *args), nothing merged where it can."""
    ...

  def trained(self, params: Any) -> Any:
    """Returns a tree of bool: the leaves that move."""
    ...

  def per_client(self, state: Any) -> Any:
    """Returns a tree of bool: the leaves with a leading axis of clients."""
    ...

  def frozen(self, state: Any) -> Any:
    """Returns a tree of bool: the leaves that stay as they are at step 0."""
    ...


class Steps(NamedTuple):
  """Steps so far by their cost: a sum of costs in float32 would stop growing."""

  full: jax.typing.ArrayLike  # shape=(), int32; at one data pass each.
  small: jax.typing.ArrayLike  # shape=(), int32; at a minibatch's cost.


class GradientState(NamedTuple):
  """State of `gradient_method`."""

  params: Any
  opt_state: Any  # Of the chain (estimator, transformation), trained leaves.
  data_passes: jax.Array  # shape=(), float32; gradients of one example / N.
  lr_scale: jax.Array  # shape=(), float32; multiplies the updates.
  steps: Steps  # What data_passes is made of.


class AdapterMethodState(NamedTuple):
  """State of `adapter_method`."""

  chain: adapters.AdapterState
  data_passes: jax.Array  # shape=(), float32; gradients of one example / N.
  lr_scale: jax.Array  # shape=(), float32; multiplies the updates.


@dataclasses.dataclass(frozen=True)
class GradientMethod:
  """Moves params along an estimated gradient; see `gradient_method`."""

  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
  make_tx: Callable[[jax.Array], optax.GradientTransformation]
  estimator: str
  small_cost: float  # Data passes of a step without a full gradient.
  passes_per_step: float
  page_prob: float
  momentum: float
  num_micro_batches: int
  chunk: int
  is_trained: Callable[[Any], Any] | None
  driver: parallel.Driver
  chain: None = None  # Of adapter and sketched mode.

  def tx(self, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """Returns the estimator before the transformation of the estimate."""
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    first = optax.identity()
    if self.estimator == 'page':
      first = estimators.page(keys[0], prob=self.page_prob)
    elif self.estimator == 'mvr':
      first = estimators.mvr(momentum=self.momentum)
    return optax.chain(first, self.make_tx(keys[1]))

  def init(self, key: jax.Array, params: Any) -> GradientState:
    copy = jax.tree.map(jnp.array, params)
    zero = jnp.zeros([], jnp.int32)
    return GradientState(
        copy,
        self.tx(key).init(averaging.trained_part(copy, self.is_trained)),
        jnp.zeros([]),
        jnp.ones([]),
        Steps(zero, jnp.copy(zero)),
    )

  def step(
      self, state: GradientState, batch: Any, key: jax.Array, full: Any
  ) -> tuple[GradientState, dict[str, jax.Array]]:
    of = functools.partial(_value_and_grad, self.loss, state.params, key)
    mean = functools.partial(_mean, self, of, self.driver.shard(batch))
    full_mean = functools.partial(_full_mean, self, of, full)
    ours = averaging.trained_part(state.params, self.is_trained)
    first = full_mean if self.estimator == 'gd' else mean
    (value, metrics), grads = first(ours)
    updates, opt_state = self.tx(jax.random.key(0)).update(
        grads,
        state.opt_state,
        ours,
        grad_fn=lambda ours: mean(ours)[1],
        full_grad_fn=lambda ours: full_mean(ours)[1],
    )
    is_full = self.estimator == 'gd'
    if self.estimator == 'page':
      is_full = optax.tree.get(opt_state, 'is_full')
    steps = counted(state.steps, is_full)
    updates = scaled(updates, state.lr_scale)
    state = GradientState(
        averaging.joined(state.params, optax.apply_updates(ours, updates)),
        opt_state,
        data_passes_of(steps, self.small_cost),
        state.lr_scale,
        steps,
    )
    metrics = task_lib.metrics_of(metrics)
    return state, {'loss': value, **metrics, 'data_passes': state.data_passes}

  def params(self, state: GradientState) -> Any:
    return jax.tree.map(jnp.copy, state.params)  # A donated state's.

  def params_of_large(
      self, state: GradientState, in_place: bool = False
  ) -> Any:
    return state.params if in_place else self.params(state)

  def snapshot(self, state: GradientState) -> GradientState:
    return state._replace(opt_state=())

  def at(self, f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda state, *args: f(state.params, *args)

  def trained(self, params: Any) -> Any:
    return (self.is_trained or all_true)(params)

  def per_client(self, state: GradientState) -> Any:
    return none_marked(state)

  def frozen(self, state: GradientState) -> Any:
    marks = jax.tree.map(lambda t: not t, self.trained(state.params))
    return none_marked(state)._replace(params=marks)


def gradient_method(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    make_tx: Callable[[jax.Array], optax.GradientTransformation],
    *,
    estimator: str,
    num_samples: int,
    batch_size: int,
    page_prob: float | None = None,
    momentum: float = 0.0,
    num_micro_batches: int = 1,
    chunk: int = 0,
    trained: Callable[[Any], Any] | None = None,
    driver: parallel.Driver | None = None,
) -> GradientMethod:
  """Returns the method that moves params along an estimated gradient.

  Args:
    loss: (params, batch, key) -> (scalar mean over the batch, metrics).
    make_tx: key -> transformation of the estimate. It keeps its key in its
      state, so that runs with other seeds share one compiled step.
    estimator: 'gd', 'sgd', 'page' (E3) or 'mvr' (E4).
    num_samples: N, examples of the full gradient.
    batch_size: b, examples of a minibatch.
    page_prob: q of PAGE in (0, 1]; None for b / (b + N).
    momentum: 1 - b of MVR in [0, 1).
    num_micro_batches: parts in which a minibatch's gradient is accumulated.
    chunk: most examples at a time in a full gradient; 0 for all.
    trained: params -> tree of bool; other leaves are frozen: they get no
      gradient, and neither moments nor a copy in an estimator. None: all move.
    driver: None for one device.

  Returns:
    Its metrics are the loss before the step (of the minibatch, with 'gd' of all
    examples), those of `loss`, and data_passes so far (a full gradient is 1, a
    small step of PAGE 2 b / N).

  Raises:
    ValueError: an unknown estimator or an argument outside its range.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(
        f'Expected method.estimator in {ESTIMATORS}, got {estimator!r}.'
    )
  part = batch_size / num_samples
  prob = batch_size / (batch_size + num_samples)
  prob = prob if page_prob is None else page_prob
  small_cost = part if estimator == 'sgd' else 2 * part
  mean_costs = {'gd': 1.0, 'page': prob + (1 - prob) * small_cost}
  return GradientMethod(
      loss,
      make_tx,
      estimator,
      small_cost,
      mean_costs.get(estimator, small_cost),
      prob,
      momentum,
      num_micro_batches,
      chunk,
      trained,
      driver or parallel.Driver(),
  )


def _value_and_grad(
    loss: Callable[..., Any], params: Any, key: jax.Array, ours: Any, batch: Any
) -> Any:
  """Returns (value, metrics), gradient by the trained leaves `ours` of params."""
  value_of = lambda ours: loss(averaging.joined(params, ours), batch, key)
  return jax.value_and_grad(value_of, has_aux=True)(ours)


def _mean(
    method: GradientMethod, of: Callable[..., Any], batch: Any, ours: Any
) -> Any:
  """Returns `of` as means over the minibatch, of which each device has a part."""
  if method.num_micro_batches > 1:
    of = estimators.accumulate(of, method.num_micro_batches)
  return method.driver.average(of(ours, batch))


def _full_mean(
    method: GradientMethod, of: Callable[..., Any], full: Any, ours: Any
) -> Any:
  """Returns `of` as means over all examples, in chunks, shared by the devices."""
  driver, of = method.driver, parts.chunked(of, method.chunk)
  main, rest = _split(full, driver.num_devices)
  first = driver.average(of(ours, driver.shard(main)))
  if rest is None:
    return first
  sizes = [parts.batch_size(x) for x in (main, rest)]
  return parts.combined([first, of(ours, rest)], sizes)


def scaled(updates: Any, lr_scale: jax.Array) -> Any:
  """Returns the updates times the scale of plateaus, in their own dtypes."""
  return jax.tree.map(lambda u: lr_scale.astype(u.dtype) * u, updates)


def counted(steps: Steps, is_full: bool | jax.Array) -> Steps:
  """Returns the steps with one more, at the cost of a full gradient or not."""
  full = jnp.asarray(is_full, jnp.int32)
  return Steps(steps.full + full, steps.small + (1 - full))


def data_passes_of(steps: Steps, small_cost: float | jax.Array) -> jax.Array:
  """Returns the data passes of some steps, shape ()."""
  passes = steps.full + steps.small * small_cost
  return jnp.asarray(passes, jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class AdapterMethod:
  """Trains adapters by minibatch gradients; see `adapter_method`."""

  loss: Callable[..., Any]  # (params, factors, (batch, key)), see `inject`.
  # (params, *args) -> any, to the same of (params, factors, *args).
  enter: Callable[[Callable[..., Any]], Callable[..., Any]]
  chain: adapters.Chain
  passes_per_step: float
  driver: parallel.Driver
  ends_links: bool = True  # Within steps; else `next_link` does.

  def init(self, key: jax.Array, params: Any) -> AdapterMethodState:
    # The key of the chain in `GradientMethod`: both modes draw the same.
    state = adapters.init(self.chain, jax.random.fold_in(key, 1), params)
    return AdapterMethodState(state, jnp.zeros([]), jnp.ones([]))

  def step(
      self, state: AdapterMethodState, batch: Any, key: jax.Array, full: Any
  ) -> tuple[AdapterMethodState, dict[str, jax.Array]]:
    del full
    batch = self.driver.shard(batch)
    step = adapters.step if self.ends_links else adapters.move_factors
    inner, (value, metrics) = step(
        self.chain, state.chain, self.loss, (batch, key), scale=state.lr_scale
    )
    passes = data_passes_of(Steps(0, inner.count), self.passes_per_step)
    state = AdapterMethodState(inner, passes, state.lr_scale)
    metrics = task_lib.metrics_of(metrics)
    return state, {'loss': value, **metrics, 'data_passes': passes}

  def next_link(self, state: AdapterMethodState) -> AdapterMethodState:
    """Returns the state with its link ended; the state is consumed."""
    return state._replace(chain=adapters.next_link(self.chain, state.chain))

  def params(self, state: AdapterMethodState) -> Any:
    return adapters.merged_params(self.chain, state.chain)

  def params_of_large(
      self, state: AdapterMethodState, in_place: bool = False
  ) -> Any:
    return adapters.merged_each(self.chain, state.chain, in_place)

  def snapshot(self, state: AdapterMethodState) -> AdapterMethodState:
    kept = state.chain._replace(opt_state=(), other_states=())
    if self.chain.sketched:  # Its params are all.
      kept = kept._replace(factors={}, coins={}, remainders={}, masters={})
    return state._replace(chain=kept)

  def at(self, f: Callable[..., Any]) -> Callable[..., Any]:
    if self.chain.sketched:
      return lambda state, *args: f(state.chain.params, *args)
    adapted = self.enter(f)

    def at_state(state, *args):
      found = self.chain.adapted(state.chain.params)
      factors = adapters.scaled(state.chain.factors, found)
      return adapted(state.chain.params, factors, *args)

    return at_state

  def trained(self, params: Any) -> Any:
    adapted = adapted_leaves(self.chain, params)
    others = other_leaves(self.chain, params)
    return jax.tree.map(lambda a, o: a or o, adapted, others)

  def per_client(self, state: AdapterMethodState) -> Any:
    return none_marked(state)

  def frozen(self, state: AdapterMethodState) -> Any:
    merges = self.chain.policy.period is not None
    params = state.chain.params
    moves = (
        adapted_leaves(self.chain, params) if merges else none_marked(params)
    )
    others = other_leaves(self.chain, params)
    marks = jax.tree.map(lambda m, o: not (m or o), moves, others)
    unmarked = none_marked(state)
    return unmarked._replace(chain=unmarked.chain._replace(params=marks))


def adapter_method(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    policy: adapters.ChainPolicy,
    tx: optax.GradientTransformation,
    *,
    num_samples: int,
    batch_size: int,
    matrices: matrices_lib.Matrices | None = None,
    additive: bool = False,
    num_micro_batches: int = 1,
    others: Mapping[str, optax.GradientTransformation] | None = None,
    sketched: bool = False,
    keeps: str = '',
    driver: parallel.Driver | None = None,
) -> AdapterMethod:
  """Returns the method that trains adapters by minibatch gradients.

  Args:
    loss: (params, batch, key) -> (scalar mean over the batch, metrics).
    policy: which member of the LoRA family, see `adapters.ChainPolicy`.
    tx: optimiser of the factors, learning rate included.
    num_samples: N, examples of a data pass.
    batch_size: b, examples of a minibatch.
    matrices: what is a matrix.
    additive: whether factors enter by W + s L R, for losses that are no Linen
      model.
    num_micro_batches: parts in which a minibatch's gradient is accumulated.
    others: see `adapters.make_chain`.
    sketched: see `adapters.make_chain`.
    keeps: see `adapters.make_chain`.
    driver: None for one device.

  Returns:
    Its metrics are the loss before the step, those of `loss`, and data_passes so
    far.
  """
  driver = driver or parallel.Driver()
  chain = adapters.make_chain(
      policy,
      tx,
      matrices,
      num_micro_batches=num_micro_batches,
      average=driver.mapped,
      others=others,
      sketched=sketched,
      keeps=keeps,
  )
  # The key within the batch: noise is keyed by example, not by micro-batch.
  keyed = lambda params, both: loss(params, *both)
  enter: Any = inject.by_product
  if additive:
    enter = functools.partial(inject.by_addition, matrices=matrices)
  return AdapterMethod(
      enter(keyed), enter, chain, batch_size / num_samples, driver
  )


def make_policy(
    name: str, *, period: int | None, **fields: Any
) -> adapters.ChainPolicy:
  """Returns the policy of a named method.

  Args:
    name: 'lora', 'asymmetric_left', 'asymmetric_right', 'cola', 'rac_left',
      'rac_right' or 'bernoulli'; left and right name the frozen side.
    period: steps of a link, for the last four.
    **fields: of `adapters.ChainPolicy`; those that the method does not have are
      left out, so that the runs of a sweep can share them.

  Raises:
    ValueError: an unknown name, or a chain without a period.
  """
  if name not in ADAPTERS:
    raise ValueError(
        f'Expected method.name in {ADAPTERS} in adapter mode, got {name!r}.'
    )
  if name in ('lora', 'asymmetric_left', 'asymmetric_right'):
    period = None
  elif period is None:
    raise ValueError(f'Expected method.period >= 1 for {name}, got 0.')
  side = {'lora': None, 'cola': None}.get(name, name.rpartition('_')[2])
  unused = policies.ignored(side)
  used = {name: x for name, x in fields.items() if name not in unused}
  return adapters.ChainPolicy(period=period, side=side, **used)


def make_transformation(
    name: str,
    learning_rate: float | jax.Array | optax.Schedule,
    *,
    rank: int = 1,
    prob: float | jax.Array = 0.5,
    inner: optax.GradientTransformation | None = None,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
    matrices: matrices_lib.Matrices | None = None,
    **chain_args: Any,
) -> Callable[[jax.Array], optax.GradientTransformation]:
  """Returns key -> the transformation of a named method.

  Args:
    name: 'full' or 'probe' (no projection), 'rac_left', 'rac_right' or
      'bernoulli'.
    learning_rate: scalar or schedule.
    rank: dimension of the subspaces.
    prob: P(left) of 'bernoulli'.
    inner: momentum or Adam; in the subspace for chains, else on the gradient.
    clip_norm: bound of the estimate's global norm over trained leaves.
    weight_decay: decoupled decay of the matrices, where nothing is projected.
    matrices: what is a matrix.
    **chain_args: as for `chain.scale_by_bernoulli_chain`.

  Raises:
    ValueError: an unknown name.
  """
  known = ('rac_left', 'rac_right', 'bernoulli', *WHOLE)
  if name not in known:
    raise ValueError(
        f'Expected method.name in {known} in gradient mode, got {name!r}.'
    )
  if weight_decay and name not in WHOLE:
    raise ValueError(
        'Expected method.weight_decay=0 for chains in gradient mode, got'
        f' weight_decay={weight_decay}.'
    )

  def make_tx(key):
    txs = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    if name in WHOLE:
      txs.append(optax.identity() if inner is None else inner)
      if weight_decay:
        txs.append(
            optax.add_decayed_weights(
                weight_decay, lambda p: matrices_lib.mask(p, matrices)
            )
        )
    else:
      txs.append(
          chain_lib.scale_by_bernoulli_chain(
              key,
              rank=rank,
              prob=chain_prob(name, prob),
              inner=inner,
              matrices=matrices,
              **chain_args,
          )
      )
    return optax.chain(*txs, optax.scale_by_learning_rate(learning_rate))

  return make_tx


def chain_prob(name: str, prob: float | jax.Array) -> float | jax.Array:
  """Returns P(left) of 'rac_left', 'rac_right' or 'bernoulli'."""
  return {'rac_left': 1.0, 'rac_right': 0.0}.get(name, prob)


def trained_mask(
    name: str,
    matrices: matrices_lib.Matrices | None,
    others: str,
    params: Any,
) -> Any:
  """Returns the `trained` tree of gradient mode.

  Args:
    name: see `make_transformation`; of 'probe' no matrix moves.
    matrices: those that move.
    others: regular expression of what moves beside them; '' for nothing.
    params: tree of arrays or shapes.

  Raises:
    ValueError: others that select nothing, or a probe without them.
  """
  if name == 'probe' and not others:
    raise ValueError(
        "Expected method.others with method.name='probe', which trains nothing"
        " else, got others=''."
    )
  found = policies.resolve_others(params, (), (others,) if others else ())
  chosen = _marked(params, {i for p in found.values() for i in p.values()})
  if name == 'probe':
    return chosen
  moving = matrices_lib.mask(params, matrices)
  return jax.tree.map(lambda a, b: a or b, moving, chosen)


def adapted_leaves(chain: adapters.Chain, params: Any) -> Any:
  """Returns a tree of bool: the leaves that a chain of adapters adapts."""
  return _marked(params, {one.matrix.index for one in chain.adapted(params)})


def other_leaves(chain: adapters.Chain, params: Any) -> Any:
  """Returns a tree of bool: the leaves that a chain trains at full size."""
  found = policies.resolve_others(
      params, chain.adapted(params), tuple(chain.others)
  )
  return _marked(params, {i for p in found.values() for i in p.values()})


def _marked(params: Any, chosen: Collection[int]) -> Any:
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten([i in chosen for i in range(len(leaves))])


def none_marked(state: Any) -> Any:
  """Returns a tree of False."""
  return jax.tree.map(lambda _: False, state)


def all_true(params: Any) -> Any:
  """Returns the `trained` tree of all leaves."""
  return jax.tree.map(lambda _: True, params)


def _split(full: Any, count: int) -> tuple[Any, Any]:
  """Returns the largest part that `count` devices can share, and the rest."""
  size = parts.batch_size(full)
  cut = size - size % count
  if cut == size:
    return full, None
  take = lambda low, high: jax.tree.map(lambda x: x[low:high], full)
  return take(0, cut), take(cut, size)
