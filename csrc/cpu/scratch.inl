// Working memory of each thread, kept from call to call: fresh memory would be page-faulted in every time.
namespace loraspan {
namespace LORASPAN_ISA {

// What the memory is for; the same use in one thread gets the same memory, so two uses at once need two names.
enum class Use {
  packed,
  sums,
  weights,
  basis,
  tile,
  plan,
  rows,
  factors,
  columns,
  part,
  dots,
  steps,
  blocks,
  first_jobs,
  second_jobs,
  pairs,
  lost,
  count
};

struct Arena {
  void* data = nullptr;
  std::int64_t bytes = 0;
  ~Arena() { free(data); }
};

// At least `bytes` bytes of this thread, on a 64-byte boundary, with whatever is in them. Valid until the same thread
// asks for the same use again.
inline void* scratch_bytes(Use use, std::int64_t bytes) {
  static thread_local Arena arenas[static_cast<int>(Use::count)];
  Arena& arena = arenas[static_cast<int>(use)];
  if (bytes <= arena.bytes) return arena.data;
  constexpr std::int64_t kHugePage = std::int64_t{1} << 21;
  const std::int64_t alignment = bytes < kHugePage ? 4096 : kHugePage;
  const std::int64_t size = (bytes + alignment - 1) / alignment * alignment;
  free(arena.data);
  arena.data = nullptr;
  arena.bytes = 0;
  if (posix_memalign(&arena.data, static_cast<size_t>(alignment), static_cast<size_t>(size)) != 0) abort();
#ifdef __linux__
  if (alignment == kHugePage) madvise(arena.data, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
  arena.bytes = size;
  return arena.data;
}

template <typename T>
inline T* scratch(Use use, std::int64_t count) {
  return static_cast<T*>(scratch_bytes(use, count * static_cast<std::int64_t>(sizeof(T))));
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
