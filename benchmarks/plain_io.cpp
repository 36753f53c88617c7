// What storage gives: reads three files and writes a fourth, in the pattern of a merge and without its arithmetic.
//
//   plain_io MODE THREADS REQUEST_BYTES IN IN IN OUT
//
// MODE buffered: read, write. MODE direct: the same with O_DIRECT, past the page cache. Every thread reads the same
// range of each input and writes the first of them there. Ends when the output is on disk.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

struct Job {
  int inputs[3];
  int out;
  off_t size;
  std::size_t request;
  std::atomic<off_t> next{0};
};

void work(Job& job) {
  auto* memory =
      static_cast<char*>(::mmap(nullptr, 3 * job.request, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) fail("mmap");
  const auto request = static_cast<off_t>(job.request);
  for (off_t at = job.next.fetch_add(request); at < job.size; at = job.next.fetch_add(request)) {
    const auto bytes = static_cast<std::size_t>(std::min(request, job.size - at));
    for (int i = 0; i < 3; ++i)
      for (std::size_t done = 0; done < bytes;) {
        const ssize_t got = ::pread(job.inputs[i], memory + static_cast<std::size_t>(i) * job.request + done,
                                    bytes - done, at + static_cast<off_t>(done));
        if (got <= 0) fail("pread");
        done += static_cast<std::size_t>(got);
      }
    for (std::size_t done = 0; done < bytes;) {
      const ssize_t put = ::pwrite(job.out, memory + done, bytes - done, at + static_cast<off_t>(done));
      if (put <= 0) fail("pwrite");
      done += static_cast<std::size_t>(put);
    }
  }
  ::munmap(memory, 3 * job.request);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 8) {
    std::fprintf(stderr, "usage: plain_io buffered|direct THREADS REQUEST_BYTES IN IN IN OUT\n");
    return 2;
  }
  const int flags = std::strcmp(arguments[1], "direct") == 0 ? O_DIRECT : 0;
  Job job;
  job.request = static_cast<std::size_t>(std::atol(arguments[3]));
  job.size = -1;
  for (int i = 0; i < 3; ++i) {
    job.inputs[i] = ::open(arguments[4 + i], O_RDONLY | flags);
    struct stat status{};
    if (job.inputs[i] < 0 || ::fstat(job.inputs[i], &status) != 0) fail(arguments[4 + i]);
    job.size = job.size < 0 ? status.st_size : std::min<off_t>(job.size, status.st_size);
  }
  if (flags) job.size = job.size / 4096 * 4096;
  job.out = ::open(arguments[7], O_WRONLY | O_CREAT | O_TRUNC | flags, 0666);
  if (job.out < 0 || ::ftruncate(job.out, job.size) != 0) fail(arguments[7]);
  std::vector<std::thread> threads;
  for (int i = std::atoi(arguments[2]); i > 0; --i) threads.emplace_back(work, std::ref(job));
  for (std::thread& thread : threads) thread.join();
  if (::fsync(job.out) != 0) fail("fsync");
  return 0;
}
