/* Linux system calls without a C library: the agent must run in any root file system, and small
 * programs fork quickly. x86-64 only. Every call gives a negative errno where it fails. */
#ifndef VMM_AGENT_SYS_H
#define VMM_AGENT_SYS_H

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>

/* Numbers that an older libc's headers lack. */
#ifndef AT_EMPTY_PATH
#define AT_EMPTY_PATH 0x1000
#endif
#ifndef O_PATH
#define O_PATH 010000000
#endif
#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441
#endif
#ifndef TIOCSPTLCK
#define TIOCSPTLCK 0x40045431
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

static inline long sys6(long number, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define SYS1(n, a) sys6(__NR_##n, (long)(a), 0, 0, 0, 0, 0)
#define SYS2(n, a, b) sys6(__NR_##n, (long)(a), (long)(b), 0, 0, 0, 0)
#define SYS3(n, a, b, c) sys6(__NR_##n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define SYS4(n, a, b, c, d) sys6(__NR_##n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define SYS5(n, a, b, c, d, e)                                                                     \
    sys6(__NR_##n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)

static inline long sys_read(int fd, void *data, size_t size) { return SYS3(read, fd, data, size); }
static inline long sys_write(int fd, const void *data, size_t size)
{
    return SYS3(write, fd, data, size);
}
static inline int sys_openat(int dir, const char *path, int flags, int mode)
{
    return (int)SYS4(openat, dir, path, flags | O_CLOEXEC, mode);
}
static inline int sys_open(const char *path, int flags)
{
    return sys_openat(AT_FDCWD, path, flags, 0);
}
static inline int sys_close(int fd) { return (int)SYS1(close, fd); }
static inline int sys_poll(struct pollfd *fds, int count, int milliseconds)
{
    return (int)SYS3(poll, fds, count, milliseconds);
}
static inline int sys_pipe(int fds[2], int flags) { return (int)SYS2(pipe2, fds, flags); }
static inline int sys_dup2(int from, int to) { return (int)SYS2(dup2, from, to); }
static inline int sys_fork(void) { return (int)SYS1(fork, 0); }
static inline int sys_kill(int pid, int number) { return (int)SYS2(kill, pid, number); }
static inline int sys_setsid(void) { return (int)SYS1(setsid, 0); }
static inline int sys_ioctl(int fd, unsigned long request, const void *argument)
{
    return (int)SYS3(ioctl, fd, request, argument);
}
static inline int sys_fcntl(int fd, int command, long argument)
{
    return (int)SYS3(fcntl, fd, command, argument);
}
static inline int sys_mount(
    const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
    return (int)SYS5(mount, source, target, type, flags, data);
}
static inline int sys_mkdir(const char *path, int mode)
{
    return (int)SYS3(mkdirat, AT_FDCWD, path, mode);
}
static inline int sys_chdir(const char *path) { return (int)SYS1(chdir, path); }
static inline int sys_fchdir(int fd) { return (int)SYS1(fchdir, fd); }
static inline int sys_chroot(const char *path) { return (int)SYS1(chroot, path); }
static inline int sys_execve(const char *path, char *const argv[], char *const envp[])
{
    return (int)SYS3(execve, path, argv, envp);
}
static inline int sys_fstatat(int dir, const char *path, struct stat *found, int flags)
{
    return (int)SYS4(newfstatat, dir, path, found, flags);
}
static inline int sys_exists(const char *path)
{
    return SYS4(faccessat, AT_FDCWD, path, 0, 0) == 0;
}
static inline void sys_sleep(long milliseconds)
{
    long wait[2] = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    SYS2(nanosleep, wait, 0);
}
static inline _Noreturn void sys_exit(int status)
{
    for (;;)
        SYS1(exit_group, status);
}

/* The kernel's struct sigaction, without a handler of ours: ignored or as at birth. */
static inline void sys_signal(int number, void (*what)(int))
{
    struct {
        void (*handler)(int);
        unsigned long flags;
        void (*restorer)(void);
        u64 mask;
    } action = {what, 0, 0, 0};
    SYS4(rt_sigaction, number, &action, 0, 8);
}
static inline void sys_block_signals(u64 mask)
{
    SYS4(rt_sigprocmask, SIG_SETMASK, &mask, 0, 8);
}

void *memcpy(void *to, const void *from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
int memcmp(const void *left, const void *right, size_t size);
size_t strlen(const char *text);
int strcmp(const char *left, const char *right);

/* What follows a prefix, or NULL. */
const char *after(const char *text, const char *prefix);
/* Decimal digits; -1 where there is anything else. */
int number(const char *text);
/* `value` in decimal digits, at the end of a 21-byte buffer. */
const char *decimal(char buffer[21], long value);
/* A short text put together, cut where it does not fit; a NULL ends the list. */
void join(char *buffer, size_t size, ...);
/* All of it, whatever the signals; 0, or a negative errno (-EPIPE at the end of a file). */
int write_all(int fd, const void *data, size_t size);
int read_all(int fd, void *data, size_t size);

#endif
