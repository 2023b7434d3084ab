/* Bulk data both ways over a stream socket, checked byte for byte: for soaks, on guests and hosts.
 *
 *   soak-stream FIGURES MIB PATIENCE connect|listen tcp ADDRESS PORT
 *   soak-stream FIGURES MIB PATIENCE connect|listen vsock CID PORT
 *   soak-stream FIGURES MIB PATIENCE connect|listen unix PATH
 *
 * One connection follows the other, without an end, a second later. On each, both sides send MIB mebibytes that
 * follow from a seed, which are the first eight of the bytes sent, and compare what comes. The file
 * FIGURES always has one line: bytes found right, connections done, connections cut short (or
 * without a byte for PATIENCE seconds), and those on which a wrong byte came. SIGUSR1 has the next
 * byte sent be a wrong one.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

enum { CHUNK = 1 << 16, LINE = 80 };

struct stream {
    uint64_t seed, at;
    unsigned char chunk[CHUNK]; /* what is at `at`, rounded down to a whole chunk */
};

static struct stream out, in;
static unsigned char came[CHUNK];
static unsigned long long good, done, cut, bad;
static volatile sig_atomic_t spoil;
static int figures;

static void die(const char *what)
{
    fprintf(stderr, "soak-stream: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void spoils(int number)
{
    (void)number;
    spoil = 1;
}

static void tell(void)
{
    char line[LINE + 1];

    snprintf(line, sizeof line, "%19llu %19llu %18llu %18llu\n", good, done, cut, bad);
    if (pwrite(figures, line, strlen(line), 0) < 0)
        die("figures");
}

/* The bytes of the stream from `at` on, to the end of the chunk. */
static unsigned char *next(struct stream *s, size_t *size)
{
    size_t offset = s->at % CHUNK;

    if (!offset)
        for (uint64_t i = 0; i < CHUNK / 8; i++) {
            uint64_t word = s->seed + (s->at / 8 + i) * 0x9e3779b97f4a7c15;
            word = (word ^ word >> 29) * 0xbf58476d1ce4e5b9;
            word = s->at || i ? word ^ word >> 32 : s->seed;
            memcpy(s->chunk + 8 * i, &word, 8);
        }
    *size = CHUNK - offset;
    return s->chunk + offset;
}

/* One end of a connection, to its end. */
static void talk(int fd, uint64_t total, int patience)
{
    uint64_t seed = 0, told = good;
    struct timeval last = {.tv_sec = patience};

    out.at = in.at = 0;
    while (out.at < total || in.at < total) {
        struct pollfd one = {.fd = fd, .events = POLLIN | (out.at < total ? POLLOUT : 0)};

        if (poll(&one, 1, patience * 1000) <= 0)
            goto short_of;
        if (out.at < total && one.revents & POLLOUT) {
            size_t size;
            unsigned char *data = next(&out, &size);
            unsigned char flip;
            ssize_t sent;

            flip = spoil;
            *data ^= flip;
            sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
            *data ^= flip;
            if (sent > 0) {
                out.at += sent;
                if (flip)
                    spoil = 0;
            } else if (errno != EAGAIN)
                goto short_of;
        }
        if (one.revents & (POLLIN | POLLHUP | POLLERR)) {
            size_t size, want = 8 - in.at; /* the seed first */
            unsigned char *data = NULL;
            ssize_t got;

            if (in.at >= 8)
                data = next(&in, &want);
            got = recv(fd, came, want < CHUNK ? want : CHUNK, MSG_DONTWAIT);
            if (got < 0 && errno == EAGAIN)
                continue;
            if (got <= 0)
                goto short_of;
            if (in.at < 8) {
                memcpy((char *)&seed + in.at, came, got);
                in.at += got;
                if (in.at == 8) {
                    in.seed = seed;
                    in.at = 0;
                    next(&in, &size); /* fills the chunk */
                    in.at = 8;
                }
                continue;
            }
            if (!data || memcmp(data, came, got)) {
                bad++;
                tell();
                close(fd);
                return;
            }
            in.at += got;
            good += got;
            if (good - told >= 1 << 20) {
                told = good;
                tell();
            }
        }
    }
    /* All was sent: wait until the other end has it all too, which it shows by closing. */
    shutdown(fd, SHUT_WR);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &last, sizeof last);
    if (recv(fd, came, 1, 0) != 0)
        goto short_of;
    done++;
    tell();
    close(fd);
    return;
short_of:
    cut++;
    tell();
    close(fd);
}

int main(int argc, char **argv)
{
    union {
        struct sockaddr any;
        struct sockaddr_in tcp;
        struct sockaddr_vm vsock;
        struct sockaddr_un path;
    } address = {0};
    struct sigaction action = {.sa_handler = spoils, .sa_flags = SA_RESTART};
    socklen_t size;
    int listener = -1, listens, patience;
    uint64_t total;

    if (argc < 7)
        return 2;
    figures = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (figures < 0)
        die(argv[1]);
    total = strtoull(argv[2], NULL, 0) << 20;
    patience = atoi(argv[3]);
    listens = !strcmp(argv[4], "listen");
    if (!strcmp(argv[5], "unix")) {
        address.path.sun_family = AF_UNIX;
        strncpy(address.path.sun_path, argv[6], sizeof address.path.sun_path - 1);
        size = sizeof address.path;
    } else if (argc < 8) {
        return 2;
    } else if (!strcmp(argv[5], "vsock")) {
        address.vsock.svm_family = AF_VSOCK;
        address.vsock.svm_cid = listens ? VMADDR_CID_ANY : strtoul(argv[6], NULL, 0);
        address.vsock.svm_port = strtoul(argv[7], NULL, 0);
        size = sizeof address.vsock;
    } else {
        address.tcp.sin_family = AF_INET;
        inet_pton(AF_INET, argv[6], &address.tcp.sin_addr);
        address.tcp.sin_port = htons(atoi(argv[7]));
        size = sizeof address.tcp;
    }
    sigaction(SIGUSR1, &action, NULL);
    tell();
    if (listens) {
        listener = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
        if (listener < 0 || bind(listener, &address.any, size) || listen(listener, 4))
            die("listen");
    }
    for (;;) {
        struct timespec now;
        int fd;

        /* Before the connection is made: a guest that goes back to a moment within it must send
         * what it has sent. */
        clock_gettime(CLOCK_REALTIME, &now);
        out.seed = now.tv_nsec * 0x9e3779b97f4a7c15 ^ now.tv_sec ^ (uint64_t)getpid() << 40;
        if (listens) {
            fd = accept(listener, NULL, NULL);
        } else {
            fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (fd >= 0 && connect(fd, &address.any, size)) {
                close(fd);
                fd = -1;
            }
        }
        if (fd >= 0)
            talk(fd, total, patience);
        if (!listens)
            sleep(1); /* the processors are others' too */
    }
}
