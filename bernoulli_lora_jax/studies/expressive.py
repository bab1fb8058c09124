"""Error against rank: adapters by construction and by gradient descent.

Frozen nets of Lbar P layers are adapted to targets of Lbar layers. Of the
linear product of one part the least error is known (`expressive.linear_error`);
of the ReLU net it is not, and descent on samples may use what the construction
leaves linear.

Reference: Zeng and Lee, The expressive power of low-rank adaptation, arXiv
2310.17513.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import tqdm

from bernoulli_lora_jax import checks
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.theory import expressive
from bernoulli_lora_jax.training import figures

KINDS = ('orthogonal', 'gaussian')
_CURVES = ('closed form', 'construction', 'descent')  # Of `figures.style`.
_FLOOR = 1e-16  # Of logarithms: what is smaller is rounding.
_BOUND = 1.0  # Inputs are uniform on |x_j| <= 1.
_LEARNING_RATE = 0.01  # Of Adam, decayed to zero by a cosine.


def errors(
    *,
    width: int = 16,
    lengths: Sequence[int] = (1, 2, 4),
    target_depth: int = 2,
    num_seeds: int = 5,
    num_samples: int = 256,
    linear_steps: int = 300,
    net_steps: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> study.Study:
  """Returns errors against rank, for orthogonal and Gaussian frozen kernels.

  Ranks are the four quarters of the threshold. Gaussian kernels have variance
  1 / D, as the targets always have; biases are Gaussian of deviation 0.1.
  Descent starts with Delta = 0, the right factors Gaussian: L-BFGS on the
  product of one part, Adam on factors and biases of the net. All of it is in
  float64; the default sizes took 55 seconds on two cores.

  Args:
    width: D >= 2.
    lengths: P, frozen layers for each layer of the target.
    target_depth: Lbar >= 1.
    num_seeds: nets drawn of each kind, >= 1.
    num_samples: inputs that descent on the net sees, and as many fresh ones on
      which the error of both nets is taken.
    linear_steps: of L-BFGS.
    net_steps: of Adam.
    seed: of all draws.
    progress: whether to show a bar.

  Returns:
    `Study`: errors of the product relative to ||E||_F, of the net as the root
    of the mean square relative to the target's deviation; means are geometric,
    in the figures with the range over seeds.

  Raises:
    ValueError: a number outside its range.
  """
  checks.at_least(2, width=width)
  checks.at_least(1, **{'min(lengths)': min(lengths, default=0)})
  checks.at_least(
      1,
      target_depth=target_depth,
      num_seeds=num_seeds,
      num_samples=num_samples,
      linear_steps=linear_steps,
      net_steps=net_steps,
  )
  cells = []  # One a kind, length and rank; arrays over seeds.
  cases = [(length, kind) for length in lengths for kind in KINDS]
  with jax.enable_x64(True):
    for length, kind in tqdm.tqdm(
        cases, desc='expressive', unit='case', disable=not progress
    ):
      depth = length * target_depth
      threshold = expressive.rank_threshold(width, depth, target_depth)
      ranks = sorted({max(1, round(threshold * i / 4)) for i in (1, 2, 3, 4)})
      key = jax.random.fold_in(jax.random.key(seed), length)
      keys = jax.random.split(
          jax.random.fold_in(key, KINDS.index(kind)), num_seeds
      )
      draws = [
          _draw(k, kind, width, depth, target_depth, num_samples) for k in keys
      ]
      starts = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
      built = [[_construct(draw, rank) for rank in ranks] for draw in draws]
      stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *draws)
      args = stacked, jnp.asarray(ranks), starts
      linear = _over_ranks(_descend_product, linear_steps)(*args)
      net = _over_ranks(_descend_net, net_steps)(*args)
      for i, rank in enumerate(ranks):
        cells.append(
            {
                'frozen': kind,
                'length': length,
                'rank': rank,
                'threshold': threshold,
                **{k: np.array([b[i][k] for b in built]) for k in built[0][i]},
                'descent': np.asarray(linear[:, i]),
                'net descent': np.asarray(net[:, i, 0]),
                'net descent, learnt': np.asarray(net[:, i, 1]),
            }
        )
  drawn = {
      'product': _plot(
          cells,
          lengths,
          _CURVES,
          'product of a part: ||A_1...A_P - T|| / ||E||, Frobenius',
      ),
      'net': _plot(
          cells,
          lengths,
          ['net construction', 'net descent'],
          'ReLU net, fresh samples: RMS error / deviation',
      ),
  }
  return study.Study(
      {'error against rank': [_row(cell) for cell in cells]},
      drawn,
      _notes(cells),
  )


def _draw(
    key: jax.Array,
    kind: str,
    width: int,
    depth: int,
    target_depth: int,
    num_samples: int,
) -> dict[str, Any]:
  """Returns the frozen net, the target, inputs to learn from and to test."""
  keys = jax.random.split(jax.random.fold_in(key, 0), 5)
  normal = lambda k, *shape: jax.random.normal(k, shape) / math.sqrt(shape[-1])
  frozen = normal(keys[0], depth, width, width)
  if kind == 'orthogonal':
    q, r = jnp.linalg.qr(frozen)
    # Signs of the diagonal make the law uniform.
    frozen = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
  inputs = jax.random.uniform(
      keys[4], (2, num_samples, width), minval=-_BOUND, maxval=_BOUND
  )
  return {
      'frozen': expressive.Layer(
          frozen, 0.1 * jax.random.normal(keys[1], (depth, width))
      ),
      'target': expressive.Layer(
          normal(keys[2], target_depth, width, width),
          0.1 * jax.random.normal(keys[3], (target_depth, width)),
      ),
      'inputs': inputs[0],
      'fresh': inputs[1],
  }


def _construct(draw: dict[str, Any], rank: int) -> dict[str, float]:
  """Returns the construction's errors, of the first part and of the net."""
  frozen, target = (
      [expressive.Layer(*layer) for layer in zip(*draw[name], strict=True)]
      for name in ('frozen', 'target')
  )
  adapted = expressive.adapt(frozen, target, rank=rank, bound=_BOUND)
  found = expressive.report(frozen, target, adapted, draw['fresh'])
  part = adapted.parts[0]
  discrepancy = target[0].kernel - _product([frozen[i].kernel for i in part])
  scale = float(np.linalg.norm(discrepancy))
  outputs = expressive.apply(target, draw['fresh'])
  merged = expressive.merge(frozen, adapted)
  gap = expressive.apply(merged, draw['fresh']) - outputs
  return {
      'closed form': found.expected_errors[0] / scale,
      'construction': found.linear_errors[0] / scale,
      'net construction': float(
          np.linalg.norm(gap) / np.linalg.norm(outputs - outputs.mean(0))
      ),
      'largest net error': found.error,
      'condition': found.condition,
  }


