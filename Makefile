# Every target sets itself up in .venv.
PYTHON ?= python3
BIN := .venv/bin
TOOLS := PATH="$(abspath $(BIN)):$$PATH"
# a worker a core, one thread each; a file stays with one worker, and slow files come first. Builds inside of tests are no
# part of this make. Bytecode is kept: hundreds of processes would compile our modules, each for itself
PYTEST = MAKEFLAGS= PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 \
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 1
CMAKE := $(or $(wildcard $(BIN)/cmake),cmake)
PREFIX := kernels/native

.PHONY: demo demo-hitoksr demo-in-token check test test-quick test-isa lint bench native wheel clean
.PHONY: cpp cpp-sanitize cpp-sanitize-memory cpp-sanitize-threads cpp-tidy cpp-fuzz
.PHONY: train-hitoksr train-in-token

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[cpu,export,dev]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps tritonclient # for the format of a file
	touch $@

# both systems at once: tracing keeps one core busy
demo: .venv/ready
	@echo "building and restoring with both systems, about a minute"
	@$(MAKE) --no-print-directory -j 2 --output-sync demo-hitoksr demo-in-token
	$(BIN)/python tools/compare.py demo/sample.png demo/original.png hitoksr=out/hitoksr.png in-token=out/in-token.png -o out/demo.png

demo-hitoksr: .venv/ready
	$(BIN)/tilewright export build hitoksr --weights demo/hitoksr -o out/hitoksr-demo
	$(BIN)/tilewright runtime restore demo/sample.png out/hitoksr.png --bundle out/hitoksr-demo

demo-in-token: .venv/ready
	$(BIN)/tilewright export build in-token --preset demo --weights demo/in-token -o out/in-token-demo
	$(BIN)/tilewright runtime restore demo/sample.png out/in-token.png --bundle out/in-token-demo --steps 8 --seed 0

# about an hour each on 2 cores; each goes on where it stopped
train-hitoksr: .venv/ready
	PYTHONPATH=tools $(BIN)/python -W ignore -m train.hitoksr build/train/hitoksr demo/hitoksr

train-in-token: .venv/ready
	PYTHONPATH=tools $(BIN)/python -W ignore -m train.in_token build/train/in-token demo/in-token

# a few minutes on two cores
check: .venv/ready
	@$(MAKE) --no-print-directory -j 2 --output-sync lint test-quick

test: .venv/ready
	$(PYTEST) --durations=10

test-quick: .venv/ready
	$(PYTEST) -q -m "not slow"

# what CPUs with fewer instructions compute: PyTorch, oneDNN and MKL use no more than they are told
test-isa: .venv/ready
	for isa in default:SSE41:SSE4_2 avx2:AVX2:AVX2 avx512:AVX512_CORE:AVX512; do \
		set -- $$(echo $$isa | tr : ' '); echo "$$@"; \
		ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3 \
			$(PYTEST) -q tests/kernels tests/export/networks tests/export/graph || exit 1; \
	done

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python bench/run.py

# needs a C++ compiler, CMake, and Debian's mirror where ONNX Runtime's headers are not installed
native:
	test -n "$$ONNXRUNTIME_ROOT" || pkg-config --exists libonnxruntime || kernels/native/headers.sh build/onnxruntime
	$(CMAKE) -S kernels/native -B build/native $(if $(shell command -v ninja),-G Ninja)
	$(CMAKE) --build build/native
	$(CMAKE) --install build/native --prefix $(PREFIX)

# the C++ library and its command; needs what `native` needs, and libpng. The library of ONNX Runtime is that of .venv
cpp: .venv/ready
	test -n "$$ONNXRUNTIME_ROOT" || pkg-config --exists libonnxruntime || kernels/native/headers.sh build/onnxruntime
	$(CMAKE) -S runtime/cpp -B build/cpp $(if $(shell command -v ninja),-G Ninja) -DTILEWRIGHT_TESTS=$(abspath tests/runtime/cpp)
	$(CMAKE) --build build/cpp
	build/cpp/tests/vectors tests/vectors tests/programs

# the tests of the C++ library under AddressSanitizer and UndefinedBehaviorSanitizer, and beside them under ThreadSanitizer
cpp-sanitize: .venv/ready
	@$(MAKE) --no-print-directory -j 2 --output-sync cpp-sanitize-memory cpp-sanitize-threads

cpp-sanitize-memory: export TILEWRIGHT_SANITIZE = address,undefined
cpp-sanitize-threads: export TILEWRIGHT_SANITIZE = thread
cpp-sanitize-memory cpp-sanitize-threads: .venv/ready
	MAKEFLAGS= $(BIN)/pytest -q tests/runtime/cpp -k 'not native and not install'

# needs clang-tidy, and build/cpp of `make cpp`
cpp-tidy:
	run-clang-tidy -quiet -p build/cpp '$(abspath runtime/cpp)/'

# needs Clang with its sanitizers. RUNS inputs for the readers of a bundle's files; build/fuzz/found keeps those that are new
RUNS ?= 1000000
cpp-fuzz: .venv/ready
	$(CMAKE) -S runtime/cpp -B build/fuzz -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DTILEWRIGHT_TOOLS=OFF \
		-DTILEWRIGHT_TESTS=$(abspath tests/runtime/cpp) -DTILEWRIGHT_FUZZ=ON -DTILEWRIGHT_SANITIZE=address,undefined
	$(CMAKE) --build build/fuzz --target fuzz
	$(BIN)/python tests/runtime/cpp/corpus.py build/fuzz/seeds $(wildcard out/*-demo)
	mkdir -p build/fuzz/found
	build/fuzz/tests/fuzz -runs=$(RUNS) -max_len=65536 -artifact_prefix=build/fuzz/crash- build/fuzz/found build/fuzz/seeds

# into dist/: the sdist, the pure wheel, and a wheel for this platform with the native kernels; auditwheel finds its tag
wheel: .venv/ready
	rm -rf dist build/lib* build/bdist* build/wheel # setuptools would pack what an earlier build left
	$(BIN)/python -m build --no-isolation
	$(TOOLS) python -m build --no-isolation --wheel -C--build-option=--native -o build/wheel
	$(TOOLS) auditwheel repair -w dist build/wheel/*.whl
	$(TOOLS) auditwheel show dist/*linux*.whl

clean:
	rm -rf .venv out build dist *.egg-info
