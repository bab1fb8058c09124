"""Recipes: a chain written down as its seeds and trained factors.

A recipe of T links holds a checksum of the base weights, the policy, the key and
the factors that each link trained: r n or m r numbers a matrix and link where
the weights are m n. `replay` draws the frozen factors anew and repeats the
merges, bit for bit where programs round alike (the same versions on the same
kind of device); the checksum of the result tells whether they did.

A sketched chain rounds its weights at each step. Its recipe keeps the increment of
each step, and replays bit for bit, too; or their sum over each link, as many
numbers as of adapters, and replays their merges: to the roundings, see `replay`.

On disk a recipe is a directory, `recipe.json` beside one `link_000000.npz` a
link (a step, of increments). Each file appears whole, so a run adds links while it
goes on.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import checks
from bernoulli_lora_jax import factors as factors_lib
from bernoulli_lora_jax import files
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax import merging
from bernoulli_lora_jax import policies
from bernoulli_lora_jax import sharded
from bernoulli_lora_jax import sketches

_VERSION = 1
_Factors = dict[str, np.ndarray]  # {'left:path' or 'right:path': array}


class Recipe(NamedTuple):
  """What rebuilds the weights of a chain from its base."""

  base: str  # `checksum` of the base weights.
  final: str  # Of the weights at the end; '' where it was not recorded.
  policy: adapters.ChainPolicy
  matrices: matrices_lib.Matrices | None
  key: jax.Array  # shape=(), typed PRNG key of the chain.
  num_steps: int  # Done; the last link may be an unfinished one.
  links: tuple[_Factors, ...]  # What was trained, the unchosen side zero.
  keeps: str = ''  # Of sketched chains: 'link', or 'step' with a link a step.


def checksum(params: Any) -> str:
  """Returns a hash of the paths, shapes, dtypes and bytes of a tree."""
  leaves = matrices_lib.named_leaves(params)
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in sorted(leaves.items(), key=lambda item: item[0]):
    array = np.asarray(leaf)
    digest.update(f'{path} {array.shape} {array.dtype}'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def trained_factors(
    state: adapters.AdapterState, chain: adapters.Chain
) -> _Factors:
  """Returns what the link of a state has trained, the unchosen side zero.

  Call it with the states after `period`, 2 `period`, ... steps, and after the
  last one; of a chain that keeps each step after each.

  Raises:
    ValueError: a factor that is not finite, by path; a sketched chain that keeps
      none.
  """
  _check_chain(chain)
  trained = state.trained if chain.keeps else state.factors
  adapters.check_factors(trained)
  factors = {}
  for one in chain.adapted(state.params):
    path = one.matrix.path
    for side in one.trained:
      factor = np.array(trained[path][side])  # No view of the state.
      if path in state.coins:
        is_left = np.asarray(state.coins[path])[..., None, None]
        factor = np.where(is_left == (side == 'right'), factor, 0)
      factors[f'{side}:{path}'] = factor
  return factors


def steps_of_link(chain: adapters.Chain) -> int | None:
  """Returns after how many steps a recipe has another link; None for the last."""
  return 1 if chain.keeps == 'step' else chain.policy.period


def replay(base: Any, recipe: Recipe) -> Any:
  """Returns the final weights of a chain.

  Args:
    base: the weights it started from.
    recipe: see `Recipe`.

  Returns:
    The weights, in base's dtypes.

  Raises:
    ValueError: a base that is not the recipe's, by its checksum; a link that
      lacks a factor, holds one of another shape, or one of no matrix.

  Warns:
    UserWarning: the result's checksum is not the recorded one, where it is to be.

  Guarantees:
    A sketched run of N steps in T links, of which the sum of each is kept, is met
    to the bound of its rounding, in ulps of the largest number that a weight was:
      nearest      (N + T) / 2
      stochastic   N + T; the difference is zero in the mean, with a standard
                   deviation of at most sqrt(N + T) / 2
      compensated  1 + (N + T) eps / 2, eps that of the weights' dtype
    (of float32 weights (N + T) / 2 in each mode: their sums are no wider), and to
    (K + 2 r + 2) 2^-24 times s |L| sum |dR|, for sums and products in float32 of links
    of K steps (with products of TF32 on GPUs 2^-10 of it besides).
  """
  found = checksum(base)
  if found != recipe.base:
    raise ValueError(
        f'Expected base weights of checksum {recipe.base}, as in the recipe, got'
        f' {found}: another base.'
    )
  _check_num_links(recipe)
  is_step = recipe.keeps == 'step'
  chain = adapters.make_chain(
      recipe.policy,
      optax.identity(),
      recipe.matrices,
      sketched=is_step,
      keeps='step' if is_step else '',
  )
  state = chain.init(recipe.key, base)
  add = functools.partial(_merge_link, keeps=recipe.keeps)
  add = _add_step if is_step else add
  merge = jax.jit(
      lambda state, trained: sharded.automatic(
          lambda state, trained: add(chain, state, trained),
          state,
          trained,
          out=lambda: sharded.specs(state),
      )
  )
  for number, link in enumerate(recipe.links):
    _check_link(chain, state, link, number)
    count = min((number + 1) * _period(recipe), recipe.num_steps)
    count = number if is_step else count
    state = merge(
        state._replace(count=jnp.asarray(count, jnp.int32)),
        {name: jnp.asarray(factor) for name, factor in link.items()},
    )
  result = checksum(state.params)
  is_exact = recipe.keeps != 'link'
  if is_exact and recipe.final and result != recipe.final:
    warnings.warn(
        f'Replayed weights of checksum {result}, recorded was {recipe.final}:'
        ' equal up to rounding at best. Replay on the device and versions of the'
        ' run for equal bits.',
        stacklevel=2,
    )
  return state.params


def link_factors(recipe: Recipe, params: Any) -> list[merging.Factors]:
  """Returns the factors of each link, frozen ones drawn anew.

  Their products are what the links added to the weights before any rounding.

  Args:
    recipe: see `Recipe`.
    params: weights of its model, or their shapes: values are not looked at.

  Returns:
    {path: {'left': (*batch, m, r), 'right': (*batch, r, n)}} a link, on the host,
    the scale s in the right one.

  Raises:
    ValueError: a link that lacks a factor, holds one of another shape, or one of
      no matrix.
  """
  _check_num_links(recipe)
  chain = adapters.make_chain(recipe.policy, optax.identity(), recipe.matrices)
  state = jax.eval_shape(chain.init, recipe.key, params)
  found = chain.adapted(state.params)

  @jax.jit
  def draw(count, trained):
    at = state._replace(key=recipe.key, count=count)
    return adapters.scaled(_drawn(chain, at, trained, recipe.keeps)[0], found)

  for number, link in enumerate(recipe.links):
    _check_link(chain, state, link, number)
  links: list[merging.Factors] = []
  for number, link in enumerate(_sums(recipe)):
    count = jnp.asarray((number + 1) * _period(recipe), jnp.int32)
    pairs = draw(count, {k: jnp.asarray(v) for k, v in link.items()})
    host = lambda pair: {
        side: np.asarray(pair[side]) for side in ('left', 'right')
    }
    links.append({path: host(pair) for path, pair in pairs.items()})
  return links


def make_recipe(
    base: Any,
    chain: adapters.Chain,
    key: jax.Array,
    links: Sequence[_Factors],
    final: adapters.AdapterState,
) -> Recipe:
  """Returns the recipe of a finished chain.

  Args:
    base: the weights that it started from.
    chain: as trained.
    key: as given to `chain.init`.
    links: `trained_factors` of each link (step), the last one included.
    final: state at the end.

  Raises:
    ValueError: a base of other paths or shapes than the state's.
  """
  adapters.check_shapes(final.params, base)
  _check_chain(chain)
  return Recipe(
      checksum(base),
      checksum(jax.jit(chain.params)(final)),
      chain.policy,
      chain.matrices,
      key,
      int(final.count),
      tuple(links),
      chain.keeps,
  )


def _check_chain(chain: adapters.Chain) -> None:
  if chain.sketched and not chain.keeps:
    raise ValueError(
        f'Expected keeps in {adapters.KEPT} of a sketched chain for a recipe, which'
        " stores trained factors, got keeps=''."
    )
  if chain.others:
    raise ValueError(
        'Expected a chain without others for a recipe, which stores factors'
        f' alone, got others={list(chain.others)}: keep a checkpoint.'
    )


def save_recipe(
    directory: str | os.PathLike[str], recipe: Recipe, *, links: bool = True
) -> None:
  """Writes a recipe into a directory, which is made if need be.

  Args:
    directory: of the files.
    recipe: see `Recipe`.
    links: whether its links are written; False where `save_link` has.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for number, link in enumerate(recipe.links if links else ()):
    save_link(directory, number, link)
  for path in directory.glob('link_*.npz'):  # Of a longer chain before.
    number = path.stem.removeprefix('link_')
    if number.isdigit() and int(number) >= len(recipe.links):
      path.unlink()
  policy = {
      field.name: getattr(recipe.policy, field.name)
      for field in dataclasses.fields(recipe.policy)
  }
  policy['rank'] = int(policy['rank'])  # Of NumPy, perhaps.
  policy['period'] = policy['period'] and int(policy['period'])
  policy['sketch'] = recipe.policy.sketch.name
  policy['prob'] = float(recipe.policy.prob)
  policy['targets'] = [dataclasses.asdict(t) for t in recipe.policy.targets]
  spec = recipe.matrices
  record = {
      'version': _VERSION,
      'base': recipe.base,
      'final': recipe.final,
      'policy': policy,
      # Its coin is tossed even at 0 and 1.
      'prob_is_array': isinstance(recipe.policy.prob, jax.Array),
      'matrices': None if spec is None else dataclasses.asdict(spec),
      'key': {
          'impl': str(jax.random.key_impl(recipe.key)),
          'data': np.asarray(jax.random.key_data(recipe.key)).tolist(),
      },
      'num_steps': recipe.num_steps,
      'num_links': len(recipe.links),
      'keeps': recipe.keeps,
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
  }
  files.write_json(directory / 'recipe.json', record)


