/* One connection: a request, then frames between the host and a command's standard streams.
 *
 * Each stream has a window, so a reader that is slow holds up its stream and nothing else, and
 * what is kept here is bounded. The command stays unreaped until the end: its process group's
 * number cannot become another's while the host may signal it. */
#include "agent.h"

#define ROOM (2 * (CHUNK + sizeof(struct frame)))
#define RESERVE 4096 /* for frames without data, of which few can be under way */

static int host, child, signals, is_command;
static int fds[STREAMS];
static u32 window[STREAMS];
static int exited;

static char input[CHUNK + sizeof(struct frame) + 4096]; /* from the host, not yet understood */
static size_t input_size;
static char ring[WINDOW]; /* for the command's standard input */
static size_t ring_at, ring_size;
static u32 taken; /* of it, not yet told */
static int input_ended, is_terminal;
static char output[ROOM + RESERVE]; /* for the host */
static size_t output_at, output_size;
static char words[REQUEST_MAX];
static char *pointers[WORDS_MAX + 2 + USUAL_MAX];

/* Not every init of a guest takes what its orphans leave. */
static void reap(void)
{
    if (child > 0)
        SYS4(wait4, child, 0, WNOHANG, 0);
}

/* The host has gone, or talks nonsense. */
static _Noreturn void lost(void)
{
    if (child > 0 && !exited) {
        sys_kill(-child, is_command ? SIGHUP : SIGKILL);
        sys_kill(-child, SIGCONT);
    }
    reap();
    sys_exit(1);
}

static void put(u8 type, u8 stream, const void *data, u32 size)
{
    struct frame frame = {type, stream, 0, size};
    char *at = output + output_at + output_size;

    if (output_at + output_size + sizeof frame + size > sizeof output)
        lost();
    memcpy(at, &frame, sizeof frame);
    memcpy(at + sizeof frame, data, size);
    output_size += sizeof frame + size;
}

static void flush(void)
{
    while (output_size) {
        long done = sys_write(host, output + output_at, output_size);
        if (done == -EAGAIN || done == -EINTR)
            return;
        if (done < 0) /* it has hung up, and may have said more before: `hear` comes to the end */
            done = (long)output_size;
        output_at += (size_t)done;
        output_size -= (size_t)done;
    }
    output_at = 0;
}

static void close_stream(int stream)
{
    if (fds[stream] >= 0)
        sys_close(fds[stream]);
    fds[stream] = -1;
}

/* --- the command's standard input --- */

static void feed(void)
{
    while (fds[IN] >= 0 && ring_size) {
        size_t part = sizeof ring - ring_at;
        long done = sys_write(fds[IN], ring + ring_at, part < ring_size ? part : ring_size);
        if (done == -EAGAIN || done == -EINTR)
            return;
        if (done < 0) {
            close_stream(IN);
            put(END, IN, 0, 0);
            return;
        }
        ring_at = (ring_at + (size_t)done) % sizeof ring;
        ring_size -= (size_t)done;
        taken += (u32)done;
    }
    if (fds[IN] >= 0 && input_ended) {
        /* A terminal has no other way to say it (VEOF, as it is set at first). */
        if (!is_terminal || sys_write(fds[IN], "\4", 1) != -EAGAIN)
            close_stream(IN);
    }
    if (taken >= CREDIT_AFTER) {
        put(CREDIT, IN, &taken, sizeof taken);
        taken = 0;
    }
}

static void fill(const char *data, size_t size)
{
    if (fds[IN] < 0)
        return; /* the host was told */
    if (size > sizeof ring - ring_size || input_ended)
        lost();
    while (size) {
        size_t at = (ring_at + ring_size) % sizeof ring, part = sizeof ring - at;
        if (part > size)
            part = size;
        memcpy(ring + at, data, part);
        ring_size += part;
        data += part;
        size -= part;
    }
}

/* --- the command's output --- */

