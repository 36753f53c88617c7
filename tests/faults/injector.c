// Makes chosen system calls of a process fail, come back short, or be the moment at which something else happens, and
// writes down what the process does to its files. Loaded with LD_PRELOAD; tests/faults/faulty_runs.py says what it
// is told.
//
// FAULT_RULES holds lines `CALLS PATH SKIP TIMES ACTION`: after SKIP calls to one of CALLS (joined by commas) on a file
// whose path contains PATH (`*` for any, `=PATH` for one that ends so), the next TIMES calls (-1: all) meet ACTION:
//   errno=N    the call fails
//   short=N    a read or a write moves N bytes at most
//   kill       the process dies, as with SIGKILL, before the call
//   signal=N   the process gets a signal, then the call is made
//   run=FILE   the program FILE is run, then the call is made
// SKIP `b:N` lets calls pass until N bytes are moved by them. FAULT_LOG names a file that gets a line `CALL PATH` for
// every call on a path that contains FAULT_LOG_PATH; `=ERRNO` is put after it where the call fails.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_RULES = 16, BLOCK = 4096 };

struct rule {
  char calls[128], path[512], action[512];
  long skip, times, skip_bytes;
};

static struct rule rules[MOST_RULES];
static int n_rules = 0, log_fd = -1;
static char log_path[512];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static __thread int inside = 0;  // calls that the injector makes itself are let through

static void set_up(void) {
  const char* text = getenv("FAULT_RULES");
  char skip[64];
  while (text && *text && n_rules < MOST_RULES) {
    struct rule* r = &rules[n_rules];
    if (sscanf(text, "%127s %511s %63s %ld %511[^\n]", r->calls, r->path, skip, &r->times, r->action) == 5) {
      if (skip[0] == 'b')
        r->skip_bytes = atol(skip + 2);
      else
        r->skip = atol(skip);
      ++n_rules;
    }
    text = strchr(text, '\n');
    if (text) ++text;
  }
  const char* log = getenv("FAULT_LOG");
  if (log) log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (log_fd >= 0) log_fd = (int)syscall(SYS_fcntl, log_fd, F_DUPFD_CLOEXEC, 900);
  snprintf(log_path, sizeof log_path, "%s", getenv("FAULT_LOG_PATH") ? getenv("FAULT_LOG_PATH") : "");
}

static int on_path(const struct rule* r, const char* path) {
  if (strcmp(r->path, "*") == 0) return 1;
  if (r->path[0] != '=') return strstr(path, r->path) != NULL;
  const size_t length = strlen(r->path + 1), all = strlen(path);
  return all >= length && strcmp(path + all - length, r->path + 1) == 0;
}

static int listed(const char* calls, const char* call) {
  const size_t length = strlen(call);
  for (const char* at = strstr(calls, call); at; at = strstr(at + 1, call))
    if ((at == calls || at[-1] == ',') && (at[length] == 0 || at[length] == ',')) return 1;
  return 0;
}

static void run_program(const char* file) {
  char* const arguments[] = {(char*)(uintptr_t)file, NULL};
  char* const environment[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};  // no injector in there
  const pid_t child = fork();
  if (child == 0) {
    execve(file, arguments, environment);
    _exit(127);
  }
  int status;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
}

// Returns 0 where the call is to be made, at most *bytes long; an errno where it is to fail.
static int meet(const char* call, const char* path, size_t* bytes) {
  pthread_once(&once, set_up);
  const int before = errno;
  int code = 0;
  char program[512] = "";
  inside = 1;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < n_rules && !code; ++i) {
    struct rule* r = &rules[i];
    if (!listed(r->calls, call) || !on_path(r, path) || r->times == 0) continue;
    if (r->skip > 0) {
      --r->skip;
      continue;
    }
    if (r->skip_bytes > 0) {
      r->skip_bytes -= bytes ? (long)*bytes : 0;
      continue;
    }
    if (r->times > 0) --r->times;
    if (strncmp(r->action, "errno=", 6) == 0) code = atoi(r->action + 6);
    if (strncmp(r->action, "short=", 6) == 0 && bytes && *bytes > (size_t)atol(r->action + 6))
      *bytes = (size_t)atol(r->action + 6);
    if (strcmp(r->action, "kill") == 0) kill(getpid(), SIGKILL);
    if (strncmp(r->action, "signal=", 7) == 0) kill(getpid(), atoi(r->action + 7));
    if (strncmp(r->action, "run=", 4) == 0) snprintf(program, sizeof program, "%s", r->action + 4);
  }
  if (log_fd >= 0 && strstr(path, log_path)) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, code ? "%s %s =%d\n" : "%s %s\n", call, path, code);
    if (length > (int)sizeof line) length = (int)sizeof line;
    syscall(SYS_write, log_fd, line, (size_t)length);
  }
  if (program[0]) run_program(program);
  pthread_mutex_unlock(&mutex);
  inside = 0;
  errno = before;
  return code;
}

