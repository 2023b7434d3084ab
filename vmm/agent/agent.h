/* What the agent's files share: the protocol (its other side is vmm/agent/wire.py), and the request
 * that a connection begins with. */
#ifndef VMM_AGENT_H
#define VMM_AGENT_H

#include "sys.h"

#define VERSION 1
#define MAGIC 0x414d4d56 /* "VMMA" */
#define PORT 901         /* both below 1024: only root may listen there or call from there */
#define HELLO_PORT 902

/* A frame: this, then `size` bytes. All numbers are little-endian. */
struct frame {
    u8 type, stream;
    u16 zero;
    u32 size;
};
enum {
    REQUEST = 1, /* host: struct request */
    DATA = 2,    /* both: bytes of a stream, no more than its window */
    END = 3,     /* both: a stream's last; from the guest for IN: nobody reads it any more */
    CREDIT = 4,  /* both: u32, so many bytes of a stream were taken */
    SIGNAL = 5,  /* host: u32, for the process, or its group where `stream` is 1 */
    RESIZE = 6,  /* host: u16 rows, u16 columns */
    STARTED = 16, /* guest: u32 process id */
    FAILED = 17,  /* guest: u32 errno, u32 what could not be done */
    EXITED = 18,  /* guest: u32 exit status, u32 signal */
};
enum { IN, OUT, ERR, STREAMS };
/* Of FAILED; with CANNOT_BECOME, ENOENT is about the user and ESRCH about the group. */
enum { CANNOT_EXECUTE, CANNOT_CHANGE_DIRECTORY, CANNOT_START, CANNOT_BECOME };

#define WINDOW (256u << 10) /* bytes of a stream under way */
#define CREDIT_AFTER (WINDOW / 4)
#define CHUNK (64u << 10) /* bytes of a DATA frame at most */
#define REQUEST_MAX (1u << 20)
#define WORDS_MAX (128u << 10)
#define USUAL_MAX 4 /* variables that come to a user's environment in the guest */

enum { EXECUTE = 1, PUT = 2, GET = 3, POWER_OFF = 4 };
enum { NULL_IN = 1, NULL_OUT = 2, NULL_ERR = 4, ERR_TO_OUT = 8, TERMINAL = 16, USER = 32 };

struct request {
    u32 magic;
    u16 version;
    u8 kind, flags;
    u16 rows, columns;
    u32 argc, envc;
    /* then strings with their NUL: working directory, user (with USER), arguments, environment */
};

struct command {
    const struct request *request;
    char *directory, *user, **argv, **envp;
    int in_guest; /* and not on a host, where nothing is to be mounted */
};

/* Whom a command runs as. */
struct user {
    u32 uid, gid, groups[64];
    int count; /* of groups */
    char name[64], home[1024], shell[1024]; /* the name is empty for a number without one */
};

struct hello {
    u32 magic;
    u16 version, zero;
};
/* The host's answer to the first hello of a machine: bytes for the kernel's random numbers, so that
 * copies of one machine do not draw the same ones, whether its kernel knows VMGenID or not. */
#define SEED 32

/* Serve one connection, in a process of its own; `root` is what to chroot to, or -1. */
_Noreturn void session(int connection, int root);

/* Start the command. The agent's ends of its standard streams go to `streams` (-1: none).
 * Returns its process id, or a negative errno with `what` set. */
int spawn(const struct command *command, int streams[STREAMS], u32 *what);

/* Look up USER[:GROUP], names or numbers. 0, -ENOENT (no such user) or -ESRCH (no such group). */
int find_user(char *text, struct user *found);

/* Become that user, groups and all; 0 or a negative errno. */
int become_user(const struct user *user);

/* Carry out a `net` line of /.vmm/config (see init.c); `stays`: a lease may be renewed later, by a
 * process that stays. */
void bring_up(char *line, int stays);

/* Name the guest; where its root has an /etc, /etc/hosts knows the name and localhost. */
void name_host(const char *name);

/* Make the tree that comes from standard input at `path`; write the tree at `path` to standard
 * output. Errors go to standard error (see tree.c); the exit status. */
int tree_put(const char *path);
int tree_get(const char *path);

/* Take connections and serve them until the end of time. */
_Noreturn void daemon(int proc);
_Noreturn void listen_on(int listener);

/* Process 1: modules, root file system, agent, and the guest's own init. */
_Noreturn void init(char **argv, char **envp);

/* A line for whoever watches the console. */
void say(const char *text, const char *more, long error);

#endif
