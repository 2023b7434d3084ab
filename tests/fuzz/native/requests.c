/* A disk's driver that keeps to the rules, in shapes that the input chooses: every request that is
 * carried out leaves the data where it belongs and status 0, and what is not plain is left alone. */

#include "world.h"

#define RING_AT 0x10000
#define TABLES 0x40000
#define TABLES_END 0x80000
#define SECTORS (DISK / 512)
#define LATER 512
#define IN 0
#define OUT 1
#define GET_ID 8

struct request {
	uint16_t head, descs;
	uint32_t type, size;
	uint64_t sector;
	uint8_t *header, *data, *status;
	int plain;
};

static struct vmm_ring ring;
static struct vmm_disk device;
static struct request request[LATER];
static int first, count;
static uint16_t next_desc, free_descs, avail;
static uint32_t place, tables, serial;
static uint8_t shadow[DISK];

static const uint32_t SIZES[] = {512, 512, 512, 1024, 4096, 8192, 65536, 131072, 0, 511, 513, 20, 20, DISK,
				 DISK + 512, 1};
static const uint16_t CUTS[] = {1, 1, 1, 1, 2, 3, 8, 64, 128, 253, 400};
static const uint32_t TYPES[] = {IN, IN, IN, OUT, OUT, OUT, GET_ID, 4, 11, 13, 99};

static uint8_t *take(uint32_t size, uint64_t *gpa)
{
	*gpa = GPA_HIGH + place;
	place += size;
	return high + place - size;
}

static void add(uint8_t t, uint8_t s, uint8_t c, uint8_t how, uint16_t at)
{
	uint32_t type = TYPES[t % COUNT(TYPES)], size = SIZES[s % COUNT(SIZES)];
	uint32_t cuts = CUTS[c % COUNT(CUTS)], header_size = 16, status_size = 1;
	int indirect = ring.indirect && how & 1;

	if (type == GET_ID && how & 2)
		size = 20;
	if (!size || size < cuts)
		cuts = !!size;
	int read_only = (how & 0x70) == 0x50 && type == OUT && size; /* no room for the status */
	if ((how & 0x70) == 0x70)
		header_size = how & 4 ? 15 : 17;
	if ((how & 0x70) == 0x60)
		status_size = 2;
	if (read_only)
		size--; /* with the status it would be whole sectors */
	uint32_t parts = 2 + cuts, descs = indirect ? 1 : parts;
	if (first + count == LATER || descs > free_descs || place + size + 64 > HIGH ||
	    tables + 16 * parts > TABLES_END)
		return;
	struct request *r = &request[first + count++];
	uint64_t gpa, header_gpa, status_gpa;
	*r = (struct request){.head = next_desc, .descs = descs, .type = type, .size = size};
	/* Near the end of the disk, and of all numbers, every second time. */
	r->sector = how & 128 ? at % SECTORS : SECTORS - at % 16;
	if ((at & 0xff00) == 0xff00)
		r->sector = ~0ull - (at & 15);
	r->header = take(header_size, &header_gpa);
	memset(r->header, 0, header_size);
	memcpy(r->header, &type, 4);
	memcpy(r->header + 8, &r->sector, header_size < 16 ? 7 : 8);
	r->data = take(size, &gpa);
	memset(r->data, type == OUT ? ++serial : 0xa5, size);
	r->status = take(status_size, &status_gpa);
	memset(r->status, 0xaa, status_size);

	uint8_t *table = indirect ? low + tables : ring.desc;
	uint16_t base = indirect ? 0 : next_desc, mask = indirect ? 0xffff : ring.size - 1;
	uint16_t write = type == OUT ? 0 : 2;
	uint32_t done = 0;
	desc_put(table, base, header_gpa, header_size, 1, (base + 1) & mask);
	for (uint32_t i = 1; i <= cuts; i++) {
		uint32_t part = i < cuts ? size / cuts : size - done;
		desc_put(table, (base + i) & mask, gpa + done, part, 1 | write, (base + i + 1) & mask);
		done += part;
	}
	desc_put(table, (base + parts - 1) & mask, status_gpa, status_size,
		 read_only ? 0 : 2, 0);
	if (indirect) {
		desc_put(ring.desc, next_desc, tables, 16 * parts, 4, 0);
		tables += 16 * parts;
	}
	next_desc = (next_desc + descs) & (ring.size - 1);
	free_descs -= descs;
	ring.avail[2 + (avail & (ring.size - 1))] = r->head;
	ring.avail[1] = ++avail;
	int in_range = size && !(size % 512) && r->sector <= SECTORS && size / 512 <= SECTORS - r->sector;
	r->plain = header_size == 16 && status_size == 1 && !read_only &&
		   ((type == IN && in_range && device.readable) ||
		    (type == OUT && in_range && device.writable) ||
		    (type == GET_ID && size == 20 && cuts == 1));
}

