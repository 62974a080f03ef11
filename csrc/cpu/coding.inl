// Tables of whole numbers to a stream and back: of every row whether it is a path through the trellis, its size beside
// what its column's weight tells of that, and its numbers by the models of their sizes.
namespace loraspan {
namespace LORASPAN_ISA {

constexpr int kEscape = kSymbols - 1, kSizeBits = 7, kLengthBits = 4, kStepBits = 4, kStep = 1 << kStepBits;

// How a row is written: as whole numbers, as a path through the trellis, or as one whose negative is a path.
enum Way { kNumbers, kPath, kTurnedPath, kWays };

template <typename T>
inline bool is_path(const T* row, std::int64_t length, int sign) {
  int state = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    const int number = sign * row[i];
    if ((number ^ state) & 1) return false;
    state = next_state(state, number >> 1);
  }
  return true;
}

template <typename T>
inline int way_of(const T* row, std::int64_t length) {
  return is_path(row, length, 1) ? kPath : is_path(row, length, -1) ? kTurnedPath : kNumbers;
}

// The size of a row: of the sum of its squares, or of its double where it is no path.
template <typename T>
inline int size_of(const T* row, std::int64_t length, int way) {
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < length; ++i)
    sum += static_cast<std::uint64_t>(std::int64_t{row[i]} * row[i]) * (way == kNumbers ? 4u : 1u);
  return log_of(sum);
}

// Sizes of rows as steps of half an octave from what is known, to and fro in turns; larger steps by the size itself.
// Both give the size that is told.
inline int write_size(Writer& out, Model& model, int size, int known) {
  const int step = (size - known + kStep / 2) >> kStepBits, turns = step < 0 ? -2 * step - 1 : 2 * step;
  out.symbol(model, turns < kEscape ? turns : kEscape);
  if (turns < kEscape) return known + kStep * step;
  out.bits(static_cast<std::uint32_t>(size >> kStepBits), kSizeBits);
  return size >> kStepBits << kStepBits;
}

inline int read_size(Reader& in, Model& model, int known) {
  const int turns = in.symbol(model);
  if (turns == kEscape) return static_cast<int>(in.bits(kSizeBits)) << kStepBits;
  return known + kStep * (turns & 1 ? -(turns + 1) / 2 : turns / 2);
}

inline int bit_length(std::uint32_t value) { return value ? 32 - __builtin_clz(value) : 0; }

// A size: its high bits by a model, what is beyond that by its length in bits, low bits as they are.
inline void write_entry(Writer& out, Model& model, int low, std::uint32_t size) {
  const std::uint32_t high = size >> low, rest = high - kEscape;
  out.symbol(model, high < kEscape ? static_cast<int>(high) : kEscape);
  if (high >= kEscape) {
    const int length = bit_length(rest);
    out.bits(static_cast<std::uint32_t>(length), kLengthBits);
    if (length > 1) out.bits(rest - (1u << (length - 1)), length - 1);
  }
  out.bits(size & ((1u << low) - 1), low);
}

inline std::uint32_t read_entry(Reader& in, Model& model, int low) {
  std::uint32_t high = static_cast<std::uint32_t>(in.symbol(model));
  if (high == kEscape) {
    const int length = static_cast<int>(in.bits(kLengthBits));
    if (length > 1) high += in.bits(length - 1) + (1u << (length - 1));
    if (length == 1) ++high;
  }
  return high << low | in.bits(low);
}

// How much larger than others numbers in some places of a row are, by the rows before: their mean squares where that of
// a row is 1, with some rows in which all places are the same.
class Places {
 public:
  explicit Places(std::int64_t length)
      : squares_(scratch<std::int64_t>(Use::sums, length)),
        sizes_(scratch<NumberSize>(Use::rows, length)),
        length_(length) {
    for (std::int64_t i = 0; i < length; ++i) squares_[i] = kPrior << kUnitBits;
  }

