# make run    trains DenseNet-121 on handwritten digits, in a few minutes on a CPU
# make test   runs ruff and the tests, except those that take minutes
# make test-slow   runs the slow tests, and the comparisons with torch and Keras
# make test-exhaustive   runs every combination: what takes longest and fails least
# make test-trackers   runs the real Weights & Biases, MLflow (with a server) and Trackio
# make faults      kills runs, fills disks and damages files, in full
# All create .venv first, with the newest Python (3.11 to 3.13) that starts here.
# JAX=oldest installs the oldest supported version of JAX.
# make web         builds examples/web, which needs npm and no .venv
# make lint        ruff and mypy
# make docs        the documentation site, in build/site
# make wheel       the source distribution and the wheels, in dist: one of pure Python, and
#                  on Linux (x86-64) with a C++ compiler one with compiled CPU kernels
# make dev         installs everything for these in .venv, and git hooks

PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c 'import sys, venv, ensurepip; \
	sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	>/dev/null 2>&1 && { echo $$name; break; }; done)
BIN = .venv/bin
# Without compiling: Python compiles modules when they are imported. Halves the time.
INSTALL = -m pip install --quiet --no-compile --disable-pip-version-check
# uv takes a quarter of pip's time. pip is used if uv fails, for example because it does
# not read pip's settings.
UV_INSTALL = -m uv pip install --quiet --link-mode=copy --python
# What the first start would compile: the libraries' bytecode, and the CPU kernels, which
# wheels contain compiled. If this fails, the first start says why.
COMPILE = -c 'from flax_densenet.kernels import cpu; kernels = cpu.load_ahead(); \
	import flax_densenet.train.fit, flax_densenet.report.page; \
	kernels and kernels.join()'
# Peers need Python 3.11, the only one with a CPU build of this torch. This project is
# installed there too, with the oldest JAX that it supports.
PEERS = .venv-peers/bin

JAX ?= newest
PINNED_oldest = jax==0.10.2 jaxlib==0.10.2

# Programs that tests compiled, for the next run.
export FLAX_DENSENET_TEST_CACHE ?= $(CURDIR)/.venv/compiled-tests

.PHONY: web run test test-slow test-exhaustive test-trackers faults lint docs wheel dev \
	bench bench-gpu clean

run: .venv/installed
	$(BIN)/python launch.py --config=configs/densenet121.py --workdir=ckpt/digits \
		--config.optimizer.learning_rate=1e-3 --config.optimizer.schedule=cosine \
		--config.train.epochs=6

RUFF = $(BIN)/ruff check . && $(BIN)/ruff format --check .

test: .venv/installed
	$(RUFF)
	$(BIN)/python -m pytest -q

# In parallel: many of these tests wait for other processes and leave a core idle. The
# peers' part does without the C++ kernels, which would be compiled for its JAX; the other
# part compares them with the layers by XLA.
test-slow: .venv/installed .venv-peers/installed
	@FLAX_DENSENET_CPU_KERNELS=0 $(PEERS)/python -m pytest -q -n 1 -m 'not exhaustive' \
		$(BESIDE_PEERS) $(KERAS_FAULTS) >.venv/peers.log 2>&1 & peers=$$!; \
	$(BIN)/python -m pytest -q -n 3 -m '(slow or faults) and not exhaustive'; slow=$$?; \
	wait $$peers; peers=$$?; cat .venv/peers.log; exit $$((slow | peers))

# All that is marked so, with the peers' part.
test-exhaustive: .venv/installed .venv-peers/installed
	$(BIN)/python -m pytest -q -n 2 -m exhaustive
	$(PEERS)/python -m pytest -q -n 2 -m exhaustive $(BESIDE_PEERS) $(KERAS_FAULTS)

# In an environment of their own: they bring many packages, and limit others.
TRACKERS = .venv-trackers/bin
WITH_TRACKERS = -e '.[wandb,mlflow,trackio,hub,tensorboard]' 'pytest>=8' 'pytest-xdist>=3.6'

test-trackers: .venv-trackers/installed
	$(TRACKERS)/python -m pytest -q -n 1 -m 'slow or not slow' \
		tests/train/test_trackers.py

