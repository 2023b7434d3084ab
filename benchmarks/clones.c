/*
 * The floor under row s: the ioctls and mappings of a restore, of clones and of a rollback, in C.
 *
 *   clones serve     reads commands, answers each with a line of nanoseconds:
 *       restore CLOSE FILE SIZE   VM over a private mapping of FILE, state put in, run to its first
 *                             exit; and closed, if CLOSE is 1
 *       create CLOSE SIZE     the same over fresh memory, without state
 *       clones N FILE SIZE    N of the first kind at once, a thread each, until all had an exit
 *       busy N FILE SIZE  N of a guest that counts at 2 MiB, a thread each, until all have counted
 *       rollback N FILE SIZE  run a guest that writes to pages, then undo that; the median of N
 *       hold N FILE SIZE      N of the first kind, after their first exit, until the next command
 */
#include <errno.h>

#include "native.h"

struct page_region { uint64_t start, end, categories; };
struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL _IOWR('f', 16, struct pm_scan_arg)
#define FILE_PAGE 4
#define PRESENT_OR_SWAPPED (8 | 16)
#define MAX_CLONES 1000

/* All of a vCPU's state, and of the VM's, as vmm.snapshot takes it. */
static struct state {
	struct { struct kvm_msrs head; struct kvm_msr_entry entries[255]; } msrs;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	struct kvm_lapic_state lapic;
	struct kvm_vcpu_events events;
	struct kvm_mp_state mp_state;
	struct kvm_xsave xsave;
	struct kvm_irqchip chips[3];
	struct kvm_clock_data clock;
} saved;

static struct { struct kvm_msr_list head; uint32_t indices[1024]; } list;
static uint64_t size;

static void get_state(struct machine *m, struct state *s)
{
	CALL(m->vcpu, KVM_GET_MP_STATE, &s->mp_state);
	CALL(m->vcpu, KVM_GET_REGS, &s->regs);
	CALL(m->vcpu, KVM_GET_SREGS, &s->sregs);
	CALL(m->vcpu, KVM_GET_XCRS, &s->xcrs);
	CALL(m->vcpu, KVM_GET_DEBUGREGS, &s->debugregs);
	CALL(m->vcpu, KVM_GET_LAPIC, &s->lapic);
	CALL(m->vcpu, KVM_GET_VCPU_EVENTS, &s->events);
	CALL(m->vcpu, KVM_GET_XSAVE, &s->xsave);
	list.head.nmsrs = 1024;
	CALL(m->kvm, KVM_GET_MSR_INDEX_LIST, &list);
	s->msrs.head.nmsrs = 0;
	for (unsigned i = 0; i < list.head.nmsrs && s->msrs.head.nmsrs < 255; i++) {
		struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = {
			.head.nmsrs = 1, .entry.index = list.indices[i],
		};
		if (ioctl(m->vcpu, KVM_GET_MSRS, &one) == 1 && ioctl(m->vcpu, KVM_SET_MSRS, &one) == 1)
			s->msrs.entries[s->msrs.head.nmsrs++] = one.entry;
	}
	for (int i = 0; i < 3; i++) {
		s->chips[i].chip_id = i;
		CALL(m->vm, KVM_GET_IRQCHIP, &s->chips[i]);
	}
	CALL(m->vm, KVM_GET_CLOCK, &s->clock);
}

static void set_state(struct machine *m, struct state *s)
{
	for (int i = 0; i < 3; i++)
		CALL(m->vm, KVM_SET_IRQCHIP, &s->chips[i]);
	struct kvm_clock_data clock = { .clock = s->clock.clock };
	CALL(m->vm, KVM_SET_CLOCK, &clock);
	CALL(m->vcpu, KVM_SET_MP_STATE, &s->mp_state);
	CALL(m->vcpu, KVM_SET_SREGS, &s->sregs);
	CALL(m->vcpu, KVM_SET_REGS, &s->regs);
	CALL(m->vcpu, KVM_SET_XCRS, &s->xcrs);
	CALL(m->vcpu, KVM_SET_XSAVE, &s->xsave);
	CALL(m->vcpu, KVM_SET_DEBUGREGS, &s->debugregs);
	CALL(m->vcpu, KVM_SET_LAPIC, &s->lapic);
	CALL(m->vcpu, KVM_SET_MSRS, &s->msrs);
	CALL(m->vcpu, KVM_SET_VCPU_EVENTS, &s->events);
}

/* A private mapping of the file, or fresh memory without one. */
static void map_file(struct machine *m, const char *file)
{
	int fd = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
	if (file && fd < 0)
		die(file);
	int flags = MAP_PRIVATE | MAP_NORESERVE | (file ? 0 : MAP_ANONYMOUS);
	m->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (m->memory == MAP_FAILED)
		die("mmap");
	close(fd);
	struct kvm_userspace_memory_region low = {
		.memory_size = size < 3UL << 30 ? size : 3UL << 30,
		.userspace_addr = (uintptr_t)m->memory,
	};
	CALL(m->vm, KVM_SET_USER_MEMORY_REGION, &low);
	struct kvm_userspace_memory_region high = {
		.slot = 1, .guest_phys_addr = 4UL << 30, .memory_size = size - low.memory_size,
		.userspace_addr = low.userspace_addr + low.memory_size,
	};
	if (high.memory_size)
		CALL(m->vm, KVM_SET_USER_MEMORY_REGION, &high);
}

/* Close it; its memory goes last, when no VM maps it. */
static void unmap(struct machine *m)
{
	uint8_t *memory = m->memory;
	m->memory = NULL;
	destroy(m);
	munmap(memory, size);
}

