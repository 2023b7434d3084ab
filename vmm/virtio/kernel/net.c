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
#define ROUNDS 8 /* before others get the locks */
#define PATIENCE 8 /* frames until less room than before is thought enough */

/* Send what is there, up to a batch. VMM_WAIT: nothing is, and no notify was asked for. */
static int transmit(struct vmm_ring *ring, int fd)
{
	struct iovec buffer[CHAIN_MAX];
	struct chain chain;
	int next = VMM_MORE, interrupt = 0;

	for (int done = 0; done < BATCH && !interrupt; done++) {
		int found = vmm_peek(ring, 0, &chain, buffer, CHAIN_MAX);
		if (!found) {
			next = VMM_WAIT;
			break;
		}
		size_t size = found > 0 ? vmm_total(buffer, chain.readable) : 0;
		if (size < HEADER + FRAME_MIN || size > HEADER + FRAME_MAX ||
		    writev(fd, buffer, chain.readable) < 0) {
			next = VMM_OTHER;
			break;
		}
		if (!done)
			vmm_hush(ring);
		vmm_give(ring, chain.head, 0);
		if ((uint16_t)(ring->next_used - ring->published) >= PUBLISH)
			interrupt = vmm_publish(ring);
	}
	return next | interrupt | vmm_publish(ring);
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

/* Keep a frame for Python, which decides what becomes of it: `placed` bytes are in the buffers. */
static void hold(struct vmm_net *net, const struct window *w, size_t size, size_t placed)
{
	/* What lies in the spill already goes to its end first: the copies must not run over it. */
	memmove(net->spill + placed, net->spill, size - placed);
	for (size_t i = w->first_buffer, at = 0; at < placed; at += w->buffer[i++].iov_len) {
		size_t part = w->buffer[i].iov_len < placed - at ? w->buffer[i].iov_len : placed - at;
		memcpy(net->spill + at, w->buffer[i].iov_base, part);
	}
	net->held = size;
}

/* Copy what lies in the spill to the buffers after the first `placed` bytes, which those end with. */
static void spread(const struct vmm_net *net, const struct window *w, size_t size, size_t placed)
{
	size_t at = 0;

	for (int i = w->first_buffer; at < size; at += w->buffer[i++].iov_len) {
		size_t part = w->buffer[i].iov_len < size - at ? w->buffer[i].iov_len : size - at;
		if (at >= placed)
			memcpy(w->buffer[i].iov_base, net->spill + (at - placed), part);
	}
}

/* Whether a frame passes the filter for sure; a tagged one, a broadcast, is for Python to look at. */
static int takes(const struct vmm_net *net, const uint8_t *start)
{
	const uint8_t *frame = start + HEADER;

	if (net->promiscuous)
		return 1;
	if (frame[12] == 0x81 && !frame[13])
		return 0;
	return net->unicast && !memcmp(frame, net->mac, 6);
}

/* Frames are mostly as those before them. One that is larger costs a copy, so room for the largest is
 * made at once, and for smaller ones little by little. */
static void learn(struct vmm_net *net, size_t size)
{
	if (size >= net->usual)
		net->usual = size;
	else
		net->usual -= (net->usual - size + PATIENCE - 1) / PATIENCE;
}

/* A frame is in the first buffers: give them to the driver. */
static void deliver(struct vmm_ring *ring, struct vmm_net *net, struct window *w, size_t size)
{
	uint8_t *header = w->buffer[w->first_buffer].iov_base;
	uint16_t count = 0;

	if (!net->checksums)
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

/* Receive what is there, up to a batch. VMM_IDLE: the driver gives no buffers. */
static int receive(struct vmm_ring *ring, struct vmm_net *net)
{
	struct window w;
	int next = VMM_MORE, interrupt = 0;

	w.first_buffer = w.buffers = w.first_chain = w.chains = 0; /* the rest is not looked at */
	w.room = 0;
	for (int done = 0; done < BATCH && !interrupt; done++) {
		int bad = gather(ring, &w, net->mergeable ? net->usual : 1);
		if (!bad && !w.room) {
			if (vmm_arm(ring))
				continue;
			next = VMM_IDLE;
			break;
		}
		/* The header and what the filter looks at must be in one piece. */
		if (bad || w.buffer[w.first_buffer].iov_len < HEADER + START) {
			next = VMM_OTHER;
			break;
		}
		size_t placed = w.room;
		w.buffer[w.buffers] = (struct iovec){net->spill, net->spill_size};
		ssize_t got = readv(net->fd, w.buffer + w.first_buffer, w.buffers - w.first_buffer + 1);
		if (got <= 0) {
			next = got < 0 && errno == EAGAIN ? VMM_WAIT : VMM_OTHER;
			break;
		}
		size_t size = got;
		if (size < HEADER + FRAME_MIN || size > (size_t)net->spill_size ||
		    (size > placed && !net->mergeable)) {
			net->dropped++;
			continue;
		}
		if (placed > size)
			placed = size;
		if (!takes(net, w.buffer[w.first_buffer].iov_base) ||
		    (placed < size && (gather(ring, &w, size) || w.room < size))) {
			hold(net, &w, size, placed);
			next = VMM_HELD;
			break;
		}
		if (placed < size)
			spread(net, &w, size, placed);
		learn(net, size);
		vmm_hush(ring);
		deliver(ring, net, &w, size);
		if ((uint16_t)(ring->next_used - ring->published) >= PUBLISH)
			interrupt = vmm_publish(ring);
	}
	return next | interrupt | vmm_publish(ring);
}

/* Whether a queue needs nobody but us. */
static int plain(int what) { return what == VMM_MORE || what == VMM_WAIT || what == VMM_IDLE; }

int vmm_net_serve(struct vmm_ring *tx, struct vmm_ring *rx, struct vmm_net *net)
{
	int sent = VMM_WAIT, received = VMM_WAIT;

	for (int round = 0; round < ROUNDS; round++) {
		if (tx)
			sent = transmit(tx, net->fd);
		if (rx)
			received = receive(rx, net);
		if (!plain(sent) || !plain(received))
			break;
		if (sent == VMM_MORE || received == VMM_MORE)
			continue;
		sent = tx && vmm_arm(tx) ? VMM_MORE : VMM_IDLE;
		if (sent == VMM_IDLE)
			break;
	}
	if ((sent & ~VMM_INTERRUPT) == VMM_WAIT) /* no notify was asked for yet */
		sent ^= VMM_WAIT ^ VMM_MORE;
	return sent | received << VMM_RECEIVED;
}