BESIDE_PEERS = tests/data/augment/test_torchvision.py \
	tests/inference/test_explain_torch.py tests/train/test_torch_training.py \
	tests/weights/test_changed_layers.py \
	tests/weights/test_hdf5.py tests/weights/test_keras_files.py \
	tests/weights/test_keras_pooling.py tests/weights/test_keras_writing.py \
	tests/weights/test_published_peers.py tests/weights/test_timm.py \
	tests/weights/test_torch.py \
	tests/export/test_release.py::test_runtimes_of_others

# Keras files need its HDF5 library, which is installed there.
KERAS_FAULTS = 'tests/faults/test_fuzz.py::test_fuzz[hdf5]' \
	'tests/faults/test_fuzz.py::test_fuzz[keras]'

faults: .venv/installed .venv-peers/installed
	FAULTS=full $(BIN)/python -m pytest -q -rP -m faults -n 2 tests/faults
	FAULTS=full $(PEERS)/python -m pytest -q -rP -m faults -n 2 $(KERAS_FAULTS)

bench: .venv/installed .venv-peers/installed
	$(BIN)/python -m benchmarks.run

# On a GPU. Ours needs `pip install '.[cuda]'`, the peers need torch for CUDA and
# torchvision. If one Python has both:
# make bench-gpu OURS=python3 PEERS_PYTHON=python3
OURS ?= $(BIN)/python
PEERS_PYTHON ?= $(PEERS)/python

bench-gpu:
	OURS=$(OURS) PEERS=$(PEERS_PYTHON) $(OURS) -m benchmarks.gpu $(ARGS)

.venv-trackers/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed"; \
		exit 1; }
	$(PYTHON) -m venv .venv-trackers
	$(TRACKERS)/python $(INSTALL) uv
	$(TRACKERS)/python $(UV_INSTALL) $(TRACKERS)/python $(WITH_TRACKERS) \
		|| $(TRACKERS)/python $(INSTALL) $(WITH_TRACKERS)
	touch $@

.venv-peers/installed: benchmarks/peers.txt pyproject.toml
	@peer=$$(for name in python3.11 /usr/bin/python3.11 $$HOME/.pyenv/versions/3.11*/bin/python; do \
		$$name -c 'import venv, ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		>/dev/null 2>&1 && { echo $$name; break; }; done); \
	test -n "$$peer" || { echo "Python 3.11 with venv is needed for the peers"; exit 1; }; \
	$$peer -m venv .venv-peers
	$(PEERS)/python $(INSTALL) torch==2.13.0
	$(PEERS)/python $(INSTALL) uv
	$(PEERS)/python $(UV_INSTALL) $(PEERS)/python -r benchmarks/peers.txt -e '.[test]' \
		|| $(PEERS)/python $(INSTALL) -r benchmarks/peers.txt -e '.[test]'
	$(PEERS)/python $(INSTALL) --no-deps \
		torchvision==0.28.0 timm torchxrayvision captum grad-cam ttach
	touch $@

web:
	npm --prefix examples/web install
	npm --prefix examples/web run build

lint: .venv/installed
	$(RUFF)
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed"; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) uv
	$(BIN)/python $(UV_INSTALL) $(BIN)/python -e '.[test]' $(PINNED_$(JAX)) \
		|| $(BIN)/python $(INSTALL) -e '.[test]' $(PINNED_$(JAX))
	-$(BIN)/python $(COMPILE)
	touch $@

docs: .venv/installed-dev
	$(BIN)/mkdocs build --strict

wheel: .venv/installed-dev
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --no-isolation --sdist
	FLAX_DENSENET_BUILD_KERNELS=0 $(BIN)/python -m build --no-isolation --wheel
	$(BIN)/python -m build --wheel
	$(BIN)/python -m twine check --strict dist/*

dev: .venv/installed-dev
	@if [ -d .git ]; then $(BIN)/pre-commit install; fi

.venv/installed-dev: .venv/installed
	$(BIN)/python $(UV_INSTALL) $(BIN)/python -e '.[test,dev]' $(PINNED_$(JAX)) \
		|| $(BIN)/python $(INSTALL) -e '.[test,dev]' $(PINNED_$(JAX))
	touch $@

clean:
	rm -rf .venv .venv-peers .venv-trackers build dist
