/* The block device's plain requests (virtio 1.2, section 5.2.6), as vmm/virtio/blk.py has them. */

#include "ring.h"

#define T_IN 0
#define T_OUT 1
#define T_GET_ID 8
#define SECTOR 512
#define REQUEST_MAX (16u << 20) /* as LARGE there: larger ones are carried out in slices */
#define BATCH 64          /* requests before others get the lock */
#define BATCH_BYTES (4u << 20)
#define PUBLISH 8         /* requests, or */
#define PUBLISH_BYTES (64u << 10) /* bytes, before the driver sees them */

struct header {
	uint32_t type, reserved;
	uint64_t sector;
};

static int in_range(const struct vmm_disk *disk, uint64_t sector, uint64_t size)
{
	return size && !(size % SECTOR) && size <= REQUEST_MAX && sector <= disk->capacity &&
	       size / SECTOR <= disk->capacity - sector;
}

/* Carry out one request; the bytes written into it (the status is one), 0: it is for Python. */
static uint32_t carry_out(const struct vmm_disk *disk, struct chain *chain, size_t *moved)
{
	struct iovec *into = chain->buffer + chain->readable;
	struct header header;
	int parts = chain->writable;

	/* Only requests laid out as every driver does: the header and the status by themselves. */
	if (!chain->readable || chain->buffer[0].iov_len != sizeof header || !parts ||
	    into[parts - 1].iov_len != 1)
		return 0;
	memcpy(&header, chain->buffer[0].iov_base, sizeof header);
	uint8_t *status = into[--parts].iov_base;
	size_t size = vmm_total(into, parts);
	if (header.type == T_IN) {
		if (!disk->readable || !in_range(disk, header.sector, size) ||
		    preadv2(disk->fd, into, parts, header.sector * SECTOR, RWF_NOWAIT) != (ssize_t)size)
			return 0;
	} else if (header.type == T_OUT) {
		size = vmm_total(chain->buffer + 1, chain->readable - 1);
		if (!disk->writable || !in_range(disk, header.sector, size) ||
		    pwritev(disk->fd, chain->buffer + 1, chain->readable - 1,
			    header.sector * SECTOR) != (ssize_t)size)
			return 0;
		*moved = size;
		size = 0;
	} else if (header.type == T_GET_ID && parts == 1 && size == sizeof disk->id)
		memcpy(into[0].iov_base, disk->id, sizeof disk->id);
	else
		return 0;
	*moved += size;
	*status = 0;
	return size + 1;
}

int vmm_disk_serve(struct vmm_ring *ring, const struct vmm_disk *disk)
{
	struct iovec buffer[CHAIN_MAX];
	struct chain chain;
	size_t bytes = 0, since = 0;
	int done = 0, idle = 0;

	for (;;) {
		int found = vmm_peek(ring, 0, &chain, buffer, CHAIN_MAX);
		size_t moved = 0;
		uint32_t written = 0;
		if (found > 0)
			written = carry_out(disk, &chain, &moved);
		if (written) {
			if (!done++) {
				vmm_busy(ring);
				vmm_hush(ring);
			}
			vmm_give(ring, chain.head, written);
			bytes += moved;
			since += moved;
			if (done < BATCH && bytes < BATCH_BYTES &&
			    (uint16_t)(ring->next_used - ring->published) < PUBLISH &&
			    since < PUBLISH_BYTES)
				continue;
		}
		since = 0;
		int interrupt = vmm_publish(ring);
		if (found && !written)
			return VMM_OTHER | interrupt;
		if (interrupt || done >= BATCH || bytes >= BATCH_BYTES)
			return VMM_MORE | interrupt;
		if (!found) {
			if (!vmm_idle(ring))
				return VMM_IDLE;
			if (++idle == BATCH) /* a driver that only says so would keep us */
				return VMM_MORE;
			vmm_busy(ring);
		}
	}
}
