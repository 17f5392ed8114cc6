# Every target sets itself up in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[cpu,export,dev]'
	touch $@

demo: .venv/ready
	$(BIN)/tilewright export build hitoksr --preset tiny --random-weights 0 -o out/hitoksr-tiny
	$(BIN)/tilewright runtime restore docs/sample.png out/demo.png --bundle out/hitoksr-tiny

test: .venv/ready
	$(BIN)/pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p tilewright.runtime
	$(BIN)/mypy -p tilewright.export -p tilewright.kernels -p tilewright.calib

bench: .venv/ready
	$(BIN)/python bench/run.py

clean:
	rm -rf .venv out build *.egg-info
