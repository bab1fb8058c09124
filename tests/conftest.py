"""Settings of every test, made before jax is imported."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Pre-trained weights and compiled programs, shared by the workers of a session.
_IS_WORKER = 'BERNOULLI_LORA_TESTS' in os.environ
if not _IS_WORKER:
  os.environ['BERNOULLI_LORA_TESTS'] = tempfile.mkdtemp(prefix='bernoulli_lora')
_SHARED = pathlib.Path(os.environ['BERNOULLI_LORA_TESTS'])

# Tests compile much and compute little: an eighth of the time.
_FLAGS = ['--xla_backend_optimization_level=0']
_VERSION = importlib.metadata.version('jaxlib').split('.')
if [int(part) for part in _VERSION[:2]] < [0, 11]:  # Later ones do not know it.
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
  # One module of code a program: another tenth.
  _FLAGS.append('--xla_cpu_parallel_codegen_split_count=1')

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['BERNOULLI_LORA_CACHE'] = str(_SHARED / 'cache')
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(_SHARED / 'compiled')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
os.environ['XLA_FLAGS'] = ' '.join(
    [
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        *_FLAGS,
    ]
)

import jax  # noqa: E402 (reads the environment above)
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

# A trace makes many objects, of which few are garbage: a twentieth of the time.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _same_widths():
  """A command sets x64 for its process: the next test finds what it expects."""
  before = jax.config.jax_enable_x64
  yield
  jax.config.update('jax_enable_x64', before)


def pytest_sessionfinish():
  if not _IS_WORKER:
    shutil.rmtree(_SHARED, ignore_errors=True)
