"""Adapters of decoders against PEFT: what it computes of ours, we of its."""

import json
import pathlib
import tempfile

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')

import decoders  # noqa: E402  (what may be missing comes first)
import reference  # noqa: E402

from bernoulli_lora_jax import adapters  # noqa: E402
from bernoulli_lora_jax import export  # noqa: E402
from bernoulli_lora_jax import inject  # noqa: E402
from bernoulli_lora_jax import recipes  # noqa: E402
from bernoulli_lora_jax.models import decoder  # noqa: E402
from bernoulli_lora_jax.models import hf  # noqa: E402
from bernoulli_lora_jax.models import peft_format  # noqa: E402
from bernoulli_lora_jax.models import peft_import  # noqa: E402

FAMILIES = tuple(decoders.CONFIGS)
# Two programs in float32, logits of size 1 to 10: measured are differences of up to
# 1e-5.
TOL = 5e-5


def our_logits(config, params, tokens):
  return np.asarray(decoder.logits(decoder.apply(config, params, tokens)))


def chain_links(model, select, num_links=3, seed=0, scale=0.1):
  """Returns random finished links of what a pattern selects: rank 2, scaled."""
  rng = np.random.default_rng(seed)
  policy = adapters.ChainPolicy.lora(2)
  spec = decoder.matrices(model.config, select)
  chain = adapters.make_chain(policy, optax.sgd(0.1), spec)
  state = jax.eval_shape(chain.init, jax.random.key(0), model.params)
  draw = lambda x: scale * rng.normal(size=x.shape).astype(np.float32)
  return [jax.tree.map(draw, state.factors) for _ in range(num_links)]


class PeftTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(scratch)

  def write(self, name, **changes):
    return decoders.write(self.folder / 'base', name, **changes)

  def peft_model(self, folder, **options):
    base = reference.load(self.folder / 'base')
    return peft.PeftModel.from_pretrained(base, str(folder), **options)

  def peft_logits(self, folder, tokens):
    with torch.no_grad():
      given = torch.tensor(np.asarray(tokens)).long()
      return self.peft_model(folder)(given).logits.numpy()

  def added(self, params, thin, config):
    """Returns weights with the factors added, in NumPy."""
    factors = {
        path: {'left': -t.left, 'right': t.right} for path, t in thin.items()
    }
    spec = decoder.matrices(config, '^layers|lm_head')
    return adapters.unmerge(params, factors, spec)


