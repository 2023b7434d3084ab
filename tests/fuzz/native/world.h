/* What vmm/virtio/kernel runs in when it is fuzzed: guest memory between guard pages, a disk and a
 * tap made of arrays, and an input that decides everything else.
 *
 * The kernel's sources are compiled with readv, writev, preadv2 and pwritev renamed to the
 * functions below. These check that every buffer lies in guest memory (or is the spill) before they
 * copy: the real calls would return EFAULT for a wild address, and hide the bug. */

#ifndef WORLD_H
#define WORLD_H

#include "ring.h"

#define LOW (1u << 20)            /* bytes of guest memory at 0 */
#define HIGH (4u << 20)           /* and at GPA_HIGH */
#define GPA_HIGH 0x100000000ull
#define HEADER_SIZE 12            /* struct virtio_net_hdr */
#define SPILL (HEADER_SIZE + 65535 + 18)
#define DISK (1u << 18)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

extern uint8_t *low, *high, *spill, *disk;
extern int tap_fd, disk_fd;

/* The input. Reading past its end gives zeros. */
struct input {
	const uint8_t *at;
	size_t left;
};
uint8_t byte(struct input *in);
uint16_t half(struct input *in);

/* Ends the process with a finding; printf's arguments. */
#define FINDING(...) finding(__FILE__, __LINE__, __VA_ARGS__)
void finding(const char *file, int line, const char *format, ...)
	__attribute__((noreturn, format(printf, 3, 4)));

/* The tap: frames that wait to be received, and frames that were sent. */
#define FRAMES 512
struct frame {
	uint32_t size;
	uint8_t *data;
};
struct frames {
	struct frame frame[FRAMES];
	int first, count;
	uint8_t *arena;          /* where the bytes are; everything is dropped by frames_clear() */
	size_t used, size;
};
extern struct frames incoming, outgoing;
void frames_clear(struct frames *frames);
struct frame *frames_add(struct frames *frames, size_t size); /* NULL: full */
struct frame *frames_first(struct frames *frames);            /* NULL: none */
void frames_drop(struct frames *frames);

/* The next calls that fail: a bit a call, the lowest first. */
extern uint32_t failing;
extern int failed; /* whether one has failed since this was set to 0 */

/* A ring of `size` entries with its parts at `at`; its areas are cleared. */
void ring_place(struct vmm_ring *ring, uint8_t *at, uint32_t size, uint16_t start);
size_t ring_bytes(uint32_t size);
void desc_put(uint8_t *table, uint32_t index, uint64_t addr, uint32_t len, uint16_t flags,
	      uint16_t next);
uint8_t *host_of(uint64_t gpa, uint64_t length); /* NULL: not in guest memory */

/* Whether the driver has asked for an interrupt for the used entries from `old` to `new`. */
int wants_interrupt(const struct vmm_ring *ring, uint16_t old, uint16_t new);
/* Whether the driver's next chain will make a notify. */
int notify_asked(const struct vmm_ring *ring);

/* A target has this; the kernel's objects call it at every branch (gcc) or load (clang): a change of
 * guest memory comes between any two of them, the same for an input each time. */
void between(void);

void world_start(void);
void world_turn(void); /* forget frames and failures */

int LLVMFuzzerInitialize(int *count, char ***words);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
