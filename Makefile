# Everything sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-catalog test-wide test-5.23 test-oldest test-versions test-lowest test-torchvision supported bench lint types check clean test-any-processor

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python hub_examples/quickstart.py

# transformers' own tests, of which tests/contracts/test_transformers_processing.py runs some, lie in its sdist alone.
$(VENV)/.transformers-tests: tests/support/transformers_sdist.txt $(VENV)/.installed
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
		--require-hashes -r $< -d $(VENV)/sdist
	tar -xzf $(VENV)/sdist/transformers-*.tar.gz -C $(VENV)
	rm -r $(VENV)/sdist
	touch $@

test: $(VENV)/.installed $(VENV)/.transformers-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not catalog and not wide" $(ARGS)

test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

# On a processor that rounds by shapes, layouts and addresses: a test that passes here passes on every one.
test-any-processor: $(VENV)/.installed
	ANY_PROCESSOR=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not catalog and not wide" $(ARGS)

test-catalog: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m catalog $(ARGS)

# Matrices beyond those: native processors, native classes that hold compositions, tiles, by every member.
test-wide: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m wide $(ARGS)

# The same tests with older versions of transformers.  The oldest reads sound files by librosa, and servers pin versions below 5.21.
test-5.23: $(VENV)-5.23/.installed
	OMP_NUM_THREADS=1 $(VENV)-5.23/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not catalog and not wide" $(ARGS)

test-oldest: $(VENV)-oldest/.installed
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not catalog and not wide" $(ARGS)

# Of these, what depends on transformers most: models, generation, processors, names and hooks of transformers.
VERSION_TESTS := $(wildcard tests/test_*modeling*.py tests/test_*process*.py tests/processing/*process*.py) \
	$(addprefix tests/language_model/test_,generation.py calling.py merging.py extra_inputs.py) tests/encoders/test_module.py \
	$(addprefix tests/,parts/test_versions.py contracts/test_transformers_hooks.py contracts/test_shared_processor.py) \
	tests/processing/test_conversations.py

test-versions:
	$(MAKE) test-5.23 ARGS="$(VERSION_TESTS)"
	$(MAKE) test-oldest ARGS="$(VERSION_TESTS)"

$(VENV)-5.23/.installed: TRANSFORMERS := 5.23.0
$(VENV)-oldest/.installed: TRANSFORMERS := 5.20.2
$(VENV)-5.23/.installed $(VENV)-oldest/.installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	sed 's/^transformers==.*/transformers==$(TRANSFORMERS)/' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch -c $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' librosa -c $(@D)/constraints.txt
	touch $@

# The same tests with the lowest version of everything that pyproject.toml allows.
test-lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/ruff check .
	$(VENV)-lowest/bin/ruff format --check .
	$(VENV)-lowest/bin/pre-commit validate-config .pre-commit-config.yaml
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not catalog and not wide" $(ARGS)

$(VENV)-lowest/.installed: pyproject.toml tests/support/lowest_pins.py
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python tests/support/lowest_pins.py > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check setuptools torch -c $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]' librosa \
		-c $(VENV)-lowest/constraints.txt
	touch $@

# The same tests beside torchvision, whose image and video processors are tested only here; its torch is of 5 GB.
test-torchvision: $(VENV)-torchvision/.installed
	OMP_NUM_THREADS=1 $(VENV)-torchvision/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not catalog and not wide" $(ARGS)
	OMP_NUM_THREADS=1 $(VENV)-torchvision/bin/python -m pytest -n 2 --dist worksteal -m catalog tests/catalog/test_catalog_processors.py -k "ImageProcessor and not Pil"
	OMP_NUM_THREADS=1 $(VENV)-torchvision/bin/python -m pytest -n 2 --dist worksteal -m wide tests/conversion/test_processors.py

$(VENV)-torchvision/.installed: pyproject.toml constraints.txt
	test -x $(VENV)-torchvision/bin/python || $(PYTHON) -m venv $(VENV)-torchvision
	sed 's/^torch==.*/torch==2.14.1\ntorchvision==0.29.1/' constraints.txt > $(VENV)-torchvision/constraints.txt
	$(VENV)-torchvision/bin/python -m pip install --quiet --disable-pip-version-check torch torchvision -c $(VENV)-torchvision/constraints.txt
	$(VENV)-torchvision/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c $(VENV)-torchvision/constraints.txt
	touch $@

supported: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m catalog --supported=docs/supported.md $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) $(VENV)-5.23 $(VENV)-oldest $(VENV)-lowest $(VENV)-torchvision outputs build *.egg-info
