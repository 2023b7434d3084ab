/* What vmm.Machine asks of KVM, asked by C and nothing else: for native.c and clones.c. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MEMORY (256UL << 20)
#define EXIT_PORT 0xf4
#define MARK_PORT 0xf1

struct machine {
	int kvm, vm, vcpu;
	uint8_t *memory;
	struct kvm_run *run;
	size_t run_size;
};

static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int call(int fd, unsigned long request, void *argument, const char *name)
{
	int result = ioctl(fd, request, argument);
	if (result < 0)
		die(name);
	return result;
}
#define CALL(fd, request, argument) call(fd, request, (void *)(uintptr_t)(argument), #request)

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static int cpuid_once; /* a restore has it from its snapshot */

/* The ioctls of Machine.__init__, in its order; the i8254 is what most monitors create, too. */
static void begin(struct machine *m, int with_pit)
{
	m->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (m->kvm < 0)
		die("/dev/kvm");
	CALL(m->kvm, KVM_GET_API_VERSION, 0);
	CALL(m->kvm, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS);
	CALL(m->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT);
	m->vm = CALL(m->kvm, KVM_CREATE_VM, 0);
	CALL(m->vm, KVM_SET_TSS_ADDR, 0xfffbd000UL);
	uint64_t identity = 0xfffbc000;
	CALL(m->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity);
	CALL(m->vm, KVM_CREATE_IRQCHIP, 0);
	struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
	if (with_pit)
		CALL(m->vm, KVM_CREATE_PIT2, &pit);
	if (CALL(m->vm, KVM_CHECK_EXTENSION, KVM_CAP_EXIT_ON_EMULATION_FAILURE)) {
		struct kvm_enable_cap cap = { .cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = { 1 } };
		CALL(m->vm, KVM_ENABLE_CAP, &cap);
	}
}

static void finish(struct machine *m)
{
	CALL(m->kvm, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER);
	if (!cpuid_once || !cpuid.head.nent) {
		cpuid.head.nent = 256;
		CALL(m->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
	}
	m->vcpu = CALL(m->vm, KVM_CREATE_VCPU, 0);
	m->run_size = CALL(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	m->run = mmap(NULL, m->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0);
	if (m->run == MAP_FAILED)
		die("mmap");
	CALL(m->vcpu, KVM_SET_CPUID2, &cpuid);
}

static void destroy(struct machine *m)
{
	munmap(m->run, m->run_size);
	close(m->vcpu);
	close(m->vm);
	if (m->memory)
		munmap(m->memory, MEMORY);
	close(m->kvm);
}

static void set_segments(struct kvm_sregs *sregs, int code, int data, int cpl, int wide)
{
	sregs->cs = (struct kvm_segment){
		.limit = 0xffffffff, .selector = code, .type = 11, .present = 1, .dpl = cpl,
		.db = !wide, .s = 1, .l = wide, .g = 1,
	};
	sregs->ds = (struct kvm_segment){
		.limit = 0xffffffff, .selector = data, .type = 3, .present = 1, .dpl = cpl,
		.db = 1, .s = 1, .g = 1,
	};
	sregs->es = sregs->fs = sregs->gs = sregs->ss = sregs->ds;
	sregs->tr = (struct kvm_segment){ .limit = 0x67, .type = 11, .present = 1 };
}

static void set_rip(struct machine *m, uint64_t rip, uint64_t rflags)
{
	struct kvm_regs regs;
	CALL(m->vcpu, KVM_GET_REGS, &regs);
	regs.rip = rip;
	regs.rsp = 0x8ff0;
	regs.rflags = 2 | rflags;
	CALL(m->vcpu, KVM_SET_REGS, &regs);
}

/* Code at 1 MiB, in the state PVH asks for. */
static void set_up_pvh(struct machine *m, const void *code, size_t size)
{
	memcpy(m->memory + (1 << 20), code, size);
	struct { struct kvm_msrs head; struct kvm_msr_entry entries[2]; } msrs = {
		.head.nmsrs = 2,
		.entries = { { .index = 0x2ff, .data = 0x806 }, { .index = 0x1a0, .data = 1 } },
	};
	CALL(m->vcpu, KVM_SET_MSRS, &msrs);
	struct kvm_lapic_state lapic;
	CALL(m->vcpu, KVM_GET_LAPIC, &lapic);
	*(uint32_t *)(lapic.regs + 0x350) = 7 << 8;
	*(uint32_t *)(lapic.regs + 0x360) = 4 << 8;
	CALL(m->vcpu, KVM_SET_LAPIC, &lapic);
	struct kvm_sregs sregs;
	CALL(m->vcpu, KVM_GET_SREGS, &sregs);
	set_segments(&sregs, 0x10, 0x18, 0, 0);
	sregs.cr0 = 0x11;
	CALL(m->vcpu, KVM_SET_SREGS, &sregs);
	set_rip(m, 1 << 20, 0);
}

/* For an image at 0 with its own tables, in long mode; the same as guests.set_long_mode(). */
static void set_long(struct machine *m, int cpl)
{
	struct kvm_sregs sregs;
	CALL(m->vcpu, KVM_GET_SREGS, &sregs);
	set_segments(&sregs, cpl ? 0x2b : 0x08, cpl ? 0x23 : 0x10, cpl, 1);
	sregs.gdt.base = 0x1000;
	sregs.gdt.limit = 47;
	sregs.idt.limit = 0;
	sregs.cr0 = 0x80000031;
	sregs.cr3 = 0x2000;
	sregs.cr4 = 0x20;
	sregs.efer = 0x500;
	CALL(m->vcpu, KVM_SET_SREGS, &sregs);
	set_rip(m, 0x8000, cpl ? 0x3000 : 0);
}

static const uint8_t exit_code[] = { 0xb0, 0x00, 0xe6, EXIT_PORT, 0xf4 };

/* Run to the exit port, as a VMM with no device but that: nanoseconds between the two marks. */
static uint64_t run(struct machine *m)
{
	uint64_t first = 0, last = 0;
	volatile uint64_t reg = 0;
	struct kvm_run *run = m->run;
	for (;;) {
		CALL(m->vcpu, KVM_RUN, 0);
		if (run->exit_reason == KVM_EXIT_IO) {
			uint8_t *data = (uint8_t *)run + run->io.data_offset;
			if (run->io.direction == KVM_EXIT_IO_IN)
				*data = reg;
			else if (run->io.port == EXIT_PORT)
				return last - first;
			else if (run->io.port == MARK_PORT) {
				if (!first)
					first = now();
				last = now();
			} else
				reg = *data;
		} else if (run->exit_reason == KVM_EXIT_MMIO) {
			if (run->mmio.is_write)
				memcpy((void *)&reg, run->mmio.data, run->mmio.len);
			else
				memcpy(run->mmio.data, (void *)&reg, run->mmio.len);
		} else {
			fprintf(stderr, "exit %d\n", run->exit_reason);
			exit(1);
		}
	}
}