class OutTest(PeftTest):

  @parameterized.product(name=FAMILIES, scan_layers=(True, False))
  def test_logits_of_links_of_every_family(self, name, scan_layers):
    model = hf.load(self.write(name), scan_layers=scan_layers)
    select = '^layers' if model.config.tied else '^layers|lm_head'
    links = chain_links(model, select)
    # Layer 0 of q_proj changes in one link alone, layer 2 of down_proj in none.
    for i, link in enumerate(links):
      for path, layer, in_links in (
          ('self_attn/q_proj', 0, (0,)),
          ('mlp/down_proj', 2, ()),
      ):
        if i in in_links:
          continue
        if scan_layers:
          link[f'layers/{path}/kernel']['right'][layer] = 0
        else:
          link[f'layers_{layer}/{path}/kernel']['right'][:] = 0
    thin = export.of_links(links)
    out = self.folder / 'out'
    rows = peft_format.save(out, thin, model)
    ranks = {row['module']: row['rank'] for row in rows}
    self.assertEqual(ranks['model.layers.0.self_attn.q_proj'], 2)
    self.assertEqual(ranks['model.layers.1.self_attn.q_proj'], 6)
    self.assertEqual(ranks['model.layers.2.mlp.down_proj'], 1)
    tokens = decoders.tokens(24)
    params = self.added(model.params, thin, model.config)
    ours = our_logits(model.config, params, tokens)
    base = our_logits(model.config, model.params, tokens)
    self.assertGreater(np.abs(ours - base).max(), 0.3)
    got = self.peft_logits(out, tokens)
    np.testing.assert_allclose(got, ours, atol=TOL, rtol=TOL)

  def test_ranks_of_layers_1_and_11(self):
    """A pattern of layers.1 is not one of layers.11, nor k_proj of q_proj."""
    model = hf.load(self.write('llama2', num_hidden_layers=12))
    rng = np.random.default_rng(1)
    thin = {}
    for name in ('q_proj', 'k_proj', 'v_proj'):
      ranks = rng.integers(1, 6, 12)
      ranks[1], ranks[11] = 5, 2
      left = 0.1 * rng.normal(size=(12, 32, 5)).astype(np.float32)
      right = 0.1 * rng.normal(size=(12, 5, 32)).astype(np.float32)
      for i, rank in enumerate(ranks):
        left[i, :, rank:] = 0
      path = f'layers/self_attn/{name}/kernel'
      thin[path] = export.Thin(left, right, ranks, np.zeros(12))
    out = self.folder / 'out'
    peft_format.save(out, thin, model)
    loaded = self.peft_model(out)
    for name in ('q_proj', 'k_proj', 'v_proj'):
      ranks = thin[f'layers/self_attn/{name}/kernel'].ranks
      for i in range(12):
        attn = loaded.base_model.model.model.layers[i].self_attn
        layer = getattr(attn, name)
        self.assertEqual(layer.r['default'], ranks[i])
        self.assertEqual(layer.scaling['default'], 1.0)
    tokens = decoders.tokens(16)
    params = self.added(model.params, thin, model.config)
    np.testing.assert_allclose(
        self.peft_logits(out, tokens),
        our_logits(model.config, params, tokens),
        atol=TOL,
        rtol=TOL,
    )

  @parameterized.parameters('peft', 'vllm')
  def test_some_layers_alone(self, style):
    """Modules of some layers are named in full: layers.1 is not layers.11."""
    model = hf.load(
        self.write('qwen3', num_hidden_layers=12), scan_layers=False
    )
    links = chain_links(model, '^layers_1/.*q_proj|^layers_3/.*up_proj')
    thin = export.of_links(links)
    out = self.folder / 'out'
    peft_format.save(out, thin, model, style=style)
    loaded = self.peft_model(out)
    adapted = [n for n, _ in loaded.named_modules() if n.endswith('lora_A')]
    self.assertLen(adapted, 2)
    tokens = decoders.tokens(16)
    params = self.added(model.params, thin, model.config)
    np.testing.assert_allclose(
        self.peft_logits(out, tokens),
        our_logits(model.config, params, tokens),
        atol=TOL,
        rtol=TOL,
    )

  @parameterized.product(name=FAMILIES)
  def test_one_padded_rank_and_bfloat16(self, name):
    model = hf.load(self.write(name))
    thin = export.of_links(chain_links(model, 'q_proj|down_proj'))
    tokens = decoders.tokens(16)
    out = self.folder / 'out'
    rows = peft_format.save(out, thin, model, style='vllm', dtype='bfloat16')
    config = json.loads((out / peft_format.CONFIG).read_text())
    self.assertEqual((config['r'], config['lora_alpha']), (8, 8))
    # Factors have 8 bits: relative errors of up to 2^-8 each.
    self.assertLess(max(row['rounding'] for row in rows), 2**-7)
    params = self.added(model.params, thin, model.config)
    ours = our_logits(model.config, params, tokens)
    got = self.peft_logits(out, tokens)
    apart = np.linalg.norm(got - ours) / np.linalg.norm(ours)
    self.assertBetween(apart, 1e-6, 0.02)

  def test_a_chain_that_trained(self):
    """Seeds and trained factors of Bernoulli-LoRA, in bfloat16, as an adapter."""
    model = hf.load(self.write('qwen2'), dtype=jnp.bfloat16)
    spec = decoder.matrices(model.config, 'q_proj|v_proj|gate_proj')
    policy = adapters.ChainPolicy.bernoulli(2, 3, alpha=4.0)
    chain = adapters.make_chain(policy, optax.adam(3e-2), spec)
    loss = inject.by_product(decoder.make_loss(model.config))
    key = jax.random.key(5)
    state = chain.init(key, model.params)
    step = jax.jit(lambda state, batch: chain.step(state, loss, batch)[0])
    links = []
    for i in range(1, 9):
      tokens = jnp.asarray(decoders.tokens(12, seed=i))
      state = step(state, {'tokens': tokens})
      if i % 3 == 0 or i == 8:
        links.append(recipes.trained_factors(state, chain))
    recipe = recipes.make_recipe(model.params, chain, key, links, state)
    thin = export.of_links(recipes.link_factors(recipe, model.params))
    tuned = chain.params(state)
    rows = export.report(thin, model.params, tuned, spec)
    self.assertEqual({row['rank'] for row in rows}, {6})
    out = self.folder / 'out'
    peft_format.save(out, thin, model)
    tokens = decoders.tokens(24)
    f32 = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    # The reference reads float32 weights: ours as they were rounded.
    rounded = hf.save(self.folder / 'rounded', f32, model, dtype='float32')
    base = reference.load(rounded)
    with torch.no_grad():
      given = torch.tensor(tokens).long()
      got = peft.PeftModel.from_pretrained(base, str(out))(given).logits
    exact = self.added(f32, thin, model.config)
    np.testing.assert_allclose(
        got.numpy(),
        our_logits(model.config, exact, tokens),
        atol=TOL,
        rtol=TOL,
    )
    # What was merged and rounded to bfloat16 is near, as the report says.
    distances = [row['distance'] for row in rows]
    self.assertBetween(max(distances), 1e-4, 0.2)


