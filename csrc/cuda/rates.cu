#include <chrono>
#include <vector>

#include "core/expression.hpp"
#include "cuda/memory.hpp"
#include "cuda/merge.hpp"
#include "cuda/rates.hpp"

namespace paramdelta::cuda {
namespace {

constexpr std::size_t kBytes = std::size_t{32} << 20;
constexpr int kTimes = 4;

template <class Function>
double seconds(Function&& function) {
  const auto start = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Rates measure(int device) {
  std::vector<std::byte> up_host(kBytes), down_host(kBytes);
  const PinnedMemory up_pinned(device, up_host.data(), kBytes), down_pinned(device, down_host.data(), kBytes);
  const DeviceMemory memory(device, 5 * kBytes), counts(device, sizeof(Counts));
  const Queue up(device), down(device);
  std::byte* const operands = memory.data();
  std::byte* const out = operands + 3 * kBytes;
  up.clear(operands, 5 * kBytes);
  up.clear(counts.data(), sizeof(Counts));
  up.finish();

  const auto copies = [&](int times) {
    for (int i = 0; i < times; ++i) {
      up.copy(operands, up_host.data(), kBytes);
      down.copy(down_host.data(), operands + 4 * kBytes, kBytes);
    }
    up.finish();
    down.finish();
  };
  const auto address = [](std::byte* at) { return reinterpret_cast<std::uintptr_t>(at); };
  const Signature signature{DType::bf16, DType::bf16, {{DType::bf16, DType::bf16, 1.0}}};
  const TensorAddresses tensor{address(operands),
                               {address(operands + kBytes), address(operands + 2 * kBytes)},
                               address(out),
                               kBytes / 2,
                               address(counts.data())};
  const auto merges = [&](int times) {
    for (int i = 0; i < times; ++i) merge(signature, {tensor}, device, up.stream());
    up.finish();
  };
  copies(1);
  merges(1);
  const double copied = seconds([&] { copies(kTimes); }), merged = seconds([&] { merges(kTimes); });
  const double bytes = static_cast<double>(kBytes) * kTimes;
  return {bytes / copied, bytes / copied, 3 * bytes / merged};
}

}  // namespace paramdelta::cuda
