VENV ?= .venv
PY := $(VENV)/bin/python
# Idle OpenMP threads that spin slow a shared machine down tenfold; the tests are small: a thread each, several at a time.
export OMP_WAIT_POLICY ?= PASSIVE
JOBS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu); echo $$((n < 4 ? n : 4)))
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} WANDB_MODE=$${WANDB_MODE:-disabled}
PYTEST := $(TEST_ENV) $(PY) -m pytest -q -n $(JOBS) --dist worksteal

.PHONY: test test-all demo lint env clean

test: $(VENV)/.dev             ## fast tests
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev         ## all tests
	$(PYTEST)

demo: $(VENV)/.run             ## rewards and PeFL on the embedded dataset, minutes on a CPU
	$(PY) runs/demo.py

lint: $(VENV)/.dev
	$(PY) -m ruff check .

env: $(VENV)/.dev

clean:
	rm -rf $(VENV)

# torch comes first, alone: pip then takes the build that its index settings prefer (a CPU build, for instance), and the
# second call finds the pin satisfied.
$(VENV)/.run: requirements.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q $$(grep '^torch==' requirements.txt)
	$(PY) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@
