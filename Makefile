# Every target sets up what it needs: a virtual environment in .venv/ with pinned packages.
# Nothing outside this folder is touched, except Debian packages for ffcv when run as root.

PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
READY := .venv/.ready
FFCV := .venv/.ffcv
DALI := .venv/.dali
OLDEST := .venv-oldest/bin
OLDEST_READY := .venv-oldest/.ready
# What depends on torch and triton and on no optional package.
OLDEST_TESTS := tests/bt_fast $(wildcard tests/pipelines/augment/*.py) \
	$(addprefix tests/pipelines/convert/test_,parts.py) $(addprefix tests/tools/test_, \
	kernel_report.py profile.py gpu_suite.py compiled_traffic.py breakdown.py)

.PHONY: help demo test test-slow test-all test-oldest test-portable test-wheel lint coverage bench docs dist clean

help:
	@echo "make demo      convert drawn pictures, pretrain on them, probe the result (minutes, CPU)"
	@echo "make test      run the fast tests (minutes)"
	@echo "make test-slow run the other tests"
	@echo "make test-all  run all tests"
	@echo "make test-oldest   run those that depend on torch with the GPU machines' 2.11, in .venv-oldest/"
	@echo "make test-portable run what works on macOS and Windows: import, load_encoder, conversion"
	@echo "make lint      ruff and mypy"
	@echo "make coverage  run the tests and report the lines they do not reach"
	@echo "make bench     converter and loader against their rivals; DATA=folder of images"
	@echo "make docs      the site of the documentation, in site/; warnings are errors"
	@echo "make dist      wheel and source archive of a release, in dist/"
	@echo "make test-wheel    run the first commands of the README with this wheel in a new environment"
	@echo "make clean     remove what the other targets made, but not .venv/ and .venv-oldest/"

demo: demo/out.beton
	$(BIN)/bt-fast pretrain --recipe demo --data demo/out.beton

# Two files of tests at a time. The markers are described in pyproject.toml.
test: $(FFCV) $(DALI)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not cluster"

test-slow: $(FFCV) $(DALI)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or cluster"

test-all: test test-slow

# The GPU machines' torch 2.11; no optional package, whose tests skip.
test-oldest: $(OLDEST_READY)
	$(OLDEST)/python -m pytest -n 2 --dist loadfile $(OLDEST_TESTS)

test-portable: $(READY)
	$(BIN)/python -m pytest --noconftest tests/test_portable.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(FFCV) $(DALI)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --show-missing

bench: $(FFCV) $(DALI)
	@test -n "$(DATA)" || (echo "make bench DATA=folder/of/class/folders" >&2; exit 2)
	$(BIN)/python tools/bench_convert.py $(DATA)
	$(BIN)/python tools/bench_loader.py $(DATA)

docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

test-wheel: dist
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	.venv-wheel/bin/python tools/try_wheel.py
	rm -rf .venv-wheel

clean:
	rm -rf demo dist build site *.egg-info .coverage .coverage.*

demo/out.beton: demo/images
	$(BIN)/bt-convert demo/images demo/out.beton --overwrite

demo/images: tools/make_demo_images.py | $(READY)
	rm -rf demo/images
	mkdir -p demo
	$(BIN)/python tools/make_demo_images.py demo/images

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || (echo "Python 3.11 or newer is needed; set PYTHON=" >&2; exit 2)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# numpy 2.4 and newer do not work with the interpreter of Triton 3.6, whose tests would skip.
$(OLDEST_READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || (echo "Python 3.11 or newer is needed; set PYTHON=" >&2; exit 2)
	test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet torch==2.11.0 torchvision==0.26.0 triton==3.6.0 \
		"numpy<2.4" "pytest>=8.3" "pytest-xdist>=3.6" "hypothesis>=6.130" --editable .
	@touch $@

# ffcv is optional: where it cannot be built, the tests that need it skip and say why.
$(FFCV): $(READY)
	@sh tools/install_ffcv.sh $(BIN)/python
	@touch $@

# So is DALI (300 MB to download, 0.7 GB on the disk).
$(DALI): $(READY)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt nvidia-dali-cuda130 \
		|| echo "DALI could not be installed; its tests and benchmarks are skipped"
	@touch $@