static const char* path_of(int fd, char* buffer) {
  char link[64];
  const int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, PATH_MAX);
  errno = before;
  buffer[length > 0 ? length : 0] = 0;
  return buffer;
}

static int meet_fd(const char* call, int fd, size_t* bytes) {
  char buffer[PATH_MAX + 1];
  return inside ? 0 : meet(call, path_of(fd, buffer), bytes);
}

static int meet_path(const char* call, const char* path) { return inside || !path ? 0 : meet(call, path, NULL); }

#define EXPORT __attribute__((visibility("default")))
#define ALIAS(name) __attribute__((visibility("default"), alias(#name)))
#define REAL(type, name, ...)              \
  static type (*real)(__VA_ARGS__) = NULL; \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define MEET(expression)            \
  do {                              \
    const int code_ = (expression); \
    if (code_) {                    \
      errno = code_;                \
      return -1;                    \
    }                               \
  } while (0)

// Opening.

static int open_at(int folder, const char* path, int flags, mode_t mode) {
  MEET(meet_path(flags & O_CREAT ? "create" : "open", path));
  return (int)syscall(SYS_openat, folder, path, flags, mode);
}

#define MODE_OF(flags)                     \
  mode_t mode = 0;                         \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list list;                          \
    va_start(list, flags);                 \
    mode = (mode_t)va_arg(list, int);      \
    va_end(list);                          \
  }

