// Blocks of fibers. A fiber runs until it waits or ends; then the next one runs, in an order that is drawn anew for
// each block: what needs a barrier and has none comes out differently from one run to the next.
#include "device.hpp"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csetjmp>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <shared_mutex>
#include <vector>

namespace emulated {

namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr int kIllegalAddress = 700, kNoFunction = 98, kMisaligned = 716, kInvalidValue = 1, kLaunchFailure = 719;

struct Kernel {
  Entry entry;
  std::vector<Parameter> parameters;
};

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

std::shared_mutex allowed_mutex;
std::map<std::uintptr_t, std::size_t>& allowed() {
  static std::map<std::uintptr_t, std::size_t> all;
  return all;
}
std::atomic<std::uint64_t> allowed_version{1};
std::atomic<bool> all_allowed{false};

struct Range {
  std::uintptr_t begin = 0, end = 0;
};

// The allowed range that an address lies in.
Range range_of(std::uintptr_t address) {
  const std::shared_lock lock(allowed_mutex);
  auto after = allowed().upper_bound(address);
  if (after == allowed().begin()) return {};
  --after;
  return {after->first, after->first + after->second};
}

std::string hexadecimal(std::uintptr_t address) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

// Entered once by its context, and from then on by jumps, which save no signal mask and so call no kernel.
struct Fiber {
  ucontext_t context;
  std::jmp_buf jump;
  Thread thread;
  bool started = false, done = false;
};

struct Warp {
  b32 values[2][32] = {};
  b32 lanes = 0;
  std::uint64_t arrived = 0;
};

}  // namespace

struct Block {
  Entry entry = nullptr;
  std::byte* parameters = nullptr;
  std::size_t parameter_bytes = 0;
  std::vector<std::byte> shared;
  b32 index = 0, blocks = 0, threads = 0;

  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::byte* stacks = nullptr;
  std::size_t stack_bytes = 0;
  std::jmp_buf scheduler;
  Fiber* running = nullptr;
  b32 alive = 0, waiting = 0;
  std::uint64_t barriers = 0, steps = 0;
  std::exception_ptr failed;

  // What was looked up last, and when: kernels walk through few arrays.
  std::uint64_t version = 0;
  Range recent[8];
  unsigned next_recent = 0;

  void pause() {
    if (_setjmp(running->jump) == 0) _longjmp(scheduler, 1);
  }
  void arrive() {
    ++steps;
    if (++waiting == alive) release();
  }
  void release() {
    waiting = 0;
    ++barriers;
  }
  void resume(Fiber& fiber);
  void run(const std::vector<b32>& order);
  ~Block() {
    if (stacks != nullptr) ::munmap(stacks, stack_bytes);
  }
};

namespace {
thread_local Block* current = nullptr;

// A fiber's whole life: a thread of one block, and then of the next.
void start() {
  while (true) {
    Block& block = *current;
    Fiber& fiber = *block.running;
    try {
      block.entry(fiber.thread, block.parameters);
    } catch (...) {
      if (!block.failed) block.failed = std::current_exception();
    }
    fiber.done = true;
    ++block.steps;
    --block.alive;
    if (block.alive > 0 && block.waiting == block.alive) block.release();
    block.pause();
  }
}
}  // namespace

void Block::resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + static_cast<std::size_t>(&fiber - fibers.data()) * kStack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &start, 0);
  setcontext(&fiber.context);
}

void Block::run(const std::vector<b32>& order) {
  current = this;
  alive = threads;
  waiting = 0;
  failed = nullptr;
  warps.assign((threads + 31) / 32, Warp{});
  for (b32 i = 0; i < threads; ++i) {
    fibers[i].thread = Thread{this, i};
    fibers[i].done = false;
    ++warps[i / 32].lanes;
  }
  while (alive > 0 && !failed) {
    const std::uint64_t before = steps;
    for (const b32 i : order)
      if (!fibers[i].done && !failed) resume(fibers[i]);
    if (steps == before && alive > 0 && !failed)
      throw Fault(kLaunchFailure, "threads of a block wait for each other for ever");
  }
  if (failed) std::rethrow_exception(failed);
}

void Thread::barrier() {
  const std::uint64_t mine = block->barriers;
  block->arrive();
  while (block->barriers == mine) block->pause();
}

