/* A network card's address: as the host says, or by DHCP (RFC 2131), for a root file system in which
 * nothing else would see to it. IPv4 only: Linux takes IPv6 addresses from routers by itself. */
#include "agent.h"
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>

#define APPEAR_WITHIN 2000 /* milliseconds for an interface */
#define SERVERS 3          /* name servers that resolv.conf takes */
#define FOREVER 0xffffffffu
#define COOKIE 0x63825363u
#define BROADCAST 0x8000
#define CLIENT_PORT 68
#define SERVER_PORT 67
#define BACKGROUND 120 /* seconds for which a server that did not answer is called on */

enum { DISCOVER = 1, OFFER = 2, ASK = 3, ACK = 5, NAK = 6 };
enum {
    MASK = 1, ROUTER = 3, DNS = 6, DOMAIN = 15, MTU = 26, ADDRESS = 50, SECONDS = 51, TYPE = 53,
    SERVER = 54, WANTED = 55, PAD = 0, LAST = 255
};

/* All addresses as they are sent: big-endian. */
struct lease {
    u32 address, mask, router, server, dns[SERVERS];
    u32 seconds;
    u16 mtu;
    char domain[128];
};

struct bootp {
    u8 op, htype, hlen, hops;
    u32 xid;
    u16 secs, flags;
    u32 ciaddr, yiaddr, siaddr, giaddr;
    u8 chaddr[16], sname[64], file[128];
    u32 cookie;
    u8 options[312];
} __attribute__((packed));

struct packet { /* IPv4 without options, and UDP */
    u8 version, tos;
    u16 length, id, fragment;
    u8 ttl, protocol;
    u16 sum;
    u32 from, to;
    u16 source, target, size, check;
    struct bootp bootp;
} __attribute__((packed));

struct card {
    const char *name;
    int control, number, raw, fd; /* an ioctl socket, ifindex; whether `fd` takes whole packets */
    u8 mac[6];
    u32 xid;
};

static int resolv_written;

static u16 swap(u16 value) { return (u16)(value << 8 | value >> 8); }
static u32 swap32(u32 value) { return __builtin_bswap32(value); }

static long now(void)
{
    long time[2];

    SYS2(clock_gettime, 1 /* CLOCK_MONOTONIC */, time);
    return time[0] * 1000 + time[1] / 1000000;
}

static int request_of(const struct card *card, unsigned long what, struct ifreq *request)
{
    join(request->ifr_name, sizeof request->ifr_name, card->name, (char *)0);
    return sys_ioctl(card->control, what, request);
}

/* --- files --- */

static void write_file(const char *path, int flags, const char *text)
{
    int fd = sys_openat(AT_FDCWD, path, O_WRONLY | O_CREAT | flags, 0644);

    if (fd < 0 || write_all(fd, text, strlen(text)))
        say("cannot write", path, fd < 0 ? fd : 0);
    if (fd >= 0)
        sys_close(fd);
}

static void print_address(char text[16], u32 address)
{
    const u8 *part = (const u8 *)&address;
    char digits[4][21];
    const char *word[4];

    for (int n = 0; n < 4; n++)
        word[n] = decimal(digits[n], part[n]);
    join(text, 16, word[0], ".", word[1], ".", word[2], ".", word[3], (char *)0);
}

/* What names are looked up with; often a link into a /run that is another one here. */
static void write_resolv(const struct lease *lease)
{
    char text[512] = "", address[16];
    size_t size = 0;

    if (*lease->domain) {
        join(text, sizeof text, "search ", lease->domain, "\n", (char *)0);
        size = strlen(text);
    }
    for (int n = 0; n < SERVERS && lease->dns[n]; n++) {
        print_address(address, lease->dns[n]);
        join(text + size, sizeof text - size, "nameserver ", address, "\n", (char *)0);
        size += strlen(text + size);
    }
    if (!lease->dns[0])
        return;
    sys_mkdir("/etc", 0755);
    if (!resolv_written)
        SYS3(unlinkat, AT_FDCWD, "/etc/resolv.conf", 0);
    write_file("/etc/resolv.conf", resolv_written ? O_APPEND : O_TRUNC, text);
    resolv_written = 1;
}

static int has_word(const char *text, const char *word)
{
    size_t size = strlen(word);

    for (; *text; text++)
        if (after(text, word) && (!text[size] || text[size] == ' ' || text[size] == '\t' ||
                                     text[size] == '\n'))
            return 1;
    return 0;
}

