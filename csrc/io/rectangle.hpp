// A rectangle: a piece of a quantised matrix that a slot's memory carries from read through compute to write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/stage.hpp"
#include "io/checksums.hpp"
#include "io/file.hpp"
#include "io/stage.hpp"
#include "io/work.hpp"

namespace paramdelta::io {

// Rows row … row + rows − 1 and columns col … col + cols − 1 of a region.
struct Piece {
  std::size_t region = 0;
  std::int64_t row = 0, rows = 0, col = 0, cols = 0;
};

// The smallest piece of a region that can be computed by itself: a unit of the output's grid, or next to nothing where
// no scale has to be found.
struct Unit {
  std::int64_t rows, cols;
};
Unit unit_of(const Work& work, const Region& region);

class Rectangle {
 public:
  // `memory` (`bytes` long, page-aligned) belongs to the caller and outlives the object.
  Rectangle(const Work& work, std::byte* memory, std::size_t bytes) : work_(work), memory_(memory), bytes_(bytes) {}

  // Bytes of memory that `rows` × `cols` elements of a region take at most.
  static std::size_t bytes_for(const Work& work, const Region& region, std::int64_t rows, std::int64_t cols);

  // Reads the operands of a piece. Outputs in memory of a device are made there where `stage` takes the matrix.
  // Returns the bytes read.
  std::size_t fill(const Piece& piece, const std::vector<Input>& inputs, const std::vector<Target>& outputs,
                   const Stage& stage);
  // Makes job() that of one of the variants: its alphas, and the scales it is given. Returns the bytes read.
  std::size_t turn_to(std::size_t variant, const std::vector<Input>& inputs);
  const ScaledMerge& job() const { return job_; }
  StageFrame frame(std::size_t variant) const {
    return {operands_, static_cast<std::size_t>(free_ - operands_), variant != 0};
  }
  const Region& region() const { return work_.regions[piece_.region]; }
  // Writes codes and scales of the variant turned to, and has them summed; `write` copies into memory of a device.
  // Returns their bytes.
  using Write = std::function<void(std::byte* to, const std::byte* from, std::size_t bytes)>;
  std::size_t drain(const std::vector<Target>& outputs, Checksums& checksums, const Write& write) const;

 private:
  struct Plane;
  std::byte* take(std::size_t bytes);
  void end_at(std::byte* end);
  std::byte* take_placed(std::size_t bytes, std::size_t alignment, std::int64_t offset);
  std::int64_t out_offset() const;
  Plane load(const std::vector<Input>& inputs, const struct Strided& from);
  Plane load_lines(const std::vector<Input>& inputs, const struct Strided& from, std::int64_t lines,
                   std::int64_t length, std::int64_t stride);
  Plane load_turned_nibbles(const std::vector<Input>& inputs, const View& view);
  Matrix load_view(const std::vector<Input>& inputs, std::int32_t number);
  void load_scales(const std::vector<Input>& inputs, const View& view, Scales& scales);
  float load_float(const Input& input, std::int64_t offset);
  Plane load_codes(const std::vector<Input>& inputs, const View& view);
  void prepare_output(const std::vector<Target>& outputs);
  void prepare_scales(const std::vector<Target>& outputs, const RecipeRow& recipe);
  std::int64_t scale_offset() const;

  const Work& work_;
  std::byte* const memory_;
  const std::size_t bytes_;
  std::byte* operands_ = nullptr;  // where they begin; they end at free_
  std::byte* free_ = nullptr;
  Piece piece_;
  ScaledMerge job_;
  std::vector<MatrixTerm> terms_;
  std::size_t read_ = 0;
  std::size_t variant_ = 0;
  const Stage* stage_ = nullptr;
  bool takes_ = false;              // the stage computes this matrix with memory of the device
  bool codes_made_there_ = false;   // in memory of the device, where they belong
  bool scales_made_there_ = false;  // likewise
};

}  // namespace paramdelta::io
