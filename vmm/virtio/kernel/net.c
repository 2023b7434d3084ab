/* The network device's frames (virtio 1.2, section 5.1.6) from and to a tap, as vmm/virtio/net.py and
 * net_rx.py have them. */

#include "ring.h"

#include <errno.h>

#define HEADER 12 /* struct virtio_net_hdr */
#define NUM_BUFFERS 10
#define FRAME_MIN 14
#define FRAME_MAX (65535 + 18)
#define START 18 /* bytes that a filter looks at */
#define BATCH 64
#define PUBLISH 16

int vmm_net_send(struct vmm_ring *ring, int fd)
{
	struct iovec buffer[CHAIN_MAX];
	struct chain chain;

	for (int done = 0, idle = 0;;) {
		int found = vmm_peek(ring, 0, &chain, buffer, CHAIN_MAX);
		int sent = 0;
		if (found > 0) {
			size_t size = vmm_total(buffer, chain.readable);
			if (size >= HEADER + FRAME_MIN && size <= HEADER + FRAME_MAX)
				sent = writev(fd, buffer, chain.readable) >= 0;
		}
		if (sent) {
			if (!done++) {
				vmm_busy(ring);
				vmm_hush(ring);
			}
			vmm_give(ring, chain.head, 0);
			if (done < BATCH && (uint16_t)(ring->next_used - ring->published) < PUBLISH)
				continue;
		}
		int interrupt = vmm_publish(ring);
		if (found && !sent)
			return VMM_OTHER | interrupt;
		if (interrupt || done >= BATCH)
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

/* Buffers looked at and not given back yet: a frame may need many, and most frames need few of them. */
struct window {
	struct iovec buffer[CHAIN_MAX + 1]; /* one more: the spill */
	struct {
		uint16_t head;
		int parts;
		uint32_t room;
	} chain[CHAIN_MAX];
	int first_buffer, buffers, first_chain, chains; /* where they begin, where they end */
	uint64_t room;                                  /* bytes in all of them */
};

/* Have buffers for `need` bytes, or all there are; -1: the next one is for Python. */
static int gather(struct vmm_ring *ring, struct window *w, uint32_t need)
{
	while (w->room < need) {
		struct chain chain;
		if (w->buffers > CHAIN_MAX / 2 || w->chains == CHAIN_MAX) { /* to the front again */
			memmove(w->buffer, w->buffer + w->first_buffer,
				(w->buffers - w->first_buffer) * sizeof w->buffer[0]);
			memmove(w->chain, w->chain + w->first_chain,
				(w->chains - w->first_chain) * sizeof w->chain[0]);
			w->buffers -= w->first_buffer;
			w->chains -= w->first_chain;
			w->first_buffer = w->first_chain = 0;
			if (w->chains == CHAIN_MAX)
				return -1;
		}
		int found = vmm_peek(ring, w->chains - w->first_chain, &chain,
				     w->buffer + w->buffers, CHAIN_MAX - w->buffers);
		if (!found)
			return 0;
		if (found < 0 || chain.readable || !chain.writable)
			return -1;
		size_t room = vmm_total(chain.buffer, chain.writable);
		if (room > UINT32_MAX)
			return -1;
		w->chain[w->chains].head = chain.head;
		w->chain[w->chains].parts = chain.writable;
		w->chain[w->chains++].room = room;
		w->buffers += chain.writable;
		w->room += room;
	}
	return 0;
}

/* Keep a frame for Python, which decides what becomes of it. */
static void hold(struct vmm_receive *receive, const struct window *w, size_t size)
{
	size_t at = 0;

	/* What lies in the spill already goes to its end first: the copies must not run over it. */
	if (size > w->room)
		memmove(receive->spill + w->room, receive->spill, size - w->room);
	for (int i = w->first_buffer; i < w->buffers && at < size; i++) {
		size_t part = w->buffer[i].iov_len < size - at ? w->buffer[i].iov_len : size - at;
		memcpy(receive->spill + at, w->buffer[i].iov_base, part);
		at += part;
	}
	receive->held = size;
}

/* Whether a frame passes the filter for sure; a tagged one, a broadcast, is for Python to look at. */
static int takes(const struct vmm_receive *receive, const uint8_t *start)
{
	const uint8_t *frame = start + HEADER;

	if (receive->everything)
		return 1;
	if (frame[12] == 0x81 && !frame[13])
		return 0;
	return receive->promiscuous || (receive->unicast && !memcmp(frame, receive->mac, 6));
}

/* A frame is in the first buffers: give them to the driver. */
static void deliver(struct vmm_ring *ring, struct vmm_receive *receive, struct window *w, size_t size)
{
	uint8_t *header = w->buffer[w->first_buffer].iov_base;
	uint16_t count = 0;

	if (!receive->checksums)
		header[0] = 0;
	while (size) {
		uint32_t room = w->chain[w->first_chain].room, part = size < room ? size : room;
		vmm_give(ring, w->chain[w->first_chain].head, part);
		w->first_buffer += w->chain[w->first_chain++].parts;
		w->room -= room;
		size -= part;
		count++;
	}
	memcpy(header + NUM_BUFFERS, &count, 2);
}

int vmm_net_receive(struct vmm_ring *ring, struct vmm_receive *receive)
{
	struct window w;
	int next = VMM_MORE, interrupt = 0;

	w.first_buffer = w.buffers = w.first_chain = w.chains = 0; /* the rest is not looked at */
	w.room = 0;
	for (int done = 0; done < BATCH; done++) {
		if (gather(ring, &w, receive->mergeable ? receive->need : 1)) {
			next = VMM_OTHER;
			break;
		}
		/* The header and what the filter looks at must be in one piece. */
		if (!w.room || w.buffer[w.first_buffer].iov_len < HEADER + START) {
			next = VMM_OTHER;
			break;
		}
		w.buffer[w.buffers] = (struct iovec){receive->spill, receive->spill_size};
		ssize_t size = readv(receive->fd, w.buffer + w.first_buffer,
				     w.buffers - w.first_buffer + 1);
		if (size <= 0) {
			next = size < 0 && errno == EAGAIN ? VMM_WAIT : VMM_OTHER;
			break;
		}
		if (size < HEADER + FRAME_MIN || size > receive->spill_size) {
			receive->dropped++;
			continue;
		}
		if ((size_t)size > w.room && !receive->mergeable) {
			receive->dropped++;
			continue;
		}
		if ((size_t)size > w.room || !takes(receive, w.buffer[w.first_buffer].iov_base)) {
			hold(receive, &w, size);
			next = VMM_HELD;
			break;
		}
		deliver(ring, receive, &w, size);
		if ((uint16_t)(ring->next_used - ring->published) >= PUBLISH) {
			interrupt = vmm_publish(ring);
			if (interrupt)
				break;
		}
	}
	return next | interrupt | vmm_publish(ring);
}
