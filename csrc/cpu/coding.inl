// Tables of whole numbers to a stream and back: of every row whether it is a path through the trellis, its size, and
// its numbers by the models of that size.
namespace loraspan {
namespace LORASPAN_ISA {

constexpr int kEscape = kSymbols - 1, kSizeBits = 7, kLengthBits = 4;

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

// The class of the sum of squares of a row, or of its double where it is no path.
template <typename T>
inline int sum_class(const T* row, std::int64_t length, int way) {
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < length; ++i)
    sum += static_cast<std::uint64_t>(std::int64_t{row[i]} * row[i]) * (way == kNumbers ? 4u : 1u);
  return size_class(sum);
}

// Sizes of rows as steps from one that is known: to and fro in turns, larger steps by the size itself.
inline void write_size(Writer& out, Model& model, int size, int known) {
  const int step = size - known, turns = step < 0 ? -2 * step - 1 : 2 * step;
  out.symbol(model, turns < kEscape ? turns : kEscape);
  if (turns >= kEscape) out.bits(static_cast<std::uint32_t>(size), kSizeBits);
}

inline int read_size(Reader& in, Model& model, int known) {
  const int turns = in.symbol(model);
  if (turns == kEscape) return static_cast<int>(in.bits(kSizeBits));
  const int size = known + (turns & 1 ? -(turns + 1) / 2 : turns / 2);
  const int most = (1 << kSizeBits) - 1;
  return size < 0 ? 0 : size > most ? most : size;
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

// Numbers by their sizes, those of paths by half of it, rounded down, and their signs as they are.
template <typename T>
inline void write_row(Writer& out, Models& models, const T* row, std::int64_t length, int way, int sum) {
  const RowSize size(sum, length);
  const int path = way != kNumbers, sign = way == kTurnedPath ? -1 : 1;
  int state = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    const std::int32_t number = sign * row[i];
    const auto magnitude = static_cast<std::uint32_t>(number < 0 ? -number : number);
    write_entry(out, models.numbers[size.model][state & 1], size.low, magnitude >> path);
    if (number) out.bits(number < 0, 1);
    if (path) state = next_state(state, number >> 1);
  }
}

// Gives whether the numbers are within their table's.
template <typename T>
inline bool read_row(Reader& in, Models& models, T* row, std::int64_t length, int way, int sum) {
  const RowSize size(sum, length);
  const int path = way != kNumbers, sign = way == kTurnedPath ? -1 : 1;
  const std::int32_t most = sizeof(T) == 1 ? 127 : 32512;
  int state = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    const int odd = state & 1;
    const auto entry = static_cast<std::int32_t>(read_entry(in, models.numbers[size.model][odd], size.low));
    const std::int32_t magnitude = path ? 2 * entry + odd : entry;
    if (magnitude > most) return false;
    const std::int32_t number = magnitude && in.bits(1) ? -magnitude : magnitude;
    row[i] = static_cast<T>(sign * number);
    if (path) state = next_state(state, number >> 1);
  }
  return true;
}

// Calls row(table, place, known, model) for every row, whose class of size is to be left at `known`: what is there
// before is that of the row beside it, where the table before has as many rows, or of the row above.
template <typename Row>
inline bool each_row(const CodedTable* tables, std::int64_t count, Models& models, const Row& row) {
  std::int64_t most = 0;
  for (std::int64_t t = 0; t < count; ++t) most = tables[t].rows > most ? tables[t].rows : most;
  auto* sums = scratch<std::int32_t>(Use::steps, most + 1);
  bool beside = false;
  for (std::int64_t t = 0; t < count; ++t) {
    beside = t > 0 && !beside && tables[t].rows == tables[t - 1].rows;
    for (std::int64_t i = 0; i < tables[t].rows; ++i) {
      if (!beside) sums[i] = i ? sums[i - 1] : 0;
      if (!row(tables[t], i, sums[i], models.sizes[beside])) return false;
    }
  }
  return true;
}

// Calls use(row) with a row of 8 or 16 bits.
template <typename Use>
inline bool with_row(const CodedTable& table, std::int64_t i, const Use& use) {
  if (table.bits == 8) return use(static_cast<std::int8_t*>(table.numbers) + i * table.length);
  return use(static_cast<std::int16_t*>(table.numbers) + i * table.length);
}

std::int64_t encode(const CodedTable* tables, std::int64_t count, std::uint8_t* out, std::int64_t room) {
  Models models;
  Writer writer(out, room);
  each_row(tables, count, models, [&](const CodedTable& table, std::int64_t i, std::int32_t& known, Model& sizes) {
    return with_row(table, i, [&](const auto* row) {
      const int way = way_of(row, table.length), sum = sum_class(row, table.length, way);
      writer.symbol(models.ways, way);
      write_size(writer, sizes, sum, known);
      write_row(writer, models, row, table.length, way, sum);
      known = sum;
      return true;
    });
  });
  return writer.end();
}

bool decode(const CodedTable* tables, std::int64_t count, const std::uint8_t* data, std::int64_t size) {
  Models models;
  Reader reader(data, size);
  const bool whole =
      each_row(tables, count, models, [&](const CodedTable& table, std::int64_t i, std::int32_t& known, Model& sizes) {
        return with_row(table, i, [&](auto* row) {
          const int way = reader.symbol(models.ways);
          if (way >= kWays) return false;
          known = read_size(reader, sizes, known);
          return read_row(reader, models, row, table.length, way, known);
        });
      });
  return whole && reader.at_end();
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
