# `make demo` trains, `make test` checks; both make what they need in .venv. PYTHON names another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERL_VENV := .venv-verl
VERIFIERS_VENV := .venv-verifiers
OPENENV_VENV := .venv-openenv
SDKS_VENV := .venv-sdks
HARBOR_VENV := .venv-harbor
TRACKERS_VENV := .venv-trackers
RELEASE_VENV := .venv-release
DOCS_VENV := .venv-docs
HARBOR_BASE ?= python3.12
SLURM := slurmctld slurmd slurm-client munge
AGENTS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/millrace/agents-$(shell cat tests/gateway/agents/package.json \
	constraints/mini-swe-agent.txt | sha256sum | cut -c1-12)
ENVIRONMENTS_PYTEST = PATH="$(abspath $(VERIFIERS_VENV))/bin:$$PATH" python -m pytest -o addopts=-ra -W default
SDKS_PYTEST = SDKS_PYTHON=$(abspath $(SDKS_VENV))/bin/python $(BIN)/pytest -n2 --dist=load
VERL_PYTEST = $(VERL_VENV)/bin/python -m pytest -o addopts=-ra -W default
# Compiling by itself, on all cores: pip takes one. What can't be compiled (templates) is not imported either.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
SDKS_PIP = $(SDKS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints/sdks.txt
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
# The exact versions that this was tested with, and the CPU's torch. `make CONSTRAINTS=... ` names another set.
CONSTRAINTS ?= constraints/cpu.txt

# Where this is set, as in images of containers, every engine that a test starts would compile Millrace anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-verl test-verl-short test-verl-all test-environments test-environments-short test-sdks \
	test-sdks-short test-agents test-harbor test-ray test-slurm test-trackers test-page release release-short docs lint types \
	unit clean

demo: $(VENV)/train.stamp
	$(BIN)/millrace train examples/gsm8k_multiturn/cpu.yaml name=demo-$$(date +%Y%m%d-%H%M%S)

test: lint types unit

# Also the slow tests: more stock engines, more versions of them, and longer runs of faults.
test-all: lint types
	$(BIN)/pytest -m "slow or not slow"

# rollout.name=millrace in verl's own trainer, in an environment of its own, since verl needs older packages.
test-verl: $(VERL_VENV)/compiled.stamp
	$(VERL_PYTEST) -m "not slow" tests/integrations/verl

# Without a run of the trainer: the plugin, its settings, and one completion.
test-verl-short: $(VERL_VENV)/verl.stamp
	$(VERL_PYTEST) $(addprefix tests/integrations/verl/,test_plugin.py test_settings.py \
		test_server.py::test_a_completion_has_its_tokens_logprobs_and_step)

# Also several ranks, tools and asynchronous training.
test-verl-all: $(VERL_VENV)/compiled.stamp
	$(VERL_PYTEST) tests/integrations/verl

# Environments of verifiers and OpenEnv, and verifiers' training client on a fleet. The two libraries need different
# versions of mcp, so each has an environment; the harnesses of verifiers run by the uv in its own.
test-environments: $(VERIFIERS_VENV)/verifiers.stamp $(OPENENV_VENV)/openenv.stamp
	OPENENV_PYTHON=$(abspath $(OPENENV_VENV))/bin/python $(ENVIRONMENTS_PYTEST) tests/integrations/environments

# Without OpenEnv: an episode of verifiers, its training client, and the gateway's format by `renderers`.
test-environments-short: $(VERIFIERS_VENV)/verifiers.stamp
	$(ENVIRONMENTS_PYTEST) $(addprefix tests/integrations/environments/,test_verifiers_client.py test_renderers_format.py \
		test_verifiers.py::test_an_episode_is_verifiers_own)

# Clients of agents before the gateway, in an environment of their own.
test-sdks: $(VENV)/dev.stamp $(SDKS_VENV)/sdks.stamp
	$(SDKS_PYTEST) tests/gateway/test_sdks.py

# Without the clients that need many packages, and without a real engine.
test-sdks-short: $(VENV)/dev.stamp $(SDKS_VENV)/short.stamp
	$(SDKS_PYTEST) tests/gateway/test_sdks.py -k "tool_loop and (openai or anthropic or pydantic_ai)"

# Real agents before the gateway: 1.7 GB, which stay in the cache. It needs npm, and the right to make namespaces.
test-agents: $(VENV)/dev.stamp $(AGENTS)/agents.stamp
	MILLRACE_AGENTS=$(AGENTS) $(BIN)/pytest -n0 tests/gateway/test_agents.py tests/gateway/test_recipes.py

# Trials of Harbor, which needs Python 3.12 or newer. It needs tmux. With the agents of `make test-agents`, if they are
# installed, four more of Harbor's agents run.
test-harbor: $(VENV)/dev.stamp $(HARBOR_VENV)/harbor.stamp
	HARBOR_PYTHON=$(abspath $(HARBOR_VENV))/bin/python MILLRACE_AGENTS=$(AGENTS) \
		$(BIN)/pytest -n2 --dist=load tests/integrations/harbor

# Engines on a Ray cluster of three nodes, all on this host. Ray comes into $(VENV): 79 MB, 240 MB unpacked.
test-ray: $(VENV)/ray.stamp
	$(BIN)/pytest -n0 -m "slow or not slow" tests/launch/test_ray.py

# Engines in jobs of a Slurm with four nodes, all on this host. Slurm comes from the distribution's packages (Debian's).
test-slurm: $(VENV)/dev.stamp
	@export PATH="$$PATH:/usr/sbin"; for program in munged slurmctld slurmd srun sbatch; do \
		command -v $$program > /dev/null && continue; \
		[ "$$(id -u)" = 0 ] || { echo "$$program is missing; as root, run: apt-get install $(SLURM)"; exit 1; }; \
		apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends $(SLURM) && break || exit 1; \
	done
	PATH="$$PATH:/usr/sbin" MILLRACE_SLURM=1 $(BIN)/pytest -n0 -m "slow or not slow" tests/launch/slurm

# TensorBoard, wandb, MLflow and Trackio, offline: a run that is killed and resumed, too. They bring many packages.
test-trackers: $(TRACKERS_VENV)/trackers.stamp
	$(TRACKERS_VENV)/bin/python -m pytest -o addopts=-ra -W default tests/train/trackers

# The files of a release in dist/, tried out on every Python from 3.11 to 3.14 that is here.
release: $(RELEASE_VENV)/release.stamp
	$(RELEASE_VENV)/bin/python tools/release.py dist

# On one Python.
release-short: $(RELEASE_VENV)/release.stamp
	$(RELEASE_VENV)/bin/python tools/release.py dist --short

# The page of runs in a Chromium, which comes from the distribution's packages (Debian's).
test-page: $(VENV)/dev.stamp
	@command -v chromium > /dev/null || { \
		[ "$$(id -u)" = 0 ] || { echo "chromium is missing; as root, run: apt-get install chromium"; exit 1; }; \
		apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium; }
	MILLRACE_BROWSER=$$(command -v chromium) $(BIN)/pytest -n0 tests/viewer/test_browser.py

# The documentation site, in site/. A link that leads nowhere fails the build. Look at it with:
# python3 -m http.server --directory site
docs: $(DOCS_VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

unit: $(VENV)/dev.stamp
	$(BIN)/pytest

clean:
	rm -rf $(VENV) $(VERL_VENV) $(VERIFIERS_VENV) $(OPENENV_VENV) $(SDKS_VENV) $(HARBOR_VENV) $(TRACKERS_VENV) $(RELEASE_VENV) \
		$(DOCS_VENV) site dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Millrace needs Python 3.11 or newer; name one with make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	@echo "installing torch, transformers and the rest into $(VENV): a minute or two"
	$(PIP) -e '.[train]'
	$(COMPILE)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	@echo "installing torch, transformers and the development tools into $(VENV): a minute or two"
	$(PIP) -e '.[dev]'
	$(COMPILE)
	@touch $@ $(VENV)/train.stamp

$(VENV)/ray.stamp: $(VENV)/dev.stamp constraints/ray.txt
	$(PIP) -c constraints/ray.txt -e '.[ray]'
	@touch $@

$(VERL_VENV)/verl.stamp: pyproject.toml constraints/verl-cpu.txt
	@echo "installing verl into $(VERL_VENV): two or three minutes"
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints/verl-cpu.txt \
		-e '.[verl]' hypothesis pytest pytest-asyncio pytest-timeout
	@touch $@

# The trainer's dozen processes would all compile the same modules.
$(VERL_VENV)/compiled.stamp: $(VERL_VENV)/verl.stamp
	$(VERL_VENV)/bin/python -m compileall -qq -j 0 $(VERL_VENV)/lib || true
	@touch $@

$(VERIFIERS_VENV)/verifiers.stamp: pyproject.toml constraints/verifiers-cpu.txt
	@echo "installing verifiers into $(VERIFIERS_VENV): two minutes or so"
	$(PYTHON) -m venv $(VERIFIERS_VENV)
	$(VERIFIERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints/verifiers-cpu.txt -e '.[train,verifiers,renderers]' hypothesis pytest pytest-asyncio pytest-timeout
	@touch $@

$(OPENENV_VENV)/openenv.stamp: constraints/openenv.txt
	@echo "installing OpenEnv into $(OPENENV_VENV): a minute or so"
	$(PYTHON) -m venv $(OPENENV_VENV)
	$(OPENENV_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints/openenv.txt openenv
	@touch $@

$(SDKS_VENV)/short.stamp: constraints/sdks.txt
	@echo "installing clients of agents into $(SDKS_VENV): a minute or so"
	$(PYTHON) -m venv $(SDKS_VENV)
	$(SDKS_PIP) openai anthropic openai-agents 'pydantic-ai-slim[openai,anthropic]'
	@touch $@

$(SDKS_VENV)/sdks.stamp: $(SDKS_VENV)/short.stamp
	@echo "installing more clients of agents into $(SDKS_VENV): two minutes or so"
	$(SDKS_PIP) langgraph langchain-openai langchain-anthropic litellm smolagents
	@touch $@

$(RELEASE_VENV)/release.stamp: constraints/release.txt
	@echo "installing build and twine into $(RELEASE_VENV)"
	$(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/release.txt \
		build twine cyclonedx-bom
	@touch $@

$(DOCS_VENV)/docs.stamp: constraints/docs.txt
	@echo "installing Material for MkDocs into $(DOCS_VENV): half a minute or so"
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints/docs.txt \
		mkdocs-material
	@touch $@

$(HARBOR_VENV)/harbor.stamp: constraints/harbor.txt
	@echo "installing Harbor into $(HARBOR_VENV): two to five minutes"
	$(HARBOR_BASE) -m venv $(HARBOR_VENV)
	$(HARBOR_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/harbor.txt \
		harbor mini-swe-agent
	@touch $@

$(TRACKERS_VENV)/trackers.stamp: pyproject.toml constraints/trackers-cpu.txt
	@echo "installing experiment trackers into $(TRACKERS_VENV): two minutes or so"
	$(PYTHON) -m venv $(TRACKERS_VENV)
	$(TRACKERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints/trackers-cpu.txt -e '.[train,tensorboard,wandb,mlflow,trackio]' \
		hypothesis pytest pytest-asyncio pytest-timeout
	@touch $@

$(AGENTS)/agents.stamp:
	@echo "installing agents into $(AGENTS): three minutes or so"
	mkdir -p $(AGENTS)
	cp tests/gateway/agents/package.json $(AGENTS)
	npm install --prefix $(AGENTS) --no-audit --no-fund
	$(PYTHON) -m venv $(AGENTS)/mini-swe-agent
	$(AGENTS)/mini-swe-agent/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints/mini-swe-agent.txt mini-swe-agent
	@touch $@
