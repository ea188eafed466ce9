/* Preloaded into a job: kills it, or lets a system call fail, at the n-th call that touches files under a folder.

   FAULT_UNDER  the folder; calls on other paths are not counted
   FAULT_AT     the number of the call, from 1; 0 only counts; -1 is every call
   FAULT_ERRNO  the error that this call returns; 0 or absent: SIGKILL before the call is made; -1: a read or write does
                half of what it was to do
   FAULT_KINDS  kinds that count, separated by commas ("write,fsync,rename"); absent: all of them
   FAULT_LOG    where the kinds of all counted calls are appended, one on a line

   FAULT_UNTIL  a beginning of paths: SIGKILL before the first call that changes something under it

   FAULT_CLOCK  seconds by which the wall clock jumps at each look at it, to and fro

   Kinds: open (for writing), direct (for writing past the page cache), look (open for reading), read, write, fsync,
   rename, exchange (a swapping rename), mkdir, unlink, truncate, allocate, lock, chmod. The environment is read at each
   call, so a process that was started without a fault can be given one.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { PASS, FAIL, HALF };
static atomic_long calls;

static int under(const char *path) {
    const char *folder = getenv("FAULT_UNDER");
    return folder && path && !strncmp(path, folder, strlen(folder));
}

static int listed(const char *kinds, const char *kind) {
    size_t size = strlen(kind);
    for (const char *at = kinds; (at = strstr(at, kind)); at += size)
        if ((at == kinds || at[-1] == ',') && (at[size] == 0 || at[size] == ',')) return 1;
    return 0;
}

static const char *of_handle(int fd, char *room) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, room, PATH_MAX - 1);
    if (size < 0) return NULL;
    room[size] = 0;
    return room;
}

/* The absolute form of a path that is given relative to an open folder. */
static const char *absolute(int at, const char *path, char *room) {
    if (!path) return NULL;
    if (path[0] == '/') return path;
    if (at == AT_FDCWD ? !getcwd(room, PATH_MAX) : !of_handle(at, room)) return NULL;
    strncat(room, "/", PATH_MAX - strlen(room) - 1);
    strncat(room, path, PATH_MAX - strlen(room) - 1);
    return room;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Counts a call: PASS where it is to be made, FAIL with errno set, HALF. Does not return where it kills. */
static int strikes(const char *kind, const char *path) {
    const char *kinds = getenv("FAULT_KINDS"), *at = getenv("FAULT_AT"), *code = getenv("FAULT_ERRNO");
    const char *until = getenv("FAULT_UNTIL");
    if (until && path && !strncmp(path, until, strlen(until)) && !listed("look,read,lock", kind)) die();
    if (!under(path) || (kinds && !listed(kinds, kind))) return PASS;
    const char *log = getenv("FAULT_LOG");
    if (log) {
        int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (fd >= 0) {
            char line[PATH_MAX + 64];
            int size = snprintf(line, sizeof line, "%s %s\n", kind, path);
            syscall(SYS_write, fd, line, size);
            syscall(SYS_close, fd);
        }
    }
    long wanted = at ? atol(at) : 0, number = atomic_fetch_add(&calls, 1) + 1;
    if (!wanted || (wanted > 0 && wanted != number)) return PASS;
    int error = code ? atoi(code) : 0;
    if (error < 0) return HALF;
    if (!error) die();
    errno = error;
    return FAIL;
}

static int on_path(const char *kind, int at, const char *path) {
    char room[PATH_MAX];
    if (!getenv("FAULT_UNDER")) return PASS;
    return strikes(kind, absolute(at, path, room));
}

static int on_handle(const char *kind, int fd) {
    char room[PATH_MAX];
    if (!getenv("FAULT_UNDER")) return PASS;
    return strikes(kind, of_handle(fd, room));
}

static const char *opening(int flags) {
    if ((flags & O_ACCMODE) == O_RDONLY) return "look";
    return flags & O_DIRECT ? "direct" : "open";
}

static size_t half(int what, size_t size) { return what == HALF && size > 1 ? size / 2 : size; }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define FAILS(call) if ((call) == FAIL) return -1

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        REAL(int, #name, const char *, int, ...); \
        FAILS(on_path(opening(flags), AT_FDCWD, path)); \
        return real(path, flags, mode); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        REAL(int, #name, int, const char *, int, ...); \
        FAILS(on_path(opening(flags), at, path)); \
        return real(at, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    int what = on_handle("write", fd);
    FAILS(what);
    return real(fd, data, half(what, size));
}
ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    int what = on_handle("read", fd);
    FAILS(what);
    return real(fd, data, half(what, size));
}
#define AT(name, kind, buffer, offset) \
    ssize_t name(int fd, buffer data, size_t size, offset at) { \
        REAL(ssize_t, #name, int, buffer, size_t, offset); \
        int what = on_handle(kind, fd); \
        FAILS(what); \
        return real(fd, data, half(what, size), at); }
AT(pwrite, "write", const void *, off_t)
AT(pwrite64, "write", const void *, off64_t)
AT(pread, "read", void *, off_t)
AT(pread64, "read", void *, off64_t)
#define VECTOR(name, kind) \
    ssize_t name(int fd, const struct iovec *parts, int count) { \
        REAL(ssize_t, #name, int, const struct iovec *, int); \
        int what = on_handle(kind, fd); \
        FAILS(what); \
        if (what == HALF && count > 0) { \
            struct iovec first = {parts[0].iov_base, half(what, parts[0].iov_len)}; \
            return real(fd, &first, 1); \
        } \
        return real(fd, parts, count); }
VECTOR(writev, "write")
VECTOR(readv, "read")
#define VECTOR_AT(name, kind, offset) \
    ssize_t name(int fd, const struct iovec *parts, int count, offset at) { \
        REAL(ssize_t, #name, int, const struct iovec *, int, offset); \
        int what = on_handle(kind, fd); \
        FAILS(what); \
        if (what == HALF && count > 0) { \
            struct iovec first = {parts[0].iov_base, half(what, parts[0].iov_len)}; \
            return real(fd, &first, 1, at); \
        } \
        return real(fd, parts, count, at); }
VECTOR_AT(preadv, "read", off_t)
VECTOR_AT(preadv64, "read", off64_t)
#define SENDFILE(name, offset) \
    ssize_t name(int to, int from, offset *at, size_t size) { \
        REAL(ssize_t, #name, int, int, offset *, size_t); \
        int what = on_handle("write", to); \
        FAILS(what); \
        return real(to, from, at, half(what, size)); }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

#define SYNC(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        FAILS(on_handle("fsync", fd)); \
        return real(fd); }
SYNC(fsync)
SYNC(fdatasync)
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    FAILS(on_path("rename", AT_FDCWD, to));
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    FAILS(on_path("rename", b, to));
    return real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned int flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned int);
    FAILS(on_path(flags & RENAME_EXCHANGE ? "exchange" : "rename", b, to));
    return real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    FAILS(on_path("mkdir", AT_FDCWD, path));
    return real(path, mode);
}
#define REMOVE(name) \
    int name(const char *path) { \
        REAL(int, #name, const char *); \
        FAILS(on_path("unlink", AT_FDCWD, path)); \
        return real(path); }
REMOVE(unlink)
REMOVE(rmdir)
int unlinkat(int at, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    FAILS(on_path("unlink", at, path));
    return real(at, path, flags);
}
int chmod(const char *path, mode_t mode) {
    REAL(int, "chmod", const char *, mode_t);
    FAILS(on_path("chmod", AT_FDCWD, path));
    return real(path, mode);
}
int fchmod(int fd, mode_t mode) {
    REAL(int, "fchmod", int, mode_t);
    FAILS(on_handle("chmod", fd));
    return real(fd, mode);
}
#define CUT(name, offset) \
    int name(int fd, offset size) { \
        REAL(int, #name, int, offset); \
        FAILS(on_handle("truncate", fd)); \
        return real(fd, size); }
CUT(ftruncate, off_t)
CUT(ftruncate64, off64_t)
#define CUT_PATH(name, offset) \
    int name(const char *path, offset size) { \
        REAL(int, #name, const char *, offset); \
        FAILS(on_path("truncate", AT_FDCWD, path)); \
        return real(path, size); }
CUT_PATH(truncate, off_t)
CUT_PATH(truncate64, off64_t)
/* These two return the error and leave errno alone. */
#define ALLOCATE(name, offset) \
    int name(int fd, offset at, offset size) { \
        REAL(int, #name, int, offset, offset); \
        return on_handle("allocate", fd) == FAIL ? errno : real(fd, at, size); }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)
int clock_gettime(clockid_t clock, struct timespec *now) {
    static atomic_long looks;
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int status = real(clock, now);
    const char *jump = clock == CLOCK_REALTIME ? getenv("FAULT_CLOCK") : NULL;
    if (jump) now->tv_sec += atol(jump) * (atomic_fetch_add(&looks, 1) % 2 ? 1 : -1);
    return status;
}
int flock(int fd, int operation) {
    REAL(int, "flock", int, int);
    FAILS(on_handle("lock", fd));
    return real(fd, operation);
}
