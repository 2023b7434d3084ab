/* A driver that keeps to the rules, in shapes that the input chooses: every frame must arrive whole,
 * in order, in the buffers whose turn it is, be kept for Python whole, or be dropped with a reason.
 *
 * What sanitizers cannot see (a copy that is right in size and wrong in place, a bound inside of one
 * structure) shows as a frame that differs. */

#include "world.h"

#define TABLES 0x40000  /* indirect tables, in low memory */
#define TABLES_END 0xc0000
#define TX_AT 0x10000
#define RX_AT 0x20000
#define LATER 1024      /* chains of a ring */

struct given {
	uint16_t head;
	uint16_t parts, descs;
	uint32_t part, total;
	uint8_t *data;
	int plain;      /* the C path takes it */
};

struct side {
	struct vmm_ring ring;
	struct given given[LATER];
	int first, count;
	uint16_t avail, desc, free;     /* the driver's: index, next descriptor, how many are free */
};

static struct side tx, rx;
static struct vmm_net net;
static uint32_t data_low, data_high, tables, serial;

static const uint16_t PARTS[] = {1, 1, 1, 1, 1, 2, 2, 3, 4, 7, 8, 16, 17, 32, 64, 128, 200, 255, 256,
				 400, 511, 512, 513, 600, 700, 900, 1000, 1023, 1024};
static const uint32_t PART[] = {30, 30, 31, 32, 40, 64, 64, 100, 128, 256, 512, 1024, 1526, 2048, 4096,
				9000, 16384, 65565, 29, 12, 1};
static const uint32_t FRAME[] = {26, 26, 27, 60, 100, 300, 1500, 1526, 4000, 9012, 16000, 30000, 60000,
				 65000, SPILL - 1, SPILL, SPILL + 1, SPILL + 30, 2 * SPILL - 256, 25, 12,
				 1, 80000};
static const uint8_t TIMES[] = {1, 1, 2, 3, 5, 8, 16, 20, 40, 64, 65, 70, 100, 128, 200, 250};

#define NOISE (1u << 18)
static uint8_t noise[NOISE];

/* A frame that names itself: no two are alike, nor two places of one. */
static void pattern(uint8_t *data, size_t size, int kind)
{
	memcpy(data, noise + (++serial * 4099) % (NOISE - 2 * SPILL - 1), size);
	if (size < HEADER_SIZE + 14)
		return;
	if (kind & 1)
		memcpy(data + HEADER_SIZE, net.mac, 6);
	else
		data[HEADER_SIZE] = 0x33;
	data[HEADER_SIZE + 12] = kind & 2 ? 0x81 : 8;
	data[HEADER_SIZE + 13] = 0;
}

/* Make a chain of `parts` buffers available, or do nothing where there is no room. */
static void offer(struct side *side, int write, uint32_t parts, uint32_t part, int flags)
{
	struct vmm_ring *ring = &side->ring;
	int indirect = flags & 1 && ring->indirect;
	uint32_t total = parts * part, descs = indirect ? 1 : parts;
	uint32_t *place = flags & 2 ? &data_high : &data_low;
	uint32_t end = flags & 2 ? HIGH : LOW;

	if (side->count == LATER || side->first + side->count == LATER || descs > side->free ||
	    total > end - *place || (!write && total > 2 * SPILL) || (indirect && tables + 16 * parts > TABLES_END))
		return;
	uint8_t *data = (flags & 2 ? high : low) + *place;
	uint64_t gpa = (flags & 2 ? GPA_HIGH : 0) + *place;
	uint16_t head = side->desc;
	uint8_t *table = indirect ? low + tables : ring->desc;
	*place += total;
	for (uint32_t i = 0; i < parts; i++) {
		uint32_t at = indirect ? i : (head + i) & (ring->size - 1);
		uint16_t next = indirect ? i + 1 : (at + 1) & (ring->size - 1);
		desc_put(table, at, gpa + i * part, part,
			 (i + 1 < parts) | (write ? 2 : 0), i + 1 < parts ? next : 0xffff);
	}
	if (indirect) {
		desc_put(ring->desc, head, tables, 16 * parts, 4, 0);
		tables += 16 * parts;
	}
	side->desc = (head + descs) & (ring->size - 1);
	side->free -= descs;
	ring->avail[2 + (side->avail & (ring->size - 1))] = head;
	ring->avail[1] = ++side->avail;
	struct given *given = &side->given[side->first + side->count++];
	*given = (struct given){.head = head, .parts = parts, .descs = descs, .part = part,
				.total = total, .data = data};
	if (write)
		given->plain = part >= 30 && parts <= 512;
	else {
		given->plain = total >= HEADER_SIZE + 14 && total <= SPILL;
		pattern(data, total, 0);
	}
}