EXPORT int open(const char* path, int flags, ...) {
  MODE_OF(flags)
  return open_at(AT_FDCWD, path, flags, mode);
}
int open64(const char* path, int flags, ...) ALIAS(open);
EXPORT int openat(int folder, const char* path, int flags, ...) {
  MODE_OF(flags)
  return open_at(folder, path, flags, mode);
}
int openat64(int folder, const char* path, int flags, ...) ALIAS(openat);
EXPORT int __open_2(const char* path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __open64_2(const char* path, int flags) ALIAS(__open_2);
EXPORT int __openat_2(int folder, const char* path, int flags) { return open_at(folder, path, flags, 0); }
int __openat64_2(int folder, const char* path, int flags) ALIAS(__openat_2);

// Reading and writing: every entry comes down to a vector at an offset (-1: the file's own position).

static size_t total_of(const struct iovec* parts, int count) {
  size_t total = 0;
  for (int i = 0; i < count; ++i) total += parts[i].iov_len;
  return total;
}

static ssize_t move(int writing, int fd, const struct iovec* parts, int count, off_t offset, int flags) {
  size_t bytes = total_of(parts, count);
  const size_t all = bytes;
  MEET(meet_fd(writing ? "write" : "read", fd, &bytes));
  if (bytes < all && (syscall(SYS_fcntl, fd, F_GETFL) & O_DIRECT)) {  // which comes back short by whole blocks
    bytes = bytes < BLOCK ? BLOCK : bytes / BLOCK * BLOCK;
    if (bytes > all) bytes = all;
  }
  struct iovec cut[64];
  if (count > 64) count = 64;
  int used = 0;
  for (size_t left = bytes; used < count && (left > 0 || used == 0); ++used) {
    cut[used] = parts[used];
    if (cut[used].iov_len > left) cut[used].iov_len = left;
    left -= cut[used].iov_len;
  }
  return syscall(writing ? SYS_pwritev2 : SYS_preadv2, fd, cut, (long)used, (long)offset, 0L, (long)flags);
}

EXPORT ssize_t read(int fd, void* to, size_t bytes) {
  const struct iovec part = {to, bytes};
  return move(0, fd, &part, 1, -1, 0);
}
EXPORT ssize_t __read_chk(int fd, void* to, size_t bytes, size_t room) {
  (void)room;
  return read(fd, to, bytes);
}
EXPORT ssize_t pread(int fd, void* to, size_t bytes, off_t offset) {
  const struct iovec part = {to, bytes};
  return move(0, fd, &part, 1, offset, 0);
}
ssize_t pread64(int fd, void* to, size_t bytes, off_t offset) ALIAS(pread);
EXPORT ssize_t __pread_chk(int fd, void* to, size_t bytes, off_t offset, size_t room) {
  (void)room;
  return pread(fd, to, bytes, offset);
}
ssize_t __pread64_chk(int fd, void* to, size_t bytes, off_t offset, size_t room) ALIAS(__pread_chk);
EXPORT ssize_t readv(int fd, const struct iovec* parts, int count) { return move(0, fd, parts, count, -1, 0); }
EXPORT ssize_t preadv(int fd, const struct iovec* parts, int count, off_t offset) {
  return move(0, fd, parts, count, offset, 0);
}
ssize_t preadv64(int fd, const struct iovec* parts, int count, off_t offset) ALIAS(preadv);
EXPORT ssize_t preadv2(int fd, const struct iovec* parts, int count, off_t offset, int flags) {
  return move(0, fd, parts, count, offset, flags);
}
ssize_t preadv64v2(int fd, const struct iovec* parts, int count, off_t offset, int flags) ALIAS(preadv2);

EXPORT ssize_t write(int fd, const void* from, size_t bytes) {
  const struct iovec part = {(void*)(uintptr_t)from, bytes};
  return move(1, fd, &part, 1, -1, 0);
}
EXPORT ssize_t pwrite(int fd, const void* from, size_t bytes, off_t offset) {
  const struct iovec part = {(void*)(uintptr_t)from, bytes};
  return move(1, fd, &part, 1, offset, 0);
}
ssize_t pwrite64(int fd, const void* from, size_t bytes, off_t offset) ALIAS(pwrite);
EXPORT ssize_t writev(int fd, const struct iovec* parts, int count) { return move(1, fd, parts, count, -1, 0); }
EXPORT ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t offset) {
  return move(1, fd, parts, count, offset, 0);
}
ssize_t pwritev64(int fd, const struct iovec* parts, int count, off_t offset) ALIAS(pwritev);
EXPORT ssize_t pwritev2(int fd, const struct iovec* parts, int count, off_t offset, int flags) {
  return move(1, fd, parts, count, offset, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec* parts, int count, off_t offset, int flags) ALIAS(pwritev2);

// Sizes, syncs, names.

EXPORT int fsync(int fd) {
  MEET(meet_fd("sync", fd, NULL));
  return (int)syscall(SYS_fsync, fd);
}
EXPORT int fdatasync(int fd) {
  MEET(meet_fd("sync", fd, NULL));
  return (int)syscall(SYS_fdatasync, fd);
}
EXPORT int ftruncate(int fd, off_t size) {
  MEET(meet_fd("truncate", fd, NULL));
  return (int)syscall(SYS_ftruncate, fd, size);
}
int ftruncate64(int fd, off_t size) ALIAS(ftruncate);
EXPORT int fallocate(int fd, int mode, off_t offset, off_t size) {
  MEET(meet_fd("allocate", fd, NULL));
  return (int)syscall(SYS_fallocate, fd, mode, offset, size);
}
int fallocate64(int fd, int mode, off_t offset, off_t size) ALIAS(fallocate);
EXPORT int posix_fallocate(int fd, off_t offset, off_t size) {
  const int code = meet_fd("allocate", fd, NULL);
  if (code) return code;
  REAL(int, "posix_fallocate", int, off_t, off_t);
  return real(fd, offset, size);
}
int posix_fallocate64(int fd, off_t offset, off_t size) ALIAS(posix_fallocate);
// The descriptor is gone whatever close says, so it is closed before the fault is reported.
EXPORT int close(int fd) {
  const int code = fd == log_fd ? 0 : meet_fd("close", fd, NULL);
  const int result = (int)syscall(SYS_close, fd);
  MEET(code);
  return result;
}
EXPORT int flock(int fd, int operation) {
  MEET(meet_fd("flock", fd, NULL));
  return (int)syscall(SYS_flock, fd, operation);
}
EXPORT int rename(const char* from, const char* to) {
  MEET(meet_path("rename", to));
  return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
EXPORT int renameat(int from_folder, const char* from, int to_folder, const char* to) {
  MEET(meet_path("rename", to));
  return (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, 0);
}
EXPORT int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
  MEET(meet_path(flags ? "exchange" : "rename", to));
  return (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
}
EXPORT int mkdir(const char* path, mode_t mode) {
  MEET(meet_path("mkdir", path));
  return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}
EXPORT int mkdirat(int folder, const char* path, mode_t mode) {
  MEET(meet_path("mkdir", path));
  return (int)syscall(SYS_mkdirat, folder, path, mode);
}
EXPORT int unlink(const char* path) {
  MEET(meet_path("unlink", path));
  return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
EXPORT int unlinkat(int folder, const char* path, int flags) {
  MEET(meet_path("unlink", path));
  return (int)syscall(SYS_unlinkat, folder, path, flags);
}
EXPORT int rmdir(const char* path) {
  MEET(meet_path("unlink", path));
  return (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
}
