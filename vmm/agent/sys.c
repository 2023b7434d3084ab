/* The program's start, and the few functions of a C library that it needs. */
#include "sys.h"
#include <stdarg.h>

int main(int argc, char **argv, char **envp);

__asm__(".globl _start\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    mov %rsp, %rdi\n"
        "    and $-16, %rsp\n"
        "    call start\n");

__attribute__((used)) _Noreturn void start(long *stack)
{
    int argc = (int)stack[0];
    char **argv = (char **)(stack + 1);

    sys_exit(main(argc, argv, argv + argc + 1));
}

void *memcpy(void *to, const void *from, size_t size)
{
    void *result = to;

    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return result;
}

void *memmove(void *to, const void *from, size_t size)
{
    char *target = to;
    const char *source = from;

    if (target <= source || target >= source + size)
        return memcpy(to, from, size);
    while (size--)
        ((volatile char *)target)[size] = source[size];
    return to;
}

void *memset(void *to, int value, size_t size)
{
    void *result = to;

    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return result;
}

int memcmp(const void *left, const void *right, size_t size)
{
    const volatile u8 *a = left, *b = right;

    for (; size; size--, a++, b++)
        if (*a != *b)
            return *a < *b ? -1 : 1;
    return 0;
}

size_t strlen(const char *text)
{
    const volatile char *end = text;

    while (*end)
        end++;
    return (size_t)(end - text);
}

int strcmp(const char *left, const char *right)
{
    size_t size = strlen(left);

    return size == strlen(right) ? memcmp(left, right, size) : 1;
}

const char *after(const char *text, const char *prefix)
{
    for (; *prefix; prefix++, text++)
        if (*text != *prefix)
            return 0;
    return text;
}

int number(const char *text)
{
    int value = 0;

    if (!*text)
        return -1;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || value > 100000000)
            return -1;
        value = value * 10 + (*text - '0');
    }
    return value;
}

const char *decimal(char buffer[21], long value)
{
    char *digit = buffer + 20;
    unsigned long left = value < 0 ? -(unsigned long)value : (unsigned long)value;

    *digit = 0;
    do
        *--digit = (char)('0' + left % 10);
    while (left /= 10);
    if (value < 0)
        *--digit = '-';
    return digit;
}

void join(char *buffer, size_t size, ...)
{
    va_list list;
    const char *part;
    size_t done = 0;

    va_start(list, size);
    while ((part = va_arg(list, const char *)))
        while (*part && done + 1 < size)
            buffer[done++] = *part++;
    va_end(list);
    buffer[done] = 0;
}

int write_all(int fd, const void *data, size_t size)
{
    const char *at = data;

    while (size) {
        long done = sys_write(fd, at, size);
        if (done == -EINTR)
            continue;
        if (done < 0)
            return (int)done;
        at += done;
        size -= (size_t)done;
    }
    return 0;
}

int read_all(int fd, void *data, size_t size)
{
    char *at = data;

    while (size) {
        long done = sys_read(fd, at, size);
        if (done == -EINTR)
            continue;
        if (done <= 0)
            return done ? (int)done : -EPIPE;
        at += done;
        size -= (size_t)done;
    }
    return 0;
}
