"""Methods: how params move. The other side of the narrow waist.

A `Method` is made for a loss and a driver and runs any task. Two kinds:
gradient mode, an estimator of the whole gradient (GD, SGD, PAGE, MVR) before an
optax transformation such as the Bernoulli chain, and adapter mode, a policy of
the LoRA family over pairs of thin factors. Both states have a field `lr_scale`
that multiplies every update, for the loop to lower on plateaus.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import averaging
from bernoulli_lora_jax import chain
from bernoulli_lora_jax import estimators
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import parts
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import parallel

# Metrics that are sums over all steps so far.
CUMULATIVE = ('data_passes', 'bits_up', 'bits_down')
ESTIMATORS = ('gd', 'sgd', 'page', 'mvr')
ADAPTERS = (
    'lora',
    'asymmetric_left',
    'asymmetric_right',
    'cola',
    'rac_left',
    'rac_right',
    'bernoulli',
)


class Method(NamedTuple):
  """How params move; `full` is the training split, the batch of grad f."""

  init: Callable[[jax.Array, Any], Any]  # (key, params) -> state
  # (state, batch, key, full) -> (state, metrics): loss, data_passes and more.
  step: Callable[..., tuple[Any, dict[str, jax.Array]]]
  params: Callable[[Any], Any]  # (state) -> params, merged.
  trained: Callable[[Any], Any]  # (params) -> tree of bool: leaves that move.
  passes_per_step: (
      float  # Data passes of a step in the mean: 1 a full gradient.
  )
  chain: adapters.Chain | None = None  # Of adapter mode.
  # (state) -> tree of bool: leaves with a leading axis of clients. None: none.
  per_client: Callable[[Any], Any] | None = None
  # (state) -> tree of bool: leaves that stay as they are at step 0. None: none.
  frozen: Callable[[Any], Any] | None = None


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
) -> Method:
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
    A `Method`; its metrics are the loss before the step (of the minibatch, with
    'gd' of all examples), those of `loss`, and data_passes so far (a full
    gradient is 1, a small step of PAGE 2 b / N).

  Raises:
    ValueError: an unknown estimator or an argument outside its range.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(
        f'Expected method.estimator in {ESTIMATORS}, got {estimator!r}.'
    )
  driver = parallel.make_driver('none') if driver is None else driver
  part = batch_size / num_samples
  prob = batch_size / (batch_size + num_samples)
  prob = prob if page_prob is None else page_prob
  small_cost = part if estimator == 'sgd' else 2 * part
  mean_cost = {
      'gd': 1.0,
      'page': prob + (1 - prob) * small_cost,
  }.get(estimator, small_cost)
  moving = lambda params: averaging.trained_part(params, trained)

  def tx(key: jax.Array) -> optax.GradientTransformationExtraArgs:
    first = {
        'page': lambda: estimators.page(jax.random.fold_in(key, 0), prob=prob),
        'mvr': lambda: estimators.mvr(momentum=momentum),
    }.get(estimator, optax.identity)
    return optax.chain(first(), make_tx(jax.random.fold_in(key, 1)))

  def value_and_grad(ours, batch, params, key):
    """Differentiates by the trained leaves `ours` of the params."""
    value_of = lambda ours: loss(averaging.joined(params, ours), batch, key)
    return jax.value_and_grad(value_of, has_aux=True)(ours)

  def mean_of(params, batch, key):
    """Returns ours -> ((value, metrics), gradient), means over the batch."""
    whole = lambda ours, batch: value_and_grad(ours, batch, params, key)
    if num_micro_batches > 1:
      whole = estimators.accumulate(whole, num_micro_batches)
    return lambda ours: driver.average(whole(ours, batch))

  def full_mean_of(params, full, key):
    whole = lambda ours, batch: value_and_grad(ours, batch, params, key)
    whole = parts.chunked(whole, chunk)

    def full_mean(ours):
      main, rest = _split(full, driver.num_devices)
      first = driver.average(whole(ours, driver.shard(main)))
      if rest is None:
        return first
      sizes = [parts.batch_size(x) for x in (main, rest)]
      return parts.combined([first, whole(ours, rest)], sizes)

    return full_mean

  def init(key, params):
    copy = jax.tree.map(jnp.array, params)  # The loop donates the state.
    zero = jnp.zeros([], jnp.int32)
    return GradientState(
        copy,
        tx(key).init(moving(copy)),
        jnp.zeros([]),
        jnp.ones([]),
        Steps(zero, jnp.copy(zero)),
    )

  def step(state, batch, key, full):
    mean = mean_of(state.params, driver.shard(batch), key)
    full_mean = full_mean_of(state.params, full, key)
    first = full_mean if estimator == 'gd' else mean
    ours = moving(state.params)
    (value, metrics), grads = first(ours)
    updates, opt_state = tx(jax.random.key(0)).update(
        grads,
        state.opt_state,
        ours,
        grad_fn=lambda ours: mean(ours)[1],
        full_grad_fn=lambda ours: full_mean(ours)[1],
    )
    is_full = estimator == 'gd'
    if estimator == 'page':
      is_full = optax.tree.get(opt_state, 'is_full')
    steps = counted(state.steps, is_full)
    updates = jax.tree.map(
        lambda u: state.lr_scale.astype(u.dtype) * u, updates
    )
    state = GradientState(
        averaging.joined(state.params, optax.apply_updates(ours, updates)),
        opt_state,
        data_passes_of(steps, small_cost),
        state.lr_scale,
        steps,
    )
    metrics = task_lib.metrics_of(metrics)
    return state, {'loss': value, **metrics, 'data_passes': state.data_passes}

  return Method(
      init,
      step,
      lambda state: jax.tree.map(jnp.copy, state.params),  # A donated state's.
      all_true if trained is None else trained,
      mean_cost,
      frozen=lambda state: none_marked(state)._replace(
          params=jax.tree.map(
              lambda t: not t, (trained or all_true)(state.params)
          )
      ),
  )


def counted(steps: Steps, is_full: bool | jax.Array) -> Steps:
  """Returns the steps with one more, at the cost of a full gradient or not."""
  full = jnp.asarray(is_full, jnp.int32)
  return Steps(steps.full + full, steps.small + (1 - full))


def data_passes_of(steps: Steps, small_cost: float | jax.Array) -> jax.Array:
  """Returns the data passes of some steps, shape ()."""
  passes = steps.full + steps.small * small_cost
  return jnp.asarray(passes, jnp.result_type(float))


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
    driver: parallel.Driver | None = None,
) -> Method:
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
    driver: None for one device.

  Returns:
    A `Method`; its metrics are the loss before the step, those of `loss`, and
    data_passes so far.
  """
  driver = parallel.make_driver('none') if driver is None else driver
  links = adapters.make_chain(
      policy,
      tx,
      matrices,
      num_micro_batches=num_micro_batches,
      average=driver.axis_name,
  )
  # The key within the batch: noise is keyed by example, not by micro-batch.
  keyed = lambda params, both: loss(params, *both)
  adapted = (
      inject.by_addition(keyed, matrices)
      if additive
      else inject.by_product(keyed)
  )

  def init(key, params):
    # The key of the chain in `gradient_method`: both modes draw the same.
    state = links.init(jax.random.fold_in(key, 1), params)
    return AdapterMethodState(state, jnp.zeros([]), jnp.ones([]))

  def frozen(state):
    base = state.chain.params
    merges = policy.period is not None
    moves = adapted_leaves(links, base)
    marks = jax.tree.map(lambda m: not (m and merges), moves)
    unmarked = none_marked(state)
    return unmarked._replace(chain=unmarked.chain._replace(params=marks))

  def step(state, batch, key, full):
    del full
    inner, (value, metrics) = links.step(
        state.chain, adapted, (driver.shard(batch), key), scale=state.lr_scale
    )
    passes = data_passes_of(Steps(0, inner.count), batch_size / num_samples)
    state = AdapterMethodState(inner, passes, state.lr_scale)
    metrics = task_lib.metrics_of(metrics)
    return state, {'loss': value, **metrics, 'data_passes': passes}

  return Method(
      init,
      step,
      lambda state: links.params(state.chain),
      lambda params: adapted_leaves(links, params),
      batch_size / num_samples,
      links,
      frozen=frozen,
  )


