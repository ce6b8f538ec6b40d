# make train   sets up .venv and trains a small GPT on the Python documentation
# make test    sets up .venv, then lint and all tests

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --disable-pip-version-check --quiet

.PHONY: train test clean

train: .venv/ready
	.venv/bin/python train.py

test: .venv/ready-dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m pytest -n 2 tests

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('flatGPT needs Python 3.11 or newer; make PYTHON=python3.12 chooses one')"
	$(PYTHON) -m venv .venv
	@echo "installing the pins of requirements.txt into .venv (a few minutes, once)"
	$(PIP) -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(PIP) -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
