/* The daemon: tells the host that it is there, takes its connections, a process for each. */
#include "agent.h"

#define HOST VMADDR_CID_HOST
#define RETRY 100 /* milliseconds between calls of a host that does not answer */

static int proc = -1; /* a /proc, whatever file systems come and go */

/* Process 1's root, which is not ours any more after a switch_root. */
static int current_root(void)
{
    return proc < 0 ? -1 : sys_openat(proc, "1/root", O_PATH | O_DIRECTORY, 0);
}

/* The daemon is not to be killed for want of memory; what it runs is, as anything else. */
static void set_oom_score(const char *score)
{
    int fd = proc < 0 ? -1 : sys_openat(proc, "self/oom_score_adj", O_WRONLY, 0);

    if (fd < 0)
        return;
    write_all(fd, score, strlen(score));
    sys_close(fd);
}

static void serve(int connection, int listener, int hello)
{
    if (sys_fork())
        return;
    set_oom_score("0");
    sys_close(listener);
    if (hello >= 0)
        sys_close(hello);
    session(connection, current_root());
}

static int vsock(u32 cid, u32 port, u32 peer)
{
    struct sockaddr_vm address = {0};
    int fd = (int)SYS3(socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0), error;

    if (fd < 0)
        return fd;
    address.svm_family = AF_VSOCK;
    address.svm_cid = VMADDR_CID_ANY;
    address.svm_port = port;
    error = (int)SYS3(bind, fd, &address, sizeof address);
    if (!error && peer) {
        address.svm_cid = cid;
        address.svm_port = peer;
        error = (int)SYS3(connect, fd, &address, sizeof address);
    } else if (!error) {
        error = (int)SYS2(listen, fd, 128);
    }
    if (error) {
        sys_close(fd);
        return error;
    }
    return fd;
}

/* Call the host; the connection stays, and its end tells either that the other is gone. */
static int call_host(void)
{
    struct hello hello = {MAGIC, VERSION, 0};
    int fd = vsock(HOST, HELLO_PORT, PORT);

    if (fd >= 0 && write_all(fd, &hello, sizeof hello)) {
        sys_close(fd);
        return -EIO;
    }
    return fd;
}

static void quiet_streams(void)
{
    int fd = sys_open("/.vmm/null", O_RDWR);

    if (fd < 0)
        fd = sys_open("/dev/null", O_RDWR);
    for (int stream = 0; fd >= 0 && stream <= 2; stream++)
        sys_dup2(fd, stream);
    if (fd > 2)
        sys_close(fd);
}

/* Take the host's seed from the hello connection into the kernel's random number generator; less
 * than 0 once the connection has ended. */
static int reseed(int hello, int device)
{
    struct {
        int entropy_count, buf_size; /* bits, bytes: struct rand_pool_info of <linux/random.h> */
        char buf[SEED];
    } seed = {0};
    long size = sys_read(hello, seed.buf, sizeof seed.buf);

    if (size <= 0)
        return -1;
    seed.buf_size = (int)size;
    seed.entropy_count = (int)size * 8;
    if (device >= 0 && !sys_ioctl(device, 0x40085203 /* RNDADDENTROPY */, &seed))
        sys_ioctl(device, 0x5207 /* RNDRESEEDCRNG, since Linux 4.17 */, 0);
    return 0;
}

static int open_random(void)
{
    int fd = sys_open("/dev/random", O_RDWR | O_CLOEXEC);

    return fd >= 0 ? fd : sys_open("/.vmm/random", O_RDWR | O_CLOEXEC);
}

_Noreturn void daemon(int inherited)
{
    int listener = vsock(0, PORT, 0), hello = -1, random = open_random(), fd;

    if (listener < 0) {
        say("cannot listen on a vsock; the kernel needs CONFIG_VSOCKETS and "
            "CONFIG_VIRTIO_VSOCKETS, or their modules",
            0, listener);
        sys_exit(1);
    }
    sys_setsid();
    proc = inherited;
    if (proc >= 0)
        sys_fcntl(proc, F_SETFD, FD_CLOEXEC);
    set_oom_score("-1000");
    quiet_streams();
    sys_signal(SIGCHLD, SIG_IGN); /* nobody is waited for */
    sys_signal(SIGPIPE, SIG_IGN);
    sys_signal(SIGHUP, SIG_IGN);
    for (;;) {
        if (hello < 0)
            hello = call_host();
        struct pollfd ready[] = {{listener, POLLIN, 0}, {hello, POLLIN, 0}};
        if (sys_poll(ready, 2, hello < 0 ? RETRY : -1) <= 0)
            continue;
        /* Before the connections: what they run is to draw new numbers. */
        if (ready[1].revents) {
            if (random < 0)
                random = open_random();
            if (reseed(hello, random) < 0) {
                sys_close(hello);
                hello = -1;
                sys_sleep(1);
            }
        }
        if (ready[0].revents & POLLIN) {
            struct sockaddr_vm peer = {0};
            int size = sizeof peer;
            fd = (int)SYS4(accept4, listener, &peer, &size, SOCK_CLOEXEC);
            if (fd >= 0) {
                if (peer.svm_cid == HOST)
                    serve(fd, listener, hello);
                sys_close(fd);
            }
        }
    }
}

_Noreturn void listen_on(int listener)
{
    quiet_streams();
    sys_fcntl(listener, F_SETFD, FD_CLOEXEC);
    sys_signal(SIGCHLD, SIG_IGN);
    sys_signal(SIGPIPE, SIG_IGN);
    for (;;) {
        int fd = (int)SYS4(accept4, listener, 0, 0, SOCK_CLOEXEC);
        if (fd < 0 && fd != -EINTR && fd != -ECONNABORTED)
            sys_exit(1);
        if (fd >= 0) {
            serve(fd, listener, -1);
            sys_close(fd);
        }
    }
}