static struct given *front(struct side *side)
{
	return side->count ? &side->given[side->first] : NULL;
}

static void took(struct side *side)
{
	side->free += side->given[side->first++].descs;
	side->count--;
}

/* Python takes the next chain and gives it back unused. */
static void python(struct side *side)
{
	struct vmm_ring *ring = &side->ring;

	if (!side->count)
		FINDING("a chain is for Python, and there is none");
	took(side);
	ring->last_avail++;
	ring->used[1] = ring->published = ++ring->next_used;
}

static uint32_t *used(const struct vmm_ring *ring, uint16_t index)
{
	return (uint32_t *)((uint8_t *)ring->used + 4 + 8 * (index & (ring->size - 1)));
}

static void common(const char *name, const struct vmm_ring *ring, uint16_t before, int what, int limit)
{
	uint16_t count = ring->next_used - before;

	if (ring->published != ring->next_used || ring->used[1] != ring->next_used)
		FINDING("%s: used entries that are not published", name);
	if (ring->last_avail != ring->next_used)
		FINDING("%s: taken and given differ", name);
	if (count > limit)
		FINDING("%s: %u chains in one call", name, count);
	if (!(what & VMM_INTERRUPT) != !wants_interrupt(ring, before, ring->next_used))
		FINDING("%s: interrupt %d, entries %u to %u", name, what & VMM_INTERRUPT, before,
			ring->next_used);
}

static void check_sent(uint16_t before, int what)
{
	int next = what & ~VMM_INTERRUPT;

	common("tx", &tx.ring, before, what, 512);
	for (; before != tx.ring.next_used; before++) {
		uint32_t *entry = used(&tx.ring, before);
		struct given *given = front(&tx);
		struct frame *frame = frames_first(&outgoing);
		if (!given || entry[0] != given->head || entry[1])
			FINDING("tx: entry %u, %u", entry[0], entry[1]);
		if (!frame || frame->size != given->total ||
		    memcmp(frame->data, given->data, frame->size))
			FINDING("tx: a frame that is not the driver's");
		if (!given->plain)
			FINDING("tx: a frame of %u bytes", given->total);
		frames_drop(&outgoing);
		took(&tx);
	}
	if (frames_first(&outgoing))
		FINDING("tx: a frame went out and its buffers did not come back");
	if (next == VMM_IDLE && (tx.count || !notify_asked(&tx.ring)))
		FINDING("tx: idle with %d chains, notify %d", tx.count, notify_asked(&tx.ring));
	if (next == VMM_OTHER) {
		struct given *given = front(&tx);
		if (given && given->plain && !failed)
			FINDING("tx: a plain chain is not taken");
		python(&tx);
	}
}

/* Whether the filter lets the frame pass without Python. */
static int passes(const uint8_t *data)
{
	return net.promiscuous || (!(data[24] == 0x81 && !data[25]) && net.unicast &&
				   !memcmp(data + HEADER_SIZE, net.mac, 6));
}

/* What was in `incoming` before a call: the calls take frames from it. */
static struct frames sent;
static uint64_t dropped;