@functools.cache  # One compilation for both kinds.
def _over_ranks(one: Callable, num_steps: int) -> Callable:
  """Returns (draws, ranks, keys) -> errors (seeds, ranks, ...), jitted."""
  many = jax.vmap(
      jax.vmap(
          lambda draw, rank, key: one(draw, rank, key, num_steps),
          (None, 0, None),
      ),
      (0, None, 0),
  )
  return jax.jit(many)


def _descend_product(
    draw: dict[str, Any], rank: jax.Array, key: jax.Array, num_steps: int
) -> jax.Array:
  """Returns the product's relative error where L-BFGS on all factors ends."""
  length = len(draw['frozen'].kernel) // len(draw['target'].kernel)
  kernels, target = draw['frozen'].kernel[:length], draw['target'].kernel[0]
  scale = jnp.sum((target - _product(kernels)) ** 2)

  def loss(pairs):
    adapted = kernels + _delta(pairs, rank)
    return jnp.sum((_product(adapted) - target) ** 2) / scale

  return jnp.sqrt(
      loss(_descend(loss, _start(kernels, key), optax.lbfgs(), num_steps))
  )


def _descend_net(
    draw: dict[str, Any], rank: jax.Array, key: jax.Array, num_steps: int
) -> jax.Array:
  """Returns the net's relative errors where Adam ends: fresh inputs, learnt."""
  frozen, target = draw['frozen'], draw['target']

  def loss(params, inputs):
    outputs = _apply(target, inputs)
    adapted = expressive.Layer(
        frozen.kernel + _delta(params['pairs'], rank), params['biases']
    )
    gap = _apply(adapted, inputs) - outputs
    return jnp.sum(gap**2) / jnp.sum(
        (outputs - jnp.mean(outputs, 0, keepdims=True)) ** 2
    )

  params = {'pairs': _start(frozen.kernel, key), 'biases': frozen.bias}
  schedule = optax.cosine_decay_schedule(_LEARNING_RATE, num_steps)
  params = _descend(
      lambda p: loss(p, draw['inputs']), params, optax.adam(schedule), num_steps
  )
  return jnp.sqrt(
      jnp.stack([loss(params, draw['fresh']), loss(params, draw['inputs'])])
  )


