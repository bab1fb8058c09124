"""Variance-reduced gradient estimators E3 (PAGE) and E4 (MVR) for optax.

They stand outermost in a chain and turn minibatch gradients into estimates G of
the full gradient, from two evaluations on the same minibatch:

    tx = optax.chain(
        bl.page(key, prob=q),
        bl.scale_by_bernoulli_chain(chain_key, rank=r),
        optax.scale_by_learning_rate(gamma))
    updates, state = tx.update(
        grad_fn(params), state, params,
        grad_fn=grad_fn,            # the minibatch gradient at other params
        full_grad_fn=full_grad_fn)  # the gradient of the whole objective

Symbols: W the params, g(W; I) the minibatch gradient, q = prob. Both keep the
previous params and G: two copies of the params, never the caller's own arrays.
The estimate is returned in the dtype of the incoming gradient; the state keeps it
in the dtype of the params or in `accumulator_dtype`, whatever the gradient's. They
refuse `optax.masked`,
`optax.partition` and `optax.MultiSteps`, under which W and g(W; I) would no
longer belong together.

Reference: Li et al., PAGE, arXiv 2008.10898; Cutkosky and Orabona, STORM,
arXiv 1905.10018; Sokolov et al., Bernoulli-LoRA, arXiv 2508.03820.
"""

from collections.abc import Callable
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bernoulli_lora_jax import checks
from bernoulli_lora_jax import matrices
from bernoulli_lora_jax import parts

GradFn = Callable[[Any], Any]
accumulate = parts.accumulate


def page_estimate(grad: Any, previous_grad: Any, estimate: Any) -> Any:
  """Returns G + g(W+; I) - g(W; I), the small step of E3."""
  return jax.tree.map(
      lambda new, old, g: g + (new - old), grad, previous_grad, estimate
  )


def mvr_estimate(
    grad: Any, previous_grad: Any, estimate: Any, momentum: float | jax.Array
) -> Any:
  """Returns g(W+; xi) + momentum (G - g(W; xi)), E4 with b = 1 - momentum."""
  return _wide(
      grad,
      estimate,
      jax.tree.map(
          lambda new, old, g: new + momentum * (g - old),
          grad,
          previous_grad,
          estimate,
      ),
  )


class PageState(NamedTuple):
  """State of `page`."""

  count: jax.typing.ArrayLike  # shape=(), int32; updates applied so far.
  key: jax.Array  # shape=(), typed PRNG key; folded with count.
  is_full: jax.Array  # shape=(), bool; the last estimate was a full gradient.
  params: Any  # W at the last update, shaped like the params.
  estimate: Any  # G of the last update, shaped like the params.


class MvrState(NamedTuple):
  """State of `mvr`."""

  count: jax.typing.ArrayLike  # shape=(), int32; updates applied so far.
  params: Any  # W at the last update, shaped like the params.
  estimate: Any  # G of the last update, shaped like the params.


