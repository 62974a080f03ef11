// packed: rows of vectors in 16, 8 or 4 bits an entry, with a float16 scale for every block of 64 entries along a row.
#pragma once

#include "loraspan/types.hpp"

namespace loraspan {

// Entries that share a scale.
constexpr std::int64_t kPackedBlock = 64;

// Entry i of row r is level * scale / 128, `scale` that of block i / 64 of its row: float16, of either sign.
// 16 and 8 bits: the level is the signed number i of the row. 4 bits: it is kLevels at the index in byte i / 2, in its
// low half where i is even. Rows follow each other, each with whole bytes and whole blocks.
struct PackedRows {
  const std::uint8_t* codes;    // [rows, ceil(length * bits / 8)]
  const std::uint16_t* scales;  // [rows, ceil(length / 64)]
  std::int64_t length;
  std::int64_t bits;
};

// Packs x [., length] in 8 or 4 bits into codes and scales, which are overwritten. Gives -1, or the first row with an
// entry that is not finite or, rounded to float32, above kPackedLargest; what was written means nothing then. Same bits
// for any number of threads and from every instruction set.
using PackFn = std::int64_t(const Block& x, std::int64_t length, std::int64_t bits, std::uint8_t* codes,
                            std::uint16_t* scales, int threads);

// Entries to out [rows, length], contiguous, of any dtype: float32 holds those of 8 and 4 bits, and those of 16 are
// rounded to it; as other dtypes rounded once more.
using UnpackFn = void(const PackedRows& x, std::int64_t rows, void* out, Dtype dtype, int threads);

// What a float16 scale can still make of level 127.
constexpr float kPackedLargest = 64992.0f;

}  // namespace loraspan
