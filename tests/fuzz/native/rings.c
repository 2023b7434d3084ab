/* A driver that breaks every rule, and changes rings, tables and headers while the kernel reads them
 * (not for every second input, which can then be judged more closely). With FUZZ_THREAD set a second
 * thread does so too, for every second PHASE of inputs: it meets what lies between two branches.
 *
 * Found: any access outside of guest memory and the kernel's own, whatever a sanitizer reports, calls
 * without an end, more taken than was offered, chains given back that were not next, more bytes told
 * than a chain has room for. */

#include "world.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>

#define TABLES 0x8000       /* indirect tables */
#define HEADERS 0x1000      /* headers of disk requests */
#define HEADER_COUNT 8
#define FIRST 0x20000       /* rings */
#define SECOND 0x30000
#define TURNS 4
#define PHASE 256

static const uint32_t LENGTHS[] = {0, 1, 12, 16, 20, 26, 30, 44, 64, 512, 1024, 1526, 4096, 65536, SPILL,
				   0x40000, 0x7fffffff, 0xffffffff, 16 * 4, 16 * 16, 16 * 1024,
				   16 * 1025, 0x80000000, LOW, HIGH};
static const uint64_t ADDRESSES[] = {0, 0x1000, TABLES, 0x10000, FIRST, LOW - 1, LOW - 16, LOW - 512, LOW,
				     GPA_HIGH, GPA_HIGH + HIGH - 512, GPA_HIGH + HIGH - 1,
				     GPA_HIGH + HIGH, ~0ull, ~0ull - 511, 0xc0000000, GPA_HIGH - 1,
				     0x18000, SECOND, GPA_HIGH + HIGH - 16, LOW - 64};

static atomic_int running;
static atomic_flag writing = ATOMIC_FLAG_INIT; /* held for one change */
static sem_t wanted;
static int threaded;
static atomic_int together; /* the second thread is at work */
static atomic_uint target_base, target_size;

static uint64_t chance;
static uint32_t rate, left; /* branches until the next change: 1 to `rate`; 0: there is none */