static int has_room(void)
{
    return output_at + output_size + sizeof(struct frame) + CHUNK + RESERVE <= sizeof output;
}

static void drain(int stream)
{
    struct frame frame = {DATA, (u8)stream, 0, 0};
    char *at = output + output_at + output_size;
    u32 most = window[stream] < CHUNK ? window[stream] : CHUNK;
    long got;

    if (!has_room() || !most)
        return;
    got = sys_read(fds[stream], at + sizeof frame, most);
    if (got == -EAGAIN || got == -EINTR)
        return;
    if (got <= 0) { /* a terminal's other end gone is EIO */
        close_stream(stream);
        put(END, (u8)stream, 0, 0);
        return;
    }
    frame.size = (u32)got;
    memcpy(at, &frame, sizeof frame);
    output_size += sizeof frame + (size_t)got;
    window[stream] -= (u32)got;
}

static void look_at_child(void)
{
    siginfo_t found;
    struct signalfd_siginfo info;
    u32 status[2] = {0, 0};

    while (sys_read(signals, &info, sizeof info) > 0)
        ;
    found.si_pid = 0;
    if (exited || SYS5(waitid, P_PID, child, &found, WEXITED | WNOHANG | WNOWAIT, 0) < 0 ||
        !found.si_pid)
        return;
    exited = 1;
    status[found.si_code == CLD_EXITED ? 0 : 1] = (u32)found.si_status;
    put(EXITED, 0, status, sizeof status);
}

/* --- frames from the host --- */

static void understand(const struct frame *frame, const char *data)
{
    u32 value = 0;

    if (frame->type != DATA && frame->size <= sizeof value)
        memcpy(&value, data, frame->size);
    switch (frame->type) {
    case DATA:
        if (frame->stream != IN)
            lost();
        fill(data, frame->size);
        break;
    case END:
        if (frame->stream > ERR)
            lost();
        if (frame->stream == IN)
            input_ended = 1;
        else
            close_stream(frame->stream);
        break;
    case CREDIT:
        if ((frame->stream != OUT && frame->stream != ERR) || frame->size != sizeof value ||
            value > WINDOW - window[frame->stream])
            lost();
        window[frame->stream] += value;
        break;
    case SIGNAL:
        if (frame->size != sizeof value || !value || value > 64)
            lost();
        /* A group may outlive the process it began with. */
        if (child > 0 && (!exited || frame->stream))
            sys_kill(frame->stream ? -child : child, (int)value);
        break;
    case RESIZE:
        if (frame->size != sizeof value)
            lost();
        if (is_terminal && fds[OUT] >= 0) {
            struct winsize size = {(u16)value, (u16)(value >> 16), 0, 0};
            sys_ioctl(fds[OUT], TIOCSWINSZ, &size);
        }
        break;
    default:
        lost();
    }
}

static void hear(void)
{
    size_t at = 0;
    long got = sys_read(host, input + input_size, sizeof input - input_size);

    if (got == -EAGAIN || got == -EINTR)
        return;
    if (got <= 0)
        lost();
    input_size += (size_t)got;
    while (input_size - at >= sizeof(struct frame)) {
        struct frame frame;
        memcpy(&frame, input + at, sizeof frame);
        if (frame.size > CHUNK)
            lost();
        if (input_size - at - sizeof frame < frame.size)
            break;
        understand(&frame, input + at + sizeof frame);
        at += sizeof frame + frame.size;
    }
    input_size -= at;
    memmove(input, input + at, input_size);
}

/* --- the request --- */

/* The next string of `left` bytes at `at`, or the end of everything. */
static char *word(char **at, size_t *left)
{
    char *text = *at;

    for (; *left; (*left)--, (*at)++)
        if (!**at) {
            (*left)--;
            (*at)++;
            return text;
        }
    lost();
}

