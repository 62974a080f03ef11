// Square transposes of vectors in registers.
namespace loraspan {
namespace LORASPAN_ISA {

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Lanes<I...>;
};

// Transposes the 2 x 2 blocks of `Step` lanes that rows a and b of a pair hold.
template <int Step, typename V, int... I>
inline __attribute__((always_inline)) void swap_blocks(V& a, V& b, Lanes<I...>) {
  constexpr int n = sizeof...(I);
  const V upper = __builtin_shufflevector(a, b, ((I & Step) ? n + (I ^ Step) : I)...);
  b = __builtin_shufflevector(a, b, ((I & Step) ? n + I : (I ^ Step))...);
  a = upper;
}

template <int Step, int N, typename V>
inline __attribute__((always_inline)) void transpose_steps(V (&rows)[N]) {
  LORASPAN_UNROLL
  for (int i = 0; i < N; ++i)
    if ((i & Step) == 0) swap_blocks<Step>(rows[i], rows[i | Step], typename CountTo<N>::type{});
  if constexpr (Step > 1) transpose_steps<Step / 2>(rows);
}

// rows[i] lane j  <->  rows[j] lane i
template <int N, typename V>
inline __attribute__((always_inline)) void transpose(V (&rows)[N]) {
  transpose_steps<N / 2>(rows);
}

// The same for kLanes<T> vectors that follow each other in memory.
template <typename T>
inline void transpose_square(T* square) {
  constexpr int L = kLanes<T>;
  Vec<T> v[L];
  LORASPAN_UNROLL
  for (int i = 0; i < L; ++i) v[i] = load(static_cast<const T*>(square) + i * L);
  transpose(v);
  LORASPAN_UNROLL
  for (int i = 0; i < L; ++i) store(square + i * L, v[i]);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