def page(
    key: jax.Array,
    *,
    prob: float | jax.Array,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Estimates the gradient by PAGE (E3).

  With probability `prob`, one coin for the whole model, and at the first step,
  G is the full gradient; otherwise G + g(W+; I) - g(W; I). The full gradient is
  computed only when the coin asks for it (not so under `vmap`, which turns the
  choice into a select: share the coins or use `lax.map`).

  Args:
    key: typed PRNG key of the coins.
    prob: q in (0, 1]; customary is batch_size / (batch_size + num_samples).
    accumulator_dtype: of the estimate in the state; None: that of the params. Over
      params in low precision with gradients in float32, float32 keeps what a sum
      of small differences would lose. Static under `optax.inject_hyperparams`.

  Returns:
    A transformation whose `update(updates, state, params, *, grad_fn,
    full_grad_fn)` takes the minibatch gradient at `params` as updates, `grad_fn`
    (params -> gradient on the same minibatch) and `full_grad_fn` (params ->
    gradient of the whole objective).

  Raises:
    ValueError: prob outside (0, 1]; at init, a masked tree or `MultiSteps`; at
      update, params or one of the functions missing.

  Guarantees:
    prob=1 is the full gradient exactly.
    G - grad f(W) is a martingale difference off the full steps: in the mean
      over minibatches G+ - G = grad f(W+) - grad f(W).

  References:
    Li et al., PAGE, arXiv 2008.10898, Algorithm 1.
  """
  checks.within('(0, 1]', prob=prob)

  def init(params):
    check_outermost(params, 'page')
    return PageState(
        jnp.zeros([], jnp.int32),
        jnp.copy(key),  # Copies, so that a caller may donate the state.
        jnp.zeros([], bool),
        _owned(params),
        optax.tree.zeros_like(_owned(params), accumulator_dtype),
    )

  def update(
      updates, state, params=None, *, grad_fn=None, full_grad_fn=None, **extra
  ):
    del extra
    params = _given('page', 'params', params)
    grad_fn = _given('page', 'grad_fn', grad_fn)
    full_grad_fn = _given('page', 'full_grad_fn', full_grad_fn)
    updates = jax.tree.map(jnp.asarray, updates)  # Python numbers too.
    coin = jax.random.bernoulli(
        jax.random.fold_in(state.key, state.count), prob
    )
    is_full = coin | (state.count == 0)
    estimate = jax.lax.cond(
        is_full,
        lambda: _wide(updates, state.estimate, full_grad_fn(params)),
        lambda: page_estimate(
            updates, _like(updates, grad_fn(state.params)), state.estimate
        ),
    )
    count = optax.safe_increment(state.count)
    return _like(updates, estimate), PageState(
        count,
        state.key,
        is_full,
        _owned(params),
        _owned(_like(state.estimate, estimate)),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def mvr(
    *,
    momentum: float | jax.Array,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Estimates the gradient by momentum variance reduction (MVR, STORM; E4).

  G+ = g(W+; xi) + momentum (G - g(W; xi)), from the incoming gradient at the
  first step.

  Args:
    momentum: 1 - b in [0, 1), where b is the papers' parameter.
    accumulator_dtype: of the estimate in the state; None: that of the params. Over
      params in low precision with gradients in float32, float32 keeps what a sum
      of small differences would lose. Static under `optax.inject_hyperparams`.

  Returns:
    A transformation whose `update(updates, state, params, *, grad_fn)` takes
    the minibatch gradient at `params` as updates and `grad_fn` (params ->
    gradient on the same minibatch).

  Raises:
    ValueError: momentum outside [0, 1); at init, a masked tree or `MultiSteps`;
      at update, params or grad_fn missing.

  Guarantees:
    momentum=0 is SGD exactly.

  References:
    Cutkosky and Orabona, STORM, arXiv 1905.10018, equation (2).
  """
  checks.within('[0, 1)', momentum=momentum)

  def init(params):
    check_outermost(params, 'mvr')
    return MvrState(
        jnp.zeros([], jnp.int32),
        _owned(params),
        optax.tree.zeros_like(_owned(params), accumulator_dtype),
    )

  def update(updates, state, params=None, *, grad_fn=None, **extra):
    del extra
    params = _given('mvr', 'params', params)
    grad_fn = _given('mvr', 'grad_fn', grad_fn)
    updates = jax.tree.map(jnp.asarray, updates)  # Python numbers too.
    estimate = jax.lax.cond(
        state.count == 0,
        lambda: _wide(updates, state.estimate, updates),
        lambda: mvr_estimate(
            updates,
            _like(updates, grad_fn(state.params)),
            state.estimate,
            momentum,
        ),
    )
    count = optax.safe_increment(state.count)
    return _like(updates, estimate), MvrState(
        count, _owned(params), _owned(_like(state.estimate, estimate))
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _like(updates: Any, grad: Any) -> Any:
  """Casts a gradient to the dtypes of the updates."""
  cast = lambda u, g: jnp.asarray(g, jnp.result_type(u))
  return jax.tree.map(cast, updates, grad)


def _wide(grad: Any, estimate: Any, tree: Any) -> Any:
  """Casts a tree to the wider of the dtypes of a gradient and of its estimate."""
  cast = lambda g, e, x: jnp.asarray(x, jnp.promote_types(g.dtype, e.dtype))
  return jax.tree.map(cast, grad, estimate, tree)


def _owned(tree: Any) -> Any:
  """Returns copies as arrays: a state that is donated deletes what it holds."""
  return jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), tree)


def _given(name: str, argument: str, value: Any) -> Any:
  if value is None:
    raise ValueError(
        f'Expected {name}.update to be given {argument}, got None: write'
        ' tx.update(grads, state, params, grad_fn=..., ...).'
    )
  return value


def check_outermost(params: Any, name: str) -> None:
  """Raises where the estimator would silently see other params or gradients."""
  matrices.check_unmasked(params, name)
  frame = sys._getframe()
  while frame is not None:  # MultiSteps gives its inner transformation no sign.
    if isinstance(frame.f_locals.get('self'), optax.MultiSteps):
      raise ValueError(
          f'Expected {name} outside of optax.MultiSteps, which would mix'
          ' gradients of different params: use bl.accumulate for grad_fn.'
      )
    frame = frame.f_back