static void read_request(struct command *command)
{
    struct frame frame;
    static struct request request;
    char *at = words, **next = pointers;
    size_t left;

    if (read_all(host, &frame, sizeof frame) || frame.type != REQUEST ||
        frame.size < sizeof request || frame.size - sizeof request > sizeof words ||
        read_all(host, &request, sizeof request))
        lost();
    left = frame.size - sizeof request;
    if (read_all(host, words, left) || request.magic != MAGIC || request.version != VERSION ||
        !request.argc || request.argc > WORDS_MAX || request.envc > WORDS_MAX - request.argc)
        lost();
    command->request = &request;
    command->directory = word(&at, &left);
    command->user = request.flags & USER ? word(&at, &left) : 0;
    command->argv = next;
    for (u32 count = request.argc; count; count--)
        *next++ = word(&at, &left);
    *next++ = 0;
    command->envp = next;
    for (u32 count = request.envc; count; count--)
        *next++ = word(&at, &left);
    *next = 0;
}

/* What the power button does in a guest whose init is the agent's. */
static void power_off(void)
{
    SYS1(sync, 0);
    SYS4(reboot, 0xfee1dead, 672274793, 0x4321fedc, 0);
}

static void start(int in_guest)
{
    struct command command;
    u32 failed[2], pid;
    u64 mask = 1ull << (SIGCHLD - 1);

    read_request(&command);
    command.in_guest = in_guest;
    if (command.request->kind == POWER_OFF) {
        if (in_guest)
            power_off();
        lost();
    }
    is_command = command.request->kind == EXECUTE;
    is_terminal = is_command && command.request->flags & TERMINAL;
    sys_signal(SIGCHLD, SIG_DFL);
    sys_signal(SIGPIPE, SIG_IGN);
    sys_block_signals(mask);
    signals = (int)SYS4(signalfd4, -1, &mask, 8, SFD_CLOEXEC | SFD_NONBLOCK);
    child = spawn(&command, fds, &failed[1]);
    if (signals < 0 || child < 0) {
        failed[0] = (u32)-(child < 0 ? child : signals);
        put(FAILED, 0, failed, sizeof failed);
    } else {
        pid = (u32)child;
        put(STARTED, 0, &pid, sizeof pid);
    }
    sys_fcntl(host, F_SETFL, O_RDWR | O_NONBLOCK);
    for (int stream = IN; stream <= ERR; stream++)
        if (fds[stream] >= 0)
            sys_fcntl(fds[stream], F_SETFL, (stream == IN ? O_WRONLY : O_RDONLY) | O_NONBLOCK);
}

_Noreturn void session(int connection, int root)
{
    host = connection;
    for (int stream = IN; stream <= ERR; stream++) {
        fds[stream] = -1;
        window[stream] = WINDOW;
    }
    if (root >= 0 && (sys_fchdir(root) < 0 || sys_chroot(".") < 0))
        say("cannot enter the root file system", 0, 0);
    start(root >= 0);
    for (;;) {
        flush(); /* first: it makes room */
        struct pollfd ready[] = {
            {host, POLLIN, 0},
            {exited || child < 0 ? -1 : signals, POLLIN, 0},
            {fds[IN], ring_size ? POLLOUT : 0, 0},
            {window[OUT] && has_room() ? fds[OUT] : -1, POLLIN, 0},
            {window[ERR] && has_room() ? fds[ERR] : -1, POLLIN, 0},
        };
        if (output_size)
            ready[0].events |= POLLOUT;
        else if (exited && fds[OUT] < 0 && fds[ERR] < 0)
            close_stream(IN); /* all is said; the host hangs up */
        if (sys_poll(ready, 5, -1) < 0)
            continue;
        if (ready[0].revents & ~POLLOUT)
            hear();
        if (ready[2].revents & POLLERR && fds[IN] >= 0 && !ring_size) {
            close_stream(IN);
            put(END, IN, 0, 0);
        }
        feed();
        if (ready[3].revents && fds[OUT] >= 0)
            drain(OUT);
        if (ready[4].revents && fds[ERR] >= 0)
            drain(ERR);
        if (ready[1].revents)
            look_at_child();
    }
}