class InTest(PeftTest):

  def train(self, num_steps=4, **options):
    """Trains an adapter in PEFT; returns its model and folder."""
    torch.manual_seed(0)
    options = {
        'r': 4,
        'lora_alpha': 6,
        'target_modules': ['q_proj', 'k_proj', 'down_proj'],
        'task_type': 'CAUSAL_LM',
        **options,
    }
    config = peft.LoraConfig(**options)
    model = peft.get_peft_model(reference.load(self.folder / 'base'), config)
    tx = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=2e-2
    )
    for i in range(num_steps):
      given = torch.tensor(decoders.tokens(16, seed=i)).long()
      model(given, labels=given).loss.backward()
      tx.step()
      tx.zero_grad()
    out = self.folder / 'adapter'
    model.save_pretrained(out)
    return model, out

  def check(self, model, params, torch_model):
    tokens = decoders.tokens(24, seed=9)
    with torch.no_grad():
      theirs = torch_model(torch.tensor(tokens).long()).logits.numpy()
    ours = our_logits(model.config, params, tokens)
    np.testing.assert_allclose(ours, theirs, atol=TOL, rtol=TOL)
    base = our_logits(model.config, model.params, tokens)
    self.assertGreater(np.abs(ours - base).max(), 0.05)

  @parameterized.product(name=FAMILIES, scan_layers=(True, False))
  def test_logits_and_gradients(self, name, scan_layers):
    model = hf.load(self.write(name), scan_layers=scan_layers)
    torch_model, out = self.train(use_rslora=name == 'qwen3')
    adapter = peft_import.load(out, model)
    chain, state = peft_import.start(
        adapter, optax.sgd(1.0), jax.random.key(0), model.params
    )
    self.check(model, chain.params(state), torch_model)
    # One step of SGD at rate 1 is the gradient.
    tokens = decoders.tokens(24, seed=9)
    loss = inject.by_product(decoder.make_loss(model.config))
    batch = {'tokens': jnp.asarray(tokens)}
    moved, (value, _) = jax.jit(lambda state: chain.step(state, loss, batch))(
        state
    )
    given = torch.tensor(tokens).long()
    theirs = torch_model(given, labels=given).loss
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    layers = torch_model.base_model.model.model.layers
    for room, name in (('self_attn', 'k_proj'), ('mlp', 'down_proj')):
      for i in range(3):
        module = getattr(getattr(layers[i], room), name)
        path = f'layers_{i}/{room}/{name}/kernel'
        index = ()
        if scan_layers:
          path, index = f'layers/{room}/{name}/kernel', (i,)
        before, after = state.factors[path], moved.factors[path]
        for side, letter in (('left', 'lora_A'), ('right', 'lora_B')):
          grad = np.asarray(before[side] - after[side])[index]
          weight = getattr(module, letter)['default'].weight
          expected = weight.grad.numpy().T
          # A difference of factors of size 1 in float32, and two programs.
          np.testing.assert_allclose(
              grad, expected, atol=1e-6 + 3e-5 * np.abs(expected).max()
          )

  @parameterized.product(scan_layers=(True, False), use_rslora=(True, False))
  def test_patterns(self, scan_layers, use_rslora):
    """Ranks and scales a layer: padded in a stack, exact in the product."""
    base = self.write('llama2', num_hidden_layers=12)
    model = hf.load(base, scan_layers=scan_layers)
    torch_model, out = self.train(
        rank_pattern={r'layers\.1\.self_attn\.q_proj': 7, 'k_proj': 2},
        alpha_pattern={r'^model\.layers\.11\..*q_proj': 20, 'down_proj': 3},
        use_rslora=use_rslora,
        num_steps=2,
    )
    adapter = peft_import.load(out, model)
    chain, state = peft_import.start(
        adapter, optax.sgd(1.0), jax.random.key(0), model.params
    )
    self.check(model, chain.params(state), torch_model)
    if scan_layers:
      found = adapter.factors['layers/self_attn/q_proj/kernel']['left']
      self.assertEqual(found.shape, (12, 32, 7))
      self.assertTrue(np.any(found[1, :, 4:]))
      self.assertFalse(np.any(found[11, :, 4:]))

  @parameterized.parameters(
      dict(r=40, target_modules=['k_proj', 'v_proj', 'up_proj']),
      dict(target_modules=['q_proj', 'lm_head']),
      dict(target_modules='all-linear'),
      dict(target_modules=r'.*\.[02]\.mlp\.(up|down)_proj'),
      dict(layers_to_transform=[0, 2]),
      dict(layers_to_transform=1, exclude_modules=['q_proj']),
      dict(init_lora_weights='gaussian'),
      dict(init_lora_weights='orthogonal'),
      dict(init_lora_weights=False, lora_dropout=0.1, num_steps=0),
  )
  def test_what_is_converted(self, **options):
    for scan_layers in (True, False):
      model = hf.load(self.write('mistral'), scan_layers=scan_layers)
      torch_model, out = self.train(**options)
      torch_model.eval()
      adapter = peft_import.load(out, model)
      chain, state = peft_import.start(
          adapter, optax.sgd(1.0), jax.random.key(0), model.params
      )
      self.check(model, chain.params(state), torch_model)

  def test_a_weighted_sum(self):
    model = hf.load(self.write('llama3'))
    first, out = self.train()
    one = out.rename(self.folder / 'one')
    second, two = self.train(r=3, target_modules=['k_proj', 'v_proj'])
    adapter = peft_import.load([one, two], model, weights=[0.5, -2.0])
    chain, state = peft_import.start(
        adapter, optax.sgd(1.0), jax.random.key(0), model.params
    )
    merged = reference.load(self.folder / 'base').state_dict()
    for torch_model, weight in ((first, 0.5), (second, -2.0)):
      for name, module in torch_model.named_modules():
        if hasattr(module, 'get_delta_weight') and 'default' in module.lora_A:
          name = name.removeprefix('base_model.model.') + '.weight'
          merged[name] = merged[name] + weight * module.get_delta_weight(
              'default'
          )
    whole = reference.load(self.folder / 'base')
    whole.load_state_dict(merged)
    self.check(model, chain.params(state), whole)

  @parameterized.parameters(
      (dict(use_dora=True), 'use_dora'),
      (dict(bias='lora_only'), 'bias'),
      (dict(modules_to_save=['lm_head']), 'modules_to_save'),
      (dict(init_lora_weights='pissa'), 'init_lora_weights'),
      (dict(init_lora_weights='olora'), 'init_lora_weights'),
      (dict(lora_bias=True), 'lora_bias'),
      (dict(trainable_token_indices=[1, 2]), 'trainable_token_indices'),
      (dict(target_modules=['q_proj', 'embed_tokens']), 'embedding'),
      (dict(layer_replication=[[0, 2], [1, 3]]), 'layer_replication'),
  )
  def test_what_peft_writes_and_we_refuse(self, options, message):
    model = hf.load(self.write('llama2'))
    _, out = self.train(num_steps=1, **options)
    with self.assertRaisesRegex(ValueError, f'Expected .*{message}'):
      peft_import.load(out, model)

  @parameterized.parameters('IA3', 'LOHA', 'PROMPT_TUNING')
  def test_other_kinds(self, kind):
    model = hf.load(self.write('llama2'))
    task = {'task_type': 'CAUSAL_LM'}
    config = {
        'IA3': lambda: peft.IA3Config(
            target_modules=['k_proj', 'down_proj'],
            feedforward_modules=['down_proj'],
            **task,
        ),
        'LOHA': lambda: peft.LoHaConfig(target_modules=['k_proj'], **task),
        'PROMPT_TUNING': lambda: peft.PromptTuningConfig(
            num_virtual_tokens=2, **task
        ),
    }[kind]()
    torch_model = peft.get_peft_model(
        reference.load(self.folder / 'base'), config
    )
    torch_model.save_pretrained(self.folder / 'adapter')
    with self.assertRaisesRegex(ValueError, f"peft_type 'LORA'.*got '{kind}'"):
      peft_import.load(self.folder / 'adapter', model)

  def test_a_changed_base_saved_as_plain_lora(self):
    """What PEFT converts to the original base is taken."""
    model = hf.load(self.write('llama2'))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        target_modules=['q_proj'],
        init_lora_weights='pissa',
        task_type='CAUSAL_LM',
    )
    torch_model = peft.get_peft_model(
        reference.load(self.folder / 'base'), config
    )
    first = self.folder / 'first'
    torch_model.peft_config['default'].init_lora_weights = True
    torch_model.save_pretrained(first)
    torch_model.peft_config['default'].init_lora_weights = 'pissa'
    with torch.no_grad():
      for name, p in torch_model.named_parameters():
        if 'lora_' in name:
          p.add_(0.1 * torch.randn_like(p))
    out = self.folder / 'adapter'
    torch_model.save_pretrained(
        out, path_initial_model_for_weight_conversion=str(first)
    )
    adapter = peft_import.load(out, model)
    chain, state = peft_import.start(
        adapter, optax.sgd(1.0), jax.random.key(0), model.params
    )
    self.check(model, chain.params(state), torch_model)


