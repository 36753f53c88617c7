// The error type of the C++ side. The bindings turn it into the Python family; nothing here prints or aborts.
#pragma once

#include <stdexcept>
#include <string>

namespace paramdelta {

// Reading or writing failed: `code` is errno, or 0 where the file ended early.
class StorageError : public std::runtime_error {
 public:
  StorageError(const std::string& what, int code) : std::runtime_error(what), code_(code) {}
  int code() const noexcept { return code_; }

 private:
  int code_;
};

// A device that computes for the engine failed: out of memory, lost, refused.
class StageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace paramdelta
