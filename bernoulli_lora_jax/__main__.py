"""`python -m bernoulli_lora_jax` is the command `blora`."""

from bernoulli_lora_jax import cli

if __name__ == '__main__':
  cli.main()
