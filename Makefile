# One name for each thing that people and CI run. `make help` lists them.
PYTHON ?= python3
# `make test-torch VERSION=2.13.0`: another torch, in an environment of its own. The line keeps a VERSION of the caller's
# environment out.
VERSION :=
VENV := .venv$(if $(VERSION),-torch-$(VERSION))
TOOLS := --group $(if $(VERSION),tools torch==$(VERSION),dev)
BIN := $(VENV)/bin
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export CARGO_TERM_COLOR ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup build demo test bench format lint test-rust test-python test-torch soak fuzz bless clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The environment that demo, test and bench share. torch is large: it is installed once, and again only when the
# pinned versions change. It cannot be imported without the CUDA libraries that it is linked to, so it is installed whole.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip==26.3'
	$(BIN)/python -m pip install --quiet $(TOOLS)
	touch $@

setup: $(VENV)/installed ## Create .venv with the pinned tools

build: setup ## Build the extension module and the binary, optimised
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	cargo build --quiet --release -p reweft-cli -p serve

demo: build ## Compile an untrained model, train it, refit the compiled one on disk and live
	@$(BIN)/python tests/demo.py

test: lint test-rust test-python ## Everything that CI runs

lint: build ## Formatting, clippy, ruff, types and stubs
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps --workspace --exclude reweft-python
	$(BIN)/ruff format --check --quiet python tests fixtures
	$(BIN)/ruff check --quiet python tests fixtures
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --ignore-unused-allowlist --allowlist tests/stubtest-allowlist.txt reweft._core

test-rust: setup ## Rust unit tests, integration tests and doctests
	cargo test --quiet --workspace --exclude reweft-python

test-python: build ## pytest
	$(BIN)/python -m pytest tests

# Whatever has compiled code in it, which is another torch's with each version.
COMPILED := tests/live tests/refit tests/parity/test_refit_peer.py tests/parity/test_programs.py tests/cli/test_run.py
test-torch: $(if $(VERSION),build) ## What depends on torch's compiler, with another one: make test-torch VERSION=2.13.0
	@test -n "$(VERSION)" || { echo "make test-torch needs a version: make test-torch VERSION=2.13.0" >&2; exit 1; }
	$(BIN)/python -m pytest $(COMPILED)

bench: build ## Compare with the peers, in one run: make bench TOPICS="refitting huge" for some topics only
	$(BIN)/python -m tests.bench $(TOPICS)

# What `make fuzz` runs, and how long that and `make soak` run.
TARGET ?= pickle
SECONDS ?= 60

soak: build ## Call and refit beside each other for a while, and show figures: make soak SECONDS=600
	REWEFT_SOAK_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q -s tests/live/test_soak.py

fuzz: ## Fuzz one target for a while: make fuzz TARGET=zip SECONDS=600
	@command -v cargo-fuzz >/dev/null || { echo "make fuzz needs cargo-fuzz: cargo install cargo-fuzz --locked" >&2; exit 1; }
	cd rust/reweft-fuzz && mkdir -p fuzz/corpus/$(TARGET) && RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none $(TARGET) \
	  fuzz/corpus/$(TARGET) ../../fixtures/seeds/$(TARGET) ../../fixtures/checkpoints ../../fixtures/hostile -- \
	  -dict=dictionaries/$(if $(wildcard rust/reweft-fuzz/dictionaries/$(TARGET).dict),$(TARGET),pickle).dict \
	  -max_total_time=$(SECONDS) -max_len=8192 -timeout=10 -malloc_limit_mb=1024 -print_final_stats=1

bless: setup ## Accept the present output as the expected one
	BLESS=1 cargo test --quiet -p reweft-cli --test it

format: setup ## Format everything
	cargo fmt --all
	$(BIN)/ruff format --quiet python tests fixtures
	$(BIN)/ruff check --quiet --fix python tests fixtures

clean: ## Remove build products; .venv and its like stay
	cargo clean
	rm -f python/reweft/_core*.so
