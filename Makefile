# make bench | check | record | results | docs | test | test-full | test-gpu | fuzz | mutate | sanitize | wheel | wheels | versions
#    | peers | lint | types | clean
# VENV names another virtual environment, PYTHON another interpreter to create it with; ARGS goes to the command that is run,
# such as make bench ARGS="--quick --batch 1". TORCH and TRITON say what pip installs, such as make bench TORCH=torch==2.11.0;
# PIP_INDEX_URL and pip's other variables say from where.
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
# Pinned for development only, so that everybody's tests and figures mean the same; the package itself takes any version from
# torch 2.11 on.
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter file,$(origin TORCH)),triton==3.7.1,triton)
BIN := $(VENV)/bin

# An environment that make did not create keeps the torch that it has, unless TORCH is given. Asked when the recipe runs.
MADE_HERE := $(VENV)/.made_here
HAS_TORCH = [ ! -e $(MADE_HERE) ] && $(BIN)/python -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))'
KEEPS_TORCH = $(if $(filter file,$(origin TORCH)),$(if $(filter-out .venv,$(VENV)),$(HAS_TORCH),false),false)
PINS := $(VENV)/.pins
DEPENDENCIES := $(VENV)/.dependencies
INSTALLED := $(VENV)/.installed
DOCS := $(VENV)/.docs
RELEASE := $(VENV)/.release
NATIVE := $(shell find csrc -type f) res2net_fused/_native/build_flags.py res2net_fused/_native/cuda_toolkit.py

.PHONY: bench check record results docs test test-full test-gpu fuzz mutate sanitize wheel wheels versions peers lint types clean setup FORCE

setup: $(INSTALLED)

bench: $(INSTALLED)
	$(BIN)/python -m res2net_fused bench $(ARGS)

check: $(INSTALLED)
	$(BIN)/python -m res2net_fused check $(ARGS)

# On a GPU machine nothing is set up or installed: the Python that has its torch will do.
record:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/record $(ARGS)

results: $(INSTALLED)
	$(BIN)/python benchmarks/render_results.py $(ARGS)

# The site, in build/site; a warning, such as a link that leads nowhere, is an error.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# Two processes, whose idle threads sleep instead of spinning on each other's processor; WORKERS=0 for one.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist worksteal --benchmark-disable
test test-full: export OMP_WAIT_POLICY ?= passive

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# An empty marker expression selects the slow tests too.
test-full: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m '' $(ARGS)

# What a first run on a GPU needs, in that order; Triton's kernels are compiled first, on all processors.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -rs tests/gpu $(ARGS)

# 5,000 random calls; what fails is added to tests/robustness/fuzz/corpus.json. ARGS="--cases 500 --seed 7 --only chain" for others.
fuzz: $(INSTALLED)
	$(BIN)/python tests/robustness/fuzz/run.py $(ARGS)

# Removes every barrier and wait of the CUDA kernels in turn; each removal must turn a test red.
mutate: $(INSTALLED)
	$(BIN)/python tests/support/emulator/mutate.py $(ARGS)

# The CPU kernels' tests, the slow ones too, over a library that checks every access; ARGS="--plant" must turn it red.
sanitize: $(INSTALLED)
	$(BIN)/python tests/robustness/sanitizer/run.py $(ARGS)

# One wheel for every torch from 2.11 on and every Python; a native part that does not build is an error here.
wheel: $(INSTALLED)
	RES2NET_FUSED_BUILD=require $(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist $(ARGS) .

# What is published, in dist/: the sdist, wheels for manylinux_2_28 on x86_64 and aarch64, and one for any system; ARGS="--again"
# compares two builds.
wheels: $(RELEASE)
	$(BIN)/python release/artefacts.py $(ARGS)

# The wheel with the oldest and the newest torch, each in an environment of its own under build/: gigabytes, and not in CI.
versions: $(DEPENDENCIES)
	$(MAKE) wheel ARGS=
	$(BIN)/python tests/integration/versions/run.py $(ARGS)

# timm's own tests of its Res2Net models, plain and accelerated, from timm's sdist, and mmpretrain's networks; not in CI.
peers: $(INSTALLED)
	$(BIN)/python tests/integration/timm_suite/run.py $(ARGS)
	$(BIN)/python tests/integration/mmpretrain_models/run.py
	$(BIN)/python tests/integration/speechbrain_models/run.py

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# Settings are in pyproject.toml.
types: $(INSTALLED)
	$(BIN)/python -m mypy $(ARGS)

# Written anew, and so newer than what is installed, only where they changed.
$(PINS): FORCE
	@test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && touch $(MADE_HERE); }
	@echo '$(TORCH) $(TRITON)' | cmp -s - $@ || echo '$(TORCH) $(TRITON)' > $@

$(DEPENDENCIES): Makefile $(PINS)
	$(KEEPS_TORCH) || $(BIN)/python -m pip install $(TORCH) $(TRITON)
	$(BIN)/python -m pip install 'setuptools>=77' wheel ninja 'pybind11>=2.13' ruff mypy==2.4.1
	touch $@

# Editable, so that Python sources need no installing again. Native code is built behind it (by ninja, only what changed), when
# PyPI's nvcc is there where it is the one that fits torch, and not by pip, which would hide for minutes that it compiles; pip
# fetches what only tests and benchmarks need meanwhile.
# EXTRAS adds others meanwhile: .ci/run has it install `release` too, without which the tests of the published wheel skip.
EXTRAS ?= bench,test
# timm and torchvision, whose 0.28 is torch's 2.13, come without their dependencies, which would change torch: timm's others come
# first. The script behind them sees to it that torchvision loads also beside a torch of another build than PyPI's.
TORCHVISION = $(BIN)/python -c 'import importlib.metadata as m; print(int(m.version("torch").split(".")[1]) + 15)'
$(INSTALLED): $(DEPENDENCIES) setup.py pyproject.toml $(NATIVE)
	RES2NET_FUSED_BUILD=off $(BIN)/python -m pip install --no-build-isolation -e \
		".$$($(BIN)/python -I res2net_fused/_native/cuda_toolkit.py)"
	$(BIN)/python setup.py build_ext --inplace & built=$$!; \
	$(BIN)/python -m pip install 'res2net-fused[$(EXTRAS)]' safetensors pyyaml huggingface_hub && \
	$(BIN)/python -m pip install --no-deps timm "torchvision==0.$$($(TORCHVISION)).*" && \
	$(BIN)/python .ci/fit_torchvision.py; status=$$?; wait $$built && exit $$status
	touch $@

# The package is there already, so pip installs only what this extra adds.
$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install 'res2net-fused[docs]'
	touch $@

# zig and what checks wheels: half a gigabyte on disk, which nothing but wheels needs.
$(RELEASE): $(INSTALLED)
	$(BIN)/python -m pip install 'res2net-fused[release]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis $(INSTALLED) $(DOCS) $(RELEASE)
	rm -f res2net_fused/*.so res2net_fused/lib/*.so res2net_fused/lib/*.json
	find res2net_fused tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
