#include "world.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define GUARD (32u << 20) /* bytes on both sides of guest memory that nothing may touch */
#define IOV_LIMIT 1024    /* IOV_MAX */

uint8_t *low, *high, *spill, *disk;
int tap_fd = 1000, disk_fd = 1001; /* no real ones: only the functions below see them */
struct frames incoming, outgoing;
uint32_t failing;
int failed;

void finding(const char *file, int line, const char *format, ...)
{
	va_list arguments;

	fprintf(stderr, "FINDING %s:%d: ", file, line);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, "\n");
	abort();
}

uint8_t byte(struct input *in)
{
	if (!in->left)
		return 0;
	in->left--;
	return *in->at++;
}

uint16_t half(struct input *in)
{
	uint16_t value = byte(in);
	return value | byte(in) << 8;
}

/* --- frames ----------------------------------------------------------------------------------- */

void frames_clear(struct frames *frames)
{
	frames->first = frames->count = 0;
	frames->used = 0;
}

struct frame *frames_add(struct frames *frames, size_t size)
{
	if (frames->first + frames->count == FRAMES || frames->used + size > frames->size)
		return NULL;
	struct frame *frame = &frames->frame[frames->first + frames->count++];
	frame->size = size;
	frame->data = frames->arena + frames->used;
	frames->used += size;
	return frame;
}

struct frame *frames_first(struct frames *frames)
{
	return frames->count ? &frames->frame[frames->first] : NULL;
}

void frames_drop(struct frames *frames)
{
	frames->first++;
	if (!--frames->count)
		frames_clear(frames);
}

/* --- the calls of the kernel -------------------------------------------------------------------- */

static int within(const uint8_t *at, size_t length, const uint8_t *area, size_t size)
{
	return at >= area && length <= size && (size_t)(at - area) <= size - length;
}

/* Every buffer is in guest memory; the last one may be the spill. The number of bytes. */
static size_t checked(const struct iovec *buffer, int count, int may_spill)
{
	size_t total = 0;

	if (count < 1 || count > IOV_LIMIT + 1)
		FINDING("%d buffers in one call", count);
	for (int i = 0; i < count; i++) {
		const uint8_t *at = buffer[i].iov_base;
		size_t length = buffer[i].iov_len;
		if (!within(at, length, low, LOW) && !within(at, length, high, HIGH) &&
		    !(may_spill && i == count - 1 && within(at, length, spill, SPILL)))
			FINDING("buffer %d of %d, %zu bytes at %p, is not guest memory", i, count,
				length, (const void *)at);
		total += length;
	}
	return total;
}

static int fails(int count)
{
	int fail = failing & 1;

	failing >>= 1;
	if (!fail && count <= IOV_LIMIT)
		return 0;
	failed = 1;
	errno = count > IOV_LIMIT ? EINVAL : EIO;
	return 1;
}

ssize_t world_readv(int fd, const struct iovec *buffer, int count)
{
	struct frame *frame = frames_first(&incoming);
	size_t at = 0;

	if (fd != tap_fd)
		FINDING("read of descriptor %d", fd);
	checked(buffer, count, 1);
	if (fails(count))
		return -1;
	if (!frame) {
		errno = EAGAIN;
		return -1;
	}
	for (int i = 0; i < count && at < frame->size; i++) {
		size_t part = frame->size - at < buffer[i].iov_len ? frame->size - at
								   : buffer[i].iov_len;
		memcpy(buffer[i].iov_base, frame->data + at, part);
		at += part;
	}
	frames_drop(&incoming); /* as of a tap: what has no room is lost, and not counted */
	return at;
}

ssize_t world_writev(int fd, const struct iovec *buffer, int count)
{
	size_t total = checked(buffer, count, 0), at = 0;

	if (fd != tap_fd)
		FINDING("write to descriptor %d", fd);
	if (fails(count))
		return -1;
	struct frame *frame = frames_add(&outgoing, total);
	if (!frame) {
		failed = 1;
		errno = EAGAIN;
		return -1;
	}
	for (int i = 0; i < count; at += buffer[i++].iov_len)
		memcpy(frame->data + at, buffer[i].iov_base, buffer[i].iov_len);
	return total;
}

static void check_disk(int fd, off_t offset, size_t total)
{
	if (fd != disk_fd)
		FINDING("descriptor %d is not the disk's", fd);
	if (offset < 0 || total > DISK || (size_t)offset > DISK - total)
		FINDING("%zu bytes at %lld of a disk of %u", total, (long long)offset, DISK);
}

