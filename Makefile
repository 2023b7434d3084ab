# make demo    boot Debian's kernel and look at what it saw
# make test    every test, on this host's KVM and in the nested lane
# make shell   an interactive shell in a guest
# make setup   only make .venv/bin/vmm ready
# make fuzz    search for bugs for two hours: ARGS="--minutes N --target NAME", docs/fuzzing.md
# make soak    machines for half an hour: nothing may be left of them (ARGS="--minutes 5", "--linux --minutes 60")
# make lint | bench | clean

PYTHON = .venv/bin/python
# Arguments for pytest, e.g. make test ARGS="-k boot"; for demo and shell see examples/demo.py -h.
ARGS =

.PHONY: demo test shell setup lint bench fuzz clean compiled

demo: compiled
	$(PYTHON) -m examples.demo $(ARGS)

shell: compiled
	$(PYTHON) -m examples.demo --shell $(ARGS)

test: compiled
	$(PYTHON) -m tests.lanes $(ARGS)

setup: .venv/.ready

# pip writes vmm/_libc.py and vmm/kvm/_abi.py from the C declarations, vmm/sandbox/_filters.py from the
# lists of calls, and compiles vmm/virtio/kernel, so a change of those installs again.
.venv/.ready: tools/setup pyproject.toml hatch_build.py vmm/libc_build.py vmm/kvm/abi_build.py vmm/sandbox/calls.py \
		vmm/sandbox/seccomp.py vmm/sandbox/filter_build.py $(wildcard vmm/agent/*.[ch]) \
		$(wildcard vmm/virtio/kernel/*.[ch]) vmm/virtio/kernel/build.py
	tools/setup

# The nested lane's processor is slow and its disk read-only: it must find compiled code.
compiled: .venv/.ready
	@$(PYTHON) -m compileall -q vmm tests examples benchmarks

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: compiled
	$(PYTHON) -m benchmarks $(ARGS)

soak: compiled
	$(PYTHON) -m tests.soak $(ARGS)

# libFuzzer and its sanitizers are clang's: some 400 MB of packages, which nothing else here needs.
fuzz: compiled
	@command -v clang >/dev/null || tools/setup clang llvm libclang-rt-dev
	@$(PYTHON) -c 'import atheris' 2>/dev/null || \
		{ echo "fuzz: installing Atheris into .venv"; $(PYTHON) -m pip install -q -e '.[fuzz]'; }
	$(PYTHON) -m tests.fuzz $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache benchmarks/results
	rm -f vmm/_libc.py vmm/sandbox/_filters.py vmm/kvm/_abi.py vmm/virtio/kernel/_abi.py vmm/virtio/kernel/_kernel.so
	find vmm tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
