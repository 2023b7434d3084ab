/* What Python and C share; read by cffi too, so: declarations only, no preprocessor.
 *
 * Every function is called with the lock of the queue's slot held and without the GIL. It does what
 * is plain and leaves the rest, whatever is wrong or takes long, to Python: it then returns with
 * that chain next in the ring, nothing of it done. */

struct vmm_region {
	uint64_t gpa, size;
	uint8_t *host;
};

struct vmm_ring {
	/* A split virtqueue (virtio 1.2, section 2.7), checked to be in guest memory. */
	uint8_t *desc;
	uint16_t *avail, *used;
	uint32_t size;
	uint8_t indirect, event_idx;
	uint32_t regions;
	struct vmm_region region[2];
	/* As in SplitQueue, which has them between two calls. */
	uint16_t last_avail, next_used, published;
	/* Bounded polling: nanoseconds now, at most, and when it was last found empty. */
	uint64_t poll, poll_max, idle_since;
};

struct vmm_disk {
	int fd;
	int readable, writable; /* reads that the page cache holds; buffered writes */
	uint64_t capacity;      /* sectors of 512 bytes */
	uint8_t id[20];
};

struct vmm_net {
	int fd;
	int mergeable, checksums;               /* as in Nic */
	int promiscuous, unicast;   /* as in Filter; unicast: to `mac` */
	uint32_t usual;                         /* bytes of lately received frames */
	uint8_t mac[6];
	int64_t spill_size, held; /* a frame of `held` bytes is in `spill` for Python */
	uint8_t *spill;
	uint64_t dropped;
};

/* What is next; with VMM_INTERRUPT the driver wants one. */
enum {
	VMM_IDLE = 0,  /* a notify will come */
	VMM_MORE = 1,  /* call again */
	VMM_OTHER = 2, /* the next chain is for Python */
	VMM_WAIT = 3,  /* nothing is there, and no notify will come of it */
	VMM_HELD = 4,  /* a frame is in `spill` */
	VMM_INTERRUPT = 16,
	VMM_RECEIVED = 8, /* bits to the left: the same of the receive queue */
};

int vmm_sizes(void);
int vmm_disk_serve(struct vmm_ring *ring, const struct vmm_disk *disk);
int vmm_net_serve(struct vmm_ring *tx, struct vmm_ring *rx, struct vmm_net *net); /* NULL: not that */