def _descend(
    loss: Callable[[Any], jax.Array],
    params: Any,
    tx: optax.GradientTransformation,
    num_steps: int,
) -> Any:
  """Returns the params after num_steps full gradients."""
  tx = optax.with_extra_args_support(tx)

  def step(carry, _):
    params, state = carry
    value, grad = jax.value_and_grad(loss)(params)
    updates, state = tx.update(
        grad, state, params, value=value, grad=grad, value_fn=loss
    )
    return (optax.apply_updates(params, updates), state), None

  carry = (params, tx.init(params))
  return jax.lax.scan(step, carry, length=num_steps)[0][0]


def _start(kernels: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
  """Returns factors of full size with Delta = 0; `_delta` cuts them."""
  right = jax.random.normal(key, kernels.shape) / math.sqrt(kernels.shape[-1])
  return {'left': jnp.zeros_like(kernels), 'right': right}


def _delta(pairs: dict[str, jax.Array], rank: jax.Array) -> jax.Array:
  """Returns left @ right of the first `rank` terms, (layers, D, D)."""
  kept = jnp.arange(pairs['left'].shape[-1]) < rank
  return jnp.where(kept[None, None], pairs['left'], 0) @ pairs['right']


def _product(kernels: Any) -> Any:
  product = kernels[0]
  for kernel in kernels[1:]:
    product = product @ kernel
  return product


def _apply(net: expressive.Layer, x: jax.Array) -> jax.Array:
  """`expressive.apply` of stacked layers, traced."""
  last = len(net.kernel) - 1
  for i in range(last + 1):
    x = x @ net.kernel[i] + net.bias[i][None]
    x = jax.nn.relu(x) if i < last else x
  return x


def _log_mean(values: np.ndarray) -> float:
  """Returns the geometric mean."""
  return math.exp(np.mean(np.log(np.maximum(values, _FLOOR))))


def _row(cell: dict[str, Any]) -> dict[str, Any]:
  mean = lambda name: float(f'{_log_mean(cell[name]):.3g}')
  return {
      'frozen': cell['frozen'],
      'layers a part': cell['length'],
      'rank': cell['rank'],
      'threshold': cell['threshold'],
      'closed form': mean('closed form') if cell['closed form'].any() else 0.0,
      'construction': mean('construction'),
      'descent': mean('descent'),
      'net, construction': mean('net construction'),
      'net, descent': mean('net descent'),
      'net, descent, samples learnt': mean('net descent, learnt'),
      'largest net error, construction': float(
          f'{cell["largest net error"].max():.3g}'
      ),
      'condition, median': float(f'{np.median(cell["condition"]):.3g}'),
      'condition, largest': float(f'{cell["condition"].max():.3g}'),
  }


def _plot(
    cells: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    names: Sequence[str],
    ylabel: str,
) -> matplotlib.figure.Figure:
  """Returns error against rank, a row a kind and a column a length."""
  figure = matplotlib.figure.Figure(
      figsize=(3.2 * len(lengths) + 1.2, 6.4), layout='constrained'
  )
  panels = figure.subplots(
      len(KINDS), len(lengths), sharex='col', sharey=True, squeeze=False
  )
  lines = {}
  for row, kind in zip(panels, KINDS, strict=True):
    for panel, length in zip(row, lengths, strict=True):
      chosen = [
          cell
          for cell in cells
          if (cell['frozen'], cell['length']) == (kind, length)
      ]
      x = [cell['rank'] for cell in chosen]
      for name in names:
        i = _CURVES.index(name.removeprefix('net '))
        values = np.stack([np.maximum(cell[name], _FLOOR) for cell in chosen])
        means = np.array([_log_mean(cell[name]) for cell in chosen])
        lines[name] = panel.errorbar(
            x,
            means,
            np.maximum([means - values.min(1), values.max(1) - means], 0),
            capsize=3,
            markersize=11 - 3 * i,  # Curves that coincide stay visible.
            markerfacecolor='none' if i < 2 else figures.style(i)['color'],
            **figures.style(i),
        )
      panel.axvline(chosen[0]['threshold'], color='0.6', linewidth=1)
      panel.set_yscale('log')
      panel.set_xticks(x)
      panel.grid(True, linewidth=0.4, alpha=0.6)
      panel.set_title(f'{kind}, P = {length}', fontsize=10)
  for panel in panels[-1]:
    panel.set_xlabel('rank R of each adapter')
  figure.supylabel(ylabel, fontsize=10)
  figure.legend(
      lines.values(),
      [name.removeprefix('net ') for name in lines],
      loc='outside lower center',
      ncols=len(names),
      title='geometric mean, bar: all seeds; grey line: threshold'
      f'; below {_FLOOR:g} drawn at {_FLOOR:g}',
      title_fontsize=9,
      fontsize=9,
  )
  return figure


def _notes(cells: Sequence[dict[str, Any]]) -> list[str]:
  """Returns what the numbers say."""
  below = [cell for cell in cells if cell['rank'] < cell['threshold']]
  at = [cell for cell in cells if cell['rank'] == cell['threshold']]
  gather = lambda chosen, name: np.concatenate([c[name] for c in chosen])
  notes = []
  for kind in KINDS:
    chosen = [cell for cell in at if cell['frozen'] == kind]
    notes.append(
        f'At the threshold the construction on {kind} kernels differs from the'
        f' target by at most {gather(chosen, "largest net error").max():.1e},'
        ' with condition numbers up to'
        f' {gather(chosen, "condition").max():.1e}.'
    )
  if below:
    closed = gather(below, 'closed form')
    built = gather(below, 'construction') / closed
    descent = gather(below, 'descent') / closed
    notes.append(
        'Below the threshold the product of the construction is the closed form'
        f' to a relative {np.max(np.abs(built - 1)):.1e}; descent ends at'
        f' {descent.min():.6f} to {descent.max():.3g} times it (median'
        f' {np.median(descent):.6f}); by Eckart and Young 1 is the least.'
    )
  linear = gather(at, 'descent')
  notes.append(
      'At the threshold descent on the product ends at relative errors'
      f' {linear.min():.1e} to {linear.max():.1e}, the construction at'
      f' {gather(at, "construction").max():.1e} or less.'
  )
  for where, chosen in (('Below', below), ('At', at)):
    if not chosen:
      continue
    ratio = gather(chosen, 'net descent') / np.maximum(
        gather(chosen, 'net construction'), _FLOOR
    )
    better = int(np.sum(ratio < 1))
    mean = math.exp(np.mean(np.log(ratio)))
    notes.append(
        f'{where} the threshold descent on the ReLU net is better than the'
        f' construction in {better} of {len(ratio)} cases, worse in'
        f' {len(ratio) - better}; its error is {mean:.2g} times as large in the'
        ' geometric mean (on the samples it learnt from,'
        f' {_log_mean(gather(chosen, "net descent, learnt")):.2g} of the'
        ' deviation).'
    )
  return notes
