"""Packaging; tool settings are in pyproject.toml, exact versions in constraints.txt."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_INIT = (_ROOT / 'bernoulli_lora_jax' / '__init__.py').read_text()
_VERSION = re.search(r"__version__ = '([^']+)'", _INIT)

# Checkpoints of the Hugging Face hub in and out.
_HF = [
    'grain>=0.2.18',  # Packs at most so many documents a row.
    'huggingface-hub>=0.34',
    'jinja2>=3.1.6',  # Its sandbox is mended there.
    'safetensors>=0.6',
    'tokenizers>=0.21',
]

setuptools.setup(
    name='bernoulli_lora_jax',
    version=_VERSION.group(1),
    description='Low-rank adaptation that provably converges, in JAX.',
    long_description=(_ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    # The configs ship with the package: a wheel has them inside of it.
    packages=[
        *setuptools.find_packages(include=['bernoulli_lora_jax*']),
        'bernoulli_lora_jax.configs',
    ],
    package_dir={'bernoulli_lora_jax.configs': 'configs'},
    package_data={'bernoulli_lora_jax': ['py.typed']},
    entry_points={'console_scripts': ['blora = bernoulli_lora_jax.cli:main']},
    python_requires='>=3.11',
    install_requires=[
        'absl-py>=2.1',
        'flax>=0.12',
        'jax>=0.10',
        'matplotlib>=3.9',
        'ml-collections>=1.0',
        'numpy>=2.0',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.11.30',
        'scikit-learn>=1.5',
        'scipy>=1.14',
        'tabulate>=0.9',
        'tensorboardX>=2.6.2',
        'tqdm>=4.66',
        'tyro>=1.0',  # The command's flags from signatures.
    ],
    extras_require={
        # Runs over a network: launch/federated_flower.
        'federated': ['flwr>=1.41'],
        # Data of the Hugging Face hub, .parquet and .csv: pyarrow and pandas, 250 MB.
        'datasets': [*_HF, 'datasets>=4.0'],
        # Bases in nf4, int4, int8; LoRA of NNX models.
        'quantized': ['qwix>=0.1.8'],
        'hf': _HF,
        # What the reference implementations compute: `make parity`.
        'parity': [*_HF, 'peft>=0.17', 'torch>=2.7', 'transformers>=5.0'],
        'test': [
            *_HF,
            'chex>=0.1.90',
            'datasets>=4.0',
            'ipykernel>=6.29',  # Runs the notebooks.
            'nbclient>=0.10',
            'pytest>=8',
            'pytest-xdist>=3.6',
            'qwix>=0.1.8',
        ],
        'dev': ['pdoc>=15', 'pre-commit>=4', 'pyink', 'pyrefly', 'ruff'],
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
)