ssize_t world_preadv2(int fd, const struct iovec *buffer, int count, off_t offset, int flags)
{
	size_t total = checked(buffer, count, 0);

	if (flags != RWF_NOWAIT)
		FINDING("a read that may wait");
	check_disk(fd, offset, total);
	if (fails(count))
		return failing & 1 ? -1 : (ssize_t)(total / 2); /* the rest is not in the page cache */
	for (int i = 0; i < count; offset += buffer[i++].iov_len)
		memcpy(buffer[i].iov_base, disk + offset, buffer[i].iov_len);
	return total;
}

ssize_t world_pwritev(int fd, const struct iovec *buffer, int count, off_t offset)
{
	size_t total = checked(buffer, count, 0);

	check_disk(fd, offset, total);
	if (fails(count))
		return -1;
	for (int i = 0; i < count; offset += buffer[i++].iov_len)
		memcpy(disk + offset, buffer[i].iov_base, buffer[i].iov_len);
	return total;
}

/* --- rings -------------------------------------------------------------------------------------- */

static size_t used_offset(uint32_t size) { return 16 * size + ((6 + 2 * size + 3) & ~3u); }

size_t ring_bytes(uint32_t size) { return used_offset(size) + 6 + 8 * size; }

void ring_place(struct vmm_ring *ring, uint8_t *at, uint32_t size, uint16_t start)
{
	memset(ring, 0, sizeof *ring);
	memset(at, 0, ring_bytes(size));
	ring->desc = at;
	ring->avail = (uint16_t *)(at + 16 * size);
	ring->used = (uint16_t *)(at + used_offset(size));
	ring->size = size;
	ring->regions = 2;
	ring->region[0] = (struct vmm_region){0, LOW, low};
	ring->region[1] = (struct vmm_region){GPA_HIGH, HIGH, high};
	ring->last_avail = ring->next_used = ring->published = start;
	ring->avail[1] = ring->used[1] = start;
}

void desc_put(uint8_t *table, uint32_t index, uint64_t addr, uint32_t len, uint16_t flags,
	      uint16_t next)
{
	struct __attribute__((packed)) {
		uint64_t addr;
		uint32_t len;
		uint16_t flags, next;
	} desc = {addr, len, flags, next};

	memcpy(table + 16 * index, &desc, sizeof desc);
}

uint8_t *host_of(uint64_t gpa, uint64_t length)
{
	if (gpa < LOW && length <= LOW - gpa)
		return low + gpa;
	if (gpa >= GPA_HIGH && gpa - GPA_HIGH < HIGH && length <= HIGH - (gpa - GPA_HIGH))
		return high + (gpa - GPA_HIGH);
	return NULL;
}

int wants_interrupt(const struct vmm_ring *ring, uint16_t old, uint16_t new)
{
	if (old == new)
		return 0;
	if (!ring->event_idx)
		return !(ring->avail[0] & 1);
	return (uint16_t)(new - ring->avail[2 + ring->size] - 1) < (uint16_t)(new - old);
}

int notify_asked(const struct vmm_ring *ring)
{
	if (ring->event_idx)
		return ring->used[2 + 4 * ring->size] == ring->avail[1];
	return !(ring->used[0] & 1);
}

#ifdef __clang__ /* libFuzzer has a __sanitizer_cov_trace_pc of its own */
void __sanitizer_cov_load1(void *at);
void __sanitizer_cov_load2(void *at);
void __sanitizer_cov_load4(void *at);
void __sanitizer_cov_load8(void *at);
void __sanitizer_cov_load16(void *at);
void __sanitizer_cov_load1(void *at) { (void)at; between(); }
void __sanitizer_cov_load2(void *at) { (void)at; between(); }
void __sanitizer_cov_load4(void *at) { (void)at; between(); }
void __sanitizer_cov_load8(void *at) { (void)at; between(); }
void __sanitizer_cov_load16(void *at) { (void)at; between(); }
#else
void __sanitizer_cov_trace_pc(void);
void __sanitizer_cov_trace_pc(void) { between(); }
#endif

/* --- start -------------------------------------------------------------------------------------- */

static uint8_t *guarded(size_t size)
{
	uint8_t *at = mmap(NULL, size + 2 * GUARD, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED || mprotect(at + GUARD, size, PROT_READ | PROT_WRITE)) {
		perror("guest memory");
		exit(2);
	}
	return at + GUARD;
}

static void frames_start(struct frames *frames)
{
	frames->size = 16u << 20;
	frames->arena = malloc(frames->size);
	if (!frames->arena)
		exit(2);
}

void world_start(void)
{
	low = guarded(LOW);
	high = guarded(HIGH);
	spill = malloc(SPILL); /* the sanitizer guards it */
	disk = malloc(DISK);
	if (!spill || !disk)
		exit(2);
	memset(disk, 0, DISK);
	frames_start(&incoming);
	frames_start(&outgoing);
}

void world_turn(void)
{
	frames_clear(&incoming);
	frames_clear(&outgoing);
	failing = 0;
	failed = 0;
}
