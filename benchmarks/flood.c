/*
 * The other end of the network rows: sends frames to the bench guest, as many as it asks for.
 *
 *   flood INTERFACE
 *
 * Each frame of type 0x88b5 that comes asks for frames: their count (16 bits) and size (32), big
 * endian. They are TCP segments over IPv4 to the station that asked; those longer than an Ethernet
 * frame go as one, for the receiver to take whole (GSO). Says "ready" when it listens; ends when
 * killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define TYPE_CREDIT 0x88b5
#define HEADERS 54
#define SEGMENT 1448
#define BATCH 256
#define FRAME_MAX 65550

static struct {
	struct virtio_net_hdr header;
	uint8_t bytes[FRAME_MAX];
} frame;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void put16(uint8_t *at, unsigned value)
{
	at[0] = value >> 8;
	at[1] = value;
}

static void prepare(const uint8_t *to, unsigned size)
{
	uint8_t *ip = frame.bytes + 14;
	unsigned sum = 0;

	memset(&frame.header, 0, sizeof frame.header);
	memcpy(frame.bytes, to, 6);
	memcpy(frame.bytes + 6, "\2\0\0\0\0\1", 6);
	put16(frame.bytes + 12, 0x0800);
	memcpy(ip, "\x45\0\0\0\0\0\0\0\x40\6\0\0\12\0\0\1\12\0\0\2", 20);
	put16(ip + 2, size - 14);
	for (int i = 0; i < 20; i += 2)
		sum += ip[i] << 8 | ip[i + 1];
	sum = (sum & 0xffff) + (sum >> 16);
	put16(ip + 10, ~(sum + (sum >> 16)) & 0xffff);
	put16(ip + 20, 2000);
	put16(ip + 22, 1000);
	ip[32] = 0x50;
	ip[33] = 0x10;
	if (size > 1514) {
		frame.header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		frame.header.gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
		frame.header.hdr_len = HEADERS;
		frame.header.gso_size = SEGMENT;
		frame.header.csum_start = 34;
		frame.header.csum_offset = 16;
	}
}

int main(int argc, char **argv)
{
	static struct mmsghdr messages[BATCH];
	struct iovec piece = {&frame, 0};
	struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(TYPE_CREDIT)};
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP)};
	uint8_t asked[sizeof(struct virtio_net_hdr) + 2048], *credit = asked + sizeof frame.header;
	int on = 1, room = 64 << 20;
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);

	if (argc != 2) {
		fprintf(stderr, "usage: flood INTERFACE\n");
		return 2;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	address.sll_ifindex = if_nametoindex(argv[1]);
	if (!address.sll_ifindex)
		die(argv[1]);
	if (fd < 0 || setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof on))
		die("packet socket");
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room))
		die("SO_SNDBUFFORCE");
	if (bind(fd, (struct sockaddr *)&address, sizeof address))
		die("bind");
	to.sll_ifindex = address.sll_ifindex;
	to.sll_halen = 6;
	for (int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_name = &to;
		messages[i].msg_hdr.msg_namelen = sizeof to;
		messages[i].msg_hdr.msg_iov = &piece;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		ssize_t got = recv(fd, asked, sizeof asked, 0);
		if (got < (ssize_t)sizeof frame.header + 20)
			continue;
		unsigned count = credit[14] << 8 | credit[15];
		unsigned size = credit[17] << 16 | credit[18] << 8 | credit[19];
		if (count > BATCH || size < HEADERS || size > FRAME_MAX)
			continue;
		prepare(credit + 6, size);
		piece.iov_len = sizeof frame.header + size;
		for (unsigned sent = 0; sent < count;) {
			int done = sendmmsg(fd, messages + sent, count - sent, 0);
			if (done <= 0)
				break; /* the guest has gone; it asks again if not */
			sent += done;
		}
	}
}