const b32* Thread::exchange(b32 value, b32 mask) {
  Warp& warp = block->warps[index / 32];
  if (mask != 0xFFFFFFFFu) throw Fault(kInvalidValue, "an exchange between some lanes of a warp");
  const b32 round = exchanges++;
  warp.values[round % 2][lane()] = value;
  ++warp.arrived;
  ++block->steps;
  while (warp.arrived < std::uint64_t{round + 1} * warp.lanes) block->pause();
  return warp.values[round % 2];
}

std::byte* Thread::shared(b64 offset, std::size_t bytes) const {
  if (offset > block->shared.size() || bytes > block->shared.size() - offset)
    throw Fault(kIllegalAddress, std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                                     " of shared memory, of which there are " + std::to_string(block->shared.size()));
  if (offset % bytes != 0) throw Fault(kMisaligned, "shared memory at " + std::to_string(offset));
  return block->shared.data() + offset;
}

void Thread::copy(b64 to, b64 from, b32 bytes, b32 given) {
  shared(to, bytes);
  if (given > bytes) throw Fault(kInvalidValue, "a copy of more bytes than it has room for");
  if (from % bytes != 0) throw Fault(kMisaligned, "a copy from " + hexadecimal(from) + ", which is misaligned");
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({to, from, bytes, given});
}

void Thread::end_copies() {
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();
}

void Thread::await_copies(b32 later) {
  while (copies.size() > later + 1) {
    for (const Copy& each : copies.front()) {
      std::byte* const to = shared(each.to, each.bytes);
      for (b32 i = 0; i < each.given; ++i) check(each.from + i, 1);
      std::memcpy(to, reinterpret_cast<const void*>(each.from), each.given);
      std::memset(to + each.given, 0, each.bytes - each.given);
    }
    copies.erase(copies.begin());
  }
}

b64 Thread::shared_base() const { return reinterpret_cast<b64>(block->shared.data()); }
b32 Thread::block_index() const { return block->index; }
b32 Thread::threads() const { return block->threads; }
b32 Thread::blocks() const { return block->blocks; }

void Thread::check(b64 address, std::size_t bytes) const {
  if (address % bytes != 0)
    throw Fault(kMisaligned, std::to_string(bytes) + " bytes at " + hexadecimal(address) + ", which is misaligned");
  const auto within = [&](std::uintptr_t begin, std::size_t size) {
    return address >= begin && address - begin <= size && bytes <= size - (address - begin);
  };
  Block& b = *block;
  const std::uint64_t now = allowed_version.load(std::memory_order_acquire);
  if (b.version != now) {
    for (Range& range : b.recent) range = {};
    b.version = now;
  }
  for (const Range& range : b.recent)
    if (within(range.begin, range.end - range.begin)) return;
  if (within(shared_base(), b.shared.size()) || within(reinterpret_cast<b64>(b.stacks), b.stack_bytes) ||
      within(reinterpret_cast<b64>(b.parameters), b.parameter_bytes))
    return;
  if (all_allowed) return;
  const Range range = range_of(address);
  if (!within(range.begin, range.end - range.begin))
    throw Fault(kIllegalAddress,
                std::to_string(bytes) + " bytes at " + hexadecimal(address) + ", which no allocation has");
  b.recent[b.next_recent++ % 8] = range;
}

b32 Thread::whole_warp(b32 clamp) const {
  if (clamp != 31) throw Fault(kInvalidValue, "an exchange within a part of a warp");
  return 31;
}

namespace {

// A binary format with `mantissa` bits and a bias: the value of a code's magnitude, and the code nearest to a
// magnitude, even where two are, as if exponents had no end.
double value_of(b32 code, int mantissa, int bias) {
  const int exponent = static_cast<int>(code >> mantissa);
  const b32 fraction = code & ((1u << mantissa) - 1);
  if (exponent == 0) return std::ldexp(fraction, 1 - bias - mantissa);
  return std::ldexp(fraction + (1u << mantissa), exponent - bias - mantissa);
}

b32 nearest_code(double magnitude, int mantissa, int bias) {
  if (magnitude == 0.0) return 0;
  int exponent;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent - 1, 1 - bias);
  const auto steps = static_cast<b32>(std::nearbyint(std::ldexp(magnitude, mantissa - exponent)));
  return static_cast<b32>(exponent + bias - 1) * (1u << mantissa) + steps;
}

}  // namespace

