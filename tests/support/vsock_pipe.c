/* For guests without a vsock tool: sockets of AF_VSOCK on standard input and output.
 *
 *   vsock-pipe connect CID PORT       standard input to the socket, the socket to standard output
 *   vsock-pipe listen PORT PROGRAM..  PROGRAM for each connection, with it as input and output
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static char buffer[1 << 18];

static void die(const char *what)
{
    fprintf(stderr, "vsock-pipe: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void write_all(int fd, const char *data, ssize_t size)
{
    while (size > 0) {
        ssize_t done = write(fd, data, size);
        if (done < 0)
            die("write");
        data += done;
        size -= done;
    }
}

/* Copies what is there; 0 at the end. */
static int copy(int from, int to)
{
    ssize_t got = read(from, buffer, sizeof buffer);
    if (got < 0)
        die("read");
    write_all(to, buffer, got);
    return got > 0;
}

int main(int argc, char **argv)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK};
    struct timeval patience = {.tv_sec = 60};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

    if (fd < 0)
        die("socket");
    signal(SIGPIPE, SIG_IGN);
    /* An emulated host may be slow to answer; Linux waits for 2 s by itself. */
    setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof patience);
    if (argc == 4 && !strcmp(argv[1], "connect")) {
        struct pollfd fds[2] = {{.fd = 0, .events = POLLIN}, {.fd = fd, .events = POLLIN}};

        address.svm_cid = strtoul(argv[2], NULL, 0);
        address.svm_port = strtoul(argv[3], NULL, 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof address))
            die("connect");
        for (;;) {
            if (poll(fds, 2, -1) < 0)
                die("poll");
            if (fds[0].revents && !copy(0, fd)) {
                fds[0].fd = -1;
                shutdown(fd, SHUT_WR);
            }
            if (fds[1].revents && !copy(fd, 1))
                return 0;
        }
    }
    if (argc < 4 || strcmp(argv[1], "listen"))
        return 2;
    address.svm_cid = VMADDR_CID_ANY;
    address.svm_port = strtoul(argv[2], NULL, 0);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 64))
        die("listen");
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int one = accept(fd, NULL, NULL);
        if (one < 0)
            die("accept");
        if (!fork()) {
            dup2(one, 0);
            dup2(one, 1);
            close(one);
            close(fd);
            signal(SIGPIPE, SIG_DFL);
            execvp(argv[3], argv + 3);
            die(argv[3]);
        }
        close(one);
    }
}
