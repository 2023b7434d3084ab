/*
 * The floor under rows a, b, c and e: what vmm.Machine asks of KVM, asked by C and nothing else.
 *
 *   native once      one machine: its guest writes the exit port; exits with that status
 *   native idle      one machine whose guest halts; says "ready", ends with its standard input
 *   native spawn COMMAND...   runs it without output; prints nanoseconds, peak KiB, status.
 *                    A small parent, because a child's peak starts from its parent's.
 *   native serve     reads commands, answers each with a line of nanoseconds:
 *                      create PIT           create, run to the first exit, close; an i8254 if 1
 *                      exits CPL N FILE     N exits of the guest in FILE (see guests.py)
 */
#include "native.h"

static void create(struct machine *m, int with_pit)
{
	m->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (m->memory == MAP_FAILED)
		die("mmap");
	begin(m, with_pit);
	struct kvm_userspace_memory_region region = {
		.memory_size = MEMORY, .userspace_addr = (uintptr_t)m->memory,
	};
	CALL(m->vm, KVM_SET_USER_MEMORY_REGION, &region);
	finish(m);
}

static void set_up_long(struct machine *m, const char *image, int cpl)
{
	int fd = open(image, O_RDONLY);
	if (fd < 0 || read(fd, m->memory, 1 << 20) <= 0)
		die(image);
	close(fd);
	set_long(m, cpl);
}

static const uint8_t halt_code[] = { 0xfa, 0xf4, 0xeb, 0xfd };

static void *idle(void *machine)
{
	ioctl(((struct machine *)machine)->vcpu, KVM_RUN, 0);
	return NULL;
}

static void serve(void)
{
	char line[4096], image[4000];
	int cpl, pit;
	long count;
	while (fgets(line, sizeof line, stdin)) {
		struct machine m;
		uint64_t taken;
		if (sscanf(line, "exits %d %ld %3999s", &cpl, &count, image) == 3) {
			create(&m, 0);
			set_up_long(&m, image, cpl);
			taken = run(&m) / count;
			destroy(&m);
		} else if (sscanf(line, "create %d", &pit) == 1) {
			uint64_t start = now();
			create(&m, pit);
			set_up_pvh(&m, exit_code, sizeof exit_code);
			run(&m);
			destroy(&m);
			taken = now() - start;
		} else {
			fprintf(stderr, "what is %s", line);
			exit(2);
		}
		printf("%lu\n", (unsigned long)taken);
		fflush(stdout);
	}
}

static int spawn(char **command)
{
	int status;
	struct rusage usage;
	uint64_t start = now();
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL); /* nothing stays if a measurement is given up */
		int null = open("/dev/null", O_RDWR);
		dup2(null, 0);
		dup2(null, 1);
		execvp(command[0], command);
		die(command[0]);
	}
	if (wait4(child, &status, 0, &usage) < 0)
		die("wait4");
	printf("%lu %ld %d\n", (unsigned long)(now() - start), usage.ru_maxrss,
	       WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
	return 0;
}

int main(int argc, char **argv)
{
	struct machine m;
	const char *mode = argc > 1 ? argv[1] : "";
	if (!strcmp(mode, "serve")) {
		serve();
	} else if (!strcmp(mode, "spawn") && argc > 2) {
		return spawn(argv + 2);
	} else if (!strcmp(mode, "once")) {
		create(&m, 0);
		set_up_pvh(&m, exit_code, sizeof exit_code);
		run(&m);
		destroy(&m);
	} else if (!strcmp(mode, "idle")) {
		pthread_t thread;
		create(&m, 0);
		set_up_pvh(&m, halt_code, sizeof halt_code);
		if (pthread_create(&thread, NULL, idle, &m))
			die("pthread_create");
		puts("ready");
		fflush(stdout);
		getchar();
	} else {
		fprintf(stderr, "usage: native once|idle|serve|spawn COMMAND...\n");
		return 2;
	}
	return 0;
}
