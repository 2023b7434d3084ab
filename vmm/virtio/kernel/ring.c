#include "ring.h"

#define AVAIL_F_NO_INTERRUPT 1
#define USED_F_NO_NOTIFY 1
#define POLL_MIN 4000 /* nanoseconds */
#define PATIENCE 3    /* so of three parts of the time one is spent looking, at most */

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};

int vmm_sizes(void)
{
	return sizeof(struct vmm_ring) + sizeof(struct vmm_disk) + sizeof(struct vmm_net);
}

uint64_t vmm_now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

/* What the driver may change at any moment is read once. */
static inline uint16_t load(const uint16_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
static inline void store(uint16_t *at, uint16_t value)
{
	__atomic_store_n(at, value, __ATOMIC_RELEASE);
}

static uint8_t *host(const struct vmm_ring *ring, uint64_t addr, uint64_t length)
{
	for (uint32_t i = 0; i < ring->regions; i++) {
		const struct vmm_region *region = &ring->region[i];
		if (addr >= region->gpa && length <= region->size &&
		    addr - region->gpa <= region->size - length)
			return region->host + (addr - region->gpa);
	}
	return NULL;
}

int vmm_peek(const struct vmm_ring *ring, uint16_t ahead, struct chain *chain,
	     struct iovec *buffer, int room)
{
	uint16_t index = load(&ring->avail[1]), ready = index - ring->last_avail;
	uint16_t out = ring->last_avail - ring->next_used; /* taken and not given back */

	if (ready <= ahead)
		return 0;
	if ((uint32_t)ready + out > ring->size)
		return -1;
	uint16_t head = load(&ring->avail[2 + ((ring->last_avail + ahead) & (ring->size - 1))]);
	const uint8_t *table = ring->desc;
	uint32_t limit = ring->size, at = head;
	int indirect = 0;

	*chain = (struct chain){.head = head, .buffer = buffer};
	for (uint32_t count = 0;;) {
		struct desc desc;
		if (at >= limit)
			return -1;
		memcpy(&desc, table + 16 * at, sizeof desc);
		asm volatile("" ::: "memory");
		if (desc.flags & DESC_F_INDIRECT) {
			if (indirect || !ring->indirect || desc.flags & DESC_F_NEXT || !desc.len ||
			    desc.len % 16 || desc.len > 16 * CHAIN_MAX)
				return -1;
			table = host(ring, desc.addr, desc.len);
			if (!table)
				return -1;
			limit = desc.len / 16;
			at = count = 0;
			indirect = 1;
			continue;
		}
		uint8_t *memory = desc.len ? host(ring, desc.addr, desc.len) : NULL;
		int used = chain->readable + chain->writable;
		if (!memory || used >= room)
			return -1;
		if (desc.flags & DESC_F_WRITE)
			chain->writable++;
		else if (chain->writable)
			return -1;
		else
			chain->readable++;
		buffer[used] = (struct iovec){memory, desc.len};
		if (!(desc.flags & DESC_F_NEXT))
			return 1;
		if (++count >= limit || used + 1 >= CHAIN_MAX)
			return -1;
		at = desc.next;
	}
}

void vmm_give(struct vmm_ring *ring, uint16_t head, uint32_t written)
{
	uint32_t entry[2] = {head, written};
	memcpy((uint8_t *)ring->used + 4 + 8 * (ring->next_used & (ring->size - 1)), entry, 8);
	ring->next_used++;
	ring->last_avail++;
}

int vmm_publish(struct vmm_ring *ring)
{
	uint16_t new = ring->next_used, old = ring->published;

	if (new == old)
		return 0;
	store(&ring->used[1], new);
	ring->published = new;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (ring->event_idx) {
		uint16_t event = load(&ring->avail[2 + ring->size]);
		return (uint16_t)(new - event - 1) < (uint16_t)(new - old) ? VMM_INTERRUPT : 0;
	}
	return load(&ring->avail[0]) & AVAIL_F_NO_INTERRUPT ? 0 : VMM_INTERRUPT;
}

void vmm_hush(struct vmm_ring *ring)
{
	if (!ring->event_idx)
		store(&ring->used[0], USED_F_NO_NOTIFY);
}

static int is_empty(const struct vmm_ring *ring)
{
	return load(&ring->avail[1]) == ring->last_avail;
}

int vmm_arm(struct vmm_ring *ring)
{
	if (ring->event_idx)
		store(&ring->used[2 + 4 * ring->size], ring->last_avail);
	else
		store(&ring->used[0], 0);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return !is_empty(ring);
}

int vmm_idle(struct vmm_ring *ring)
{
	if (!ring->idle_since)
		ring->idle_since = vmm_now();
	if (ring->poll)
		for (int spins = 1;; spins++) {
			if (!is_empty(ring))
				return 1;
			__builtin_ia32_pause();
			if (!(spins & 15) && vmm_now() - ring->idle_since >= ring->poll)
				break;
		}
	return vmm_arm(ring);
}

/* As QEMU does (util/aio-posix.c, adjust_polling_time): longer when a little longer would have been
 * enough, not at all when it would not. With more patience, because what was waited for by sleeping
 * seems later than it was, by as long as a wake-up takes: 30 to 50 us on a virtual machine. */
void vmm_busy(struct vmm_ring *ring)
{
	if (!ring->idle_since)
		return;
	uint64_t idle = vmm_now() - ring->idle_since;
	ring->idle_since = 0;
	if (idle <= ring->poll)
		return;
	if (idle > PATIENCE * ring->poll_max)
		ring->poll = 0;
	else {
		ring->poll = ring->poll ? 2 * ring->poll : POLL_MIN;
		if (ring->poll > ring->poll_max)
			ring->poll = ring->poll_max;
	}
}