  template <typename T>
  void add(const T* row) {
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < length_; ++i) sum += std::int64_t{row[i]} * row[i];
    if (sum == 0) return;
    ++rows_;
    // one rounding at a time, of which no processor makes another
    const double unit = static_cast<double>(length_ << kUnitBits) / static_cast<double>(sum);
    for (std::int64_t i = 0; i < length_; ++i)
      squares_[i] += static_cast<std::int64_t>(static_cast<double>(std::int64_t{row[i]} * row[i]) * unit);
  }

  // Whether places differ by more than it takes to learn them, some bits each, and than logarithms are rounded.
  bool differ() const {
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < length_; ++i) sum -= more_in(i);
    return (sum - length_) * (rows_ + kPrior) > 2 * kLog * kLearning * length_;
  }

  // Of the numbers of a row whose mean square has a logarithm.
  const NumberSize* sizes(int mean) const {
    for (std::int64_t i = 0; i < length_; ++i) sizes_[i] = NumberSize(mean + more_in(i));
    return sizes_;
  }

 private:
  static constexpr std::int64_t kPrior = 1, kUnitBits = 10, kLearning = 3;

  int more_in(std::int64_t i) const {
    return log_of(static_cast<std::uint64_t>(squares_[i])) -
           log_of(static_cast<std::uint64_t>(rows_ + kPrior) << kUnitBits);
  }

  std::int64_t* squares_;
  NumberSize* sizes_;
  std::int64_t length_, rows_ = 0;
};

// Numbers by their sizes, those of paths by half of it, rounded down, and their signs as they are. size_of(i) has what
// size they are of.
template <typename T, typename Size>
inline void write_row(Writer& out, Models& models, const T* row, std::int64_t length, int way, Size size_of) {
  const int path = way != kNumbers, sign = way == kTurnedPath ? -1 : 1;
  int state = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    const NumberSize size = size_of(i);
    const std::int32_t number = sign * row[i];
    const auto magnitude = static_cast<std::uint32_t>(number < 0 ? -number : number);
    write_entry(out, models.numbers[size.model][state & 1], size.low, magnitude >> path);
    if (number) out.bits(number < 0, 1);
    if (path) state = next_state(state, number >> 1);
  }
}

// Gives whether the numbers are within their table's.
template <typename T, typename Size>
inline bool read_row(Reader& in, Models& models, T* row, std::int64_t length, int way, Size size_of) {
  const int path = way != kNumbers, sign = way == kTurnedPath ? -1 : 1;
  const std::int32_t most = sizeof(T) == 1 ? 127 : 32512;
  int state = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    const int odd = state & 1;
    const NumberSize size = size_of(i);
    const auto entry = static_cast<std::int32_t>(read_entry(in, models.numbers[size.model][odd], size.low));
    const std::int32_t magnitude = path ? 2 * entry + odd : entry;
    if (magnitude > most) return false;
    const std::int32_t number = magnitude && in.bits(1) ? -magnitude : magnitude;
    row[i] = static_cast<T>(sign * number);
    if (path) state = next_state(state, number >> 1);
  }
  return true;
}

// What is known of the size of a row before it is read: that of the weight of its column, and a task's step, which all
// of its columns in a slot have. It is that of the row above, and for the first of a task that of the last such row.
class Known {
 public:
  Known(const CodedTable* tables, std::int64_t count) {
    std::int32_t most = 0;
    for (std::int64_t t = 0; t < count; ++t)
      for (std::int64_t i = 0; tables[t].tasks && i < tables[t].rows; ++i)
        if (tables[t].tasks[i] > most) most = tables[t].tasks[i];
    firsts_ = scratch<int>(Use::steps, most + 1);
    for (std::int64_t i = 0; i <= most; ++i) firsts_[i] = kNone;
  }

  int size(const CodedTable& table, std::int64_t i) {
    const std::int32_t task = table.tasks ? table.tasks[i] : 0;
    const bool first = i == 0 || (table.tasks && table.tasks[i - 1] != task);
    first_ = first ? firsts_ + task : nullptr;
    if (first && *first_ != kNone) level_ = *first_;
    weight_ = table.weights ? 2 * log_of_float(table.weights + i) : 0;
    return level_ + weight_;
  }