void name_host(const char *name)
{
    static char text[4096];
    char line[160];
    int fd = sys_open("/etc/hosts", O_RDONLY);
    long size = fd < 0 ? 0 : sys_read(fd, text, sizeof text - 1);

    SYS2(sethostname, name, strlen(name));
    if (fd >= 0)
        sys_close(fd);
    text[size > 0 ? size : 0] = 0;
    if (!sys_exists("/etc") || (has_word(text, name) && has_word(text, "localhost")))
        return;
    join(line, sizeof line, size > 0 && text[size - 1] != '\n' ? "\n" : "",
        has_word(text, "localhost") ? "127.0.1.1\t" : "127.0.0.1\tlocalhost ", name, "\n", (char *)0);
    write_file("/etc/hosts", O_APPEND, line);
}

/* --- the interface --- */

static int set_address(const struct card *card, unsigned long what, u32 address)
{
    struct ifreq request = {0};
    struct sockaddr_in *to = (struct sockaddr_in *)&request.ifr_addr;

    to->sin_family = AF_INET;
    to->sin_addr.s_addr = address;
    return request_of(card, what, &request);
}

static int add_route(const struct card *card, u32 to, u32 gateway)
{
    struct rtentry route = {0};
    struct sockaddr_in *address = (struct sockaddr_in *)&route.rt_dst;

    address->sin_family = AF_INET;
    address->sin_addr.s_addr = to;
    route.rt_genmask.sa_family = AF_INET;
    if (to) {
        ((struct sockaddr_in *)&route.rt_genmask)->sin_addr.s_addr = FOREVER;
        route.rt_flags = RTF_UP | RTF_HOST;
    } else {
        address = (struct sockaddr_in *)&route.rt_gateway;
        address->sin_family = AF_INET;
        address->sin_addr.s_addr = gateway;
        route.rt_flags = RTF_UP | RTF_GATEWAY;
    }
    route.rt_dev = (char *)card->name;
    route.rt_metric = (short)(card->number + 1); /* an earlier card's goes before */
    return sys_ioctl(card->control, 0x890b /* SIOCADDRT */, &route);
}

static void apply(const struct card *card, const struct lease *lease)
{
    int error = set_address(card, 0x8916 /* SIOCSIFADDR */, lease->address);
    struct ifreq request = {0};

    if (!error && lease->mask)
        error = set_address(card, 0x891c /* SIOCSIFNETMASK */, lease->mask);
    if (error)
        say("cannot set the address of", card->name, error);
    if (lease->mtu >= 576) {
        request.ifr_mtu = lease->mtu;
        request_of(card, 0x8922 /* SIOCSIFMTU */, &request);
    }
    if (lease->router) {
        /* A gateway may be outside of the card's network, as at most clouds' and with passt. */
        if ((lease->router & lease->mask) != (lease->address & lease->mask))
            add_route(card, lease->router, 0);
        error = add_route(card, 0, lease->router);
        if (error && error != -EEXIST)
            say("cannot set the gateway of", card->name, error);
    }
    write_resolv(lease);
}