static void took(void)
{
	free_descs += request[first++].descs;
	count--;
}

static void check_done(const struct request *r, uint32_t written)
{
	if (!r->plain)
		FINDING("a request of type %u, %u bytes at %lu is carried out", r->type, r->size,
			(unsigned long)r->sector);
	if (*r->status)
		FINDING("status %u", *r->status);
	if (written != 1 + (r->type == OUT ? 0 : r->size))
		FINDING("%u bytes written of a request of %u", written, r->size);
	if (r->type == OUT)
		memcpy(shadow + 512 * r->sector, r->data, r->size);
	else if (r->type == IN && memcmp(shadow + 512 * r->sector, r->data, r->size))
		FINDING("the data read differ");
	else if (r->type == GET_ID && memcmp(device.id, r->data, 20))
		FINDING("the name differs");
}

static void serve(void)
{
	uint16_t before = ring.next_used;

	failed = 0;
	int what = vmm_disk_serve(&ring, &device), next = what & ~VMM_INTERRUPT;
	if (ring.published != ring.next_used || ring.used[1] != ring.next_used ||
	    ring.last_avail != ring.next_used)
		FINDING("used entries that are not published");
	if ((uint16_t)(ring.next_used - before) > 64)
		FINDING("%u requests in one call", ring.next_used - before);
	/* An interrupt ends a call: the entries of earlier ones want none. */
	if (!(what & VMM_INTERRUPT) != !wants_interrupt(&ring, before, ring.next_used))
		FINDING("interrupt %d, entries %u to %u", what & VMM_INTERRUPT, before, ring.next_used);
	for (; before != ring.next_used; before++) {
		const uint32_t *entry = (uint32_t *)((uint8_t *)ring.used + 4 +
						     8 * (before & (ring.size - 1)));
		if (!count || entry[0] != request[first].head)
			FINDING("entry %u is not the next request", entry[0]);
		check_done(&request[first], entry[1]);
		took();
	}
	if (next == VMM_OTHER) {
		if (!count || (request[first].plain && !failed))
			FINDING("a plain request is not carried out");
		const struct request *r = &request[first];
		if (*r->status != 0xaa)
			FINDING("what is for Python has a status");
		if (r->type == OUT) /* a write that failed half-way may have changed the disk */
			memcpy(shadow, disk, DISK);
		took();
		ring.last_avail++;
		ring.used[1] = ring.published = ++ring.next_used;
	} else if (next == VMM_IDLE) {
		if (count || !notify_asked(&ring))
			FINDING("idle with %d requests", count);
	} else if (next != VMM_MORE)
		FINDING("%d returned", next);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	uint8_t c = byte(&in), e = byte(&in);

	world_turn();
	place = first = count = next_desc = 0;
	tables = TABLES;
	memset(disk, serial = e, DISK);
	memset(shadow, e, DISK);
	device = (struct vmm_disk){.fd = disk_fd, .readable = (e & 3) != 3, .writable = (e & 12) != 12,
				   .capacity = SECTORS, .id = "serial number twenty"};
	ring_place(&ring, low + RING_AT, 1u << (c & 8 ? 8 : c % 9), c & 16 ? 0xfff0 : 0);
	ring.indirect = c >> 6 & 1;
	ring.event_idx = c >> 5 & 1;
	ring.poll_max = e & 64 ? 4000 : 0;
	ring.poll = e & 128 ? ring.poll_max : 0;
	free_descs = ring.size;
	avail = ring.last_avail;
	ring.avail[0] = e >> 4 & 1;
	if (ring.event_idx)
		ring.avail[2 + ring.size] = avail + (e >> 5);
	for (int turns = 0; in.left && turns < 300; turns++) {
		uint8_t op = byte(&in);
		if (op & 3) {
			uint8_t t = byte(&in), s = byte(&in), c = byte(&in), how = byte(&in);
			uint16_t at = half(&in);
			for (int times = op & 0x80 ? op & 0x7f : 1; times; times--)
				add(t, s, c, how, at++);
		} else {
			failing = op & 0x40 ? half(&in) : 0;
			serve();
		}
	}
	for (int i = 0; i < 8; i++)
		serve();
	return 0;
}

void between(void) {}

int LLVMFuzzerInitialize(int *argument_count, char ***words)
{
	(void)argument_count;
	(void)words;
	world_start();
	return 0;
}
