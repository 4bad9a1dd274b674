# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test lint bench truth
python := .venv/bin/python

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing on a Debian 12 host (as root) and make .venv
	@.ci/setup

setup-test: # and the servers of other runtimes that the tests observe
	@.ci/setup test

demo: setup ## Observe a reference Bucket under load and show where the time went (as root)
	@$(python) -m bucketprobe.demo

test: setup-test ## Run all tests (as root, for those that load probes)
	$(python) -m pytest

# mypy reads a plain copy: it does not follow the mapping of folders to packages that an editable install makes.
lint: setup ## Check style with ruff and types with mypy
	$(python) -m ruff check
	@rm -rf build .venv/typecheck
	@$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --target .venv/typecheck .
	@rm -rf build
	cd .venv/typecheck && ../bin/python -m mypy --config-file ../../pyproject.toml -p bucketprobe

bench: setup ## Measure what the agent costs, and update the README's tables (as root, some twelve minutes)
	@$(python) tests/bench/bench.py
	@$(python) tests/bench/readme_table.py

truth: setup-test ## Compare what the agent reports with servers that know the truth, and update the README's table (as root)
	@$(python) tests/truth/matrix.py; code=$$?; \
	[ $$code -gt 1 ] || $(python) tests/truth/readme_table.py || code=$$?; \
	$(python) tests/truth/digests.py; digests=$$?; \
	[ $$digests -gt 1 ] || $(python) tests/truth/digest_readme.py || digests=$$?; \
	exit $$((code > digests ? code : digests))
