// Vectors of ISO_W floats with GCC's vector extension, which lowers to whatever the enclosing target offers. Included
// inside the namespace of one instruction set, after ISO_W and ISO_ATTR are defined and before its own primitives.
//
// Nothing here may call a function template of the standard library: the linker keeps one copy of those for all
// instruction sets.

#define ISO_INLINE_MEMBER inline __attribute__((always_inline))
#define ISO_INLINE static ISO_INLINE_MEMBER

constexpr int W = ISO_W;
typedef float vf __attribute__((vector_size(ISO_W * 4)));
typedef int32_t vi __attribute__((vector_size(ISO_W * 4)));
typedef float vf_memory __attribute__((vector_size(ISO_W * 4), aligned(4), may_alias));
typedef int32_t vi_memory __attribute__((vector_size(ISO_W * 4), aligned(2), may_alias));
typedef uint16_t vh __attribute__((vector_size(ISO_W * 2)));
typedef uint8_t vb __attribute__((vector_size(ISO_W)));
typedef uint16_t vh_memory __attribute__((vector_size(ISO_W * 2), aligned(2), may_alias));
typedef uint32_t word_memory __attribute__((aligned(2), may_alias));

ISO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ISO_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
ISO_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

ISO_INLINE vf set(float value) { return value - vf{}; }
ISO_INLINE vf load(const float* p) { return (vf) * reinterpret_cast<const vf_memory*>(p); }
ISO_INLINE void store(float* p, vf value) { *reinterpret_cast<vf_memory*>(p) = (vf_memory)value; }
ISO_INLINE vi load_words(const void* p) { return (vi) * reinterpret_cast<const vi_memory*>(p); }
ISO_INLINE uint32_t load_word(const void* p) { return *reinterpret_cast<const word_memory*>(p); }
ISO_INLINE vi set_word(uint32_t value) { return static_cast<int32_t>(value) - vi{}; }
ISO_INLINE vf choose(vi mask, vf a, vf b) { return mask ? a : b; }
ISO_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

ISO_INLINE vi lanes() {
  vi out{};
  for (int i = 0; i < W; ++i) out[i] = i;
  return out;
}

// Lane i of `low`: a[i] where bit S of i is clear, else b[i - S]; of `high`: a[i + S], else b[i].
template <int S, class V, size_t... I>
ISO_INLINE V low_of(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((I & S) == 0 ? I : I - S + W)...);
}
template <int S, class V, size_t... I>
ISO_INLINE V high_of(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((I & S) == 0 ? I + S : I + W)...);
}
using Lanes = std::make_index_sequence<ISO_W>;

// Rows and columns of W × W words change places.
template <int S = 1>
ISO_INLINE void transpose(vi* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & S) != 0) continue;
    const vi a = v[i], b = v[i + S];
    v[i] = low_of<S>(a, b, Lanes{});
    v[i + S] = high_of<S>(a, b, Lanes{});
  }
  if constexpr (2 * S < W) transpose<2 * S>(v);
}

// Round to nearest even; NaN stays NaN.
ISO_INLINE vh narrow_portable(vf value) {
  const vi bits = (vi)value, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const vi nan = (bits & 0x7fffffff) > 0x7f800000;
  return __builtin_convertvector(((nan ? (bits | 0x400000) : rounded) >> 16) & 0xffff, vh);
}
