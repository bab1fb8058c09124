# The two commands: `make run` and `make test`. Everything else serves them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
WORKDIR ?= runs/digits
FIGURES ?= figures

.PHONY: run test test-all parity mutants bench lint format notebooks docs clean

# Pre-trains on the digits 0-4, fine-tunes on 5-9 with every method.
run: $(VENV)/.installed
	$(BIN)/python launch/sweep.py --config=configs/digits.py --workdir=$(WORKDIR)
	$(BIN)/python launch/report.py $(WORKDIR) --figures=$(FIGURES)

# A worker has whole files: their tests share compiled programs.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow' tests --ignore=tests/parity

# What is too slow for `make test`, the network of processes included.
test-all: $(VENV)/.installed-federated
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow tests --ignore=tests/parity

# Against the reference implementations: transformers, PyTorch (CPU), peft.
parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -n auto --dist loadfile tests/parity

# Breaks the package line by line: of each fault a quick test must turn red.
mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py

# A step of fine-tuning at a tiny size; benchmarks/llm_step.py has the rows for a GPU.
bench: $(VENV)/.installed
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/llm_step.py --shapes=tiny --steps=15 --against=bare_lora \
	  --only=matmul,floor_dx,bare_lora,sketched_rac_left,sketched_rac_right,peft_eager

lint: $(VENV)/.installed-dev $(VENV)/.installed-federated
	$(BIN)/pyink --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/pyrefly check
	@echo 'lint: clean'

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/pyink --quiet .

# Executes the notebooks and stores what they show.
notebooks: $(VENV)/.installed
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

# The API reference, built from the docstrings, in docs/api.
DOCS ?= docs/api
docs: $(VENV)/.installed-dev
	$(BIN)/pdoc -d google -o $(DOCS) bernoulli_lora_jax

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.installed-federated: $(VENV)/.installed
	$(PIP) -e '.[federated]'
	@touch $@

$(VENV)/.installed-parity: $(VENV)/.installed
	$(PIP) -e '.[parity]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build docs/api *.egg-info