/* Frames that nobody may see: they are dropped and counted. */
static void skip_dropped(void)
{
	struct frame *frame;

	while ((frame = frames_first(&sent)) && net.dropped > dropped) {
		struct given *given = front(&rx);
		if (frame->size >= HEADER_SIZE + 14 && frame->size <= SPILL &&
		    (net.mergeable || !given || frame->size <= given->total))
			return;
		dropped++;
		frames_drop(&sent);
	}
}

static void check_received(uint16_t before, int what)
{
	int next = what & ~VMM_INTERRUPT;

	common("rx", &rx.ring, before, what, rx.ring.size);
	while (before != rx.ring.next_used) {
		skip_dropped();
		struct given *given = front(&rx);
		struct frame *frame = frames_first(&sent);
		if (!frame || !given)
			FINDING("rx: an entry without %s", frame ? "a chain" : "a frame");
		if (frame->size < HEADER_SIZE + 14 || frame->size > SPILL || !passes(frame->data))
			FINDING("rx: a frame that may not be received, %u bytes", frame->size);
		uint16_t chains;
		memcpy(&chains, given->data + 10, 2);
		if (!chains || chains > (uint16_t)(rx.ring.next_used - before))
			FINDING("rx: num_buffers %u", chains);
		memcpy(frame->data + 10, &chains, 2);
		if (!net.checksums)
			frame->data[0] = 0;
		uint32_t at = 0;
		for (uint16_t i = 0; i < chains; i++, before++) {
			uint32_t *entry = used(&rx.ring, before);
			given = front(&rx);
			if (!given || entry[0] != given->head)
				FINDING("rx: entry %u is not the next chain", entry[0]);
			if (!entry[1] || entry[1] > given->total || at + entry[1] > frame->size ||
			    (i + 1 < chains && entry[1] != given->total))
				FINDING("rx: %u bytes in a chain of %u", entry[1], given->total);
			if (memcmp(given->data, frame->data + at, entry[1]))
				FINDING("rx: a frame of %u bytes differs in its chain %u",
					frame->size, i);
			at += entry[1];
			took(&rx);
		}
		if (at != frame->size)
			FINDING("rx: %u bytes of %u", at, frame->size);
		frames_drop(&sent);
	}
	skip_dropped();
	if (net.held) {
		struct frame *frame = frames_first(&sent);
		if (!frame || net.held != frame->size || memcmp(spill, frame->data, net.held))
			FINDING("rx: %lld bytes are kept that are no frame", (long long)net.held);
		uint64_t parts = 0, room = 0;
		int plain = 1;
		for (int i = 0; i < rx.count && room < frame->size; i++) {
			parts += rx.given[rx.first + i].parts;
			room += rx.given[rx.first + i].total;
			plain &= rx.given[rx.first + i].plain;
		}
		if (passes(frame->data) && plain && room >= frame->size && parts <= 512)
			FINDING("rx: a frame of %u bytes is kept that has room", frame->size);
		frames_drop(&sent);
		net.held = 0;
		if (next != VMM_HELD)
			FINDING("rx: a frame is kept, and %d returned", next);
	} else if (next == VMM_HELD)
		FINDING("rx: a frame is said to be kept");
	if (net.dropped != dropped)
		FINDING("rx: %lu frames were dropped, %lu had a reason", net.dropped, dropped);
	if (sent.count != incoming.count)
		FINDING("rx: %d frames were read and lost", sent.count - incoming.count);
	if (next == VMM_IDLE && (rx.count || !notify_asked(&rx.ring)))
		FINDING("rx: idle with %d chains", rx.count);
	if (next == VMM_OTHER) {
		int plain = 1, parts = 0;
		for (int i = 0; i < rx.count; i++) {
			parts += rx.given[rx.first + i].parts;
			plain &= rx.given[rx.first + i].plain;
		}
		if (plain && parts <= 512 && !failed)
			FINDING("rx: plain chains are not taken");
		if (rx.count)
			python(&rx);
	}
}

