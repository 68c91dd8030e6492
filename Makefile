# Two commands for a fresh clone: `make demo` and `make test`. Both make the virtual environment they need.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin

.PHONY: demo test lint docs dist dist-aarch64 clean

demo: $(VENV)/installed
	$(BIN)/siman convert resnet18 --data digits --weights none --recipe demo
	$(BIN)/siman export --format all
	$(BIN)/siman eval
	$(BIN)/siman eval --full-precision
	$(BIN)/siman eval runs/$$(cat runs/last)/model.onnx
	$(BIN)/siman runs

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -W error docs/build.py

# The wheel and the C library alone, for this machine or, with Debian's cross compiler, for 64-bit ARM.
dist-aarch64: CROSS = CMAKE_TOOLCHAIN_FILE=$(CURDIR)/siman_convert/native/cmake/aarch64-linux-gnu.cmake \
	_PYTHON_HOST_PLATFORM=linux-aarch64
dist dist-aarch64: $(VENV)/installed
	$(CROSS) SIMAN_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(CROSS) $(BIN)/cmake -S siman_convert/native -B build/$@
	$(BIN)/cmake --build build/$@ --target standalone --parallel
	mv build/$@/*.tar.gz dist

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
