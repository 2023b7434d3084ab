/* Walking split rings: every index, address and length the driver gives is checked before use. */

#ifndef VMM_RING_H
#define VMM_RING_H

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include "kernel.h"

#define DESC_F_NEXT 1
#define DESC_F_WRITE 2
#define DESC_F_INDIRECT 4
#define CHAIN_MAX 1024 /* IOV_MAX */

struct chain {
	uint16_t head;
	int readable, writable; /* buffers, in this order */
	struct iovec *buffer;
};

uint64_t vmm_now(void); /* nanoseconds */

/* The chain `ahead` places after the next one: 1 and the chain, 0: none, -1: for Python. Its
 * buffers go to `buffer`, at most `room` of them. Nothing is taken. */
int vmm_peek(const struct vmm_ring *ring, uint16_t ahead, struct chain *chain,
	     struct iovec *buffer, int room);

/* The next chain is given back, `written` bytes into it; seen by the driver after vmm_publish. */
void vmm_give(struct vmm_ring *ring, uint16_t head, uint32_t written);

/* Let the driver see what was given back; VMM_INTERRUPT if it wants one, else 0. */
int vmm_publish(struct vmm_ring *ring);

/* Ask for a notify; whether something is there already. */
int vmm_arm(struct vmm_ring *ring);

/* Nothing is there: look again for as long as it has lately been worth it, then ask for a notify.
 * Whether something came. */
int vmm_idle(struct vmm_ring *ring);
void vmm_busy(struct vmm_ring *ring); /* something was there: learn from how long it took */

/* Take no notifies, where it can be said so. */
void vmm_hush(struct vmm_ring *ring);

static inline size_t vmm_total(const struct iovec *buffer, int count)
{
	size_t total = 0;
	for (int i = 0; i < count; i++)
		total += buffer[i].iov_len;
	return total;
}

#endif
