VENV ?= .venv
PY := $(VENV)/bin/python
# Idle OpenMP threads that spin slow a shared machine down tenfold; the tests are small, so few threads are fastest.
export OMP_WAIT_POLICY ?= PASSIVE
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} WANDB_MODE=$${WANDB_MODE:-disabled}

.PHONY: test test-all demo lint env clean

test: $(VENV)/.dev             ## fast tests
	$(TEST_ENV) $(PY) -m pytest -q -m "not slow"

test-all: $(VENV)/.dev         ## all tests
	$(TEST_ENV) $(PY) -m pytest -q

demo: $(VENV)/.run             ## rewards and PeFL on the embedded dataset, minutes on a CPU
	PATH="$(abspath $(VENV))/bin:$$PATH" bash runs/demo.sh

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