class RoundTripTest(PeftTest):

  @parameterized.product(scan_layers=(True, False))
  def test_ours_to_peft_to_ours(self, scan_layers):
    model = hf.load(self.write('qwen3'), scan_layers=scan_layers)
    spec = decoder.matrices(model.config, 'q_proj|k_proj')
    policy = adapters.ChainPolicy.lora(3, alpha=5.0)
    chain = adapters.make_chain(policy, optax.adam(1e-2), spec)
    loss = inject.by_product(decoder.make_loss(model.config))
    state = chain.init(jax.random.key(1), model.params)
    batch = {'tokens': jnp.asarray(decoders.tokens(16))}
    step = jax.jit(lambda state: chain.step(state, loss, batch)[0])
    for _ in range(3):
      state = step(state)
    thin = export.of_state(chain, state)
    out = self.folder / 'out'
    peft_format.save(out, thin, model)
    # Through PEFT's own hands, too.
    again = self.folder / 'again'
    self.peft_model(out).save_pretrained(again)
    for folder in (out, again):
      adapter = peft_import.load(folder, model)
      back, restored = peft_import.start(
          adapter, optax.sgd(0.1), jax.random.key(0), model.params
      )
      chex.assert_trees_all_equal(
          export.as_pairs(export.of_state(back, restored)),
          export.as_pairs(thin),
      )

  def test_peft_to_ours_to_peft(self):
    model = hf.load(self.write('mistral'))
    torch_model, out = InTest.train(self)
    adapter = peft_import.load(out, model)
    chain, state = peft_import.start(
        adapter, optax.sgd(0.1), jax.random.key(0), model.params
    )
    back = self.folder / 'back'
    peft_format.save(back, export.of_state(chain, state), model)
    tokens = decoders.tokens(16)
    with torch.no_grad():
      theirs = torch_model(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(
        self.peft_logits(back, tokens), theirs, atol=TOL, rtol=TOL
    )
