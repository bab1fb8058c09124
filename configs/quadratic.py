"""The counterexample in R^(3 x 3) that motivates the chain, in float64.

With step 1/L = 1/20 and rank 1, LoRA and COLA (K = 5, 10, 50; L ~ U(+-1/sqrt 3),
R = 0) diverge, asymmetric LoRA with a frozen factor of unit norm stalls, and
RAC-LoRA and Bernoulli-LoRA reach f - f* < 1e-12 in 6000 steps, in all of 20
seeds. The sweep shows it in 40 s on two cores.

  python launch/sweep.py --config=configs/quadratic.py --workdir=runs/quadratic
  python launch/report.py runs/quadratic --figures=figures

Variants: lora, cola, asymmetric_left, asymmetric_right, rac_left, rac_right,
bernoulli as adapters with links of one step; full, and with `gradient` the last
three in gradient mode; smoke.
"""

from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import methods as methods_lib

OTHERS = {
    'full': {'method.mode': 'gradient', 'method.name': 'full'},
    'gradient': {'method.mode': 'gradient'},
    'smoke': {'training.num_steps': 20, 'training.num_evals': 2},
}


def get_config(variant: str = ''):
  """Returns the config of a variant."""
  config = base_config.get_config()
  config.x64 = True
  config.task.name = 'quadratic'
  config.task.batch_size = 1
  config.method.mode = 'adapter'
  config.method.rank = 1
  config.method.stepsize_factor = 1.0
  config.training.num_steps = 6000
  config.training.num_evals = 1200  # LoRA diverges within a few steps.
  config.training.eval_gradient = True  # For audits.
  table = {
      name: {'method.name': name, 'method.period': 1}
      for name in methods_lib.ADAPTERS
  }
  table['cola']['method.period'] = 5
  base_config.set_variants(config, variant, {**table, **OTHERS})
  return config


def sweep():
  """Returns the family with twenty seeds."""
  runs = [(name, 1) for name in methods_lib.ADAPTERS if name != 'cola']
  runs += [('cola', period) for period in (5, 10, 50)]
  return [
      {'method.name': name, 'method.period': period, 'seed': seed}
      for name, period in runs
      for seed in range(20)
  ]