b16 f16(f32 x) {
  const b32 sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7FFF;
  if (std::isinf(x)) return static_cast<b16>(sign | 0x7C00);
  return static_cast<b16>(sign | std::min(nearest_code(std::fabs(x), 10, 15), 0x7C00u));
}

b16 bf16(f32 x) {
  const b32 sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7FFF;
  if (std::isinf(x)) return static_cast<b16>(sign | 0x7F80);
  return static_cast<b16>(sign | std::min(nearest_code(std::fabs(x), 7, 127), 0x7F80u));
}

b16 e4m3(f32 x) {
  const b32 sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7F;
  if (std::fabs(x) > 448.0f) return static_cast<b16>(sign | 0x7E);
  return static_cast<b16>(sign | nearest_code(std::fabs(x), 3, 7));
}

f32 f16_value(b16 code) {
  const b32 magnitude = code & 0x7FFFu;
  if (magnitude > 0x7C00) return bits<f32>(0x7FFFFFFF);
  const double value = magnitude == 0x7C00 ? HUGE_VAL : value_of(magnitude, 10, 15);
  return static_cast<f32>((code & 0x8000) != 0 ? -value : value);
}

f32 e4m3_value(b16 code) {
  const b32 magnitude = code & 0x7Fu;
  if (magnitude == 0x7F) return bits<f32>(0x7FFFFFFF);
  const double value = value_of(magnitude, 3, 7);
  return static_cast<f32>((code & 0x80) != 0 ? -value : value);
}

Known::Known(const char* name, Entry entry, std::initializer_list<Parameter> parameters) {
  kernels()[name] = Kernel{entry, parameters};
}

namespace {
const Kernel& kernel_of(const std::string& name) {
  const auto kernel = kernels().find(name);
  if (kernel == kernels().end()) throw Fault(kNoFunction, "there is no kernel " + name);
  return kernel->second;
}
}  // namespace

std::vector<std::byte> packed(const std::string& name, const void* const* arguments) {
  std::vector<std::byte> made;
  for (const Parameter& parameter : kernel_of(name).parameters) {
    made.resize(parameter.offset + parameter.bytes);
    std::memcpy(made.data() + parameter.offset, *arguments++, parameter.bytes);
  }
  return made;
}

void allow(const void* memory, std::size_t bytes) {
  const std::unique_lock lock(allowed_mutex);
  allowed()[reinterpret_cast<std::uintptr_t>(memory)] = bytes;
  ++allowed_version;
}

void forbid(const void* memory) {
  const std::unique_lock lock(allowed_mutex);
  allowed().erase(reinterpret_cast<std::uintptr_t>(memory));
  ++allowed_version;
}

void allow_all() { all_allowed = true; }
bool all_are_allowed() { return all_allowed; }

bool is_allowed(const void* memory, std::size_t bytes) {
  const auto at = reinterpret_cast<std::uintptr_t>(memory);
  const Range range = range_of(at);
  return at >= range.begin && at < range.end && bytes <= range.end - at;
}

void execute(const std::string& name, b32 blocks, b32 threads, std::size_t shared_bytes,
             std::vector<std::byte> parameters, std::uint64_t seed) {
  if (threads == 0 || threads > 1024 || shared_bytes > kMostShared)
    throw Fault(kInvalidValue, "a block of " + std::to_string(threads) + " threads and " +
                                   std::to_string(shared_bytes) + " bytes of shared memory");
  Block block;
  block.entry = kernel_of(name).entry;
  block.parameters = parameters.data();
  block.parameter_bytes = parameters.size();
  block.blocks = blocks;
  block.threads = threads;
  block.fibers.resize(threads);
  block.stack_bytes = threads * kStack;
  void* const stacks =
      ::mmap(nullptr, block.stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  block.stacks = static_cast<std::byte*>(stacks);
  std::mt19937_64 draw(seed);
  std::vector<b32> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  const b32 first = blocks == 0 ? 0 : static_cast<b32>(draw() % blocks);
  for (b32 i = 0; i < blocks; ++i) {
    block.index = (first + i) % blocks;
    block.shared.assign(shared_bytes, std::byte{0xA5});  // what a block finds in shared memory is of no account
    std::shuffle(order.begin(), order.end(), draw);
    block.run(order);
  }
}

}  // namespace emulated
