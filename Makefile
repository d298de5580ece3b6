# `make serve` and `make test` do everything on a fresh machine with Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= tiny
# More options for pip. torch's CPU build where pip's default index has a CUDA one, which takes several GB:
# make serve PIP_EXTRA="--extra-index-url URL", with the URL that PyTorch's own installation page gives for CPUs.
PIP_EXTRA ?=
PIP := $(BIN)/python -m pip install --quiet $(PIP_EXTRA)
# A path as one word of the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'
NATIVE := $(wildcard kernels/native/*.py kernels/native/csrc/*)

# Where Python keeps no bytecode, each process of a cluster compiles all of Isotherm anew: two seconds of a core.
unexport PYTHONDONTWRITEBYTECODE
COMPILE := $(BIN)/python -m compileall -q cluster actors kernels

.PHONY: serve test test-long test-fast test-page test-metrics clients fuzz exactness chaos chaos-short bench bench-elastic
.PHONY: bench-mtp bench-overload families test-gpu check clean help

help:
	@echo "make serve [MODEL=tiny]   serve a model at http://127.0.0.1:8000/v1"
	@echo "make test                 all tests but those of test-long, chaos-short, the page, metrics and clients"
	@echo "make test-long            processes, nodes and batches from their start to their end"
	@echo "make test-fast            those that need neither a cluster nor much time"
	@echo "make test-page            the page, in headless Chromium"
	@echo "make fuzz                 10,000 mutated bodies, and schemathesis on /openapi.json"
	@echo "make clients              software of others against the server, in an environment of its own"
	@echo "make test-metrics         dashboards and alerts with a real Prometheus, which must be on the PATH"
	@echo "make test-gpu             the Triton kernels and the engine on this machine's GPU"
	@echo "make exactness            10,000 random cases of the exactness test"
	@echo "make families             12 random configs of each family beside transformers, 10 MB of text beside tiktoken"
	@echo "make chaos                scale, roll, kill, pause and part under load, 5 to 20 times"
	@echo "make chaos-short          roll, pause and part under load, once (make test scales and kills)"
	@echo "make bench BF16=DIR       Isotherm beside its peers"
	@echo "make bench-elastic        the autoscaler and live changes, measured"
	@echo "make bench-mtp            speculation: tokens and speed with and without, and whether they are as they have to be"
	@echo "make bench-overload       ten times the clients there is room for; keys, batches, tenants, metrics"
	@echo "make check                linter, format and type checker"
	@echo "make clean                remove the virtual environment and caches"
	@echo "ARGS='--port 8001'        with serve: more of isotherm's own options"
	@echo "PIP_EXTRA=OPTIONS         with any of them: more options for pip, such as"
	@echo "                          --extra-index-url URL, with that of torch's CPU builds"

# Where Debian's python3-venv is not there, an environment is left without pip: once it is, it is made whole.
$(VENV)/.installed: pyproject.toml $(NATIVE)
	@echo "installing Isotherm into $(VENV), with torch and Ray, and compiling its kernels: about 1.5 GB on disk with"
	@echo "torch's CPU build, several more with a CUDA one (make help: PIP_EXTRA); one to three minutes, more where the"
	@echo "network is slow, in which pip says nothing unless something is wrong"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE)
	@echo "installing Isotherm and what its tests need into $(VENV): about 3 GB on disk with torch's CPU build, several"
	@echo "more with a CUDA one (make help: PIP_EXTRA); two to five minutes, more where the network is slow, in which pip"
	@echo "says nothing unless something is wrong"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	$(COMPILE)
	touch $@ $(VENV)/.installed

serve: $(VENV)/.installed
	$(BIN)/isotherm serve $(call quoted,$(or $(MODEL),tiny))$(if $(ARGS), $(ARGS))

# The compiler tests have a process of their own: Python's parser, which Triton calls, fails now and then beside the
# threads that other tests leave. Clusters come one at a time (two fill two cores already while they start), all else
# two modules at a time. A worker process that dies ends the run: pytest-xdist would begin its module anew, for ever.
AOT := tests/kernels/triton/test_triton_aot.py
TWO := -n 2 --dist loadfile --max-worker-restart 0
test: $(VENV)/.installed-dev
	$(BIN)/pytest $(AOT)
	$(BIN)/pytest -m "not e2e" $(TWO) --durations=25 --ignore=$(AOT) --ignore=tests/page
	$(BIN)/pytest -m "not long and not chaos" --durations=25 tests/e2e

test-long: $(VENV)/.installed-dev
	$(BIN)/pytest -m "long" --durations=25 tests/e2e

test-fast: $(VENV)/.installed-dev
	$(BIN)/pytest -m unit $(TWO) --ignore=tests/page

# In headless Chromium, which is the system's own: apt-get install chromium. With ISOTHERM_SCREENSHOTS=docs/images it
# makes the pictures of docs/page.md.
$(VENV)/.installed-page: $(VENV)/.installed-dev
	$(PIP) --editable '.[dev,page]'
	touch $@

test-page: $(VENV)/.installed-page
	$(BIN)/pytest tests/page

fuzz: $(VENV)/.installed-dev
	ISOTHERM_FUZZ_BODIES=10000 ISOTHERM_FUZZ_EXAMPLES=100 $(BIN)/pytest -s --timeout 3600 tests/fuzz

# Not among `make test`: it needs Debian's package prometheus, with promtool.
test-metrics: $(VENV)/.installed-dev
	$(BIN)/pytest tests/metrics/check_panels.py

CLIENTS := .venv-clients

$(CLIENTS)/.installed: tests/clients/requirements.txt
	test -x $(CLIENTS)/bin/pip || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

clients: $(VENV)/.installed-dev $(CLIENTS)/.installed
	$(BIN)/python tests/clients/run.py $(call quoted,$(CURDIR)/$(CLIENTS)/bin/python)

families: $(VENV)/.installed-dev
	ISOTHERM_FAMILY_CONFIGS=12 ISOTHERM_TIKTOKEN_MB=10 $(BIN)/pytest --timeout 3600 \
	  tests/actors/models/test_family_parity.py tests/cluster/text/test_tiktoken_vocabulary.py

test-gpu: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --timeout 600 tests/gpu/gpu_*.py tests/kernels/triton/triton_*.py \
	  tests/actors/attention/triton_engine.py

exactness: $(VENV)/.installed-dev
	ISOTHERM_EXACTNESS_CASES=10000 $(BIN)/pytest -s --timeout 3600 tests/exactness

chaos-short: $(VENV)/.installed-dev
	$(BIN)/pytest -m chaos --durations=25 tests/e2e

chaos: $(VENV)/.installed-dev
	ISOTHERM_CHAOS_ROUNDS=20 $(BIN)/pytest -s --timeout 3600 tests/e2e/test_elastic.py
	ISOTHERM_CHAOS_ROUNDS=5 $(BIN)/pytest -s --timeout 3600 tests/e2e/test_roll.py
	ISOTHERM_CHAOS_ROUNDS=10 $(BIN)/pytest -s --timeout 3600 tests/e2e/test_pauses.py
	ISOTHERM_CHAOS_ROUNDS=10 $(BIN)/pytest -s --timeout 3600 tests/e2e/test_hosts.py
	ISOTHERM_CHAOS_ROUNDS=10 $(BIN)/pytest -s --timeout 3600 tests/e2e/test_lifecycle.py

# make bench-elastic [SKEWED=DIR] [STEADY=300] [ROUNDS=20]: criteria 1 to 6 of elasticity. SKEWED: a checkpoint whose
# router prefers some experts
STEADY ?= 300
ROUNDS ?= 20
bench-elastic: $(VENV)/.installed-dev
	$(BIN)/python tests/bench_elastic/policy.py
	$(BIN)/python tests/bench_elastic/skew.py $(if $(SKEWED),--model $(call quoted,$(SKEWED)))
	ISOTHERM_CHAOS_ROUNDS=$(ROUNDS) $(BIN)/pytest -s --timeout 3600 tests/e2e/test_elastic.py
	$(BIN)/python tests/bench_elastic/shift.py --steady $(STEADY)
	$(BIN)/pytest -s tests/e2e/test_nodes.py

# tests/bench/make_checkpoint.py writes the model of docs/performance.md's figures.
# make bench BF16=DIR [FP8=DIR] [PEERS='--vllm PYTHON --llama-cpp DIR …']
bench: $(VENV)/.installed-dev
	$(BIN)/python tests/bench/compare.py --bf16 $(call quoted,$(BF16)) $(if $(FP8),--fp8 $(call quoted,$(FP8))) $(PEERS)
	$(BIN)/isotherm bench served $(call quoted,$(or $(FP8),$(BF16)))

# make bench-mtp [MODEL=tiny]: speculation's goals, offline and through HTTP; fails where one is missed.
bench-mtp: $(VENV)/.installed-dev
	$(BIN)/python tests/bench/mtp.py $(if $(MODEL),--model $(call quoted,$(MODEL)))

bench-overload: $(VENV)/.installed-dev
	$(BIN)/python tests/bench/overload.py
	$(BIN)/python tests/bench/beside_batch.py
	$(BIN)/python tests/bench/tenants.py
	$(BIN)/python tests/bench/metrics_cost.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror kernels/native/csrc/*
	$(BIN)/mypy -p isotherm.cluster -p isotherm.actors -p isotherm.kernels

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