static uint64_t turn(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void put(uint8_t *at, uint64_t value, size_t size)
{
	volatile uint8_t *to = at;
	for (size_t i = 0; i < size; i++)
		to[i] = value >> 8 * i;
}

/* One change of what the driver has laid out. */
static void change(uint64_t *state)
{
	uint32_t size = atomic_load(&target_size);

	uint64_t r = turn(state);
	uint8_t *base = low + atomic_load(&target_base);
	uint32_t i = (r >> 8) & (size - 1);
	uint8_t *entry = r & 64 ? low + TABLES + 16 * ((r >> 20) % 1024) : base + 16 * i;
	uint8_t *avail = base + 16 * size;
	switch (r & 7) {
	case 0:
		put(entry, ADDRESSES[(r >> 32) % COUNT(ADDRESSES)], 8);
		break;
	case 1:
		put(entry + 8, LENGTHS[(r >> 32) % COUNT(LENGTHS)], 4);
		break;
	case 2:
		put(entry + 12, (r >> 32) & 7, 2);
		break;
	case 3:
		put(entry + 14, (r >> 32) & (r >> 50 & 1 ? 0xffff : size - 1), 2);
		break;
	case 4:
		put(avail + 2, avail[2] + (r >> 32) % 5, 1);
		break;
	case 5:
		put(avail + 4 + 2 * i, (r >> 32) & (r >> 50 & 1 ? 0xffff : size - 1), 2);
		break;
	case 6:
		put(low + HEADERS + 16 * ((r >> 40) % HEADER_COUNT), (r >> 32) & 1, 4);
		break;
	case 7:
		put(low + HEADERS + 8 + 16 * ((r >> 40) % HEADER_COUNT),
		    r & 256 ? ~0ull : (r >> 46) % 4096, 8);
	}
}

void between(void)
{
	if (rate && !--left) {
		left = 1 + turn(&chance) % rate;
		change(&chance);
	}
}

/* The second thread. */
static void *rewrite(void *nothing)
{
	uint64_t state = 88172645463325252ull;

	for (;;) {
		atomic_flag_clear(&writing);
		if (!together)
			sem_wait(&wanted);
		while (atomic_flag_test_and_set(&writing))
			__builtin_ia32_pause();
		if (atomic_load(&running) && atomic_load(&target_size))
			change(&state);
	}
	return nothing;
}

static void fill(struct input *in, uint8_t *table, uint32_t count, uint32_t size)
{
	for (uint32_t i = 0; i < count && in->left; i++) {
		uint8_t k = byte(in), l = byte(in), f = byte(in);
		uint64_t addr = k & 0x80 ? ADDRESSES[(k & 0x7f) % COUNT(ADDRESSES)]
					 : (uint64_t)(k & 0x7f) << 11;
		uint32_t length = l & 0x80 ? LENGTHS[(l & 0x7f) % COUNT(LENGTHS)]
					   : (l & 0x40 ? (l & 0x3f) * 512u : l & 0x3fu);
		uint16_t next = f & 0x80 ? (f >> 3 & 15) * 4999 : (i + 1) & (size - 1);
		if ((f & 0xf8) == 0xf8)
			next = size;
		else if ((f & 0xf8) == 0xf0)
			next = size + 1;
		desc_put(table, i, addr, length, f & 7, next);
	}
}

static void set_up(struct vmm_ring *ring, struct input *in, uint32_t base)
{
	uint8_t c = byte(in), place = byte(in);
	uint16_t start = c & 16 ? 0xfff0 : 0;

	ring_place(ring, low + base, 1u << (c & 15) % 9, start);
	/* One of its areas at the end of guest memory: what reads on meets the guard page. */
	if ((place & 3) == 1)
		ring->desc = low + LOW - 16 * ring->size;
	else if ((place & 3) == 2)
		ring->avail = (uint16_t *)(low + LOW - 6 - 2 * ring->size);
	else if ((place & 3) == 3)
		ring->used = (uint16_t *)(low + ((LOW - 6 - 8 * ring->size) & ~3u));
	ring->avail[1] = ring->used[1] = start;
	ring->indirect = c >> 5 & 1;
	ring->event_idx = c >> 6 & 1;
	ring->poll_max = c & 0x80 ? 3000 : 0;
	uint32_t count = byte(in);
	fill(in, ring->desc, count < ring->size ? count : ring->size, ring->size);
	ring->avail[0] = byte(in) & 1;
	uint8_t a = byte(in);
	ring->avail[1] = start + (a & 0x80 ? a : a % (ring->size + 1));
	for (uint32_t i = 0; i < ring->size; i++)
		ring->avail[2 + i] = a & 0x40 && in->left ? (a & 0x20 ? half(in) : byte(in)) : i;
	if (place & 0x10)
		ring->avail[2 + (start & (ring->size - 1))] = ring->size - (place >> 5 & 1);
	if (ring->event_idx)
		ring->avail[2 + ring->size] = start + (a & 7);
}

/* Requests that are right, which the input then spoils. */
static void plausible(struct vmm_ring *ring, struct input *in)
{
	uint32_t count = ring->size / 3;

	for (uint32_t i = 0; i < count; i++) {
		uint8_t k = byte(in), spoil = byte(in);
		int kind = k & 31 ? (k % 3 ? k % 2 : 8) : 0;
		uint64_t sector = k % 5 ? (uint64_t)(k * 61) % 2100 : DISK / 512 + 1 - (k >> 3 & 3);
		uint64_t header[2] = {kind, sector};
		memcpy(low + HEADERS + 16 * (k % HEADER_COUNT), header, 16);
		desc_put(ring->desc, 3 * i, HEADERS + 16 * (k % HEADER_COUNT), 16, 1, 3 * i + 1);
		desc_put(ring->desc, 3 * i + 1, 0x40000 + ((uint64_t)(k & 60) << 10),
			 kind == 8 ? 20 : 512u << (k >> 6), kind == 1 ? 1 : 3, 3 * i + 2);
		desc_put(ring->desc, 3 * i + 2, LOW - 1 - i, 1, 2, 0);
		ring->avail[2 + i] = 3 * i;
		if (spoil & 0x80)
			ring->desc[16 * (3 * i + (spoil & 3) % 3) + (spoil >> 2 & 15)] ^= byte(in);
	}
	if (count)
		ring->avail[1] = ring->last_avail + count;
}

static uint32_t *used(const struct vmm_ring *ring, uint16_t index)
{
	return (uint32_t *)((uint8_t *)ring->used + 4 + 8 * (index & (ring->size - 1)));
}

/* The room of the chain at `head` as the specification has it; -1: it breaks the rules. */
static int64_t room_of(const struct vmm_ring *ring, uint32_t head)
{
	const uint8_t *table = ring->desc;
	uint32_t limit = ring->size, at = head, count = 0;
	int indirect = 0, written = 0;
	int64_t room = 0;

	for (;;) {
		struct {
			uint64_t addr;
			uint32_t len;
			uint16_t flags, next;
		} desc;
		if (at >= limit || count++ >= limit)
			return -1;
		memcpy(&desc, table + 16 * at, 16);
		if (!host_of(desc.addr, desc.len) || !desc.len)
			return -1;
		if (desc.flags & 4) {
			if (indirect || !ring->indirect || desc.flags & 1 || desc.len % 16 ||
			    desc.len > 16 * 1024)
				return -1;
			indirect = 1;
			table = host_of(desc.addr, desc.len);
			limit = desc.len / 16;
			at = count = 0;
			continue;
		}
		if (written && !(desc.flags & 2))
			return -1;
		written = desc.flags & 2;
		room += written ? desc.len : 0;
		if (!(desc.flags & 1))
			return room;
		at = desc.next;
	}
}

static void check(const struct vmm_ring *ring, const struct vmm_ring *before, int limit)
{
	uint16_t count = ring->next_used - before->next_used;

	if (ring->published != ring->next_used)
		FINDING("used entries that are not published");
	if ((uint16_t)(ring->last_avail - before->last_avail) != count)
		FINDING("%u taken, %u given back", ring->last_avail - before->last_avail, count);
	if (count > limit)
		FINDING("%u chains in one call", count);
}

/* What may be said where no second thread is: every chain given back was next, and kept the rules. */
static void check_closely(const struct vmm_ring *ring, const struct vmm_ring *before,
			  const int64_t *rooms, const uint16_t *heads, uint32_t ready)
{
	uint16_t count = ring->next_used - before->next_used;

	if (ready > ring->size && count)
		FINDING("%u chains of a ring of %u, which says it has %u", count, ring->size, ready);
	if (count > ready)
		FINDING("%u chains of %u", count, ready);
	for (uint16_t i = 0; i < count && i < ring->size; i++) {
		uint32_t *entry = used(ring, before->next_used + i);
		if (entry[0] != heads[i])
			FINDING("chain %u is given back, %u was next", entry[0], heads[i]);
		if (rooms[i] < 0 || entry[1] > rooms[i])
			FINDING("%u bytes in chain %u of %lld", entry[1], heads[i],
				(long long)rooms[i]);
	}
}

struct close {
	struct vmm_ring before;
	int64_t rooms[256];
	uint16_t heads[256];
	uint32_t ready;
};

static void look(struct close *close, const struct vmm_ring *ring)
{
	close->before = *ring;
	close->ready = (uint16_t)(ring->avail[1] - ring->last_avail);
	for (uint32_t i = 0; i < ring->size; i++) {
		close->heads[i] = ring->avail[2 + ((ring->last_avail + i) & (ring->size - 1))];
		close->rooms[i] = room_of(ring, close->heads[i]);
	}
}

static void skip(struct vmm_ring *ring)
{
	ring->last_avail++;
	ring->used[1] = ring->published = ++ring->next_used;
}

/* A copy of the parts of low memory that the driver has laid out. An input whose data lands there
 * changes its own rings, and is not judged closely. */
static uint8_t layout[LOW];

static void lay_out(const struct vmm_ring *ring)
{
	size_t desc = ring->desc - low, avail = (uint8_t *)ring->avail - low;

	memcpy(layout + desc, low + desc, 16 * ring->size);
	memcpy(layout + avail, low + avail, 4 + 2 * ring->size);
	memcpy(layout + TABLES, low + TABLES, 0x4000);
	memcpy(layout + LOW - 512, low + LOW - 512, 512);
}

static int unchanged(const struct vmm_ring *ring)
{
	size_t desc = ring->desc - low, avail = (uint8_t *)ring->avail - low;

	return !memcmp(layout + desc, low + desc, 16 * ring->size) &&
	       !memcmp(layout + avail, low + avail, 4 + 2 * ring->size) &&
	       !memcmp(layout + TABLES, low + TABLES, 0x4000) &&
	       !memcmp(layout + LOW - 512, low + LOW - 512, 512);
}

static void serve_disk(struct vmm_ring *ring, struct input *in, uint8_t mode, int alone)
{
	struct vmm_disk device = {.fd = disk_fd, .readable = !(mode & 2), .writable = !(mode & 4),
				  .capacity = DISK / 512, .id = "serial"};
	static struct close close;

	if (mode & 128)
		plausible(ring, in);
	lay_out(ring);
	atomic_store(&running, !alone);
	for (int i = 0; i < TURNS; i++) {
		look(&close, ring);
		int what = vmm_disk_serve(ring, &device);
		check(ring, &close.before, 64);
		if (alone && unchanged(ring))
			check_closely(ring, &close.before, close.rooms, close.heads, close.ready);
		if ((what & 7) == VMM_OTHER)
			skip(ring);
	}
}

static void serve_net(struct vmm_ring *tx, struct input *in, uint8_t mode, int alone)
{
	static struct close sent, received;
	struct vmm_ring rx;
	struct vmm_net net = {.fd = tap_fd, .mergeable = mode >> 1 & 1, .checksums = mode >> 2 & 1,
			      .promiscuous = mode >> 4 & 1, .unicast = 1,
			      .usual = mode & 64 ? 1512 : 26, .spill_size = SPILL, .spill = spill};

	set_up(&rx, in, SECOND);
	for (int frames = 1 + (byte(in) & 15); frames; frames--) {
		uint16_t size = half(in);
		struct frame *frame = frames_add(&incoming, mode & 8 ? size + 12 + (size & 1) * 5000
								      : size % 3000);
		if (!frame)
			break;
		memset(frame->data, mode & 32 ? 0x81 : 0, frame->size);
	}
	if (mode & 128) {
		atomic_store(&target_size, 0);
		atomic_store(&target_base, SECOND);
		atomic_store(&target_size, rx.size);
	}
	lay_out(tx);
	lay_out(&rx);
	atomic_store(&running, !alone);
	for (int i = 0; i < TURNS; i++) {
		struct vmm_ring *first = byte(in) & 1 ? NULL : tx;
		look(&sent, tx);
		look(&received, &rx);
		int what = vmm_net_serve(first, &rx, &net);
		check(tx, &sent.before, 512);
		check(&rx, &received.before, 1 << 16);
		if (alone && unchanged(tx) && unchanged(&rx)) {
			check_closely(tx, &sent.before, sent.rooms, sent.heads, sent.ready);
			check_closely(&rx, &received.before, received.rooms, received.heads,
				      received.ready);
		}
		if (net.held && (net.held > SPILL || net.held < HEADER_SIZE + 14))
			FINDING("a frame of %lld bytes is kept", (long long)net.held);
		net.held = 0;
		if ((what & 7) == VMM_OTHER)
			skip(tx);
		if ((what >> VMM_RECEIVED & 7) == VMM_OTHER)
			skip(&rx);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	struct vmm_ring ring;
	uint8_t mode = byte(&in), more = byte(&in);
	static unsigned inputs;
	int second = threaded && inputs / PHASE & 1, alone = more & 1 && !second;

	if (threaded && !(inputs++ % PHASE)) {
		atomic_store(&together, second);
		if (second)
			sem_post(&wanted);
	}

	world_turn();
	memset(low, 0, 0x1000);
	for (uint32_t i = 0; i < HEADER_COUNT; i++) {
		uint64_t header[2] = {i % 3 ? i % 2 : 8, i * 61};
		memcpy(low + HEADERS + 16 * i, header, 16);
	}
	if (more & 2)
		failing = half(&in);
	set_up(&ring, &in, FIRST);
	atomic_store(&target_base, FIRST);
	atomic_store(&target_size, ring.size);
	fill(&in, low + TABLES, byte(&in), 1024);
	if (more & 4) /* the end of memory is a table of four */
		fill(&in, low + LOW - 64, 4, 4);
	if (!alone) {
		chance = 0x9e3779b97f4a7c15ull * (1 + half(&in));
		left = rate = 1 << (byte(&in) & 7);
	}
	if (mode & 1)
		serve_disk(&ring, &in, mode, alone);
	else
		serve_net(&ring, &in, mode, alone);
	atomic_store(&running, 0);
	rate = 0;
	while (second && atomic_flag_test_and_set(&writing)) /* its last change is made */
		__builtin_ia32_pause();
	atomic_store(&target_size, 0);
	if (second)
		atomic_flag_clear(&writing);
	return 0;
}

int LLVMFuzzerInitialize(int *count, char ***words)
{
	pthread_t thread;

	(void)count;
	(void)words;
	world_start();
	threaded = getenv("FUZZ_THREAD") != NULL;
	if (threaded && pthread_create(&thread, NULL, rewrite, NULL))
		exit(2);
	return 0;
}
