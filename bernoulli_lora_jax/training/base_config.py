"""Every field of an experiment, with its default.

Files in `configs/` start from here and change what their experiment needs. The
library below `training.experiment` never sees a ConfigDict.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults; a field that is not set has a placeholder."""
  config = config_dict.ConfigDict()
  config.seed = 0  # Of the method, the minibatches and the noise.
  config.x64 = False  # Whether to compute in float64.

  config.task = config_dict.ConfigDict()
  # 'digits', 'mnist', 'linear_regression', 'l1_regression', 'quadratic', or one of
  # your own: 'my_module:make_task', 'path/to/file.py:make_task'.
  config.task.name = 'digits'
  # Arguments of a task of your own, besides batch_size.
  config.task.kwargs = config_dict.ConfigDict()
  config.task.batch_size = 32  # Examples a minibatch.
  # Most examples at a time in evaluations and full gradients; 0: all.
  config.task.chunk = 0
  config.task.data_dir = ''  # mnist: folder of the files; '': see tasks/mnist.
  # Of the weights: 'float32', 'bfloat16', 'float16'; '': as the task makes them.
  config.task.param_dtype = ''
  config.task.hidden = (64, 64)  # digits, mnist: widths of the hidden layers.
  config.task.dropout = 0.0  # digits, mnist: rate after each hidden layer.
  config.task.split_seed = 0  # digits, mnist: of train, validation and test.
  config.task.pretrain_epochs = 60  # digits, mnist: on the lower classes.
  config.task.pretrain_learning_rate = 1e-3  # digits, mnist: AdamW's.
  config.task.dim = 256  # linear_regression, l1_regression: features, m n.
  # l1_regression: m of W in R^(m x n); None: W is square, as it is elsewhere.
  config.task.num_rows = config_dict.placeholder(int)
  config.task.num_pretraining = 9000  # linear_regression: rows.
  # linear_regression, l1_regression: rows to fine-tune on.
  config.task.num_samples = 1000

  config.method = config_dict.ConfigDict()
  # 'gradient': the whole gradient, projected (chains and full fine-tuning).
  # 'adapter': thin factors beside frozen weights (the LoRA family).
  # 'sketched': chains of adapters whose weights move at each step; less memory.
  config.method.mode = 'gradient'
  # All modes: 'rac_left' (p = 1), 'rac_right' (p = 0), 'bernoulli'; gradient
  # mode: 'full' (no projection), 'probe' (what `others` names alone, as a head);
  # adapter mode: 'lora', 'asymmetric_left', 'asymmetric_right', 'cola'. Left and right
  # name the sketched, frozen side: left trains the right factor.
  config.method.name = 'bernoulli'
  # Gradient mode: 'gd', 'sgd', 'page', 'mvr'; federated: 'qgd', 'marina', 'ef21',
  # and 'fedavg' (local steps on the weights, with 'full').
  config.method.estimator = 'sgd'
  config.method.rank = 4  # Dimension of the subspaces, clipped to each side.
  config.method.prob = 0.5  # p = P(left), for 'bernoulli'.
  # or 'rademacher', 'coordinate', 'srht', 'weighted_coordinate:RATIO' (of the
  # weights of the first and the last row).
  config.method.sketch = 'gaussian'
  # Steps a link: coin and subspace are kept. Federated adapters and fedavg: local
  # steps a round.
  config.method.period = 1
  # In place of period: data passes a link.
  config.method.period_passes = config_dict.placeholder(float)
  config.method.shared_coin = False  # One coin for all matrices.
  # Adapter and sketched mode: patterns of matrices with one left frame, as
  # ('(q|k|v)_proj', '(gate|up)_proj'); see adapters.ChainPolicy.
  config.method.shared_frames = ()
  config.method.select = ''  # Regular expression of the matrices; '': kernels.
  # Gradient mode: whether all other leaves move too, as biases.
  config.method.train_others = False
  # Regular expression of further leaves, trained at full size by the same optimiser,
  # as a fresh head beside the chain; '': none.
  config.method.others = ''
  # Of those, the rows of tokens that move, in embeddings and heads; (): all. Not in
  # gradient mode.
  config.method.other_rows = ()
  # 'sgd', 'momentum', 'adam', 'adamw' (adapter mode and 'full') or 'column' (Adam with
  # a second moment a column, which links leave: adapter and sketched mode); in chains
  # it lives in the subspace and restarts at each link.
  config.method.optimizer = 'sgd'
  config.method.weight_decay = 0.01  # For 'adamw'.
  config.method.optimizer_momentum = 0.9  # For 'momentum'.
  config.method.page_prob = config_dict.placeholder(float)  # q; b / (b + N).
  config.method.mvr_momentum = 0.9  # 1 - b of MVR.
  config.method.learning_rate = (
      0.1  # gamma, the peak where there is a schedule.
  )
  # gamma = factor / L in place of learning_rate, for tasks that know L.
  config.method.stepsize_factor = config_dict.placeholder(float)
  config.method.schedule = 'constant'  # or 'cosine', 'linear' (to zero).
  config.method.warmup_steps = 0  # Linear warm-up from zero.
  config.method.clip_norm = config_dict.placeholder(float)  # Global norm.

  # Adapter and sketched mode only; see adapters.ChainPolicy.
  config.method.alpha = config_dict.placeholder(float)  # None: scale 1.
  config.method.scaling = 'rank'  # alpha / rank; 'sqrt': alpha / sqrt(rank).
  config.method.frame = 'orthonormal'  # Frozen factor; or 'raw'.
  config.method.init = 'uniform'  # lora, cola: random factor; or 'normal'.
  config.method.zero = 'right'  # lora, cola: the factor that starts from zero.
  config.method.resample = True  # Whether each link draws anew.
  config.method.reset_optimizer = True  # Whether each link has fresh moments.
  config.method.link_warmup = 0  # Steps of linear warm-up of each link.
  config.method.rounding = 'nearest'  # or 'stochastic', 'compensated'.

  # Federated runs only: a step is a round of all clients.
  config.federated = config_dict.ConfigDict()
  config.federated.num_clients = 0  # M; 0: not federated.
  # 'iid', 'dirichlet' (by label) or 'group' (natural ones, data['group']).
  config.federated.partition = 'iid'
  config.federated.dirichlet_alpha = 0.1  # The smaller, the fewer labels each.
  config.federated.unequal = False  # iid: whether sizes are log-normal.
  config.federated.partition_seed = 0  # Of who gets what.
  # w_l: by 'size' or 'uniform'. Evaluations and grad_norm_sq are of the mean over
  # all examples, f where it is 'size'.
  config.federated.weights = 'size'
  # Clients drawn a round; None: all take part.
  config.federated.cohort = config_dict.placeholder(int)
  # qgd, marina, ef21: 'identity', 'randk', 'topk', 'natural', 'dithering',
  # 'powersgd' or 'sign'.
  config.federated.compressor = 'identity'
  # randk, topk: K, or a fraction below 1; dithering: levels; powersgd: rank. 0 is
  # none, for the others (a flag cannot set None).
  config.federated.argument = config_dict.placeholder(float)
  config.federated.concatenate = False  # One vector a client, not one a leaf.
  # q of MARINA; None: compressed over whole size of a message.
  config.federated.marina_prob = config_dict.placeholder(float)
  config.federated.start = 'full'  # EF21: or 'compressed', 'zero'.

  config.training = config_dict.ConfigDict()
  # 0: as many as num_passes takes in the mean, in whole evaluation intervals.
  config.training.num_steps = 0
  config.training.num_passes = 20.0  # Budget in data passes.
  # In place of num_passes: the FLOPs of that many passes of full fine-tuning, of all
  # weights where others are trained, else of the matrices.
  config.training.num_full_passes = config_dict.placeholder(float)
  config.training.num_evals = 20  # Evaluations, evenly spaced.
  config.training.eval_every = 0  # Steps between them; 0: by their number.
  config.training.checkpoint_every = 0  # Steps; 0: at the end only.
  config.training.steps_per_dispatch = 1000  # Most steps in one compiled loop.
  config.training.num_micro_batches = 1  # Parts of a minibatch's gradient.
  config.training.patience = 0  # Evaluations; 0: no early stopping.
  # Evaluations without a better one after which the learning rate drops; 0: no.
  config.training.plateau_patience = 0
  config.training.plateau_factor = 0.1  # By which it drops.
  # Whether evaluations report ||grad f||^2, for audits: a data pass each.
  config.training.eval_gradient = False
  # Adapter and sketched mode: write what rebuilds the run. Sketched: to the roundings,
  # or to the bit, by the increments of all steps, each as large as a link.
  config.training.recipe = False
  config.training.recipe_of_steps = False
  # Sweeps: whether runs that train together write a checkpoint of their end.
  config.training.keep_weights = False
  config.training.group_size = 0  # Runs together in a sweep; 0: by the device.
  # Whether those take each step at once (vmap), or their program runs them one after
  # another. None: at once up to 2^20 numbers, and not with PAGE.
  config.training.step_together = config_dict.placeholder(bool)
  config.training.parallel = 'none'  # 'jit' (sharded batch) or 'pmap'.
  config.training.num_devices = config_dict.placeholder(int)  # None: all.
  config.training.progress = True  # Progress bar.
  config.training.max_to_keep = 2  # Checkpoints.
  return config


def set_variants(
    config: config_dict.ConfigDict,
    given: str,
    table: Mapping[str, Mapping[str, Any]],
) -> None:
  """Sets {name: {field: value}} of variants, in the order they are given in.

  Raises:
    ValueError: a variant that is not in the table.
  """
  for name in _variants(given, table):
    config.update_from_flattened_dict(table[name])


def choose_variants(given: str, *groups: Collection[str]) -> list[str]:
  """Returns the variant of each group, its first where none is given.

  Raises:
    ValueError: a variant of no group, or two of one.
  """
  names = _variants(given, [name for group in groups for name in group])
  chosen = []
  for group in groups:
    mine = {name for name in names if name in group}
    if len(mine) > 1:
      raise ValueError(
          f'Expected one variant of {", ".join(dict.fromkeys(group))}, got'
          f' {given!r}.'
      )
    chosen += mine or [next(iter(group))]
  return chosen


def _variants(given: str, known: Collection[str]) -> list[str]:
  """Returns the names that are joined by commas."""
  names = [name for name in given.split(',') if name]
  for name in names:
    if name not in known:
      listed = ', '.join(filter(None, dict.fromkeys(known)))
      raise ValueError(f'Expected variants of {listed}, got {name!r}.')
  return names
