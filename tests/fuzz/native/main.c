/* A main() for compilers without libFuzzer, and for a run that is the same every time: replay the
 * inputs of some directories, then make inputs from a seed.
 *
 *     PROGRAM -seed=N -runs=N -seconds=N DIRECTORY...
 *
 * Half of the inputs are chance, half are inputs of the directories, changed. It ends with status 0
 * after `-runs` inputs or `-seconds`, whatever comes first; a finding ends the process. */

#include "world.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define INPUT_MAX 2048
#define INPUTS 4096
#define ENDLESS 5 /* seconds for 64 inputs, which take milliseconds */

static struct {
	uint8_t *data;
	size_t size;
} corpus[INPUTS];
static int inputs;
static uint64_t state;
static uint8_t *current;
static size_t current_size;
static uint32_t *kept_size;

static uint64_t chance(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state * 0x2545f4914f6cdd1dull;
}

static void replay(const char *directory)
{
	DIR *listing = opendir(directory);
	struct dirent **names;
	int count;

	if (!listing) {
		perror(directory);
		exit(2);
	}
	closedir(listing);
	count = scandir(directory, &names, NULL, alphasort);
	for (int i = 0; i < count; i++) {
		char path[4096];
		snprintf(path, sizeof path, "%s/%s", directory, names[i]->d_name);
		FILE *file = names[i]->d_name[0] == '.' ? NULL : fopen(path, "rb");
		free(names[i]);
		if (!file)
			continue;
		uint8_t *data = malloc(INPUT_MAX);
		size_t size = fread(data, 1, INPUT_MAX, file);
		fclose(file);
		memcpy(current, data, size);
		*kept_size = size;
		LLVMFuzzerTestOneInput(data, size);
		if (inputs < INPUTS) {
			corpus[inputs].data = data;
			corpus[inputs++].size = size;
		} else
			free(data);
	}
	free(names);
}

static void make(void)
{
	if (!inputs || chance() & 1) {
		current_size = 1 + chance() % (chance() & 3 ? 200 : INPUT_MAX);
		for (size_t i = 0; i < current_size; i++)
			current[i] = chance() >> 24;
		return;
	}
	int which = chance() % inputs;
	current_size = corpus[which].size;
	memcpy(current, corpus[which].data, current_size);
	for (int changes = 1 + chance() % 8; changes && current_size; changes--) {
		size_t at = chance() % current_size;
		switch (chance() % 5) {
		case 0:
			current[at] = chance() >> 24;
			break;
		case 1:
			current[at] ^= 1u << (chance() % 8);
			break;
		case 2:
			current[at] += chance() % 3 - 1;
			break;
		case 3: /* one byte more or less */
			if (current_size < INPUT_MAX) {
				memmove(current + at + 1, current + at, current_size++ - at);
				current[at] = chance() >> 24;
			}
			break;
		case 4: /* the end of another input */
			which = chance() % inputs;
			if (corpus[which].size > at) {
				memcpy(current + at, corpus[which].data + at, corpus[which].size - at);
				current_size = corpus[which].size;
			}
		}
	}
}

/* The input is in the file that FUZZ_FINDING names, after its size: however the process ends, it is
 * there. */
static void keep(void)
{
	const char *path = getenv("FUZZ_FINDING");
	int fd = path ? open(path, O_RDWR | O_CREAT | O_TRUNC, 0600) : -1;

	if (path && (fd < 0 || ftruncate(fd, INPUT_MAX + sizeof *kept_size))) {
		perror(path);
		exit(2);
	}
	kept_size = mmap(NULL, INPUT_MAX + sizeof *kept_size, PROT_READ | PROT_WRITE,
			 fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
	if (kept_size == MAP_FAILED)
		exit(2);
	current = (uint8_t *)(kept_size + 1);
}

static void endless(int number)
{
	(void)number;
	FINDING("an input without an end");
}

int main(int count, char **words)
{
	unsigned long runs = 100000, done = 0, seconds = 3600;

	state = 1;
	LLVMFuzzerInitialize(&count, &words);
	keep();
	signal(SIGALRM, endless);
	for (int i = 1; i < count; i++) {
		if (sscanf(words[i], "-seed=%lu", &state) == 1 ||
		    sscanf(words[i], "-runs=%lu", &runs) == 1 ||
		    sscanf(words[i], "-seconds=%lu", &seconds) == 1)
			continue;
		replay(words[i]);
	}
	state = state * 0x9e3779b97f4a7c15ull | 1;
	for (uint64_t end = vmm_now() + seconds * 1000000000ull; done < runs; done++) {
		if (!(done & 63)) {
			alarm(ENDLESS);
			if (vmm_now() >= end)
				break;
		}
		make();
		*kept_size = current_size;
		LLVMFuzzerTestOneInput(current, current_size);
	}
	printf("%d replayed, %lu made\n", inputs, done);
	return 0;
}
