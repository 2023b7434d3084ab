/* A bare-metal virtio driver that measures: what its parts share.
 *
 * The command line says what to do (see main.c): jobs with `;` between them. What comes of each goes to
 * the serial port as a line, `result NAME=NUMBER ...`, or `failed: WHY`, and at last the exit port is
 * written. */

#ifndef GUEST_H
#define GUEST_H

#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define BUFFERS 0x1000000ull /* GPA of what the devices read and write, up to the end of memory */
#define BUFFERS_SIZE (192ull << 20)

/* --- platform.c --- */

static inline void out8(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 in8(u16 port)
{
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline u32 in32(u16 port)
{
    u32 value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline u64 ticks(void)
{
    u32 low, high;
    asm volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}
static inline void fence(void) { asm volatile("mfence" ::: "memory"); }
static inline void barrier(void) { asm volatile("" ::: "memory"); }
static inline void pause(void) { asm volatile("pause" ::: "memory"); }

void print(const char *text);
void print_number(u64 value);
void failed(const char *why) __attribute__((noreturn));
void finish(void) __attribute__((noreturn));
void result(const char *name, u64 value); /* after the first: on the same line */
u64 nanoseconds(u64 ticks);
u64 ticks_in(u64 nanoseconds);
int next_job(const char *text); /* 0: there is none; the first is in `text`, else it is NULL */
u64 argument(const char *name, u64 otherwise); /* NAME=NUMBER of this job */
u64 percentile(u32 *samples, u64 count, u64 percent); /* of nanoseconds; sorts them */

/* --- virtio.c (virtio 1.2) --- */

#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_VERSION_1 (1ull << 32)
#define DESC_F_NEXT 1
#define DESC_F_WRITE 2
#define DESC_F_INDIRECT 4
#define QUEUE_SIZE 256

struct desc {
    u64 addr;
    u32 len;
    u16 flags, next;
};

struct queue {
    struct desc *desc;
    volatile u16 *avail, *used; /* as 16-bit words: flags, idx, ring, event */
    u16 size, added, published, seen;
    volatile void *notify;
    int wide, event_idx; /* a notify is 32 bits; the feature was negotiated */
    u16 index;
    u64 notifies;
};

struct device {
    volatile u8 *common, *config, *notify; /* MMIO: `common` is all of it */
    u32 notify_multiplier;
    int pci;
    u64 features; /* negotiated */
};

void find_device(struct device *device, u32 kind); /* 1 net, 2 block; ends the guest without */
void negotiate(struct device *device, u64 wanted);
void make_queue(struct device *device, struct queue *queue, u16 index, u16 size);
void driver_ok(struct device *device);
u64 config64(struct device *device, u32 offset);

void add(struct queue *queue, u16 head); /* make a chain available; seen after `publish` */
void publish(struct queue *queue);       /* and notify, if the device wants it */

/* Whether a chain came back: its head, and the bytes written. Never asks for an interrupt. */
static inline int take(struct queue *queue, u32 *head, u32 *length)
{
    u16 seen = queue->seen;
    if (queue->used[1] == seen)
        return 0;
    barrier();
    volatile u32 *entry = (volatile u32 *)(queue->used + 2) + 2 * (seen & (queue->size - 1));
    *head = entry[0];
    *length = entry[1];
    queue->seen = seen + 1;
    if (queue->event_idx)
        queue->avail[2 + queue->size] = seen + 0x8000; /* used_event: far away */
    return 1;
}

/* --- blk.c, net.c --- */

void measure_blk(void);
void measure_net(void);

#endif