def save_link(
    directory: str | os.PathLike[str], number: int, link: _Factors
) -> None:
  """Writes the trained factors of one link, whole or not at all."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / f'link_{number:06d}.npz'
  files.write_arrays(path, link)


def load_link(directory: str | os.PathLike[str], number: int) -> _Factors:
  """Reads the trained factors of one link.

  Raises:
    FileNotFoundError: no such link.
    ValueError: a damaged file.
  """
  path = pathlib.Path(directory) / f'link_{number:06d}.npz'
  if not path.exists():
    raise FileNotFoundError(f'Expected link {number} of the recipe in {path}.')
  return files.read_arrays(path)


def load_recipe(
    directory: str | os.PathLike[str], sketch: sketches.Sketch | None = None
) -> Recipe:
  """Reads a recipe.

  Args:
    directory: where `save_recipe` wrote it.
    sketch: the law of the frozen factors where it is none of `sketches`.

  Raises:
    FileNotFoundError: no recipe there, or a link that is missing.
    ValueError: a file that is damaged or of another version, or an unknown
      sketch.
  """
  directory = pathlib.Path(directory)
  path = directory / 'recipe.json'
  if not path.exists():
    raise FileNotFoundError(f'Expected a recipe in {path}.')
  try:
    record = json.loads(path.read_text())
  except ValueError as e:  # No JSON, or no text at all.
    raise ValueError(f'Expected {path} to be JSON: {e}.') from e
  if not isinstance(record, dict):
    raise ValueError(
        f'Expected {path} to hold the fields of a recipe, got'
        f' {type(record).__name__}.'
    )
  if record.get('version') != _VERSION:
    raise ValueError(
        f'Expected version {_VERSION} of a recipe in {path}, got'
        f' version={record.get("version")}.'
    )
  try:
    return _from_record(record, directory, sketch)
  except (KeyError, TypeError, AttributeError, IndexError) as e:
    raise ValueError(
        f'Expected {path} to hold the fields of a recipe:'
        f' {type(e).__name__} {e}.'
    ) from e


def _from_record(
    record: Mapping[str, Any],
    directory: pathlib.Path,
    sketch: sketches.Sketch | None,
) -> Recipe:
  policy = dict(record['policy'])
  name = policy['sketch']
  policy['sketch'] = sketches.by_name(name) if sketch is None else sketch
  for field in policies.ignored(policy['side']):  # Of older recipes.
    policy.pop(field, None)
  keeps = record.get('keeps', '')  # Older recipes are of adapters.
  checks.one_of(('', *adapters.KEPT), keeps=keeps)
  if record.get('prob_is_array') and 'prob' in policy:
    policy['prob'] = jnp.asarray(policy['prob'])
  if 'shared_frames' in policy:
    policy['shared_frames'] = tuple(policy['shared_frames'])
  policy['targets'] = tuple(adapters.Target(**t) for t in policy['targets'])
  return Recipe(
      record['base'],
      record['final'],
      adapters.ChainPolicy(**policy),
      _matrices(record['matrices']),
      jax.random.wrap_key_data(
          jnp.asarray(record['key']['data'], jnp.uint32),
          impl=re.sub(r'^PRNGSpec\("(.*)"\)$', r'\1', record['key']['impl']),
      ),
      record['num_steps'],
      tuple(load_link(directory, i) for i in range(record['num_links'])),
      keeps,
  )


def _matrices(record: Mapping[str, Any] | None) -> matrices_lib.Matrices | None:
  if record is None:
    return None
  rules = tuple(
      matrices_lib.Rule(
          rule['pattern'],
          tuple(rule['left']),
          tuple(rule['right']),
          tuple(rule['batch']),
      )
      for rule in record['rules']
  )
  return matrices_lib.Matrices(record['select'], rules, record['layer'])


def _period(recipe: Recipe) -> int:
  return recipe.policy.period or max(1, recipe.num_steps)


def _merge_link(
    chain: adapters.Chain,
    state: adapters.AdapterState,
    trained: _Factors,
    keeps: str,
) -> adapters.AdapterState:
  """Merges the link that ends at `state.count`."""
  factors, coins = _drawn(chain, state, trained, keeps)
  return chain.merge(state._replace(factors=factors, coins=coins))


def _add_step(
    chain: adapters.Chain, state: adapters.AdapterState, trained: _Factors
) -> adapters.AdapterState:
  """Moves the weights by the increments of the step that `state.count` begins."""
  state = adapters.begin_link(chain, state)
  increments = {
      one.matrix.path: {
          side: trained[f'{side}:{one.matrix.path}'] for side in one.trained
      }
      for one in chain.adapted(state.params)
  }
  return adapters.add_increments(chain, state, increments)


def _sums(recipe: Recipe) -> Sequence[_Factors]:
  """Returns what each link has trained, of increments their sums."""
  if recipe.keeps != 'step':
    return recipe.links
  period, plus = _period(recipe), functools.partial(jax.tree.map, np.add)
  ends = range(0, len(recipe.links), period)
  return [functools.reduce(plus, recipe.links[i : i + period]) for i in ends]


def _drawn(
    chain: adapters.Chain,
    state: adapters.AdapterState,
    trained: _Factors,
    keeps: str,
) -> tuple[merging.Pairs, dict[str, jax.Array]]:
  """Draws the link that ends at `state.count`, puts in what it trained."""
  policy = chain.policy
  found = chain.adapted(state.params)
  link = 0
  if policy.resample and policy.period is not None:
    link = (state.count - 1) // policy.period
  # Sketched coordinates are sorted: the order of what they trained.
  drawn = adapters.draw_link(state.key, link, found, policy, bool(keeps))
  whole = factors_lib.completed(drawn.factors, found)
  factors = {}
  for one in found:
    path = one.matrix.path
    pair = factors_lib.dense(whole[path], one.matrix)
    for side in one.trained:
      moves = True
      if path in drawn.coins:
        is_left = drawn.coins[path][..., None, None]
        moves = is_left if side == 'right' else ~is_left
      pair[side] = jnp.where(moves, trained[f'{side}:{path}'], pair[side])
    factors[path] = pair
  return factors, drawn.coins


def _check_num_links(recipe: Recipe) -> None:
  num_links = -(-recipe.num_steps // _period(recipe))
  if recipe.keeps == 'step':
    num_links = recipe.num_steps
  if len(recipe.links) != num_links:
    raise ValueError(
        f'Expected {num_links} links of period={recipe.policy.period} in'
        f' num_steps={recipe.num_steps}, keeps={recipe.keeps!r}, got'
        f' {len(recipe.links)}.'
    )


def _check_link(
    chain: adapters.Chain,
    state: adapters.AdapterState,
    link: _Factors,
    number: int,
) -> None:
  expected = {
      f'{side}:{one.matrix.path}'
      for one in chain.adapted(state.params)
      for side in one.trained
  }
  if link.keys() - expected:
    raise ValueError(
        f'Expected the factors {sorted(expected)} in link {number}, got also'
        f' {sorted(link.keys() - expected)}.'
    )
  known = state.trained if chain.keeps else state.factors
  for one in chain.adapted(state.params):
    for side in one.trained:
      name = f'{side}:{one.matrix.path}'
      expected = known[one.matrix.path][side].shape
      given = link[name].shape if name in link else None
      if given != expected:
        raise ValueError(
            f'Expected {name} of shape {expected} in link {number}, got {given}.'
        )
      if not np.isfinite(link[name]).all():
        raise ValueError(
            f'Expected finite factors, got others in {name} of link {number}.'
        )
