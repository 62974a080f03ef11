// coding: rows of whole numbers in as few bytes as their sizes tell, and vectors rounded to such numbers by a trellis.
#pragma once

#include "loraspan/types.hpp"

namespace loraspan {

// A table of whole numbers, row-major and contiguous, of 8 or 16 bits each.
struct CodedTable {
  void* numbers;  // [rows, length]
  std::int64_t rows;
  std::int64_t length;
  std::int64_t bits;
  // What is known before: of every row the weight of its column and the task that has it, or null.
  const float* weights;
  const std::int32_t* tasks;
};

// Bytes that a stream takes at the most: for each number, each row, and beside.
constexpr std::int64_t kBytesPerNumber = 6, kBytesPerRow = 6, kBytesPerStream = 8;

// Writes tables as one stream, of the same bytes from every instruction set, and gives their number. `out` has `room`
// for as many as a stream takes at the most. Numbers are at most 127 in size, or 32512 in 16 bits.
using EncodeFn = std::int64_t(const CodedTable* tables, std::int64_t count, std::uint8_t* out, std::int64_t room);

// Reads such a stream into tables, whose numbers are overwritten. Gives whether it is one of such tables, no byte of it
// left over.
using DecodeFn = bool(const CodedTable* tables, std::int64_t count, const std::uint8_t* data, std::int64_t size);

// Rounds x [rows, length], contiguous, of at most 32510 in size, to the whole numbers of the path through the trellis,
// a row at a time, that is nearest to it. Same numbers for any number of threads and from every instruction set.
//
// A path begins in state 0. In an even state numbers are even, in an odd state odd; the index of a number is half of
// it, rounded down, and next_state has where an index leads (Marcellin and Fischer, Trellis coded quantization of
// memoryless and Gauss-Markov sources, 1990; coded by their sizes as in Fischer and Wang, Entropy-constrained
// trellis-coded quantization, 1992).
using TrellisFn = void(const float* x, std::int64_t rows, std::int64_t length, std::int16_t* out, int threads);

constexpr int kTrellisStates = 256;

// Ungerboeck's code of 256 states, 515 and 362 in octal (Channel coding with multilevel/phase signals, 1982, table I).
constexpr int next_state(int state, int index) {
  return (state >> 1) ^ (state & 1 ? 0515 >> 1 : 0) ^ (index & 1 ? 0362 >> 1 : 0);
}

}  // namespace loraspan