def make_policy(
    name: str,
    rank: int,
    period: int | None,
    prob: float | jax.Array,
    **kwargs: Any,
) -> adapters.ChainPolicy:
  """Returns the policy of a named method.

  Args:
    name: 'lora', 'asymmetric_left', 'asymmetric_right', 'cola', 'rac_left',
      'rac_right' or 'bernoulli'; left and right name the frozen side.
    rank: r.
    period: steps of a link, for the last four.
    prob: P(left) of 'bernoulli'.
    **kwargs: as for `adapters.ChainPolicy`.

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
  return adapters.ChainPolicy(
      rank=rank, period=period, side=side, prob=prob, **kwargs
  )


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
    name: 'full' (no projection), 'rac_left', 'rac_right' or 'bernoulli'.
    learning_rate: scalar or schedule.
    rank: dimension of the subspaces.
    prob: P(left) of 'bernoulli'.
    inner: momentum or Adam; in the subspace for chains, else on the gradient.
    clip_norm: bound of the estimate's global norm over trained leaves.
    weight_decay: decoupled decay of the matrices, for 'full' alone.
    matrices: what is a matrix.
    **chain_args: as for `chain.scale_by_bernoulli_chain`.

  Raises:
    ValueError: an unknown name.
  """
  known = ('rac_left', 'rac_right', 'bernoulli', 'full')
  if name not in known:
    raise ValueError(
        f'Expected method.name in {known} in gradient mode, got' f' {name!r}.'
    )
  if weight_decay and name != 'full':
    raise ValueError(
        'Expected method.weight_decay=0 for chains in gradient mode, got'
        f' weight_decay={weight_decay}.'
    )

  def make_tx(key):
    txs = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    if name == 'full':
      txs.append(optax.identity() if inner is None else inner)
      if weight_decay:
        txs.append(
            optax.add_decayed_weights(
                weight_decay, lambda p: matrices_lib.mask(p, matrices)
            )
        )
    else:
      txs.append(
          chain.scale_by_bernoulli_chain(
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


def matrices_only(
    matrices: matrices_lib.Matrices | None,
) -> Callable[[Any], Any]:
  """Returns the `trained` argument that freezes all that is no matrix."""
  return lambda params: matrices_lib.mask(params, matrices)


def adapted_leaves(chain: adapters.Chain, params: Any) -> Any:
  """Returns a tree of bool: the leaves that a chain of adapters adapts."""
  chosen = {one.matrix.index for one in chain.adapted(params)}
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