static void serve(int which)
{
	struct vmm_ring *t = which & 1 ? NULL : &tx.ring, *r = which & 2 ? NULL : &rx.ring;
	uint16_t sent_before = tx.ring.next_used, before = rx.ring.next_used;

	sent = incoming;
	dropped = net.dropped;
	failed = 0;
	int what = vmm_net_serve(t, r, &net);
	if (t)
		check_sent(sent_before, what & ((1 << VMM_RECEIVED) - 1));
	if (r)
		check_received(before, what >> VMM_RECEIVED);
}

static void start(struct side *side, uint8_t *at, struct input *in)
{
	uint8_t c = byte(in), e = byte(in);

	ring_place(&side->ring, at, 1u << (c & 8 ? 8 : c % 9), c & 16 ? 0xfff0 : 0);
	side->ring.indirect = !!(c & 0xc0);
	side->ring.event_idx = c >> 5 & 1;
	side->first = side->count = side->desc = 0;
	side->free = side->ring.size;
	side->avail = side->ring.last_avail;
	side->ring.avail[0] = e & 1;
	if (side->ring.event_idx)
		side->ring.avail[2 + side->ring.size] = side->avail + (e >> 2);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	uint8_t mode = byte(&in);

	world_turn();
	data_low = TABLES_END;
	data_high = 0;
	tables = TABLES;
	serial = 0;
	net = (struct vmm_net){.fd = tap_fd, .mergeable = (mode & 3) != 0, .checksums = mode >> 2 & 1,
			       .promiscuous = mode >> 3 & 1, .unicast = mode >> 4 & 1,
			       .usual = mode & 32 ? 1500 : 26, .spill_size = SPILL, .spill = spill,
			       .mac = {2, 3, 4, 5, 6, 7}};
	start(&tx, low + TX_AT, &in);
	start(&rx, low + RX_AT, &in);
	for (int turns = 0; in.left && turns < 64; turns++) {
		uint8_t op = byte(&in), how = byte(&in);
		uint32_t times = TIMES[op >> 4];
		switch (op & 7) {
		case 0:
		case 1:
		case 2: {
			uint8_t p = byte(&in), l = byte(&in);
			uint32_t parts = PARTS[p % COUNT(PARTS)], part = PART[l % COUNT(PART)];
			while (times--)
				offer(&rx, 1, parts, part, how);
			break;
		}
		case 3: {
			uint8_t p = byte(&in), l = byte(&in);
			while (times--)
				offer(&tx, 0, PARTS[p % COUNT(PARTS)], PART[l % COUNT(PART)], how);
			break;
		}
		case 4:
		case 5: {
			uint8_t f = byte(&in);
			uint32_t length = FRAME[f % COUNT(FRAME)] + (f & 0x80 ? how : 0);
			for (uint32_t bytes = 0; times-- && bytes < 8 * SPILL; bytes += length) {
				struct frame *frame = frames_add(&incoming, length);
				if (!frame)
					break;
				pattern(frame->data, length, how & 64 ? how >> 3 : 1);
			}
			break;
		}
		case 6:
			failing = how & 1 ? half(&in) : 0;
			/* fall through */
		case 7:
			serve(how & 128 ? how >> 1 & 3 : 0);
			if (!tx.count && !rx.count) {
				data_low = TABLES_END;
				data_high = 0;
				tables = TABLES;
			}
			if (!tx.count)
				tx.first = 0;
			if (!rx.count)
				rx.first = 0;
		}
	}
	serve(0);
	return 0;
}

void between(void) {}

int LLVMFuzzerInitialize(int *count, char ***words)
{
	(void)count;
	(void)words;
	world_start();
	for (uint32_t i = 0, x = 1; i < NOISE; i++) {
		x = x * 1664525 + 1013904223;
		noise[i] = x >> 24;
	}
	return 0;
}
