"""Tasks: data, model and loss, without optimisation."""

from bernoulli_lora_jax.tasks.task import Task