static void *run_thread(void *machine)
{
	run(machine);
	return NULL;
}

/* The state of a machine that is about to run FILE (see guests.exits_image) at CPL3. */
static void prepare(const char *file)
{
	struct machine m;
	begin(&m, 0);
	map_file(&m, file);
	finish(&m);
	set_long(&m, 3);
	get_state(&m, &saved);
	unmap(&m);
}

static uint64_t restore(const char *file, int closing)
{
	struct machine m;
	uint64_t start = now();
	begin(&m, 0);
	map_file(&m, file);
	finish(&m);
	if (file) {
		set_state(&m, &saved);
	} else {
		set_up_pvh(&m, exit_code, sizeof exit_code);
	}
	run(&m);
	uint64_t taken = now() - start;
	unmap(&m);
	return closing ? now() - start : taken;
}

static struct machine held[MAX_CLONES];
static pthread_t threads[MAX_CLONES];
static int holding;

static void make_clones(int count, const char *file)
{
	for (int i = 0; i < count; i++)
		begin(&held[i], 0);
	for (int i = 0; i < count; i++) {
		map_file(&held[i], file);
		finish(&held[i]);
		set_state(&held[i], &saved);
	}
	holding = count;
}

static void drop_clones(void)
{
	for (int i = 0; i < holding; i++)
		unmap(&held[i]);
	holding = 0;
}

static uint64_t clones(int count, const char *file)
{
	uint64_t start = now();
	make_clones(count, file);
	for (int i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, run_thread, &held[i]))
			die("pthread_create");
	for (int i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	uint64_t taken = now() - start;
	drop_clones();
	return taken;
}

static void nothing(int signal)
{
	(void)signal;
}

/* Run until a signal comes with immediate_exit set. */
static void *run_busy(void *machine)
{
	struct machine *m = machine;
	while (!m->run->immediate_exit)
		if (ioctl(m->vcpu, KVM_RUN, 0) == 0 || errno != EINTR)
			die("KVM_RUN");
	return NULL;
}

/* Until each machine's counter has moved; the threads are ended after the time was taken. */
static uint64_t busy(int count, const char *file)
{
	struct sigaction action = { .sa_handler = nothing };
	sigaction(SIGUSR1, &action, NULL);
	uint64_t start = now();
	make_clones(count, file);
	for (int i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, run_busy, &held[i]))
			die("pthread_create");
	for (int i = 0; i < count;) {
		if (*(volatile uint64_t *)(held[i].memory + (2 << 20)))
			i++;
		else
			usleep(1000);
	}
	uint64_t taken = now() - start;
	for (int i = 0; i < count; i++) {
		held[i].run->immediate_exit = 1;
		pthread_kill(threads[i], SIGUSR1);
	}
	for (int i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	drop_clones();
	return taken;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

/* Put back every page of the machine's own, and its state. */
static void roll_back(struct machine *m, int pagemap, const uint8_t *base)
{
	static struct page_region found[4096];
	struct pm_scan_arg scan = {
		.size = sizeof scan, .start = (uintptr_t)m->memory, .end = (uintptr_t)m->memory + size,
		.vec = (uintptr_t)found, .vec_len = 4096,
		.category_inverted = FILE_PAGE, .category_mask = FILE_PAGE,
		.category_anyof_mask = PRESENT_OR_SWAPPED, .return_mask = FILE_PAGE,
	};
	int count = CALL(pagemap, SCAN_IOCTL, &scan);
	for (int i = 0; i < count; i++)
		memcpy((void *)found[i].start, base + (found[i].start - (uintptr_t)m->memory),
		       found[i].end - found[i].start);
	set_state(m, &saved);
}

static uint64_t rollbacks(int count, const char *file)
{
	struct machine m;
	uint64_t taken[1000];
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), fd = open(file, O_RDONLY);
	const uint8_t *base = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
	if (base == MAP_FAILED || count > 1000)
		die(file);
	begin(&m, 0);
	map_file(&m, file);
	finish(&m);
	set_state(&m, &saved);
	for (int i = 0; i < count; i++) {
		run(&m);
		uint64_t start = now();
		roll_back(&m, pagemap, base);
		taken[i] = now() - start;
	}
	unmap(&m);
	munmap((void *)base, size);
	close(fd);
	close(pagemap);
	qsort(taken, count, sizeof *taken, compare);
	return taken[count / 2];
}

int main(void)
{
	char line[4096], file[4000];
	int count;
	cpuid_once = 1;
	while (fgets(line, sizeof line, stdin)) {
		uint64_t taken = 0;
		drop_clones();
		if (sscanf(line, "restore %d %3999s %lu", &count, file, &size) == 3) {
			prepare(file);
			taken = restore(file, count);
		} else if (sscanf(line, "create %d %lu", &count, &size) == 2) {
			taken = restore(NULL, count);
		} else if (sscanf(line, "clones %d %3999s %lu", &count, file, &size) == 3) {
			prepare(file);
			taken = clones(count, file);
		} else if (sscanf(line, "busy %d %3999s %lu", &count, file, &size) == 3) {
			prepare(file);
			taken = busy(count, file);
		} else if (sscanf(line, "rollback %d %3999s %lu", &count, file, &size) == 3) {
			prepare(file);
			taken = rollbacks(count, file);
		} else if (sscanf(line, "hold %d %3999s %lu", &count, file, &size) == 3) {
			prepare(file);
			make_clones(count, file);
			for (int i = 0; i < count; i++)
				run(&held[i]);
		} else {
			fprintf(stderr, "what is %s", line);
			return 2;
		}
		printf("%lu\n", (unsigned long)taken);
		fflush(stdout);
	}
	return 0;
}
