# Every target starts from a bare clone: it makes .venv and installs densecl into it first.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := nbs tests benchmarks hubconf.py setup.py

.PHONY: demo test test-long lint lab export readme site clean

demo: .venv/installed           ## a real DenseCL run on the embedded photographs, then a figure of its matches
	$(BIN)/python -m densecl.train demo

test: .venv/installed-dev lint  ## notebooks exported and clean? do they run? processes, signals and the command line?
	sh tests/no_drift.sh $(BIN)
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 tests

test-long: .venv/installed-dev  ## what takes longer: the slow cells and the slow tests
	$(BIN)/nbdev_test --n_workers 2 --flags slow
	$(BIN)/python -m pytest -q tests --long

lint: .venv/installed-dev       ## ruff's rules and its format, of the notebooks too
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/ruff format --quiet --check $(SOURCES)

lab: .venv/installed-dev        ## the notebooks, in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=. nbs/index.ipynb

export: .venv/installed-dev     ## after editing a notebook: format it, export densecl/ and README.md, clean it
	$(BIN)/ruff check --quiet --fix --select I,F401 $(SOURCES)
	$(BIN)/ruff format --quiet $(SOURCES)
	$(BIN)/nbdev_export
	$(MAKE) readme
	$(BIN)/nbdev_clean

readme: .venv/installed-dev     ## README.md is nbs/index.ipynb without its hidden cells
	sh tests/readme.sh $(BIN) > README.md.new && mv README.md.new README.md

site: .venv/installed-dev       ## every chapter as a web page in _site/, with a search, readable offline
	rm -rf _site
	$(BIN)/python tests/site_pages.py _site

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python settings.ini setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: .venv/bin/python settings.ini setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv runs _proc _docs _site build dist densecl.egg-info
