// A range coder of whole numbers, with a model for each size that rows have (Martin, Range encoding, 1979).
namespace loraspan {
namespace LORASPAN_ISA {

// Symbols of a model: sizes of numbers from 0 to 14, and what is larger. Shares of them are learned in 16 bits and
// coded in 15, where each symbol has two units more than its share, so that none is impossible.
constexpr int kSymbols = 16, kCodedBits = 15, kFloor = 2;
constexpr std::uint32_t kMostShare = (1u << kCodedBits) - 1;
constexpr std::int32_t kWhole = (1 << (kCodedBits + 1)) - 2 * kSymbols * kFloor;
// Zeros have at most 15 of 16 shares: so a stream of few bytes has no more numbers than 86 for each.
constexpr std::uint16_t kMostZeros = kWhole / 16 * 15;
// A model learns half as much from a symbol as before when it has seen so many, and again from twice as many more.
constexpr int kFirstRate = 6, kLastRate = 11;
constexpr std::uint32_t kSlower = 64;
// Logarithms are to base 2, in 32nds. Rows from this size on have low bits that are as good as drawn, one more for each
// octave of sizes; eight sizes an octave.
constexpr int kLogBits = 5, kLog = 1 << kLogBits, kInSize = 8;
constexpr int kLowFrom = 62, kPerOctave = 8, kMostLow = 12;
// exp(-1 / (2 v)) in 16 bits, for the variances 2^((i + 1/2) / 4) / 1024 of sizes i from 30 to 61.
constexpr int kFirstShape = 30;
constexpr std::uint32_t kShapes[kLowFrom - kFirstShape] = {
    4898,  7401,  10471, 14019, 17917, 22023, 26196, 30311, 34267, 37991, 41434, 44569, 47389, 49898, 52110, 54045,
    55729, 57185, 58438, 59514, 60434, 61218, 61886, 62452, 62933, 63340, 63685, 63976, 64221, 64429, 64604, 64751};

// A vector of what a model has, and the same wider.
using Shares = std::uint16_t __attribute__((vector_size(2 * kSymbols)));
using WideShares = std::int32_t __attribute__((vector_size(4 * kSymbols)));
constexpr Shares kFloors = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
constexpr WideShares kPlaces = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Model {
  Shares below;  // share of the symbols below each
  std::uint32_t seen, slower;
  int rate;

  std::uint32_t from(int symbol) const { return static_cast<std::uint32_t>(below[symbol] / 2 + symbol * kFloor); }
  std::uint32_t to(int symbol) const { return symbol + 1 < kSymbols ? from(symbol + 1) : 1u << kCodedBits; }

  // The symbol that has a share, of all that are coded.
  int at(std::uint32_t share) const {
    using Signed = std::int16_t __attribute__((vector_size(2 * kSymbols)));
    using Quarters = std::uint64_t __attribute__((vector_size(2 * kSymbols)));
    const Shares from = below / 2 + kFloors;
    const Signed most = static_cast<std::int16_t>(share) - Signed{};
    // in every 16 bits whether a symbol begins there or before, then how many of four do, then of all
    const auto begun = reinterpret_cast<Quarters>((reinterpret_cast<Signed>(from) <= most) & 1);
    const std::uint64_t sum = begun[0] + begun[1] + begun[2] + begun[3];
    return static_cast<int>(sum * 0x0001000100010001u >> 48) - 1;
  }

  // What is cut off a share is not always the same, or one that is small would never be learned.
  void learn(int symbol) {
    const auto cut = static_cast<std::int32_t>(++seen * 0x9E3779B9u >> (32 - rate));
    WideShares shares = __builtin_convertvector(below, WideShares);
    shares += (((kPlaces > symbol) & kWhole) - shares + cut) >> rate;
    below = __builtin_convertvector(shares, Shares);
    if (below[1] > kMostZeros) below[1] = kMostZeros;
    if (seen == slower && rate < kLastRate) ++rate, slower = 2 * slower + kSlower;
  }

  void set(const std::uint64_t* weights) {
    std::uint64_t total = 0, sum = 0;
    for (int i = 0; i < kSymbols; ++i) total += weights[i];
    for (int i = 0; i < kSymbols; ++i) {
      below[i] = static_cast<std::uint16_t>(sum * kWhole / total);
      sum += weights[i];
    }
    seen = 0, slower = kSlower, rate = kFirstRate;
  }
};

// The model of numbers of a normal distribution by half their sizes, rounded down: of even numbers, or of odd ones.
inline void set_normal(Model& model, std::uint64_t shape, bool odd) {
  const std::uint64_t square = shape * shape >> 16;
  std::uint64_t weights[kSymbols], ratio = odd ? square : shape;
  weights[0] = 1 << 16;
  weights[1] = odd ? square : 2 * shape;
  ratio = ratio * square >> 16;
  for (int i = 2; i < kSymbols; ++i) {
    weights[i] = weights[i - 1] * ratio >> 16;
    ratio = ratio * square >> 16;
  }
  model.set(weights);
}

// The model of symbols of which each is half as frequent as the one before.
inline void set_falling(Model& model) {
  std::uint64_t weights[kSymbols];
  for (int i = 0; i < kSymbols; ++i) weights[i] = 1u << (kSymbols - i);
  model.set(weights);
}

struct Models {
  Model numbers[kLowFrom][2];  // by size of rows and odd state
  Model sizes;                 // steps of it from what is known
  Model ways;                  // which way a row is written

