// Rows as the products with weights take them.

constexpr int kGroup = ISO_AMX ? 16 : ISO_W == 8 ? 6 : 12;  // rows that share one pass over a tile
constexpr int kStepWords = 16;                              // AMX: words that tile registers take at once

// Whether the rows of a group lie one after the other, as tile registers take them, and not word by word.
template <class M>
constexpr bool kByRow = ISO_AMX && !M::f32;

// What a row's sums of integers are worth, and the sum of its integers (integer_rows.h).
struct RowScale {
  float scale;
  int32_t sum;
};

struct Group {
  const uint32_t* words;  // [word × kRowWords][row]; kByRow: [row][word]
  int64_t stride;         // between words; kByRow: between rows
  int rows;
  int64_t first;                     // the group's first row among those of its call
  const RowScale* scales = nullptr;  // where rows are integers: [group of inputs][row]
  bool enlarged = false;             // whether its numbers have been multiplied by kFp8Factor (fp8_direct.h)
};

ISO_INLINE int64_t group_count(int64_t rows) { return ceil_div(rows, kGroup); }

// Cuts `rows` into groups: group g is rows [begin(g), begin(g + 1)). They are of nearly one size, or, where one costs
// as much as a full one, full but for the last.
ISO_INLINE int64_t group_begin(int64_t rows, int64_t g) {
  return ISO_AMX ? least(g * kGroup, rows) : rows * g / group_count(rows);
}

// Weights that a pass decodes for several rows: AMX is done with a line so soon that the first cache has too few places
// for those under way.
ISO_INLINE void prefetch_block(const void* p) { ISO_AMX ? prefetch_second(p) : prefetch(p); }

// Words `begin` and on.
template <class M>
ISO_INLINE const uint32_t* words_from(const Group& group, int64_t begin) {
  return group.words + (kByRow<M> ? begin : begin * kRowWords<M> * group.stride);
}

// Between the words of one row, for products with weights that are decoded in registers; on AMX those of one row alone.
ISO_INLINE int64_t word_stride(const Group& group) { return ISO_AMX ? 1 : group.stride; }

// Rows whose words are still to be written, at `words`. Where kByRow, one of several groups of fewer rows than kGroup
// is read as if it had as many: what lies behind it is read, and means nothing.
template <class M>
ISO_INLINE Group unpacked_group(uint32_t* words, int64_t row_words, int rows, int64_t first) {
  return Group{words, kByRow<M> ? row_words : rows, rows, first};
}

// `elements` of each row as the group's words `begin` and on. `row(r)` gives them.
template <class M, class Row>
ISO_INLINE void pack_words(const Group& group, int64_t begin, int64_t elements, Row row) {
  auto* to = const_cast<uint32_t*>(words_from<M>(group, begin));
  if constexpr (!kByRow<M>) {
    pack_group<M>(group.rows, elements, to, row);
  } else {
    const int64_t words = words_of<M>(elements), whole = elements / M::pack;
    for (int r = 0; r < group.rows; ++r, to += group.stride) {
      __builtin_memcpy(to, row(r), whole * sizeof(uint32_t));
      if (whole < words) to[whole] = word_at<M>(row(r), elements, whole);
    }
  }
}
