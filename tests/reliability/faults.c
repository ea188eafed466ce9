/* Preloaded into a job: kills it, or lets a system call fail, at the n-th call that touches files under a folder.

   FAULT_UNDER  the folder; calls on other paths are not counted
   FAULT_AT     the number of the call, from 1; 0 only counts
   FAULT_ERRNO  the error that this call returns; 0 or absent: SIGKILL before the call is made
   FAULT_KINDS  kinds that count, separated by commas ("write,fsync,rename"); absent: all of them
   FAULT_LOG    where the kinds of all counted calls are appended, one on a line

   Kinds: open (for writing), write, fsync, rename, mkdir, unlink, truncate, allocate, lock.
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
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

static int under(const char *path) {
    const char *folder = getenv("FAULT_UNDER");
    return folder && path && !strncmp(path, folder, strlen(folder));
}

/* The absolute form of a path that is given relative to an open folder. */
static const char *absolute(int at, const char *path, char *room) {
    char link[64];
    if (!path) return NULL;
    if (path[0] == '/') return path;
    if (at == AT_FDCWD) {
        if (!getcwd(room, PATH_MAX)) return NULL;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t size = readlink(link, room, PATH_MAX - 1);
        if (size < 0) return NULL;
        room[size] = 0;
    }
    strncat(room, "/", PATH_MAX - strlen(room) - 1);
    strncat(room, path, PATH_MAX - strlen(room) - 1);
    return room;
}

static const char *of_handle(int fd, char *room) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, room, PATH_MAX - 1);
    if (size < 0) return NULL;
    room[size] = 0;
    return room;
}

/* Counts a call; 1 where it is to fail with errno, 0 where it is to be made. Does not return where it kills. */
static int strikes(const char *kind, const char *path) {
    const char *kinds = getenv("FAULT_KINDS"), *at = getenv("FAULT_AT"), *code = getenv("FAULT_ERRNO");
    if (!under(path) || (kinds && !strstr(kinds, kind))) return 0;
    const char *log = getenv("FAULT_LOG");
    if (log) {
        int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (fd >= 0) {
            char line[64];
            int size = snprintf(line, sizeof line, "%s\n", kind);
            syscall(SYS_write, fd, line, size);
            syscall(SYS_close, fd);
        }
    }
    if (!at || atomic_fetch_add(&calls, 1) + 1 != atol(at) || !atol(at)) return 0;
    if (!code || !atoi(code)) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = atoi(code);
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define ON_PATH(kind, at, path) \
    do { char room[PATH_MAX]; if (strikes(kind, absolute(at, path, room))) return -1; } while (0)
#define ON_HANDLE(kind, fd) \
    do { char room[PATH_MAX]; if (strikes(kind, of_handle(fd, room))) return -1; } while (0)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        REAL(int, #name, const char *, int, ...); \
        if ((flags & O_ACCMODE) != O_RDONLY) ON_PATH("open", AT_FDCWD, path); \
        return real(path, flags, mode); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        REAL(int, #name, int, const char *, int, ...); \
        if ((flags & O_ACCMODE) != O_RDONLY) ON_PATH("open", at, path); \
        return real(at, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    ON_HANDLE("write", fd);
    return real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    ON_HANDLE("write", fd);
    return real(fd, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    ON_HANDLE("write", fd);
    return real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    ON_HANDLE("write", fd);
    return real(fd, data, size, at);
}
int fsync(int fd) {
    REAL(int, "fsync", int);
    ON_HANDLE("fsync", fd);
    return real(fd);
}
int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    ON_HANDLE("fsync", fd);
    return real(fd);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    ON_PATH("rename", AT_FDCWD, to);
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    ON_PATH("rename", b, to);
    return real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned int flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned int);
    ON_PATH("rename", b, to);
    return real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    ON_PATH("mkdir", AT_FDCWD, path);
    return real(path, mode);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    ON_PATH("unlink", AT_FDCWD, path);
    return real(path);
}
int unlinkat(int at, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    ON_PATH("unlink", at, path);
    return real(at, path, flags);
}
int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    ON_PATH("unlink", AT_FDCWD, path);
    return real(path);
}
int ftruncate(int fd, off_t size) {
    REAL(int, "ftruncate", int, off_t);
    ON_HANDLE("truncate", fd);
    return real(fd, size);
}
int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    ON_HANDLE("truncate", fd);
    return real(fd, size);
}
int truncate(const char *path, off_t size) {
    REAL(int, "truncate", const char *, off_t);
    ON_PATH("truncate", AT_FDCWD, path);
    return real(path, size);
}
int truncate64(const char *path, off64_t size) {
    REAL(int, "truncate64", const char *, off64_t);
    ON_PATH("truncate", AT_FDCWD, path);
    return real(path, size);
}
/* These two return the error and leave errno alone. */
int posix_fallocate(int fd, off_t at, off_t size) {
    char room[PATH_MAX];
    REAL(int, "posix_fallocate", int, off_t, off_t);
    return strikes("allocate", of_handle(fd, room)) ? errno : real(fd, at, size);
}
int posix_fallocate64(int fd, off64_t at, off64_t size) {
    char room[PATH_MAX];
    REAL(int, "posix_fallocate64", int, off64_t, off64_t);
    return strikes("allocate", of_handle(fd, room)) ? errno : real(fd, at, size);
}
int flock(int fd, int operation) {
    REAL(int, "flock", int, int);
    ON_HANDLE("lock", fd);
    return real(fd, operation);
}