/* Its number and hardware address, once it is there; it is up then. */
static int open_card(struct card *card)
{
    struct ifreq request = {0};
    int error = -ENODEV;

    card->control = (int)SYS3(socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (card->control < 0)
        return card->control;
    for (int waited = 0; error && waited <= APPEAR_WITHIN; waited += 20) {
        if (waited)
            sys_sleep(20);
        error = request_of(card, 0x8933 /* SIOCGIFINDEX */, &request);
    }
    card->number = request.ifr_ifindex;
    if (!error)
        error = request_of(card, 0x8927 /* SIOCGIFHWADDR */, &request);
    memcpy(card->mac, request.ifr_hwaddr.sa_data, sizeof card->mac);
    if (!error)
        error = request_of(card, 0x8913 /* SIOCGIFFLAGS */, &request);
    request.ifr_flags |= IFF_UP;
    return error ? error : request_of(card, 0x8914 /* SIOCSIFFLAGS */, &request);
}

/* --- DHCP --- */

/* Whole packets where the kernel can, which needs no address to send from or to; else UDP. */
static int open_socket(struct card *card)
{
    struct sockaddr_ll link = {.sll_family = AF_PACKET, .sll_protocol = swap(ETH_P_IP),
        .sll_ifindex = card->number};
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = swap(CLIENT_PORT)};
    int one = 1;

    card->raw = 1;
    card->fd = (int)SYS3(socket, AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, swap(ETH_P_IP));
    if (card->fd >= 0)
        return (int)SYS3(bind, card->fd, &link, sizeof link);
    card->raw = 0;
    card->fd = (int)SYS3(socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (card->fd < 0)
        return card->fd;
    SYS5(setsockopt, card->fd, SOL_SOCKET, SO_BROADCAST, &one, sizeof one);
    SYS5(setsockopt, card->fd, SOL_SOCKET, SO_BINDTODEVICE, card->name, strlen(card->name) + 1);
    return (int)SYS3(bind, card->fd, &any, sizeof any);
}

static u16 checksum(const void *data, size_t size)
{
    const u8 *byte = data;
    u32 sum = 0;

    for (size_t n = 0; n + 1 < size; n += 2)
        sum += (u32)byte[n] << 8 | byte[n + 1];
    if (size & 1)
        sum += (u32)byte[size - 1] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return swap((u16)~sum);
}

static u8 *option(u8 *at, u8 code, const void *data, u8 size)
{
    *at++ = code;
    *at++ = size;
    memcpy(at, data, size);
    return at + size;
}

static void send_message(struct card *card, u8 type, const struct lease *lease)
{
    static const u8 wanted[] = {MASK, ROUTER, DNS, DOMAIN, MTU, SECONDS};
    static struct packet packet;
    struct bootp *bootp = &packet.bootp;
    u8 *at = bootp->options;

    memset(&packet, 0, sizeof packet);
    bootp->op = bootp->htype = 1;
    bootp->hlen = sizeof card->mac;
    bootp->xid = card->xid;
    bootp->flags = swap(BROADCAST);
    memcpy(bootp->chaddr, card->mac, sizeof card->mac);
    bootp->cookie = swap32(COOKIE);
    at = option(at, TYPE, &type, 1);
    if (type == ASK) {
        at = option(at, ADDRESS, &lease->address, 4);
        at = option(at, SERVER, &lease->server, 4);
    }
    at = option(at, WANTED, wanted, sizeof wanted);
    *at = LAST;
    if (card->raw) {
        struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = swap(ETH_P_IP),
            .sll_ifindex = card->number, .sll_halen = 6};
        memset(to.sll_addr, 0xff, 6);
        packet.version = 0x45;
        packet.length = swap(sizeof packet);
        packet.ttl = 64;
        packet.protocol = IPPROTO_UDP;
        packet.to = FOREVER;
        packet.sum = checksum(&packet, 20);
        packet.source = swap(CLIENT_PORT);
        packet.target = swap(SERVER_PORT);
        packet.size = swap(sizeof packet - 20); /* no checksum: IPv4's UDP may do without */
        sys6(__NR_sendto, card->fd, (long)&packet, sizeof packet, 0, (long)&to, sizeof to);
    } else {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = swap(SERVER_PORT),
            .sin_addr = {FOREVER}};
        sys6(__NR_sendto, card->fd, (long)bootp, sizeof *bootp, 0, (long)&to, sizeof to);
    }
}

/* The message in what was received: its type, or 0 where it is none for this card. */
static u8 understand_message(const struct card *card, char *data, size_t size, struct lease *lease)
{
    u8 type = 0;

    if (card->raw) {
        size_t head = size ? (size_t)(data[0] & 15) * 4 : 0;
        if (head < 20 || size < head + 8 || data[9] != IPPROTO_UDP || data[head + 2] != 0 ||
            data[head + 3] != CLIENT_PORT)
            return 0;
        data += head + 8;
        size -= head + 8;
    }
    struct bootp *bootp = (struct bootp *)data;
    size_t fixed = sizeof *bootp - sizeof bootp->options, at = 0;
    if (size <= fixed || bootp->op != 2 || bootp->xid != card->xid ||
        bootp->cookie != swap32(COOKIE) || memcmp(bootp->chaddr, card->mac, sizeof card->mac) != 0)
        return 0;
    size -= fixed;
    memset(lease, 0, sizeof *lease);
    lease->address = bootp->yiaddr;
    lease->seconds = FOREVER;
    while (at < size && bootp->options[at] != LAST) {
        u8 code = bootp->options[at++], length;
        const u8 *value;
        if (code == PAD)
            continue;
        if (at >= size)
            break;
        length = bootp->options[at++];
        if (length > size - at)
            break;
        value = bootp->options + at;
        at += length;
        if (code == TYPE && length == 1)
            type = *value;
        else if (code == MASK && length == 4)
            memcpy(&lease->mask, value, 4);
        else if (code == ROUTER && length >= 4)
            memcpy(&lease->router, value, 4);
        else if (code == SERVER && length == 4)
            memcpy(&lease->server, value, 4);
        else if (code == DNS)
            memcpy(lease->dns, value, length < sizeof lease->dns ? length & ~3u : sizeof lease->dns);
        else if (code == SECONDS && length == 4) {
            memcpy(&lease->seconds, value, 4);
            lease->seconds = swap32(lease->seconds);
        } else if (code == MTU && length == 2) {
            memcpy(&lease->mtu, value, 2);
            lease->mtu = swap(lease->mtu);
        } else if (code == DOMAIN && length < sizeof lease->domain) {
            memcpy(lease->domain, value, length);
            for (u8 n = 0; n < length; n++) /* a line of resolv.conf is made of it */
                if (lease->domain[n] <= ' ' || lease->domain[n] > '~')
                    lease->domain[n] = 0;
        }
    }
    return type;
}