  void learn(int size) {
    if (size == 0) return;
    level_ = size - weight_;
    if (first_) *first_ = level_;
  }

 private:
  static constexpr int kNone = 1 << 30;

  static int log_of_float(const float* value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, value, sizeof bits);
    const int exponent = static_cast<int>(bits >> 23 & 255);
    return kLog * (exponent - 150) + log_of((bits & 0x7fffff) | 0x800000);
  }

  int *firsts_, *first_ = nullptr;
  int level_ = 0, weight_ = 0;
};

template <typename T>
inline bool places_differ(const CodedTable& table, const T* rows) {
  Places places(table.length);
  for (std::int64_t i = 0; i < table.rows; ++i) places.add(rows + i * table.length);
  return places.differ();
}

template <typename T>
inline void write_table(Writer& out, Models& models, Known& known, const CodedTable& table, const T* rows) {
  const std::int64_t length = table.length;
  const bool differ = table.rows > 1 && places_differ(table, rows);
  if (table.rows > 1) out.bits(differ, 1);
  Places places(differ ? length : 0);
  for (std::int64_t i = 0; i < table.rows; ++i) {
    const T* row = rows + i * length;
    const int way = way_of(row, length), size = size_of(row, length, way);
    out.symbol(models.ways, way);
    const int mean = write_size(out, models.sizes, size, known.size(table, i)) - log_of(length);
    if (differ) {
      const NumberSize* sizes = places.sizes(mean);
      write_row(out, models, row, length, way, [sizes](std::int64_t k) { return sizes[k]; });
      places.add(row);
    } else {
      const NumberSize same(mean);
      write_row(out, models, row, length, way, [same](std::int64_t) { return same; });
    }
    known.learn(size);
  }
}

template <typename T>
inline bool read_table(Reader& in, Models& models, Known& known, const CodedTable& table, T* rows) {
  const std::int64_t length = table.length;
  const bool differ = table.rows > 1 && in.bits(1);
  Places places(differ ? length : 0);
  for (std::int64_t i = 0; i < table.rows; ++i) {
    T* row = rows + i * length;
    const int way = in.symbol(models.ways);
    if (way >= kWays) return false;
    const int mean = read_size(in, models.sizes, known.size(table, i)) - log_of(length);
    if (differ) {
      const NumberSize* sizes = places.sizes(mean);
      if (!read_row(in, models, row, length, way, [sizes](std::int64_t k) { return sizes[k]; })) return false;
      places.add(row);
    } else {
      const NumberSize same(mean);
      if (!read_row(in, models, row, length, way, [same](std::int64_t) { return same; })) return false;
    }
    known.learn(size_of(row, length, way));
  }
  return true;
}

std::int64_t encode(const CodedTable* tables, std::int64_t count, std::uint8_t* out, std::int64_t room) {
  Models models;
  Known known(tables, count);
  Writer writer(out, room);
  for (std::int64_t t = 0; t < count; ++t) {
    const CodedTable& table = tables[t];
    if (table.bits == 8) write_table(writer, models, known, table, static_cast<const std::int8_t*>(table.numbers));
    if (table.bits == 16) write_table(writer, models, known, table, static_cast<const std::int16_t*>(table.numbers));
  }
  return writer.end();
}

bool decode(const CodedTable* tables, std::int64_t count, const std::uint8_t* data, std::int64_t size) {
  Models models;
  Known known(tables, count);
  Reader reader(data, size);
  for (std::int64_t t = 0; t < count; ++t) {
    const CodedTable& table = tables[t];
    const bool within = table.bits == 8
                            ? read_table(reader, models, known, table, static_cast<std::int8_t*>(table.numbers))
                            : read_table(reader, models, known, table, static_cast<std::int16_t*>(table.numbers));
    if (!within) return false;
  }
  return reader.at_end();
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