  Models() {
    for (int size = 0; size < kLowFrom; ++size)
      for (int odd = 0; odd < 2; ++odd)
        set_normal(numbers[size][odd], kShapes[size < kFirstShape ? 0 : size - kFirstShape], odd);
    set_falling(sizes);
    set_falling(ways);
  }
};

// The logarithm of a positive whole number, rounded down, of its first 16 bits; 0 for 0.
inline int log_of(std::uint64_t value) {
  if (value == 0) return 0;
  int log = 63 - __builtin_clzll(value);
  std::uint64_t top = log > 15 ? value >> (log - 15) : value << (15 - log);
  for (int i = 0; i < kLogBits; ++i) {
    top = top * top >> 15;
    const int more = static_cast<int>(top >> 16);
    top >>= more;
    log = 2 * log + more;
  }
  return log;
}

// Of numbers by the logarithm of their mean square: which model they have, and how many low bits.
struct NumberSize {
  std::uint8_t model, low;

  explicit NumberSize(int log) {
    const int size = log < -8 * kLog ? 0 : (log + 8 * kLog) / kInSize, above = size - kLowFrom;
    model = static_cast<std::uint8_t>(above < 0 ? size : kLowFrom - kPerOctave + above % kPerOctave);
    const int more = above < 0 ? 0 : above / kPerOctave + 1;
    low = static_cast<std::uint8_t>(more < kMostLow ? more : kMostLow);
  }
};

inline std::uint32_t big_endian(const std::uint8_t* bytes) {
  std::uint32_t value = 0;
  for (int i = 0; i < 4; ++i) value = value << 8 | bytes[i];
  return value;
}

// Symbols by their shares from the front of a stream, and bits as they are from its end: a reader waits for none of
// them.
class Writer {
 public:
  Writer(std::uint8_t* out, std::int64_t room) : first_(out), at_(out), end_(out + room), bits_at_(end_) {}

  void symbol(Model& model, int value) {
    const std::uint32_t from = model.from(value), before = low_;
    range_ >>= kCodedBits;
    low_ += range_ * from;
    range_ *= model.to(value) - from;
    if (low_ < before)
      for (std::uint8_t* p = at_; ++*--p == 0;) {
      }
    for (; range_ < 1u << 24; range_ <<= 8) put();
    model.learn(value);
  }

  // At most 16 of them.
  void bits(std::uint32_t value, int count) {
    waiting_ |= value << waits_;
    for (waits_ += count; waits_ >= 8; waits_ -= 8) put_bits();
  }

  std::int64_t end() {
    for (int i = 0; i < 4; ++i) put();
    if (waits_ > 0) put_bits();
    __builtin_memmove(at_, bits_at_, static_cast<size_t>(end_ - bits_at_));
    return at_ - first_ + (end_ - bits_at_);
  }

 private:
  void put() {
    *at_++ = static_cast<std::uint8_t>(low_ >> 24);
    low_ <<= 8;
  }

  void put_bits() {
    *--bits_at_ = static_cast<std::uint8_t>(waiting_);
    waiting_ >>= 8;
  }

  std::uint32_t low_ = 0, range_ = ~0u, waiting_ = 0;
  int waits_ = 0;
  std::uint8_t *first_, *at_, *end_, *bits_at_;
};

class Reader {
 public:
  Reader(const std::uint8_t* data, std::int64_t size) : data_(data), size_(size), bits_at_(size) { take(4); }

  int symbol(Model& model) {
    range_ >>= kCodedBits;
    const std::uint32_t share = code_ / range_;
    const int value = model.at(share < kMostShare ? share : kMostShare);
    const std::uint32_t from = model.from(value);
    code_ -= range_ * from;
    range_ *= model.to(value) - from;
    const int bytes = __builtin_clz(range_) / 8;
    range_ <<= 8 * bytes;
    take(bytes);
    model.learn(value);
    return value;
  }

  std::uint32_t bits(int count) {
    for (; waits_ < count; waits_ += 8)
      waiting_ |= std::uint32_t{bits_at_ > 0 ? data_[bits_at_ - 1] : 0u} << waits_, --bits_at_;
    const std::uint32_t found = waiting_ & ((1u << count) - 1);
    waiting_ >>= count;
    waits_ -= count;
    return found;
  }

  // Whether all bytes were read, each once.
  bool at_end() const { return at_ == bits_at_; }

 private:
  void take(int bytes) {
    std::uint32_t next = 0;
    if (at_ + 4 <= size_) {
      next = big_endian(data_ + at_);
    } else {
      for (int i = 0; i < 4; ++i) next = next << 8 | (at_ + i < size_ ? data_[at_ + i] : 0u);
    }
    code_ = static_cast<std::uint32_t>(std::uint64_t{code_} << 8 * bytes | std::uint64_t{next} >> (32 - 8 * bytes));
    at_ += bytes;
  }

  const std::uint8_t* data_;
  std::int64_t size_, at_ = 0, bits_at_;
  std::uint32_t code_ = 0, range_ = ~0u, waiting_ = 0;
  int waits_ = 0;
};

}  // namespace LORASPAN_ISA
}  // namespace loraspan
