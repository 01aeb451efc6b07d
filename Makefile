# The first target that needs it builds the environment, .venv. Tests keep compiled programs in the temporary folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs
# An index to take torch from before everything else, for the CPU build.
TORCH_INDEX ?=
# Of pyproject.toml, for tests; without parity, tests that compare with torch and diffusers skip.
EXTRAS ?= test,parity,notebook,docs

.PHONY: venv venv-test demo demo-mnist demo-finetune test fast-tests test-slow lint docs dist bench bench-long notebooks clean

venv: $(VENV)/ready
venv-test: $(VENV)/ready-test

$(VENV)/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[audit]'
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet torch==2.13.0 --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

# The shipped model, all of its captions; the last line is the page to open.
demo: venv
	$(BIN)/jaxmem audit --noises 1 --timesteps 981 281 --out $(OUT)/demo

demo-mnist: venv
	$(BIN)/jaxmem reproduce mnist --preset small --out $(OUT)/mnist

# The shipped model, fine-tuned on images that it has not seen; MNIST is downloaded.
demo-finetune: venv
	$(BIN)/jaxmem reproduce finetune --preset small --out $(OUT)/finetune

lint: venv-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiling is most of the time, so programs are compiled without LLVM's optimisations; before a release they are
# tested as users have them, too: make test TEST_XLA_FLAGS=
TEST_XLA_FLAGS ?= --xla_backend_optimization_level=0
# Lint and the documentation take a core for a minute, beside the tests.
test: venv-test
	$(MAKE) --jobs 2 lint docs fast-tests

fast-tests: venv-test
	OMP_NUM_THREADS=1 XLA_FLAGS="$(XLA_FLAGS) $(TEST_XLA_FLAGS)" \
		$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The pages in build/docs. A broken link or a public name that no page documents fails; so does a code block, in the tests.
docs: venv-test
	$(BIN)/python scripts/documented.py
	$(BIN)/zensical build --strict --clean

test-slow: venv-test
	$(BIN)/python -m pytest -m slow

# sdist and wheel in dist/, installed into an empty environment and tried there.
dist: venv-test
	scripts/dist.sh $(abspath $(BIN)/python)

bench: venv-test
	$(BIN)/python benchmarks/exact_jacobian.py
	$(BIN)/python benchmarks/batch_spectra.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/stable_diffusion.py
	$(BIN)/python benchmarks/torch_networks.py
	$(BIN)/python benchmarks/extreme.py
	$(BIN)/python benchmarks/rounding.py
	$(BIN)/python benchmarks/false_listings.py

bench-long: venv-test
	$(BIN)/python benchmarks/count_coverage.py --seeds 100
	$(BIN)/python benchmarks/counting.py --seeds 100
	$(BIN)/python benchmarks/full_spectrum.py

notebooks: venv-test
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) dist build .cache .pytest_cache .ruff_cache .mypy_cache