/* The type of the next message for this card within so many milliseconds; 0 without one. */
static u8 receive_message(struct card *card, long limit, struct lease *lease)
{
    static char data[2048];
    long until = now() + limit, left;

    while ((left = until - now()) > 0) {
        struct pollfd ready = {card->fd, POLLIN, 0};
        if (sys_poll(&ready, 1, (int)left) <= 0)
            continue;
        long got = sys_read(card->fd, data, sizeof data);
        u8 type = got > 0 ? understand_message(card, data, (size_t)got, lease) : 0;
        if (type)
            return type;
    }
    return 0;
}

/* One round: an offer within `limit` milliseconds, and the lease of it. */
static int negotiate(struct card *card, long limit, struct lease *lease)
{
    struct lease offer;
    u8 type;

    card->xid = (u32)now() ^ ((u32)card->mac[5] << 24 | (u32)card->mac[4] << 16);
    send_message(card, DISCOVER, 0);
    do
        type = receive_message(card, limit, &offer);
    while (type && type != OFFER);
    if (!type)
        return -EAGAIN;
    send_message(card, ASK, &offer);
    do
        type = receive_message(card, limit, lease);
    while (type && type != ACK && type != NAK);
    if (type != ACK || !lease->address)
        return -EAGAIN;
    apply(card, lease);
    return 0;
}

/* In a process of its own: call on where nobody answers, and renew what does not last for ever. */
static _Noreturn void keep(struct card *card, struct lease *lease, int error)
{
    long until = now() + BACKGROUND * 1000L;

    sys_setsid();
    while (error && now() < until)
        error = negotiate(card, 5000, lease);
    while (!error && lease->seconds != FOREVER) {
        sys_sleep((lease->seconds < 60 ? 30 : lease->seconds / 2) * 1000L);
        for (error = -EAGAIN, until = now() + 3600 * 1000L; error && now() < until;)
            error = negotiate(card, 5000, lease);
    }
    sys_exit(0);
}

static void by_dhcp(struct card *card, int stays)
{
    static const int limits[] = {500, 1000, 2000};
    struct lease lease;
    int opened = open_socket(card), error = opened ? opened : -EAGAIN;

    for (size_t n = 0; !opened && error && n < sizeof limits / sizeof *limits; n++)
        error = negotiate(card, limits[n], &lease);
    if (error)
        say("no address by DHCP for", card->name, opened);
    if (stays && !opened && (error == -EAGAIN || (!error && lease.seconds != FOREVER)) && !sys_fork())
        keep(card, &lease, error);
    sys_close(card->fd);
}

/* --- what is asked for --- */

static char *word(char **rest)
{
    char *begin = *rest;

    while (**rest && **rest != ' ')
        ++*rest;
    if (**rest)
        *(*rest)++ = 0;
    return begin;
}

/* Dotted digits; 0 for anything else. */
static u32 parse_address(const char *text)
{
    u8 part[4] = {0};
    int n = 0;
    u32 value;

    for (; *text; text++) {
        if (*text == '.')
            n++;
        else
            part[n & 3] = (u8)(part[n & 3] * 10 + (*text - '0'));
    }
    memcpy(&value, part, sizeof value);
    return n == 3 ? value : 0;
}

/* NAME dhcp, or NAME static ADDRESS BITS GATEWAY|- [DNS ...] */
void bring_up(char *line, int stays)
{
    struct card card = {.name = word(&line), .fd = -1};
    struct lease lease = {0};
    const char *how = word(&line);
    int error = open_card(&card);

    if (error) {
        say("the network card does not come up:", card.name, error);
    } else if (!strcmp(how, "dhcp")) {
        by_dhcp(&card, stays);
    } else if (!strcmp(how, "static")) {
        lease.address = parse_address(word(&line));
        int bits = number(word(&line));
        lease.mask = bits > 0 ? swap32(FOREVER << (32 - bits)) : 0;
        lease.router = parse_address(word(&line));
        for (int n = 0; n < SERVERS && *line; n++)
            lease.dns[n] = parse_address(word(&line));
        apply(&card, &lease);
    }
    if (card.control >= 0)
        sys_close(card.control);
}
